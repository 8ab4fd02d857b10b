"""``mpi-ef train`` with a fault at a known place: ``python faulty_training.py FAULT ARGUMENTS...``.

FAULT is JSON: which ranks of the world send themselves which signal, and where: after a step (its number), while they build
their model, before a save, or when the training has returned; or some seconds after that. A test that waits for such a
moment may come too late.
"""

import json
import os
import signal
import sys
from threading import Timer
from typing import Any
from unittest import mock

from mpi_ef.checkpoint.store import Store
from mpi_ef.jobs.train import loop as trainer
from mpi_ef.jobs.train import program as train

fault = json.loads(sys.argv[1])
NUMBER = signal.Signals[fault["signal"]]
done: list[Any] = []


def strike(place: Any) -> None:
    """Send the signal when it is this rank's and this place's turn; once, for a run may come there again after a failure."""
    from mpi4py.MPI import COMM_WORLD

    if place in fault["at"] and COMM_WORLD.rank in fault["ranks"] and place not in done:
        done.append(place)
        if fault["after"]:
            Timer(fault["after"], os.kill, (os.getpid(), NUMBER)).start()
        else:
            os.kill(os.getpid(), NUMBER)


def step(self: trainer.Trainer, *arguments: Any, **options: Any) -> None:
    took(self, *arguments, **options)
    strike(self.steps)


def build(*arguments: Any) -> Any:
    strike("building")
    return built(*arguments)


def save(self: Store, comm: Any, number: int, *arguments: Any, **options: Any) -> Any:
    strike(f"save of step {number}")
    return saved(self, comm, number, *arguments, **options)


took, built, saved = trainer.Trainer.step, trainer._build, Store.save
with (
    mock.patch.object(trainer.Trainer, "step", step),
    mock.patch.object(trainer, "_build", build),
    mock.patch.object(Store, "save", save),
):
    train.main(sys.argv[2:])
    strike("end")
