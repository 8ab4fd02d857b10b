"""Parameters and gradients of a torch model as views of two contiguous vectors; the mean of tensors of several ranks."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpi_ef.collectives.plan import Comm
from mpi_ef.compress import aligned_zeros
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import DtypeError, OptionError, ShapeError

__all__ = ["FlatParameters", "mean_over_ranks"]

_BROADCAST_NBYTES = 2**30  # per message, below the largest count of MPI
_HALVES = (torch.bfloat16, torch.float16)
_HOOK = "_mpi_ef_hook"  # where a parameter keeps the handle of its hook, so that a later owner can take it off
Bytes = NDArray[np.uint8]


class FlatParameters:
    """The trainable parameters of a model, laid out one after the other.

    Every parameter becomes a view of `values` and its ``grad`` a view of `gradients`. Autograd accumulates into the
    views, optimizers update through them; nothing is copied back and forth.

    A parameter in 16 bits stays where it is: its *master* is a view of `values` in float32, to which its gradients are
    added as soon as they are there, and of which it is a rounded copy after :meth:`publish`.

    Parameters
    ----------
    parameters : iterable of torch.nn.Parameter
        Those without ``requires_grad`` are left where they are; one that appears twice (tied weights) counts once.

    Attributes
    ----------
    parameters, frozen : list of torch.nn.Parameter
        Those in the vectors, and those that did not require a gradient at construction.
    masters : list of torch.nn.Parameter
        What optimizers update: the parameters, those in 16 bits replaced by their masters.
    starts : list of int
        Where the parameters begin in the vectors, and `d`.
    d : int
        Number of trainable entries.
    dtype : numpy.dtype
        float32 or float64.
    values, gradients : (d,) arrays that share memory with the masters and their gradients

    Raises
    ------
    DtypeError
        Parameters of another dtype, float64 mixed with others, or not in CPU memory.
    OptionError
        No parameter requires a gradient.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        distinct = list(dict.fromkeys(parameters))
        self.parameters = [p for p in distinct if p.requires_grad]
        self.frozen = [p for p in distinct if not p.requires_grad]
        self.dtype = _common_dtype(self.parameters)
        self.d = sum(p.numel() for p in self.parameters)
        self.masters: list[Tensor] = []
        self.starts = [0]
        self._arrived: Callable[[int], None] | None = None
        # NumPy's memory, because it asks for large pages and torch does not.
        values, gradients = (torch.from_numpy(aligned_zeros(self.d, self.dtype)) for _ in range(2))
        self._values: list[Tensor] = []
        self._gradients: list[Tensor] = []
        for p in self.parameters:
            start, stop = self.starts[-1], self.starts[-1] + p.numel()
            value, gradient = (flat[start:stop].view(p.shape) for flat in (values, gradients))
            self._adopt(p, value, gradient)
            self.starts.append(stop)
        self.values: Vector = values.numpy()
        self.gradients: Vector = gradients.numpy()

    def _adopt(self, p: Tensor, value: Tensor, gradient: Tensor) -> None:
        value.copy_(p.detach())
        if p.grad is not None:
            gradient.copy_(p.grad.detach())
        if hasattr(p, _HOOK):
            getattr(p, _HOOK).remove()
        if p.dtype in _HALVES:
            p.grad = None
            self.masters.append(torch.nn.Parameter(value))
            self._hook(len(self._values), p)
        else:
            p.data = value
            self.masters.append(p)
        self.masters[-1].grad = gradient
        self._values.append(value)
        self._gradients.append(gradient)

    def _hook(self, number: int, p: Tensor) -> None:
        def accumulated(p: Tensor) -> None:
            self._take(number, p)
            if self._arrived is not None:
                self._arrived(number)

        setattr(p, _HOOK, p.register_post_accumulate_grad_hook(accumulated))  # type: ignore[no-untyped-call]

    def watch(self, arrived: Callable[[int], None]) -> None:
        """Call ``arrived(number)`` in every backward pass, when the gradient of that parameter is in `gradients`. Local."""
        self._arrived = arrived
        for number, p in enumerate(self.parameters):
            if p.dtype not in _HALVES:
                self._hook(number, p)

    @torch.no_grad()
    def _take(self, number: int, p: Tensor) -> None:
        """Make `gradients` hold what autograd has left in ``p.grad``."""
        gradient = self._gradients[number]
        if p.dtype in _HALVES:
            if p.grad is not None:
                self._refuse_sparse(number, p)
                gradient.add_(p.grad)
                p.grad = None
        elif p.grad is None:
            gradient.zero_()
            p.grad = gradient
        elif p.grad is not gradient:
            self._refuse_sparse(number, p)
            if p.grad.data_ptr() != gradient.data_ptr():
                gradient.copy_(p.grad)
            p.grad = gradient

    @staticmethod
    def _refuse_sparse(number: int, p: Tensor) -> None:
        if p.grad is not None and p.grad.layout is not torch.strided:
            raise DtypeError(
                f"parameter {number} {tuple(p.shape)}: its gradient is sparse; use sparse=False in the embedding"
            )

    def zero_gradients(self) -> None:
        """Set all gradients to zero and make every ``grad`` a view of the vector again. Local."""
        self.gradients.fill(0)
        for p, master, gradient in zip(self.parameters, self.masters, self._gradients, strict=True):
            if master is not p:
                p.grad = None
            master.grad = gradient

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
        for number, (p, master, value) in enumerate(zip(self.parameters, self.masters, self._values, strict=True)):
            if master is p and p.data_ptr() != value.data_ptr():
                raise ShapeError(f"parameter {number} {tuple(p.shape)}: its memory was replaced (by model.to(...)?); build "
                                 "the optimizer after the model is in its final place")  # fmt: skip
            self._take(number, p)
            master.grad = self._gradients[number]

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the parameters that are kept in 16 bits. Local."""
        for p, master in zip(self.parameters, self.masters, strict=True):
            if master is not p:
                p.copy_(master)

    def broadcast(self, comm: Comm, root: int = 0) -> None:
        """Overwrite the parameters, frozen ones too, on all ranks with those of rank `root`. Collective."""
        _broadcast(comm, self.values.view(np.uint8), root)
        self.publish()
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
    if all(device == "cpu" and dtype in (torch.float32, *_HALVES) for dtype, device in seen):
        return np.dtype(np.float32)
    if seen == {(torch.float64, "cpu")}:
        return np.dtype(np.float64)
    listed = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in seen))
    raise DtypeError(
        f"FlatParameters: parameters are {listed}; make them torch.float32, bfloat16 or float16, or torch.float64, on cpu"
    )


def mean_over_ranks(parts: Iterable[Tensor], name: str) -> Tensor:
    """Return the mean, added up in float64 in rank order and rounded once; what is equal on all ranks keeps its bits.

    Raises
    ------
    OptionError
        Whole numbers or booleans that differ.
    """
    rest: Iterator[Tensor] = iter(parts)
    first, count = next(rest), 1
    wide = torch.complex128 if first.is_complex() else torch.float64
    total, same = first.to(wide, copy=True), torch.ones_like(first, dtype=torch.bool)
    for part in rest:
        total, count = total.add_(part), count + 1
        same &= part == first
    if not (first.is_floating_point() or first.is_complex()) and not bool(same.all()):
        raise OptionError(f"resume: {name} holds whole numbers that differ between the {count} ranks that saved it; "
                          f"resume on {count} ranks")  # fmt: skip
    return torch.where(same, first, (total / count).to(first.dtype))
