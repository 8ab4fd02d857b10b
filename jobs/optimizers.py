"""The optimizers that ``mpi-ef train`` knows, built from its options."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from mpi_ef import optim
from mpi_ef.collectives.plan import Comm
from mpi_ef.compress import Compressor, Identity, LowRank, Quantize, RandK, Sign, TopK, Vote
from mpi_ef.jobs.train import TrainConfig
from mpi_ef.optim.flat import FlatOptimizer

if TYPE_CHECKING:
    from torch import nn

__all__ = ["build_compressor", "build_optimizer"]

Groups = list[dict[str, Any]]


def build_optimizer(config: TrainConfig, model: "nn.Module", comm: Comm) -> FlatOptimizer:
    """Return the optimizer that the options describe. Collective."""
    if config.optimizer in _WRAPPED:
        return _wrapped(config, model, comm)
    return _OWN[config.optimizer](config, _decayed(config, model), comm)


def build_compressor(config: TrainConfig) -> Compressor:
    """Return the compressor that the options describe."""
    values: Compressor = Identity() if config.values == "full" else Quantize(config.values)
    segments = "parameters" if config.per_parameter else None
    made: Mapping[str, Callable[[], Compressor]] = {
        "topk": lambda: TopK(config.ratio, values=values, segments=segments),  # type: ignore[arg-type]
        "randk": lambda: RandK(config.ratio, values=values, seed=config.seed),
        "sign": lambda: Sign(block=config.block),
        "vote": Vote,
        "low-rank": lambda: LowRank(config.rank, shapes="parameters", seed=config.seed),
        "quantize": lambda: values,
        "identity": Identity,
    }
    return made[config.compressor or _MADE_FOR.get(config.optimizer, "topk")]()


# What optimizers are made for, where it is not TopK.
_MADE_FOR = {"onebit-adam": "sign", "zero-one-adam": "sign", "onebit-lamb": "sign", "lion": "vote", "signum": "vote",
             "powersgd": "low-rank"}  # fmt: skip
_WRAPPED = ("adamw", "sgd", "powersgd")


def _decayed(config: TrainConfig, model: "nn.Module") -> Groups:
    """Return two groups: matrices, and vectors, which do not decay."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _betas(config: TrainConfig, beta1: float) -> tuple[float, float]:
    return beta1 if config.beta1 is None else config.beta1, config.beta2


def _wrapped(config: TrainConfig, model: "nn.Module", comm: Comm) -> FlatOptimizer:
    options: dict[str, Any] = {} if config.eta is None else {"eta": config.eta}
    placement = config.placement
    if config.optimizer == "powersgd":
        placement = "gradient"
    if config.optimizer == "adamw":
        # Sparse feedback delays updates, and delay acts like momentum; dense updates want the usual one.
        beta1 = 0.9 if config.compressor == "identity" else 0.5
        inner: torch.optim.Optimizer = torch.optim.AdamW(
            _decayed(config, model), lr=config.lr, betas=_betas(config, beta1)
        )
    else:
        inner = torch.optim.SGD(
            model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    return optim.DistributedOptimizer(inner, comm, build_compressor(config), placement=placement, rule=config.rule,
                                      dense_steps=config.dense_steps, overlap=config.overlap, **options)  # fmt: skip


def _onebit_adam(config: TrainConfig, groups: Groups, comm: Comm) -> FlatOptimizer:
    return optim.OneBitAdam(groups, comm, lr=config.lr, betas=_betas(config, 0.9), compressor=build_compressor(config),
                            freeze_step=config.freeze or None, clip=config.clip)  # fmt: skip


def _zero_one_adam(config: TrainConfig, groups: Groups, comm: Comm) -> FlatOptimizer:
    return optim.ZeroOneAdam(groups, comm, lr=config.lr, betas=_betas(config, 0.9), compressor=build_compressor(config),
                             var_freeze_step=config.freeze or None, local_step_scaler=config.local_steps,
                             clip=config.clip)  # fmt: skip


def _onebit_lamb(config: TrainConfig, groups: Groups, comm: Comm) -> FlatOptimizer:
    return optim.OneBitLamb(groups, comm, lr=config.lr, betas=_betas(config, 0.9), compressor=build_compressor(config),
                            freeze_step=config.freeze or None, clip=config.clip)  # fmt: skip


def _lion(config: TrainConfig, groups: Groups, comm: Comm) -> FlatOptimizer:
    return optim.Lion(groups, comm, lr=config.lr, betas=_betas(config, 0.9), compressor=build_compressor(config),
                      clip=config.clip)  # fmt: skip


def _signum(config: TrainConfig, groups: Groups, comm: Comm) -> FlatOptimizer:
    return optim.Signum(groups, comm, lr=config.lr, momentum=config.momentum, compressor=build_compressor(config),
                        clip=config.clip)  # fmt: skip


def _ef21_muon(config: TrainConfig, groups: Groups, comm: Comm) -> FlatOptimizer:
    return optim.EF21Muon(groups, comm, build_compressor(config), lr=config.lr, beta=1.0 - config.momentum,
                          dense_steps=config.dense_steps, overlap=config.overlap)  # fmt: skip


_OWN: Mapping[str, Callable[[TrainConfig, Groups, Comm], FlatOptimizer]] = {
    "onebit-adam": _onebit_adam,
    "zero-one-adam": _zero_one_adam,
    "onebit-lamb": _onebit_lamb,
    "lion": _lion,
    "signum": _signum,
    "ef21-muon": _ef21_muon,
}
