"""LIBSVM files, and the distribution of their rows over clients."""

import lzma
import os
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpi_ef.documents import opened
from mpi_ef.errors import OptionError

__all__ = ["content_of", "load_libsvm", "split_rows"]


def load_libsvm(path: Path | str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the features (N, d) and the labels (N,) in {-1, +1} of a file with two classes; ``.xz`` is unpacked.

    Rows without entries are kept. Of the two labels in the file ({0, 1}, {1, 2}, {-1, +1}, ...) the greater one becomes +1.

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
        with (opened(path, follow=True) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as raw,
              lzma.open(raw) if path.suffix == ".xz" else raw as file):
            found, labels = load_svmlight_file(file, zero_based=False)
    except (OSError, lzma.LZMAError) as error:
        raise OptionError(f"{path}: cannot be read ({error}); pass a LIBSVM file, plain or .xz") from None
    except ValueError as error:
        raise OptionError(f"{path}: is no LIBSVM file ({error}); indices begin with 1 and ascend") from None
    if not np.isfinite(found.data).all():
        raise OptionError(f"{path}: has a NaN or Inf")
    kinds = np.unique(labels)
    if kinds.size != 2:
        raise OptionError(f"{path}: has {kinds.size} different labels; logistic regression wants two")
    return found.toarray(), np.where(labels == kinds[1], 1.0, -1.0)


def content_of(a: NDArray[np.float64], labels: NDArray[np.float64]) -> str:
    """Return what a file has in it, however it is named and packed: how much, and a hash of features and labels."""
    digest = sha256(np.ascontiguousarray(a).tobytes() + labels.tobytes()).hexdigest()
    return f"{labels.size} rows of {a.shape[1]}, sha256 {digest[:32]}"


def split_rows(rows: int, clients: int) -> list[slice]:
    """Return the rows of every client: floor(rows / clients) each, in order, and the last one what remains as well."""
    if not 1 <= clients <= rows:
        raise OptionError(f"split: {clients} clients for {rows} rows; every client needs at least one row")
    ends = [rows // clients * i for i in range(1, clients)]
    return [slice(start, end) for start, end in zip([0, *ends], [*ends, rows], strict=True)]
