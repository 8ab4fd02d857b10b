"""Validation losses of a small GPT after equal steps, on virtual ranks: what plans and rounds cost. A line of JSON each."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpi_ef.collectives import build_plan, plan_for
from mpi_ef.compress import Quantize, TopK
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

    found: tuple[float, int] = virtual.results(n, program, ranks_per_node=max(1, n // 4))[0]
    return found


def link(n: int, options: dict[str, Any]) -> int:
    """Return the bytes over the link of one of four nodes in an exchange of 2e6 entries; in short vectors headers count."""
    values = Quantize(options["values"])

    def program(comm: Any) -> int:
        plan = build_plan(options.get("plan", plan_for), comm, TopK(options["ratio"], values=values), 2_000_000, np.float32)
        return plan.link_traffic.nbytes

    nbytes: int = virtual.results(n, program, ranks_per_node=n // 4)[0]
    return nbytes


def main() -> None:
    torch.set_num_threads(1)
    for name, n, steps, batch, options in cases():
        for seed in (0, 1) if n < 32 else (0,):
            value, crossed = loss(n, steps, batch, seed, Path(sys.argv[1]), options)
            print(json.dumps({"case": name, "seed": seed, "loss": value, "crossed": crossed, "link": link(n, options)}),
                  flush=True)


if __name__ == "__main__":
    main()
