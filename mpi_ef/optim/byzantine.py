"""SGD along an estimate of the gradient that up to f wrong ranks do not decide."""

from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch.optim import SGD

from mpi_ef.collectives import RobustMean
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor
from mpi_ef.errors import OptionError, briefly
from mpi_ef.feedback.byzantine import ByzEF21State
from mpi_ef.robust import Aggregator

from .groups import parameters_of
from .wrapper import DistributedOptimizer

__all__ = ["ByzEF21"]


class ByzEF21(DistributedOptimizer):
    """Byz-EF21 (arXiv 2310.09804): SGD along a robust aggregate of gradient estimates, of which up to f may be wrong.

    ``x = x - lr * g``, where g follows :func:`mpi_ef.feedback.byz_ef21`; with `eta` its momentum, Byz-EF21-SGDM, with
    `reply` the compressed way back, Byz-EF21-BC. A rank whose gradient has a NaN or Inf counts as one of the f, and the
    others go on; where there are more than f, all ranks skip the step together.

    Parameters
    ----------
    params, comm, compressor, lr, momentum, weight_decay, dense_steps, overlap : as :class:`EF21`'s
    f : int
        How many ranks may be wrong. There is no default.
    aggregator : Aggregator or str, optional
        ``NNM(TrimmedMean())`` by default, see :mod:`mpi_ef.robust`; also as a text.
    eta : float
        Weight of the new gradient in the momentum of each rank, which makes honest ranks differ by less; 1 has none, 0.1
        is usual for small batches.
    reply : Compressor, optional
        Of the way back; not together with `eta` below 1.
    shards : bool
        Every rank keeps its share of the columns of what all ranks have sent, see :class:`mpi_ef.collectives.RobustMean`.

    Attributes
    ----------
    suspicion : (ranks,) float
        How much each rank has been left out, the mean over the steps, from 0 to 1; 1 is always.
    """

    def __init__(self, params: Iterable[Any], comm: Comm, compressor: Compressor, *, lr: float, f: int,
                 aggregator: Aggregator | str | None = None, eta: float = 1.0, reply: Compressor | None = None,
                 momentum: float = 0.0, weight_decay: float = 0.0, dense_steps: int = 1, shards: bool = False,
                 overlap: bool = False) -> None:
        sgd = SGD(parameters_of(params), lr=lr, momentum=momentum, weight_decay=weight_decay)
        if reply is not None and eta != 1.0:
            raise OptionError(f"ByzEF21: reply={briefly(reply)} with eta={briefly(eta)}: there is no momentum with a "
                              "compressed way back; leave one of them out")
        options: dict[str, Any] = {} if eta == 1.0 else {"eta": eta}
        options |= {} if reply is None else {"reply": reply}
        rule = "byz-ef21-bc" if reply is not None else "byz-ef21-sgdm" if options else "byz-ef21"
        super().__init__(sgd, comm, compressor, placement="gradient", rule=rule, dense_steps=dense_steps, overlap=overlap,
                         plan=partial(RobustMean, aggregator=aggregator, f=f, shards=shards), model=params, **options)

    @property
    def suspicion(self) -> NDArray[np.floating]:
        """How much each rank has been left out so far, (ranks,), from 0 to 1; of several buckets the mean."""
        states = [cast("ByzEF21State", bucket.feedback.state) for bucket in self.buckets]
        parts = [state.suspicion for state in states]
        total = parts[0].copy()
        for part in parts[1:]:
            total += part
        return total / len(parts)
