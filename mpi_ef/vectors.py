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

    What is in ``p.grad`` when a step is taken counts, as in torch: None is no gradient. It is the program's, and nothing
    here writes to it. Of a parameter in 16 bits, ``p.grad`` is in 16 bits; where several backward passes have added to it,
    `gradient` is the sum of the same in float32, which is taken in its place as long as nobody else has changed it.
    """

    def __init__(self, number: int, p: Tensor, value: Tensor, gradient: Tensor) -> None:
        self.number, self.p, self.value, self.gradient = number, p, value, gradient
        self.half, self._dtype = p.dtype in _HALVES, p.dtype
        self._place = value.data_ptr(), value.shape, value.stride(), p.dtype
        self.arrived: Callable[[int], None] | None = None
        self._rounded: Tensor | None = None  # p.grad when `gradient` was the sum of which it is rounded
        self._adds = False
        self._lent: Tensor | None = None
        value.copy_(p.detach())
        if not self.half:
            p.data = value
        for old in _hooks.pop(p, ()):
            old.remove()
        self._handles: list[Any] = []
        _hooks[p] = self._handles
        self._node: Any = None
        self._listen()

    def watch(self, arrived: Callable[[int], None]) -> None:
        """Call ``arrived(number)`` when autograd has made a gradient, and `gradient` holds it."""
        self.arrived = arrived
        if not self.half:
            self._handles.append(self.p.register_post_accumulate_grad_hook(self._accumulated))  # type: ignore[no-untyped-call]

    def _listen(self) -> None:
        """Hear what autograd is about to add to ``p.grad``, after all hooks of the program."""
        if self.half and not self._handles:
            self._handles.append(self.p.register_post_accumulate_grad_hook(self._accumulated))  # type: ignore[no-untyped-call]
        if self.half and self.p.requires_grad:
            with torch.enable_grad():
                passed: Any = self.p.view_as(self.p)
            node = passed.grad_fn.next_functions[0][0]
            if node is not self._node:  # data of another dtype have made a new one
                self._node = node
                self._handles.append(node.register_prehook(self._add))

    @property
    def _known(self) -> bool:
        """Whether `gradient` is the sum of which ``p.grad`` is rounded."""
        return self._rounded is not None and self.p.grad is not None and _same(self.p.grad, self._rounded)

    @torch.no_grad()
    def _add(self, grads: tuple[Tensor | None, ...]) -> None:
        """Add to `gradient` what autograd is about to add to ``p.grad``, without rounding the sum to 16 bits."""
        held, (grad, *_) = self.p.grad, grads
        self._adds = held is not None and grad is not None and held.layout is grad.layout is torch.strided
        if self._adds:
            assert held is not None and grad is not None  # noqa: PT018, S101
            if not self._known:
                self.gradient.copy_(held)
            self.gradient.add_(grad)

    def _accumulated(self, p: Tensor) -> None:
        if self.half:
            assert p.grad is not None  # noqa: S101
            self._rounded, self._adds = p.grad.detach().clone() if self._adds else None, False
        if (
            self.arrived is not None and p.grad is not None and p.grad.layout is torch.strided
        ):  # else it waits for the step
            self.take()
            self.arrived(self.number)

    @property
    def untouched(self) -> bool:
        """Whether ``p.grad`` is still what `gradient` was taken from."""
        grad = self.p.grad
        return grad is not None and (self._known or _same(grad, self.gradient.to(grad.dtype)))

    def take(self) -> bool:
        """Make `gradient` hold what is in ``p.grad``, zeros for None; tell whether there is something.

        Raises
        ------
        DtypeError
            The gradient is sparse.
        """
        grad = self.p.grad
        if grad is None:
            self.gradient.zero_()
        elif grad.layout is not torch.strided:
            raise DtypeError(f"parameter {self.number} {tuple(self.p.shape)}: its gradient is sparse; use sparse=False in "
                             "the embedding")  # fmt: skip
        elif self._rounded is None or not self._known:
            self.gradient.copy_(grad.detach() if grad.requires_grad else grad)
        return grad is not None

    def written(self) -> Tensor | None:
        """Return what `value` has to become because of what was written to the parameter; None if nothing was.

        Raises
        ------
        ShapeError
            Its memory was replaced by some of another shape, dtype or device.
        """
        p, value = self.p, self.value
        if (p.data_ptr(), p.shape, p.stride(), p.dtype) == self._place:
            return None
        p = p.detach()
        if p.shape != value.shape or p.device != value.device or p.dtype != self._dtype:
            raise ShapeError(f"parameter {self.number} {tuple(p.shape)}: its memory was replaced (by model.to(...)?); build "
                             "the optimizer after the model is in its final place")  # fmt: skip
        if not self.half:
            return p
        kept = p.view(torch.int16) == value.to(p.dtype).view(torch.int16)
        return None if bool(kept.all()) else torch.where(kept, value, p)

    def adopt(self) -> None:
        """Make `value` hold what has been written to the parameter; as :meth:`written`."""
        written = self.written()
        if written is not None:
            self.value.copy_(written.clone())  # it may be the same memory, transposed
            if not self.half:
                self.p.data = self.value

    @torch.no_grad()
    def publish(self) -> None:
        """Round `value` into the parameter, which is kept in 16 bits."""
        self.p.copy_(self.value)

    def spend(self) -> None:
        """Take note that `gradient` is something else from now on."""
        self._rounded = None

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply ``p.grad`` and `gradient`, which may have more bits."""
        grad = self.p.grad
        if grad is not None:
            grad.mul_(factor)
            self.gradient.mul_(factor)
            self._rounded = grad.detach().clone() if self.half else None

    def lend(self) -> None:
        """Let the parameter, which is in 16 bits, be its place in the vector, without a gradient."""
        self._lent, self.p.grad = self.p.data, None
        self.p.data = self.value

    def take_back(self) -> None:
        """Let it be what it was, without a gradient."""
        assert self._lent is not None  # noqa: S101
        self.p.grad = None
        self.p.data, self._lent = self._lent, None
        self._listen()


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype have the same entries; NaN is as NaN."""
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())  # noqa: PLR0124


class FlatParameters:
    """The trainable parameters of a model, laid out one after the other.

    Every parameter becomes a view of `values`. What is in its ``grad`` is copied to `gradients` when it is asked for.

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
        self._gradients = [part.gradient for part in self._parts]
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
            part.watch(arrived)

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

    def written(self) -> dict[int, Tensor]:
        """Return what parts of `values` have to become because of what a program has written to parameters. Local.

        Returns
        -------
        dict of int to tensor
            By the number of the parameter; parameters themselves, or new ones.

        Raises
        ------
        ShapeError
            A parameter's memory was replaced by some of another shape or dtype, for example by ``model.to(...)``.
        """
        found = ((part.number, part.written()) for part in self._parts)
        return {number: written for number, written in found if written is not None}

    def adopt(self) -> None:
        """Make `values` hold what a program has written to the parameters. Local; as :meth:`written`."""
        for part in self._parts:
            part.adopt()

    def versions(self) -> list[int]:
        """Return numbers that change when torch writes to a parameter. Local."""
        return [p._version for p in self.parameters]  # noqa: SLF001

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
        grads: list[Any] = [p.grad for p in self.parameters]
        if self._halves or [g for g in grads if g is None or g.requires_grad or g.layout is not torch.strided]:
            self.present[:] = [part.take() for part in self._parts]
        else:  # in one call: for short vectors calls cost more than copies
            torch._foreach_copy_(self._gradients, grads)
            self.present.fill(True)

    def spend_gradients(self) -> None:
        """Take note that `gradients` will not be what is in the parameters' ``grad`` any more. Local."""
        for part in self._halves:
            part.spend()

    def scale_gradients(self, factor: float) -> None:
        """Multiply all gradients that there are, in the parameters' ``grad``. Local."""
        for part in self._parts:
            part.scale(factor)

    @contextmanager
    def lent(self, moving: Sequence[bool] | Mask | None = None) -> Iterator[None]:
        """Let every parameter be its place in `values`, also those in 16 bits, while a torch optimizer steps. Local.

        Parameters
        ----------
        moving : sequence of bool, optional
            Which of them have a gradient then, their place in `gradients`; all by default.
        """
        everything = self.frozen + self.parameters  # what is not in the vectors would move on this rank alone
        kept = [p.grad for p in everything]
        for part in self._halves:
            part.lend()
        for p in self.frozen:
            p.grad = None
        for part, moves in zip(self._parts, repeat(True) if moving is None else moving, strict=False):
            part.p.grad = part.gradient if moves else None
        try:
            yield
        finally:
            for part in self._halves:
                part.take_back()
            for p, grad in zip(everything, kept, strict=True):
                p.grad = grad

    def publish(self) -> None:
        """Round the masters into the parameters that are kept in 16 bits. Local."""
        for part in self._halves:
            part.publish()

    def masters(self) -> dict[int, Tensor]:
        """Return copies of the masters, with what has been written, by the number of the parameter in 16 bits. Local."""
        written = self.written()
        return {part.number: written.get(part.number, part.value).clone() for part in self._halves}

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
