"""Layers of equal shape, and what their gradients are multiplied by."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .forms import IN_PLACE, Mean, ShermanMorrison, Side
from .layers import Layer

__all__ = ["Group", "groups_of"]


class Group:
    """Layers whose weights are matrices (p, q), as one batch. Local.

    Attributes
    ----------
    numbers : list of int
        Of the layers.
    restarts : int
        How often a layer began anew, because what was kept of it was not finite. Where a product is not, a layer keeps its
        gradient in that step.
    """

    def __init__(self, numbers: Sequence[int], layers: Sequence[Layer], inputs: Side | None, outputs: Side | None,
                 like: Tensor, *, rescale: bool) -> None:
        self.numbers, self._layers = list(numbers), [layers[number] for number in numbers]
        self.inputs, self.outputs, self._rescale = inputs, outputs, rescale
        self.restarts = 0
        first = self._layers[0]
        size = len(numbers), first.p, first.q
        self._x = like.new_zeros(size)
        # Products with whole matrices cannot be in place.
        apart = any(not isinstance(side, IN_PLACE) for side in self.sides)
        self._spare = like.new_zeros(size) if apart else self._x
        self._places = {id(array): [self._views(array[place], layer) for place, layer in enumerate(self._layers)]
                        for array in (self._x, self._spare)}
        self._entries = sum(1 + (layer.bias is not None) for layer in self._layers)
        self._bounded = not any(isinstance(side, ShermanMorrison) for side in self.sides)

    @staticmethod
    def _views(matrix: Tensor, layer: Layer) -> tuple[Tensor, Tensor | None]:
        """Return the parts of [W b] that are weight and bias."""
        if layer.bias is None:
            return matrix.view(layer.weight.shape), None
        return matrix[:, :-1].view(layer.weight.shape), matrix[:, -1]

    @property
    def sides(self) -> list[Side]:
        """Those that there are."""
        return [side for side in (self.inputs, self.outputs) if side is not None]

    def never_seen(self) -> list[int]:
        """Return the numbers of the layers that have learned nothing so far, on any rank."""
        return [] if self.restarts else [number for number, updates in zip(self.numbers, self.sides[0].updates, strict=True)
                                         if not updates]

    def update(self, told: Sequence[tuple[Tensor | None, Tensor | None, float]]) -> None:
        """Learn from what all ranks have seen, by layer number; layers that none has seen stay."""
        seen = [(place, told[number]) for place, number in enumerate(self.numbers) if told[number][2] > 0]
        for side, of in ((self.inputs, 0), (self.outputs, 1)):
            if side is not None and seen:
                means = [mean / share for _, (*both, share) in seen for mean in (both[of],) if mean is not None]
                side.update([place for place, _ in seen], torch.stack(means))

    def precondition(self) -> None:
        """Put in the place of the layers' gradients ``P_g G P_a``, of the norm of G where that is wanted."""
        if not any(any(side.updates) for side in self.sides):
            return
        there = [place for place, layer in enumerate(self._layers) if layer.weight.grad is not None]
        if not there:
            return
        parts, grads = self._pairs(self._x, there)
        if len(parts) < self._entries:  # of what has no gradient there is something from earlier steps
            self._x.zero_()
        torch._foreach_copy_(parts, grads)
        before = self._norms(self._x)
        x = self._product()
        after = self._norms(x)
        # A gradient that is not finite itself says nothing about what was learned.
        if not self._bounded and not bool((fine := after.isfinite() | ~before.isfinite()).all()):
            broken = (~fine).nonzero()[:, 0].tolist()
            there = [place for place in there if place not in broken]
            # A gradient may be too large on one rank alone: what is kept is the same on all of them.
            for place in (place for place in broken if not all(side.finite(place) for side in self.sides)):
                for side in self.sides:
                    side.restart(place)
                self.restarts += 1
        if self._rescale:
            ratio = before / after
            x.mul_(torch.where(ratio.isfinite(), ratio, 1.0).to(x.dtype)[:, None, None])
        parts, grads = self._pairs(x, there)
        if grads:
            torch._foreach_copy_(grads, parts)

    def _pairs(self, array: Tensor, places: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Return parts of the batch, and the gradients they are of."""
        parts, grads = [], []
        for place in places:
            layer, views = self._layers[place], self._places[id(array)][place]
            for p, part in zip((layer.weight, layer.bias), views, strict=True):
                if p is not None and part is not None and p.grad is not None:
                    parts.append(part)
                    grads.append(p.grad)
        return parts, grads

    def _product(self) -> Tensor:
        """Return P_g G P_a of what is in one of the two arrays, in one of them."""
        x, spare = self._x, self._spare
        if isinstance(self.inputs, Mean) and isinstance(self.outputs, Mean):
            return Mean.both(self.outputs, self.inputs, x)
        if self.inputs is not None and (y := self.inputs.right(x, spare)) is not x:
            x, spare = y, x
        return x if self.outputs is None else self.outputs.left(x, spare)

    @staticmethod
    def _norms(x: Tensor) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(x, dim=(1, 2), dtype=torch.float64)
        return norms


def groups_of(layers: Sequence[Layer]) -> list[list[int]]:
    """Return the numbers of layers of each shape, in the order of the first ones. Local."""
    found: dict[tuple[int, int], list[int]] = {}
    for number, layer in enumerate(layers):
        found.setdefault((layer.p, layer.q), []).append(number)
    return [*found.values()]
