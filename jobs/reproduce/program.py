"""Published experiments, run again: ``mpi-ef reproduce NAME`` (``--list`` says which there are).

Each writes metrics.jsonl, table.txt and a picture, and takes minutes on two ranks; the numbers do not depend on how many.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import DataError, briefly, nearest
from mpi_ef.jobs.folder import RunFolder, write_whole
from mpi_ef.jobs.metrics import announcing, made_here
from mpi_ef.jobs.options import parse, refuse
from mpi_ef.jobs.reproduce.outcome import Outcome, ReproduceConfig
from mpi_ef.runtime import launch

__all__ = ["EXPERIMENTS", "Experiment", "main"]

_UNDER_ATTACK = ("attack", "seeds", "search_every")
PROOF = "table.txt"  # what only a finished experiment has


@dataclass(frozen=True)
class Experiment:
    """What an experiment shows, the function that runs it, of a module here, and options that not all of them take."""

    text: str
    function: str
    takes: tuple[str, ...] = ()
    module: str = "experiments"

    def run(self, comm: Comm, config: ReproduceConfig) -> Outcome:
        """Run it. Collective."""
        outcome: Outcome = getattr(import_module(f"mpi_ef.jobs.reproduce.{self.module}"), self.function)(comm, config)
        return outcome


EXPERIMENTS: Mapping[str, Experiment] = {
    "ef21": Experiment("EF21, EF14, EF21+ and gradient descent on four LIBSVM sets (arXiv 2106.05203)", "ef21",
                       ("data", "methods")),
    "econtrol": Experiment("EControl and others on least squares over zeta (arXiv 2311.05645)", "econtrol", ("methods",)),
    "speedup": Experiment("stochastic methods over the number of clients: EControl's linear speed-up", "speedup",
                          ("methods",)),
    "stability": Experiment("EControl over eta and the step size", "stability"),
    "counterexample": Experiment("EF21-SGD does not converge in two dimensions, SGDM and EControl do (arXiv 2305.15155)",
                                 "counterexample", ("methods",)),
    "ef21-w": Experiment("EF21-W against EF21, 1000 clients of different smoothness (arXiv 2402.10774)", "weights"),
    "ef21-rare": Experiment("EF21 where features are rare, with larger step sizes (arXiv 2305.15264)", "rare"),
    "ef21-pp": Experiment("EF21-PP with 100 to 12.5 % of 20 clients (arXiv 2110.03294)", "participation", ("data",)),
    "ef21-bc": Experiment("EF21-BC: Top-2 up, Top-2 to everything down (arXiv 2110.03294)", "bidirectional", ("data",)),
    "mkor": Experiment("MKOR's forms, Eva and K-FAC under AdamW, SGD, Top-1 % and EF21 (arXiv 2306.01685); half an hour on "
                       "2 ranks", "mkor", module="second_order"),
    "monna": Experiment("MoNNA and others under attack, 26 clients of which 5 are wrong (arXiv 2209.10931)", "monna",
                        _UNDER_ATTACK, module="monna"),
    "byz-ef21": Experiment("Byz-EF21 and Byz-EF21-SGDM under attack, 20 clients of which 4 are wrong (arXiv 2310.09804)",
                           "byz_ef21", ("data", *_UNDER_ATTACK), module="byz_ef21"),
    "sequential": Experiment("sequential gradient coding, simulated: 32 workers that are slow in bursts (arXiv 2211.13802)",
                             "sequential", module="sequential"),
    "berrut": Experiment("BACC and SBACC: any function of blocks, answers lost, workers that are wrong (arXiv 2507.01330)",
                         "berrut", module="berrut"),
    "gradient-coding": Experiment("gradient codes (Tandon et al. 2017) with EF21 where workers are late or die; times on 4 "
                                  "ranks or more", "gradient_coding", ("data",), module="gradient_coding"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment named first on COMM_WORLD."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--list"]:
        print("\n".join(f"{name:<16}{experiment.text}" for name, experiment in EXPERIMENTS.items()))
        return
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    config = parse(ReproduceConfig, arguments, prog="mpi-ef reproduce NAME", description=__doc__ or "")
    if name is None or name not in EXPERIMENTS:
        hint = nearest(str(name), EXPERIMENTS, f"take one of {', '.join(EXPERIMENTS)}")
        refuse(f"there is no experiment {briefly(name)}; {hint}", "mpi-ef reproduce")
    for option in ("data", "methods", *_UNDER_ATTACK):
        if (value := getattr(config, option)) is not None and option not in EXPERIMENTS[name].takes:
            takers = ", ".join(other for other, experiment in EXPERIMENTS.items() if option in experiment.takes)
            refuse(f"{option}={value} has no effect with {name}; it goes with {takers}", "mpi-ef reproduce")
    launch.run(lambda comm: run(comm, name, config))


def run(comm: Comm, name: str, config: ReproduceConfig) -> None:
    """Run one experiment and let rank 0 write what came out. Collective."""
    folder = RunFolder(comm, config.out / name)
    try:
        folder.begin(PROOF, overwrite=config.overwrite)
        with announcing(comm):
            outcome = EXPERIMENTS[name].run(comm, config)
        made = made_here(comm)
        if comm.Get_rank() == 0:
            with folder.writing():
                facts = {"experiment": name, "ranks": comm.Get_size(), "steps": config.steps, **made}
                asked = {name: value for name in ("methods", *_UNDER_ATTACK) if (value := getattr(config, name))}
                _write(outcome, folder.path, facts | asked)
    finally:
        folder.close()


def _write(outcome: Outcome, folder: Path, facts: dict[str, Any]) -> None:
    """Write everything, the table last: with it the experiment counts as finished."""
    lines = [json.dumps(row) + "\n" for row in outcome.rows]
    summary = json.dumps(facts | {"data": outcome.data}, indent=2) + "\n"
    for name, text in (("metrics.jsonl", "".join(lines)), ("summary.json", summary), (PROOF, outcome.table + "\n")):
        write_whole(folder / name, text)
    print(outcome.table)
    try:
        outcome.draw(folder / f"{facts['experiment']}.png")
    except DataError as error:  # without matplotlib the numbers are still there
        print(f"\nno picture: {error}")
    print(f"\nwritten to {folder}")
