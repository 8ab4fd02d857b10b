"""The optimizers that ``mpi-ef train`` knows, built from its options; what they take is in choices.py."""

from collections.abc import Callable, Mapping
from inspect import isclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mpi_ef import optim, registry
from mpi_ef.collectives import ClientsMean, Plan, TwoPhaseMean, build_plan, plan_for
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor, Identity, LowRank, Quantize, RandK, Sign, TopK, Vote, for_parameters
from mpi_ef.errors import ConfigError
from mpi_ef.jobs.train.choices import OPTIMIZERS
from mpi_ef.jobs.train.config import TrainConfig
from mpi_ef.jobs.train.settings import CLIENTS, optimizer_in, rule_in, smoothness_of
from mpi_ef.optim.flat import FlatOptimizer

if TYPE_CHECKING:
    from torch import nn

__all__ = ["build_compressor", "build_optimizer"]

Groups = list[dict[str, Any]]
Chosen = Any  # the options that apply, as attributes: to ask for another one is an error


def build_optimizer(config: TrainConfig, model: "nn.Module", comm: Comm) -> FlatOptimizer:
    """Return the optimizer that the options describe. Collective.

    Raises
    ------
    ConfigError
        On all ranks: `smoothness` is not of so many ranks.
    """
    chosen = _chosen(config)
    if chosen.optimizer not in OPTIMIZERS:
        return _specified(chosen, model, comm)
    if hasattr(chosen, "placement"):
        return _wrapped(chosen, model, comm)
    groups = _decayed(chosen, model)
    shapes = tuple(tuple(p.shape) for group in groups for p in group["params"])
    compressor = for_parameters(_compressor(chosen), shapes)
    options: dict[str, Any] = {"lr": chosen.lr, "compressor": compressor, "clip": chosen.clip}
    return _REPLICATED[chosen.optimizer](chosen, groups, comm, options)


def _specified(chosen: Chosen, model: "nn.Module", comm: Comm) -> FlatOptimizer:
    """Return what a specification says, with the learning rate, the decay and the clipping of the run. Collective."""
    what, of_run = optimizer_in(chosen.optimizer)
    groups, options = _decayed(chosen, model), what.options
    if not (isclass(what.thing) and issubclass(what.thing, optim.DistributedOptimizer)):
        # The others bind their compressors to parameters themselves.
        shapes = tuple(tuple(p.shape) for group in groups for p in group["params"])
        options = {name: for_parameters(value, shapes) if isinstance(value, Compressor) else value
                   for name, value in options.items()}
    built = what.thing(groups, comm, *what.arguments, **options, **{name: getattr(chosen, name) for name in of_run})
    if not isinstance(built, FlatOptimizer):
        raise ConfigError(f"optimizer={chosen.optimizer} has built a {type(built).__name__}, no FlatOptimizer")
    return built


def build_compressor(config: TrainConfig) -> Compressor:
    """Return the compressor that the options describe. Local."""
    return _compressor(_chosen(config))


def _chosen(config: TrainConfig) -> Chosen:
    every = vars(config.resolved())
    # None is no choice, but for what only the objects know that are built.
    return SimpleNamespace(**{name: value for name, value in every.items() if value is not None})


def _values(chosen: Chosen) -> Compressor:
    return Identity() if chosen.values == "full" else Quantize(chosen.values)


_COMPRESSORS: Mapping[str, Callable[[Chosen], Compressor]] = {
    "topk": lambda o: TopK(o.ratio, values=_values(o), segments="parameters" if o.per_parameter else None),
    "randk": lambda o: RandK(o.ratio, values=_values(o), seed=o.seed),
    "sign": lambda o: Sign(block=o.block),
    "vote": lambda _: Vote(),
    "low-rank": lambda o: LowRank(o.rank, shapes="parameters", seed=o.seed),
    "quantize": _values,
    "identity": lambda _: Identity(),
}


def _compressor(chosen: Chosen) -> Compressor:
    if chosen.compressor in _COMPRESSORS:
        return _COMPRESSORS[chosen.compressor](chosen)
    compressor: Compressor = registry.built("compressor", chosen.compressor)
    return compressor


def _reply(chosen: Chosen) -> Compressor:
    return Identity() if chosen.reply == 1.0 else TopK(chosen.reply)


# What rules of the table take, from the options.
_RULE_OPTIONS: Mapping[str, Callable[[Chosen], dict[str, Any]]] = {
    "econtrol": lambda o: {"eta": o.eta} if hasattr(o, "eta") else {},
    "ef14-momentum": lambda o: {"beta": o.beta},
    "lion": lambda o: {"beta1": o.vote_beta1, "beta2": o.vote_beta2},
    "ef21-sgdm": lambda o: {"eta": o.eta},
    "ef21-sgd2m": lambda o: {"eta": o.eta},
    "ef21-hb": lambda o: {"eta": o.eta},
    "ef21-pp": lambda o: {"participation": o.participation, "seed": o.seed},
    "ef21-w": lambda o: {"participation": o.participation, "seed": o.seed},
    "ef21-bc": lambda o: {"reply": _reply(o)},
    "clag": lambda o: {"zeta": o.zeta},
    "d-ec-sgd": lambda o: {"correction": RandK(o.correction, seed=o.seed)},
}


def _plan(chosen: Chosen) -> Callable[[Comm, Compressor, int, Any], Plan]:
    """Return what builds the plan that the rule needs."""

    def plan(comm: Comm, compressor: Compressor, d: int, dtype: Any) -> Plan:
        if hasattr(chosen, "plan"):
            return build_plan(chosen.plan, comm, compressor, d, dtype)
        rule = rule_in(chosen.rule)
        if rule in CLIENTS:
            return ClientsMean(comm, compressor, d, dtype, clients=comm.Get_size(), weights=_weights(chosen, comm))
        if rule == "ef21-bc" and compressor.plan == "two-phase":
            return TwoPhaseMean(comm, compressor, d, dtype, reply=_reply(chosen))
        return plan_for(comm, compressor, d, dtype, residual=rule != "lion")  # a vote leaves nothing for later

    return plan


def _weights(chosen: Chosen, comm: Comm) -> Any:
    """Return the weights of the ranks; None where the rule wants none."""
    if rule_in(chosen.rule) != "ef21-w":
        return None
    size = comm.Get_size()
    smoothness = np.array(smoothness_of(chosen.smoothness) if hasattr(chosen, "smoothness") else [1.0] * size)
    if smoothness.size != size:
        error = ConfigError(f"smoothness={chosen.smoothness} is of {smoothness.size} ranks, here there are {size}")
        error.everywhere = True
        raise error
    return smoothness / smoothness.sum()


def _decayed(chosen: Chosen, model: "nn.Module") -> Groups:
    """Return two groups: matrices, and vectors, which do not decay."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": matrices, "weight_decay": chosen.weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _wrapped(chosen: Chosen, model: "nn.Module", comm: Comm) -> FlatOptimizer:
    overlap = hasattr(chosen, "overlap") and chosen.overlap
    if chosen.optimizer == "ef21-muon":
        return optim.EF21Muon(_decayed(chosen, model), comm, _compressor(chosen), lr=chosen.lr, beta=1.0 - chosen.momentum,
                              dense_steps=chosen.dense_steps, overlap=overlap)
    if chosen.optimizer == "adamw":
        inner: torch.optim.Optimizer = torch.optim.AdamW(_decayed(chosen, model), lr=chosen.lr,
                                                         betas=(chosen.beta1, chosen.beta2))
    else:
        inner = torch.optim.SGD(model.parameters(), lr=chosen.lr, momentum=chosen.momentum,
                                weight_decay=chosen.weight_decay)
    options = _RULE_OPTIONS.get(chosen.rule, lambda _: {})(chosen)
    return optim.DistributedOptimizer(inner, comm, _compressor(chosen), placement=chosen.placement, rule=chosen.rule,
                                      plan=_plan(chosen), dense_steps=chosen.dense_steps, overlap=overlap,
                                      **options)


Replicated = Callable[[Chosen, Groups, Comm, dict[str, Any]], FlatOptimizer]
_REPLICATED: Mapping[str, Replicated] = {
    "onebit-adam": lambda o, groups, comm, options: optim.OneBitAdam(
        groups, comm, betas=(o.beta1, o.beta2), freeze_step=o.freeze or None, **options
    ),
    "zero-one-adam": lambda o, groups, comm, options: optim.ZeroOneAdam(
        groups,
        comm,
        betas=(o.beta1, o.beta2),
        var_freeze_step=o.freeze or None,
        local_step_scaler=o.local_steps,
        **options,
    ),
    "onebit-lamb": lambda o, groups, comm, options: optim.OneBitLamb(
        groups, comm, betas=(o.beta1, o.beta2), freeze_step=o.freeze or None, **options
    ),
    "lion": lambda o, groups, comm, options: optim.Lion(groups, comm, betas=(o.beta1, o.beta2), **options),
    "signum": lambda o, groups, comm, options: optim.Signum(groups, comm, momentum=o.momentum, **options),
}
