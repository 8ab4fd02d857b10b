"""What the options of ``mpi-ef train`` may be, alone and together; before MPI is started."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from mpi_ef.errors import ConfigError, OptionError, briefly, counted, nearest
from mpi_ef.jobs.events import check_installed
from mpi_ef.jobs.methods import check_part
from mpi_ef.jobs.options import check_device
from mpi_ef.jobs.train import choices as choices_of
from mpi_ef.jobs.train.texts import in_texts

if TYPE_CHECKING:
    from mpi_ef.registry import Specification

__all__ = ["SPECIFIED", "check", "check_specified", "optimizer_in", "rule_in", "smoothness_of", "swept"]

Config = TypeVar("Config", bound=Any)
_VOTERS = ("lion", "signum")  # optimizers that step by the signs of a majority, without error feedback
CHANGES = ("ef21-page", "marina")  # rules whose inputs are changes of gradients, see changes.py
CLIENTS = ("ef21-pp", "ef21-w", "ef21-plus", "clag")  # rules in which a rank may be silent, or choose between two messages
ROBUST = ("byz-ef21", "byz-ef21-sgdm", "byz-ef21-bc")  # rules that some ranks may not decide


# What may also be written as in Python, with its options, see :mod:`mpi_ef.registry`.
SPECIFIED = ("compressor", "rule", "plan", "optimizer", "model", "aggregator")
SWEPT = ("lr", "warmup", "momentum", "beta1", "beta2", "weight_decay", "clip", "seed")  # of which trainings differ
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
    if chosen["seed"] >= 1 << 63:
        raise ConfigError(f"seed={chosen['seed']} is too large for torch's generators; take one below 2**63")
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
    if "sweep" in chosen:
        _check_sweep(code, chosen)
    else:
        from mpi_ef.coded import code_of

        try:
            code_of(code)
        except OptionError as error:
            raise ConfigError(f"code={code}: {in_texts(str(error), code)}") from None
    for name, value in (("on_failure", "stop"), ("gpu_aware_mpi", False)):
        if chosen.get(name, value) != value:
            raise ConfigError(f"{name}={chosen[name]} is for ranks that do all together, code={code} for those that do not; "
                              "leave one of them out")


def _check_sweep(code: str, chosen: Mapping[str, Any]) -> None:
    from mpi_ef.coded import scheme_of

    if chosen["sweep"] is None:
        raise ConfigError(f"code={code} is for several trainings at once; pass sweep=lr=0.1,0.03,0.01 or the like, or "
                          "code=fr:1 for one of them")
    if (code == "auto") != (chosen["profile"] is not None):
        raise ConfigError(f"code={code} {'wants' if code == 'auto' else 'takes no'} profile, a lateness.npz of a run; "
                          f"{'pass one' if code == 'auto' else 'leave it out, or take code=auto'}")
    if code == "auto":
        return
    try:
        scheme = scheme_of(code)
    except OptionError as error:
        raise ConfigError(f"code={code}: {in_texts(str(error), code)}") from None
    if 0 < (jobs := len(_values_of(chosen["sweep"])[1])) <= scheme.delay:
        raise ConfigError(f"sweep={chosen['sweep']} is of {counted(jobs, 'training')}, and code={code} is for "
                          f"{scheme.delay + 1} or more; take another code, or more values")


def _values_of(text: str) -> tuple[str, list[str]]:
    name, _, values = text.partition("=")
    return name.strip().replace("-", "_"), [value.strip() for value in values.split(",") if value.strip()]


def swept(config: Config) -> dict[str, Config]:
    """Return by name the options of each training of a sweep, a `TrainConfig`, as those of a run without a code."""
    name, values = _values_of(str(config.sweep))
    if name not in SWEPT or not values or len(set(values)) < len(values):
        raise ConfigError(f"sweep={config.sweep} is no option with different values; write for example lr=0.1,0.03,0.01; "
                          f"options are {', '.join(SWEPT)}")
    if config.optimizer not in choices_of.owners(name).get("optimizer", [config.optimizer]):
        raise ConfigError(f"sweep={config.sweep}: {name} has no effect with optimizer={config.optimizer}; take another one")
    plain: dict[str, Any] = dict.fromkeys(("code", "sweep", "profile", "dedicated", "patience_seconds"))
    kind = int if name in ("seed", "warmup") else float
    try:
        numbers = [kind(value) for value in values]
    except ValueError:
        raise ConfigError(f"sweep={config.sweep}: values of {name} are numbers") from None
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"sweep={config.sweep}: two values are the same; leave one out")
    return {f"{name}={value}": replace(config, **(plain | {"compressor": "identity", name: number}))
            for value, number in zip(values, numbers, strict=True)}


def _check_compressor(chosen: Mapping[str, Any]) -> None:
    """Refuse compressors whose messages hold too little for the rule: training would diverge."""
    optimizer, rule, placement = (chosen.get(name) for name in ("optimizer", "rule", "placement"))
    if chosen.get("compressor") == "vote" and optimizer not in _VOTERS and (rule, placement) != ("lion", "gradient"):
        with_them = ", ".join(f"{name}={chosen[name]}" for name in ("optimizer", "rule", "placement") if name in chosen)
        raise ConfigError("compressor=vote sends signs without magnitudes, for majority votes: with optimizer="
                          f"{' or '.join(_VOTERS)}, or rule=lion and placement=gradient; with {with_them} take "
                          "compressor=sign")
    if chosen.get("compress_orders") and chosen["compressor"] == "identity":
        raise ConfigError("compress_orders with compressor=identity compresses nothing; pass another one, for example "
                          "compressor=topk and ratio=0.05")
    if rule == "econtrol" and chosen["compressor"] == "low-rank" and chosen.get("eta") is None:
        raise ConfigError("rule=econtrol has no default for eta with compressor=low-rank; pass one, for example eta=0.1")
