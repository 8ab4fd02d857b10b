"""What the options of ``mpi-ef train`` may be, alone and together; before MPI is started."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from math import isfinite
from typing import TYPE_CHECKING, Any

from mpi_ef.errors import ConfigError, OptionError

if TYPE_CHECKING:
    from mpi_ef.registry import Specification

__all__ = ["SPECIFIED", "check", "check_specified", "optimizer_in", "rule_in", "smoothness_of"]

_ONES = ("keep", "steps", "batch", "context", "layers", "heads", "width", "block", "rank", "local_steps", "log_every",
         "eval_every")
_ZEROS = (
    "checkpoint_every",
    "stop_after",
    "freeze",
    "warmup",
    "dense_steps",
    "seed",
    "lr",
    "weight_decay",
    "clip",
    "zeta",
)
_WEIGHTS = ("momentum", "beta1", "beta2", "beta", "vote_beta1", "vote_beta2")
_SHARES = ("ratio", "participation", "reply", "correction", "whole")
_VOTERS = ("lion", "signum")  # optimizers that step by the signs of a majority, without error feedback
CHANGES = ("ef21-page", "marina")  # rules that are told what has changed, see changes.py
CLIENTS = (
    "ef21-pp",
    "ef21-w",
    "ef21-plus",
    "clag",
)  # rules in which a rank may be silent, or say which of two it sends


# What may also be written as in Python, with its options, see :mod:`mpi_ef.registry`.
SPECIFIED = ("compressor", "rule", "plan", "optimizer", "model")
OF_RUN = ("lr", "weight_decay", "clip")  # options of optimizers that are options of the run


def check_specified(kind: str, text: str, choices: Sequence[str] = ()) -> None:
    """Raise `ConfigError` unless a text specifies what there is of a kind, with options that it has."""
    from mpi_ef import registry

    try:
        if kind == "compressor":
            registry.built(kind, text)
        elif kind == "plan":
            from mpi_ef.collectives.chosen import plan_named

            plan_named(text)
        elif kind == "optimizer":
            optimizer_in(text)
        else:
            what = registry.specified(kind, text)
            if kind == "model":
                registry.fitting(what, text, None)
    except OptionError as error:
        short = kind in ("optimizer", "model") and text.islower() and "(" not in text
        close = get_close_matches(text, choices, n=1) if short else []
        hint = f"{text!r} is unknown; did you mean {close[0]}?" if close else str(error)
        raise ConfigError(f"{kind}={text}: {hint}") from None


def optimizer_in(text: str) -> "tuple[Specification, tuple[str, ...]]":
    """Return what specifies an optimizer, and which options of the run it takes.

    Raises
    ------
    OptionError
        There is no such optimizer, an option does not fit, or is one of the run; or it is not built on parameters.
    """
    from mpi_ef import registry

    what = registry.specified("optimizer", text)
    taken = registry.options_of(what)
    if taken[:1] != ["params"]:
        raise OptionError(f"{what.name} is not built on parameters; take adamw or sgd, with a rule under it")
    if doubled := [name for name in OF_RUN if name in what.options]:
        raise OptionError(f"{doubled[0]} is an option of the run; give {doubled[0]} outside of the optimizer")
    of_run = tuple(name for name in ("lr", "clip") if name in taken)  # decay is of groups
    return registry.fitting(what, text, None, None, **dict.fromkeys(of_run, 0.0)), of_run


def rule_in(text: str | None) -> str | None:
    """Return the name of a rule in its specification."""
    return text and text.partition("(")[0].strip()


def check(chosen: Mapping[str, Any]) -> None:
    """Raise `ConfigError` unless all options, as :func:`choices.resolve` returns them, can work."""
    for names, least in ((_ONES, 1.0), (_ZEROS, 0.0)):
        for name in names:
            if name in chosen and not (chosen[name] >= least and isfinite(chosen[name])):  # also refuses NaN
                problem = "too small" if isfinite(chosen[name]) else "not finite"
                raise ConfigError(f"{name}={chosen[name]} is {problem}; the least is {least:g}")
    for name in _WEIGHTS:
        if not 0.0 <= chosen.get(name, 0.0) < 1.0:
            raise ConfigError(f"{name}={chosen[name]} is not in [0, 1)")
    for name in _SHARES:
        if (value := chosen.get(name)) is not None and not 0.0 < value <= 1.0:
            raise ConfigError(f"{name}={value} is not in (0, 1]; 0.01 is one in a hundred")
    if (eta := chosen.get("eta")) is not None and not 0.0 <= eta <= 1.0:
        raise ConfigError(f"eta={eta} is not in [0, 1]; 0.1 is usual")
    if chosen.get("smoothness") is not None:
        smoothness_of(chosen["smoothness"])
    _check_combinations(chosen)


def smoothness_of(text: str) -> list[float]:
    """Return the numbers in a list with commas, one for each rank."""
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        values = [0.0]
    if not all(0.0 < value < float("inf") for value in values):
        raise ConfigError(f"smoothness={text} is no list of positive numbers; write one for each rank, such as 1,2.5")
    return values


def _check_combinations(chosen: Mapping[str, Any]) -> None:
    rule, overlap, clip = rule_in(chosen.get("rule")), chosen.get("overlap"), chosen["clip"]
    if chosen["model"] == "gpt" and chosen["width"] % chosen["heads"]:
        raise ConfigError(f"width={chosen['width']} is not divisible by heads={chosen['heads']}")
    if chosen.get("compressor") == "quantize" and chosen["values"] == "full":
        raise ConfigError("values=full with compressor=quantize quantizes nothing; take compressor=identity")
    if overlap and clip:
        raise ConfigError("overlap sends gradients before their norm is known; pass clip=0 with it")
    if chosen.get("plan") and rule in CLIENTS:
        raise ConfigError(f"plan={chosen['plan']}: rule={rule} has a plan of its own; leave one of them out")
    if overlap and rule in CLIENTS:
        raise ConfigError(f"overlap sends in two parts, which rule={rule} cannot; leave one of them out")
    if rule in CHANGES and (chosen["placement"] != "gradient" or overlap or clip):
        raise ConfigError(f"rule={rule} sends changes of gradients over a batch; pass placement=gradient and clip=0 with "
                          "it, and no overlap")
    if rule == "marina" and chosen["compressor"] != "randk":
        raise ConfigError(
            f"rule=marina wants an unbiased compressor; pass compressor=randk, not {chosen['compressor']}"
        )
    _check_compressor(chosen)
    if chosen["overwrite"] and chosen["resume"] != "no":
        raise ConfigError(f"overwrite begins anew, resume={chosen['resume']} goes on; pass one of them")


def _check_compressor(chosen: Mapping[str, Any]) -> None:
    """Refuse compressors that say too little for what is done with their messages: training would diverge."""
    optimizer, rule, placement = (chosen.get(name) for name in ("optimizer", "rule", "placement"))
    if chosen.get("compressor") == "vote" and optimizer not in _VOTERS and (rule, placement) != ("lion", "gradient"):
        with_them = ", ".join(f"{name}={chosen[name]}" for name in ("optimizer", "rule", "placement") if name in chosen)
        raise ConfigError("compressor=vote sends signs without magnitudes, for majority votes: with optimizer="
                          f"{' or '.join(_VOTERS)}, or rule=lion and placement=gradient; with {with_them} take "
                          "compressor=sign")
    if rule == "econtrol" and chosen["compressor"] == "low-rank" and chosen.get("eta") is None:
        raise ConfigError(
            "rule=econtrol has no default for eta with compressor=low-rank; pass one, for example eta=0.1"
        )
