"""Programs whose standard streams are closed, or pipes that nobody reads: they go on, to their end and their own status."""

import ast
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import patience
import pytest
import virtual

import mpi_ef
from mpi_ef.jobs import cli
from mpi_ef.jobs.output import lasting_streams
from mpi_ef.runtime import ending

ROOT = Path(mpi_ef.__file__).resolve().parents[1]
TRAIN = ["train", "--model", "mlp", "--steps", "6", "--batch", "2", "--warmup", "1", "--log-every", "2", "--eval-every", "3",
         "--compressor", "sign", "--checkpoint-every", "3", "--out"]
WAYS = {  # how a shell starts a program; what is read of a pipe
    "stdout gone": ('exec "$@" >&3', ""),
    "stdout closed": ('exec "$@" >&-', ""),
    "stderr gone": ('exec "$@" 2>&3', "validation loss"),
    "all closed": ('exec "$@" <&- >&- 2>&-', ""),
    "all gone": ('exec "$@" >&3 2>&3', ""),
}


@contextmanager
def gone():
    """The descriptor of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        yield writing
    finally:
        os.close(writing)


def started(way, *words, folder):
    """A program that a shell starts in one of these ways, with status, stdout and stderr."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with gone() as pipe:
        return subprocess.run(["bash", "-c", WAYS[way][0].replace("3", str(pipe)), "sh", sys.executable, *words], text=True,
                              capture_output=True, check=False, pass_fds=[pipe], cwd=folder, env=environment,
                              timeout=patience.limit(60))


@pytest.mark.parametrize("way", [
    "stdout gone",
    *(pytest.param(way, marks=pytest.mark.exhaustive) for way in ("all closed", "stdout closed", "stderr gone", "all gone")),
])
def test_a_training_that_nobody_reads(tmp_path, way):
    done = started(way, "-m", "mpi_ef.jobs.cli", *TRAIN, "run", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert WAYS[way][1] in done.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["replicas_equal"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    assert (tmp_path / "run" / "checkpoints" / "step-00000006" / "COMMIT").exists()


PRINTS = """
import os, sys
from mpi_ef.jobs.output import lasting_streams
with lasting_streams():
    with open("file", "w") as file:
        os.write(1, b"of a library")
        os.write(2, b"of a library")
        print("of Python", sys.stdin.read(), flush=True)
        print("of Python", file=sys.stderr, flush=True)
        file.write(str(file.fileno() > 2))
"""


def test_no_file_gets_the_descriptor_of_a_closed_stream(tmp_path):
    """It would get what is printed, too."""
    done = started("all closed", "-c", PRINTS, folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "file").read_text() == "True"


def status_of(*words):
    try:
        cli.main(words)
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.mark.parametrize("status", [0, 1])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_the_status_is_that_of_the_program(monkeypatch, capfd, stream, status):
    """All of them go on: `checkpoint verify | head` has looked at everything before it says that all is good."""
    ended = []

    def run(words):
        for _ in range(3):
            print("x" * 9000, flush=True, file=getattr(sys, stream))
        ended.append(words)
        sys.exit(status)

    monkeypatch.setattr(cli, "import_module", lambda _: SimpleNamespace(main=run))
    for program in cli.PROGRAMS:
        with gone() as pipe, os.fdopen(os.dup(pipe), "w") as file, monkeypatch.context() as patch:
            patch.setattr(sys, stream, file)
            assert status_of(program, "a") == status
            assert getattr(sys, stream) is file
        with monkeypatch.context() as patch:
            patch.setattr(sys, stream, None)  # as after >&-
            assert status_of(program, "b") == status
            assert getattr(sys, stream) is None
    assert ended == [["a"], ["b"]] * len(cli.PROGRAMS)
    assert capfd.readouterr() == ("", "")


def test_streams_are_those_from_before(capsys):
    before = sys.stdin, sys.stdout, sys.stderr
    with lasting_streams() as output:
        print("printed")
    assert (sys.stdin, sys.stdout, sys.stderr) == before
    assert (capsys.readouterr().out, output.lost) == ("printed\n", "")


@pytest.mark.parametrize("closed", [False, True])
def test_a_rank_that_cannot_print_ends_the_others(monkeypatch, closed):
    """Its error is lost then; they must not wait for it."""
    class EndedError(Exception):
        pass

    def abort(status):
        raise EndedError(status)

    monkeypatch.setattr(ending, "keep_status", lambda status: None)
    with gone() as pipe, os.fdopen(os.dup(pipe), "w") as file, monkeypatch.context() as patch:
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, None if closed else file)
        with pytest.raises(EndedError, match="7"):
            ending.die(SimpleNamespace(Abort=abort), "text", 7, seconds=0.0)
        means = virtual.results(2, lambda comm: mpi_ef.print_metrics("step 1", comm, loss=comm.Get_rank()))
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())  # what is left in its buffer
    assert means == [{"loss": 0.5}] * 2


def test_the_library_writes_to_no_stream_itself():
    """`say` does, without an error."""
    found = []
    for path in sorted((ROOT / "mpi_ef").rglob("*.py")):
        if path.relative_to(ROOT / "mpi_ef").parts[0] in ("jobs", "slurm", "testing"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("sys.stdout", "sys.stderr"):
                found.append(f"{path}, line {node.lineno}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                found.append(f"{path}, line {node.lineno}")
    assert not found
