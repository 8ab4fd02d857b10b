"""Files of strangers and of damaged disks beside the arrays: markers, locks, summaries, metrics, options. One line each."""

import contextlib
import errno
import json
import os
import socket
import time
from pathlib import Path

import pytest
from checkpoint_cases import save
from test_checkpoint_fuzz import commit
from test_checkpoint_store import NOTHING, lock_of
from test_checkpoint_tools import call
from virtual import results, run

from mpi_ef import documents
from mpi_ef.checkpoint import Store, lock, rankfile
from mpi_ef.checkpoint.manifest import write_durably
from mpi_ef.errors import CheckpointError, ConfigError, DataError, OptionError
from mpi_ef.jobs import checkpoint as tools
from mpi_ef.jobs import slurm
from mpi_ef.jobs.bench import program as bench
from mpi_ef.jobs.bench.table import check
from mpi_ef.jobs.cli import main
from mpi_ef.jobs.metrics import Metrics
from mpi_ef.jobs.reproduce.libsvm import load_libsvm
from mpi_ef.jobs.train.config import PHASES
from mpi_ef.jobs.train.datasets import Text
from mpi_ef.runtime.stopper import Stopper

ESCAPE = "\x1b]0;owned\x07"


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def listening(path):
    with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(path.parent):
        made.bind(path.name)


def hole(path):
    path.touch()
    os.truncate(path, 6 << 30)


STRANGE = (pipe, device, listening, hole, Path.mkdir)


@pytest.mark.parametrize("make", STRANGE, ids=lambda make: make.__name__)
def test_what_is_no_small_regular_file_is_not_read(tmp_path, make):
    path = tmp_path / "BAD"
    make(path)
    with pytest.raises(ValueError, match=r"BAD (is no regular file|is a link|has 6,442,450,944 bytes)"):
        documents.read(path, documents.MARK)
    with pytest.raises(ValueError, match="is no regular file|has .* bytes"):
        documents.read(path, documents.MARK, follow=True)
    if make is not hole:
        with pytest.raises(ValueError, match="is no regular file|is a link"):
            write_durably(path, b"x")
        with pytest.raises(ValueError, match="is no regular file"):
            next(documents.lines(path))


def test_a_link_inside_of_a_checkpoint_is_neither_read_nor_written(tmp_path):
    target, path = tmp_path / "theirs", tmp_path / "RUNS"
    target.write_text("secret")
    path.symlink_to(target)
    for action in (lambda: documents.read(path, 99), lambda: write_durably(path, b"x")):
        with pytest.raises(ValueError, match="RUNS is a link; put the file there"):
            action()
    assert target.read_text() == "secret"
    assert documents.read(path, 99, follow=True) == b"secret"  # of what a user names


@pytest.mark.parametrize("make", STRANGE, ids=lambda make: make.__name__)
def test_a_strange_mark_is_a_mark(tmp_path, capsys, make):
    """It hung `ls`, or filled its memory."""
    make(save(tmp_path, 1, 1) / "BAD")
    status, text = call(capsys, "ls", tmp_path)
    assert (status, text.count("damaged: the reason cannot be read: BAD ")) == (0, 1), text
    assert Store(tmp_path).steps() == []
    assert "the reason cannot be read" in str(run(1, lambda comm: Store(tmp_path).at(comm, 1))[0])


@pytest.mark.parametrize("make", STRANGE, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["RUNS", "LATEST", "LOCK", ".tmp-step-00000009-ab/OWNER"])
def test_strange_notes_hang_no_run(tmp_path, make, name):
    save(tmp_path, 1, 1)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    make(path)
    [outcome] = run(1, lambda comm: Store(tmp_path).save(comm, 2, **NOTHING))
    if name == "LOCK":
        assert "remove it when no job writes there" in str(outcome)
    else:
        assert outcome == tmp_path / "step-00000002"


def test_documents_have_limits():
    for text, what in ((b"[" * 201 + b"]" * 201, "nested more than 200"), (b"[" * 100_000, "nested too deeply"),
                       (b"[" + b"0," * (1 << 22) + b"0]", "values where"), (b"1" * 5000, "digits")):
        with pytest.raises(ValueError, match=what):
            documents.parse_json(text)
    assert documents.parse_json(b"[" * 200 + b"]" * 200) is not None
    with pytest.raises(ValueError, match=r"67,108,865 bytes where 67,108,864 are allowed"):
        documents.check_size(bytes(documents.DOCUMENT + 1))


def test_what_cannot_be_read_back_is_not_saved(tmp_path):
    """Of a document, and of an index of too many arrays: nothing is left behind."""
    deep: list = []
    for _ in range(250):
        deep = [deep]
    [error] = run(1, lambda comm: Store(tmp_path).save(comm, 1, replicated={}, per_rank={}, document=deep,
                                                       rank_document=None))
    assert isinstance(error, CheckpointError)
    assert "a document is too large: it is nested more than 200 times; keep numbers in arrays" in str(error)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "DOCUMENT", 300)
        [error] = run(1, lambda comm: Store(tmp_path).save(comm, 1, replicated={}, per_rank={}, document=None,
                                                           rank_document="x" * 250))
        assert "are allowed; keep numbers in arrays" in str(error)
    assert [path for path in tmp_path.iterdir() if path.name != "LOCK"] == []


def test_a_rank_file_that_is_a_hole_is_not_read(tmp_path):
    with (tmp_path / "x").open("wb") as file:
        file.truncate(3 << 40)
        entry = rankfile.FileEntry("x", 3 << 40, 0, ((4096, (3 << 40) - 8192),))
        with pytest.raises(CheckpointError, match="only 0 are on the disk"):
            rankfile.RankFile(tmp_path / "x", entry, {})
        with pytest.raises(CheckpointError, match="3,298,534,883,328 are no data"):
            rankfile.RankFile(tmp_path / "x", rankfile.FileEntry("x", 3 << 40, 0, ()), {})
        file.truncate(1 << 29)
        for start in range(0, 1 << 29, 1 << 26):  # a copy that left out zeros
            os.pwrite(file.fileno(), bytes(1 << 17), start)
    with (tmp_path / "x").open("rb") as file:
        assert rankfile._filled(file.fileno(), (1 << 29) // 1000) >= (1 << 29) // 1000


def test_many_files_that_are_holes_are_not_read(tmp_path, capsys):
    """Each of them is small enough to be read; all of them would take minutes."""
    path = save(tmp_path, 1, 1)
    told = json.loads((path / "master.json").read_text())
    for rank in range(1, 200):
        name, size = f"rank-{rank:05d}.h5", 250 << 20
        (path / name).touch()
        os.truncate(path / name, size)
        told["files"].append({"name": name, "size": size, "crc32": "00000000", "data": [[4096, size - 8192]]})
    commit(path, json.dumps(told | {"world_size": 200}).encode())
    for tool in ("ls", "verify"):
        status, text = call(capsys, tool, tmp_path)
        assert "of its 52,166," in text, text
        assert " are on the disk" in text
        assert status == (tool == "verify")


def test_terminals_are_not_obeyed(tmp_path, capsys):
    path = save(tmp_path, 1, 1)
    (tmp_path / f".tmp-step-00000002-{ESCAPE}").mkdir()
    (path / "BAD").write_text(f"it {ESCAPE}")
    for arguments in (["ls", tmp_path], ["verify", path], ["ls", tmp_path / ESCAPE], ["verify", tmp_path / "\udcff"]):
        text = call(capsys, *arguments)[1]
        assert all(line.isprintable() for line in text.split("\n")), text
    assert documents.shown(f"ä {ESCAPE}\n\ud800\u202e") == r"ä \x1b]0;owned\x07\n\ud800\u202e"
    assert documents.shown_lines("a\n\tb") == "a\n\\tb"


# Locks ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("age", "taken"), [(0, False), (300, True)])
@pytest.mark.parametrize("word", [0, 2], ids=["boot", "namespace"])
def test_a_lock_from_another_boot_or_pid_namespace(tmp_path, word, age, taken):
    """Containers may share the name of a host; the number of a process of one says nothing in another."""
    words = lock._started(os.getpid()).split()
    assert len(words) == 3
    words[1], words[word] = "17", "pid:[4]"
    lock_of(tmp_path, pid=os.getpid(), started=" ".join(words), token="theirs")
    then = time.time() - age
    os.utime(tmp_path / "LOCK", (then, then))
    error = run(1, lambda comm: Store(tmp_path).save(comm, 2, **NOTHING))[0]
    assert isinstance(error, CheckpointError) is not taken, error
    assert taken or "writes checkpoints there; give this job another folder, or remove LOCK" in str(error)


def test_a_lock_of_an_older_version_is_understood(tmp_path):
    words = lock._started(os.getppid()).split()[:2]
    lock_of(tmp_path, pid=os.getppid(), started=" ".join(words), token="theirs")
    assert "writes checkpoints there" in str(run(1, lambda comm: Store(tmp_path).save(comm, 2, **NOTHING))[0])
    (tmp_path / "LOCK").unlink()
    lock_of(tmp_path, pid=os.getppid(), started=f"{words[0]} 0", token="theirs")
    save(tmp_path, 2, 1)


def test_a_folder_that_refuses_writes_in_the_middle_tells_its_own_error(tmp_path, monkeypatch, caplog):
    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def program(comm):
        store = Store(tmp_path)
        store.save(comm, 1, **NOTHING)
        with monkeypatch.context() as patch:
            for name in ("unlink", "mkdir", "touch", "rename"):
                patch.setattr(Path, name, refuse)
            try:
                store.save(comm, 2, **NOTHING)
            finally:
                store.close()

    [error] = run(1, program)
    assert isinstance(error, CheckpointError)
    assert "Read-only file system" in str(error)
    assert "LOCK: cannot be removed (Read-only file system): remove it when no job writes there" in caplog.text


def test_metrics_that_a_full_disk_refuses_are_refused_once(tmp_path):
    metrics = Metrics(tmp_path, ["step"])
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        os.dup2(full.fileno(), metrics._json.fileno())
    with pytest.raises(OSError, match="No space left"):
        metrics.write({"step": 1})
    metrics.close()


# Runs -------------------------------------------------------------------------------------------------------------------

ROW = {"step": 1, "loss": 0.5, "val_loss": 0.5, "sent_nbytes": 5} | {
    f"{which}seconds_{phase}": 0.1 for phase in PHASES for which in ("", "min_", "max_")}
SUMMARY = {"val_loss": 0.5, "sent_nbytes": 5, "dense_nbytes": 9, "seconds_per_step": 0.1, "config": {"compressor": "sign"}}
BENCHED = {"name": "MPI_Allreduce", "kind": "dense", "median_seconds": 2.0, "min_seconds": 1.0, "max_seconds": 3.0,
           "sent_nbytes": 10, "entry_bits": None, "index_bits": None, "local_seconds": None, "touched_bytes": None}
BENCH = {"ranks": 2, "d": 5, "ratio": 0.1, "repeats": 3, "launches": 1, "mpi": "Some MPI", "rows": [BENCHED],
         "link": {"latency_seconds": 1e-6, "bytes_per_second": 1e9}, "devices": {"H100, kernels in Triton": "ranks 0,1"},
         "ef21_memory_vectors": 2.1}
WRONG = [None, [], {}, "x", 10**400, True, "\ud800", ESCAPE]
DEEP = '{"a":' * 100_000


def report(*arguments):
    main(["report", *map(str, arguments)])


def reported(capsys, *arguments):
    """Return the one line that a report ends with."""
    with pytest.raises(SystemExit) as ended:
        report(*arguments)
    captured, text = capsys.readouterr(), str(ended.value.code)
    assert captured.out == captured.err == ""
    assert text.startswith("mpi-ef: ")
    assert text.isprintable()
    return text


def made(folder, summary, rows):
    folder.mkdir()
    for name, content in (("summary.json", summary), ("metrics.jsonl", rows)):
        if callable(content):
            content(folder / name)
        else:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content) + "\n")
    return folder


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: ascii(wrong)[:9])
def test_summaries_with_wrong_values(tmp_path, capsys, wrong):
    report(made(tmp_path / "good", SUMMARY, ROW))
    assert "good" in capsys.readouterr().out
    for number, name in enumerate(SUMMARY):
        summary = SUMMARY | {name: wrong if name != "config" else {"compressor": [wrong]}}
        text = reported(capsys, made(tmp_path / str(number), summary, ROW))
        assert f"{number}: holds no finished run (" in text, name


@pytest.mark.parametrize("wrong", WRONG[1:], ids=lambda wrong: ascii(wrong)[:9])  # null is where nothing was measured
def test_metrics_with_wrong_values(tmp_path, capsys, wrong):
    for number, name in enumerate(("step", "loss")):
        text = reported(capsys, made(tmp_path / str(number), SUMMARY, ROW | {name: wrong}))
        assert f"{number}: holds no finished run (" in text, name
    run_of = made(tmp_path / "times", SUMMARY, ROW | {"seconds_wait": None, f"seconds_{PHASES[0]}": None})
    with pytest.raises(SystemExit, match="without times of phases; it cannot be drawn"):
        report(run_of, "--plot", tmp_path / "x.png")


@pytest.mark.parametrize("content", [*STRANGE, DEEP, "[1, 2]", "\x00" * 50, "9" * 5000],
                         ids=lambda content: str(content)[:15])
def test_runs_with_strange_files(tmp_path, capsys, content):
    assert "a: holds no finished run (" in reported(capsys, made(tmp_path / "a", content, ROW))
    assert "b: holds no finished run (" in reported(capsys, made(tmp_path / "b", SUMMARY, content))
    (tmp_path / "b" / "table.txt").write_text("x")
    assert "b: metrics.jsonl is damaged (" in reported(capsys, tmp_path / "b")


def test_a_report_of_an_odd_name_is_escaped(tmp_path, capsys):
    folder = made(tmp_path / f"{ESCAPE}\udcff", SUMMARY, ROW)
    report(folder)
    assert r"\x1b]0;owned\x07\udcff" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: ascii(wrong)[:9])
def test_results_of_the_benchmark_with_wrong_values(tmp_path, capsys, wrong):
    check(BENCH)
    path = tmp_path / "bench.json"
    texts = isinstance(wrong, str)
    cases = [BENCH | {name: wrong} for name in BENCH if name != "ratio" and not (name == "mpi" and texts)]
    cases += [BENCH | {"rows": [BENCHED | {name: wrong}]} for name in BENCHED
              if not (texts and name in ("name", "kind")) and not (wrong is None and BENCHED[name] is None)]
    for case in cases:
        path.write_text(json.dumps(case))
        assert "bench.json: is no result of mpi-ef bench --json" in reported(capsys, path)
        with pytest.raises(DataError, match="is no result of mpi-ef bench"):
            bench.read(path)
    path.write_text(json.dumps(BENCH | {"mpi": ESCAPE}))
    report(path)
    assert ESCAPE not in capsys.readouterr().out


@pytest.mark.parametrize("content", ["a = " + "[" * 100_000, "a = " + "9" * 5000, ".".join("a" * 3000) + " = 1", *STRANGE],
                         ids=lambda content: str(content)[:15])
def test_options_in_a_strange_file(tmp_path, capsys, content):
    path = tmp_path / "x.toml"
    if callable(content):
        content(path)
    else:
        path.write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", str(path)])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("make", [make for make in STRANGE if make is not hole], ids=lambda make: make.__name__)
def test_data_profiles_and_marks_are_regular_files(tmp_path, make):
    """A pipe hung who read it; a mark was written through a link."""
    path = tmp_path / "x.toml"
    make(path)

    def program(comm):
        stopper = Stopper(comm, signals=())
        for read, error in ((lambda: Text(path, context=8, seed=0), DataError), (lambda: load_libsvm(path), OptionError),
                            (lambda: slurm._profile(str(path)), ConfigError),
                            (lambda: stopper.mark_requeue(path, "some reason"), OptionError)):
            with pytest.raises(error, match=r"x.toml is no regular file|x.toml is a link"):
                read()

    results(1, program)


@pytest.mark.parametrize("line", ["[1]", "{}", '{"step": "x"}', '{"step": 1e999}', '{"step": 1, "loss": [2]}',
                                  "x" * (1 << 21)], ids=lambda line: line[:9])
def test_a_run_goes_on_from_no_strange_metrics(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl: it has a line|its row of step 1|has a line of more"):
        Metrics(tmp_path, ["step"], after=3)


# A process of its own ---------------------------------------------------------------------------------------------------


def test_what_nobody_trusts_is_read_by_another_process(tmp_path, capsys, monkeypatch):
    path = save(tmp_path, 1, 1)
    status, text = call(capsys, "verify", "--untrusted", path)
    assert (status, text.startswith(f"{path}: good, ")) == (0, True), text
    monkeypatch.setattr(tools, "_APART", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    status, text = call(capsys, "verify", "--untrusted", path)
    assert (status, text) == (1, f"{path}: BAD: the process that read it died of SIGSEGV; do not use it\n")


@pytest.mark.parametrize(("work", "told"), [("x = bytes(3 << 30)", "ended with status 1: MemoryError"),
                                            ("while True: pass", "died of SIGKILL"),
                                            ("with open(sys.argv[3] + '/x', 'w') as file: file.write('x')",
                                             "ended with status 1: OSError: [Errno 27] File too large")])
def test_the_other_process_has_limits(tmp_path, capsys, monkeypatch, work, told):
    path = save(tmp_path, 1, 1)
    monkeypatch.setattr(tools, "_APART", tools._APART.replace("from mpi_ef", f"{work}\nfrom mpi_ef"))
    monkeypatch.setattr(tools, "_SECONDS", 1)
    status, text = call(capsys, "verify", "--untrusted", path)
    assert (status, text) == (1, f"{path}: BAD: the process that read it {told}; do not use it\n")
