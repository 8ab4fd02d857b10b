"""Gradient descent with a rule, and what it cost: the loop behind the reproduced experiments."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpi_ef.collectives import ClientsMean
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor, Identity, RandK, TopK
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.jobs.metrics import is_number
from mpi_ef.jobs.reproduce.problems import Problem, Vector

__all__ = ["Curve", "descend", "kept"]


_COLUMNS = ("step", "squared_norm", "sent_bits", "paper_bits")  # of a metrics file


@dataclass
class Curve:
    """Measurements of a run every so many steps: lists of equal length.

    Bits are those that were sent so far, per client, with coded indices, padding and dense first steps, values in 64 bits;
    papers count 32 bits for every kept entry, and nothing for its index.
    """

    steps: list[int] = field(default_factory=list)
    squared_norms: list[float] = field(default_factory=list)  # ||grad f(x)||^2
    sent_bits: list[float] = field(default_factory=list)
    paper_bits: list[float] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """Return the entries as rows of a metrics file."""
        columns = zip(self.steps, self.squared_norms, self.sent_bits, self.paper_bits, strict=True)
        return [dict(zip(_COLUMNS, row, strict=True)) for row in columns]

    def append_row(self, row: Mapping[str, Any]) -> None:
        """Add a row that :meth:`rows` has returned; `ValueError` where a figure is no number."""
        if not all(is_number(row[name]) for name in _COLUMNS):
            raise ValueError("a figure is no number")
        self.append(*(row[name] for name in _COLUMNS))

    def append(self, step: int, squared_norm: float, sent_bits: float, paper_bits: float) -> None:
        """Add a measurement."""
        self.steps.append(step)
        self.squared_norms.append(squared_norm)
        self.sent_bits.append(sent_bits)
        self.paper_bits.append(paper_bits)


def kept(compressor: Compressor, d: int) -> int:
    """Return how many of d entries a compressor keeps. Local."""
    return compressor.count(d) if isinstance(compressor, TopK | RandK) else d


def descend(comm: Comm, problem: Problem, clients: int, rule: str, compressor: Compressor, *, gamma: float, steps: int,
            x0: Vector, dense_steps: int | None = None, every: int = 1, tolerance: float = 0.0,
            noise: Callable[[int, int], Vector] | None = None, weights: Vector | None = None) -> tuple[Vector, Curve]:
    """Run ``x -= gamma * rule(gradients at x)`` from `x0` and return x; measure the gradient of f meanwhile. Collective.

    Parameters
    ----------
    problem : Problem
        This rank's part, as :class:`ClientsMean` deals clients out.
    clients : int
        n.
    rule : str
        A specification, see :mod:`mpi_ef.registry`, or "naive": compression without feedback.
    dense_steps : int, optional
        1 by default, 0 for ef14; the naive one has none.
    tolerance : float
        Stop when ||grad f(x)||^2 falls below.
    noise : callable, optional
        What is added to the gradient of a client: ``noise(client, step)``, (d,).
    """
    plan = ClientsMean(comm, compressor, problem.d, np.float64, clients=clients, weights=weights)
    exact = ClientsMean(comm, Identity(), problem.d, np.float64, clients=clients)
    first = int(rule != "ef14") if dense_steps is None else dense_steps
    feedback = None if rule == "naive" else ErrorFeedback(rule, plan, dense_steps=first)
    x, full, curve = x0.copy(), np.zeros(problem.d), Curve()
    for step in range(steps + 1):
        gradients = problem.gradients(x)
        if step % every == 0 or step == steps:
            exact.exchange(gradients.reshape(-1)).set_mean(full)
            squared = float(full @ full)
            dense = 0 if feedback is None else min(step, first)
            messages = plan.message_nbytes / compressor.wire_nbytes(problem.d, np.float64)
            curve.append(step, squared, 8 * plan.all_message_nbytes / clients + 64 * problem.d * dense,
                         32.0 * (kept(compressor, problem.d) * messages / clients + problem.d * dense))
            if squared < tolerance or not np.isfinite(squared) or squared > 1e30 or step == steps:
                break
        if noise is not None:
            gradients += [noise(client, step) for client in range(plan.first, plan.first + plan.own)]
        if feedback is None:
            plan.exchange(gradients.reshape(-1)).set_mean(full)
            x = x - gamma * full
        else:
            x = x - feedback.step(gamma * gradients) if rule == "ef14" else x - gamma * feedback.step(gradients)
    return x, curve
