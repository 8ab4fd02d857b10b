"""Look for everything that goes wrong before the first step: ``mpi-ef doctor``, or ``srun mpi-ef doctor`` in a job.

Runs on a login node, without MPI if need be, and on all ranks of a job, as the training will. Exit status 1 when something
stops a training.
"""

import os
import platform
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap
from typing import Any

import mpi_ef
from mpi_ef.errors import ConfigError
from mpi_ef.jobs import doctor_checks, doctor_together
from mpi_ef.jobs.config import option, parse
from mpi_ef.jobs.doctor_finding import Finding, Spot, Told, document, page, status_of
from mpi_ef.jobs.doctor_mpi import judge_mpi, library_facts, mpi_missing, start, start_in_a_child
from mpi_ef.jobs.doctor_roll import FAILED, LastWord, Watch, bounded
from mpi_ef.jobs.doctor_world import Launcher, ended_at_start, judge_world, launcher_of, lonely

__all__ = ["DoctorConfig", "Report", "main"]


@dataclass(frozen=True)
class DoctorConfig:
    """Options of the doctor; every field is a flag."""

    out: Path = option(Path("runs"), "folder that runs write to; what checkpoints need is tried there")
    warmup: bool = option(False, "compile the kernels: one rank of each node first, then the others load them")
    json: bool = option(False, "print all findings as JSON")
    patience: float = option(60.0, "seconds after which a check that does not come back counts as hanging")

    def __post_init__(self) -> None:
        if not self.patience > 0:
            raise ConfigError(f"patience={self.patience} is not positive; take for example 60")


class Report:
    """What is found, and printing it once.

    Parameters
    ----------
    config : DoctorConfig
    """

    def __init__(self, config: DoctorConfig) -> None:
        self._json = config.json
        self._shown = False
        self.spots: Sequence[Spot] = (Spot(node=platform.node()),)
        self.findings: list[Finding] = []
        self.started_by, self.launched = "", False

    def add(self, findings: Iterable[Finding]) -> None:
        """Take findings; when finding them breaks, that is one."""
        try:
            for finding in findings:
                self.findings.append(finding)  # one by one: those before an error stay
        except Exception as error:
            self.findings.append(doctor_checks.failure("MPI", "judgement", f"{type(error).__name__}: {error}"))

    @property
    def status(self) -> int:
        """Exit status."""
        return status_of(self.findings)

    def text(self, findings: Sequence[Finding]) -> str:
        """Return the page with these findings, or the document."""
        nodes = list(dict.fromkeys(spot.node for spot in self.spots))
        if self._json:
            return document(findings, version=mpi_ef.__version__, ranks=len(self.spots), nodes=nodes)
        # Some launchers give every rank a terminal, whatever becomes of what it prints.
        color = not self.launched and sys.stdout.isatty() and "NO_COLOR" not in os.environ
        many, some = len(self.spots), len(nodes)
        where = f"{many} rank{'s' if many > 1 else ''} on {nodes[0] if some == 1 else f'{some} nodes'}"
        title = f"mpi-ef doctor {mpi_ef.__version__}: {where}{self.started_by}"
        return page(title, findings, width=width_here(), color=color)

    def show(self) -> None:
        """Print everything, if that was not done yet."""
        if not self._shown:
            self._shown = True
            sys.stdout.write(self.text(self.findings) + "\n")  # in one piece: nothing of other ranks gets in between
            sys.stdout.flush()

    def hangs(self, what: str) -> None:
        """Say that the doctor itself hangs, and print what is known."""
        self.add(
            [
                Finding(
                    "MPI",
                    "hangs",
                    "error",
                    f"{what} does not come back",
                    "look at the launcher and at --mpi= (srun --mpi=list), at the network that MPI has chosen "
                    "(UCX_NET_DEVICES, FI_PROVIDER, OMPI_MCA_btl_tcp_if_include), and at the nodes; mpi-ef doctor "
                    "--patience S waits longer",
                )
            ]
        )
        self.show()


def width_here() -> int:
    """Return how many columns a page has here."""
    return min(120, max(80, shutil.get_terminal_size((100, 24)).columns))


def main(argv: Sequence[str] | None = None) -> None:
    """Look at everything, print it on one of the ranks, and exit with status 1 when there is an error."""
    config = parse(DoctorConfig, argv, prog="mpi-ef doctor", description=__doc__ or "")
    launcher = launcher_of(os.environ)
    report = Report(config)
    sys.exit(_alone(config, report) if launcher is None else _launched(config, report, launcher))


def _alone(config: DoctorConfig, report: Report) -> int:
    """Look at one process that nobody has launched."""
    facts = {FAILED: ""} if find_spec("mpi4py") is None else start_in_a_child(config.patience)
    _tell_of_mpi(report, facts)
    report.add(judge_world(1, None))
    report.started_by = ", no launcher"
    return _look_here(config, report)


def _tell_of_mpi(report: Report, facts: Mapping[str, Any]) -> None:
    missing = mpi_missing(facts, launched=report.launched)
    report.add([missing] if missing else judge_mpi([Told(report.spots[0], facts)]))


def _look_here(config: DoctorConfig, report: Report) -> int:
    spot = report.spots[0]
    found = doctor_checks.collect(doctor_checks.Asked(spot, os.environ, config.out), 2 * config.patience)
    report.add(
        doctor_checks.judge([Told(spot, found)], doctor_checks.Group(report.spots, config.warmup, launched=False))
    )
    if config.warmup:
        _warm_up_here(report, spot)
    report.show()
    return report.status


def _warm_up_here(report: Report, spot: Spot) -> None:
    def warm_up() -> dict[str, Any]:
        from mpi_ef.jobs import doctor_kernels

        return doctor_kernels.warm_up()

    told = [Told(spot, bounded(warm_up, doctor_together.COMPILING_SECONDS))]
    report.add(doctor_together.judge_warm_up(told, []))


def _launched(config: DoctorConfig, report: Report, launcher: Launcher) -> int:
    """Look at all ranks, of which this process is one."""
    report.launched = True
    report.started_by = f", one of {launcher.tasks} tasks of {launcher.name}"
    first = launcher.rank in (None, 0)  # who speaks as long as nobody knows whether there is a world
    words = LastWord("")

    def hangs(what: str) -> None:
        words.take_back()
        if first:
            report.hangs(what)

    watch = Watch(hangs, 0.0 if first else 10.0)
    watch.enter("the start of MPI (MPI_Init)", config.patience)
    try:
        facts = library_facts()
        if first:
            words = LastWord(report.text([ended_at_start(launcher, facts, os.environ)]))
        facts |= start()
    except Exception as error:
        watch.leave()
        words.take_back()
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if not first:
            if launcher.first_on_node:  # the others may be fine, and wait in MPI_Init
                sys.stderr.write(f"mpi-ef doctor: task {launcher.rank} on {platform.node()} has no MPI: {reason}\n")
            return 0  # the status of the first is that of all; leaving early with another would get it killed
        _tell_of_mpi(report, {FAILED: reason})
        return _look_here(config, report)
    words.take_back()
    if facts["size"] == 1 and launcher.tasks > 1:
        watch.leave()
        return _cry(report, lonely(launcher, facts, os.environ), config) if first else 0
    from mpi4py import MPI

    return doctor_together.examine(MPI.COMM_WORLD, facts, launcher, config, report, watch)


def _cry(report: Report, finding: Finding, config: DoctorConfig) -> int:
    """Say that the ranks are no world, and nothing else: all else would be said of one of the copies."""
    report.add([finding])
    if config.json:
        report.show()
        return report.status
    width = width_here()
    bar = "!" * width
    heading = "EVERY TASK IS RANK 0 OF ITS OWN WORLD: THE RANKS DO NOT SEE EACH OTHER"
    todo = wrap(f"What to do: {finding.todo}", width, break_long_words=False, break_on_hyphens=False)
    lines = [bar, heading.center(width).rstrip(), bar, *wrap(finding.what, width), "", *todo, bar]
    sys.stdout.write("\n".join(lines) + "\nverdict: 1 error: put this right first (lonely-ranks)\n")
    sys.stdout.flush()
    return report.status


if __name__ == "__main__":
    main()
