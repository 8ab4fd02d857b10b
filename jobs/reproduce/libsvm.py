"""LIBSVM files; and ways to deal their rows out to clients."""

import lzma
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpi_ef.errors import OptionError, ShapeError

__all__ = ["SPLITS", "content_of", "load_libsvm", "split_rows"]

Rows = NDArray[np.int64]


def load_libsvm(path: Path | str, columns: int | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the features (N, d) and the labels (N,) in {-1, +1} of a file with two classes; ``.xz`` is unpacked.

    Rows without entries are kept. Of the two labels in the file ({0, 1}, {1, 2}, {-1, +1}, ...) the greater one becomes +1.

    Parameters
    ----------
    path : path
    columns : int, optional
        d; the greatest index in the file by default.

    Raises
    ------
    OptionError
        When the file cannot be read, or is malformed: file, and what is wrong; or scikit-learn is missing.
    """
    path = Path(path)
    try:
        from sklearn.datasets import load_svmlight_file
    except ImportError:
        raise OptionError(f"{path}: scikit-learn is not installed; pip install scikit-learn") from None
    try:
        with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
            found, labels = load_svmlight_file(file, zero_based=False)
    except (OSError, lzma.LZMAError) as error:
        raise OptionError(f"{path}: cannot be read ({error}); pass a LIBSVM file, plain or .xz") from None
    except ValueError as error:
        raise OptionError(f"{path}: is no LIBSVM file ({error}); indices begin with 1 and ascend") from None
    widest = 1 + int(found.indices.max(initial=-1))
    if columns is not None and widest > columns:
        raise OptionError(f"{path}: has a feature with index {widest}; at most {columns} are wanted")
    if not np.isfinite(found.data).all():
        raise OptionError(f"{path}: has a NaN or Inf")
    a = np.zeros((labels.size, columns or widest))
    a[:, :widest] = found.toarray()[:, :widest]
    return a, _signs(path, labels)


def content_of(a: NDArray[np.float64], labels: NDArray[np.float64]) -> str:
    """Return what a file has in it, however it is named and packed: how much, and a hash of features and labels."""
    digest = sha256(np.ascontiguousarray(a).tobytes() + labels.tobytes()).hexdigest()
    return f"{labels.size} rows of {a.shape[1]}, sha256 {digest[:32]}"


def _signs(path: Path | str, labels: NDArray[np.float64]) -> NDArray[np.float64]:
    kinds = np.unique(labels)
    if kinds.size != 2:
        raise OptionError(f"{path}: has {kinds.size} different labels; logistic regression wants two")
    return np.where(labels == kinds[1], 1.0, -1.0)


SPLITS = ("contiguous", "shuffled", "by-label", "dirichlet")


def split_rows(
    labels: NDArray[np.float64], clients: int, how: str = "contiguous", *, seed: int = 0, concentration: float = 0.5
) -> list[Rows]:
    """Return the numbers of the rows of every client; each row goes to one client, and no client stays without.

    Parameters
    ----------
    labels : (N,) float
    clients : int
        n, at most N.
    how : {"contiguous", "shuffled", "by-label", "dirichlet"}
        In order, as papers do; after a shuffle; sorted by label, so that most clients see one class; or shares of every
        class drawn from a Dirichlet distribution with `concentration`: small means unequal.
    seed : int

    Notes
    -----
    Except for "dirichlet" all clients get floor(N / n) rows, and the last one what remains as well.
    """
    rows = labels.size
    if not 1 <= clients <= rows:
        raise OptionError(f"split: {clients} clients for {rows} rows; every client needs at least one row")
    rng = np.random.default_rng(seed)
    if how == "dirichlet":
        return _dirichlet(labels, clients, rng, concentration)
    if how not in SPLITS:
        raise OptionError(f"split: {how!r} is unknown; take one of {', '.join(SPLITS)}")
    order = np.arange(rows)
    if how == "shuffled":
        order = rng.permutation(rows)
    if how == "by-label":
        order = np.argsort(labels, kind="stable")
    return np.split(order, [rows // clients * i for i in range(1, clients)])


def _dirichlet(labels: NDArray[np.float64], clients: int, rng: np.random.Generator, concentration: float) -> list[Rows]:
    if not concentration > 0:
        raise ShapeError(f"split: concentration={concentration} is not positive; 0.5 is unequal, 100 nearly equal")
    parts: list[list[int]] = [[] for _ in range(clients)]
    for kind in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == kind))
        shares = np.cumsum(rng.dirichlet(np.full(clients, concentration)))[:-1]
        for part, some in zip(parts, np.split(own, (shares * own.size).astype(int)), strict=True):
            part.extend(some.tolist())
    for part in parts:  # a client without rows takes one from the richest
        if not part:
            part.append(max(parts, key=len).pop())
    return [np.sort(np.array(part, np.int64)) for part in parts]
