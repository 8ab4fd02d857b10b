"""What is wrong with an array that an exchange is given."""

from typing import Any

import numpy as np

from mpi_ef.errors import DtypeError, MpiEfError, OptionError, ShapeError, briefly, shortage, told
from mpi_ef.kernels.backend import backend

__all__ = ["check_device", "masked", "misfit", "unwritable"]


def check_device(subject: str, device: str) -> None:
    """Raise `OptionError` where this rank can have no vectors on `device`, as kernels call it. Local."""
    if device == "cpu":
        return
    try:
        backend(np.dtype(np.float32), device).zeros(1)
    except Exception as error:
        if isinstance(error, MpiEfError) or shortage(subject, error) is not None:
            raise
        said = told(error).splitlines()[0].partition(". ")[0]  # what is wrong, without torch's advice
        raise OptionError(f"{subject}: device={briefly(device)} cannot be used ({said}); pass that of this rank's tensors, "
                          "for example 'cuda:0', or 'cpu'") from error


def misfit(x: Any, d: int, dtype: np.dtype[Any], subject: str, name: str, kernels: Any = None) -> MpiEfError | None:
    """Return what is wrong with `x`, to be read as a contiguous (d,) array of `dtype`; None if nothing is. Local.

    It is to be where the vectors of the `kernels` are, on the CPU by default.
    """
    on_host = kernels is None or kernels.device == "cpu"
    if on_host and type(x) is np.ndarray and x.dtype == dtype and x.shape == (d,) and x.flags.c_contiguous:
        return None
    if problem := _elsewhere(x, subject, name, None if on_host else kernels):
        return problem
    if x.dtype != dtype:
        return DtypeError(f"{subject}: {name} has dtype {x.dtype}; this plan takes {dtype}")
    if x.shape != (d,):
        return ShapeError(f"{subject}: {name} has shape {x.shape}; this plan takes ({d},)")
    if not x.flags.c_contiguous:
        return ShapeError(f"{subject}: {name} is not contiguous; pass numpy.ascontiguousarray({name})")
    return None


def _elsewhere(x: Any, subject: str, name: str, kernels: Any) -> MpiEfError | None:
    if kernels is not None:
        where = kernels.foreign(x)
        return DtypeError(f"{subject}: {name} is {where}; this plan takes vectors on {kernels.device}") if where else None
    if not isinstance(x, np.ndarray):
        return DtypeError(f"{subject}: {name} is a {type(x).__name__}; pass a numpy array")
    return masked(subject, name) if isinstance(x, np.ma.MaskedArray) else None


def masked(subject: str, name: str) -> MpiEfError:
    """Return that an array has a mask: what lies under it would be taken for numbers. Local."""
    return DtypeError(f"{subject}: {name} is a masked array, and masks are not sent; pass {name}.filled(0)")


def unwritable(out: Any, d: int, dtype: np.dtype[Any], subject: str, name: str, kernels: Any = None) -> MpiEfError | None:
    """Return what is wrong with `out`, to be written as such an array. Local."""
    if problem := misfit(out, d, dtype, subject, name, kernels):
        return problem
    if not out.flags.writeable:
        return ShapeError(f"{subject}: {name} is read-only; pass an array that can be written")
    return None
