"""``mpi-ef supervise``: what is started, and what follows its end, in jobs of Slurm, PBS and LSF; signals."""

import os
import platform
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import patience
import pytest

from mpi_ef.jobs import slurm as slurm_program
from mpi_ef.jobs import supervise as program
from mpi_ef.runtime import batch, supervise
from mpi_ef.runtime.batch import run_command, write
from mpi_ef.runtime.supervise import LEAD_SECONDS, Child, newest_step

ROOT = Path(__file__).resolve().parents[1]


class Played(Child):
    """A program whose training is a function."""

    def __init__(self, play):
        super().__init__()
        self.play, self.commands, self.deadline = play, [], None

    def run(self, command, deadline=None):
        self.commands.append(list(command))
        self.deadline = deadline
        return self.play(self) or 0


class Site:
    """A folder, the variables of a job, and a batch system that notes what it is asked."""

    def __init__(self, folder, capfd):
        self.folder, self.capfd, self.run, self.calls = folder, capfd, folder / "run", []
        self.answers = {}  # status and output of a command, by its first words
        self.disk = folder / "disk"
        self.slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "name", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "2",
                      "SLURM_CPUS_PER_TASK": "3", "SLURM_NTASKS_PER_NODE": "2", "RUN_DIR": str(self.run),
                      "NODE_DIR": str(self.disk)}
        self.scratch = self.disk / f"mpi-ef-{os.getuid()}-7"

    def command(self, words, timeout=None, given=""):
        words = list(words)
        self.calls.append(" ".join(words))
        for start, answer in self.answers.items():
            if start in self.calls[-1]:
                return answer
        if words[:2] == ["mpi-ef", "slurm"] or "mpi-type" in words:
            return 0, "pmix\n"
        if words[0] == "squeue":
            return 0, "RUNNING None\n" if "%T" in words[-1] else "N/A\n"
        if words[0] == "srun":  # what is done on the nodes is done here
            own = next(place for place, word in enumerate(words) if place and not word.startswith("--"))
            return run_command(["env", "SLURM_NODEID=0", *words[own:]], timeout)
        if "bash" in words:  # and on ranks
            status, output = run_command(words[words.index("bash") :], timeout)
            return status, f"a line of {words[0]}\n[1] {output}" * 2
        return 0, ""

    def job(self, *words, play=lambda child: None, status=0, **variables):
        """Supervise a program whose training is `play`, and return the log; without variables set to None."""
        self.calls.clear()
        self.environ = self.slurm | {name: str(value) for name, value in variables.items()}
        self.environ = {name: value for name, value in self.environ.items() if value != "None"}
        self.child = Played(play)
        ended = program.run(list(words), self.environ, self.child)
        captured = self.capfd.readouterr()
        assert ended == status, captured
        return captured.out + captured.err

    def called(self, word):
        return [call for call in self.calls if call.startswith(word)]

    def path(self):
        """The folder of the run that goes on."""
        return self.folder / self.environ["RUN_DIR"]

    def save(self, step):
        folder = self.path() / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "COMMIT").touch()
        return folder

    def asks(self, step, status=0):
        """A training that saves, and is stopped."""

        def play(child):
            self.save(step)
            (self.path() / "requeue").write_text("SIGUSR2 on rank 0\n")
            return status

        return play

    def crashes(self, step, status):
        def play(child):
            if step:
                self.save(step)
            return status

        return play

    def finishes(self, child):
        (self.path() / "summary.json").write_text("{}")


@pytest.fixture
def site(tmp_path, monkeypatch, capfd):
    site = Site(tmp_path, capfd)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "run_command", site.command)
    monkeypatch.setattr(slurm_program, "ask_srun", lambda: "pmix")
    return site


# ------------------------------------------------------------------------------------------------------ what is started


def test_a_run_that_ends(site):
    said = site.job("--", "train", "--steps", "9", "--text", "a b", play=site.finishes)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d job 7: done\n", said)
    assert site.child.commands == [
        ["srun", "--mpi=pmix", "--kill-on-bad-exit=1", "mpi-ef", "train", "--checkpoint-every", "100", "--resume", "exact",
         "--steps", "9", "--text", "a b", "--out", str(site.run)]
    ]
    assert not site.called("scontrol")
    assert not list(site.disk.iterdir())  # nothing stays on the nodes


def test_what_the_program_is_told(site):
    ends = int(datetime(2031, 2, 3, 4, 5, 6).timestamp())
    site.answers["squeue --noheader --jobs=7 --format=%e"] = 0, "2031-02-03T04:05:06\n"
    site.job("--", "train", play=site.finishes, CHECKPOINT_EVERY=5, MPI_TYPE="pmi2", MPI_EF="/my/mpi-ef")
    for name in ("SRUN_CPUS_PER_TASK", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        assert site.environ[name] == "3"
    assert site.environ["PYTHONUNBUFFERED"] == "1"
    assert site.environ["NUMBA_CACHE_DIR"] == str(site.scratch / "numba")
    assert site.environ["SLURM_JOB_END_TIME"] == str(ends)
    assert site.child.deadline == ends
    (words,) = site.child.commands
    assert words[:5] == ["srun", "--mpi=pmi2", "--kill-on-bad-exit=1", "/my/mpi-ef", "train"]
    assert words[words.index("--checkpoint-every") + 1] == "5"
    site.job("--", "train", play=site.finishes, SLURM_JOB_END_TIME=12345, MPI_TYPE="")
    assert site.child.deadline == 12345
    assert not site.called("squeue --noheader --jobs=7 --format=%e")
    assert site.child.commands[0][:2] == ["srun", "--kill-on-bad-exit=1"]  # left to Slurm
    assert not site.called("mpi-ef")
    site.answers.clear()
    site.job("--", "train", play=site.finishes)  # no time limit, and nobody asked for an --mpi
    assert "SLURM_JOB_END_TIME" not in site.environ
    assert site.child.deadline is None


def test_options_variables_and_files_that_disagree(site):
    """A flag counts before a variable, and that before a file; what is wrong is refused before anything is started."""
    (site.folder / "options.toml").write_text("max-restarts = 1\nmpi-type = 'none'\n")
    words = ("--config", "options.toml", "--", "train")
    site.job(*words, play=site.asks(10), MAX_RESTARTS=2, SLURM_RESTART_COUNT=1)
    assert site.child.commands[0][1] == "--mpi=none"
    said = site.job("--max-restarts", "1", *words, play=site.asks(20), MAX_RESTARTS=2, SLURM_RESTART_COUNT=1, status=1)
    assert "MAX_RESTARTS=1 is reached" in said
    for words, variables, text in [
        (["--", "train"], {"MAX_RESTARTS": "many"}, "--max-restarts: invalid int value: 'many'"),
        (["--", "train"], {"FORWARD": "USR9"}, "forward=USR9 is no signal; take USR1, USR2, TERM or none"),
        (["--ranks", "1 x", "--", "train"], {}, "ranks=1 x are no numbers"),
        (["--sweeep", "x", "--", "train"], {}, "did you mean --sweep?"),
        (["--image", "", "--", "train"], {}, "IMAGE is not set: IMAGE=mpi_ef.sif sbatch container.sbatch"),
    ]:
        with pytest.raises(SystemExit) as caught:
            site.job(*words, **variables)
        assert caught.value.code == 2
        assert text in site.capfd.readouterr().err
        assert not site.child.commands


@pytest.mark.parametrize(("words", "variables", "wanted"), [
    (["--", "train", "--epochs", "3"], {}, ["python3", "-m", "mpi4py", "{program}", "--epochs", "3"]),
    (["--chain", "--", "train"], {"PYTHON": "/opt/python"}, ["/opt/python", "-m", "mpi4py", "{program}"]),
    (["--image", "x.sif", "--", "train", "a"], {}, ["x.sif", "python3", "-m", "mpi4py", "{program}", "a"]),
    (["--", "other", "a"], {}, ["other", "a"]),
])
def test_a_program_of_ones_own_in_every_template(site, words, variables, wanted):
    """It has finished when it ends with status 0: there is no summary of train."""
    program = site.folder / "my training.py"
    if "train" in words:
        assert f"PROGRAM={program} cannot be read" in site.job(*words, PROGRAM=program, status=2, **variables)
    program.touch()
    assert "done" in site.job(*words, PROGRAM=program, **variables)
    (command,) = site.child.commands
    assert command[-len(wanted) :] == [word.format(program=program) for word in wanted]


def test_what_cannot_be_supervised(site):
    for words in ((), ("python", "train.py"), ("--chain",)):
        assert "there is no program; mpi-ef supervise [OPTIONS] -- PROGRAM" in site.job(*words, status=2)
    assert "this is no job of Slurm, PBS or LSF" in site.job("--", "train", SLURM_JOB_ID=None, status=2)
    pbs = {"SLURM_JOB_ID": None, "PBS_JOBID": "1.x", "PBS_O_WORKDIR": site.folder}
    assert "are for Slurm" in site.job("--chain", "--", "train", status=2, **pbs)
    site.answers["slurm mpi-type"] = 2, ""
    assert "mpi-ef slurm mpi-type ended with status 2; set MPI_TYPE" in site.job("--", "train", status=2)
    (site.folder / "file").write_text("")
    assert "File exists" in site.job("--", "train", RUN_DIR="file", MPI_TYPE="", status=1)


def test_a_text_is_copied_to_the_nodes(site):
    (site.folder / "my corpus.txt").write_text("words")
    seen = []

    def play(child):
        words = child.commands[0]
        seen.append(Path(words[words.index("--text") + 1]).read_text())
        site.finishes(child)

    site.job("--", "train", TEXT="my corpus.txt", play=play)
    assert seen == ["words"]
    assert str(site.scratch / "text") in site.child.commands[0]
    assert not site.scratch.exists()
    assert "TEXT=none.txt cannot be read" in site.job("--", "train", TEXT="none.txt", status=2)
    (site.folder / "full").write_text("")
    said = site.job("--", "train", NODE_DIR=site.folder / "full", status=1)
    assert "set NODE_DIR to a folder on the nodes' own disks, or exclude the node" in said
    assert not site.child.commands


ONLY_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
SYSTEMS = {
    "Slurm": {},
    "a launcher": {"LAUNCH": "ibrun -x"},
    "PBS": {"SLURM_JOB_ID": None, "PBS_O_WORKDIR": ".", "PBS_JOBID": "7.server", "PBS_NODEFILE": "nodes"},
    "LSF": {"SLURM_JOB_ID": None, "LSB_JOBID": "7", "LSB_DJOB_NUMPROC": 2},
}


@pytest.mark.parametrize("umask", [0o022, 0])
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_folder_on_the_nodes_is_private(site, system, umask):
    (site.folder / "nodes").write_text("n1\n")
    seen = []

    def play(child):
        seen.append((site.environ["NUMBA_CACHE_DIR"], stat.filemode(site.scratch.stat().st_mode)))
        site.finishes(child)

    before = os.umask(umask)
    try:
        said = site.job("--", "train", play=play, **SYSTEMS[system])
    finally:
        os.umask(before)
    assert seen == [(str(site.scratch / "numba"), "drwx------")]
    assert said.count("\n") == 1  # done
    assert not site.scratch.exists()


@pytest.mark.parametrize("kind", ["open", "group", "link", "file", "others", pytest.param("another", marks=ONLY_ROOT)])
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_folder_that_somebody_has_made_before(site, system, kind):
    """Its name can be guessed. A run with srun, which has its text there, does not start; others share no machine code."""
    (site.folder / "nodes").write_text("n1\n")
    elsewhere = site.folder / "elsewhere"
    for folder in (elsewhere, site.disk):
        folder.mkdir()
    if kind == "file":
        site.scratch.touch()
    elif kind == "link":
        site.scratch.symlink_to(elsewhere)
        elsewhere.chmod(0o700)
    else:
        site.scratch.mkdir()
        site.scratch.chmod({"open": 0o777, "group": 0o770, "others": 0o702, "another": 0o700}[kind])
    if kind == "another":
        os.chown(site.scratch, 12345, 12345)
    slurm = system == "Slurm"
    said = site.job("--", "train", play=site.finishes, status=slurm, **SYSTEMS[system])
    assert "NUMBA_CACHE_DIR" not in site.environ
    line, *done = [line for line in said.splitlines() if " job 7: " in line]
    assert str(site.scratch) in line
    assert "not this user's alone" in line
    assert "set NODE_DIR to" in line
    assert slurm or f" on {platform.node()} is" in line
    assert len(done) == len(site.child.commands) == (not slurm)
    assert not list(elsewhere.iterdir())
    assert os.path.lexists(site.scratch)  # it is none of this job


def test_a_launcher_that_fails_makes_no_folder(site):
    site.answers["ibrun"] = 124, ""
    said = site.job("--", "train", play=site.finishes, LAUNCH="ibrun -x")
    assert f"{site.scratch} cannot be made on the nodes (ibrun -x: status 124): ranks share no machine code there" in said
    assert "NUMBA_CACHE_DIR" not in site.environ


def test_a_folder_that_is_left_on_nodes_is_reported(site):
    site.answers["rm -rf"] = 124, ""
    assert f"{site.scratch} is still there on some nodes" in site.job("--", "train", play=site.finishes)


def test_another_launcher_than_srun(site):
    """ibrun: no --mpi, no steps of our own on the nodes."""
    (site.folder / "corpus.txt").write_text("words")
    site.job("--", "train", LAUNCH="ibrun -x", TEXT="corpus.txt", play=site.finishes)
    assert site.child.commands[0][:4] == ["ibrun", "-x", "mpi-ef", "train"]
    assert " --text corpus.txt " in " ".join(site.child.commands[0])
    assert not site.called("srun")
    assert not site.called("mpi-ef")
    for each in ("nodes", "ranks"):
        assert f"each={each} needs srun" in site.job("--each", each, "--", "bench", LAUNCH="ibrun", status=2)


def test_a_program_of_ones_own(site):
    """It finds its folder and its text in the environment, and has no summary.json."""
    (site.folder / "corpus.txt").write_text("words")
    site.job("--", "python3", "-m", "mpi4py", "mine.py", "--out", "x", TEXT="corpus.txt")
    assert site.child.commands[0][3:] == ["python3", "-m", "mpi4py", "mine.py", "--out", "x"]
    assert site.environ["RUN_DIR"] == str(site.run)
    assert site.environ["TEXT"] == str(site.scratch / "text")
    site.job("--", "mine", play=site.asks(10))
    assert site.called("scontrol") == ["scontrol requeue 7"]
    assert f"(status 0, and there is no {site.run}/result)" in site.job("--proof", "result", "--", "mine", status=1)


def test_the_default_folder_of_a_run(site):
    site.job("--", "train", RUN_DIR=None, play=site.finishes)
    assert site.environ["RUN_DIR"] == "runs/name-7"
    (site.folder / "list").write_text("--lr 1\n--lr 2\n--lr 3\n")
    for task in (1, 3):
        array = {"RUN_DIR": None, "SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_MAX": 3}
        site.job("--sweep", "list", "--", "train", play=site.finishes, SLURM_ARRAY_JOB_ID=6, **array)
        assert site.environ["RUN_DIR"] == f"runs/name-6/{task}"
        site.job("--chain", "--", "train", play=site.asks(task), status=task // 3, SLURM_ARRAY_JOB_ID=5, **array)
        assert site.environ["RUN_DIR"] == "runs/name-5"
    site.job("--sweep", "list", "--", "train", play=site.finishes, SLURM_ARRAY_JOB_ID=6, SLURM_ARRAY_TASK_ID=2)
    assert site.environ["RUN_DIR"] == str(site.run / "2")


def test_tasks_of_a_sweep_differ(site, monkeypatch):
    task = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "2"}
    (site.folder / "list").write_text("--lr 1\n--lr 2 --seed 3\n")
    said = site.job("--sweep", "list", "--", "train", "--steps", "9", play=site.finishes, **task)
    assert "job 6_2: --lr 2 --seed 3" in said
    assert "--resume exact --lr 2 --seed 3 --steps 9 --out" in " ".join(site.child.commands[0])
    site.job("--sweep", "list", "--", "mine", "--steps", "9", **task)
    assert site.child.commands[0][3:] == ["mine", "--steps", "9", "--lr", "2", "--seed", "3"]
    with (site.folder / "list").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        site.job("--sweep", "-", "--", "train", play=site.finishes, **task)
        assert "--lr 2 --seed 3" in " ".join(site.child.commands[0])
    task["SLURM_ARRAY_TASK_ID"] = "3"
    said = site.job("--sweep", "list", "--", "train", status=2, **task)
    assert "list has 2 lines, nothing in line 3: see --array" in said
    assert "CONFIGS=none cannot be read (" in site.job("--sweep", "none", "--", "train", status=2, **task)
    assert "a sweep is an array" in site.job("--sweep", "list", "--", "train", status=2)
    assert not site.child.commands


def test_a_container_is_started_by_srun(site):
    site.job("--image", "image.sif", "--", "train", BIND="/data", play=site.finishes)
    assert site.called("apptainer") == ["apptainer exec image.sif mpi-ef slurm mpi-type --offered -"]
    binds = f"{site.folder},{site.run},{site.scratch},/data"
    assert site.child.commands[0][:9] == ["srun", "--mpi=pmix", "--kill-on-bad-exit=1", "apptainer", "exec", "--bind", binds,
                                          "image.sif", "mpi-ef"]
    site.job("--image", "i.sif", "--", "train", APPTAINER="singularity", MPI_TYPE="pmi2", play=site.finishes)
    assert site.child.commands[0][1:5] == ["--mpi=pmi2", "--kill-on-bad-exit=1", "singularity", "exec"]
    assert not site.called("singularity")


def test_the_benchmark_on_growing_numbers_of_nodes(site):
    site.job("--each", "nodes", "--", "bench", "--d", "1000", SLURM_JOB_NUM_NODES=5)
    assert site.child.commands == [
        ["srun", "--mpi=pmix", "--kill-on-bad-exit=1", f"--nodes={nodes}", f"--ntasks={2 * nodes}", "--ntasks-per-node=2",
         "mpi-ef", "bench", "--json", f"{site.run}/nodes-{nodes}.json", "--d", "1000"] for nodes in (1, 2, 4)
    ]
    assert site.run.is_dir()
    assert not site.scratch.exists()

    def first_fails(child):
        return 4 if len(child.commands) == 1 else 0

    said = site.job("--each", "nodes", "--", "bench", SLURM_JOB_NUM_NODES=2, play=first_fails, status=4)
    assert len(site.child.commands) == 2
    assert "4 ranks on 2 nodes" in said
    assert "passed" not in said


def test_the_tests_on_growing_numbers_of_ranks(site):
    said = site.job("--each", "ranks", "--", "tests", SLURM_NTASKS=3, SLURM_JOB_NUM_NODES=2)
    assert [words[3:] for words in site.child.commands] == [
        [f"--nodes={nodes}", f"--ntasks={ranks}", "--distribution=cyclic", "tests"]
        for nodes, ranks in ((1, 1), (2, 2), (2, 3))
    ]
    assert "all passed" in said
    assert not site.run.exists()

    def stopped(child):
        child.asked = True

    site.job("--each", "ranks", "--ranks", "2 3", "--", "tests", play=stopped, status=1)
    assert [words[4] for words in site.child.commands] == ["--ntasks=2"]


# ----------------------------------------------------------------------------------------- what follows the end of a run


@pytest.mark.parametrize("array", [{}, {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "2"}])
def test_a_run_that_was_stopped_is_requeued(site, array):
    said = site.job("--", "train", play=site.asks(10), **array)
    assert site.called("scontrol") == ["scontrol requeue 6_2" if array else "scontrol requeue 7"]
    assert "stopped at step 10: SIGUSR2 on rank 0" in said
    assert "requeued, restart 1 of at most 20" in said
    assert not site.scratch.exists()
    said = site.job("--", "train", play=site.finishes, SLURM_RESTART_COUNT=1, **array)  # the mark was taken away
    assert "done" in said
    assert not site.called("scontrol")


def test_a_requeue_that_is_refused(site):
    site.answers["scontrol"] = 1, ""
    said = site.job("--", "train", play=site.asks(10), status=1)
    assert f"cannot be requeued; submit it again with RUN_DIR={site.run}" in said


@pytest.mark.parametrize("status", [1, 137])
def test_a_crash_is_requeued_when_there_was_progress(site, status):
    site.job("--", "train", play=site.crashes(10, status))
    assert site.called("scontrol") == ["scontrol requeue 7"]
    said = site.job("--", "train", play=site.crashes(0, status), status=status, SLURM_RESTART_COUNT=1)
    assert f"no progress since step 10 (status {status})" in said
    assert not site.called("scontrol")


def test_a_stop_without_progress_is_not_requeued(site):
    site.job("--", "train", play=site.asks(10))

    def asks_again(child):
        (site.run / "requeue").write_text("SIGUSR2 on rank 0\n")

    assert "no progress since step 10 (SIGUSR2 on rank 0)" in site.job("--", "train", play=asks_again, status=1)
    assert not site.called("scontrol")


def test_wrong_options_are_not_tried_again(site):
    said = site.job("--", "train", play=site.crashes(10, 2), status=2)
    assert "options, data or checkpoints are wrong (status 2): not started again" in said
    assert not site.called("scontrol")


def test_only_whole_checkpoints_are_progress(tmp_path):
    assert newest_step(tmp_path) == 0
    for name in ("step-00000010", "step-00000020", "step-00000100", ".tmp-step-00000200-1", "step-none"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(tmp_path) == 0
    for step in (20, 100):
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "COMMIT").touch()
    assert newest_step(tmp_path) == 100
    (tmp_path / "checkpoints/step-00000100/BAD").touch()
    assert newest_step(tmp_path) == 20


def test_restarts_end(site):
    assert "MAX_RESTARTS=20" in site.job("--", "train", play=site.asks(10), SLURM_RESTART_COUNT=20, status=1)
    said = site.job("--", "train", play=site.crashes(20, 5), SLURM_RESTART_COUNT=1, MAX_RESTARTS=1, status=5)
    assert "not started again: MAX_RESTARTS=1 is reached" in said
    assert not site.called("scontrol")
    site.job("--", "train", play=site.crashes(30, 5), SLURM_RESTART_COUNT=1, MAX_RESTARTS=2)
    assert site.called("scontrol")


def test_a_signal_before_the_first_save_has_one_more_chance(site):
    def signalled(child):
        child.asked = True
        return 140

    for play in (signalled, site.asks(10), signalled):  # progress forgives
        site.job("--", "train", play=play)
        assert site.called("scontrol"), play
    assert "no progress since step 10 (status 140)" in site.job("--", "train", play=signalled, status=140)
    assert not site.called("scontrol")


class Hasty:
    """Launches of a job of 310 s that starts at 1000 s: its signal comes at 1010 s."""

    times = {"SLURM_JOB_START_TIME": 1000, "SLURM_JOB_END_TIME": 1310}  # noqa: RUF012

    def __init__(self, site):
        self.site, self.step = site, 0

    def launch(self, first, last, *, status=0, signalled=True, words=(), **variables):
        """One whose first step ends at `first` and which stops at `last`, a step further."""

        def play(child):
            self.step += 1
            self.site.save(self.step)
            text = f"SIGUSR2 on rank 0\n{f'steps from {first:.3f} to {last:.3f}' if first else ''}\n"
            (self.site.path() / "requeue").write_text(text)
            if signalled:
                child.asked, child.asked_at = True, 1010.0

        return self.site.job(*words, "--", "train", play=play, status=status, **self.times | variables)


def test_three_stops_in_a_row_that_train_for_less_than_their_start_took_end_a_run(site):
    """A time limit that the lead of --signal nearly uses up made one step per start, twenty times."""
    hasty = Hasty(site)
    blame = ("the signal came 10 s after the start and 300 s before the end of a job of 310 s, which trained for 2 s after "
             "9 s until its first step: ask for more time (--time), or for a shorter lead where --signal has sent it "
             "(B:USR2@SECONDS)")
    said = hasty.launch(1009, 1011)
    assert "stopped at step 1: SIGUSR2 on rank 0\n" in said
    assert f"job 7: {blame}\n" in said
    said = hasty.launch(1009, 1011)
    assert "requeued" in said
    assert "trained" not in said
    said = hasty.launch(1009, 1011, status=1)
    assert f"stopped 3 times in a row before it has trained for as long as its start took; {blame}" in said
    assert "not started again" in said
    assert not site.called("scontrol")
    assert "requeued" in hasty.launch(1009, 1011)  # submitted again: it counts from the beginning


def test_what_is_no_hasty_stop_begins_anew(site):
    """Enough training; preemption; a stop of which nothing is known but when the signal came."""
    hasty = Hasty(site)
    preempted = {"--Format=PreemptTime": (0, "2031-02-03T04:05:06\n")}
    for first, last, answers in ((1004, 1008, {}), (1009, 1011, preempted), (None, None, {})):
        for _ in range(2):
            hasty.launch(1009, 1011)
        site.answers |= answers
        said = hasty.launch(first, last)
        site.answers.clear()
        assert "requeued" in said
        assert ("before the end of a job of 310 s: ask for more time" in said) == (first is None)
    for _ in range(2):
        hasty.launch(1009, 1011)
    assert "requeued" in hasty.launch(None, None, SLURM_JOB_END_TIME=1015)
    hasty.launch(1009, 1011)
    assert (site.run / "hasty-stops").read_text() == "1\n"


def test_a_signal_before_the_start_is_blamed_on_the_time_limit(site):
    """Twice: the second one ends the run."""
    def signalled(child):
        child.asked, child.asked_at = True, 1010.0

    for status, text in ((0, ""), (1, "not started again; ")):
        said = site.job("--", "train", play=signalled, status=status, **Hasty.times)
        assert f"{text}the signal came 10 s after the start and 300 s before the end of a job of 310 s: ask for" in said


def test_hasty_stops_end_chains_and_jobs_of_pbs_and_lsf(site):
    hasty = Hasty(site)
    site.answers["qstat"] = 1, ""
    now = time.time()
    pbs = {"SLURM_JOB_ID": None, "PBS_O_WORKDIR": site.folder, "PBS_JOBID": "12.server",
           "PBS_NODEFILE": site.folder / "nodes"}
    lsf = {"SLURM_JOB_ID": None, "LS_SUBCWD": site.folder, "LSB_JOBID": "12", "LSB_DJOB_NUMPROC": 2}
    (site.folder / "nodes").write_text("n1\n")
    array = {"SLURM_ARRAY_JOB_ID": 6, "SLURM_ARRAY_TASK_ID": 1, "SLURM_ARRAY_TASK_MAX": 9}
    for variables, words, advice in ((array, ["--chain"], "(--time)"), (pbs, [], "(walltime)"), (lsf, [], "(-W), or for a")):
        first = 1009 if variables is array else now + 1e6  # such a job began when it was looked at
        for number in range(3):
            said = hasty.launch(first, first + 2, words=words, signalled=variables is array, status=number // 2, **variables)
            assert (advice in said) == (number != 1)
        assert "stopped 3 times in a row" in said
    assert "it stopped 10000" in said


@pytest.mark.parametrize(("line", "environ", "ends", "text"), [
    ("#SBATCH --signal=B:USR2@300", {}, 310, "and --signal=B:USR2@300 of its script comes 300 s before that"),
    ("#SBATCH --signal=B:USR2@60\n#SBATCH --signal  USR2@300", {}, 310, "--signal=USR2@300 of its script comes 300 s"),
    ("#SBATCH --signal=B:USR2@300", {}, 200, ": 0 s are left for start and training; ask for more time or a shorter lead, "),
    ("#SBATCH --signal=B:USR2@300", {}, 3600, ""),
    ("#SBATCH --signal=B:USR2@300", {"SBATCH_SIGNAL": "B:USR1@30"}, 310, ""),
    ("#SBATCH --signal=B:USR2", {}, 100, "and training stops 60 s before that"),
    ("", {}, 100, "s are left for start and training; ask for more time\n"),
    ("", {}, -100, ""),
])
def test_the_lead_of_the_signal_is_compared_with_the_time_limit_at_the_start(site, line, environ, ends, text):
    (site.folder / "script").write_text(f"#!/bin/bash\n{line}\n##SBATCH --signal=B:USR2@7\n")
    ends = {"SLURM_JOB_END_TIME": int(time.time()) + ends}
    said = site.job("--script", "script", "--", "train", play=site.finishes, **environ, **ends)
    assert text in said
    assert ("the job ends in " in said) == bool(text)


def test_preemption_with_grace_before_the_first_save_has_one_more_chance(site):
    """Slurm tells the ranks only; what srun says then differs (143, 14 with PMIx)."""
    assert "no progress" in site.job("--", "train", play=site.crashes(0, 14), status=14)
    site.answers["--Format=PreemptTime"] = 0, "2031-02-03T04:05:06\n"
    site.job("--", "train", play=site.crashes(0, 14))
    assert site.called("scontrol")


def test_a_launcher_that_starts_nothing_and_says_0_is_no_success(site):
    assert "no progress since step 0 (status 0, and there is no " in site.job("--", "train", status=1)
    assert not site.called("scontrol")


@pytest.mark.parametrize("state", ["COMPLETING None", "CANCELLED None", "PENDING BeginTime"])
def test_who_ends_the_job_decides(site, state):
    """After scancel a job shall not come back; after preemption and scontrol requeue Slurm does it itself."""
    site.answers["squeue --noheader --jobs=7 --format=%T"] = 0, f"{state}\n"
    said = site.job("--", "train", play=site.asks(10), status=1)
    assert f"Slurm is ending this job ({state}) and decides whether it starts again" in said
    assert not site.called("scontrol")


@pytest.mark.parametrize("answer", [(1, "error"), (0, "SIGNALING None\n"), (0, "COMPLETING TimeLimit\n")])
def test_who_else_may_have_to_do_with_it(site, answer):
    """Slurm does not answer; it still sends the signal; a step took longer than the time after the signal."""
    site.answers["squeue --noheader --jobs=7 --format=%T"] = answer
    site.job("--", "train", play=site.crashes(20, 143))
    assert site.called("scontrol") == ["scontrol requeue 7"]


def test_what_is_interrupted_by_hand_does_not_come_back(site):
    """Ctrl-C; bkill."""

    def interrupted(child):
        site.save(10)
        child.interrupted = True
        return 130

    assert "interrupted at step 10: not started again" in site.job("--", "train", play=interrupted, status=130)
    assert not site.called("scontrol")


def test_a_signal_before_the_start_is_a_stop(site):
    """Nothing is started then; the next time it is, and if that time there is a signal, too, something is wrong."""
    site.slurm["MPI_TYPE"] = ""
    environ = dict(site.slurm)
    for status, text in (
        (0, "requeued"),
        (1, "no progress since step 0 (a signal came before the program was started)"),
    ):
        child = Played(site.finishes)
        child.asked = True
        assert program.run(["--", "train"], environ, child) == status
        assert text in site.capfd.readouterr().out
        assert not child.commands
    assert len(site.called("scontrol")) == 1


def test_a_chain(site):
    array = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_MAX": "4"}

    def task(number, play, **options):
        return site.job("--chain", "--", "train", play=play, SLURM_ARRAY_TASK_ID=number, **array, **options)

    task(1, site.asks(10))
    task(2, site.crashes(20, 1), MAX_RESTARTS=0)  # the next task has another try
    task(3, site.finishes)
    assert "the training is finished" in task(4, site.finishes)
    assert not site.child.commands
    (site.run / "done-6").unlink()
    said = task(4, site.asks(40), status=1)
    assert f"the array ends here, the training does not: submit it again with RUN_DIR={site.run}" in said
    assert not site.called("scontrol")
    assert not site.called("scancel")
    for status in (2, 3):
        task(1, site.crashes(0, status), status=status)
        assert site.called("scancel") == ["scancel --state=PENDING 6"]
        assert not site.called("scontrol")
    site.answers["scancel"] = 1, ""
    assert "the other tasks could not be cancelled" in task(1, site.crashes(0, 3), status=3)


def test_pbs(site):
    """Another job is submitted where Slurm would requeue."""
    site.answers["qstat"] = 0, "Job Id: 12.server\n    Job_Name = name\n    Resource_List.walltime = 01:00:30\n"
    (site.folder / "nodes").write_text("n1\nn1\nn2\n")
    (site.folder / "script").write_text("the script")
    pbs = {"SLURM_JOB_ID": None, "RUN_DIR": None, "PBS_O_WORKDIR": site.folder, "PBS_JOBID": "12.server",
           "PBS_JOBNAME": "name", "PBS_NODEFILE": site.folder / "nodes", "ARGS": "--steps 9", "MAX_RESTARTS": 2,
           "OMP_NUM_THREADS": 5}
    words = ("--script", str(site.folder / "script"), "--", "train")
    said = site.job(*words, play=site.asks(10), **pbs)
    (command,) = site.child.commands
    assert " ".join(command) == (
        "mpiexec -n 3 mpi-ef train --checkpoint-every 100 --resume exact --steps 9 --out runs/name-12"
    )
    assert site.child.forward == "USR1"
    assert site.environ["NUMBA_NUM_THREADS"] == "5"
    names = "RUN_DIR,RESTARTS,ARGS,MAX_RESTARTS,NODE_DIR"
    assert site.called("qsub") == [f"qsub -W depend=afterany:12.server -v {names} runs/name-12/train.pbs"]
    assert (site.environ["RUN_DIR"], site.environ["RESTARTS"]) == ("runs/name-12", "1")
    assert "submitted again, restart 1 of at most 2" in said
    assert int(site.environ["SLURM_JOB_END_TIME"]) == site.child.deadline
    assert 3600 < site.child.deadline - time.time() <= 3630
    copy = site.folder / "runs/name-12/train.pbs"
    assert copy.read_text() == "the script"
    pbs |= {"PBS_JOBID": "13.server", "RUN_DIR": "runs/name-12"}
    words = ("--script", str(copy), "--", "train")  # which is not copied to itself
    assert "MAX_RESTARTS=2" in site.job(*words, play=site.asks(20), RESTARTS=2, status=1, **pbs)
    assert "done" in site.job(*words, play=site.finishes, RESTARTS=1, **pbs)
    (site.folder / "runs/name-12/summary.json").unlink()
    assert "no progress" in site.job(*words, RESTARTS=1, status=1, **pbs)  # mpiexec said 0, the run did not end
    assert not site.called("qsub")
    site.answers |= {"qsub": (1, ""), "qstat": (1, "")}
    said = site.job(*words, play=site.asks(30), FORWARD="none", status=1, **pbs)
    assert "cannot be submitted again from here; do it by hand, with -v RUN_DIR=runs/name-12" in said
    assert site.child.forward == "none"
    assert site.child.deadline is None


def test_lsf(site):
    lsf = {"SLURM_JOB_ID": None, "RUN_DIR": None, "LS_SUBCWD": site.folder, "LSB_JOBID": "12", "LSB_JOBNAME": "name",
           "LSB_DJOB_NUMPROC": 4, "MAX_RESTARTS": 2, "THREADS": 2}
    for restart in (1, 2):
        said = site.job("--", "train", play=site.asks(restart), **lsf)
        assert site.child.commands[0] == ["mpiexec", "-n", "4", "mpi-ef", "train", "--checkpoint-every", "100", "--resume",
                                          "exact", "--out", "runs/name-12"]
        assert site.child.forward == "USR1"
        assert site.environ["OMP_NUM_THREADS"] == "2"
        assert site.called("brequeue") == ["brequeue -r 12"]
        assert f"requeued, restart {restart} of at most 2" in said
    assert "MAX_RESTARTS=2" in site.job("--", "train", play=site.asks(3), status=1, **lsf)
    assert not (site.folder / "runs/name-12/restarts-12").exists()
    assert "done" in site.job("--", "train", play=site.finishes, **lsf)
    assert not site.called("brequeue")


def strange(path, kind):
    """Put something in place of a file that is no small text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        path.unlink()
    {"pipe": os.mkfifo, "device": lambda at: at.symlink_to("/dev/zero"), "folder": Path.mkdir,
     "hole": lambda at: (at.touch(), os.truncate(at, 6 << 30)),
     "bytes": lambda at: at.write_bytes(b"\x1b]0;x\x07\xff" * 9)}[kind](path)


STRANGE = ["pipe", "device", "folder", "hole", "bytes"]


@pytest.mark.parametrize("kind", STRANGE)
def test_files_of_a_job_that_are_strange(site, kind):
    """One line, or as if there were none: nothing hangs, fills the memory, or commands the terminal."""
    pbs = {"SLURM_JOB_ID": None, "RUN_DIR": None, "PBS_O_WORKDIR": site.folder, "PBS_JOBID": "12.server",
           "PBS_JOBNAME": "name", "PBS_NODEFILE": site.folder / "nodes"}
    strange(site.folder / "nodes", kind)
    said = site.job("--", "train", status=2, **pbs)
    assert "nodes: cannot be read (" in said
    lsf = {"SLURM_JOB_ID": None, "RUN_DIR": None, "LS_SUBCWD": site.folder, "LSB_JOBID": "12", "LSB_JOBNAME": "job",
           "LSB_DJOB_NUMPROC": 4}
    strange(site.folder / "runs/job-12/restarts-12", kind)
    assert "requeued, restart 1 of at most 20" in site.job("--", "train", play=site.asks(1), **lsf)
    task = {"SLURM_ARRAY_TASK_ID": 1, "SLURM_ARRAY_JOB_ID": 5}
    strange(site.folder / "sweep", kind)
    assert "/sweep cannot be read (" in site.job("--sweep", str(site.folder / "sweep"), "--", "train", status=2, **task)


def test_a_full_disk_does_not_stop_the_requeue_of_lsf(site, monkeypatch):
    """It has no count then; what has made no progress ends all the same."""
    lsf = {"SLURM_JOB_ID": None, "RUN_DIR": None, "LS_SUBCWD": site.folder, "LSB_JOBID": "12", "LSB_JOBNAME": "job",
           "LSB_DJOB_NUMPROC": 4}
    monkeypatch.setattr(batch, "written", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "requeued, restart 1 of at most 20" in site.job("--", "train", play=site.asks(1), **lsf)
    assert site.called("brequeue")


@pytest.mark.parametrize("kind", STRANGE)
def test_a_mark_of_a_stranger(site, kind):
    def play(child):
        site.save(1)
        strange(site.path() / "requeue", kind)

    said = site.job("--", "train", play=play)
    assert "stopped at step 1: " in said
    assert all(line.isprintable() for line in said.splitlines())
    said = site.job("--", "train", play=site.asks(2), status=2 if kind == "folder" else 0)
    assert ("is in the way of the mark of a run that is to go on" in said) == (kind == "folder")


# --------------------------------------------------------------------------------------------------------------- signals


@pytest.fixture
def child():
    """Handlers as they were come back."""
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in (signal.SIGINT, signal.SIGHUP):  # which tests that run in the background may ignore
        signal.signal(number, signal.SIG_DFL)
    yield Child()
    for number, handler in before.items():
        signal.signal(number, handler)


def shell(*lines):
    """A program in bash that waits for signals; not for ever.

    It reads from a pipe that is opened once: bash parses <(:) each time that it comes to it, and fails if a trap runs there.
    """
    idle = "exec 9<> <(:); idle() { ((waits++ < 3000)) || exit 99; read -r -t 0.02 -u 9 || :; }"
    return ["bash", "-c", "\n".join([idle, *lines])]


@pytest.mark.parametrize("name", ["USR1", "USR2", "TERM"])
def test_every_signal_is_handed_on_as_the_one_that_the_launcher_knows(child, name):
    """Also a second one; and the program may take its time."""
    child.listen()
    told = shell("n=0; trap 'n=$((n+1))' USR2", f"kill -{name} $PPID; until ((n == 1)); do idle; done",
                 f"kill -{name} $PPID; until ((n == 2)); do idle; done", "exit 7")
    assert child.run(told) == 7
    assert child.asked
    child.forward = "USR1"
    assert child.run(shell("trap 'exit 8' USR1", f"kill -{name} $PPID", "while :; do idle; done")) == 8


def test_a_launcher_that_would_die_of_signals_gets_none(child):
    child.listen()
    child.forward = "none"
    assert child.run(["sh", "-c", "kill -TERM $PPID; exit 4"]) == 4
    assert child.asked


def test_a_signal_while_the_program_is_started_is_handed_on(child, monkeypatch, tmp_path):
    """Its number is not known yet."""
    child.listen()
    start = subprocess.Popen

    def start_late(command, **options):
        process = start(command, **options)
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR2)
        return process

    monkeypatch.setattr(supervise.subprocess, "Popen", start_late)
    assert child.run(shell("trap 'exit 5' USR2", f"touch {tmp_path / 'ready'}", "while :; do idle; done")) == 5


def test_signals_that_were_blocked_count(child):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)  # not to another thread, of pytest's
    assert not child.asked
    child.listen()
    assert child.asked


def test_the_program_is_told_of_the_deadline(child):
    """By a signal, for programs that do not look at the clock. That is no bad luck: `asked` stays as it was."""
    child.listen()
    soon = time.time() + LEAD_SECONDS + 0.05
    assert child.run(shell("trap 'exit 5' USR2", "while :; do idle; done"), soon) in (5, 128 + signal.SIGUSR2)
    assert not child.asked
    child.asked = True  # it has been told before: it may take no more signals
    assert child.run(["sleep", "0.2"], time.time() + LEAD_SECONDS + 0.05) == 0
    assert child.run(["true"], time.time() - 1) == 0


def test_the_deadline_is_that_of_a_clock_that_is_set_meanwhile(child, monkeypatch):
    """A timer would go on by the clock of the start."""
    child.listen()
    clock, ahead = time.time, [0.0, 0.0]
    monkeypatch.setattr(time, "time", lambda: clock() + (ahead.pop() if ahead else 3600.0))
    assert child.run(shell("trap 'exit 5' USR2", "while :; do idle; done"), clock() + 3600) in (5, 128 + signal.SIGUSR2)


def test_a_status_is_not_lost_where_ends_of_children_were_ignored(child):
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    child.listen()
    assert child.run(["sh", "-c", "exit 3"]) == 3


@pytest.mark.parametrize("name", ["INT", "HUP"])
def test_what_a_terminal_sends_ends_the_program_and_not_its_supervisor(child, name):
    child.listen()
    assert child.run(["sh", "-c", f"kill -{name} $PPID; exit 3"]) == 3
    assert child.interrupted
    assert not child.asked
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    child.listen()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_how_programs_end(child, capfd):
    assert child.run(["sh", "-c", "kill -KILL $$"]) == 137
    assert child.run(["/none/at/all"]) == 127
    assert child.run(["/"]) == 126
    assert capfd.readouterr().err.splitlines() == [
        "mpi-ef: /none/at/all: No such file or directory",
        "mpi-ef: /: Permission denied",
    ]
    assert child.run(["sh", "-c", "read -r line"]) == 1  # standard input is empty


def test_commands_that_are_missing_or_do_not_come_back():
    assert run_command(["/none/at/all"]) == (127, "")
    assert run_command(["sleep", "1000"], 0.05) == (124, "")
    assert run_command(["cat"], given="words") == (0, "words")
    assert run_command(["printf", "Gr\\374n"]) == (0, "Gr\\xfcn")  # what users call things, in whatever encoding


def test_a_batch_system_that_hangs_does_not_take_the_time_of_the_job(site, monkeypatch):
    """A command without a limit would be waited for until the job is killed, and not requeued."""
    waits, command = [], site.command
    monkeypatch.setattr(program, "run_command", lambda words, timeout=None, given="": (
        waits.append((words[0], timeout)), command(words, timeout, given))[1])
    site.job("--", "train", play=site.asks(1))
    pbs = {"SLURM_JOB_ID": None, "PBS_O_WORKDIR": site.folder, "PBS_JOBID": "12.server",
           "PBS_NODEFILE": site.folder / "nodes"}
    (site.folder / "nodes").write_text("a\n")
    site.job("--", "train", play=site.asks(2), **pbs)
    asked = {name: timeout for name, timeout in waits if name in ("squeue", "scontrol", "qstat", "qsub")}
    assert len(asked) == 4
    assert all(0 < timeout <= 120 for timeout in asked.values())
    for name, told in (("squeue", "requeued, restart 1"), ("scontrol", "cannot be requeued")):
        site.answers = {name: (124, "")}
        assert told in site.job("--", "train", play=site.asks({"squeue": 3, "scontrol": 4}[name]), status=name == "scontrol")


def test_variables_and_names_that_are_no_numbers(site):
    """They ended in tracebacks."""
    (site.run / "checkpoints/step-\u00b2").mkdir(parents=True)
    (site.run / "checkpoints/step-\u00b2/COMMIT").touch()
    odd = dict.fromkeys(("SLURM_RESTART_COUNT", "SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME", "SLURM_JOB_NUM_NODES"), "²")
    assert "requeued, restart 1 of at most 20" in site.job("--", "train", play=site.asks(1), **odd)
    site.job("--", "train", play=site.finishes, SLURM_JOB_END_TIME="9" * 30)
    said = site.job("--proof", "odd\udcff", "--", "mine", status=1)
    assert "and there is no " in said
    assert "odd\\udcff" in said
    site.run = site.folder / "nodes"
    site.run.write_text("a file\n")
    said = site.job("--", "train", status=1, RUN_DIR=site.run)
    assert said == f"mpi-ef: supervise: {site.run}: File exists; submit the job again when that is mended\n"


def test_a_log_that_is_gone_ends_nothing():
    read, end = os.pipe()
    os.close(read)
    write(end, "nobody reads this")
    os.close(end)
    write(end, "there is no such file")


def start(folder, *words, **options):
    """A supervisor in a process of its own, in a job of Slurm; there is no Slurm."""
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": "7",
        "LAUNCH": "env",
        "RUN_DIR": "run",
    }
    return subprocess.Popen([sys.executable, "-m", "mpi_ef.jobs.cli", "supervise", "--", *words], cwd=folder, env=environ,
                            text=True, **options)


def test_a_signal_in_the_first_moment_is_not_lost(tmp_path):
    """Blocked as by the templates. The program would not end by itself."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        process = start(tmp_path, "sleep", "90", stdout=subprocess.PIPE)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    process.send_signal(signal.SIGUSR2)
    said, _ = process.communicate(timeout=patience.limit(60))
    assert process.returncode == 1  # nobody is there to requeue it
    assert "stopped at step 0" in said
    assert "cannot be requeued; submit it again with RUN_DIR=run" in said


def test_standard_output_that_has_gone_changes_no_status(tmp_path):
    read, end = os.pipe()
    os.close(read)
    process = start(tmp_path, "sh", "-c", "exit 5", stdout=end)
    os.close(end)
    assert process.wait(timeout=patience.limit(60)) == 5


def test_no_call_blocks_while_a_program_runs(child, monkeypatch):
    """A signal that comes just before such a call would be seen at its end, which may be that of the job."""
    wait, options = os.waitid, []
    monkeypatch.setattr(os, "waitid", lambda *call: (options.append(call[-1]), wait(*call))[1])
    assert child.run(["sleep", "0.05"]) == 0
    assert options
    assert all(option & os.WNOHANG for option in options)
