"""Which layers of a model are preconditioned, and what their inputs and outputs look like as rows."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from mpi_ef.errors import OptionError, briefly

__all__ = ["Layer", "LayerReport", "find_layers", "fits", "outputs_of", "rows_of", "sum_of_rows"]

_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LayerReport(NamedTuple):
    """What is done with a layer.

    Attributes
    ----------
    name : str
        As in the model.
    shape : tuple of int
        (p, q) of the matrix [W b]: outputs, and inputs with 1 for a bias that is trained.
    part : str
        "both", "inputs" or "outputs", which are preconditioned; or why none is.
    """

    name: str
    shape: tuple[int, ...]
    part: str


@dataclass(eq=False)
class Layer:
    """A weight, as a matrix (p, q), that is preconditioned, with its bias as one more column where that is trained.

    Attributes
    ----------
    name : str
    weight, bias : torch.nn.Parameter
        None for no bias.
    modules : list of torch.nn.Module
        That multiply by it; several where they share it.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    modules: list[nn.Module] = field(default_factory=list)

    @property
    def p(self) -> int:
        """Outputs."""
        return self.weight.shape[0]

    @property
    def q(self) -> int:
        """Inputs, with 1 for a bias."""
        return prod(self.weight.shape[1:]) + (self.bias is not None)


def find_layers(model: object, takes: Callable[[Tensor], str], exclude: Any) -> tuple[list[Layer], list[LayerReport]]:
    """Return the layers that can be preconditioned, and why others cannot, in the order of the model. Local.

    `takes` tells of a parameter why it is not to be preconditioned, "" if it is.

    Raises
    ------
    OptionError
        `model` is no module, none of its layers is left, or something in `exclude` is none of them.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"Preconditioner: model={briefly(model)} is no torch module; pass the model that is trained")
    named = {module: name for name, module in model.named_modules()}
    owners = _owners(named)
    excluded = _excluded(named, exclude)
    layers: dict[int, Layer] = {}
    rows, reasons = [], []
    for module, name in named.items():
        if not isinstance(module, _KINDS):
            continue
        why = "excluded" if module in excluded else _refused(module, named, owners, takes)
        if not why:
            weight = module._parameters["weight"]  # noqa: SLF001
            layer = layers.setdefault(id(weight), Layer(name, weight, None))  # type: ignore[arg-type]
            layer.modules.append(module)
            continue
        reasons.append(LayerReport(name, tuple(getattr(module.weight, "shape", ())), why))
    for layer in layers.values():
        layer.bias = _common_bias(layer, owners, takes)
        rows.append(LayerReport(layer.name, (layer.p, layer.q), ""))
    if not layers:
        listed = "; ".join(f"{row.name or 'the model'}: {row.part}" for row in reasons[:3]) or "it has none"
        raise OptionError(f"Preconditioner: no linear or convolutional layer of the model is left: {listed}; pass a model "
                          "with some that are trained")
    return list(layers.values()), rows + reasons


def _owners(named: dict[nn.Module, str]) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return the modules that have a parameter, and as what, by its id."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module, name in named.items():
        for of, p in module._parameters.items():  # noqa: SLF001
            if isinstance(p, UninitializedParameter):
                raise OptionError(f"Preconditioner: {name}.{of} has no shape yet; call the model once, on a batch, before")
            if p is not None:
                owners.setdefault(id(p), []).append((module, of))
    return owners


def _excluded(named: dict[nn.Module, str], exclude: Any) -> set[nn.Module]:
    """Return the layers that names with wildcards, or modules with all in them, stand for."""
    if isinstance(exclude, str | nn.Module):
        exclude = (exclude,)
    if not isinstance(exclude, Iterable):
        raise OptionError(f"Preconditioner: exclude={briefly(exclude)} is no sequence; pass names, such as "
                          "'blocks.*', or modules")
    layers = {module: name for module, name in named.items() if isinstance(module, _KINDS)}
    found: set[nn.Module] = set()
    for one in exclude:
        if isinstance(one, nn.Module):
            these = {module for module in one.modules() if module in layers}
        elif isinstance(one, str):
            these = {module for module, name in layers.items() if fnmatchcase(name, one)}
        else:
            raise OptionError(f"Preconditioner: exclude has {briefly(one)}; pass names, such as 'blocks.*', or modules")
        if not these:
            raise OptionError(f"Preconditioner: exclude has {briefly(one)}, which is no linear or convolutional layer of "
                              f"the model; there are {', '.join([*layers.values()][:4]) or 'none'}")
        found |= these
    return found


def _refused(module: Any, named: dict[nn.Module, str], owners: dict[int, list[tuple[nn.Module, str]]],
             takes: Callable[[Tensor], str]) -> str:
    """Return why a layer cannot be preconditioned, "" if it can."""
    weight = module._parameters.get("weight")  # noqa: SLF001
    if is_parametrized(module) or weight is None:
        return "parametrised: its weight is made of other parameters"
    if getattr(module, "groups", 1) > 1:
        return "grouped convolution"
    for owner, of in owners[id(weight)]:
        if of != "weight" or not isinstance(owner, _KINDS) or type(owner) is not type(module):
            return f"tied to {named[owner]}.{of}"
    return takes(weight)


def _common_bias(layer: Layer, owners: dict[int, list[tuple[nn.Module, str]]],
                 takes: Callable[[Tensor], str]) -> Tensor | None:
    """Return the bias of a layer, where all its modules have the same, nothing else has it, and it is trained."""
    found = {id(m._parameters.get("bias")): m._parameters.get("bias") for m in layer.modules}  # noqa: SLF001
    (bias, *others) = found.values()
    if others or bias is None or takes(bias):
        return None
    mine = set(layer.modules)
    return bias if all(owner in mine and of == "bias" for owner, of in owners[id(bias)]) else None


def fits(layer: Layer, module: nn.Module, x: Tensor, output: Tensor) -> bool:
    """Tell whether a call multiplied the entries of x, dense in memory, by the weight, as classes derived may not. Local."""
    if x.layout != torch.strided or output.layout != torch.strided or x.is_nested or output.is_nested:
        return False
    p, q = layer.weight.shape[:2]
    axis = -1 if isinstance(module, nn.Linear) else -1 - len(module.kernel_size)  # type: ignore[arg-type]
    if x.dim() != output.dim() or x.dim() < -axis or x.shape[axis] != q or output.shape[axis] != p:
        return False
    return axis != -1 or x.shape[:-1] == output.shape[:-1]


def rows_of(module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """Return the rows that a layer multiplies, (..., q) as a view where it can be, and how many there are. Local.

    Those of a convolution are patches, their entries ordered as in ``weight.view(p, -1)``.
    """
    if isinstance(module, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        return rows, rows.shape[0]
    patches = _patches(module, _batched(module, x))
    dims = len(module.kernel_size)  # type: ignore[arg-type]
    rows = patches.permute(0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims)).reshape(
        -1, patches.shape[1] * prod(patches.shape[2 + dims:]))
    return rows, rows.shape[0]


def sum_of_rows(module: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Return the sum of the rows that a layer multiplies, (q,) of the dtype, and how many there are. Local."""
    if isinstance(module, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        return rows.sum(0, dtype=dtype), rows.shape[0]
    x = _batched(module, x)
    patches = _patches(module, x.sum(0, keepdim=True, dtype=dtype))  # padding and shifting is linear: no patch is made
    dims = len(module.kernel_size)  # type: ignore[arg-type]
    return patches.sum((0, *range(2, 2 + dims))).reshape(-1), x.shape[0] * prod(patches.shape[2 : 2 + dims])


def outputs_of(module: nn.Module, gradient: Tensor) -> Tensor:
    """Return the gradient of a layer's outputs as rows, (S, p). Local."""
    if isinstance(module, nn.Linear):
        return gradient.reshape(-1, gradient.shape[-1])
    gradient = _batched(module, gradient)
    return gradient.movedim(1, -1).reshape(-1, gradient.shape[1])


def _batched(module: nn.Module, x: Tensor) -> Tensor:
    return x.unsqueeze(0) if x.dim() == len(module.kernel_size) + 1 else x  # type: ignore[arg-type]


def _patches(module: Any, x: Tensor) -> Tensor:
    """Return (batch, channels, positions ..., kernel ...) of (batch, channels, ...), a view of it, padded."""
    if any(module._reversed_padding_repeated_twice):  # noqa: SLF001
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)  # noqa: SLF001
    for axis, (size, stride, dilation) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        x = x.unfold(2 + axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    return x
