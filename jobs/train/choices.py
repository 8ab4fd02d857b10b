"""Which option of ``mpi-ef train`` goes with what: the one table from which it builds, checks, helps and records."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mpi_ef.errors import ConfigError

__all__ = ["CHOOSERS", "COMPRESSORS", "DECAY", "MODELS", "OPTIMIZERS", "PLACEMENTS", "PRECONDITIONS", "RULES", "VALUES",
           "Only", "Takes", "described", "earlier", "full_record", "kept", "owners", "resolve"]


@dataclass(frozen=True)
class Depends:
    """A default that depends on what else is chosen; `text` describes it. None where it follows from what is built."""

    text: str
    value: Callable[[Mapping[str, Any]], Any] = lambda _: None


@dataclass(frozen=True)
class Only:
    """The only value that an option may have there."""

    value: Any


Takes = Mapping[str, Any]  # options that something takes, with their defaults

_FULL = Depends("batch / (batch + samples of a rank)")
MODELS: Mapping[str, Takes] = {
    "gpt": {"text": Depends("the help texts of Python"), "context": 64, "layers": 4, "heads": 4, "width": 128},
    "mlp": {"split": "shuffled"},
    "cnn": {"split": "shuffled"},
}
# Orders of coded training are whole vectors, so that short answers save half of the bytes at most.
_SPARSE = Depends("topk, or identity with a code", lambda chosen: "topk" if chosen["code"] == "none" else "identity")
_ANY_RULE: Takes = {"placement": "update", "rule": "ef14", "compressor": _SPARSE, "plan": Depends("that of the compressor"),
                    "dense_steps": 0}
_UPDATES: Takes = {"code": "none", "precondition": "none", "exchange_every": 1, **_ANY_RULE}
_GRADIENT: Takes = {"placement": Only("gradient"), "dense_steps": 0}
_ONE_BIT: Takes = {"beta1": 0.9, "beta2": 0.99, "compressor": "sign", "freeze": 0}
# Sparse feedback delays updates, and delay acts like momentum; dense updates need the usual one.
_DELAYED = Depends("0.5, or 0.9 with compressor=identity",
                   lambda chosen: 0.9 if chosen.get("compressor", "identity") == "identity" else 0.5)
OPTIMIZERS: Mapping[str, Takes] = {
    "adamw": {"beta1": _DELAYED, "beta2": 0.99, **_UPDATES},
    "sgd": {"momentum": 0.9, **_UPDATES},
    "onebit-adam": _ONE_BIT,
    "zero-one-adam": {**_ONE_BIT, "local_steps": 200},
    "onebit-lamb": _ONE_BIT,
    "lion": {"beta1": 0.9, "beta2": 0.99, "compressor": "vote"},
    "signum": {"momentum": 0.9, "compressor": "vote"},
    "ef21-muon": {"momentum": 0.9, **_GRADIENT, "rule": Only("ef21-sgdm"), "compressor": "topk"},
    "powersgd": {"momentum": 0.9, **_GRADIENT, "rule": "ef14", "compressor": Only("low-rank")},
}
# torch.optim.SGD adds decay to the gradient, and has none by default; that of the others moves weights apart from it.
_COUPLED = ("sgd", "powersgd")
DECAY = Depends(f"0.1, or 0 with optimizer={', '.join(_COUPLED)}",
                lambda chosen: 0.0 if chosen["optimizer"] in _COUPLED else 0.1)
_FADING = Depends("1, or 0.95 with exchange_every above 1 and no outer_momentum",
                  lambda chosen: 0.95 if chosen.get("exchange_every", 1) > 1 and not chosen["outer_momentum"] else 1.0)
_LEARNED: Takes = {"sides": "both", "precondition_every": 10, "statistics": "full", "fallback": 0.0}
# All forms of mpi_ef.Preconditioner.
PRECONDITIONS: Mapping[str, Takes] = {
    "none": {}, **dict.fromkeys(("window", "exact", "blended", "eva", "kfac"), _LEARNED)}
_ROBUST: Takes = {"byzantine": Depends("none, it has to be given"), "aggregator": "NNM(TrimmedMean())"}
PLACEMENTS: Mapping[str, Takes] = {"update": {}, "gradient": {"overlap": False}}
# All rules of mpi_ef.feedback.RULES. Options have its names, but where an optimizer has one of that name.
RULES: Mapping[str, Takes] = {
    "ef14": {"decay": _FADING},
    "ef21": {},
    "econtrol": {"eta": Depends("0.3 times the contraction constant of the compressor")},
    "ef14-momentum": {"beta": 0.9},
    "lion": {"vote_beta1": 0.9, "vote_beta2": 0.99},
    "ef21-sgdm": {"eta": 0.1},
    "ef21-sgd2m": {"eta": 0.1},
    "ef21-hb": {"eta": 0.5},
    "ef21-pp": {"participation": 0.5},
    "ef21-w": {"participation": 1.0, "smoothness": Depends("the same for all ranks")},
    "ef21-bc": {"reply": 1.0},
    "ef21-plus": {},
    "ef21-page": {"whole": _FULL},
    "marina": {"whole": _FULL},
    "clag": {"zeta": 1.0},
    "d-ec-sgd": {"correction": 0.1},
    "byz-ef21": _ROBUST,
    "byz-ef21-sgdm": {"eta": 0.1, **_ROBUST},
    "byz-ef21-bc": {"reply": 1.0, **_ROBUST},
}
VALUES = ("full", "bf16", "fp16", "int8", "2bit")
COMPRESSORS: Mapping[str, Takes] = {
    "topk": {"ratio": 0.01, "values": "bf16", "per_parameter": False},
    "randk": {"ratio": 0.01, "values": "bf16"},
    "sign": {"block": 1024},
    "vote": {},
    "low-rank": {"rank": 4},
    "quantize": {"values": "bf16"},
    "identity": {},
}
_SAVING: Mapping[Any, Takes] = {
    True: {"keep": 3, "save_in_background": False, "stop_after": 0, "on_failure": "stop"},
    False: {},
}
_ROUNDS: Mapping[Any, Takes] = {
    True: {"outer_lr": 1.0, "outer_momentum": 0.0, "fragments": 1, "late": False},
    False: {},
}
_CODED, _SCHEMES = "fr:S, cyclic:S, blocks:S", "gc:S, srsgc:B,W,LAM, msgc:B,W,LAM, auto"
_CODES: Mapping[Any, Takes] = {
    "none": {},
    _CODED: {"dedicated": False, "compress_orders": False, "patience_seconds": 300.0, "on_silence": "raise",
             "twins": "raise"},
    _SCHEMES: {"sweep": Depends("none, it has to be given"), "profile": Depends("none, auto wants one"), "dedicated": False,
               "patience_seconds": 300.0},
}
# Of what a server takes the place; and in a sweep, where all draw from all samples and whole vectors are sent.
_UNCODED = ("precondition", "exchange_every", "placement", "rule", "plan", "dense_steps")
_UNSWEPT = (*_UNCODED, "compressor", "split")
# What the options depend on, in this order; what is saved, on whether there is any saving; rounds, on
# whether they have several steps.
CHOOSERS: Mapping[str, Mapping[Any, Takes]] = {
    "model": MODELS,
    "optimizer": OPTIMIZERS,
    "code": _CODES,
    "precondition": PRECONDITIONS,
    "exchange_every": _ROUNDS,
    "placement": PLACEMENTS,
    "rule": RULES,
    "compressor": COMPRESSORS,
    "checkpoint_every": _SAVING,
}


_LEAST = {"checkpoint_every": 1, "exchange_every": 2}  # where a number is a choice: from which one on it is the first
_ONCE_RECORDED = {"split", "context", "layers", "heads", "width", "momentum", "beta2", "rule", "placement", "ratio", "block",
                  "rank", "freeze", "local_steps", "overlap", "per_parameter", "values", "dense_steps", "keep"}


def resolve(given: Mapping[str, Any], *, strict: bool = True) -> dict[str, Any]:
    """Return all options that apply, in the order of the table: those given, and defaults.

    Parameters
    ----------
    given : mapping of str to object
        Without those that were not given; with all that always apply.
    strict : bool
        False leaves out what does not apply.

    Raises
    ------
    ConfigError
        When an option was given that has no effect with the others: with what it goes.
    """
    chosen = {"weight_decay": DECAY, "device": "auto"} | {name: value for name, value in given.items() if not owners(name)}
    for chooser, table in CHOOSERS.items():
        for name, default in _taken(chooser, table, chosen).items():
            if isinstance(default, Only):
                if strict and given.get(name, default.value) != default.value:
                    raise ConfigError(f"{name}={given[name]} has no effect with optimizer={chosen['optimizer']}, whose "
                                      f"{name} is always {default.value}")
                chosen[name] = default.value
            else:
                value = given.get(name, default)
                chosen[name] = value.value(chosen) if name in CHOOSERS and isinstance(value, Depends) else value
        if chooser == "code" and chosen.get("code", "none") != "none":
            chosen = {name: value for name, value in chosen.items() if name not in _not_with(chosen)}
    without = [name for name in given if name not in chosen]
    if strict and without:
        raise ConfigError(_no_effect(without[0], given[without[0]], chosen))
    return {name: value.value(chosen) if isinstance(value, Depends) else value for name, value in chosen.items()}


def earlier(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run has used, of a record that may also have options without effect, as records once had."""
    return resolve({name: value for name, value in options.items() if value is not None}, strict=False)


def full_record(names: Iterable[str]) -> bool:
    """Return whether these are the options of a record of that kind; files written by hand have fewer."""
    return set(names) >= _ONCE_RECORDED


def kept() -> set[str]:
    """Return the options with which a run goes on as it began: those of the model, of the optimizer, of ranks' samples.

    A text is known by its content.
    """
    tables = [table.values() for chooser, table in CHOOSERS.items() if chooser != "checkpoint_every"]
    names = {name for table in tables for takes in table for name in takes}
    apart = {"text", "overlap", "whole", "code", "profile", *_CODES[_CODED]}
    return {"model", "seed", "optimizer", "weight_decay"} | names - apart


def owners(name: str) -> dict[str, list[Any]]:
    """Return by chooser the choices that take an option; nothing for one that always applies."""
    found = ((chooser, [choice for choice, takes in table.items() if name in takes]) for chooser, table in CHOOSERS.items())
    return {chooser: choices for chooser, choices in found if choices}


def described(name: str) -> str:
    """Return the defaults of an option and with what it goes, as text."""
    texts = []
    for chooser, choices in owners(name).items():
        defaults: dict[str, list[Any]] = {}
        for choice in choices:
            defaults.setdefault(_text(CHOOSERS[chooser][choice][name]), []).append(choice)
        texts += [f"{text} with {_named(chooser, found)}" for text, found in defaults.items()]
    return "; ".join(texts)


def _taken(chooser: str, table: Mapping[Any, Takes], chosen: Mapping[str, Any]) -> Takes:
    """Return what the choice that was made takes; nothing where there is none to make."""
    if chooser not in chosen or _belongs(chooser, chosen["optimizer"]):
        return {}
    return table.get(_choice(chooser, chosen), {})


def _choice(chooser: str, chosen: Mapping[str, Any]) -> Any:
    if chooser == "code":
        kind = str(chosen[chooser]).strip().lower()
        return "none" if kind == "none" else _SCHEMES if kind.startswith(("gc", "srsgc", "msgc", "auto")) else _CODED
    return chosen[chooser] >= _LEAST[chooser] if chooser in _LEAST else chosen[chooser]


def _not_with(chosen: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what has no effect with the code."""
    return (*_UNSWEPT, *_differs(chosen)) if _choice("code", chosen) == _SCHEMES else _UNCODED


def _differs(chosen: Mapping[str, Any]) -> set[str]:
    """Return the option of which each training of a sweep has its own value, where it goes with some choices only."""
    sweep = chosen.get("sweep")
    name = sweep.partition("=")[0].strip().replace("-", "_") if isinstance(sweep, str) else ""
    return {name} if owners(name) and name != "sweep" else set()


def _belongs(chooser: str, optimizer: str) -> bool:
    """Return whether the rule is the optimizer's: its options follow from those of the optimizer then."""
    return chooser == "rule" and isinstance(OPTIMIZERS.get(optimizer, {}).get("rule"), Only)


def _no_effect(name: str, value: Any, chosen: Mapping[str, Any]) -> str:
    """Say with what an option goes that was given, and has no effect here."""
    ((chooser, choices),) = owners(name).items()
    if name in _differs(chosen):
        return f"{name}={value} has no effect with sweep={chosen['sweep']}; leave it out"
    if chosen.get("code", "none") != "none" and {name, chooser} & {*_not_with(chosen)}:
        served = bool({name, chooser} & {*_UNCODED})
        why = "a server has the parameters" if served else "all draw from all samples, and send vectors"
        return f"{name}={value} has no effect with code={chosen['code']}, where {why}; it goes with code=none"
    goes = _named(chooser, [c for c in choices if not isinstance(CHOOSERS[chooser][c][name], Only)])
    if chooser in chosen and not _belongs(chooser, chosen["optimizer"]):
        now = _named(chooser, [_choice(chooser, chosen)])
    else:  # there is no such choice with this optimizer
        now = _named("optimizer", [chosen["optimizer"]])
        goes += f" of {_named('optimizer', [o for o in owners(chooser)['optimizer'] if not _belongs(chooser, o)])}"
    return f"{name}={value} has no effect with {now}; it goes with {goes}"


def _named(chooser: str, choices: list[Any]) -> str:
    if chooser in _LEAST:
        return f"{chooser}{' above ' if choices[0] else '='}{_LEAST[chooser] - 1}"
    return f"{chooser}={', '.join(choices)}"


def _text(default: Any) -> str:
    if isinstance(default, Only):
        return f"always {default.value}"
    if isinstance(default, Depends):
        return default.text
    return str(default)
