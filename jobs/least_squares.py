"""Solve ``min_x |A x - b|^2 / (2 m)`` with the rows of A on all ranks, by EF21. NumPy and MPI only: no torch.

An example of mpi_ef in a program of your own: the loop in :func:`solve` is all that a code with numpy buffers and a
communicator needs. Each rank's rows have their own solution, so the gradients disagree everywhere and compression
without feedback would stall.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpi_ef.comm.protocol import Comm
from mpi_ef.jobs.metrics import announcing
from mpi_ef.jobs.options import Checked, option, parse
from mpi_ef.runtime import launch

__all__ = ["LeastSquaresConfig", "main", "problem", "solve"]


@dataclass(frozen=True)
class LeastSquaresConfig(Checked):
    """Options of the solver; every field is a flag."""

    rows: int = option(2000, "rows of A on each rank", 1)
    columns: int = option(500, "columns of A: unknowns", 1)
    steps: int = option(3000, "gradient steps", 0)
    ratio: float = option(0.02, "share of the gradient's entries that is sent", "(0, 1]")
    seed: int = option(0, "of the random problem", 0)


def main(argv: Sequence[str] | None = None) -> None:
    """Solve a random problem on COMM_WORLD and print how far the answer is from the exact one."""
    config = parse(LeastSquaresConfig, argv, prog="mpi-ef least-squares", description=__doc__ or "")
    launch.run(lambda comm: run(comm, config))


def run(comm: Comm, config: LeastSquaresConfig) -> None:
    """Build, solve and check one problem. Collective."""
    from mpi_ef.collectives import allreduce
    from mpi_ef.compress import Identity

    a, b = problem(config, comm.Get_rank())
    with announcing(comm):
        x, sent, dense = solve(comm, a, b, ratio=config.ratio, steps=config.steps)
    # The normal equations, summed over the ranks without compression, give the exact answer to compare with.
    exact = np.linalg.solve(allreduce(comm, a.T @ a, Identity()), allreduce(comm, a.T @ b, Identity()))
    error = float(np.linalg.norm(x - exact) / np.linalg.norm(exact))
    if comm.Get_rank() == 0:
        print(f"{comm.Get_size()} ranks, {config.rows} x {config.columns} each, {config.steps} steps of EF21")
        print(f"relative error of x   {error:.1e}")
        print(f"bytes sent per rank   {sent:,} (dense: {dense:,})")


def problem(config: LeastSquaresConfig, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Return this rank's rows: A (rows, columns) float64 and b (rows,). Local."""
    rng = np.random.default_rng((config.seed, rank))
    a = rng.normal(size=(config.rows, config.columns))
    return a, a @ rng.normal(1.0, 1.0, config.columns) + rng.normal(size=config.rows)


def solve(comm: Comm, a: np.ndarray, b: np.ndarray, *, ratio: float, steps: int) -> tuple[np.ndarray, int, int]:
    """Return x, the same on all ranks, with the bytes that this rank sent and that dense exchanges would send. Collective.

    Parameters
    ----------
    comm : MPI.Comm
    a : (m, d) float64, this rank's rows
    b : (m,) float64
    ratio : float
        Share of the gradient's entries that is sent in each step.
    steps : int
    """
    from mpi_ef.collectives import GatherMean
    from mpi_ef.compress import TopK
    from mpi_ef.feedback import ErrorFeedback

    m, d = a.shape
    gradient = ErrorFeedback("ef21", GatherMean(comm, TopK(ratio), d, np.float64), dense_steps=1)
    smoothness = np.linalg.norm(a, 2) ** 2 / m
    step_size = 1.0 / max(comm.allgather(smoothness)) / 4.0
    x = np.zeros(d)
    for _ in range(steps):
        x -= step_size * gradient.step(a.T @ (a @ x - b) / m)
    return x, gradient.sent_nbytes, steps * gradient.plan.traffic.dense_nbytes


if __name__ == "__main__":
    main()
