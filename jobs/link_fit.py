"""Latency and bandwidth from the times of messages."""

from collections.abc import Sequence

__all__ = ["fit_line"]


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
