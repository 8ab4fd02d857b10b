"""The optimizers of ``mpi-ef train``, built from its options; what they take is in choices.py."""

from collections.abc import Callable, Mapping
from inspect import isclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mpi_ef import optim, registry
from mpi_ef.coded import code_of
from mpi_ef.collectives import ClientsMean, Plan, RobustMean, TwoPhaseMean, build_plan, plan_for
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor, Identity, LowRank, Quantize, RandK, Sign, TopK, TwoBits, Vote, for_parameters
from mpi_ef.errors import ConfigError, everywhere
from mpi_ef.feedback import RULES
from mpi_ef.feedback.table import rule_of
from mpi_ef.jobs.train.choices import OPTIMIZERS
from mpi_ef.jobs.train.config import TrainConfig
from mpi_ef.jobs.train.settings import CLIENTS, ROBUST, optimizer_in, rule_in, smoothness_of
from mpi_ef.jobs.train.texts import naming_texts
from mpi_ef.optim.flat import FlatOptimizer

if TYPE_CHECKING:
    from torch import nn

__all__ = ["build_coded", "build_compressor", "build_inner", "build_optimizer"]

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
    if hasattr(chosen, "placement"):
        return _wrapped(chosen, model, comm)
    groups = _decayed(chosen, model)
    shapes = tuple(tuple(p.shape) for group in groups for p in group["params"])
    if chosen.optimizer not in OPTIMIZERS:
        return _specified(chosen, groups, shapes, comm)
    kind, names = _REPLICATED[chosen.optimizer]
    options = {theirs: getattr(chosen, mine) for mine, theirs in names.items() if mine != "freeze" or chosen.freeze}
    if hasattr(chosen, "beta1"):
        options["betas"] = (chosen.beta1, chosen.beta2)
    compressor = for_parameters(_compressor(chosen), shapes)
    return kind(groups, comm, lr=chosen.lr, compressor=compressor, clip=chosen.clip, **options)


# Classes, and by the names of our options those of theirs; besides lr, compressor, clip and betas.
_REPLICATED: Mapping[str, tuple[Callable[..., FlatOptimizer], Mapping[str, str]]] = {
    "onebit-adam": (optim.OneBitAdam, {"freeze": "freeze_step"}),
    "zero-one-adam": (optim.ZeroOneAdam, {"freeze": "var_freeze_step", "local_steps": "local_step_scaler"}),
    "onebit-lamb": (optim.OneBitLamb, {"freeze": "freeze_step"}),
    "lion": (optim.Lion, {}),
    "signum": (optim.Signum, {"momentum": "momentum"}),
}


def _specified(chosen: Chosen, groups: Groups, shapes: tuple[tuple[int, ...], ...], comm: Comm) -> FlatOptimizer:
    """Return the optimizer of a specification, with the learning rate, the decay and the clipping of the run. Collective."""
    what, of_run = optimizer_in(chosen.optimizer)
    options = what.options
    if not (isclass(what.thing) and issubclass(what.thing, optim.DistributedOptimizer)):
        # The others bind their compressors to parameters themselves.
        options = {name: for_parameters(value, shapes) if isinstance(value, Compressor) else value
                   for name, value in options.items()}
    built = what.thing(groups, comm, *what.arguments, **options, **{name: getattr(chosen, name) for name in of_run})
    if not isinstance(built, FlatOptimizer):
        raise ConfigError(f"optimizer={chosen.optimizer} has built a {type(built).__name__}, no FlatOptimizer")
    if getattr(built, "peers", None) is not None:
        raise everywhere(ConfigError(f"optimizer={chosen.optimizer}: with wait_for ranks do not wait for each other, and "
                                     "rows, validation and checkpoints here do; leave it out, or write your own loop"))
    return built


def build_compressor(config: TrainConfig) -> Compressor:
    """Return the compressor that the options describe. Local."""
    return _compressor(_chosen(config))


def _chosen(config: TrainConfig) -> Chosen:
    every = vars(config.resolved())
    # None: the option does not apply, or follows from what is built.
    return SimpleNamespace(**{name: value for name, value in every.items() if value is not None})


def _values(chosen: Chosen) -> Compressor:
    known = {"full": Identity(), "2bit": TwoBits()}
    return known[chosen.values] if chosen.values in known else Quantize(chosen.values)


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


def _rule_options(chosen: Chosen) -> dict[str, Any]:
    """Return the options of a rule of the table."""
    made: dict[str, Callable[[], Compressor]] = {"reply": lambda: _reply(chosen),
                                                 "correction": lambda: RandK(chosen.correction, seed=chosen.seed)}
    found = {}
    for name in RULES[chosen.rule].options(1.0) if chosen.rule in RULES else ():
        mine = f"vote_{name}" if chosen.rule == "lion" else name
        if hasattr(chosen, mine):  # the strength of econtrol may follow from the compressor
            found[name] = made[name]() if name in made else getattr(chosen, mine)
    return found


def _plan(chosen: Chosen) -> Callable[..., Plan]:
    """Return what builds the plan that the rule needs."""

    def plan(comm: Comm, compressor: Compressor, d: int, dtype: Any, device: str = "cpu") -> Plan:
        asked = chosen.__dict__.get("rule")
        gathers = bool(asked) and rule_of(asked)[0].gathers
        if hasattr(chosen, "plan"):
            return build_plan(chosen.plan, comm, compressor, d, dtype, device, gather=gathers)
        rule = rule_in(chosen.rule)
        if rule in ROBUST:
            aggregator = registry.built("aggregator", chosen.aggregator)
            return RobustMean(comm, compressor, d, dtype, aggregator, f=chosen.byzantine, device=device)
        if rule in CLIENTS:
            return ClientsMean(comm, compressor, d, dtype, clients=comm.Get_size(), weights=_weights(chosen, comm),
                               device=device)
        if rule == "ef21-bc" and compressor.plan == "two-phase":
            return TwoPhaseMean(comm, compressor, d, dtype, reply=_reply(chosen), device=device)
        votes = rule == "lion"  # which leave no residual
        return plan_for(comm, compressor, d, dtype, residual=not votes, gather=gathers, device=device)

    return plan


def _weights(chosen: Chosen, comm: Comm) -> Any:
    """Return the weights of the ranks; None where the rule has none."""
    if rule_in(chosen.rule) != "ef21-w":
        return None
    size = comm.Get_size()
    smoothness = np.array(smoothness_of(chosen.smoothness) if hasattr(chosen, "smoothness") else [1.0] * size)
    if smoothness.size != size:
        text = f"smoothness={chosen.smoothness} is of {smoothness.size} ranks, here there are {size}"
        raise everywhere(ConfigError(text))
    return smoothness / smoothness.sum()


def _decayed(chosen: Chosen, model: "nn.Module") -> Groups:
    """Return two groups: matrices, and vectors, which do not decay."""
    return [{"params": [p for p in model.parameters() if (p.dim() > 1) == matrices],
             "weight_decay": chosen.weight_decay if matrices else 0.0} for matrices in (True, False)]


def _inner(chosen: Chosen, model: "nn.Module") -> torch.optim.Optimizer:
    if chosen.optimizer == "adamw":
        return torch.optim.AdamW(_decayed(chosen, model), lr=chosen.lr, betas=(chosen.beta1, chosen.beta2))
    return torch.optim.SGD(model.parameters(), lr=chosen.lr, momentum=chosen.momentum, weight_decay=chosen.weight_decay)


def build_coded(config: TrainConfig, model: "nn.Module", comm: Comm) -> optim.CodedOptimizer:
    """Return the optimizer of a run with a code. Collective."""
    chosen = _chosen(config)
    compressor = _compressor(chosen)
    with naming_texts(chosen.code):
        return optim.CodedOptimizer(_inner(chosen, model), comm, code_of(chosen.code), compressor,
                                    order_compressor=compressor if chosen.compress_orders else None, model=model,
                                    seed=chosen.seed, clip=chosen.clip, dedicated=chosen.dedicated,
                                    patience_seconds=chosen.patience_seconds, on_silence=chosen.on_silence,
                                    twins=chosen.twins)


def build_inner(config: TrainConfig, model: "nn.Module") -> torch.optim.Optimizer:
    """Return torch's optimizer that a rule, or a server, puts to work. Local."""
    return _inner(_chosen(config), model)


def _wrapped(chosen: Chosen, model: "nn.Module", comm: Comm) -> FlatOptimizer:
    shared: dict[str, Any] = {"dense_steps": chosen.dense_steps, "overlap": getattr(chosen, "overlap", False)}
    if chosen.optimizer == "ef21-muon":
        return optim.EF21Muon(_decayed(chosen, model), comm, _compressor(chosen), lr=chosen.lr, beta=1.0 - chosen.momentum,
                              **shared)
    inner = _inner(chosen, model)
    if chosen.__dict__.get("exchange_every", 1) > 1:
        names = ("decay", "outer_lr", "outer_momentum", "fragments", "late")
        return optim.LocalSteps(inner, comm, _compressor(chosen), every=chosen.exchange_every, plan=_plan(chosen),
                                **{name: getattr(chosen, name) for name in names})
    shared |= {"placement": chosen.placement, "rule": chosen.rule, "plan": _plan(chosen), **_rule_options(chosen)}
    if chosen.__dict__.get("precondition", "none") == "none":
        return optim.DistributedOptimizer(inner, comm, _compressor(chosen), **shared)
    return optim.MKOR(inner, comm, _compressor(chosen), model=model, form=chosen.precondition, sides=chosen.sides,
                      every=chosen.precondition_every, fallback=chosen.fallback or None,
                      statistics=None if chosen.statistics == "full" else Quantize(chosen.statistics), **shared)
