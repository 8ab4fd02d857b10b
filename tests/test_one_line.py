"""Errors about a user's objects: one short line, whatever their reprs are."""

import ast
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import virtual
from torch.optim import SGD

import mpi_ef
from mpi_ef.collectives import ClientsMean, GatherMean, TwoPhaseMean, plan_for
from mpi_ef.comm.consensus import agree
from mpi_ef.compress import Compressor, Identity, LowRank, Quantize, RandK, Sign, TopK
from mpi_ef.errors import (
    CheckpointError,
    DisagreementError,
    MpiEfError,
    NonFiniteError,
    OptionError,
    ShapeError,
    briefly,
)
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.jobs.options import ConfigError

ROOT = Path(mpi_ef.__file__).resolve().parents[1]
LONG = "a line of a repr\n" * 600


class Long:
    """What a large model or array is like."""

    def __repr__(self):
        return LONG


class Broken:
    """Cannot be shown at all."""

    def __repr__(self):
        raise RuntimeError(LONG)


@dataclass(frozen=True, repr=False)
class LongCompressor(Compressor):
    """Has a long repr and no codec."""

    def codec(self, d, dtype=np.float32):
        return Long()

    def alpha(self, d):
        return 0.0

    def __repr__(self):
        return LONG


MODEL = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(200)])
ARRAY = np.zeros((90, 90), np.float32)
THINGS = [Long(), MODEL, ARRAY, torch.zeros(90, 90), LONG, [LONG] * 9, {"a": LONG}]


def sgd():
    return SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)


CALLS = {
    "optimizer": lambda comm, x: mpi_ef.DistributedOptimizer(x, comm, TopK(0.1)),
    "its communicator": lambda comm, x: mpi_ef.DistributedOptimizer(sgd(), x, TopK(0.1)),
    "its compressor": lambda comm, x: mpi_ef.DistributedOptimizer(sgd(), comm, x),
    "its rule": lambda comm, x: mpi_ef.DistributedOptimizer(sgd(), comm, TopK(0.1), rule=x),
    "its plan": lambda comm, x: mpi_ef.DistributedOptimizer(sgd(), comm, TopK(0.1), plan=x),
    "its placement": lambda comm, x: mpi_ef.DistributedOptimizer(sgd(), comm, TopK(0.1), placement=x),
    "its eta": lambda comm, x: mpi_ef.DistributedOptimizer(sgd(), comm, TopK(0.1), rule="econtrol", eta=x),
    "learning rate": lambda comm, x: mpi_ef.Signum(torch.nn.Linear(2, 2).parameters(), comm, lr=x),
    "allreduce, communicator": lambda comm, x: mpi_ef.allreduce(x, ARRAY, Sign()),
    "allreduce, compressor": lambda comm, x: mpi_ef.allreduce(comm, ARRAY, x),
    "allreduce, op": lambda comm, x: mpi_ef.allreduce(comm, ARRAY, Sign(), op=x),
    "allgather": lambda comm, x: mpi_ef.allgather(comm, ARRAY, x),
    "plan, communicator": lambda comm, x: GatherMean(x, TopK(0.1), 9),
    "plan, compressor": lambda comm, x: TwoPhaseMean(comm, x, 9),
    "plan, length": lambda comm, x: GatherMean(comm, TopK(0.1), x),
    "plan, codec": lambda comm, x: GatherMean(comm, LongCompressor(), 9),
    "plan, combine": lambda comm, x: GatherMean(comm, TopK(0.1), 9, combine=x),
    "plan_for": lambda comm, x: plan_for(comm, x, 9),
    "clients": lambda comm, x: ClientsMean(comm, TopK(0.1), 9, clients=x),
    "weights": lambda comm, x: ClientsMean(comm, TopK(0.1), 9, clients=2, weights=x),
    "feedback": lambda comm, x: ErrorFeedback("ef21", x),
    "rule": lambda comm, x: ErrorFeedback(x, GatherMean(comm, TopK(0.1), 9)),
    "eta": lambda comm, x: ErrorFeedback("econtrol", GatherMean(comm, TopK(0.1), 9), eta=x),
    "marina": lambda comm, x: ErrorFeedback("marina", GatherMean(comm, TopK(0.1), 9)).step(ARRAY[0, :9]),
    "TopK": lambda comm, x: TopK(x),
    "TopK, segments": lambda comm, x: TopK(0.1, segments=x).codec(9),
    "TopK, values": lambda comm, x: TopK(0.1, values=x),
    "RandK": lambda comm, x: RandK(k=x),
    "Sign": lambda comm, x: Sign(block=x),
    "Quantize": lambda comm, x: Quantize(x),
    "LowRank": lambda comm, x: LowRank(2, shapes=x),
    "codec": lambda comm, x: Identity().codec(x),
    "dtype": lambda comm, x: Identity().codec(9, x),
    "buffers": lambda comm, x: mpi_ef.synchronize_buffers(torch.nn.BatchNorm1d(2), comm, policy=x),
    "metric": lambda comm, x: mpi_ef.mean_metrics({"loss": x}, comm),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_said_of_an_object_is_short(call):
    def program(comm):
        told = []
        for thing in THINGS:
            with pytest.raises((MpiEfError, TypeError)) as caught:
                CALLS[call](comm, thing)
            told.append(caught.value)
        return told

    for error in virtual.results(1, program)[0]:
        assert isinstance(error, MpiEfError) or "positional arguments" in str(error)  # a module is called as a plan
        assert str(error).isprintable()
        assert len(str(error)) < 400


def test_brief_words_for_what_cannot_be_shown():
    assert briefly(Long()) == f"{' '.join(LONG.split())[:56]} ..."
    assert briefly(Broken()) == "an object of Broken"
    assert briefly("a\tb") == r"'a\tb'"


@pytest.mark.parametrize("kind", [CheckpointError, ConfigError, DisagreementError, NonFiniteError, OptionError, ShapeError])
def test_errors_that_quote_lines_have_one(kind):
    assert str(kind(f"plan: it raised:\n  {LONG}; stop")) == f"plan: it raised: {LONG.replace(chr(10), ' ')}; stop"
    assert str(kind("two  spaces stay")) == "two  spaces stay"
    assert pickle.loads(pickle.dumps(kind("a\nb"))).args == ("a b",)


def test_ranks_that_disagree_show_where():
    """Not the same first words of a long text, without what differs."""
    texts = [f"{LONG}{rank}{LONG}" for rank in range(2)]
    error, _ = virtual.run(2, lambda comm: agree(comm, "call", lambda: {"a model": texts[comm.Get_rank()]}, "remedy"))
    assert isinstance(error, DisagreementError)
    assert len(str(error)) < 400
    assert "repr 0a line of" in str(error)
    assert "repr 1a line of" in str(error)


def test_no_error_shows_a_whole_repr():
    """Of what may be a user's object: ``{briefly(value)}`` in place of ``{value!r}``."""
    found = []
    for room in ("mpi_ef", "jobs", "slurm"):
        for path in sorted((ROOT / room).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            allowed = {node for parent in ast.walk(tree) for node in ast.walk(parent) if
                       (isinstance(parent, ast.FunctionDef) and parent.name == "__repr__") or
                       (isinstance(parent, ast.Call) and getattr(parent.func, "id", "") == "AttributeError")}
            found += [f"{path}, line {node.lineno}: {ast.unparse(node)}" for node in ast.walk(tree)
                      if isinstance(node, ast.FormattedValue) and node.conversion == ord("r") and node not in allowed]
    assert not found
