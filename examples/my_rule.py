"""A rule of one's own: EF14 whose old errors fade, p_i = u_i + fade * e_i. Runs, saves and resumes as those built in.

mpiexec -n 2 python -m mpi4py examples/my_rule.py
mpiexec -n 2 mpi-ef train --rule "my_rule:FADING(fade=0.5)"             # with examples/ on PYTHONPATH
"""

from dataclasses import dataclass

import numpy as np

from mpi_ef.compress import Keep, lazy
from mpi_ef.feedback import Rule, State, double_buffer, error, scratch


@dataclass(kw_only=True)
class FadingState(State):
    """e_i: what this rank has not sent. Marks say what a resume on other numbers of ranks makes of it."""

    e_i: np.ndarray = error()
    mean: np.ndarray = scratch()
    spare: np.ndarray = double_buffer()
    fade: float = 0.9


def fading(s, plan, u):
    """Take one step and return mean_i C(p_i), to be subtracted from x."""
    p_i = lazy(u) + s.fade * lazy(s.e_i)
    delta = yield plan.offer(p_i, keep=Keep(p_i, into=s.spare, less_message=True))  # spare = p_i - C(p_i)
    s.e_i, s.spare = s.spare, s.e_i  # only when all ranks have succeeded
    delta.set_mean(s.mean, again=True)
    return s.mean


FADING = Rule(fading, FadingState, lambda alpha: {"fade": 0.9}, most_terms=2)

if __name__ == "__main__":
    from mpi4py.MPI import COMM_WORLD as comm

    from mpi_ef import ErrorFeedback, GatherMean, TopK

    feedback = ErrorFeedback(FADING, GatherMean(comm, TopK(0.1), 1000), fade=0.5)
    for step in range(3):
        g = np.random.default_rng((comm.rank, step)).normal(size=1000).astype(np.float32)
        print(comm.rank, step, np.linalg.norm(feedback.step(g)))
