"""Ranks on hosts: a small GPT trained in several ways, on the same data and schedule. Rank 0 prints a line of JSON each.

    training.py METHODS STEPS EVALUATE [OPTION=VALUE ...]

METHODS: names of :data:`WAYS` and of dense ones, separated by commas. Every EVALUATE steps (0: never) the validation loss is
taken, outside of the times. The first two steps are left out: buffers fill, kernels compile.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from mpi_ef.jobs.train.config import TrainConfig, learning_rate
from mpi_ef.jobs.train.datasets import Text, batches, shard
from mpi_ef.jobs.train.loop import Trainer, _build
from mpi_ef.jobs.train.optimizers import _chosen, _decayed

COUNTER = Path("/sys/class/net/eth0/statistics/tx_bytes")
COMM = MPI.COMM_WORLD
Step = Callable[[int], None]

WAYS: dict[str, dict[str, Any]] = {  # options of `mpi-ef train`
    "identity": {"compressor": "identity"},
    "topk": {"compressor": "topk", "ratio": 0.01, "values": "bf16"},
    "topk gathered": {"compressor": "topk", "ratio": 0.01, "values": "bf16", "plan": "GatherMean"},
    "topk by node": {"compressor": "topk", "ratio": 0.01, "values": "bf16", "plan": "NodeMean"},
    "sign": {"compressor": "sign", "block": 4096},
    "rounds": {"compressor": "topk", "ratio": 0.03, "values": "2bit", "exchange_every": 15},
}


class Plain:
    """Dense AdamW with another library's allreduce."""

    def __init__(self, name: str, config: TrainConfig) -> None:
        torch.manual_seed(config.seed)
        self.config, self.steps = config, 0
        self.data, self.model, *_ = _build(config)
        order = np.random.default_rng(config.seed).permutation(self.data.size)
        own = shard(self.data.size, COMM.size, COMM.rank, order=order)
        self._batches = batches(own, config.batch, seed=config.seed, rank=COMM.rank)
        self._called, self._sum = self.model, name == "MPI_Allreduce"
        if not self._sum:
            self._called = DDP(self.model)
            if name == "DDP fp16":
                self._called.register_comm_hook(None, fp16_compress_hook)
        self._optimizer = torch.optim.AdamW(_decayed(_chosen(config), self.model), lr=config.lr,
                                            betas=(config.beta1, config.beta2))

    def step(self) -> None:
        self.steps += 1
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.steps)
        epoch, indices = next(self._batches)
        inputs, targets = self.data.batch(indices, epoch)
        self._optimizer.zero_grad()
        loss_of(self._called(inputs), targets).backward()
        if self._sum:
            parameters = [p for p in self.model.parameters() if p.grad is not None]
            flat = torch.cat([p.grad.view(-1) for p in parameters]).numpy()
            COMM.Allreduce(MPI.IN_PLACE, flat)
            mean = torch.from_numpy(flat).div_(COMM.size)
            for p, part in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
                p.grad.copy_(part.view_as(p))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self._optimizer.step()


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def validation(model: torch.nn.Module, data: Text) -> float:
    """Return the loss on held-out text, the same for all ways; a share on each rank. Collective."""
    own = np.arange(data.held_out_size)[COMM.rank :: COMM.size]
    total = 0.0
    with torch.no_grad():
        for start in range(0, own.size, 256):
            inputs, targets = data.held_out(own[start : start + 256])
            total += float(loss_of(model(inputs), targets)) * len(inputs)
    return COMM.allreduce(total) / data.held_out_size


def run(name: str, config: TrainConfig, steps: int, evaluate: int) -> Iterator[dict[str, Any]]:
    node = COMM.Split_type(MPI.COMM_TYPE_SHARED)
    way = WAYS.get(name)
    config = replace(config, **way) if way else replace(config, compressor="identity")
    trainer: Any = Trainer(COMM, config) if way else Plain(name, config.resolved())
    seconds, nbytes, path, total = [], [], [], 0.0
    for step in range(1, steps + 1):
        COMM.Barrier()
        before = int(COUNTER.read_text())
        COMM.Barrier()
        began = perf_counter()
        trainer.step()
        spent = perf_counter() - began
        COMM.Barrier()
        sent = int(COUNTER.read_text()) - before if node.rank == 0 else 0
        spent, sent = COMM.allreduce(spent, MPI.MAX), COMM.allreduce(sent, MPI.MAX)
        if step > 2:
            seconds.append(spent)
            nbytes.append(sent)
            total += spent
        if evaluate and step % evaluate == 0:
            path.append([step, round(total + 2 * median(seconds), 2), round(validation(trainer.model, trainer.data), 4)])
    yield {"way": name, "seconds": median(seconds), "link": median(nbytes), "path": path,
           "mean seconds": mean(seconds), "mean link": mean(nbytes)}


def main() -> None:
    names, steps, evaluate = sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3])
    options = dict(option.split("=", 1) for option in sys.argv[4:])
    fields = TrainConfig.__dataclass_fields__
    typed = {key: Path(text) if key == "text" else type(fields[key].default or 0)(text) if fields[key].default is not None
             else float(text) if "." in text else int(text) for key, text in options.items()}
    config = TrainConfig(steps=max(steps, 40), warmup=min(10, steps), **typed)
    torch.set_num_threads(1)
    if any(name.startswith("DDP") for name in names):
        os.environ.setdefault("MASTER_ADDR", COMM.bcast(MPI.Get_processor_name()))
        os.environ.setdefault("MASTER_PORT", "29511")
        dist.init_process_group("gloo", rank=COMM.rank, world_size=COMM.size)
    for name in names:
        for line in run(name, config, steps, evaluate):
            if COMM.rank == 0:
                print(json.dumps(line), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
