"""Training that is stopped, killed and continued ends with the parameters of one that was left alone."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import resident
from launching import finish, run, start
from patience import limit

STEPS = 140
SMALL = ["--steps", STEPS, "--warmup", 20, "--batch", 4, "--log-every", 10, "--eval-every", 100,
         "--checkpoint-every", 20]
GPT = ["--context", 16, "--layers", 1, "--heads", 2, "--width", 16]
MLP = ["--model", "mlp"]
TRAININGS = {"topk of adamw": [*GPT, "--optimizer", "adamw"],
             "1-bit adam": [*MLP, "--optimizer", "onebit-adam", "--freeze", 50]}
FAULTY = Path(__file__).with_name("faulty_training.py")
LIMIT = 120


def arguments(out, *more):
    return ["-m", "mpi_ef.jobs.train.program", *SMALL, *more, "--out", out]


def faulty(signal_, at, ranks, out, *more, after=0.0):
    """The same, where ranks send themselves a signal, some seconds after a step or another place."""
    fault = json.dumps({"signal": signal_, "at": at if isinstance(at, list) else [at], "ranks": ranks, "after": after})
    return [FAULTY, fault, *SMALL, *more, "--out", out]


def summary(out):
    return json.loads((out / "summary.json").read_text())


def losses(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["val_loss"], row["sent_nbytes"]) for row in rows]


def ranks_of(out):
    """Return the processes that train into this folder, without their launcher."""
    return [pid for pid, (words, _) in resident.processes().items() if str(out) in words]


def comes_true(condition, process):
    """Wait until it does, or the program has ended."""
    until = time.monotonic() + limit(LIMIT)
    while not condition():
        if process.poll() is not None:
            return condition()  # it may have come true just before
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.005)
    return True


def wait_for(condition, process):
    assert comes_true(condition, process), finish(process, within=1).text


def is_stopped(pid):
    """Tell whether a process has sent itself SIGSTOP."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def handles(pid, number):
    """Tell whether a process has a handler for a signal."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


@pytest.fixture(scope="module", params=["topk of adamw", pytest.param("1-bit adam", marks=pytest.mark.exhaustive)])
def whole(request, tmp_path_factory):
    """A run that nobody disturbs, and its options."""
    out = tmp_path_factory.mktemp("whole")
    ended = run(2, *arguments(out, *TRAININGS[request.param]), within=LIMIT)
    assert ended.status == 0, ended.text
    return out, TRAININGS[request.param]


def assert_same(out, whole):
    assert summary(out)["parameters_crc32"] == summary(whole)["parameters_crc32"]
    assert summary(out)["replicas_equal"]
    assert losses(out) == losses(whole)  # no row twice, none missing


def test_a_signal_saves_and_the_run_goes_on(whole, tmp_path):
    whole, options = whole
    ended = run(2, *faulty("SIGUSR1", 45, [0], tmp_path, *options), within=LIMIT)
    assert ended.status == 0, ended.text
    assert "go on with --resume exact" in ended.text
    assert (tmp_path / "requeue").read_text().startswith("SIGUSR1 on rank 0")
    assert not (tmp_path / "summary.json").exists()
    ended = run(2, *arguments(tmp_path, *options, "--resume", "exact"), within=LIMIT)
    assert ended.status == 0, ended.text
    assert "resumed after step" in ended.text
    assert not (tmp_path / "requeue").exists()
    assert_same(tmp_path, whole)
    (tmp_path / "summary.json").unlink()  # as if it had been killed between the last checkpoint and its end
    again = run(2, *arguments(tmp_path, *options, "--resume", "exact"), within=LIMIT)
    assert again.status == 0, again.text
    assert "nothing is left to do" in again.text
    assert_same(tmp_path, whole)


def test_a_signal_to_a_rank_that_is_still_starting(tmp_path):
    """It counts once the rank can save, and does not kill it before."""
    ended = run(2, *faulty("SIGUSR2", "building", [0, 1], tmp_path, *MLP), within=LIMIT)
    assert ended.status == 0, ended.text
    assert len(ended.lines_with("stopped after step 1: SIGUSR2 on rank")) == 1, ended.text


def test_a_signal_at_the_very_end(tmp_path):
    """It does not kill ranks that have nothing left to save."""
    ended = run(2, *faulty("SIGUSR2", "end", [0, 1], tmp_path, *MLP), within=LIMIT)
    assert ended.status == 0, ended.text
    assert (tmp_path / "summary.json").exists()


def test_kills_at_any_moment(whole, tmp_path):
    """SIGKILL to one rank or to all while a checkpoint is written, or a moment later, again and again."""
    whole, options = whole
    rng, kills = random.Random(0), 0
    for step, victims in ((40, [0]), (60, [0, 1]), (80, [1]), (100, [0, 1]), (120, [0])):
        killed = faulty("SIGKILL", f"save of step {step}", victims, tmp_path, *options, "--resume", "exact", "--keep", 2,
                        after=0.02 * rng.random())
        ended = run(2, *killed, within=LIMIT)
        kills += ended.status != 0
        assert (ended.status == 0) == (tmp_path / "summary.json").exists(), ended.text
        assert len(list(tmp_path.glob("checkpoints/step-*"))) <= 3
    assert kills >= 3  # the last ones may come when all is done
    ended = run(2, *arguments(tmp_path, *options, "--resume", "exact", "--keep", 2), within=LIMIT)
    assert ended.status == 0, ended.text
    assert_same(tmp_path, whole)


def test_a_finished_run_that_is_to_be_longer_is_not_finished(whole, tmp_path):
    """A batch script takes summary.json for the proof that nothing is left to do."""
    whole, options = whole
    out = shutil.copytree(whole, tmp_path / "run")
    longer = [*options, "--resume", "exact", "--steps", STEPS + 20]
    assert run(2, *arguments(out, *longer, "--stop-after", 5), within=LIMIT).status == 0
    assert (out / "requeue").exists()
    assert not (out / "summary.json").exists()


def test_another_number_of_ranks(whole, tmp_path):
    _, options = whole
    assert run(2, *faulty("SIGTERM", 45, [1], tmp_path, *options), within=LIMIT).status == 0
    refused = run(3, *arguments(tmp_path, *options, "--resume", "exact"), within=LIMIT)
    assert refused.status == 2
    assert len(refused.lines_with("was saved by 2 ranks, here there are 3")) == 1, refused.text
    assert (tmp_path / "requeue").exists()  # nothing was changed
    ended = run(3, *arguments(tmp_path, *options, "--resume", "redistribute"), within=LIMIT)
    assert ended.status == 0, ended.text
    assert summary(tmp_path)["ranks"] == 3
    assert summary(tmp_path)["replicas_equal"]
    rows = losses(tmp_path)
    assert [row[0] for row in rows] == list(range(10, STEPS + 1, 10))
    assert rows[-1][1] < rows[1][1]
    sent = [row[3] for row in rows]
    assert sent == sorted(sent)  # bytes of both numbers of ranks add up


def test_a_full_disk_stops_the_run_and_it_goes_on(whole, tmp_path):
    """A real file system of a few megabytes, that checkpoints fill; what is whole stays whole, and is gone on from."""
    whole, options = whole
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    mounted = subprocess.run(command, check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small file system is refused here: {mounted.stderr.strip()}")
    try:
        out = disk / "run"
        ended = run(2, *arguments(out, *options, "--checkpoint-every", 4, "--keep", 1000), within=LIMIT)
        assert ended.status == 1, ended.text  # it may have passed at the next start
        assert len(ended.lines_with("No space left on device")) == 1, ended.text
        assert "Traceback" not in ended.text
        assert len(list(out.glob("checkpoints/step-*"))) >= 2
        assert not list(out.glob("checkpoints/.tmp*"))
        ended = run(1, "-m", "mpi_ef.jobs.checkpoint", "verify", out, within=LIMIT)
        assert ended.status == 0, ended.text
        steps = sorted(out.glob("checkpoints/step-*"))
        for old in steps[:-1]:
            shutil.rmtree(old)
        ended = run(2, *arguments(out, *options, "--keep", 1, "--resume", "exact"), within=LIMIT)
        assert ended.status == 0, ended.text
        assert f"resumed after step {int(steps[-1].name[5:])};" in ended.text
        assert_same(out, whole)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_stopping_after_so_many_steps(whole, tmp_path):
    whole, options = whole
    for launch in range(3):
        ended = run(2, *arguments(tmp_path, *options, "--stop-after", STEPS // 3 + 1, "--save-in-background", "--resume",
                                  "exact"), within=LIMIT)
        assert ended.status == 0, ended.text
        assert (tmp_path / "requeue").exists() == (launch < 2)
    assert_same(tmp_path, whole)
    refused = run(1, *arguments(tmp_path, *MLP, "--checkpoint-every", 0, "--stop-after", 5), within=LIMIT)
    assert refused.status == 2
    assert "stop_after=5 has no effect with checkpoint_every=0" in refused.text


def test_a_second_run_in_the_folder_is_refused_and_changes_nothing(whole, tmp_path):
    whole, options = whole
    first = start(2, *faulty("SIGSTOP", 30, [0], tmp_path, *options))
    wait_for(lambda: [pid for pid in ranks_of(tmp_path) if is_stopped(pid)], first)
    second = run(2, *arguments(tmp_path, *options, "--seed", 7), within=LIMIT)
    assert second.status == 2
    (told,) = second.lines_with("mpi-ef: ")
    assert "writes a run there" in told
    (stopped,) = (pid for pid in ranks_of(tmp_path) if is_stopped(pid))
    os.kill(stopped, signal.SIGCONT)
    ended = finish(first, within=LIMIT)
    assert ended.status == 0, ended.text
    assert_same(tmp_path, whole)
    again = run(2, *arguments(tmp_path, *options), within=LIMIT)
    assert again.status == 2
    assert len(again.lines_with("resume from them, or take another folder")) == 1, again.text
    assert_same(tmp_path, whole)


def test_a_folder_is_one_runs_also_without_checkpoints(tmp_path):
    """A second run is refused on all ranks, with one line; a kill, which nobody can handle, lets the next one in."""
    without = [*MLP, "--checkpoint-every", 0]
    first = start(2, *faulty("SIGSTOP", 30, [0], tmp_path, *without))
    wait_for(lambda: [pid for pid in ranks_of(tmp_path) if is_stopped(pid)], first)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    second = run(2, *arguments(tmp_path, *without, "--seed", 7), within=LIMIT)
    assert second.status == 2, second.text
    (told,) = second.lines_with("mpi-ef: ")
    assert "writes a run there; give this job another folder" in told
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    for pid in ranks_of(tmp_path):
        os.kill(pid, signal.SIGKILL)
    assert finish(first, within=LIMIT).status != 0
    assert (tmp_path / "LOCK").exists()
    third = run(2, *arguments(tmp_path, *without, "--seed", 7), within=LIMIT)
    assert third.status == 0, third.text
    fourth = run(2, *arguments(tmp_path, *without), within=LIMIT)
    assert fourth.status == 2
    assert len(fourth.lines_with("has a finished run (summary.json); give another --out, or pass --overwrite")) == 1
    assert run(2, *arguments(tmp_path, *without, "--overwrite"), within=LIMIT).status == 0
    assert summary(tmp_path)["config"]["seed"] == 0


def test_other_options_are_named_when_going_on(whole, tmp_path):
    _, options = whole
    assert run(2, *arguments(tmp_path, *options, "--stop-after", 20), within=LIMIT).status == 0
    ended = run(2, *arguments(tmp_path, *options, "--resume", "exact", "--stop-after", 5, "--lr", 0.001), within=LIMIT)
    assert ended.status == 0, ended.text
    assert ended.lines_with("not as in the run that saved") == ["not as in the run that saved: lr was 0.006, is 0.001"]


def test_a_marker_that_cannot_be_removed_is_one_line(tmp_path):
    (tmp_path / "requeue").mkdir()
    ended = run(2, *arguments(tmp_path, *MLP), within=LIMIT)
    assert ended.status == 2, ended.text
    assert "Traceback" not in ended.text
    assert len(ended.lines_with("requeue: no run has written it, and this one would overwrite it")) == 1, ended.text
