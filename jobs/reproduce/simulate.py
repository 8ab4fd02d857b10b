"""Gradient descent with a rule, and what it cost: the loop behind the reproduced experiments."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpi_ef.collectives import ClientsMean
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor, Identity, TopK
from mpi_ef.errors import OptionError
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.jobs.reproduce.problems import Problem, Vector

__all__ = ["Curve", "descend"]


@dataclass
class Curve:
    """What was seen of a run, one entry for each look: lists of equal length.

    Attributes
    ----------
    steps : list of int
    squared_norms : list of float
        ||grad f(x)||^2.
    sent_bits : list of float
        What a client has sent so far, per client: values in 64 bits, coded indices, padding; dense first steps included.
    paper_bits : list of float
        As the papers count: 32 bits for every kept entry, nothing for its index.
    """

    steps: list[int] = field(default_factory=list)
    squared_norms: list[float] = field(default_factory=list)
    sent_bits: list[float] = field(default_factory=list)
    paper_bits: list[float] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """Return the looks as rows of a metrics file."""
        return [
            {"step": step, "squared_norm": norm, "sent_bits": sent, "paper_bits": paper}
            for step, norm, sent, paper in zip(
                self.steps, self.squared_norms, self.sent_bits, self.paper_bits, strict=True
            )
        ]

    def append_row(self, row: Mapping[str, Any]) -> None:
        """Add a look that :meth:`rows` has returned."""
        self.steps.append(row["step"])
        self.squared_norms.append(row["squared_norm"])
        self.sent_bits.append(row["sent_bits"])
        self.paper_bits.append(row["paper_bits"])


def descend(
    comm: Comm,
    problem: Problem,
    clients: int,
    rule: str,
    compressor: Compressor,
    *,
    gamma: float,
    steps: int,
    x0: Vector,
    dense_steps: int = 1,
    every: int = 1,
    tolerance: float = 0.0,
    noise: Callable[[int, int], Vector] | None = None,
    weights: Vector | None = None,
    prox: Callable[[Vector, float], Vector] | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Vector, Curve]:
    """Run ``x -= gamma * rule(gradients at x)`` from `x0` and look at the gradient of f every so many steps. Collective.

    Parameters
    ----------
    rule : str
        A name in the table of rules, or "naive": compression without feedback.
    problem : Problem
        This rank's part, as :class:`ClientsMean` deals clients out.
    clients : int
        n.
    tolerance : float
        Stop when ||grad f(x)||^2 falls below.
    noise : callable, optional
        What is added to the gradient of a client: ``noise(client, step)``, (d,).
    prox : callable, optional
        Of a regulariser R that is not smooth: every step ends with ``x = prox(x, gamma)``, the minimizer of
        ``gamma R(y) + ||y - x||^2 / 2``. With the rule "ef21" this is EF21-Prox (arXiv 2110.03294).
    options : mapping, optional
        Of the rule; the naive one has none, and no dense steps.

    Returns
    -------
    x : (d,), the same on all ranks
    curve : Curve
    """
    plan = ClientsMean(comm, compressor, problem.d, np.float64, clients=clients, weights=weights)
    exact = ClientsMean(comm, Identity(), problem.d, np.float64, clients=clients)
    if rule == "naive" and options:
        raise OptionError(f"descend: {', '.join(options)} has no effect with rule='naive', which has no feedback")
    feedback = None if rule == "naive" else ErrorFeedback(rule, plan, dense_steps=dense_steps, **(options or {}))
    kept = compressor.count(problem.d) if isinstance(compressor, TopK) else problem.d
    x, full, curve = x0.copy(), np.zeros(problem.d), Curve()
    for step in range(steps + 1):
        gradients = problem.gradients(x)
        if step % every == 0 or step == steps:
            exact.exchange(gradients.reshape(-1)).set_mean(full)
            squared = float(full @ full)
            curve.steps.append(step)
            curve.squared_norms.append(squared)
            dense = 0 if feedback is None else min(step, dense_steps)
            curve.sent_bits.append(8 * plan.all_message_nbytes / clients + 64 * problem.d * dense)
            messages = plan.message_nbytes / compressor.wire_nbytes(problem.d, np.float64)
            curve.paper_bits.append(32.0 * (kept * messages / clients + problem.d * dense))
            if squared < tolerance or not np.isfinite(squared) or squared > 1e30 or step == steps:
                break
        if noise is not None:
            gradients += [noise(client, step) for client in range(plan.first, plan.first + plan.own)]
        if feedback is None:
            plan.exchange(gradients.reshape(-1)).set_mean(full)
            x = x - gamma * full
        else:
            x = x - feedback.step(gamma * gradients) if rule == "ef14" else x - gamma * feedback.step(gradients)
        if prox is not None:
            x = prox(x, gamma)
    return x, curve
