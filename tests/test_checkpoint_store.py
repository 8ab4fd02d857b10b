"""Saving and finding checkpoints: bits, agreement of the ranks, full disks, killed jobs, pruning, locks."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import resident
from checkpoint_cases import any_bits, assert_holds, save, shared
from virtual import results, run

from mpi_ef.checkpoint import Store, folder, lock, manifest, open_checkpoint, rankfile, store, structure
from mpi_ef.errors import CheckpointError, OptionError

DATA = Path(__file__).parent / "data"
NOTHING = {"replicated": {}, "per_rank": {}, "document": None, "rank_document": None}


def arrays_of(step: int, rank: int, count: int = 1000) -> dict:
    """A save that can be told from that of any other step."""
    return {
        "replicated": {"x": np.full(count, step, np.float32), "y": np.full(3, step)},
        "per_rank": {"e": np.full(count // 2, 1000 * step + rank)},
        "document": {"step": step},
        "rank_document": [step, rank],
    }


def is_step(found, step: int) -> bool:
    """Whether all of a checkpoint belongs to one step."""
    ranks = range(found.world_size)
    return (
        found.step == found.document["step"] == step
        and (found.replicated("x") == step).all()
        and (found.replicated("y") == step).all()
        and all((found.per_rank("e", rank) == 1000 * step + rank).all() for rank in ranks)
        and all(found.rank_document(rank) == [step, rank] for rank in ranks)
    )


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_bit_comes_back(tmp_path, n):
    path = save(tmp_path, 7, n)
    assert_holds(path, 7, n)
    assert open_checkpoint(path).verify() == []
    assert sorted(p.name for p in path.iterdir()) == ["COMMIT", "master.json", *(f"rank-{r:05d}.h5" for r in range(n))]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_golden_files_can_be_read(version):
    """What earlier versions wrote stays readable: a change of the format is a visible act."""
    path = DATA / f"checkpoint-{version}" / "step-00000003"
    assert_holds(path, 3, 2)
    assert open_checkpoint(path).verify() == []


def test_the_format_is_the_golden_one(tmp_path):
    """Same index, same names and sizes of buffers, same manifest, but for identities and versions."""

    def told(path):
        manifest = json.loads((path / "master.json").read_text())
        with h5py.File(path / "rank-00001.h5") as file:
            index = json.loads(file["index"][:].tobytes())
            buffers = {name: (file[name].shape, str(file[name].dtype), file[name].id.get_offset()) for name in file}
            attributes = {name: value for name, value in file.attrs.items() if name != "run"}
        for one in (manifest, index):
            del one["run"]
        rows = [{k: v for k, v in row.items() if k != "crc32"} for row in manifest["files"]]
        kept = {k: manifest[k] for k in manifest if k not in ("files", "written_at", "written_by")}
        return rows, kept, index, attributes, {
            name: what[:2] for name, what in buffers.items()}

    mine, golden = told(save(tmp_path, 3)), told(DATA / "checkpoint-v2" / "step-00000003")
    assert mine[1:] == golden[1:]
    if h5py.version.hdf5_version_tuple[0] == 2:  # where HDF5 puts its structure is its own business
        assert mine[0] == golden[0]


def test_other_programs_can_read_the_buffers(tmp_path):
    path = save(tmp_path, 7, 1)
    with h5py.File(path / "rank-00000.h5") as file:
        rows = {row["name"]: row for row in json.loads(file["index"][:].tobytes())["arrays"]}
        row = rows["float64 values"]
        start = row["offset"] // 8
        assert file["float64"][start : start + 87].tobytes() == shared(7)["float64 values"].tobytes()
        row = rows["bf16"]
        got = file["bfloat16"][row["offset"] // 2 :][:35]  # HDF5 converts: the type describes itself
        wide = (shared(7)["bf16"].view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(-1)
        assert np.array_equal(got, wide, equal_nan=True)
        assert file.attrs["format"] == "mpi_ef.checkpoint"


@pytest.mark.parametrize("n", [1, 3])
def test_megabytes_are_striped(tmp_path, n):
    x, e = any_bits(1, "float32", 3_000_001), any_bits(2, "float64", 400_001)

    def program(comm):
        st = Store(tmp_path)
        st.save(comm, 1, replicated={"x": x, "y": x[:5]}, per_rank={"e": e}, document=None, rank_document=None)
        found = st.newest(comm)
        assert found.replicated("x").tobytes() == x.tobytes()
        assert found.per_rank("e", comm.Get_rank()).tobytes() == e.tobytes()
        return found.path

    path = results(n, program)[0]
    sizes = [(path / f"rank-{r:05d}.h5").stat().st_size for r in range(n)]
    assert max(sizes) - min(sizes) < 50_000
    assert sum(sizes) < x.nbytes + n * e.nbytes + n * 20_000


def test_another_number_of_ranks_reads(tmp_path):
    save(tmp_path, 5, 3)
    for n in (1, 2, 4):
        for found in results(n, lambda comm: Store(tmp_path).newest(comm)):
            assert_holds(found.path, 5, 3)


def test_ranks_that_disagree_all_raise(tmp_path):
    def program(comm):
        rank = comm.Get_rank()
        Store(tmp_path).save(comm, 1, **NOTHING | {"replicated": {"x": np.zeros(3 + rank)}})

    for error in run(2, program):
        assert isinstance(error, CheckpointError)
        assert "ranks disagree on replicated arrays: 1 arrays of 24 bytes" in str(error)
    assert not tmp_path.exists() or not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"replicated": {"x": np.array(["a"], object)}}, "dtype object cannot be stored"),
        ({"per_rank": {"x": np.array(["a"])}}, "dtype <U1 cannot be stored"),
        ({"rank_document": {1: 2}}, "keys that are no text"),
        ({"rank_document": [np.float32(1)]}, "holds float32, which is not JSON"),
        ({"per_rank": {"x": np.zeros(2, np.longdouble)}}, "cannot be stored"),
    ],
)
def test_what_cannot_be_stored_is_refused_everywhere(tmp_path, change, words):
    def program(comm):
        bad = change if comm.Get_rank() == 1 else {}
        Store(tmp_path).save(comm, 1, **NOTHING | bad)

    for error in run(3, program):
        assert isinstance(error, CheckpointError)
        assert words in str(error) or "disagree" in str(error)


def test_wrong_options():
    with pytest.raises(OptionError, match="keep_last=0"):
        Store(Path("x"), keep_last=0)
    for error in run(2, lambda comm: Store(Path("x")).save(comm, -1, **NOTHING)):
        assert isinstance(error, CheckpointError)


def failing(monkeypatch, module, name, error, when=lambda *a: True):
    real = getattr(module, name)

    def call(*arguments, **options):
        if when(*arguments):
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO])
def test_one_rank_that_fails_fails_all(tmp_path, monkeypatch, rank, code, asynchronous):
    save(tmp_path, 1, 3)
    failing(monkeypatch, store, "write_rank_file", OSError(code, os.strerror(code)),
            lambda path, *rest: path.name == f"rank-{rank:05d}.h5")

    def program(comm):
        st, me = Store(tmp_path), comm.Get_rank()
        try:
            if asynchronous:
                pending = st.save_async(comm, 2, **arrays_of(2, me))
                pending.finish(comm)
            else:
                st.save(comm, 2, **arrays_of(2, me))
        except CheckpointError as error:
            return str(error), st.newest(comm).step, error.everywhere and error.may_pass
        return None

    answers = results(3, program)
    assert answers[0][0].startswith(f"Store.save{'_async' * asynchronous}, step 2: ")
    assert os.strerror(code) in answers[0][0]
    assert f"rank {rank}; 1 of 3 ranks failed" in answers[0][0]
    assert answers == [(answers[0][0], 1, True)] * 3
    assert_holds(tmp_path / "step-00000001", 1, 3)
    assert not list(tmp_path.glob(".tmp*"))
    monkeypatch.undo()
    results(3, lambda comm: Store(tmp_path).save(comm, 2, **arrays_of(2, comm.Get_rank())))
    assert is_step(open_checkpoint(tmp_path / "step-00000002"), 2)


@pytest.mark.parametrize("name", ["write_manifest", "sync_folder"])
def test_rank_0_that_cannot_commit_fails_all(tmp_path, monkeypatch, name):
    save(tmp_path, 1, 2)
    module = folder if name == "write_manifest" else __import__("mpi_ef.checkpoint.manifest", fromlist=["x"])
    failing(monkeypatch, module, name, OSError(28, "No space left on device"))
    errors = run(2, lambda comm: Store(tmp_path).save(comm, 2, **arrays_of(2, comm.Get_rank())))
    assert all("No space left" in str(error) and error.may_pass for error in errors)
    assert Store(tmp_path).steps() == [1]
    assert not list(tmp_path.glob(".tmp*"))


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    """A real file system of one megabyte. Every size of what is free is tried, down to where no name fits."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small file system is refused here: {mounted.stderr.strip()}")
    try:
        results(2, lambda comm: Store(disk / "run").save(comm, 1, **arrays_of(1, comm.Get_rank())))
        for count in (300_000, 1000):
            for free in (64, 5, 4, 3, 2, 1, 0) if count == 1000 else (64,):
                fill_all_but(disk, free * 4096)
                errors = run(
                    2,
                    lambda comm, count=count: Store(disk / "run").save(comm, 2, **arrays_of(2, comm.Get_rank(), count)),
                )
                (disk / "ballast").unlink()
                assert len({str(error) for error in errors}) == 1
                if isinstance(errors[0], CheckpointError):
                    assert "No space left on device" in str(errors[0])
                    assert not list((disk / "run").glob("*tmp*"))
                else:
                    assert free == 64
                    assert count == 1000
                    shutil.rmtree(disk / "run" / "step-00000002")
                assert is_step(results(2, lambda comm: Store(disk / "run").newest(comm))[1], 1)
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_a_read_only_folder_can_be_read(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small file system is refused here: {mounted.stderr.strip()}")
    try:
        results(2, lambda comm: Store(disk / "run").save(comm, 1, **arrays_of(1, comm.Get_rank())))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for call in (lambda comm: Store(disk / "run").save(comm, 2, **arrays_of(2, comm.Get_rank())),
                     lambda comm: Store(disk / "run").claim(comm)):
            errors = run(2, call)
            assert len({str(error) for error in errors}) == 1
            assert isinstance(errors[0], CheckpointError)
            assert "Read-only file system" in str(errors[0])
        assert is_step(results(2, lambda comm: Store(disk / "run").newest(comm))[1], 1)
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def fill_all_but(disk: Path, nbytes: int) -> None:
    state = os.statvfs(disk)
    with (disk / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(state.f_bavail * state.f_frsize - nbytes, 1))


CHILD = """
import sys; sys.path[:0] = [{tests!r}]
from test_checkpoint_store import *
first, asynchronous = int(sys.argv[2]), int(sys.argv[3])
def program(comm):
    st, me = Store(Path(sys.argv[1]), keep_last=2), comm.Get_rank()
    for step in range(first, first + 100000):
        if me == 0:
            print(step, flush=True)
        if asynchronous:
            st.save_async(comm, step // 2 * 2, **arrays_of(step // 2 * 2, me, 200_000))
        else:
            st.save(comm, step // 2 * 2, **arrays_of(step // 2 * 2, me, 200_000))  # every step is replaced once
run(2, program)
"""


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [0, 1])
def test_killed_at_any_moment(tmp_path, asynchronous):
    """Whatever was going on, the newest checkpoint is whole, of one step, and not older than the last that was saved."""
    rng, seen = np.random.default_rng(asynchronous), 0
    program = CHILD.format(tests=str(Path(__file__).parent))
    for _ in range(12):
        child = subprocess.Popen(resident.command("-c", program, tmp_path, seen, asynchronous),
                                 stdout=subprocess.PIPE, text=True)
        step = int(child.stdout.readline())
        stop = time.monotonic() + rng.uniform(0.0, 0.25)
        while time.monotonic() < stop:
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
        lines = child.communicate()[0].split()
        step = int(lines[-1]) if lines else step
        found = results(2, lambda comm: Store(tmp_path).newest(comm))[0]
        if found is None:
            assert step <= 2
            continue
        assert is_step(found, found.step)
        assert found.verify() == []
        assert found.step >= (step - 2 - 2 * asynchronous) // 2 * 2
        assert not list(tmp_path.glob("step-*/BAD"))
        seen = found.step + 2
    # One is kept: a kill between two renames leaves the replaced one under another name, where it counts while it is kept.
    results(2, lambda comm: Store(tmp_path, keep_last=1).save(comm, seen, **arrays_of(seen, comm.Get_rank())))
    assert not list(tmp_path.glob(".tmp*"))
    assert not list(tmp_path.glob(".old*"))


def test_a_replacement_that_was_cut_short(tmp_path):
    """Between two renames the step has no directory of its own; the old one still counts."""
    path = save(tmp_path, 4)
    aside = path.rename(tmp_path / ".old-step-00000004-0123456789ab")
    assert Store(tmp_path).steps() == [4]
    assert_holds(results(2, lambda comm: Store(tmp_path).newest(comm))[0].path, 4)
    save(tmp_path, 3)
    assert_holds(aside, 4)
    save(tmp_path, 4)
    save(tmp_path, 5)
    assert not aside.exists()


def test_in_the_background_only_the_copy_is_waited_for(tmp_path, monkeypatch):
    go, real = threading.Event(), rankfile.write_rank_file

    def slow(*arguments):
        assert go.wait(30)
        return real(*arguments)

    monkeypatch.setattr(store, "write_rank_file", slow)

    def program(comm):
        st, me = Store(tmp_path), comm.Get_rank()
        state = arrays_of(1, me, 100_000)
        pending = st.save_async(comm, 1, **state)
        state["replicated"]["x"][:] = -1  # the next step of the training
        state["per_rank"]["e"][:] = -1
        state["document"]["step"] = -1
        assert not pending.done
        assert st.steps() == []
        comm.allgather(0)
        go.set()
        path = pending.finish(comm)
        assert pending.done
        assert pending.finish(comm) == path  # once more does nothing
        second = st.save_async(comm, 2, **arrays_of(2, me))
        st.save_async(comm, 3, **arrays_of(3, me))
        assert second.path is not None
        assert st.steps() == [1, 2]
        st.finish(comm)
        assert st.finish(comm) is None
        return path

    path = results(2, program)[0]
    assert Store(tmp_path).steps() == [1, 2, 3]
    for step in (1, 2, 3):
        assert is_step(open_checkpoint(path.parent / f"step-{step:08d}"), step)


def test_memory_for_copies_is_kept(tmp_path):
    def program(comm):
        st, buffers = Store(tmp_path), set()
        for step in range(4):
            st.save_async(comm, step, **arrays_of(step, 0, 10_000))
            buffers.add(st._staging._memory.__array_interface__["data"][0])
        st.finish(comm)
        return len(buffers)

    assert results(1, program) == [1]


def test_closing_drops_what_is_in_flight(tmp_path):
    def program(comm):
        st = Store(tmp_path)
        pending = st.save_async(comm, 1, **arrays_of(1, comm.Get_rank()))
        comm.allgather(0)
        st.close()
        comm.allgather(0)
        pending.finish(comm)

    assert all("dropped or has failed" in str(error) for error in run(2, program))
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_file_that_is_begun_while_its_directory_is_removed(tmp_path, monkeypatch):
    """By a rank that has not heard of it."""
    disk, real = folder.Folder(tmp_path, 1, 0, "", 0), shutil.rmtree
    place = tmp_path / ".tmp-place"
    place.mkdir()
    late = iter([True])

    def remove(path, **options):
        if next(late, False):
            return  # as when a file has come after its content was listed
        real(path, **options)

    monkeypatch.setattr(folder.shutil, "rmtree", remove)
    disk.abandon(place.name)
    assert not place.exists()


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [(1, 0, [70]), (3, 0, [50, 60, 70]), (2, 30, [0, 30, 60, 70]), (100, 0, [0, 10, 20, 30, 40, 50, 60, 70])],
)
def test_what_is_kept(tmp_path, keep_last, keep_every, left):
    def program(comm):
        st = Store(tmp_path, keep_last=keep_last, keep_every=keep_every)
        for step in range(0, 80, 10):
            st.save(comm, step, **NOTHING)
        return st.steps()

    assert results(1, program) == [left]
    assert sorted(int(path.name[5:]) for path in tmp_path.glob("step-*")) == left
    assert (tmp_path / "LATEST").read_text() == "step-00000070\n"


def test_after_going_back_the_new_one_is_not_deleted(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, 1)
    save(tmp_path, 5, 1, keep_last=2)
    assert Store(tmp_path).steps() == [5, 20, 30]


def test_damaged_ones_do_not_count_as_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, 1)
    for step in (2, 3):
        (tmp_path / f"step-{step:08d}" / "BAD").write_text("somebody says so\n")
    save(tmp_path, 4, 1, keep_last=2)
    assert Store(tmp_path).steps() == [1, 4]
    for step in (5, 6):
        save(tmp_path, step, 1, keep_last=2)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000005", "step-00000006"]


def test_the_hint_may_be_wrong(tmp_path):
    save(tmp_path, 1)
    for text in ("step-00000099\n", "../../etc", ""):
        (tmp_path / "LATEST").write_text(text)
        assert results(1, lambda comm: Store(tmp_path).newest(comm))[0].step == 1


def test_nothing_there(tmp_path):
    assert results(2, lambda comm: Store(tmp_path / "no").newest(comm)) == [None, None]
    assert Store(tmp_path / "no").steps() == []
    save(tmp_path, 3, 1)
    for error in run(2, lambda comm: Store(tmp_path).at(comm, 4)):
        assert str(error).startswith(f"Store.at, step 4: {tmp_path} has none; the last steps there are: 3")
    found = results(2, lambda comm: Store(tmp_path).at(comm, 3))
    assert [checkpoint.step for checkpoint in found] == [3, 3]


def test_names_that_are_not_there(tmp_path):
    found = open_checkpoint(save(tmp_path))
    for call in (lambda: found.replicated("e_i"), lambda: found.per_rank("bf16", 0), lambda: found.per_rank("e_i", 2),
                 lambda: found.rank_document(-1), lambda: open_checkpoint(tmp_path / "no")):
        with pytest.raises(CheckpointError):
            call()


def test_a_run_keeps_its_identity(tmp_path):
    def program(comm):
        st = Store(tmp_path)
        st.newest(comm)
        st.save(comm, 1 if not st.steps() else 2, **NOTHING)
        return st.run

    assert len(set(results(2, program) + results(3, program))) == 1


SLEEPER = "import sys, time; print('up', flush=True); time.sleep(600)"


def lock_of(tmp_path, **changes):
    save(tmp_path, 1, 1)
    owner = vars(lock.Owner.this_process("", "another run")) | changes
    (tmp_path / "LOCK").unlink(missing_ok=True)
    (tmp_path / "LOCK").write_text(json.dumps(owner))


def test_a_second_job_is_told_who_writes(tmp_path):
    with subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        lock_of(tmp_path, pid=other.pid, started=lock._started(other.pid), job="41", token="theirs")
        errors = run(2, lambda comm: Store(tmp_path).save(comm, 2, **NOTHING))
        assert len({str(error) for error in errors}) == 1
        assert f"process {other.pid} of job 41 on " in str(errors[0])
        assert "writes checkpoints there; give this job another folder, or remove LOCK" in str(errors[0])
        assert "\n" not in str(errors[0])
        assert results(2, lambda comm: Store(tmp_path).newest(comm))[0].step == 1  # reading needs no lock
        tmp = tmp_path / ".tmp-step-00000002-aaaaaaaaaaaa"
        tmp.mkdir()
        (tmp / "OWNER").write_text((tmp_path / "LOCK").read_text())
        other.kill()
    save(tmp_path, 2, 1)  # its process is gone
    assert Store(tmp_path).steps() == [1, 2]
    assert not tmp.exists()


def test_a_process_number_that_is_used_again(tmp_path):
    boot, _, namespace = lock._started(os.getppid()).split()
    lock_of(tmp_path, pid=os.getppid(), started=f"{boot} 17 {namespace}", token="theirs")
    save(tmp_path, 2, 1)


@pytest.mark.parametrize(
    ("job", "restart", "age", "taken"),
    [("", 0, 0, False), ("7", 0, 0, True), ("7", 1, 0, False), ("8", 0, 0, False), ("", 0, 300, True)],
)
def test_a_lock_on_another_host(tmp_path, job, restart, age, taken):
    """A later start of the same batch job takes it over; another step of the same start does not."""
    lock_of(tmp_path, host="elsewhere", job=job, restart=restart, token="theirs")
    now = time.time()
    os.utime(tmp_path / "LOCK", (now - age, now - age))
    error = run(1, lambda comm: Store(tmp_path, job="7", restart=1).save(comm, 2, **NOTHING))[0]
    assert isinstance(error, CheckpointError) is not taken, error


@pytest.mark.parametrize("alive", [True, False])
def test_claiming_waits_for_a_sign_of_life(tmp_path, monkeypatch, alive):
    """A host that died leaves a lock that looks fresh for two minutes."""
    lock_of(tmp_path, host="elsewhere", token="theirs")
    path, waits = tmp_path / "LOCK", []

    def sleep(seconds):
        waits.append(seconds)
        if alive:
            os.utime(path, (time.time() + 1, time.time() + 1))
        monkeypatch.setattr(lock, "age_seconds", lambda _: 50.0 * len(waits))

    monkeypatch.setattr(lock.time, "sleep", sleep)
    errors = run(2, lambda comm: Store(tmp_path).claim(comm))
    assert len(waits) == (1 if alive else 3)
    assert [isinstance(error, CheckpointError) for error in errors] == [alive, alive]
    if alive:
        assert "process " in str(errors[0])


def test_a_lock_of_a_time_to_come_falls_silent_too(tmp_path, monkeypatch):
    """The clock of a file server was set back: the age of the lock is below 0 for hours, and so long a start waited."""
    lock_of(tmp_path, host="elsewhere", token="theirs")
    soon, clock = time.time() + 36_000, [0.0]
    os.utime(tmp_path / "LOCK", (soon, soon))

    def sleep(seconds):
        clock[0] += seconds
        assert clock[0] < 200

    monkeypatch.setattr(lock, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep, strftime=time.strftime))
    mine = Store(tmp_path)
    results(1, mine.claim)
    assert 120 < clock[0] < 130
    mine.close()


def test_what_killed_processes_have_left_of_locks_is_removed(tmp_path):
    """Not what may be in use: of the last two minutes."""
    names = (".LOCK-ab", ".LOCK-stale-ab", ".probe-ab")
    for number, name in enumerate([name + end for name in names for end in ("", "-new")]):
        (tmp_path / name).touch()
        if number % 2 == 0:
            os.utime(tmp_path / name, (time.time() - 150, time.time() - 150))
    (tmp_path / ".LOCK-folder").mkdir()
    save(tmp_path, 1, 1)
    assert {path.name for path in tmp_path.glob(".*")} == {name + "-new" for name in names} | {".LOCK-folder"}


def test_a_stale_lock_that_another_job_has_tidied_away(tmp_path, monkeypatch):
    """While this process looks at it under its other name."""
    lock_of(tmp_path, **ELSEWHERE)
    os.utime(tmp_path / "LOCK", (1, 1))
    reads = lock.Owner.read

    def read(path):
        if path.name.startswith(".LOCK-stale-"):
            path.unlink()
        return reads(path)

    monkeypatch.setattr(lock.Owner, "read", read)
    mine = Store(tmp_path)
    results(1, mine.claim)
    assert holder_of(tmp_path)["token"] != "theirs"


def test_file_systems_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "not here")))
    save(tmp_path, 1, 1)
    with subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        lock_of(tmp_path, pid=process.pid, started=lock._started(process.pid), token="theirs")
        assert "writes checkpoints there" in str(run(1, lambda comm: Store(tmp_path).save(comm, 2, **NOTHING))[0])
        process.kill()
    save(tmp_path, 2, 1)
    assert not list(tmp_path.glob(".LOCK*"))


def test_polling_finishes_what_all_ranks_have_written(tmp_path, monkeypatch):
    gate, write = threading.Event(), store.write_rank_file

    def slowly(path, *arguments):
        if path.name == "rank-00001.h5":
            assert gate.wait(60)
        return write(path, *arguments)

    monkeypatch.setattr(store, "write_rank_file", slowly)

    def program(comm):
        mine = Store(tmp_path)
        assert mine.poll(comm) is None
        pending = mine.save_async(comm, 1, **NOTHING)
        assert mine.poll(comm) is None
        comm.allgather(None)
        assert mine.steps() == []
        comm.allgather(None)
        gate.set()
        pending.wait()
        comm.allgather(None)
        path = mine.poll(comm)
        assert mine.poll(comm) is None
        return path, mine.steps()

    assert results(2, program) == [(tmp_path / "step-00000001", [1])] * 2


def test_a_process_without_another_thread_writes_itself(tmp_path, monkeypatch):
    class Broken(threading.Thread):
        def start(self):
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(store, "threading", SimpleNamespace(Thread=Broken))
    found = results(2, lambda comm: Store(tmp_path).save_async(comm, 1, **arrays_of(1, comm.Get_rank())).finish(comm))
    assert is_step(open_checkpoint(found[0]), 1)


def test_nothing_whole_is_an_error_not_a_start_from_nothing(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, 2)
    for file in tmp_path.glob("step-*/rank-00000.h5"):
        file.write_bytes(file.read_bytes()[:-1])
    for _ in range(2):
        errors = run(3, lambda comm: Store(tmp_path).newest(comm))
        assert len({str(error) for error in errors}) == 1
        assert "of 2 checkpoints none is whole" in str(errors[0])


def test_what_was_replaced_while_it_was_read_is_not_marked(tmp_path):
    path = save(tmp_path, 1, 1)
    seen = folder.identity(path)
    (tmp_path / "kept").hardlink_to(path / "COMMIT")  # so that its inode is not given to the next one
    shutil.rmtree(path)
    save(tmp_path, 1, 1)
    mine = Store(tmp_path)
    mine._on_disk.mark(path, ["what the old one had"], seen)
    assert mine.steps() == [1]
    mine._on_disk.mark(path, ["what this one has"], folder.identity(path))
    assert mine.steps() == []


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path, monkeypatch):
    save(tmp_path, 1, 1)
    monkeypatch.setattr(
        Path, "iterdir", lambda _: (_ for _ in ()).throw(PermissionError(errno.EACCES, "ticket expired"))
    )
    errors = run(2, lambda comm: Store(tmp_path).newest(comm))
    assert all("ticket expired" in str(error) for error in errors)


def test_a_lock_that_was_lost_stops_the_commit(tmp_path):
    def program(comm):
        st = Store(tmp_path)
        st.save(comm, 1, **NOTHING)
        st.save_async(comm, 2, **NOTHING)
        if comm.Get_rank() == 0:
            lock.Owner.this_process("9", "").write(tmp_path / "new")
            (tmp_path / "new").rename(tmp_path / "LOCK")
        st.finish(comm)

    assert all("the lock was taken over by" in str(error) for error in run(2, program))
    assert Store(tmp_path).steps() == [1]


def test_a_lock_that_nobody_can_read(tmp_path):
    (tmp_path / "LOCK").write_text("{}")
    assert "remove it when no job writes there" in str(run(1, lambda comm: Store(tmp_path).save(comm, 1, **NOTHING))[0])


def test_locks_go_with_their_store(tmp_path):
    def program(comm):
        with_lock = Store(tmp_path)
        with_lock.save(comm, 1, **NOTHING)
        assert (tmp_path / "LOCK").exists()
        with_lock.close()
        with_lock.close()
        assert not (tmp_path / "LOCK").exists()
        with_lock.save(comm, 2, **NOTHING)

    results(1, program)
    assert sorted(path.name for path in tmp_path.iterdir() if "LOCK" in path.name or "probe" in path.name) in (
        [],
        ["LOCK"],
    )


# Error paths of the one rank that publishes ---------------------------------------------------------------------------


def refusing(real, names, code=errno.ENOSPC):
    """Return `real`, which takes a path first, but not for some names."""

    def call(path, *arguments, **options):
        if path.name in names or path.name.startswith(tuple(f"{name}-" for name in names)):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *arguments, **options)

    return call


def test_a_place_without_room_for_its_owner_is_removed(tmp_path, monkeypatch):
    real = lock.Owner.write
    write = refusing(lambda path, owner: real(owner, path), {"OWNER"})
    monkeypatch.setattr(lock.Owner, "write", lambda owner, path: write(path, owner))
    errors = run(2, lambda comm: Store(tmp_path).save(comm, 1, **NOTHING))
    assert all("No space left on device" in str(error) for error in errors)
    assert not list(tmp_path.glob("*step*"))
    assert not list(tmp_path.glob(".tmp*"))


def test_a_checkpoint_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    """The old one has another name for a moment."""
    results(2, lambda comm: Store(tmp_path).save(comm, 1, **arrays_of(1, comm.Get_rank())))
    monkeypatch.setattr(Path, "rename", refusing(Path.rename, {".tmp-step-00000001"}, errno.EIO))
    errors = run(2, lambda comm: Store(tmp_path).save(comm, 1, **NOTHING))
    assert all("Input/output error" in str(error) for error in errors)
    assert is_step(open_checkpoint(tmp_path / "step-00000001"), 1)
    assert [path.name for path in tmp_path.glob("*step*")] == ["step-00000001"]


def test_what_cannot_be_tidied_up_is_saved_all_the_same(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(folder, "replace_durably", refusing(folder.replace_durably, {"LATEST"}))
    path = save(tmp_path, 1, 2)
    assert_holds(path, 1, 2)
    assert "saved, but older ones could not be tidied up: [Errno 28]" in caplog.text
    assert results(2, lambda comm: Store(tmp_path).newest(comm))[0].step == 1


def test_a_run_that_cannot_be_noted_saves_nothing(tmp_path, monkeypatch):
    """Its checkpoints would not be found again, and those of the run before would have made room for them."""
    save(tmp_path, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(folder, "replace_durably", refusing(folder.replace_durably, {"RUNS"}))
        errors = run(2, lambda comm: Store(tmp_path, keep_last=1).save(comm, 2, **NOTHING))
    assert all("No space left on device" in str(error) for error in errors)
    assert Store(tmp_path).steps() == [1]
    assert not list(tmp_path.glob(".tmp*"))


def test_a_damaged_one_that_cannot_be_marked_is_passed_over(tmp_path, monkeypatch, caplog):
    for step in (1, 2):
        save(tmp_path, step, 2)
    (tmp_path / "step-00000002" / "master.json").write_text("{}")
    monkeypatch.setattr(folder, "write_durably", refusing(folder.write_durably, {"BAD"}, errno.EROFS))
    assert results(2, lambda comm: Store(tmp_path).newest(comm))[1].step == 1
    assert "cannot be marked as damaged: [Errno 30]" in caplog.text
    assert folder.identity(tmp_path / "step-00000003") == ()  # one that is gone is not that which was looked at


def test_nothing_is_published_without_the_lock(tmp_path):
    disk = folder.Folder(tmp_path, 1, 0, "", 0)
    place = disk.make_directory(1, "run")
    disk.release()
    with pytest.raises(CheckpointError, match="the store was closed; save again"):
        disk.publish(place, 1, "run", None, [])
    assert not (tmp_path / "step-00000001").exists()


# Locks of others that come and go --------------------------------------------------------------------------------------


ELSEWHERE = {"host": "elsewhere", "token": "theirs"}


def holder_of(folder):
    return json.loads((folder / "LOCK").read_text())


def test_a_stale_lock_that_another_job_has_removed(tmp_path, monkeypatch):
    """Of several that find it stale one gets it; the others try again."""
    lock_of(tmp_path, **ELSEWHERE)

    def age(path):
        path.unlink()
        return 300.0

    monkeypatch.setattr(lock, "age_seconds", age)
    mine = Store(tmp_path)
    results(1, mine.claim)
    assert holder_of(tmp_path)["token"] != "theirs"


def test_a_stale_lock_that_another_job_has_taken_over_is_put_back(tmp_path, monkeypatch):
    lock_of(tmp_path, **ELSEWHERE)
    ages = iter([300.0, 0.0])

    def age(path):
        path.write_text(json.dumps(holder_of(tmp_path) | {"token": "faster"}))
        return next(ages)

    monkeypatch.setattr(lock, "age_seconds", age)
    [error] = run(1, lambda comm: Store(tmp_path).save(comm, 2, **NOTHING))
    assert "on elsewhere" in str(error)
    assert holder_of(tmp_path)["token"] == "faster"
    assert [path.name for path in tmp_path.glob("*LOCK*")] == ["LOCK"]


def test_a_lock_that_is_given_up_while_it_is_watched(tmp_path, monkeypatch):
    lock_of(tmp_path, **ELSEWHERE)
    monkeypatch.setattr(lock.time, "sleep", lambda _: (tmp_path / "LOCK").unlink())
    mine = Store(tmp_path)
    results(1, mine.claim)
    assert holder_of(tmp_path)["token"] != "theirs"


def test_jobs_that_take_the_lock_all_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.FolderLock, "_appear", lambda *_: (_ for _ in ()).throw(FileExistsError()))
    monkeypatch.setattr(lock.FolderLock, "_remove_stale", lambda *_: None)
    [error] = run(1, lambda comm: Store(tmp_path).save(comm, 1, **NOTHING))
    assert "other jobs take the lock all the time; let one of them write there" in str(error)
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_removed_stops_the_commit(tmp_path):
    def program(comm):
        st = Store(tmp_path)
        st.claim(comm)
        comm.allgather(None)
        (tmp_path / "LOCK").unlink(missing_ok=True)
        comm.allgather(None)
        st.save(comm, 1, **NOTHING)

    for error in run(2, program):
        assert "LOCK: the lock is gone: somebody has removed it, or has removed or moved the folder" in str(error)


def test_a_lock_is_touched_while_it_is_ours(tmp_path, monkeypatch):
    """Also after a time that could not be written."""
    path, owner, touched, real = tmp_path / "LOCK", lock.Owner.this_process("", "run"), [], os.utime
    owner.write(path)

    class Ended:
        turns = iter(["ours", "fails", "ours", "theirs", "gone"])

        def wait(self, seconds):
            assert seconds < lock._SILENT_SECONDS / 4
            self.turn = next(self.turns, None)
            if self.turn == "theirs":
                path.write_text("{}")
            elif self.turn == "gone":
                path.unlink()
            elif self.turn:
                real(path, (1, 1))  # in 1970
            return self.turn is None

    def utime(path):
        touched.append(ended.turn)
        if ended.turn == "fails":
            raise OSError(errno.ESTALE, "Stale file handle")
        real(path)
        ages.append(time.time() - path.stat().st_mtime)

    ended, ages = Ended(), []
    monkeypatch.setattr(lock.os, "utime", utime)
    lock._beat(path, owner, ended)
    assert touched == ["ours", "fails", "ours"]
    assert len(ages) == 2
    assert max(ages) < 1000


def test_the_age_of_what_is_gone_is_nothing(tmp_path):
    assert lock.age_seconds(tmp_path / "LOCK") == 0.0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "running"), [(None, "running"), (ProcessLookupError, ""), (PermissionError, "running")]
)
def test_without_proc_a_process_is_there_or_not(monkeypatch, error, running):
    def kill(pid, number):
        assert (pid, number) == (123, 0)
        if error:
            raise error

    monkeypatch.setattr(lock, "Path", lambda _: Path("/nowhere"))
    monkeypatch.setattr(lock.os, "kill", kill)
    assert lock._started(123) == running


def test_a_package_that_is_not_installed_has_no_version(tmp_path, monkeypatch):
    def version(name):
        raise manifest.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(manifest.metadata, "version", version)
    found = open_checkpoint(save(tmp_path, 3, 2))
    assert found.written_by["mpi_ef"] == "unknown"
    assert repr(found) == f"Checkpoint({str(found.path)!r}, step=3, world_size=2)"


def test_a_file_system_that_cannot_reserve_room(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(rankfile.os, "posix_fallocate", refuse)
    assert_holds(save(tmp_path, 1, 2), 1, 2)


def test_a_structure_is_made_without_its_data():
    """Of a file of 17 GiB only what is around the data is in memory: some pages."""
    sizes = {structure.INDEX: 5000, "float32": 2**34, "bfloat16": 6, "complex128": 2**30}
    written, size, places = structure.make_structure(sizes, {"rank": 3, "run": "a"})
    assert size > 17 * 2**30
    assert sum(len(data) for _, data in written) < 2**16
    assert all(start >= place + len(data) or place >= start + nbytes or not data
               for place, data in written for start, nbytes in places.values())
    assert {name: nbytes for name, (_, nbytes) in places.items()} == sizes


def test_hdf5_may_read_what_it_has_written_to_memory():
    """What was not written is zeros; what was written twice is what was written last."""
    memory = structure._Writes()
    with h5py.File(memory, "w") as file:
        file["x"] = np.arange(3000)
        file["x"][7] = -1
        file.create_dataset("zeros", 10_000, "u1", fillvalue=0)
    with h5py.File(memory, "r") as file:
        np.testing.assert_array_equal(file["x"][:], np.where(np.arange(3000) == 7, -1, np.arange(3000)))
        assert not file["zeros"][:].any()
