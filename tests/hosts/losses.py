"""Validation losses of a small GPT after equal steps, on virtual ranks: what plans and rounds cost. A line of JSON each."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mpi_ef.jobs.train.config import TrainConfig
from mpi_ef.jobs.train.loop import Trainer
from mpi_ef.testing import virtual

TOPK = {"compressor": "topk", "ratio": 0.01, "values": "bf16"}


def owners(ratio: float, values: str) -> str:
    return f"TwoPhaseMean(reply=TopK({ratio}, values=Quantize('{values}')))"


def cases() -> Iterator[tuple[str, int, int, int, dict[str, Any]]]:
    """Yield names, numbers of ranks and steps, samples of a rank and step, and options, of two seeds but for many ranks."""
    gathered = TOPK | {"plan": "GatherMean"}
    for n, steps, batch in ((8, 240, 8), (32, 150, 2), (16, 240, 4)):
        yield f"{n} gathered", n, steps, batch, gathered
        yield f"{n} through owners", n, steps, batch, TOPK
    yield "8 in 2 nodes", 8, 240, 8, TOPK | {"plan": "NodeMean(node=4)"}
    yield "32 in 4 nodes", 32, 150, 2, TOPK | {"plan": "NodeMean(node=8)"}
    for name, ratio, values in (("reply k", 0.01, "bf16"), ("int8, reply 2k", 0.02, "int8")):
        plan = f'NodeMean(node=4, inner="{owners(ratio, values)}")'
        yield f"16 in 4 nodes, {name}", 16, 240, 4, TOPK | {"values": values, "plan": plan}


def loss(n: int, steps: int, batch: int, seed: int, text: Path, options: dict[str, Any]) -> tuple[float, int]:
    config = TrainConfig(text=text, steps=steps, batch=batch, context=32, layers=2, heads=2, width=48, lr=0.006, seed=seed,
                         eval_every=steps, **options)

    def program(comm: Any) -> tuple[float, int]:
        trainer = Trainer(comm, config)
        for _ in range(steps):
            trainer.step()
        row = trainer.row(evaluate=True)
        return row["val_loss"], row["link_nbytes"]

    found: tuple[float, int] = virtual.results(n, program)[0]
    return found


def main() -> None:
    torch.set_num_threads(1)
    for name, n, steps, batch, options in cases():
        for seed in (0, 1) if n < 32 else (0,):
            value, link = loss(n, steps, batch, seed, Path(sys.argv[1]), options)
            print(json.dumps({"case": name, "seed": seed, "loss": value, "link": link}), flush=True)


if __name__ == "__main__":
    main()
