"""The step that all ranks take together, along the mean of what each has come to by itself."""

from mpi_ef.compress.combination import Vector
from mpi_ef.kernels.backend import backend_of

__all__ = ["OuterStep"]


class OuterStep:
    """SGD on x, (d,), the same bits on all ranks, with Nesterov's momentum where there is one. Local.

    ::

        x = x - lr mean                                     (momentum = 0)
        M = momentum M + mean,  x = x - lr (mean + momentum M)

    Attributes
    ----------
    arrays : list of (d,) array
        M, where there is a momentum.
    """

    def __init__(self, x: Vector, lr: float, momentum: float) -> None:
        self._kernels, self._x, self._lr, self._momentum = backend_of(x), x, lr, momentum
        self.arrays: list[Vector] = [self._kernels.zeros(x.size)] if momentum else []

    def take(self, part: slice, mean: Vector) -> None:
        """Take the step of a part of x."""
        x, add = self._x[part], self._kernels.add_dense
        for whole in self.arrays:
            memory = whole[part]
            memory *= memory.dtype.type(self._momentum)
            add(mean, 1.0, memory)
            add(memory, -self._lr * self._momentum, x)
        if self._lr == 1.0:
            self._kernels.subtract(mean, x)
        else:
            add(mean, -self._lr, x)
