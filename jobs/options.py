"""Command lines and TOML files made from a frozen dataclass: one description, no unknown key ignored."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import Field, field, fields
from pathlib import Path
from time import sleep
from types import NoneType, UnionType
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from mpi_ef.documents import read_toml, shown
from mpi_ef.errors import ConfigError, OptionError, briefly, nearest
from mpi_ef.ranges import checked
from mpi_ef.runtime.world import first_task

__all__ = ["Checked", "check_device", "divided", "option", "parse", "refuse", "to_toml"]

T = TypeVar("T")
_LATER_SECONDS = 1.0


class Checked:
    """Base of a dataclass of options: values are in the ranges that its fields name, and of their choices."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for the first option that has another value."""
        for f in fields(self):  # type: ignore[arg-type]
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and not f.metadata["others"] and value is not None and value not in choices:
                raise ConfigError(f"{f.name}={briefly(value)} is unknown; take one of {', '.join(choices)}")
        try:
            checked(self, subject="")
        except OptionError as error:
            raise ConfigError(str(error)) from None


def option(default: Any, help: str, allowed: str | int | None = None, *, choices: Sequence[str] = (), others: str = "",
           shown: str = "", recorded: bool = True) -> Any:
    """Return a dataclass field with a help text.

    Parameters
    ----------
    default : object
    help : str
    allowed : str or int, optional
        An interval, as of :func:`mpi_ef.ranges.within`, or the least whole number.
    choices : sequence of str
        What it may be; anything of its type when empty.
    others : str
        For the help text: what it may be besides `choices`; `config` checks that itself.
    shown : str
        The default in the help text; the value itself when empty.
    recorded : bool
        Whether :func:`to_toml` writes it.
    """
    shown = shown or f"{default}"
    return field(default=default, metadata={
        "help": help, "choices": choices, "others": others, "shown": shown, "recorded": recorded, "allowed": allowed,
        "hint": f"the default is {shown}",
    })


def parse(config: type[T], argv: Sequence[str] | None, *, prog: str, description: str) -> T:
    """Return a `config` from defaults, the TOML file named by ``--config``, and the flags in `argv`, the last wins.

    A classmethod ``config.of_file(values, flags)``, where there is one, says which of the values of a file count.

    Raises
    ------
    SystemExit
        With status 2 and one line on stderr for an unknown flag or key (with the nearest known name) or a wrong value;
        with status 0 after ``--help``.
    """
    types = {name: _plain(kind) for name, kind in get_type_hints(config).items()}
    known = {f.name: f for f in fields(config)}  # type: ignore[arg-type]
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with any of the options below")
    for name, f in known.items():
        _add_flag(parser, name, f, types[name])
    flags = vars(parser.parse_args(argv))
    path: Path | None = flags.pop("config")
    of_file = getattr(config, "of_file", lambda values, _: values)
    try:
        return config(**of_file(_read(path, known, types) if path else {}, flags) | flags)
    except ConfigError as error:
        parser.error(str(error))


def check_device(device: str | None) -> None:
    """Raise `ConfigError` for a name that is none of a device: auto, cpu, cuda, or cuda with the number of a GPU."""
    if device is not None and not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9]\d?))?", device, re.ASCII):
        raise ConfigError(f"device={briefly(device)} is no device; take auto, cpu, cuda, or cuda:0 with the number of a GPU")


def refuse(text: object, prog: str = "mpi-ef") -> NoReturn:
    """End the program with status 2 and one line on stderr.

    Later ranks of a parallel start wait a moment: a launcher ends them when the first one has said the same.
    """
    if not first_task():
        sleep(_LATER_SECONDS)
    print(f"{prog}: {shown(text)}", file=sys.stderr)
    raise SystemExit(2)


def divided(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return what stands before the first ``--`` and is for this program, and what stands after it."""
    place = words.index("--") if "--" in words else len(words)
    return list(words[:place]), list(words[place + 1 :])


def to_toml(config: Any) -> str:
    """Return `config` as a TOML document that :func:`parse` reads back."""
    recorded = {f.name: getattr(config, f.name) for f in fields(config) if f.metadata["recorded"]}
    try:
        return "".join(f"{name} = {json.dumps(value, default=str, ensure_ascii=False)}\n"
                       for name, value in recorded.items() if value is not None).encode().decode()
    except UnicodeEncodeError as error:
        line = error.object[error.object.rfind("\n", 0, error.start) + 1 :].partition("\n")[0]
        raise ConfigError(f"{ascii(line)[1:-1]} is not UTF-8 and cannot be recorded; take another name") from None


class _Parser(argparse.ArgumentParser):
    """Complains in one line, with a did-you-mean for unknown flags."""

    def error(self, message: str) -> NoReturn:
        if "unrecognized arguments: " in message:
            flag = message.split("unrecognized arguments: ", 1)[1].split(maxsplit=1)[0].split("=", maxsplit=1)[0]
            if hint := nearest(flag, [s for a in self._actions for s in a.option_strings]):
                message += f"; {hint}"
        refuse(message, self.prog)


def _plain(kind: Any) -> Any:
    """Strip ``| None`` from a type."""
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (t for t in get_args(kind) if t is not NoneType)
    return kind


def _add_flag(parser: argparse.ArgumentParser, name: str, f: Field[Any], kind: Any) -> None:
    choices, others = f.metadata["choices"], f.metadata["others"]
    text = f"{f.metadata['help']} (default: {f.metadata['shown']})".replace("%", "%%")
    settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}  # so that only what is given overrides a file
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif others:
        settings["metavar"] = f"{{{','.join(choices)}}} | {others}" if choices else others
    elif choices:
        settings["choices"] = choices
    else:
        settings |= {"type": kind, "metavar": kind.__name__.upper()}
    parser.add_argument("--" + name.replace("_", "-"), **settings)


def _read(path: Path, known: dict[str, Field[Any]], types: dict[str, Any]) -> dict[str, Any]:
    try:
        document = read_toml(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}; write lines like steps = 100") from None
    values = {}
    for key, value in document.items():
        name = key.replace("-", "_")
        if name not in known:
            raise ConfigError(f"{path}: {key} is no option; {nearest(name, known, 'see --help')}")
        kind, choices = types[name], known[name].metadata["choices"]
        if choices and not known[name].metadata["others"] and value not in choices:
            raise ConfigError(f"{path}: {key} = {briefly(value)} is not known; take one of {', '.join(choices)}")
        if type(value) is not {Path: str}.get(kind, kind) and not (kind is float and type(value) is int):
            raise ConfigError(f"{path}: {key} = {briefly(value)} is {type(value).__name__}; it takes {kind.__name__}")
        values[name] = kind(value)
    return values
