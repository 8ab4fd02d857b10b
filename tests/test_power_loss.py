"""Saves that a power loss cuts off: what was saved is found, bit for bit, whatever the disk had not confirmed."""

import contextlib
import errno
import io
import json
import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from checkpoint_cases import any_bits, same_bits
from power_loss import Loss, Recorder, losses
from virtual import results, run

from mpi_ef.checkpoint import Store, open_checkpoint
from mpi_ef.checkpoint.folder import Folder
from mpi_ef.checkpoint.lock import Owner
from mpi_ef.checkpoint.manifest import committed_steps
from mpi_ef.errors import CheckpointError
from mpi_ef.jobs.cli import main
from mpi_ef.jobs.folder import write_whole
from mpi_ef.jobs.metrics import Metrics

INSIDE = Path("runs", "one", "checkpoints")
PASSING = "/.probe-"  # in names of files that nobody reads


@dataclass(frozen=True)
class Saved:
    """A save that has returned; or, before that, one that has begun."""

    step: int
    tag: int
    ranks: int

    @property
    def shared(self):
        return {"w": any_bits(100 * self.tag + self.step, "float32", 100), "empty": np.empty(0, np.float64)}

    def own(self, rank):
        return {"e_i": any_bits(7000 + 100 * self.tag + 10 * self.step + rank, "float64", 20 + rank)}

    def begin(self, store, comm, recorder=None, *, background=False):
        if comm.Get_rank() == 0 and recorder is not None:
            recorder.mark(("begun", self))
        rank, save = comm.Get_rank(), store.save_async if background else store.save
        return save(comm, self.step, replicated=self.shared, per_rank=self.own(rank), document={"tag": self.tag},
                    rank_document=rank)


def saved(folder, recorder, n, steps, *, keep=1, tag=0, background=False, resume=True):
    """Save after these steps; what `save` or `finish` has returned for is marked, on the last rank that it returns on."""

    def program(comm):
        store = Store(folder, keep_last=keep)
        if resume:
            store.newest(comm)
        before = None
        for step in steps:
            now = Saved(step, tag, n)
            now.begin(store, comm, recorder, background=background)
            if background and before is not None and comm.Get_rank() == 0:  # the next one has finished it
                recorder.mark(("done", before))
            if not background and comm.Get_rank() == 0:
                recorder.mark(("done", now))
            before = now
        if background:
            store.finish(comm)
            if comm.Get_rank() == 0:
                recorder.mark(("done", before))
        store.close()

    results(n, program)


def content(path) -> Saved:
    """Return what a checkpoint holds, which is what was saved; nothing may have the name of one that cannot be read."""
    try:
        found = open_checkpoint(path)
        problems = found.verify()
        assert not problems, (path, problems)
        held = Saved(found.step, found.document["tag"], found.world_size)
        arrays = {name: found.replicated(name) for name in found.replicated_names()}
        parts = [(held.shared, arrays)]
        for rank in range(found.world_size):
            assert found.rank_document(rank) == rank
            parts.append((held.own(rank), {name: found.per_rank(name, rank) for name in found.per_rank_names(rank)}))
    except CheckpointError as error:
        raise AssertionError(f"{path.name}: {error}") from error
    for wanted, got in parts:
        assert wanted.keys() == got.keys()
        assert all(same_bits(wanted[name], got[name]) for name in wanted), path
    return held


def tool(*arguments):
    said, error, status = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(error):
        try:
            main(["checkpoint", *map(str, arguments)])
        except SystemExit as ended:
            status = ended.code or 0
    return status, said.getvalue() + error.getvalue()


def check(loss: Loss, folder: Path, keep: int, *, n: int = 1, thorough: bool = True) -> dict[int, Saved]:
    """See that what had been saved is there, that nothing else is, and that all tools see the same; return what is there."""
    begun, done = ([what for kind, what in loss.happened if kind == wanted] for wanted in ("begun", "done"))
    there = {}
    for path in [*folder.glob(".old-step-*"), *folder.glob("step-*")]:
        held = content(path)
        assert held in begun, f"{loss.text}: {path.name} holds {held}"
        there[held.step] = held
    marks = [kind for kind, _ in loss.happened]
    removed = sum(kind == "begun" for kind in marks[: marks.index("removed")]) if "removed" in marks else 0
    for number, wanted in enumerate(begun):
        if wanted not in done or number < removed:
            continue
        later = begun[number + 1 :]
        again = [other for other in later if other.step == wanted.step]
        newer = {other.step for other in later if there.get(other.step) == other} - {wanted.step}
        assert there.get(wanted.step) in (wanted, *again) or len(newer) >= keep, f"{loss.text}: {wanted} is lost"
    assert Store(folder).steps() == sorted(there), loss.text
    for newest in run(n, lambda comm: Store(folder).newest(comm)):
        assert getattr(newest, "step", newest) == max(there, default=None), f"{loss.text}: {newest}"
    assert not list(folder.glob("*/BAD")), loss.text
    if thorough:
        look(loss, folder, there)
        go_on(loss, folder, keep, there, n)
    return there


def look(loss, folder, there):
    """The tools tell the same."""
    status, text = tool("ls", folder, "--json")
    if not folder.exists():
        assert (status, text.count("\n")) == (2, 1), (loss.text, text)
        return
    assert status == 0, (loss.text, text)
    states = {row["state"] for row in json.loads(text)}
    assert states <= {"whole", "unfinished", "replaced"}, (loss.text, text)
    status, text = tool("verify", folder)
    assert status == (0 if there else 2), (loss.text, text)
    assert text.count(": good, ") >= len(there)
    assert "Traceback" not in text


def go_on(loss, folder, keep, there, n):
    """A job after the power loss saves, and leaves nothing of what was unfinished."""
    step = max(there, default=0) + 1

    def program(comm):
        store, more = Store(folder, keep_last=keep), Saved(step, 9, n)
        store.newest(comm)
        more.begin(store, comm)
        store.close()
        return more

    folder.mkdir(parents=True, exist_ok=True)
    [more, *_] = results(n, program)
    assert content(folder / f"step-{step:08d}") == more, loss.text
    kept = {path.name for _, path in committed_steps(folder)}  # also the one whose replacement was cut off
    left = {path.name for path in folder.iterdir() if path.name.startswith((".tmp", ".old", ".RUNS", ".LATEST"))} - kept
    assert not left, (loss.text, left)
    assert len(Store(folder).steps()) <= keep + bool(there), loss.text


# What is recorded: each returns a function of the folder and of the recorder, and marks what begins and what has returned.


def first_saves(n, keep, background, steps=(1, 2)):
    return lambda folder, recorder: saved(folder, recorder, n, steps, keep=keep, background=background)


def saves_again(n, keep, background):
    """A run saves a step again after going back; then others save, which do not know of it: a later step, and that again."""

    def work(folder, recorder):
        saved(folder, recorder, n, (1,), keep=keep, background=background)
        saved(folder, recorder, n, (1,), keep=keep, tag=1, background=background)
        for tag in (2, 3):
            saved(folder, recorder, n, (2,), keep=keep, tag=tag, background=background, resume=False)

    return work


def begun_anew(n, keep, background):
    """What a run has left is removed before another one saves."""

    def work(folder, recorder):
        saved(folder, recorder, n, (1, 2), keep=keep, background=background)
        recorder.mark(("removed", None))
        disk = Folder(folder, keep, 0, "", 0)
        disk.claim("")
        disk.clear()
        disk.release()
        saved(folder, recorder, n, (1,), keep=keep, tag=1, background=background, resume=False)

    return work


def recorded(root, work, before=None):
    """Record what `work` does to a folder below `root`, which is new, or what a power loss before has left."""
    if before is None:
        root.mkdir()
    else:
        before.disk.write(root)
    with Recorder(root, before.happened if before else ()).recording() as recorder:
        work(root / INSIDE, recorder)
    return recorder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing waits for the disk: power losses are made up. Who wrote before one has ended."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(Owner, "gone", lambda *_: True)


def check_all(recorder, keep, n, *, torn, drawn=1, thorough=1):
    """Check all losses of everything and of nothing, and every `drawn`-th other one; every `thorough`-th with all tools."""
    root = recorder.root.with_name("after")
    for number, loss in enumerate(losses(recorder, np.random.default_rng(n), torn=torn, passing=PASSING)):
        if number % drawn == 0 or loss.text.endswith("thing is lost"):
            loss.disk.write(root)
            check(loss, root / INSIDE, keep, n=n, thorough=number % thorough == 0)
            shutil.rmtree(root)


@pytest.mark.parametrize(("work", "n", "background"), [(first_saves, 2, True), (saves_again, 1, False)])
def test_what_was_saved_outlives_a_power_loss(tmp_path, work, n, background):
    recorder = recorded(tmp_path / "disk", work(n, 1, background))
    check_all(recorder, 1, n, torn=1, drawn=50, thorough=50)


@pytest.mark.exhaustive
@pytest.mark.parametrize("background", [False, True], ids=["at-once", "background"])
@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("work", [first_saves, saves_again, begun_anew])
def test_what_was_saved_outlives_every_power_loss(tmp_path, work, n, keep, background):
    """All that can be lost at all points of saves of one rank; of those of several all, nothing, and a fifth of the rest."""
    recorder = recorded(tmp_path / "disk", work(n, keep, background))
    check_all(recorder, keep, n, torn=3, drawn=1 if n == keep == 1 else 5, thorough=7)


def test_a_power_loss_after_a_power_loss(tmp_path):
    lose_twice(tmp_path, 1, every=300, drawn=80)


@pytest.mark.exhaustive
@pytest.mark.parametrize("n", [1, 2])
def test_many_power_losses_after_a_power_loss(tmp_path, n):
    lose_twice(tmp_path, n, every=100 * n, drawn=5)


def lose_twice(tmp_path, n, *, every, drawn):
    """The next job saves the same step again, beside what is left of it, and is cut off as well."""
    first = recorded(tmp_path / "disk", first_saves(n, 1, False))
    for number, loss in enumerate(losses(first, np.random.default_rng(5), torn=2, passing=PASSING)):
        if number % every == every // 2:
            step = max((what.step for _, what in loss.happened), default=1)
            root = tmp_path / f"disk-{number}"
            second = recorded(root, partial(saved, n=n, steps=(step,), keep=1, tag=3), loss)
            check_all(second, 1, n, torn=1, drawn=drawn, thorough=10)


def test_a_power_loss_leaves_files_of_a_run_whole(tmp_path):
    """A new name may reach the disk before what is in the file does: an empty summary, and no way to go on."""
    old, new, rows = "old " * 300, "new " * 300, [{"step": step, "loss": 0.5} for step in range(1, 60)]
    folder = tmp_path / "disk"
    folder.mkdir()
    with contextlib.closing(Metrics(folder, ["step", "loss"])) as metrics:
        for row in rows:
            metrics.write(row)
    with Recorder(folder).recording() as recorder:
        write_whole(folder / "summary.json", old)
        recorder.mark("written")
        write_whole(folder / "summary.json", new)
        Metrics(folder, ["step", "loss"], after=len(rows)).close()
    lost = list(losses(recorder, np.random.default_rng(0), torn=5, passing=PASSING))
    for loss in lost:
        found = dict(loss.disk.paths())
        may_be = (old.encode(), new.encode()) if loss.happened else (None, old.encode())
        assert found.get("summary.json") in may_be, loss.text
        assert [json.loads(line) for line in found["metrics.jsonl"].splitlines()] == rows, loss.text
    assert len({len(dict(loss.disk.paths())) for loss in lost}) > 1


def test_what_is_recorded_is_what_a_disk_has(tmp_path):
    """The model of the disk: names, sizes and blocks are lost apart from each other, and what was confirmed is not."""
    root = tmp_path / "disk"

    def work(_, recorder):
        with (root / "a").open("wb") as file:
            file.write(bytes([1]) * 512 + bytes([2]) * 512)
            file.flush()
            os.fsync(file.fileno())
            file.write(bytes([3]) * 512)
        recorder.mark("written")
        (root / "a").rename(root / "b")
        descriptor = os.open(root, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        recorder.mark("named")

    found = list(losses(recorded(root, work), np.random.default_rng(0), torn=40, passing="none"))

    def disks(mark):
        return {tuple(loss.disk.paths()) for loss in found if loss.happened and loss.happened[-1] == mark}

    one, two, three, zero = (bytes([value]) * 512 for value in (1, 2, 3, 0))
    assert {name for paths in disks("named") for name, _ in paths} == {"b"}
    contents = {content for [(_, content)] in disks("named")}
    assert all(content.startswith(one + two) for content in contents)
    assert {b"", zero, three} < {content[1024:] for content in contents}  # and what the blocks held before
    assert {name for paths in disks("written") for name, _ in paths} == {"a", "b"}
    assert () in disks("written")


def test_folders_that_a_file_system_does_not_confirm(tmp_path, monkeypatch):
    """Some refuse to, which is no error; one that fails to is, and nothing older is deleted then."""

    def refuse(number, code):
        def fsync(descriptor):
            if Path(f"/proc/self/fd/{descriptor}").readlink() == tmp_path and code:
                raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fsync)
        return run(1, lambda comm: Store(tmp_path, keep_last=1).save(
            comm, number, replicated={}, per_rank={}, document=None, rank_document=None))[0]

    assert refuse(1, errno.EINVAL) == tmp_path / "step-00000001"
    error = refuse(2, errno.EIO)
    assert isinstance(error, CheckpointError)
    assert "Input/output error" in str(error)
    assert Store(tmp_path).steps()[0] == 1
    assert refuse(3, 0) == tmp_path / "step-00000003"
