"""Look for everything that goes wrong before the first step: ``mpi-ef doctor``, or ``srun mpi-ef doctor`` in a job.

Runs on a login node, without MPI if need be, and on all ranks of a job, as the training will. Exit status 1 when something
stops a training.
"""

import os
import platform
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from textwrap import wrap

from mpi_ef.jobs.doctor import all_ranks
from mpi_ef.jobs.doctor.checks import launcher, mpi
from mpi_ef.jobs.doctor.finding import Placement, RankFacts, Ranks
from mpi_ef.jobs.doctor.registry import Context, DoctorConfig, Launcher
from mpi_ef.jobs.doctor.report import Report, columns
from mpi_ef.jobs.doctor.watchdog import ExitMessage, Watchdog, error_text
from mpi_ef.jobs.options import parse

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Look at everything, print it on one of the ranks, and exit with status 1 when there is an error."""
    config = parse(DoctorConfig, argv, prog="mpi-ef doctor", description=__doc__ or "")
    here = Placement(node=platform.node())
    report = Report(Context(config, os.environ, here, [here], launcher=launcher.launcher_of(os.environ)))
    if report.context.launcher is not None:
        sys.exit(_launched(report, report.context.launcher))
    report.started_by = ", no launcher"
    report.context.mpi = {} if find_spec("mpi4py") is None else mpi.facts_of_process(config.patience)
    sys.exit(all_ranks.examine_alone(report))


def _launched(report: Report, launched: Launcher) -> int:
    """Look at all ranks, of which this process is one."""
    context, report.started_by = report.context, f", one of {launched.tasks} tasks of {launched.name}"
    first = launched.rank in (None, 0)  # which one prints as long as it is not known whether there is a world
    message = ExitMessage()

    def show_hanging(call: str) -> None:
        message.cancel()
        if first:
            report.show_hanging(call)

    watchdog = Watchdog(show_hanging, 0.0 if first else 10.0)
    watchdog.enter("the start of MPI (MPI_Init)", context.config.patience)
    try:
        context.mpi = mpi.facts_of_library()
        if first:
            message = ExitMessage(report.text([launcher.ended_at_start(context, launched)]))
        context.mpi |= mpi.start()
    except Exception as error:
        watchdog.leave()
        message.cancel()
        if first:
            context.mpi = {"problem": error_text(error)}
            return all_ranks.examine_alone(report)
        if launched.first_on_node:  # the others may be fine, and wait in MPI_Init
            task = f"task {launched.rank} on {platform.node()}"
            sys.stderr.write(f"mpi-ef doctor: {task} has no MPI: {error_text(error)}\n")
        return 0  # the status of the first is that of all; leaving early with another would get it killed
    message.cancel()
    if context.mpi["size"] == 1 and launched.tasks > 1:
        watchdog.leave()
        return _show_singleton_worlds(report) if first else 0
    from mpi4py import MPI

    context.comm = MPI.COMM_WORLD
    return all_ranks.examine(report, watchdog)


def _show_singleton_worlds(report: Report) -> int:
    """Print that the ranks are no world, and nothing else: all else would hold for one of the copies."""
    context = report.context
    report.add(launcher.judge(Ranks([RankFacts(context.placement, launcher.collect(context))])))
    if context.config.json:
        return report.show()
    [found], width = report.findings, columns()
    bar = "!" * width
    heading = "EVERY TASK IS RANK 0 OF ITS OWN WORLD: THE RANKS DO NOT SEE EACH OTHER"
    todo = wrap(f"What to do: {found.todo}", width, break_long_words=False, break_on_hyphens=False)
    lines = [bar, heading.center(width).rstrip(), bar, *wrap(found.what, width), "", *todo, bar]
    sys.stdout.write("\n".join([*lines, "verdict: 1 error: put this right first (lonely-ranks)", ""]))
    sys.stdout.flush()
    return report.status


if __name__ == "__main__":
    main()
