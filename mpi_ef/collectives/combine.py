"""How the messages of all ranks become one vector, where that is not their mean."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpi_ef.compress import Codec
from mpi_ef.compress.combination import Vector
from mpi_ef.compress.compressor import Wires
from mpi_ef.errors import OptionError, briefly

__all__ = ["Combine"]


class Combine(ABC):
    """A function of the vectors of all ranks. Ranks must agree on it: give it a ``repr`` that says what it is.

    Plans that take one, ``combine=``, call it wherever they would take the mean: :class:`GatherMean` on all ranks, on whole
    vectors; :class:`TwoPhaseMean` on one rank for each chunk, so that it must go entry by entry there.
    """

    @classmethod
    def check(cls, subject: str, combine: object) -> None:
        """Raise `OptionError` unless an option of `subject` is None or an object that combines rows. Local."""
        if not isinstance(combine, Combine | None):
            raise OptionError(f"{subject}: combine={briefly(combine)} is no Combine; pass an object of such a class, or "
                              "None for "
                              "the mean")

    @abstractmethod
    def __call__(self, rows: NDArray[np.floating]) -> Vector:
        """Return one vector, (d,), for those of all ranks, (n, d), in rank order; the same bits on all ranks. Local."""

    def of_wires(self, codec: Codec, wires: Wires, kernels: Any) -> Vector:
        """Return it for encoded vectors, where `kernels` work; on the host it is computed. Local.

        Raises
        ------
        OptionError
            It is not (d,).
        """
        rows = kernels.zeros((len(wires), codec.d))
        for row, wire in zip(rows, wires, strict=True):
            codec.add(wire[None], row)
        vector = np.ascontiguousarray(self(kernels.fetch(rows)), codec.dtype)
        if vector.shape != (codec.d,):
            raise OptionError(f"{briefly(self)} returned {vector.shape} for vectors of length {codec.d}; return one "
                              "number an "
                              "entry")
        placed: Vector = kernels.place(vector)
        return placed
