"""Parameters and gradients of a torch model as views of two contiguous vectors."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpi_ef.comm.protocol import Comm
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import DtypeError, OptionError
from mpi_ef.kernels.backend import backend, side_of

from .part import HALVES, Part
from .places import fingerprints, on_host, overwrite

__all__ = ["FlatParameters", "Mask", "broadcast"]

_LONG = 2**14  # entries of a parameter on average from which on looking at gradients one by one costs less than a copy
_BROADCAST_NBYTES = 2**30  # per message, below the largest count of MPI
Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]


class FlatParameters:
    """The trainable parameters of a model, laid out one after the other.

    Every parameter becomes a view of `values`. What is in its ``grad`` is copied to `gradients` when it is asked for.

    A parameter in 16 bits, or in memory that processes share, stays where it is. Its place in `values` is its *master*, in
    float32 where it is in 16 bits, of which it is a rounded copy after :meth:`write_back`. What a program writes to such a
    parameter goes into the master (:meth:`adopt`), entry by entry where the two differ.

    Parameters
    ----------
    parameters : iterable of torch.nn.Parameter
        On the CPU or all on one device, where the vectors are then. Those without ``requires_grad`` are left where they
        are; one that appears twice (tied weights) counts once.

    Raises
    ------
    DtypeError
        Parameters of another dtype, float64 mixed with others, or on several devices.
    OptionError
        No parameter requires a gradient.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        distinct = list(dict.fromkeys(parameters))
        self.parameters = [p for p in distinct if p.requires_grad]  # those in the vectors
        self.frozen = [p for p in distinct if not p.requires_grad]
        self.dtype, self.device = _common_home(self.parameters)  # float32 or float64; what `backend` calls the device
        self.kernels: Any = backend(self.dtype, self.device)
        self._check_memory()
        self.d = sum(p.numel() for p in self.parameters)
        self.starts = [0]  # where the parameters begin in the vectors, and d
        # (d,), on the CPU in NumPy's memory, because it asks for large pages and torch does not.
        self.values: Vector = self.kernels.zeros(self.d)
        self.gradients: Vector = self.kernels.zeros(self.d)
        self._parts: list[Part] = []
        for number, p in enumerate(self.parameters):
            place = slice(self.starts[-1], self.starts[-1] + p.numel())
            # Tensors of their own, which count for each parameter how often it was changed.
            value, gradient = (_view(flat, place, p) for flat in (self.values, self.gradients))
            self._parts.append(Part(number, p, value, gradient))
            self.starts.append(place.stop)
        self._halves = [part for part in self._parts if part.half]
        self._apart = [part for part in self._parts if part.apart]
        self._gradients = [part.gradient for part in self._parts]
        self.present: Mask = np.zeros(len(self._parts), bool)  # which had a gradient when gradients were collected
        self.lends = False  # whether gradients are still in the parameters' grad alone, see collect_gradients()
        for part in self._parts:
            part.take()

    def gather_gradients_in(self, memory: Vector) -> None:
        """Let `gradients` be in this memory, (d,) of the dtype, from now on. Local."""
        memory[:] = self.gradients
        self.gradients = memory
        for part in self._parts:
            part.gradient = _view(memory, self.place(part.number), part.p)
        self._gradients = [part.gradient for part in self._parts]

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

        By the number of the parameter: itself, or a new tensor.

        Raises
        ------
        ShapeError
            A parameter's memory was replaced by some of another shape or dtype, for example by ``model.to(...)``.
        """
        answers = {part.number: kept for part in self._halves if (kept := part.is_kept()) is not None}
        known = torch.stack([*answers.values()]).tolist() if answers else []  # one answer to wait for
        same = {number for number, kept in zip(answers, known, strict=True) if kept}
        found = ((part.number, part.written()) for part in self._parts if part.number not in same)
        return {number: written for number, written in found if written is not None}

    def current(self) -> Vector:
        """Return `values`, or where a program has written to parameters since a copy with that. Local."""
        values, written = self.values, self.written()
        if written:
            values = values.copy()
        for number, tensor in written.items():
            values[self.place(number)] = self.kernels.vector(tensor.contiguous())
        return values

    def adopt(self) -> bool:
        """Make `values` hold what a program has written to the parameters, and tell whether that was anything. Local.

        Where the program has given a parameter other memory, `values` and all parameters move: the program may still hold
        the old memory, and give it back.

        Raises
        ------
        ShapeError
            As :meth:`written`.
        OptionError
            Two parameters have the same memory.
        """
        written = self.written()
        moved = any(not self._parts[number].apart for number in written)
        if moved:
            self._check_memory()
            earlier, self.values = self.values, self.kernels.zeros(self.d)
            self.values[:] = earlier
        for number, tensor in written.items():
            _view(self.values, self.place(number), tensor).copy_(tensor)
        if moved:
            for part in self._parts:
                part.lay(_view(self.values, self.place(part.number), part.p))
            self._apart = [part for part in self._parts if part.apart]
        return bool(written)

    def _check_memory(self) -> None:
        """Raise where two parameters have the same memory: one of them would be trained, and not the other."""
        seen: dict[int, int] = {}
        for number, p in enumerate(self.parameters):
            first = seen.setdefault(p.data_ptr(), number) if p.numel() else number
            if first != number:
                raise OptionError(f"parameters {first} and {number} {tuple(p.shape)} have the same memory: to tie weights "
                                  "let both modules have one parameter, `b.weight = a.weight`, before the optimizer is "
                                  "built; else write p.data = q.data.clone()")

    def hashes(self) -> NDArray[np.uint32]:
        """Return a hash of every parameter, and of every frozen one. Local."""
        return np.concatenate([self.fingerprints(self.values), fingerprints(self.frozen)])

    def fingerprints(self, vector: Vector) -> NDArray[np.uint32]:
        """Return a hash of what every parameter has in a vector, (d,), the same on any device. Local."""
        whole = np.empty(len(self.parameters), np.uint64)
        self.kernels.fingerprints(vector, np.array(self.starts), whole)
        return (whole ^ (whole >> np.uint64(32))).astype(np.uint32)

    def versions(self) -> list[int]:
        """Return numbers that change when torch writes to a parameter, also to one that is not trained. Local."""
        return [p._version for p in (*self.parameters, *self.frozen)]  # noqa: SLF001

    def collect_gradients(self, *, lend: bool = False) -> None:
        """Make `gradients` hold what is in every parameter's ``grad``, and zeros where there is none; fill `present`. Local.

        With `lend` they may stay where they are, for :meth:`lent`, where they all are plain and long; `lends` tells it.

        Raises
        ------
        DtypeError
            A gradient is sparse.
        OptionError
            A parameter that was frozen at construction is trained now: it has no place in the vectors.
        """
        if any(p.requires_grad for p in self.frozen):
            raise OptionError("a parameter was unfrozen after the optimizer was built; unfreeze first, then build it again")
        grads: list[Any] = [p.grad for p in self.parameters]
        self.lends = False
        if self._halves or [g for g in grads if g is None or g.requires_grad or g.layout is not torch.strided]:
            self.present[:] = [part.take() for part in self._parts]
        else:
            self.present.fill(True)
            if lend and self.d >= _LONG * len(grads) and all(map(Tensor.is_contiguous, grads)):
                self.lends = True
            else:  # in one call: for short vectors calls cost more than copies
                torch._foreach_copy_(self._gradients, grads)

    def collected(self) -> list[Vector]:
        """Return the gradients of all parameters, in arrays of one dimension. Not copies. Local."""
        if not self.lends:
            return [self.gradients]
        return [self.kernels.vector(p.grad) for p in self.parameters if p.grad is not None]

    def spend_gradients(self) -> None:
        """Take note that `gradients` will not be what is in the parameters' ``grad`` any more. Local."""
        for part in self._halves:
            part.spend()

    def scale_gradients(self, factor: float) -> None:
        """Multiply all gradients that there are, in the parameters' ``grad``. Local."""
        for part in self._parts:
            part.scale(factor)

    def views(self, vector: Vector) -> list[Tensor]:
        """Return the parts of a vector, (d,), that belong to the parameters, in their shapes. Not copies. Local."""
        return [_view(vector, self.place(number), p) for number, p in enumerate(self.parameters)]

    @contextmanager
    def lent(self, moving: Sequence[bool] | Mask | None = None, into: Sequence[Tensor] | None = None) -> Iterator[None]:
        """Let every parameter be its place in `values`, also those in 16 bits, while a torch optimizer steps. Local.

        Or that in `into`, such as :meth:`views` of another vector. Those that are `moving`, all by default, have a gradient
        then: their place in `gradients`, or, where `lends`, their own.
        """
        everything = self.frozen + self.parameters  # what is not in the vectors would move on this rank alone
        kept = [p.grad for p in everything]
        parts = self._apart if into is None else self._parts
        for part in parts:
            part.lend(None if into is None else into[part.number])
        for p in self.frozen:
            p.grad = None
        grads = kept[len(self.frozen) :] if self.lends else self._gradients
        for p, moves, grad in zip(self.parameters, repeat(True) if moving is None else moving, grads, strict=False):
            p.grad = grad if moves else None
        try:
            yield
        finally:
            for part in parts:
                part.take_back()
            for p, grad in zip(everything, kept, strict=True):
                p.grad = grad

    def write_back(self) -> None:
        """Copy the masters to the parameters that stay apart, rounded to their dtype. Local."""
        for part in self._apart:
            part.write_back()

    def masters(self) -> dict[int, Tensor]:
        """Return copies of the masters, with what has been written, by the number of the parameter in 16 bits. Local."""
        written = self.written()
        return {part.number: written.get(part.number, part.value).clone() for part in self._halves}

    def load_masters(self, masters: dict[int, Tensor]) -> None:
        """Overwrite masters; parameters that are not their rounded copies in the next step win over them. Local."""
        for number, master in masters.items():
            overwrite(self._parts[number].value, master)

    def broadcast(self, comm: Comm, root: int = 0) -> None:
        """Overwrite the parameters, frozen ones too, on all ranks with those of rank `root`. Collective."""
        sent = self.kernels.fetch(self.values)
        broadcast(comm, sent.view(np.uint8), root)
        if sent is not self.values:
            self.values[:] = sent
        self.write_back()
        for p in self.frozen:  # of any dtype and layout
            copied = on_host(p).contiguous()
            broadcast(comm, copied.view(-1).view(torch.uint8).numpy(), root)
            if comm.Get_rank() != root:
                overwrite(p, copied)


def _view(flat: Vector, place: slice, like: Tensor) -> Tensor:
    """Return a part of a vector in the shape of a parameter."""
    part: Any = flat[place]
    return (torch.from_numpy(part) if isinstance(part, np.ndarray) else part.tensor).view(like.shape)


def broadcast(comm: Comm, array: Bytes, root: int = 0) -> None:
    """Overwrite `array` on all ranks with that of `root`, in messages that MPI can count. Collective."""
    for start in range(0, array.size, _BROADCAST_NBYTES):
        comm.Bcast(array[start : start + _BROADCAST_NBYTES], root=root)


def _common_home(parameters: list[Tensor]) -> tuple[np.dtype[np.floating], str]:
    """Return the dtype of the vectors of these parameters, and where they are."""
    if not parameters:
        raise OptionError("FlatParameters: no parameter requires a gradient; pass those of the model to be trained")
    dtypes, devices = {p.dtype for p in parameters}, {p.device for p in parameters}
    (one, *others) = devices
    if not others and one.type != "meta" and dtypes <= {torch.float32, *HALVES}:
        return np.dtype(np.float32), side_of(one.type, one.index)
    if not others and one.type != "meta" and dtypes == {torch.float64}:
        return np.dtype(np.float64), side_of(one.type, one.index)
    listed = ", ".join(sorted({f"{p.dtype} on {p.device}" for p in parameters}))
    raise DtypeError(f"FlatParameters: parameters are {listed}; make them torch.float32, bfloat16 or float16, or "
                     "torch.float64, all on one device")
