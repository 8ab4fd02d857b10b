"""Texts that name gradient codes."""

import re

from mpi_ef.errors import OptionError, briefly

from .blocks import Blocks
from .codes import Cyclic, FractionalRepetition, GradientCode

__all__ = ["code_of"]

_KINDS: dict[str, type[GradientCode]] = {"fr": FractionalRepetition, "cyclic": Cyclic, "blocks": Blocks}
_SHORT = re.compile(r"(fr|cyclic|blocks)\s*:\s*(\d+)", re.IGNORECASE)
_LONG = re.compile(r"(FractionalRepetition|Cyclic|Blocks)\(\s*(?:s\s*=\s*)?(\d+)\s*(?:,\s*votes\s*=\s*(\d+)\s*)?\)")


def code_of(text: str | GradientCode) -> GradientCode:
    """Return the code that a text names: ``fr:1``, ``cyclic:2``, ``blocks:3``, or as codes print themselves. Local.

    Raises
    ------
    OptionError
        ``"code 'mds:1' is not known; take for example fr:1"``
    """
    if isinstance(text, GradientCode):
        return text
    words = str(text).strip()
    if match := _SHORT.fullmatch(words):
        return _KINDS[match[1].lower()](int(match[2]))
    if match := _LONG.fullmatch(words):
        kind = next(kind for kind in _KINDS.values() if kind.__name__ == match[1])
        if match[3] is None:
            return kind(int(match[2]))
        if kind is FractionalRepetition:
            return FractionalRepetition(int(match[2]), int(match[3]))
    raise OptionError(f"code {briefly(text)} is not known; take fr:1, cyclic:1 or blocks:1, where the number is how many "
                      "workers may be missing")
