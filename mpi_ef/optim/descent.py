"""SGD along the gradient estimates of the papers: EF21, EControl, PowerSGD."""

from collections.abc import Iterable
from typing import Any

from torch.optim import SGD

from mpi_ef.collectives import PlanBuilder, plan_for
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor, LowRank

from .groups import parameters_of
from .wrapper import DistributedOptimizer

__all__ = ["EF21", "EControl", "PowerSGD"]


class EF21(DistributedOptimizer):
    """EF21 (arXiv 2106.05203): SGD along an estimate of the gradient that compression cannot bias away.

    ``x = x - lr * g``, where g follows :func:`mpi_ef.feedback.ef21`. Made for large or full batches.

    Parameters
    ----------
    params : iterable of parameters or of groups, as for torch optimizers
    comm : MPI.Comm
    compressor : Compressor
    lr : float
        gamma. Theory: at most ``1 / (L + L_QM * sqrt(beta / theta))``; in practice larger by powers of two.
    momentum, weight_decay : float
        Of the SGD step that follows, on the aggregated estimate: equal on all ranks.
    dense_steps : int
        1 starts with g_i^0 = grad f_i(x^0), as the authors' code does; 0 with zero.
    plan, overlap
        See :class:`DistributedOptimizer`.
    """

    def __init__(self, params: Iterable[Any], comm: Comm, compressor: Compressor, *, lr: float, momentum: float = 0.0,
                 weight_decay: float = 0.0, dense_steps: int = 1, plan: PlanBuilder = plan_for,
                 overlap: bool = False) -> None:
        sgd = SGD(parameters_of(params), lr=lr, momentum=momentum, weight_decay=weight_decay)
        super().__init__(sgd, comm, compressor, placement="gradient", rule="ef21", plan=plan, dense_steps=dense_steps,
                         overlap=overlap, model=params)


class EControl(DistributedOptimizer):
    """EControl (arXiv 2311.05645): error feedback whose strength is controlled, for noisy and different gradients.

    ``x = x - lr * h``, where h follows :func:`mpi_ef.feedback.econtrol`.

    Parameters
    ----------
    params, comm, compressor, lr, momentum, weight_decay, dense_steps, plan, overlap : as :class:`EF21`'s
    eta : float, optional
        Strength of the feedback; 0.3 times the contraction constant by default. Grid worth trying: 0.05, 0.1, 0.3, 1
        times that constant.
    """

    def __init__(self, params: Iterable[Any], comm: Comm, compressor: Compressor, *, lr: float, eta: float | None = None,
                 momentum: float = 0.0, weight_decay: float = 0.0, dense_steps: int = 1, plan: PlanBuilder = plan_for,
                 overlap: bool = False) -> None:
        sgd = SGD(parameters_of(params), lr=lr, momentum=momentum, weight_decay=weight_decay)
        options: dict[str, Any] = {} if eta is None else {"eta": eta}
        super().__init__(sgd, comm, compressor, placement="gradient", rule="econtrol", plan=plan, dense_steps=dense_steps,
                         overlap=overlap, model=params, **options)


class PowerSGD(DistributedOptimizer):
    """PowerSGD (Vogels et al. 2019, arXiv 1905.13727): SGD with momentum on low-rank gradients with error feedback.

    Every parameter of two or more dimensions is a matrix, of whose gradient a projection on `rank` columns travels; one step
    of subspace iteration, which goes on where the last exchange ended. Vectors travel whole. See
    :class:`mpi_ef.collectives.LowRankMean`.

    Parameters
    ----------
    params, comm, lr, momentum, weight_decay : as :class:`EF21`'s
    rank : int
    nesterov : bool
        As of torch.optim.SGD.
    seed : int
        Of the columns before the first exchange.
    dense_steps : int
        So many first steps exchange everything.
    """

    def __init__(self, params: Iterable[Any], comm: Comm, *, lr: float, rank: int = 4, momentum: float = 0.9,
                 nesterov: bool = False, weight_decay: float = 0.0, seed: int = 0, dense_steps: int = 0) -> None:
        sgd = SGD(parameters_of(params), lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
        super().__init__(sgd, comm, LowRank(rank, shapes="parameters", seed=seed), placement="gradient", rule="ef14",
                         dense_steps=dense_steps, model=params)
