"""What a report says of runs of one kind."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Section"]


@dataclass(frozen=True)
class Section:
    """What a report says of runs of one kind.

    Attributes
    ----------
    kind : str
        Of the program that wrote the runs; names the pictures where there are several.
    title, text : str
    draw : callable
        Draws into a file.
    """

    kind: str
    title: str
    text: str
    draw: Callable[[Path], None]
