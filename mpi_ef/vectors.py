"""Parameters and gradients of a torch model as views of two contiguous vectors, which numpy sees without a copy."""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpi_ef.collectives.plan import Comm
from mpi_ef.compress import aligned_zeros
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import DtypeError, OptionError, ShapeError

__all__ = ["FlatParameters"]

_BROADCAST_NBYTES = 2**30  # per message, below the largest count of MPI
Bytes = NDArray[np.uint8]


class FlatParameters:
    """The trainable parameters of a model, laid out one after the other.

    Every parameter becomes a view of `values` and its ``grad`` a view of `gradients`. Autograd accumulates into the
    views, optimizers update through them; nothing is copied back and forth.

    Parameters
    ----------
    parameters : iterable of torch.nn.Parameter
        Those without ``requires_grad`` are left where they are; one that appears twice (tied weights) counts once.

    Attributes
    ----------
    parameters, frozen : list of torch.nn.Parameter
        Those in the vectors, and those that did not require a gradient at construction.
    d : int
        Number of trainable entries.
    dtype : numpy.dtype
        float32 or float64.
    values, gradients : (d,) arrays that share memory with the parameters and their gradients

    Raises
    ------
    DtypeError
        Parameters of another dtype, of mixed dtypes, or not in CPU memory.
    OptionError
        No parameter requires a gradient.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        distinct = list(dict.fromkeys(parameters))
        self.parameters = [p for p in distinct if p.requires_grad]
        self.frozen = [p for p in distinct if not p.requires_grad]
        self.dtype = _common_dtype(self.parameters)
        self.d = sum(p.numel() for p in self.parameters)
        # NumPy's memory, because it asks for large pages and torch does not.
        values, gradients = (torch.from_numpy(aligned_zeros(self.d, self.dtype)) for _ in range(2))
        self._values: list[Tensor] = []
        self._gradients: list[Tensor] = []
        start = 0
        for p in self.parameters:
            value, gradient = (flat[start : start + p.numel()].view(p.shape) for flat in (values, gradients))
            value.copy_(p.detach())
            if p.grad is not None:
                gradient.copy_(p.grad.detach())
            p.data, p.grad = value, gradient
            self._values.append(value)
            self._gradients.append(gradient)
            start += p.numel()
        self.values: Vector = values.numpy()
        self.gradients: Vector = gradients.numpy()

    def zero_gradients(self) -> None:
        """Set all gradients to zero and make every ``grad`` a view of the vector again. Local."""
        self.gradients.fill(0)
        for p, gradient in zip(self.parameters, self._gradients, strict=True):
            p.grad = gradient

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Make sure that `gradients` holds every parameter's gradient. Local.

        Copies only what is not a view any more, for example after ``model.zero_grad(set_to_none=True)``. A parameter
        without gradient (unused in this step, or frozen after construction) counts as zero: momentum, weight decay and
        stored errors may still move it.

        Raises
        ------
        ShapeError
            A parameter's memory was replaced, for example by ``model.to(...)`` after construction.
        DtypeError
            A gradient is sparse.
        OptionError
            A parameter that was frozen at construction is trained now: it has no place in the vectors.
        """
        if any(p.requires_grad for p in self.frozen):
            raise OptionError("a parameter was unfrozen after the optimizer was built; unfreeze first, then build it "
                              "anew")  # fmt: skip
        for number, (p, value, gradient) in enumerate(zip(self.parameters, self._values, self._gradients, strict=True)):
            if p.data_ptr() != value.data_ptr():
                raise ShapeError(f"parameter {number} {tuple(p.shape)}: its memory was replaced (by model.to(...)?); build "
                                 "the optimizer after the model is in its final place")  # fmt: skip
            if p.grad is gradient:
                continue
            if p.grad is None:
                gradient.zero_()
            elif p.grad.layout is not torch.strided:
                raise DtypeError(f"parameter {number} {tuple(p.shape)}: its gradient is sparse; use sparse=False in the "
                                 "embedding")  # fmt: skip
            elif p.grad.data_ptr() != gradient.data_ptr():
                gradient.copy_(p.grad)
            p.grad = gradient

    def broadcast(self, comm: Comm, root: int = 0) -> None:
        """Overwrite the parameters, frozen ones too, on all ranks with those of rank `root`. Collective."""
        _broadcast(comm, self.values.view(np.uint8), root)
        for p in self.frozen:  # of any dtype and layout
            copied = p.detach().cpu().contiguous().view(-1).view(torch.uint8)
            _broadcast(comm, copied.numpy(), root)
            with torch.no_grad():
                p.copy_(copied.view(p.dtype).view(p.shape))


def _broadcast(comm: Comm, array: Bytes, root: int) -> None:
    for start in range(0, array.size, _BROADCAST_NBYTES):
        comm.Bcast(array[start : start + _BROADCAST_NBYTES], root=root)


def _common_dtype(parameters: list[Tensor]) -> np.dtype[np.floating]:
    if not parameters:
        raise OptionError("FlatParameters: no parameter requires a gradient; pass those of the model to be trained")
    seen = {(p.dtype, p.device.type) for p in parameters}
    if seen == {(torch.float32, "cpu")}:
        return np.dtype(np.float32)
    if seen == {(torch.float64, "cpu")}:
        return np.dtype(np.float64)
    listed = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in seen))
    raise DtypeError(
        f"FlatParameters: parameters are {listed}; make them all torch.float32 or all torch.float64 on cpu"
    )
