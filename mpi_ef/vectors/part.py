"""One parameter of a model, and its places in the vectors."""

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mpi_ef.errors import DtypeError, ShapeError

__all__ = ["HALVES", "Part"]

HALVES = (torch.bfloat16, torch.float16)
_hooks: Any = WeakTensorKeyDictionary()  # of every parameter in a vector: a later vector that has it takes them off


class Part:
    """One parameter `p`, and its places `value` and `gradient` in the vectors.

    What is in ``p.grad`` when a step is taken counts, as in torch: None is no gradient. It is the program's, and nothing
    here writes to it. Of a parameter in 16 bits, ``p.grad`` is in 16 bits; where several backward passes have added to it,
    `gradient` is the sum of the same in float32, which is taken in its place as long as nothing else has changed it.

    A parameter in 16 bits, or in memory that processes share, stays *apart*: `value` is its master, of which it is a copy.
    """

    def __init__(self, number: int, p: Tensor, value: Tensor, gradient: Tensor) -> None:
        self.number, self.p, self.value, self.gradient = number, p, value, gradient
        self.half, self._dtype = p.dtype in HALVES, p.dtype
        self._place = _memory(value, p.dtype)
        self.arrived: Callable[[int], None] | None = None
        self._rounded: Tensor | None = None  # p.grad when `gradient` was the sum of which it is rounded
        self._lent: Tensor | None = None
        value.copy_(p.detach())
        self.apart = self.half or _shared(p)
        if not self.apart:
            p.data = value
        for old in _hooks.pop(p, {}).values():
            old.remove()
        self._handles: dict[str, Any] = {}
        _hooks[p] = self._handles
        self._node: Any = None
        self._listen()

    def watch(self, arrived: Callable[[int], None]) -> None:
        """Call ``arrived(number)`` when autograd has made a gradient, and `gradient` holds it."""
        self.arrived = arrived
        self._handles["made"] = self.p.register_post_accumulate_grad_hook(_while_there(self, Part._made))  # type: ignore[no-untyped-call]

    def _listen(self) -> None:
        """Hear what autograd is about to add to ``p.grad``, after all hooks of the program."""
        if self.half and self.p.requires_grad:
            with torch.enable_grad():
                passed: Any = self.p.view_as(self.p)
            node = passed.grad_fn.next_functions[0][0]
            if node is not self._node:  # data of another dtype have made a new one
                if "added" in self._handles:
                    self._handles["added"].remove()
                self._node = node
                self._handles["added"] = node.register_prehook(_while_there(self, Part._add))

    @property
    def _known(self) -> bool:
        """Whether `gradient` is the sum of which ``p.grad`` is rounded."""
        return self._rounded is not None and self.p.grad is not None and _same(self.p.grad, self._rounded)

    @torch.no_grad()
    def _add(self, grads: tuple[Tensor | None, ...]) -> None:
        """Add to `gradient` what autograd is about to add to ``p.grad``, without rounding the sum to 16 bits."""
        held, (grad, *_) = self.p.grad, grads
        if held is None or grad is None or not (held.layout is grad.layout is torch.strided):
            self._rounded = None
            return
        if not self._known:
            self.gradient.copy_(held)
        self.gradient.add_(grad)
        self._rounded = held + grad  # what autograd makes of it; where a hook makes something else of that, it counts

    def _made(self, p: Tensor) -> None:
        if self.arrived is not None and p.grad is not None and p.grad.layout is torch.strided:  # else it waits for the step
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
                             "the embedding")
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
        if not self.apart and _memory(p, p.dtype) == self._place:
            return None
        p = p.detach()
        if p.shape != value.shape or p.device != value.device or p.dtype != self._dtype:
            raise ShapeError(f"parameter {self.number} {tuple(p.shape)}: its memory was replaced (by model.to(...)?); build "
                             "the optimizer after the model is in its final place")
        if not self.half:
            return None if self.apart and torch.equal(p, self.value) else p
        return torch.where(self._kept(), value, p)

    def _kept(self) -> Tensor:
        """Return which entries of a parameter in 16 bits are still what `value` was rounded to."""
        return self.p.detach().view(torch.int16) == self.value.to(self.p.dtype).view(torch.int16)

    def is_kept(self) -> Tensor | None:
        """Return whether all of them are, as a tensor, which a device may not know yet; None where :meth:`written` tells."""
        alike = self.half and self.p.shape == self.value.shape and self.p.device == self.value.device
        return self._kept().all() if alike and self.p.dtype == self._dtype else None

    def lay(self, value: Tensor) -> None:
        """Take `value`, in another vector, as its place."""
        self.value, self._place = value, _memory(value, self._dtype)
        self.apart = self.apart or _shared(self.p)
        if not self.apart:
            self.p.data = value

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy `value`, rounded, to the parameter, which stays apart."""
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

    def lend(self, to: Tensor | None = None) -> None:
        """Let the parameter be `to`, or its place in the vector; without a gradient where that is of another dtype."""
        if self.apart:
            self._lent, self.p.grad = self.p.data, None
        self.p.data = self.value if to is None else to

    def take_back(self) -> None:
        """Let it be what it was."""
        if self.apart:
            assert self._lent is not None  # noqa: S101
            self.p.grad = None
            self.p.data, self._lent = self._lent, None
            self._listen()
        else:
            self.p.data = self.value


def _shared(p: Tensor) -> bool:
    """Tell whether processes share the memory of a parameter; torch says so of all that is on a GPU."""
    return p.device.type == "cpu" and bool(p.is_shared())  # type: ignore[no-untyped-call]


def _memory(tensor: Tensor, dtype: torch.dtype) -> tuple[object, ...]:
    """Return where a tensor lies, and how; as one of `dtype`."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), dtype


def _while_there(part: Part, act: Callable[[Part, Any], None]) -> Callable[[Any], None]:
    """Return a hook that does not keep the part, nor the vectors, when nothing else does."""
    known = ref(part)

    def hook(given: Any) -> None:
        there = known()
        if there is not None:
            act(there, given)

    return hook


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype have the same entries, in the same place; NaN is as NaN."""
    if a.layout is not b.layout or a.device != b.device or a.shape != b.shape:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())  # noqa: PLR0124
