"""Latency and bandwidth from the times of messages."""

from collections.abc import Sequence

__all__ = ["fit_line", "of_ends"]


def fit_line(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Return latency in seconds and bytes per second by least squares. Local.

    Parameters
    ----------
    sizes : sequence of int
        Bytes of the messages.
    seconds : sequence of float
        How long they took.
    """
    import numpy as np

    # Relative errors count alike at all sizes: divide every equation by its time.
    columns = np.stack([np.ones(len(sizes)), np.array(sizes)], axis=1) / np.asarray(seconds)[:, None]
    (latency, inverse), *_ = np.linalg.lstsq(columns, np.ones(len(sizes)), rcond=None)
    return max(0.0, float(latency)), 1.0 / max(1e-15, float(inverse))


def of_ends(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Return latency in seconds, that of the shortest message, and bytes per second, from the two longest. Local.

    For links that let the first of a message pass unhindered, or are busy: a line through all sizes is steeper there at its
    beginning, or begins far above the latency.

    Parameters
    ----------
    sizes : sequence of int
        Bytes of the messages, at least two, ascending.
    seconds : sequence of float
        The least time that each of them took.
    """
    inverse = max(1e-15, (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2]))
    return max(0.0, seconds[0] - sizes[0] * inverse), 1.0 / inverse
