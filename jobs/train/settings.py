"""What the options of ``mpi-ef train`` may be, alone and together; before MPI is started."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mpi_ef.errors import ConfigError, OptionError, briefly, nearest
from mpi_ef.jobs.events import check_installed
from mpi_ef.jobs.methods import check_part
from mpi_ef.jobs.options import check_device

if TYPE_CHECKING:
    from mpi_ef.registry import Specification

__all__ = ["SPECIFIED", "check", "check_specified", "optimizer_in", "rule_in", "smoothness_of"]

_VOTERS = ("lion", "signum")  # optimizers that step by the signs of a majority, without error feedback
CHANGES = ("ef21-page", "marina")  # rules whose inputs are changes of gradients, see changes.py
CLIENTS = ("ef21-pp", "ef21-w", "ef21-plus", "clag")  # rules in which a rank may be silent, or choose between two messages
ROBUST = ("byz-ef21", "byz-ef21-sgdm", "byz-ef21-bc")  # rules that some ranks may not decide


# What may also be written as in Python, with its options, see :mod:`mpi_ef.registry`.
SPECIFIED = ("compressor", "rule", "plan", "optimizer", "model", "aggregator")
OF_RUN = ("lr", "weight_decay", "clip")  # options of optimizers that are options of the run


def check_specified(kind: str, text: str, choices: Sequence[str] = ()) -> None:
    """Raise `ConfigError` unless a text specifies what there is of a kind, with options that it has."""
    from mpi_ef import registry

    try:
        if kind == "optimizer":
            optimizer_in(text)
        elif kind == "model":
            registry.fitting(registry.specified(kind, text), text, None)
        else:
            check_part(kind, text)
    except OptionError as error:
        short = kind in ("optimizer", "model") and text.islower() and "(" not in text
        close = nearest(text, choices) if short else ""
        raise ConfigError(f"{kind}={text}: {f'{briefly(text)} is unknown; {close}' if close else error}") from None


def optimizer_in(text: str) -> "tuple[Specification, tuple[str, ...]]":
    """Return what specifies an optimizer, and which options of the run it takes. Raises `OptionError`."""
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
    if chosen.get("tensorboard"):
        check_installed()
    if chosen.get("smoothness") is not None:
        smoothness_of(chosen["smoothness"])
    check_device(chosen.get("device"))
    _check_combinations(chosen)
    _check_code(chosen)


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
    if chosen.get("plan") and rule in CLIENTS + ROBUST:
        raise ConfigError(f"plan={chosen['plan']}: rule={rule} has a plan of its own; leave one of them out")
    if overlap and rule in CLIENTS:
        raise ConfigError(f"overlap sends in two parts, which rule={rule} cannot; leave one of them out")
    if rule in ROBUST and chosen.get("byzantine") is None:
        raise ConfigError(f"rule={rule} wants byzantine=F, the number of ranks that may be wrong; of 9 ranks take for "
                          "example 2")
    if rule in CHANGES and (chosen["placement"] != "gradient" or overlap or clip):
        raise ConfigError(f"rule={rule} sends changes of gradients over a batch; pass placement=gradient and clip=0 with "
                          "it, and no overlap")
    if rule == "marina" and chosen["compressor"] != "randk":
        raise ConfigError(f"rule=marina wants an unbiased compressor; pass compressor=randk, not {chosen['compressor']}")
    _check_rounds(chosen)
    _check_compressor(chosen)
    if chosen["overwrite"] and chosen["resume"] != "no":
        raise ConfigError(f"overwrite begins anew, resume={chosen['resume']} goes on; pass one of them")


def _check_rounds(chosen: Mapping[str, Any]) -> None:
    """Refuse what does not go with steps of every rank by itself."""
    if (every := chosen.get("exchange_every", 1)) == 1:
        return
    if chosen.get("precondition", "none") != "none":
        raise ConfigError(f"precondition={chosen['precondition']} learns in steps of all ranks together, exchange_every="
                          f"{every} lets each take its own; leave one of them out")
    for name, value in (("placement", "update"), ("rule", "ef14"), ("dense_steps", 0)):
        if chosen[name] != value:
            raise ConfigError(f"exchange_every={every} exchanges what steps have led to, by ef14: {name}={chosen[name]} has "
                              "no effect with it; leave one of them out")
    if chosen["outer_momentum"] and chosen["decay"] < 1:
        raise ConfigError(f"outer_momentum={chosen['outer_momentum']} counts old messages again, decay={chosen['decay']} "
                          "lets old errors fade; pass decay=1, or leave one of them out")


def _check_code(chosen: Mapping[str, Any]) -> None:
    """Refuse what is no code, and what all ranks would have to do together."""
    if (code := chosen.get("code", "none")) == "none":
        return
    from mpi_ef.coded import code_of

    try:
        code_of(code)
    except OptionError as error:
        raise ConfigError(f"code={code}: {error}") from None
    for name, value in (("on_failure", "stop"), ("gpu_aware_mpi", False)):
        if chosen.get(name, value) != value:
            raise ConfigError(f"{name}={chosen[name]} is for ranks that do all together, code={code} for those that do not; "
                              "leave one of them out")


def _check_compressor(chosen: Mapping[str, Any]) -> None:
    """Refuse compressors whose messages hold too little for the rule: training would diverge."""
    optimizer, rule, placement = (chosen.get(name) for name in ("optimizer", "rule", "placement"))
    if chosen.get("compressor") == "vote" and optimizer not in _VOTERS and (rule, placement) != ("lion", "gradient"):
        with_them = ", ".join(f"{name}={chosen[name]}" for name in ("optimizer", "rule", "placement") if name in chosen)
        raise ConfigError("compressor=vote sends signs without magnitudes, for majority votes: with optimizer="
                          f"{' or '.join(_VOTERS)}, or rule=lion and placement=gradient; with {with_them} take "
                          "compressor=sign")
    if rule == "econtrol" and chosen["compressor"] == "low-rank" and chosen.get("eta") is None:
        raise ConfigError("rule=econtrol has no default for eta with compressor=low-rank; pass one, for example eta=0.1")
