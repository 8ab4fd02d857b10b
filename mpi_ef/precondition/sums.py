"""What layers see in a step: sums over their inputs and the gradients of their outputs, taken by hooks."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .layers import Layer, outputs_of, rows_of, sum_of_rows

__all__ = ["Sides", "Sums", "width"]

Sides = Literal["both", "inputs", "outputs"]

_watched: "WeakKeyDictionary[nn.Module, RemovableHandle]" = WeakKeyDictionary()


def width(layers: Sequence[Layer], sides: Sides, *, squared: bool) -> int:
    """Return how many numbers a rank sends of the layers: what they saw, a word for each, and the loss."""
    power = 2 if squared else 1
    return 1 + sum((layer.q**power if sides != "outputs" else 0) + (layer.p**power if sides != "inputs" else 0) + 1
                   for layer in layers)


class _Hook:
    """Tells `Sums` of calls of one module, as long as both are there; copies of it, as of the model, do nothing."""

    def __init__(self, sums: "Sums | None" = None, module: nn.Module | None = None, number: int = 0) -> None:
        self._sums = ref(sums) if sums is not None else None
        self._module = ref(module) if module is not None else None
        self._number = number

    def __call__(self, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        sums = None if self._sums is None else self._sums()
        if sums is not None and self._module is not None and self._module() is module:
            sums.called(self._number, module, args[0] if args else keywords.get("input"), output)

    def __reduce__(self) -> tuple[type["_Hook"], tuple[()]]:
        """Become one that does nothing: the model can be copied and pickled."""
        return _Hook, ()


class Sums:
    """What layers have seen since the last step, of this rank, laid out as it is sent. Local.

    ::

        [ a_1, g_1, 1_1, a_2, g_2, 1_2, ..., loss ]     a_l = (1/S) sum_s x_s,  g_l = sum_s dL/dy_s

    over S rows: samples, and positions where inputs have more dimensions. With `squared` in place of vectors their second
    moments, ``(1/S) sum_s x_s x_s^T`` and ``S sum_s dL/dy_s (dL/dy_s)^T``. 1_l is 1 where this rank has seen the layer, else
    0, and with it a_l and g_l. What a call saw counts when the gradient of its output arrives.

    Parameters
    ----------
    layers : sequence of Layer
    sides : {"both", "inputs", "outputs"}
    squared : bool
    vector : (width,) tensor
        Of the layers' dtype and device: the memory.
    due : callable
        Tells whether the next step wants this; else calls cost nothing.
    """

    def __init__(self, layers: Sequence[Layer], sides: Sides, vector: Tensor, due: Callable[[], bool], *,
                 squared: bool) -> None:
        self.layers, self.sides, self.squared, self.vector, self._due = layers, sides, squared, vector, due
        self.seen: set[int] = set()  # layers, since the beginning
        self._rows, self._used = [0] * len(layers), False
        self._inputs: list[Tensor | None] = []
        self._outputs: list[Tensor | None] = []
        self._words: list[Tensor] = []
        start = 0

        def take(size: int, wanted: bool) -> Tensor | None:
            nonlocal start
            if not wanted:
                return None
            shape = (size, size) if squared else (size,)
            part = vector[start : start + size ** len(shape)].view(shape)
            start += part.numel()
            return part

        for layer in layers:
            self._inputs.append(take(layer.q, sides != "outputs"))
            self._outputs.append(take(layer.p, sides != "inputs"))
            self._words.append(vector[start])
            start += 1
        self._handles: list[RemovableHandle] = []
        self.watch()

    def watch(self) -> None:
        """Let calls of the modules count, in the place of other sums, if they do not."""
        if self._handles:
            return
        for number, layer in enumerate(self.layers):
            for module in layer.modules:
                if (earlier := _watched.pop(module, None)) is not None:
                    earlier.remove()
                hook = _Hook(self, module, number)
                handle = module.register_forward_hook(hook, with_kwargs=True)
                _watched[module] = handle
                self._handles.append(handle)

    def remove_hooks(self) -> None:
        """Let calls of the modules count for nothing from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def called(self, number: int, module: nn.Module, x: Any, output: Any) -> None:
        """Take note of a call, which counts as soon as its output has a gradient."""
        wanted = torch.is_grad_enabled() and isinstance(x, Tensor) and isinstance(output, Tensor) and output.requires_grad
        if not wanted or torch.compiler.is_compiling() or _in_transform() or not self._due():
            return
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            what = self._of_inputs(number, module, x.detach())
        output.register_hook(partial(self._arrived, number, module, what))

    def _of_inputs(self, number: int, module: nn.Module, x: Tensor) -> tuple[Tensor | None, int]:
        layer, dtype = self.layers[number], self.vector.dtype
        if self._inputs[number] is None or not self.squared:
            total, rows = sum_of_rows(module, x, dtype)
            return (None if self._inputs[number] is None else total), rows
        matrix, rows = rows_of(module, x)
        matrix = matrix.to(dtype)
        if layer.bias is not None:
            matrix = torch.cat([matrix, matrix.new_ones(rows, 1)], 1)
        return matrix.mT @ matrix, rows

    @torch.no_grad()
    def _arrived(self, number: int, module: nn.Module, what: tuple[Tensor | None, int], gradient: Tensor) -> None:
        total, rows = what
        inputs, outputs = self._inputs[number], self._outputs[number]
        if rows == 0 or not self._due():
            return
        self._rows[number] += rows
        self._used = True
        if inputs is not None and total is not None:
            (inputs if self.squared else inputs[: total.numel()]).add_(total)
        if outputs is not None:
            of = outputs_of(module, gradient.detach())
            if self.squared:
                with torch.autocast(gradient.device.type, enabled=False):
                    of = of.to(outputs.dtype)
                    outputs.addmm_(of.mT, of)
            else:
                outputs.add_(of.sum(0, dtype=outputs.dtype))

    def close(self, scale: float = 1.0) -> None:
        """Make the vector what is sent of this step. Gradients are `scale` times what they were in the backward pass."""
        self._used = True
        for number, layer in enumerate(self.layers):
            rows, inputs, outputs = self._rows[number], self._inputs[number], self._outputs[number]
            if rows == 0:
                continue
            self.seen.add(number)
            self._words[number].fill_(1)
            if inputs is not None:
                inputs.div_(rows)
                if layer.bias is not None and not self.squared:
                    inputs[-1] = 1
            if outputs is not None and self.squared:
                outputs.mul_(rows * scale**2)
            elif outputs is not None and scale != 1.0:
                outputs.mul_(scale)

    def forget(self) -> None:
        """Begin anew, as in the next step. What calls under way bring counts for that."""
        if self._used:
            self.vector.zero_()
            self._rows = [0] * len(self.layers)
            self._used = False

    def told(self, mean: Tensor) -> "list[tuple[Tensor | None, Tensor | None, float]]":
        """Return of every layer a, g and the share of ranks that have seen it, from the mean of the ranks' vectors."""
        parts, start = [], 0
        for inputs, outputs in zip(self._inputs, self._outputs, strict=True):
            found: list[Tensor | None] = []
            for side in (inputs, outputs):
                found.append(None if side is None else mean[start : start + side.numel()].view(side.shape))
                start += 0 if side is None else side.numel()
            parts.append((found[0], found[1], float(mean[start])))
            start += 1
        return parts


def _in_transform() -> bool:
    """Tell whether a function transform of torch is at work, whose tensors are not to be kept."""
    peek = getattr(torch._C._functorch, "peek_interpreter_stack", None)  # noqa: SLF001
    return peek is not None and peek() is not None
