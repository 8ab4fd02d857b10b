"""The checks on all ranks of a world, one after the other: facts of each rank, judged on rank 0."""

import platform
from time import sleep

from mpi_ef.comm.consensus import ranks_text
from mpi_ef.comm.protocol import MpiComm
from mpi_ef.errors import MpiEfError
from mpi_ef.jobs.doctor import checks, registry
from mpi_ef.jobs.doctor.checks.allreduce import MESSAGE_SECONDS
from mpi_ef.jobs.doctor.checks.mpi import name_of
from mpi_ef.jobs.doctor.checks.shared import tokens_in
from mpi_ef.jobs.doctor.finding import FAILED, Facts, Finding, Placement, finding
from mpi_ef.jobs.doctor.registry import Check, Context
from mpi_ef.jobs.doctor.report import Report
from mpi_ef.jobs.doctor.watchdog import NoAnswerError, RankPoller, Watchdog, error_text
from mpi_ef.runtime import launch

__all__ = ["examine", "examine_alone"]

_LESS_PATIENCE = 10.0  # seconds for a check that comes after one that hangs: what is dead may stop all of them

_ALONE = "--advise: one rank exchanges nothing; start as many as a training has, mpirun -n 8 mpi-ef doctor --advise 25000000"


def examine(report: Report, watchdog: Watchdog) -> int:
    """Look at all ranks and return the exit status: that of the findings on rank 0, else 0. Collective.

    Ends the world when ranks are missing, or when messages are still under way that MPI would wait for.
    """
    from mpi4py import MPI

    examination = _Examination(report, watchdog)
    rank, patience = examination.poller.rank, report.context.config.patience
    try:
        complete = examination.run()
    except NoAnswerError as error:
        complete = False
        if rank == 0:
            report.add([_silent(error.ranks, patience)])
    except Exception as error:  # of the doctor itself: the others wait for this rank
        complete = False
        report.add([registry.failure("MPI", "doctor", error_text(error))])
    registry.remove_trials()
    advised = ""
    if complete and report.context.config.advise:
        watchdog.enter("the measurement of links (--advise)", 10 * patience)
        advised = _advised(report.context)
        watchdog.leave()
    if rank == 0:
        report.show(advised)
    if not complete or not examination.poller.sent(MESSAGE_SECONDS):
        if rank:
            sleep(2 * MESSAGE_SECONDS)  # rank 0 ends all, unless it is not there
        launch.abort(report.context.comm, 1)
    watchdog.enter("the end of MPI (MPI_Finalize)", patience)
    MPI.Finalize()
    watchdog.leave()
    return report.status


def _advised(context: Context) -> str:
    """Return what is known of plans for so many parameters. Collective."""
    from mpi_ef.collectives import advise
    from mpi_ef.compress import Quantize, TopK

    if context.world.Get_size() == 1:
        return _ALONE
    try:
        found = advise(context.world, context.config.advise, TopK(context.config.ratio, values=Quantize("bf16")))
    except MpiEfError as error:
        return str(error)
    return f"{found.table()}\ntake it: --plan \"{found.specification}\" of mpi-ef train, plan=... of optimizers"


def examine_alone(report: Report) -> int:
    """Look at this process, which is no rank of a world, and return the exit status. Local."""
    watchdog = Watchdog(report.show_hanging)
    _Examination(report, watchdog).check_each_rank(2 * report.context.config.patience)
    watchdog.leave()
    registry.remove_trials()
    return report.show(_ALONE if report.context.config.advise else "")


def _silent(ranks: list[int], patience: float) -> Finding:
    return finding("silent-ranks", ranks, ranks=ranks_text(ranks), longer=f"{2 * patience:.0f}")


class _Examination:
    """The steps, in the order in which all ranks take them."""

    def __init__(self, report: Report, watchdog: Watchdog) -> None:
        self.report, self.watchdog = report, watchdog
        self.context, self.patience = report.context, report.context.config.patience
        self.poller = RankPoller(self.context.comm)
        self.paths: dict[str, str] = {}  # on rank 0, folders that checks have looked at
        self.hanging = False  # whether a check has not come back here

    def run(self) -> bool:
        """Take all steps and return whether all messages have arrived. Collective."""
        self._place()
        self.check_each_rank(self.patience)
        true_on_all = [self._step(check) for check in (checks.SUM, checks.LINKS)]
        return all("arrived" in names for names in true_on_all)

    def _place(self) -> None:
        """Find out where the ranks are, before anything that takes time: silent ones are named with their node."""
        context = self.context
        self.watchdog.enter("the first call of MPI (MPI_Comm_split_type)", self.patience)
        local, leader = local_rank(context.world)
        self.watchdog.enter("the first messages", 4 * self.patience)
        context.placements = self.poller.exchange((platform.node(), local, leader), self.patience, placements_of)
        context.placement = context.placements[self.poller.rank]
        self.report.started_by = f", {name_of(context.mpi)}, started by {context.launcher.name if context.launcher else ''}"

    def check_each_rank(self, seconds: float) -> None:
        """Do the checks that call no MPI, each within so many seconds, fewer once one has not come back. Collective."""
        for check in checks.CHECKS:
            self._step(check, min(seconds, _LESS_PATIENCE) if self.hanging else seconds)
        if self.context.nodes > 1:
            with tokens_in(self.paths) as tokens:
                self.context.tokens = self.poller.exchange(None, self.patience, lambda _: tokens)
                self.context.shared_cache = "kernels" in self._step(checks.FOLDERS)
        if self.context.config.warmup:
            self._step(checks.WARM_UP)

    def _step(self, check: Check, seconds: float = 0.0) -> set[str]:
        """Do a check, and return which facts are true on all ranks that take part. Collective."""
        placements, seconds = self.context.placements, seconds or check.seconds or self.patience
        found: list[Facts] = [{} for _ in placements]

        def reply(answers: list[Facts]) -> set[str]:
            for facts, answer in zip(found, answers, strict=True):
                facts.update(answer)
            taking_part = [facts for where, facts in zip(placements, found, strict=True) if check.concerns(where)]
            return {name for name in taking_part[0] if all(facts.get(name) is True for facts in taking_part)}

        for turn in range(check.turns):
            self.context.turn = turn
            self.watchdog.enter(f"the check '{check.name}'", 2 * seconds + self.patience)
            mine = check.facts(self.context, seconds)
            self.hanging |= str(mine.get(FAILED, "")).startswith("no end")
            self.watchdog.enter(f"the check '{check.name}' on other ranks", 3 * (seconds + self.patience))
            agreed: set[str] = self.poller.exchange(mine, seconds + self.patience, reply)
        if self.poller.rank == 0:
            if path := found[0].get("path"):
                self.paths[check.name] = path
            self.report.add(registry.judge(check, placements, found))
        return agreed


def placements_of(answers: list[tuple[str, int, int]]) -> list[Placement]:
    """Return where the ranks are, from host, number on the node, and first rank of the node of every rank.

    Nodes are what shares memory, and are named by their hosts.
    """
    numbers: dict[str, dict[int, int]] = {}  # of the nodes of a host, by their first ranks
    for host, _, leader in answers:
        numbers.setdefault(host, {}).setdefault(leader, len(numbers[host]) + 1)
    return [Placement(rank, host if len(numbers[host]) == 1 else f"{host}#{numbers[host][leader]}", local)
            for rank, (host, local, leader) in enumerate(answers)]


def local_rank(comm: MpiComm) -> tuple[int, int]:
    """Return this rank's number on its node, and the first rank there. Collective."""
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    place = int(node.Get_rank()), int(node.bcast(comm.Get_rank()))
    node.Free()
    return place
