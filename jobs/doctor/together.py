"""The doctor on all ranks of a world: what each has found goes to rank 0, then they try things together."""

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any, NoReturn

from mpi_ef.jobs.doctor import checks
from mpi_ef.jobs.doctor.finding import Finding, Spot, Told, nodes_text, ranks_text
from mpi_ef.jobs.doctor.mpi import judge_mpi
from mpi_ef.jobs.doctor.roll import FAILED, Roll, SilenceError, Watch, bounded, wait_for
from mpi_ef.jobs.doctor.world import Launcher, judge_world
from mpi_ef.runtime import launch

if TYPE_CHECKING:
    from mpi_ef.jobs.doctor.report import DoctorConfig, Report

__all__ = ["COMPILING_SECONDS", "examine", "judge_shared", "judge_warm_up", "spots_of"]

COMPILING_SECONDS = 900.0
_MESSAGE_SECONDS = 10.0
_SEEING_SECONDS = 3.0

Facts = dict[str, Any]


def examine(
    comm: Any, mpi: Mapping[str, Any], launcher: Launcher, config: "DoctorConfig", report: "Report", watch: Watch
) -> int:
    """Look at all ranks and return the exit status: that of the findings on rank 0, else 0. Collective.

    Ends the world when ranks are missing, or when messages are still under way that MPI would wait for.
    """
    from mpi4py import MPI

    examination = _Examination(comm, config, report, watch)
    try:
        dead = examination.run(mpi, launcher)
    except SilenceError as silence:
        if examination.roll.rank == 0:
            report.add([_silent(silence.ranks, config.patience)])
        dead = True
    except Exception as error:  # of the doctor itself: the others wait for this rank
        report.add([checks.failure("MPI", "doctor", f"{type(error).__name__}: {error}")])
        dead = True
    if examination.roll.rank == 0:
        report.show()
    if dead or not examination.roll.sent(_MESSAGE_SECONDS):
        _end(comm, speaks=examination.roll.rank == 0)
    watch.enter("the end of MPI (MPI_Finalize)", config.patience)
    MPI.Finalize()
    watch.leave()
    return report.status


def _end(comm: Any, *, speaks: bool) -> NoReturn:
    if not speaks:
        sleep(2 * _MESSAGE_SECONDS)  # rank 0 ends all, unless it is not there
    launch.abort(comm, 1)


def _silent(ranks: Sequence[int], seconds: float) -> Finding:
    return Finding(
        "MPI",
        "silent-ranks",
        "error",
        f"no answer from {ranks_text(ranks)}: they hang, or messages do not arrive",
        "run it on fewer nodes to find the one (sbatch --exclude=...); choose the network by UCX_NET_DEVICES, "
        f"FI_PROVIDER, OMPI_MCA_btl_tcp_if_include; --patience {2 * seconds:.0f} waits longer",
        tuple(ranks),
    )


class _Examination:
    """The steps, in the order in which all ranks take them."""

    def __init__(self, comm: Any, config: "DoctorConfig", report: "Report", watch: Watch) -> None:
        self.comm, self.config, self.report, self.watch = comm, config, report, watch
        self.roll = Roll(comm)
        self.spots: list[Spot] = []
        self.tokens: dict[str, str] = {}

    def run(self, mpi: Mapping[str, Any], launcher: Launcher) -> bool:
        """Take all steps and return whether messages are left that will never arrive. Collective."""
        word = self._look(mpi, launcher)
        try:
            together = self._see_folders(word)
        finally:
            for token in self.tokens.values():  # only rank 0 has any
                Path(token).unlink(missing_ok=True)
        if self.config.warmup:
            self._compile(together)
        return self._try_network(word["rounds"], word["nodes"])

    def _together(
        self, what: str, action: Callable[[], Facts], seconds: float, word: Callable[[list[Facts]], Any]
    ) -> Any:
        """Do something that involves other ranks, bring what it has found to rank 0, and return the word of that one."""
        self.watch.enter(what, 2 * seconds + self.config.patience)
        try:
            mine = action()
        except Exception as error:
            mine = {FAILED: f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        self.watch.enter(f"{what} (the answers)", 3 * (seconds + self.config.patience))
        return self.roll.call(mine, seconds + self.config.patience, word)[1]

    def _told(self, facts: Sequence[Facts], some: Callable[[Spot], bool] = lambda _: True) -> list[Told]:
        return [Told(spot, mine) for spot, mine in zip(self.spots, facts, strict=True) if some(spot)]

    def _look(self, mpi: Mapping[str, Any], launcher: Launcher) -> dict[str, Any]:
        """Do the checks of this rank alone; rank 0 judges them, and says what comes next."""
        patience = self.config.patience
        self.watch.enter("the first call of MPI (MPI_Comm_split_type)", patience)
        local, leader = _place(self.comm)
        # Where the ranks are, before anything that takes time: whoever is silent later can be named with its node.
        self.watch.enter("the first messages", 4 * patience)
        _, labels = self.roll.call((platform.node(), local, leader), patience, spots_of)
        spot = labels[self.roll.rank]
        self.spots = labels
        longest = checks.longest_seconds(patience)
        self.watch.enter("the checks of each rank", 4 * longest)
        mine = checks.collect(checks.Asked(spot, os.environ, self.config.out), patience)

        def judge(found: list[tuple[Facts, Facts]]) -> dict[str, Any]:
            self.report.spots = self.spots
            told = self._told([facts for facts, _ in found])
            self.report.started_by = f", {told[0]['library']} {told[0]['release']}, started by {launcher.name}"
            self.report.add([*judge_mpi(told), *judge_world(len(self.spots), launcher)])
            group = checks.Group(self.spots, self.config.warmup)
            self.report.add(checks.judge(self._told([facts for _, facts in found]), group))
            self.tokens = self._leave_tokens(found[0][1])
            return {"tokens": self.tokens, "rounds": _rounds(self.spots), "nodes": {s.rank: s.node for s in self.spots}}

        word: dict[str, Any] = self.roll.call((dict(mpi), mine), longest, judge)[1]
        return word

    def _leave_tokens(self, facts: Mapping[str, Facts]) -> dict[str, str]:
        """Leave files that ranks on other nodes look for."""
        from mpi_ef.jobs.doctor.files import leave_token

        tokens = {}
        for check in ("folder", "kernels"):
            path = facts.get(check, {}).get("path")
            if path and len({spot.node for spot in self.spots}) > 1:
                try:
                    tokens[check] = str(leave_token(Path(path)))
                except OSError:
                    continue  # the check itself has told
        return tokens

    def _see_folders(self, word: Mapping[str, Any]) -> bool:
        """Look which folders all nodes see, and return whether the cache of the kernels is one of them."""
        here = self.spots[self.roll.rank].local == 0

        def judge(seen: list[Facts]) -> bool:
            told = self._told(seen, lambda spot: spot.local == 0)
            paths = {check: str(Path(token).parent) for check, token in self.tokens.items()}
            self.report.add(checks.failures("folders of other nodes", "Files", told))
            self.report.add(judge_shared([one for one in told if one[FAILED] is None], paths))
            return "kernels" in self.tokens and all(one["kernels"] for one in told)

        def look() -> Facts:
            tokens = {check: Path(token) for check, token in word["tokens"].items()}
            # A network's file system may take a moment to tell another node.
            wait_for(lambda: all(token.exists() for token in tokens.values()), _SEEING_SECONDS, rest=0.2)
            return {check: token.exists() for check, token in tokens.items()}

        patience = self.config.patience
        return bool(
            self._together("looking at folders", lambda: bounded(look, patience) if here else {}, patience, judge)
        )

    def _compile(self, shared: bool) -> None:
        """Let one rank of every node compile, one of all where they share the place; then let the others load."""
        spot = self.spots[self.roll.rank]

        def comes_first(spot: Spot) -> bool:
            return spot.rank == 0 or (spot.local == 0 and not shared)

        def warm_up(now: bool) -> Facts:
            from mpi_ef.jobs.doctor import kernels

            return kernels.warm_up() if now else {}

        first: list[Facts] = []
        self._together("compiling", lambda: warm_up(comes_first(spot)), COMPILING_SECONDS, first.extend)
        self._together(
            "loading kernels",
            lambda: warm_up(not comes_first(spot)),
            COMPILING_SECONDS,
            lambda then: self.report.add(
                judge_warm_up(self._told(first, comes_first), self._told(then, lambda spot: not comes_first(spot)))
            ),
        )

    def _try_network(self, rounds: Any, nodes: Mapping[int, str]) -> bool:
        from mpi_ef.jobs.doctor import link

        def judge_data(facts: list[Facts]) -> bool:
            told = self._told(facts)
            self.report.add(checks.failures("sum", "Network", told))
            self.report.add(link.judge_data([one for one in told if one[FAILED] is None], _MESSAGE_SECONDS))
            return any(one["late"] or one[FAILED] for one in told)

        def judge_link(facts: list[Facts]) -> bool:
            told = self._told(facts)
            self.report.add(checks.failures("links", "Network", told))
            self.report.add(link.judge_link(told, _MESSAGE_SECONDS, nodes))
            return any(one[FAILED] or any("lost_nbytes" in link for link in one["links"] or ()) for one in told)

        late = self._together(
            "a sum over all ranks",
            lambda: link.data_test(self.comm, _MESSAGE_SECONDS),
            _MESSAGE_SECONDS,
            judge_data,
        )
        # A pair that does not come together stops at its first message, before the next round.
        lost = self._together(
            "messages between two ranks",
            lambda: link.measure_link(self.comm, rounds, _MESSAGE_SECONDS),
            4 * _MESSAGE_SECONDS,
            judge_link,
        )
        return bool(late or lost)


def _place(comm: Any) -> tuple[int, int]:
    """Return this rank's number on its node, and the first rank there. Collective."""
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    place = int(node.Get_rank()), int(node.bcast(comm.Get_rank()))
    node.Free()
    return place


def spots_of(answers: Sequence[tuple[str, int, int]]) -> list[Spot]:
    """Return where the ranks are: nodes are what shares memory, named by their hosts.

    Parameters
    ----------
    answers : sequence of (str, int, int)
        Of every rank: host, number on the node, first rank of the node.
    """
    groups: dict[str, list[int]] = {}
    for host, _, leader in answers:
        if leader not in groups.setdefault(host, []):
            groups[host].append(leader)
    return [
        Spot(rank, host if len(groups[host]) == 1 else f"{host}#{groups[host].index(leader) + 1}", local)
        for rank, (host, local, leader) in enumerate(answers)
    ]


def _rounds(spots: Sequence[Spot]) -> list[tuple[str, list[tuple[int, int]]]]:
    from mpi_ef.jobs.doctor.link import pairs_of

    return pairs_of(spots)


def judge_shared(told: Sequence[Told], paths: Mapping[str, str]) -> Iterator[Finding]:
    """Yield which folders are not the same on all nodes.

    Parameters
    ----------
    told : sequence of Told
        Of every node, whether it sees the token of rank 0, by check.
    paths : mapping of str to str
        Where the tokens are.
    """
    if "folder" not in paths:
        return
    blind = [one for one in told if not one["folder"]]
    if blind:
        yield Finding(
            "Files",
            "folder-not-shared",
            "error",
            f"{paths['folder']} on {told[0].node} is not the same folder on {nodes_text(one.node for one in blind)}",
            "checkpoints need a folder that all nodes see: choose one on a shared file system with --out",
            tuple(one.rank for one in blind),
        )
    elif len(told) > 1:
        yield Finding("Files", "folder-shared", "ok", f"all {len(told)} nodes see the same {paths['folder']}")


def judge_warm_up(first: Sequence[Told], then: Sequence[Told]) -> Iterator[Finding]:
    """Yield what the warm-up has brought, on the ranks that have compiled and on those that came after them."""
    yield from checks.failures("warm-up", "Kernels", (*first, *then))
    good, after = ([one for one in some if one[FAILED] is None] for some in (first, then))
    if good:
        from mpi_ef.jobs.doctor import kernels

        yield from kernels.judge_warm_up(good, after)
