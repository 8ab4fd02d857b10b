"""Ranks on hosts: what a checkpoint of other ranks owes, and what these ranks owe that have loaded it. A line of JSON.

    owed.py FOLDER OPTIONS OF mpi-ef train...
"""

import json
import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI

from mpi_ef import Store, Training, open_checkpoint
from mpi_ef.jobs.options import parse
from mpi_ef.jobs.train.config import TrainConfig
from mpi_ef.jobs.train.loop import Trainer


def main() -> None:
    comm, folder = MPI.COMM_WORLD, Path(sys.argv[1])
    trainer = Trainer(comm, parse(TrainConfig, sys.argv[2:], prog="owed", description=""))
    training = Training(model=trainer.model, optimizer=trainer.optimizer, seed=trainer.config.seed, changes=None)
    step = training.resume(Store(folder), comm, policy="redistribute")
    arrays = trainer.optimizer.per_rank()
    errors, residuals = comm.allgather(arrays["e_i"].astype(np.float64)), comm.allgather(arrays.get("plan.residual"))
    if comm.rank == 0:
        saved = open_checkpoint(folder / f"step-{step:08d}")
        old = range(saved.world_size)
        then = np.mean([saved.per_rank("optimizer.e_i", rank).astype(np.float64) for rank in old], axis=0)
        then = then + np.concatenate([saved.per_rank("optimizer.plan.residual", rank) for rank in old])
        now = np.mean(errors, axis=0) + np.concatenate(residuals)
        print(json.dumps({"step": step, "ranks": saved.world_size, "here": comm.size,
                          "lost": float(np.linalg.norm(now - then) / np.linalg.norm(then))}))


if __name__ == "__main__":
    main()
