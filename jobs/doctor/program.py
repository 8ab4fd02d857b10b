"""Look for everything that goes wrong before the first step: ``mpi-ef doctor``, or ``srun mpi-ef doctor`` in a job.

Runs on a login node, without MPI if need be, and on all ranks of a job, as the training will. Exit status 1 when something
stops a training.
"""

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from textwrap import wrap
from typing import Any

from mpi_ef.jobs.doctor import checks, together
from mpi_ef.jobs.doctor.finding import Finding, Spot, Told
from mpi_ef.jobs.doctor.mpi import judge_mpi, library_facts, mpi_missing, start, start_in_a_child
from mpi_ef.jobs.doctor.report import DoctorConfig, Report, width_here
from mpi_ef.jobs.doctor.roll import FAILED, LastWord, Watch, bounded
from mpi_ef.jobs.doctor.world import Launcher, ended_at_start, judge_world, launcher_of, lonely
from mpi_ef.jobs.options import parse

__all__ = ["main"]


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
    found = checks.collect(checks.Asked(spot, os.environ, config.out), 2 * config.patience)
    report.add(checks.judge([Told(spot, found)], checks.Group(report.spots, config.warmup, launched=False)))
    if config.warmup:
        _warm_up_here(report, spot)
    report.show()
    return report.status


def _warm_up_here(report: Report, spot: Spot) -> None:
    def warm_up() -> dict[str, Any]:
        from mpi_ef.jobs.doctor import kernels

        return kernels.warm_up()

    told = [Told(spot, bounded(warm_up, together.COMPILING_SECONDS))]
    report.add(together.judge_warm_up(told, []))


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

    return together.examine(MPI.COMM_WORLD, facts, launcher, config, report, watch)


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
