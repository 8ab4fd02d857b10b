"""Who is slow: how much later than the first each worker answers, step by step, and what a code would have saved."""

import operator
from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpi_ef.errors import OptionError, ShapeError, counted
from mpi_ef.ranges import whole, within

__all__ = ["Lateness"]

QUANTILES = (0.5, 0.95, 1.0)
FACTOR, FLOOR = 1.5, 0.1  # see Lateness.holding
_OFTEN = 1.5  # times its share, of the steps that are held up, if all workers held up as many
_FEWEST = 3  # steps
_WORTH = 0.05  # of all time: less is not worth a line


class Lateness:
    """Delays of n workers, a row for each step: seconds after the first answer of that step. Local; knows no MPI.

    The `keep` last rows are kept, counts and sums are those of all steps. Memory: 4 keep n bytes, all from the start.

    Parameters
    ----------
    n : int
        Workers.
    keep : int
        Steps.

    Attributes
    ----------
    steps : int
        That are over.
    in_time, late : (n,) int64 array
        Answers of each worker: before its step was over, and after.
    part_seconds : float
        What one part of the gradient takes to compute, where that is known: a code with s makes each worker compute s more.
    """

    def __init__(self, n: int, keep: int = 4096) -> None:
        self.n = whole("Lateness", 1, "as many as there are workers", n=n)
        self.keep = whole("Lateness", 1, "4096 is usual", keep=keep)
        self.steps, self.part_seconds = 0, 0.0
        self.in_time, self.late = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self._delays = np.full((keep, n), np.inf, np.float32)
        self._names, self._firsts = np.zeros(keep, np.int64), np.full(keep, np.nan)
        self._open = np.zeros(keep, bool)
        self._begun = 0  # rows so far, of which the last `keep` are here; row r is in place r % keep
        self._sums = np.zeros(n)  # of delays in their order, of steps of which the row is gone
        self._flags, self._sorted = np.zeros(n, bool), np.zeros(n, np.float32)

    @property
    def missing(self) -> NDArray[np.int64]:
        """Answers that have not come, of steps that are over, (n,)."""
        came = self.in_time + self.late
        return self.steps - came

    @property
    def rows(self) -> NDArray[np.float32]:
        """The last steps, (m, n) float32 with m <= keep, the newest last; inf for what has not come. A copy."""
        return self._delays[self._order()]

    @property
    def numbers(self) -> NDArray[np.int64]:
        """The step of each of the rows, (m,)."""
        return self._names[self._order()]

    def begin(self, step: int) -> None:
        """Begin a step, by its number, which grows; the oldest row goes where there are `keep` of them."""
        step = operator.index(step)
        place = self._begun % self.keep
        if self._begun:
            last = int(self._names[place - 1])
            if step <= last:
                raise OptionError(f"Lateness: step {step} begins after step {last}; numbers of steps grow")
        if self._begun >= self.keep:
            self._close(place)
            self._add_up(self._delays[place], self._sums)
        self._names[place], self._firsts[place], self._open[place] = step, np.nan, True
        self._delays[place] = np.inf
        self._begun += 1

    def arrived(self, step: int, i: int, seconds: float) -> None:
        """Note that worker i has answered, at `seconds` of a clock, in a step that may be over.

        A second answer to a step changes nothing. Where the row of the step is gone, an answer counts as late.
        """
        place = self._place(step)
        if place is None:
            self.late[i] += 1
            return
        row, first = self._delays[place], self._firsts[place]
        if row[i] != np.inf:
            return
        if not self._open[place]:
            self.late[i] += 1
        if isnan(first):
            self._firsts[place] = first = seconds
        elif seconds < first:  # before what was told first
            row += first - seconds
            self._firsts[place] = first = seconds
        row[i] = seconds - first

    def over(self, step: int) -> None:
        """Note that nobody waits for further answers to this step: they count as late. Once more changes nothing."""
        place = self._place(step)
        if place is not None:
            self._close(place)

    def add(self, delays: ArrayLike) -> None:
        """Add a step that is over, as a whole: (n,) seconds, of which the least counts as zero; inf or NaN: not come."""
        row = np.asarray(delays, np.float64)
        if row.shape != (self.n,):
            raise ShapeError(f"Lateness.add: delays have shape {row.shape}, not ({self.n},): one for each worker")
        self.begin(int(self._names[(self._begun - 1) % self.keep]) + 1 if self._begun else 0)
        place = (self._begun - 1) % self.keep
        came = np.isfinite(row)
        if came.any():
            first = row[came].min()
            self._delays[place][came] = row[came] - first
            self._firsts[place] = first
        self._close(place)

    def quantiles(self) -> NDArray[np.float32]:
        """Return the median, the quantile .95 and the largest delay of each worker, of the rows, (3, n); NaN without."""
        rows = self._over()
        if not len(rows):
            return np.full((len(QUANTILES), self.n), np.nan, np.float32)
        return np.quantile(rows, QUANTILES, axis=0, method="inverted_cdf")

    def holding(self) -> NDArray[np.bool_]:
        """Return which workers held up the others in each of the rows, (m, n) bool; the rows of steps that are over.

        That is: the delay was over 1.5 times the median of the step, at least half of its largest, and over a tenth of the
        mean over rows of their largest; or no answer came in a step in which those of half of the workers did.
        """
        rows = self._over()
        if not len(rows):
            return np.zeros((0, self.n), bool)
        came = np.isfinite(rows)
        largest = np.where(came, rows, np.float32(0)).max(axis=1, keepdims=True)
        long = rows > np.maximum(FACTOR * self._medians(rows), FLOOR * largest.mean())
        held: NDArray[np.bool_] = long & (rows >= largest / 2)
        return held

    def would_save(self, s: int) -> float:
        """Return how many seconds less all steps would have taken if nobody had waited for the last s workers of each.

        That is, over all steps, the largest delay less the (n - s)-th in order, and less s `part_seconds`, where that is
        known. Answers that have not come count as if they had come with the last one that has, so this is never too much. It
        is negative where the code costs more than it saves. Cost: keep n log n.
        """
        s = whole("Lateness.would_save", 0, f"there are {counted(self.n, 'worker')}", most=self.n - 1, s=s)
        sums = self._ordered_sums()
        return float(sums[-1] - sums[self.n - 1 - s]) - self.steps * s * self.part_seconds

    def best(self) -> tuple[int, float]:
        """Return the s that is worth most, and how many seconds it would have saved; (0, 0) where none saves any.

        Where `part_seconds` is not known, it is the one that saves most for each of its s + 1 parts.
        """
        return self._best(range(self.n // 2 + 1))

    def waited(self) -> float:
        """Return how many seconds less all steps would have taken if no worker were slower than the one in the middle."""
        sums = self._ordered_sums()
        return float(sums[-1] - sums[(self.n - 1) // 2])

    def slow(self) -> list[int]:
        """Return which workers hold up the others in more steps than others do, the most often first."""
        held = self.holding()
        counts, least = held.sum(axis=0), max(_FEWEST, _WORTH * len(held))
        fair = counts.sum() * min(_OFTEN / self.n, (1 + 1 / self.n) / 2)
        return [i for i in np.argsort(-counts, kind="stable").tolist() if counts[i] >= max(least, fair)]

    def lines(self, seconds: float, names: Sequence[str] = (), *, s: int | None = 0, steps: str = "steps") -> list[str]:
        """Return what there is to say at the end of a run, in plain lines; none where nobody has waited long.

        A worker whose answers did not come is missing in those steps; how late it was is said of those that came, unless
        more are missing and either less than three came, or none in most of those steps at the end.

        Parameters
        ----------
        seconds : float
            That all steps have taken together.
        names : sequence of str, optional
            Of the workers; without: "rank 0" and so on.
        s : int or None
            Of the code that was in use: what it has saved is said, not what another one would have saved. None: nobody has
            waited for all in each step, and only who is slow is said.
        steps : str
            What a row is of.
        """
        within("Lateness.lines", "[0, inf)", "the time of all steps", seconds=seconds)
        names, lines, waited = names or [f"rank {i}" for i in range(self.n)], list[str](), self.waited()
        told = set[int]()  # of whom the counts say nothing more
        if waited >= _WORTH * seconds and waited > 0 < seconds:
            holding, rows = self.holding(), self._over()
            held, slow = holding.sum(axis=0), self.slow()
            with np.errstate(invalid="ignore"):  # half of the answers may be missing
                by = rows - self._medians(rows)
            of, all_of = f"of {steps}", f"of {len(rows)} {steps}"
            if len(rows) < self.steps:
                of = all_of = f"of the last {len(rows)} {steps}"
            for i in slow:
                seen = by[holding[:, i] & np.isfinite(by[:, i]), i]
                missed, came = int(held[i]) - seen.size, np.flatnonzero(np.isfinite(rows[:, i]))
                since = len(rows) - 1 - int(came[-1]) if came.size else len(rows)  # its last answer
                if missed > seen.size and (seen.size < _FEWEST or 2 * since > missed):
                    told |= {i} if missed == self.missing[i] and not self.late[i] else set()
                    which = "all" if missed == len(rows) else f"the last {missed}" if since >= missed else str(missed)
                    lines.append(f"{names[i]} is missing in {which} {all_of}")
                    continue
                later = f"by {_short(float(np.median(seen)))} s (median{f' of {seen.size}' if missed else ''})"
                later = f": missing in {missed}, else {later}" if missed else f", {later}"
                lines.append(f"{names[i]} is last in {_share(held[i] / len(rows))} {of}{later}")
            whom = "" if slow else ", and no rank is it clearly more often than others"
            if s == 0:
                lines.append(f"waiting for the last rank took {_share(waited / seconds)} of {_short(seconds)} s{whom}")
            lines += [] if s is None else self._of_code(seconds, s)
        for i, (late_ones, missing) in enumerate(zip(self.late.tolist(), self.missing.tolist(), strict=True)):
            if (late_ones or missing) and i not in told:
                lines.append(f"{names[i]}: of {counted(self.steps, 'answer')} {late_ones} came late, {missing} not at all")
        return lines

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return what a later run goes on from, as arrays: copies. Steps that are not over count as over there."""
        order, other = self._order(), Lateness(self.n, self.keep)
        for name, array in self._arrays().items():
            other._arrays()[name][...] = array
        other.steps, other._begun = self.steps, self._begun
        for place in order.tolist():
            other._close(place)
        return {"rows": other._delays[order], "numbers": other._names[order], "firsts": other._firsts[order],
                "in_time": other.in_time, "late": other.late, "sums": other._sums,
                "steps": np.array(other.steps), "part_seconds": np.array(self.part_seconds)}

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Become what :meth:`state_dict` has returned; where `keep` is less than its rows are, the oldest are summed up.

        Raises
        ------
        ShapeError, OptionError
            Where it is of another number of workers, or something else; nothing is changed then.
        """
        if lacking := [name for name in self.state_dict() if name not in state]:
            raise OptionError(f"Lateness: the state has no {lacking[0]}; load what state_dict() has returned")
        found = {name: np.asarray(state[name]) for name in self.state_dict()}
        rows, late = found["rows"], found["late"]
        if late.shape != (self.n,):
            raise ShapeError(f"Lateness: a state of {counted(late.size, 'worker')} with {self.n} here; begin anew")
        m = len(rows) if rows.ndim else 0
        shapes = {"rows": (m, self.n), "numbers": (m,), "firsts": (m,), "steps": (), "part_seconds": ()}
        for name, array in found.items():
            if array.shape != (shape := shapes.get(name, (self.n,))):
                raise ShapeError(f"Lateness: {name} of the state has shape {array.shape}, not {shape}; load what "
                                 "state_dict() has returned")
        self.steps, self.part_seconds = int(found["steps"]), float(found["part_seconds"])
        self.in_time[:], self.late[:], self._sums[:] = found["in_time"], late, found["sums"]
        self._begun, kept = 0, min(self.keep, len(rows))
        for row in rows[: len(rows) - kept]:
            self._add_up(row, self._sums)
        self._delays[:kept], self._open[:] = rows[len(rows) - kept:], False
        self._names[:kept] = found["numbers"][len(rows) - kept:]
        self._firsts[:kept] = found["firsts"][len(rows) - kept:]
        self._begun = kept

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {"delays": self._delays, "names": self._names, "firsts": self._firsts, "open": self._open, "sums": self._sums,
                "in_time": self.in_time, "late": self.late}

    def _best(self, numbers: Sequence[int]) -> tuple[int, float]:
        s = -max((self.would_save(s) / (1 if self.part_seconds else s + 1), -s) for s in numbers)[1]
        return s, self.would_save(s)

    def _of_code(self, seconds: float, s: int) -> list[str]:
        there = [s] if s else [i for i in range(self.n // 2 + 1) if _has_code(self.n, i)]
        best, saved = self._best(there)
        if not s and saved < _WORTH * seconds:  # perhaps one that wants another number of ranks
            best, saved = self.best()
        free = "" if self.part_seconds else f", not counting that each rank computes {best + 1} parts instead of 1"
        if s and (never := int(self.missing.sum())):
            if saved <= 0:
                return [f"what the code (s={s}) has saved is not known: {counted(never, 'answer')} never came"]
            text = f"the code (s={s}) has saved {_short(saved)} s or more, in steps that took {_short(seconds)} s{free}"
            return [f"{text}; {counted(never, 'answer')} never came"]
        if s:
            return [f"the code (s={s}) has saved {_short(max(0.0, saved))} s, in steps that took {_short(seconds)} s{free}"]
        if saved < _WORTH * seconds:
            return ["no code would have saved much: what it has each rank compute takes longer than waiting"]
        where = "" if _has_code(self.n, best) else f"; there is none for {self.n} ranks, start one more or less"
        return [f"a code with s={best} would have saved {_share(saved / seconds)} of {_short(seconds)} s{free}{where}"]

    def _order(self) -> NDArray[np.intp]:
        """Return the places of the rows, the newest last."""
        return np.arange(max(0, self._begun - self.keep), self._begun) % self.keep

    def _place(self, step: int) -> int | None:
        """Return the place of a step's row, None where it is gone. Raise if it has not begun."""
        newest = (self._begun - 1) % self.keep
        if not self._begun or step > self._names[newest]:
            raise OptionError(f"Lateness: step {step} has not begun; call begin({step}) first")
        back = int(self._names[newest]) - step
        if back < min(self.keep, self._begun) and self._names[(newest - back) % self.keep] == step:
            return (newest - back) % self.keep
        order = self._order()  # numbers of steps with gaps
        found = order[self._names[order] == step]
        if found.size:
            return int(found[0])
        if self._begun <= self.keep or step > self._names[order[0]]:
            raise OptionError(f"Lateness: step {step} has not begun; call begin({step}) first")
        return None

    def _close(self, place: int) -> None:
        if self._open[place]:
            self._open[place] = False
            np.isfinite(self._delays[place], out=self._flags)
            self.in_time += self._flags
            self.steps += 1

    def _add_up(self, row: NDArray[np.float32], sums: NDArray[np.float64]) -> None:
        """Add the delays of a step in their order; for what has not come, the largest that has."""
        self._sorted[:] = row
        self._sorted.sort()
        if came := int(np.searchsorted(self._sorted, np.inf)):
            self._sorted[came:] = self._sorted[came - 1]
            sums += self._sorted

    def _ordered_sums(self) -> NDArray[np.float64]:
        """Return the sums of delays in their order, (n,), over all steps that are over."""
        sums = self._sums.copy()
        for row in self._over():
            self._add_up(row, sums)
        return sums

    def _over(self) -> NDArray[np.float32]:
        """Return the rows of steps that are over."""
        order = self._order()
        return self._delays[order[~self._open[order]]]

    def _medians(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return of each row the answer of the worker in the middle, (m, 1); of two, the first one."""
        return np.sort(rows, axis=1)[:, (self.n - 1) // 2, None]


def _short(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.3g}".removeprefix("0") or "0"


def _share(part: float) -> str:
    return f"{100 * part:.0f} %"


def _has_code(n: int, s: int) -> bool:
    """Tell whether there is a gradient code for n workers of which s may be missing, see ``mpi_ef.coded``."""
    rest = n % (s + 1)
    odd = rest + (s + 1) * (1 + rest % 2)  # the length of the last block of `Blocks`, where s is even
    return rest == 0 or (n - s) % 2 == 1 or (s % 2 == 0 and odd <= n)
