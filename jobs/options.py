"""Command lines and TOML files made from a frozen dataclass: one description, no unknown key ignored."""

import argparse
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import MISSING, Field, asdict, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from mpi_ef.errors import ConfigError, nearest

__all__ = ["divided", "option", "parse", "refuse", "to_toml"]

T = TypeVar("T")


def option(
    default: Any, help: str, *, choices: Sequence[str] = (), others: str = "", shown: str = "", recorded: bool = True
) -> Any:
    """Return a dataclass field with a help text.

    Parameters
    ----------
    default : object
    help : str
    choices : sequence of str
        What it may be; anything of its type when empty.
    others : str
        What it may be besides `choices`, as the help text has it; `config` looks at that itself.
    shown : str
        What the help text says of the default; it itself when empty.
    recorded : bool
        Whether :func:`to_toml` writes it.
    """
    metadata = {"help": help, "choices": choices, "others": others, "shown": shown, "recorded": recorded}
    return field(default=default, metadata=metadata)


def parse(config: type[T], argv: Sequence[str] | None, *, prog: str, description: str) -> T:
    """Return a `config` from defaults, the TOML file named by ``--config``, and the flags in `argv`, the last wins.

    A classmethod ``config.of_file(values, flags)``, where there is one, says which of the values of a file count.

    Raises
    ------
    SystemExit
        With status 2 and one line on stderr for an unknown flag or key (with the nearest known name) or a wrong value;
        with status 0 after ``--help``.
    """
    types = get_type_hints(config)
    known = {f.name: f for f in fields(config)}  # type: ignore[arg-type]
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with any of the options below")
    for name, f in known.items():
        _add_flag(parser, name, f, types[name])
    given = vars(parser.parse_args(argv))
    path: Path | None = given.pop("config", None)
    try:
        values = _read(path, known, types) if path else {}
    except ConfigError as error:
        parser.error(str(error))
    flags = {name: value for name, value in given.items() if value is not _UNSET}
    of_file = getattr(config, "of_file", lambda values, _: values)
    values = of_file(values, flags) | flags
    try:
        return config(**values)
    except ConfigError as error:  # from __post_init__
        parser.error(str(error))


def refuse(text: object, prog: str = "mpi-ef") -> NoReturn:
    """End the program with status 2 and one line on stderr."""
    print(f"{prog}: {text}", file=sys.stderr)
    raise SystemExit(2)


def divided(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return what stands before the first ``--`` and is for this program, and what stands after it."""
    place = words.index("--") if "--" in words else len(words)
    return list(words[:place]), list(words[place + 1 :])


def to_toml(config: Any) -> str:
    """Return `config` as a TOML document that :func:`parse` reads back."""
    lines = []
    unrecorded = {f.name for f in fields(config) if not f.metadata["recorded"]}
    for name, value in asdict(config).items():
        if value is None or name in unrecorded:
            continue
        if isinstance(value, bool):
            text = str(value).lower()
        elif isinstance(value, int | float):
            text = repr(value)
        else:
            text = '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'
        lines.append(f"{name} = {text}\n")
    return "".join(lines)


class _Unset:
    """Stands for a flag that was not given, so that it does not override the file."""


_UNSET = _Unset()


class _Parser(argparse.ArgumentParser):
    """Complains in one line, with a did-you-mean for unknown flags."""

    def error(self, message: str) -> NoReturn:
        if "unrecognized arguments: " in message:
            flag = message.split("unrecognized arguments: ", 1)[1].split(maxsplit=1)[0].split("=", maxsplit=1)[0]
            if hint := nearest(flag, [s for a in self._actions for s in a.option_strings]):
                message += f"; {hint}"
        self.exit(2, f"{self.prog}: {message}\n")


def _plain(kind: Any) -> Any:
    """Strip ``| None`` from a type."""
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (t for t in get_args(kind) if t is not NoneType)
    return kind


def _choices(f: Field[Any], kind: Any) -> tuple[str, ...]:
    if get_origin(kind) is Literal:
        return get_args(kind)
    return () if f.metadata["others"] else tuple(f.metadata["choices"])


def _add_flag(parser: argparse.ArgumentParser, name: str, f: Field[Any], kind: Any) -> None:
    kind = _plain(kind)
    shown = f.metadata["shown"] or f"{f.default}"
    text = f"{f.metadata['help']} (default: {shown})".replace("%", "%%")
    settings: dict[str, Any] = {"default": _UNSET, "help": text}
    assert f.default is not MISSING  # noqa: S101
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif choices := _choices(f, kind):
        settings["choices"] = choices
    elif f.metadata["others"]:
        known = f"{{{','.join(f.metadata['choices'])}}}"
        settings["metavar"] = " | ".join([known] * bool(f.metadata["choices"]) + [f.metadata["others"]])
    else:
        settings |= {"type": kind, "metavar": kind.__name__.upper()}
    parser.add_argument("--" + name.replace("_", "-"), **settings)


def _read(path: Path, known: dict[str, Field[Any]], types: dict[str, Any]) -> dict[str, Any]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}; write lines like steps = 100") from None
    values = {}
    for key, value in document.items():
        name = key.replace("-", "_")
        if name not in known:
            raise ConfigError(f"{path}: {key} is no option; {nearest(name, known, 'see --help')}")
        kind = _plain(types[name])
        if choices := _choices(known[name], kind):
            if value not in choices:
                raise ConfigError(f"{path}: {key} = {value!r} is not known; take one of {', '.join(choices)}")
            values[name] = value
        elif kind is Path and isinstance(value, str):
            values[name] = Path(value)
        elif kind is float and type(value) is int:
            values[name] = float(value)
        elif type(value) is kind:
            values[name] = value
        else:
            raise ConfigError(f"{path}: {key} = {value!r} is {type(value).__name__}; it takes {kind.__name__}")
    return values
