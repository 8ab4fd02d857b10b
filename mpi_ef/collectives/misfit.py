"""What is wrong with an array that an exchange is given."""

from typing import Any

import numpy as np

from mpi_ef.errors import DtypeError, MpiEfError, ShapeError

__all__ = ["masked", "misfit", "unwritable"]


def misfit(x: object, d: int, dtype: np.dtype[Any], subject: str, name: str) -> MpiEfError | None:
    """Return what is wrong with `x`, to be read as a contiguous (d,) array of `dtype`; None if nothing is. Local."""
    if not isinstance(x, np.ndarray):
        return DtypeError(f"{subject}: {name} is a {type(x).__name__}; pass a numpy array")
    if isinstance(x, np.ma.MaskedArray):
        return masked(subject, name)
    if x.dtype != dtype:
        return DtypeError(f"{subject}: {name} has dtype {x.dtype}; this plan takes {dtype}")
    if x.shape != (d,):
        return ShapeError(f"{subject}: {name} has shape {x.shape}; this plan takes ({d},)")
    if not x.flags.c_contiguous:
        return ShapeError(f"{subject}: {name} is not contiguous; pass numpy.ascontiguousarray({name})")
    return None


def masked(subject: str, name: str) -> MpiEfError:
    """Return that an array has a mask: what lies under it would be taken for numbers. Local."""
    return DtypeError(f"{subject}: {name} is a masked array, and masks are not sent; pass {name}.filled(0)")


def unwritable(out: object, d: int, dtype: np.dtype[Any], subject: str, name: str) -> MpiEfError | None:
    """Return what is wrong with `out`, to be written as such an array. Local."""
    if problem := misfit(out, d, dtype, subject, name):
        return problem
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        return ShapeError(f"{subject}: {name} is read-only; pass an array that can be written")
    return None
