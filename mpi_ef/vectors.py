"""Parameters and gradients of a torch model as views of two contiguous vectors; the mean of tensors of several ranks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mpi_ef.collectives.plan import Comm
from mpi_ef.compress import aligned_zeros
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import DtypeError, OptionError, ShapeError

__all__ = ["FlatParameters", "mean_over_ranks"]

_BROADCAST_NBYTES = 2**30  # per message, below the largest count of MPI
_HALVES = (torch.bfloat16, torch.float16)
_hooks: Any = WeakTensorKeyDictionary()  # of every parameter in a vector: a later vector that has it takes them off
Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]


class _Part:
    """One parameter `p`, and its places `value` and `gradient` in the vectors.

    What is in ``p.grad`` counts, as in torch: None is no gradient, and whatever a program writes there before the step is
    taken. Of a parameter in 16 bits, ``p.grad`` is in 16 bits and `gradient` the sum of the same in float32, which is taken
    in its place as long as nobody else has changed ``p.grad`` since the last backward pass.
    """

    def __init__(self, number: int, p: Tensor, value: Tensor, gradient: Tensor) -> None:
        self.number, self.p, self.value, self.gradient = number, p, value, gradient
        self.half = p.dtype in _HALVES
        self.arrived: Callable[[int], None] | None = None
        self._summed: Tensor | None = None  # what autograd left in p.grad, and its version then
        self._version = -1
        self._lent: tuple[Tensor | None, Tensor | None] | None = None
        self._place = value.data_ptr(), value.shape, value.dtype
        value.copy_(p.detach())
        if not self.half:
            p.data = value
        for old in _hooks.pop(p, ()):
            old.remove()
        hooks = [p.register_post_accumulate_grad_hook(self._accumulated)]  # type: ignore[no-untyped-call]
        if self.half:
            hooks.append(p.register_hook(self._add))  # type: ignore[no-untyped-call]
        _hooks[p] = hooks

    def _mark(self) -> None:
        """Remember that `gradient` holds what is in ``p.grad`` now."""
        self._summed = self.p.grad
        self._version = -1 if self._summed is None else self._summed._version  # noqa: SLF001

    @property
    def untouched(self) -> bool:
        """Whether ``p.grad`` is what it was at the last mark."""
        grad = self.p.grad
        return grad is self._summed and (grad is None or grad._version == self._version)  # noqa: SLF001

    @torch.no_grad()
    def _add(self, grad: Tensor) -> None:
        """Add what autograd is about to add to ``p.grad``, without rounding the sum to 16 bits."""
        if grad.layout is not torch.strided:
            return
        if self.p.grad is None:
            self.gradient.zero_()
        elif not self.untouched and self.p.grad.layout is torch.strided:
            self.gradient.copy_(self.p.grad)
        self.gradient.add_(grad)

    def _accumulated(self, p: Tensor) -> None:
        grad = p.grad
        if grad is not None and grad.layout is torch.strided and not grad.requires_grad:  # the others wait for the step
            if self.half:
                self._mark()
            else:
                self.take()
        if self.arrived is not None:
            self.arrived(self.number)

    def take(self) -> bool:
        """Make `gradient` hold what is in ``p.grad``, zeros for None; tell whether there is something.

        Raises
        ------
        DtypeError
            The gradient is sparse.
        """
        p, grad = self.p, self.p.grad
        if grad is None:
            self.gradient.zero_()
        elif grad is not self.gradient and (not self.half or not self.untouched):
            if grad.layout is not torch.strided:
                raise DtypeError(f"parameter {self.number} {tuple(p.shape)}: its gradient is sparse; use sparse=False in "
                                 "the embedding")  # fmt: skip
            if self.half or grad.data_ptr() != self.gradient.data_ptr():
                self.gradient.copy_(grad.detach())
            if not self.half:
                p.grad = self.gradient
        self._mark()
        return grad is not None

    def adopt(self) -> None:
        """Make `value` hold what has been written to the parameter.

        Raises
        ------
        ShapeError
            Its memory was replaced by some of another shape, dtype or device.
        """
        p = self.p
        if (p.data_ptr(), p.shape, p.dtype) == self._place:
            return
        p, value = p.detach(), self.value
        if (
            p.shape != value.shape
            or p.device != value.device
            or p.dtype not in (_HALVES if self.half else (value.dtype,))
        ):
            raise ShapeError(f"parameter {self.number} {tuple(p.shape)}: its memory was replaced (by model.to(...)?); build "
                             "the optimizer after the model is in its final place")  # fmt: skip
        if self.half:
            written, rounded = (part.view(torch.int16) for part in (p, value.to(p.dtype)))
            if not torch.equal(written, rounded):
                value.copy_(torch.where(written == rounded, value, p))
        else:
            value.copy_(p)
            self.p.data = value

    @torch.no_grad()
    def publish(self) -> None:
        """Round `value` into the parameter, which is kept in 16 bits."""
        self.p.copy_(self.value)

    @torch.no_grad()
    def scaled(self, factor: float) -> None:
        """Do the same to ``p.grad``, which is in 16 bits, as was done to `gradient`."""
        if self.p.grad is not None:
            self.p.grad.mul_(factor)
            self._mark()

    def is_lent(self, moving: bool) -> bool:
        """Whether the parameter is its place in the vector already, with its gradient there, or none."""
        return not self.half and self.p.grad is (self.gradient if moving else None)

    def lend(self, moving: bool) -> None:
        """Let it be so."""
        p = self.p
        self._lent = p.data if self.half else None, p.grad
        if self.half:
            p.grad = None
            p.data = self.value
        p.grad = self.gradient if moving else None

    def take_back(self) -> None:
        """Let the parameter be what it was."""
        assert self._lent is not None  # noqa: S101
        (data, grad), p = self._lent, self.p
        if data is not None:
            p.grad = None
            p.data = data
        p.grad, self._lent = grad, None


class FlatParameters:
    """The trainable parameters of a model, laid out one after the other.

    Every parameter becomes a view of `values`. Its ``grad`` becomes a view of `gradients` as soon as autograd has made it.

    A parameter in 16 bits stays where it is. Its place in `values` is its *master*, in float32, of which it is a rounded
    copy after :meth:`publish`. What a program writes to such a parameter goes into the master (:meth:`adopt`), entry by
    entry where the two differ.

    Parameters
    ----------
    parameters : iterable of torch.nn.Parameter
        Those without ``requires_grad`` are left where they are; one that appears twice (tied weights) counts once.

    Attributes
    ----------
    parameters, frozen : list of torch.nn.Parameter
        Those in the vectors, and those that did not require a gradient at construction.
    starts : list of int
        Where the parameters begin in the vectors, and `d`.
    d : int
        Number of trainable entries.
    dtype : numpy.dtype
        float32 or float64.
    values, gradients : (d,) arrays
    present : (parameters,) array of bool
        Which of them had a gradient when gradients were collected.

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
        self.starts = [0]
        # NumPy's memory, because it asks for large pages and torch does not.
        self.values: Vector = aligned_zeros(self.d, self.dtype)
        self.gradients: Vector = aligned_zeros(self.d, self.dtype)
        self._parts: list[_Part] = []
        for number, p in enumerate(self.parameters):
            place = slice(self.starts[-1], self.starts[-1] + p.numel())
            # Tensors of their own, which count for each parameter how often it was changed.
            value, gradient = (torch.from_numpy(flat[place]).view(p.shape) for flat in (self.values, self.gradients))
            self._parts.append(_Part(number, p, value, gradient))
            self.starts.append(place.stop)
        self._halves = [part for part in self._parts if part.half]
        self.present: Mask = np.zeros(len(self._parts), bool)
        for part in self._parts:
            part.take()

    @property
    def mixed(self) -> bool:
        """Whether there are parameters in 16 bits."""
        return bool(self._halves)

    def place(self, number: int) -> slice:
        """Return where a parameter is in the vectors."""
        return slice(self.starts[number], self.starts[number + 1])

    def watch(self, arrived: Callable[[int], None]) -> None:
        """Call ``arrived(number)`` in every backward pass, when the gradient of that parameter is in `gradients`. Local."""
        for part in self._parts:
            part.arrived = arrived

    def untouched(self, number: int) -> bool:
        """Return whether the gradient of a parameter is what autograd has left. Local."""
        return self._parts[number].untouched

    def zero_gradients(self, *, set_to_none: bool = True) -> None:
        """Take all gradients away, or set those that there are to zero. Local."""
        for part in self._parts:
            if set_to_none:
                part.p.grad = None
            elif part.p.grad is not None:
                part.p.grad = part.p.grad.detach().zero_()

    def adopt(self) -> None:
        """Make `values` hold what a program has written to the parameters. Local.

        Raises
        ------
        ShapeError
            A parameter's memory was replaced by some of another shape or dtype, for example by ``model.to(...)``.
        """
        for part in self._parts:
            part.adopt()

    def collect_gradients(self) -> None:
        """Make `gradients` hold what is in every parameter's ``grad``, and zeros where there is none; fill `present`. Local.

        Raises
        ------
        DtypeError
            A gradient is sparse.
        OptionError
            A parameter that was frozen at construction is trained now: it has no place in the vectors.
        """
        if any(p.requires_grad for p in self.frozen):
            raise OptionError("a parameter was unfrozen after the optimizer was built; unfreeze first, then build it "
                              "anew")  # fmt: skip
        self.present[:] = [part.take() for part in self._parts]

    def scale_gradients(self, factor: float) -> None:
        """Multiply all gradients that there are. Local."""
        self.gradients *= self.dtype.type(factor)
        for part in self._halves:
            part.scaled(factor)

    @contextmanager
    def lent(self, moving: Sequence[bool] | Mask | None = None) -> Iterator[None]:
        """Let every parameter be its place in `values`, also those in 16 bits, while a torch optimizer steps. Local.

        Parameters
        ----------
        moving : sequence of bool, optional
            Which of them have a gradient then, their place in `gradients`; all by default.
        """
        of_frozen = [p.grad for p in self.frozen]  # they are not in the vectors, and would move on this rank alone
        for p in self.frozen:
            p.grad = None
        how = zip(self._parts, repeat(True) if moving is None else moving, strict=False)
        lent = [(part, moves) for part, moves in how if not part.is_lent(moves)]
        for part, moves in lent:
            part.lend(moves)
        try:
            yield
        finally:
            for part, _ in lent:
                part.take_back()
            for p, grad in zip(self.frozen, of_frozen, strict=True):
                p.grad = grad

    def publish(self) -> None:
        """Round the masters into the parameters that are kept in 16 bits. Local."""
        for part in self._halves:
            part.publish()

    def masters(self) -> dict[int, Tensor]:
        """Return copies of the masters, by the number of the parameter in 16 bits. Local."""
        return {part.number: part.value.clone() for part in self._halves}

    def load_masters(self, masters: dict[int, Tensor]) -> None:
        """Overwrite masters; parameters that are not their rounded copies in the next step win over them. Local."""
        for number, master in masters.items():
            self._parts[number].value.copy_(master)

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
