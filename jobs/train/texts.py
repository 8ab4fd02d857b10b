"""Codes and schemes by the texts that ``--code`` takes, where they would name themselves as Python objects. Needs no MPI."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from mpi_ef.errors import OptionError

__all__ = ["in_texts", "naming_texts"]

_OBJECT = re.compile(r"\b(FractionalRepetition|Cyclic|Blocks|GC|SRSGC|MSGC)\((\d+(?:, \d+)*)\)")
_TEXT = re.compile(r"\s*(\w+)\s*[:(]\s*(?:s\s*=\s*)?(\d+)(?:\s*,\s*(\d+)\s*,\s*(\d+))?\s*\)?\s*")
_NAMES = {"FractionalRepetition": "fr", "Cyclic": "cyclic", "Blocks": "blocks", "GC": "gc", "SRSGC": "srsgc", "MSGC": "msgc"}
_NUMBERS = ("burst", "window", "lam")


def in_texts(said: str, code: str = "") -> str:
    """Return a message with ``fr:1`` in place of ``FractionalRepetition(1)``, and so on. Local.

    Of one that refuses `code` the advice is whole texts, too: ``take s=3`` is ``take cyclic:3``, where `code` is another
    ``cyclic``; of ``srsgc`` and ``msgc`` the numbers are called as in ``--help``.
    """
    said = _OBJECT.sub(lambda found: f"{_NAMES[found[1]]}:{found[2].replace(' ', '')}", said)
    of = _TEXT.fullmatch(code)
    if not of:
        return said
    kind, numbers = _NAMES.get(of[1], of[1].lower()), dict(zip(_NUMBERS, of.groups()[1:], strict=True))
    wrong, take, advice = said.partition("; take ")
    if of[3] is None:
        advice = re.sub(r"\bs=(\d+)", rf"{kind}:\1", advice)
    else:
        advice = re.sub(r"\b(burst|window|lam)=(\d+)",
                        lambda found: f"{kind}:{','.join((numbers | {found[1]: found[2]}).values())}", advice)
        advice = re.sub(r"\bs=(\d+)", r"gc:\1", advice)
        for name, short in zip(_NUMBERS, ("B", "W", "LAM"), strict=True):
            wrong = re.sub(rf"\b{name}(?==| -)", short, wrong)  # not "a window has 2 rounds"
        wrong = re.sub(r"\b(SRSGC|MSGC)\b", lambda found: _NAMES[found[1]], wrong)
    return wrong + take + advice


@contextmanager
def naming_texts(code: str) -> Iterator[None]:
    """Let errors in the block that refuse a code name texts. Local."""
    try:
        yield
    except OptionError as error:
        error.args = (in_texts(str(error), code), *error.args[1:])
        raise
