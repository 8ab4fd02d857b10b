"""The doctor on all ranks of a world: checks of each rank, and what ranks do together; rank 0 judges the facts."""

import platform
from dataclasses import replace
from pathlib import Path
from time import sleep

from mpi_ef.comm.consensus import ranks_text
from mpi_ef.comm.protocol import MpiComm
from mpi_ef.jobs.doctor import checks, registry
from mpi_ef.jobs.doctor.checks.allreduce import MESSAGE_SECONDS
from mpi_ef.jobs.doctor.checks.mpi import name_of
from mpi_ef.jobs.doctor.checks.shared import leave_tokens
from mpi_ef.jobs.doctor.finding import Finding, finding
from mpi_ef.jobs.doctor.ranks import Facts, error_text, placements_of
from mpi_ef.jobs.doctor.registry import Check, Context
from mpi_ef.jobs.doctor.report import Report
from mpi_ef.jobs.doctor.watchdog import NoAnswerError, RankPoller, Watchdog
from mpi_ef.runtime import launch

__all__ = ["examine"]


def examine(context: Context, report: Report, watchdog: Watchdog) -> int:
    """Look at all ranks and return the exit status: that of the findings on rank 0, else 0. Collective.

    Ends the world when ranks are missing, or when messages are still under way that MPI would wait for.
    """
    from mpi4py import MPI

    examination = _Examination(context, report, watchdog)
    rank, patience = examination.poller.rank, context.config.patience
    try:
        complete = examination.run()
    except NoAnswerError as error:
        complete = False
        if rank == 0:
            report.add([_silent(error.ranks, patience)])
    except Exception as error:  # of the doctor itself: the others wait for this rank
        complete = False
        report.add([registry.failure("MPI", "doctor", error_text(error))])
    if rank == 0:
        report.show()
    if not complete or not examination.poller.sent(MESSAGE_SECONDS):
        if rank:
            sleep(2 * MESSAGE_SECONDS)  # rank 0 ends all, unless it is not there
        launch.abort(context.comm, 1)
    watchdog.enter("the end of MPI (MPI_Finalize)", patience)
    MPI.Finalize()
    watchdog.leave()
    return report.status


def _silent(ranks: list[int], patience: float) -> Finding:
    return finding("silent-ranks", ranks, ranks=ranks_text(ranks), longer=f"{2 * patience:.0f}")


class _Examination:
    """The steps, in the order in which all ranks take them."""

    def __init__(self, context: Context, report: Report, watchdog: Watchdog) -> None:
        self.context, self.report, self.watchdog = context, report, watchdog
        self.poller = RankPoller(context.world)
        self.tokens: dict[str, str] = {}  # on rank 0

    def run(self) -> bool:
        """Take all steps and return whether all messages have arrived. Collective."""
        self._place()
        try:
            tokens = self._check_each_rank()
            seen = self._step(checks.FOLDERS, replace(self.context, tokens=tokens))
        finally:
            for token in self.tokens.values():
                Path(token).unlink(missing_ok=True)
        if self.context.config.warmup:
            self._step(checks.WARM_UP, replace(self.context, shared_cache="kernels" in seen))
        true_on_all = [self._step(check, self.context) for check in (checks.SUM, checks.LINKS)]
        return all("arrived" in names for names in true_on_all)

    def _place(self) -> None:
        """Find out where the ranks are, before anything that takes time: silent ones are named with their node."""
        patience = self.context.config.patience
        self.watchdog.enter("the first call of MPI (MPI_Comm_split_type)", patience)
        local, leader = local_rank(self.context.world)
        self.watchdog.enter("the first messages", 4 * patience)
        placements = self.poller.exchange((platform.node(), local, leader), patience, placements_of)
        self.context = replace(self.context, placements=placements, placement=placements[self.poller.rank])

    def _check_each_rank(self) -> dict[str, str]:
        """Do the checks of each rank alone, and return the tokens that rank 0 has left for other nodes."""
        context, patience = self.context, self.context.config.patience
        longest = registry.longest_seconds(patience, checks.CHECKS)
        self.watchdog.enter("the checks of each rank", 4 * longest)

        def judge(found: list[dict[str, Facts]]) -> dict[str, str]:
            self.report.placements = context.placements
            launcher = context.launcher.name if context.launcher else ""
            self.report.started_by = f", {name_of(context.mpi)}, started by {launcher}"
            for check in checks.CHECKS:
                self.report.add(registry.judge(check, context.placements, [facts.get(check.name) for facts in found]))
            if context.nodes > 1:
                self.tokens = leave_tokens({name: found[0].get(name, {}).get("path") for name in ("folder", "kernels")})
            return self.tokens

        tokens: dict[str, str] = self.poller.exchange(
            registry.collect(context, patience, checks.CHECKS), longest, judge
        )
        return tokens

    def _step(self, check: Check, context: Context) -> set[str]:
        """Do a check that involves other ranks, and return which facts are true on all of them. Collective."""
        patience, placements = context.config.patience, context.placements
        seconds = check.seconds or patience
        found: list[Facts] = [{} for _ in placements]

        def reply(answers: list[Facts]) -> set[str]:
            for facts, answer in zip(found, answers, strict=True):
                facts.update(answer)
            taking_part = [facts for where, facts in zip(placements, found, strict=True) if check.concerns(where)]
            return {name for name in taking_part[0] if all(facts.get(name) is True for facts in taking_part)}

        for turn in range(check.turns):
            self.watchdog.enter(f"the check '{check.name}'", 2 * seconds + patience)
            mine = check.facts(replace(context, turn=turn), seconds)
            self.watchdog.enter(f"the check '{check.name}' on other ranks", 3 * (seconds + patience))
            agreed: set[str] = self.poller.exchange(mine or {}, seconds + patience, reply)
        if self.poller.rank == 0:
            self.report.add(registry.judge(check, placements, found))
        return agreed


def local_rank(comm: MpiComm) -> tuple[int, int]:
    """Return this rank's number on its node, and the first rank there. Collective."""
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    place = int(node.Get_rank()), int(node.bcast(comm.Get_rank()))
    node.Free()
    return place
