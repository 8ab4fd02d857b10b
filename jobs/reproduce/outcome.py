"""Options and results of an experiment."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpi_ef.jobs.methods import methods_in
from mpi_ef.jobs.options import Checked, option

__all__ = ["Outcome", "ReproduceConfig"]

DATA = Path("../shared/data")


@dataclass(frozen=True)
class ReproduceConfig(Checked):
    """Options of all experiments; every field is a flag."""

    data: Path | None = option(
        None, "folder with phishing, mushrooms, a9a, w8a as LIBSVM files, plain or .xz, for the experiments on these",
        shown=str(DATA))
    out: Path = option(Path("runs/reproduce"), "folder for what is written; the experiment gets a folder of its own in it")
    steps: int = option(0, "other than as many steps as the experiment wants", 0)
    methods: str | None = option(
        None, "compare these methods: RULE COMPRESSOR, separated by semicolons, such as 'econtrol(eta=0.1) TopK(0.05); "
        "my_module:RULE my_module:Mine(3)'", shown="those of the experiment")
    attack: str | None = option(
        None, "attack with these: names, separated by commas, with a number where one is wanted: 'alie, ipm(2)'",
        shown="those of the experiment")
    seeds: int | None = option(None, "train with so many seeds, and compare means", 1, shown="3")
    search_every: int | None = option(
        None, "steps between two searches of the factors of alie and foe", 1, shown="20")
    overwrite: bool = option(False, "replace what the experiment has left in --out before")

    def __post_init__(self) -> None:
        super().__post_init__()
        methods_in(self.methods, plans=False)
        if self.attack is not None:
            from mpi_ef.jobs.reproduce.attacks import attacks_in

            attacks_in(self.attack)

    @property
    def folder(self) -> Path:
        """Where data are looked for."""
        return DATA if self.data is None else self.data


@dataclass
class Outcome:
    """The results of an experiment."""

    rows: list[dict[str, Any]]  # of its metrics
    table: str
    draw: Callable[[Path], None]  # into a file
    data: dict[str, str] = field(default_factory=dict)  # by their names, the content of the files that were read
