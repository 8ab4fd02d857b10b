"""The inverses that gradients are multiplied by, of one side of layers of equal shape, and how they are learned.

All work on batches: the first axis counts the layers. Formulas are of one layer; M, P are symmetric (d, d) matrices that
stand for the inverse of a side's second moment, v is the mean vector of an update, V the matrix of a second moment.
"""

# ruff: noqa: D102 (the methods of all are described by those of Side)

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["FORMS", "IN_PLACE", "Blended", "Covariance", "Form", "Mean", "ShermanMorrison", "Side", "Window"]


class Side(ABC):
    """One side, inputs or outputs, of `layers` layers with d entries there. Local.

    Parameters
    ----------
    layers, d : int
    options : object
        With ``gamma``, ``window``, ``damping``, ``stabilizer``.
    memory : (layers * floats,) tensor
        Of zeros: what is saved, of the dtype and on the device of the gradients.
    norms : (layers * scalars,) float64 array
        Of zeros: what is saved besides.

    Attributes
    ----------
    updates : list of int
        Of each layer.
    """

    def __init__(self, layers: int, d: int, options: Any, memory: Tensor, norms: "np.ndarray[Any, Any]") -> None:
        self.d, self.options, self.updates = d, options, [0] * layers
        self._memory, self._norms = memory, norms
        self.bind()
        self.loaded()

    @staticmethod
    @abstractmethod
    def floats(d: int, window: int) -> int:
        """Return how many numbers are kept of a layer."""

    @staticmethod
    def scalars(window: int) -> int:  # noqa: ARG004
        """Return how many numbers of float64 are kept besides."""
        return 0

    @abstractmethod
    def bind(self) -> None:
        """Lay out `memory` and `norms`."""

    @abstractmethod
    def update(self, which: Sequence[int], seen: Tensor) -> None:
        """Learn from what the layers `which` have seen, (len(which), d), or matrices (len(which), d, d)."""

    def right(self, x: Tensor, spare: Tensor) -> Tensor:
        """Return x P of x, (layers, p, d), in one of two arrays of that shape."""
        raise NotImplementedError

    def left(self, x: Tensor, spare: Tensor) -> Tensor:
        """Return P x of x, (layers, d, q), in one of two arrays of that shape."""
        raise NotImplementedError

    def loaded(self) -> None:  # noqa: B027
        """Derive again what follows from memory that was written."""

    def finite(self, layer: int) -> bool:
        """Tell whether what is kept of a layer is, alike on all ranks."""
        return bool(self._memory.view(len(self.updates), -1)[layer].isfinite().all())

    def restart(self, layer: int) -> None:
        """Let a layer begin with the identity."""
        self.updates[layer] = 0
        self._memory.view(len(self.updates), -1)[layer] = 0
        if self._norms.size:
            self._norms.reshape(len(self.updates), -1)[layer] = 0
        self.loaded()


class Window(Side):
    """The last m vectors, and damping relative to them: P is known exactly, and never formed.

    With weights ``w_k = gamma^k / sum gamma^j`` of the newest, k = 0, and older ones, rows ``u_k = sqrt(w_k) v_k``,
    ``s = sum |u_k|^2``::

        P = I - U^T (mu s I + U U^T)^-1 U  =  mu s (mu s I + sum_k w_k v_k v_k^T)^-1

    Eigenvalues of P are in [mu / (1 + mu), 1], and P does not change with the scale of all v. Without any, or s = 0, P = I.
    Vectors are kept with norm 1, and their norms apart, so that no scale is too large or too small.
    Cost of an update: m d multiplications and a Cholesky decomposition (m, m) in float64; of a product 2 m entries each.
    """

    @staticmethod
    def floats(d: int, window: int) -> int:
        return d * window

    @staticmethod
    def scalars(window: int) -> int:
        return window

    def bind(self) -> None:
        m, layers = self.options.window, len(self.updates)
        self._rows, self._lengths = self._memory.view(layers, m, self.d), self._norms.reshape(layers, m)
        self._core = self._memory.new_zeros(layers, m, m)

    def update(self, which: Sequence[int], seen: Tensor) -> None:
        m = self.options.window
        places = [self.updates[layer] % m for layer in which]
        largest = seen.abs().amax(1, keepdim=True).double()  # squares of numbers of any size are numbers
        scaled = seen.double() / torch.where(largest > 0, largest, 1.0)
        norms = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
        self._rows[list(which), places] = (scaled / torch.where(norms > 0, norms, 1.0)).to(seen.dtype)
        self._lengths[list(which), places] = (norms * largest)[:, 0].clamp(max=1e300).tolist()
        for layer in which:
            self.updates[layer] += 1
        self.loaded()

    def loaded(self) -> None:
        m, mu = self.options.window, self.options.damping
        newest = np.array(self.updates)[:, None] - 1
        age = (newest - np.arange(m)) % m
        weights = np.where(age <= newest, self.options.gamma ** age.astype(float), 0.0)
        weights /= np.maximum(weights.sum(1, keepdims=True), np.finfo(float).tiny)
        lengths = self._lengths / np.maximum(self._lengths.max(1, keepdims=True), np.finfo(float).tiny)
        u = np.sqrt(weights) * lengths
        u /= np.maximum(np.sqrt((u**2).sum(1, keepdims=True)), np.finfo(float).tiny)
        rows = self._rows.double()
        factors = torch.from_numpy(u).to(rows.device)
        gram = (rows @ rows.mT) * factors[:, :, None] * factors[:, None, :]
        gram.diagonal(dim1=1, dim2=2).add_(mu)
        half = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), torch.diag_embed(factors), upper=False)
        self._core.copy_(half.mT @ half)

    def right(self, x: Tensor, spare: Tensor) -> Tensor:  # noqa: ARG002
        return x.baddbmm_(x @ self._rows.mT @ self._core, self._rows, alpha=-1)

    def left(self, x: Tensor, spare: Tensor) -> Tensor:  # noqa: ARG002
        return x.baddbmm_(self._rows.mT, self._core @ (self._rows @ x), alpha=-1)


class _Matrix(Side):
    """A matrix M that is kept, in the place of P.

    Vectors longer than 0.1 / sqrt(machine epsilon), 290 in float32, are taken as of that length: what M would be along them
    is less than the rounding of its other entries, and might come out as zero, or negative.
    """

    @staticmethod
    def floats(d: int, window: int) -> int:  # noqa: ARG004
        return d * d

    def bind(self) -> None:
        self._m = self._memory.view(len(self.updates), self.d, self.d)

    def loaded(self) -> None:
        for layer, updates in enumerate(self.updates):
            if not updates:
                self._m[layer].zero_().fill_diagonal_(1)

    def update(self, which: Sequence[int], seen: Tensor) -> None:
        whole = len(which) == len(self.updates)
        m = self._m if whole else self._m[list(which)]
        norms = torch.linalg.vector_norm(seen, dim=1, keepdim=True, dtype=torch.float64)
        most = 0.1 / torch.finfo(seen.dtype).eps**0.5
        self._learn(m, seen * (most / norms.clamp(min=most)).to(seen.dtype))
        if not whole:
            self._m[list(which)] = m
        for layer in which:
            self.updates[layer] += 1

    @abstractmethod
    def _learn(self, m: Tensor, v: Tensor) -> None:
        """Update matrices in place."""

    def right(self, x: Tensor, spare: Tensor) -> Tensor:
        return torch.bmm(x, self._m, out=spare)

    def left(self, x: Tensor, spare: Tensor) -> Tensor:
        return torch.bmm(self._m, x, out=spare)


class ShermanMorrison(_Matrix):
    """The inverse of ``gamma L + (1 - gamma) v v^T``, from that of L: what MKOR (Mozaffari et al. 2023) means.

    ::

        M' = M / gamma - (1 - gamma) / (gamma (gamma + (1 - gamma) v^T M v)) (M v)(M v)^T

    What is not seen grows by 1 / gamma in every update. So where the largest entry of M is above eps, before the update
    ``M <- zeta M + (1 - zeta) I``, with (eps, zeta) the stabilizer.
    The printed formula (Algorithm 1, lines 7 and 8) has a plus, and gamma in the place of 1 / gamma: it does the opposite.
    """

    def _learn(self, m: Tensor, v: Tensor) -> None:
        gamma, (eps, zeta) = self.options.gamma, self.options.stabilizer
        zeta = torch.where(m.abs().amax((1, 2)) > eps, zeta, 1.0).to(m.dtype)
        m.mul_(zeta[:, None, None]).diagonal(dim1=1, dim2=2).add_((1 - zeta)[:, None])
        mv = (m @ v[:, :, None])[:, :, 0]
        factor = (1 - gamma) / (gamma * (gamma + (1 - gamma) * (v * mv).sum(1, keepdim=True)))
        mv.mul_(factor.clamp_(min=0).sqrt_())  # u u^T is symmetric to the last bit
        m.div_(gamma).addcmul_(mv[:, :, None], mv[:, None, :], value=-1)


class Blended(_Matrix):
    """What the package of MKOR's authors computes, the exact inverse of ``P^-1 + v v^T``, which cannot explode.

    ::

        P = gamma M + (1 - gamma) I,    M' = P - (P v)(P v)^T / (1 + v^T P v)
    """

    def _learn(self, m: Tensor, v: Tensor) -> None:
        gamma = self.options.gamma
        m.mul_(gamma).diagonal(dim1=1, dim2=2).add_(1 - gamma)
        mv = (m @ v[:, :, None])[:, :, 0]
        mv.div_((1 + (v * mv).sum(1, keepdim=True)).sqrt_())
        m.addcmul_(mv[:, :, None], mv[:, None, :], value=-1)


class Mean(Side):
    """Eva (Zhang, Shi, Li 2023): the running mean of the vectors, ``v = gamma v + (1 - gamma) new``, first the first one.

    Both sides are one inverse there, see :func:`eva`; with one side alone it is ``(v v^T + damping I)^-1 damping``.
    """

    @staticmethod
    def floats(d: int, window: int) -> int:  # noqa: ARG004
        return d

    def bind(self) -> None:
        self.v = self._memory.view(len(self.updates), self.d)

    def update(self, which: Sequence[int], seen: Tensor) -> None:
        first = torch.tensor([self.updates[layer] == 0 for layer in which], device=seen.device)[:, None]
        self.v[list(which)] = torch.where(first, seen, torch.lerp(seen, self.v[list(which)], self.options.gamma))
        for layer in which:
            self.updates[layer] += 1

    def unit(self) -> tuple[Tensor, Tensor]:
        """Return the directions of the means, and their squared lengths in float64, which may be of any size."""
        v = self.v.double()
        lengths = torch.linalg.vector_norm(v, dim=1, keepdim=True)
        return (v / torch.where(lengths > 0, lengths, 1.0)).to(self.v.dtype), (lengths**2)[:, 0]

    def share(self, squares: Tensor) -> Tensor:
        """Return what is taken away of the part along a direction: never all of it, nor more by rounding."""
        share: Tensor = squares / (self.options.damping + squares)
        share = share.clamp(max=1 - 100 * torch.finfo(self.v.dtype).eps).to(self.v.dtype)
        return share[:, None, None]

    def right(self, x: Tensor, spare: Tensor) -> Tensor:  # noqa: ARG002
        v, squares = self.unit()
        return x.baddbmm_(x @ v[:, :, None] * self.share(squares), v[:, None, :], alpha=-1)

    def left(self, x: Tensor, spare: Tensor) -> Tensor:  # noqa: ARG002
        v, squares = self.unit()
        return x.baddbmm_(v[:, :, None], v[:, None, :] @ x * self.share(squares), alpha=-1)

    @staticmethod
    def both(outputs: "Mean", inputs: "Mean", x: Tensor) -> Tensor:
        """Return ``x - (g^T x a) / (damping + |a|^2 |g|^2) g a^T``: damping times (g g^T (x) a a^T + damping I)^-1 x."""
        (g, of_g), (a, of_a) = outputs.unit(), inputs.unit()
        along = g[:, None, :] @ x @ a[:, :, None] * inputs.share(of_g * of_a)
        return x.baddbmm_(g[:, :, None] * along, a[:, None, :], alpha=-1)


class Covariance(Side):
    """K-FAC (Martens and Grosse 2015; KAISA, Pauloski et al. 2021): running means of second moments, exchanged as matrices.

    ``C = gamma C + (1 - gamma) V``, first the first one, and ``P = lambda (lambda I + C)^-1``, lambda = mu trace(C): the
    damping of :class:`Window`. An inversion in each update.
    """

    @staticmethod
    def floats(d: int, window: int) -> int:  # noqa: ARG004
        return d * d

    def bind(self) -> None:
        self._c = self._memory.view(len(self.updates), self.d, self.d)
        self._p = torch.empty_like(self._c)

    def update(self, which: Sequence[int], seen: Tensor) -> None:
        first = torch.tensor([self.updates[layer] == 0 for layer in which], device=seen.device)[:, None, None]
        self._c[list(which)] = torch.where(first, seen, torch.lerp(seen, self._c[list(which)], self.options.gamma))
        for layer in which:
            self.updates[layer] += 1
        self.loaded()

    def loaded(self) -> None:
        damping = self.options.damping * self._c.diagonal(dim1=1, dim2=2).sum(1).double()
        known = damping > 0
        scaled = self._c.double() / torch.where(known, damping, 1.0)[:, None, None]
        scaled.diagonal(dim1=1, dim2=2).add_(1)
        self._p.copy_(torch.cholesky_inverse(torch.linalg.cholesky(scaled)))

    def right(self, x: Tensor, spare: Tensor) -> Tensor:
        return torch.bmm(x, self._p, out=spare)

    def left(self, x: Tensor, spare: Tensor) -> Tensor:
        return torch.bmm(self._p, x, out=spare)


Form = type[Side]
FORMS: dict[str, Form] = {"window": Window, "exact": ShermanMorrison, "blended": Blended, "eva": Mean, "kfac": Covariance}
IN_PLACE = (Window, Mean)  # whose products need no other array
