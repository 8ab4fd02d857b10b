"""Numbers of all ranks as one: their mean, and a line that rank 0 prints.

::

    mean_metrics({"loss": loss, "accuracy": right / len(y)}, comm, weight=len(y))  # a dict, the same on all ranks
    print_metrics(f"epoch {epoch}", comm, loss=loss, accuracy=right / len(y))  # the same, and rank 0 prints it
"""

import sys
from collections.abc import Mapping
from math import isfinite
from typing import Any

from mpi_ef.comm.consensus import agree
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import OptionError, briefly, everywhere, say

__all__ = ["mean_metrics", "print_metrics"]


def mean_metrics(metrics: Mapping[str, Any], comm: Comm, *, weight: float = 1.0) -> dict[str, float]:
    """Return the mean of each number over the ranks, the same bits on all of them. Collective.

    Parameters
    ----------
    metrics : mapping of str to number
        Of this rank: Python's and NumPy's numbers, tensors with one entry. The same names on all ranks.
    comm : MPI.Comm
    weight : float
        Of this rank's numbers, for example how many samples they are the mean of. What has weight 0 does not count, also
        where it is NaN.

    Returns
    -------
    dict of str to float
        In the order of `metrics`. Added up in float64, in rank order; a number that is equal on all ranks stays as it is.

    Raises
    ------
    DisagreementError
        On all ranks, when names differ between them.
    OptionError
        A value that is no number, or a weight that is negative or not finite; other ranks raise `PeerError`. On all ranks,
        when no rank has a weight.

    Notes
    -----
    Cost: one allgather of a few bytes for each number.
    """
    mine: list[float] = []

    def facts() -> dict[str, object]:
        if not (isfinite(weight) and weight >= 0.0):
            raise OptionError(f"mean_metrics: weight={weight} is not in [0, inf); pass a number of samples")
        for name, value in metrics.items():
            mine.append(_number(name, value))
        return {"names": ", ".join(sorted(metrics))}

    # A list, as `facts` fills it only when it is called.
    answers = agree(comm, "mean_metrics", facts, "pass the same names on all ranks", value=(list(metrics), mine, weight))
    total = sum(of_rank for _, _, of_rank in answers)
    if metrics and not total:
        raise everywhere(OptionError("mean_metrics: weight=0 on all ranks; pass how many samples each rank has"))
    rows = [(dict(zip(names, values, strict=True)), of_rank) for names, values, of_rank in answers if of_rank]
    means = {}
    for name in metrics:
        values = [row[name] for row, _ in rows]
        same = all(value == values[0] for value in values)
        means[name] = values[0] if same else sum(row[name] * of_rank for row, of_rank in rows) / total
    return means


def _number(name: str, value: Any) -> float:
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise OptionError(f"mean_metrics: {name}={briefly(value)} is no number; pass one number for each name") from None


def print_metrics(text: str, comm: Comm, *, weight: float = 1.0, **metrics: Any) -> dict[str, float]:
    """Let rank 0 print a line of text and the means of numbers over the ranks; return these. Collective.

    ::

        print_metrics(f"step {step}", comm, loss=loss)  # step 20  loss 0.4321

    The parameters and errors are those of :func:`mean_metrics`; without numbers the text alone is printed.
    """
    means = mean_metrics(metrics, comm, weight=weight)
    if comm.Get_rank() == 0:
        shown = (f"{name} {value:.4g}" if abs(value) >= 1.0 else f"{name} {value:.4f}" for name, value in means.items())
        say(sys.stdout, "  ".join([text, *shown]) + "\n")
    return means
