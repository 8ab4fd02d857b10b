"""Training data and how ranks share them: every sample on exactly one rank."""

import os
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpi_ef import registry
from mpi_ef.collectives import chunk_bounds
from mpi_ef.documents import opened
from mpi_ef.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mpi_ef.jobs.train.config import TrainConfig

__all__ = ["Dataset", "Digits", "Loss", "Tensors", "Text", "batches", "own_problem", "shard"]

Indices = NDArray[np.int64]
Loss = Callable[[Tensor, Tensor], Tensor]  # of what a model returns and targets, the mean over them


@runtime_checkable
class Dataset(Protocol):
    """Samples 0 ... size-1 for training, 0 ... held_out_size-1 for validation; the same on all ranks."""

    size: int
    held_out_size: int
    content: str  # what is in it, wherever it lies: how much, and a hash

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Labels of the training samples, where they have one each."""
        ...

    def batch(self, indices: Indices, epoch: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of training samples."""
        ...

    def held_out(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of validation samples."""
        ...


def shard(size: int, ranks: int, rank: int, *, order: Indices | None = None) -> Indices:
    """Return the samples of one rank: every one of `size` samples on exactly one rank, numbers equal up to one.

    They are dealt out contiguously, in `order`, (size,) int64, if that is given. Raises `DataError` for fewer samples than
    ranks.
    """
    if size < ranks:
        raise DataError(f"data: {size} samples for {ranks} ranks; use more data or fewer ranks")
    bounds = chunk_bounds(size, ranks)
    return (np.arange(size) if order is None else order)[bounds[rank] : bounds[rank + 1]]


def batches(samples: Indices, size: int, *, seed: int, rank: int) -> Iterator[tuple[int, Indices]]:
    """Yield (epoch, samples of a batch) without end; each epoch has another order and takes every sample once."""
    for epoch in count():
        order = np.random.default_rng((seed, epoch, rank)).permutation(samples)
        for start in range(0, order.size, size):
            yield epoch, order[start : start + size]


class Text:
    """Characters of a text, cut into blocks of `context` characters; the targets are the next characters.

    Blocks do not overlap; each epoch shifts all of them by another offset, drawn from `seed`. The last tenth of the text is
    held out. `path` is a UTF-8 file; None takes ``pydoc_data.topics``, the help texts that come with Python. Raises
    `DataError` where it cannot be read, is empty or too short.
    """

    labels = None

    def __init__(self, path: Path | None, *, context: int, seed: int) -> None:
        text = _read(path)
        characters = sorted(set(text))
        number = {character: i for i, character in enumerate(characters)}
        tokens = np.array([number[character] for character in text], np.int64)
        self.content = f"{len(text)} characters, sha256 {sha256(text.encode()).hexdigest()[:32]}"
        cut = tokens.size * 9 // 10
        self.vocabulary, self.context, self._seed = len(characters), context, seed
        self._train, self._held_out = torch.from_numpy(tokens[:cut]), torch.from_numpy(tokens[cut:])
        self.size = (cut - context) // context
        self.held_out_size = (tokens.size - cut - 1) // context
        if self.size < 1 or self.held_out_size < 1:
            raise DataError(f"{path}: {len(text)} characters are too few for blocks of {context}; use a longer text or a "
                            "smaller --context")

    def batch(self, indices: Indices, epoch: int) -> tuple[Tensor, Tensor]:
        """Return (b, context) characters and the characters that follow them, int64."""
        offset = int(np.random.default_rng((self._seed, epoch)).integers(self.context))
        return self._blocks(self._train, indices * self.context + offset)

    def held_out(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Return the same of the held-out text."""
        return self._blocks(self._held_out, indices * self.context)

    def _blocks(self, tokens: Tensor, starts: Indices) -> tuple[Tensor, Tensor]:
        at = torch.from_numpy(starts)[:, None] + torch.arange(self.context)
        return tokens[at], tokens[at + 1]


def _read(path: Path | None) -> str:
    if path is None:
        from pydoc_data.topics import topics

        return "\n".join(topics.values())
    try:
        with opened(path, follow=True) as descriptor, os.fdopen(descriptor, encoding="utf-8", closefd=False) as file:
            text = file.read()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}; name a text file") from None
    if not text:
        raise DataError(f"{path}: the file is empty; name a text file")
    return text


class Tensors:
    """Inputs and targets in memory, a row for every sample.

    Parameters
    ----------
    train, held_out : (tensor, tensor)
        Inputs, (samples, ...), and targets, (samples, ...). Targets of one whole number each are labels: accuracies are
        measured as well.
    name : str
        What the samples are, for messages.
    """

    def __init__(self, train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], name: str = "samples") -> None:
        self._train, self._held_out = train, held_out
        self.size, self.held_out_size = len(train[1]), len(held_out[1])
        if not self.size or not self.held_out_size or any(len(x) != len(y) for x, y in (train, held_out)):
            raise DataError(f"{name}: {len(train[0])} inputs with {self.size} targets, and {len(held_out[0])} with "
                            f"{self.held_out_size} held out; give a target for every input, and some of both")
        hashed = sha256()
        for tensor in (*train, *held_out):
            hashed.update(str((tensor.dtype, tuple(tensor.shape))).encode() + tensor.contiguous().numpy().tobytes())
        self.content = f"{self.size + self.held_out_size} {name}, sha256 {hashed.hexdigest()[:32]}"
        labelled = train[1].dim() == 1 and not train[1].is_floating_point()
        self.labels: NDArray[np.int64] | None = train[1].numpy() if labelled else None

    def batch(self, indices: Indices, epoch: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return inputs and targets of training samples, (b, ...) each."""
        return self._train[0][indices], self._train[1][indices]

    def held_out(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Return the same of held-out samples."""
        return self._held_out[0][indices], self._held_out[1][indices]


def own_problem(config: "TrainConfig") -> tuple[Dataset, nn.Module] | tuple[Dataset, nn.Module, Loss]:
    """Return what the user's function makes, of which ``--model module:function(options)`` is the specification. Local.

    ``function(config, **options)`` returns ``(model, data)`` or ``(model, data, loss)``: a module, a :class:`Dataset`,
    for example :class:`Tensors`, and ``loss(model(inputs), targets)``, the mean over targets; cross entropy by default.

    Raises
    ------
    ConfigError
        It returns something else.
    """
    made: Any = registry.built("model", config.model, config)
    parts = made if isinstance(made, tuple) else ()
    if len(parts) not in (2, 3) or not isinstance(parts[0], nn.Module) or not isinstance(parts[1], Dataset) \
            or not all(callable(loss) for loss in parts[2:]):
        returned = ", ".join(type(part).__name__ for part in parts) or type(made).__name__
        raise ConfigError(f"model={config.model} returns {returned}; return (module, data) or (module, data, loss), where "
                          "data is for example mpi_ef.jobs.train.datasets.Tensors")
    model, data, *loss = parts
    return (data, model, *loss)


class Digits(Tensors):
    """Scikit-learn's 1797 handwritten digits, 8 x 8 pixels in [0, 1]; a fifth, the same for every seed, is held out."""

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise DataError("digits: scikit-learn is not installed; pip install scikit-learn") from None
        pixels, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(labels.size)
        cut = labels.size * 4 // 5
        x = torch.from_numpy((pixels[order] / 16.0).astype(np.float32).reshape(-1, 1, 8, 8))
        y = torch.from_numpy(labels[order].astype(np.int64))
        super().__init__((x[:cut], y[:cut]), (x[cut:], y[cut:]), "digits")
        content = sha256(pixels.tobytes() + labels.astype(np.int64).tobytes()).hexdigest()
        self.content = f"{labels.size} digits, sha256 {content[:32]}"  # as checkpoints have it
