"""Pictures: the only module that imports matplotlib."""

from pathlib import Path
from typing import Any

from mpi_ef.errors import DataError
from mpi_ef.jobs.folder import replacing

__all__ = ["pyplot", "save"]


def pyplot() -> Any:
    """Return matplotlib.pyplot, drawing to files only.

    Raises
    ------
    DataError
        When matplotlib is not installed.
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        raise DataError("a picture needs matplotlib, which is not installed; pip install matplotlib") from None
    return plt


def save(figure: Any, path: Path) -> None:
    """Write the figure, in the format of the file's ending, and close it."""
    try:
        with replacing(path) as draft:
            figure.savefig(draft, dpi=120)
    except (DataError, ValueError) as error:  # ValueError: an unknown format
        raise DataError(f"{path}: the picture cannot be written ({error}); name a .png or .svg file") from None
    finally:
        pyplot().close(figure)
