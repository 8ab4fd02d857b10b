"""The README is true: every block of code in it runs, on several ranks."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import patience
import pytest
from launching import run

from mpi_ef.jobs import cli

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
BLOCKS = FENCED.findall(TEXT)
TRAINING = FENCED.findall((ROOT / "docs" / "training.md").read_text(encoding="utf-8"))
RULES = FENCED.findall((ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8"))
DEVICES = FENCED.findall((ROOT / "docs" / "gpu.md").read_text(encoding="utf-8"))
STRAGGLERS = FENCED.findall((ROOT / "docs" / "stragglers.md").read_text(encoding="utf-8"))
ROBUST = (ROOT / "docs" / "robust.md").read_text(encoding="utf-8").partition("\n## From rank to rank")[0]
KINDS = {"python", "diff", "console", "text"}


def programs():
    """The Python blocks as they are, and the diffs as the script that they lead to; not those for torchrun."""
    for kind, body in BLOCKS + TRAINING + RULES + DEVICES + STRAGGLERS:
        if kind == "python" and "mpi4py" in body:
            yield body
        elif kind == "diff":
            yield "".join(line[1:] for line in body.splitlines(keepends=True) if not line.startswith("-"))
    yield "".join(body for kind, body in FENCED.findall(ROBUST) if kind == "python")  # one goes on from the other


def commands():
    for kind, body in BLOCKS:
        if kind == "console":
            yield from (line[2:] for line in body.splitlines() if line.startswith("$ "))


def test_every_block_is_of_a_kind_that_is_tested():
    assert {kind for kind, _ in BLOCKS} <= KINDS
    assert len(list(programs())) >= 3


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.exhaustive), 3])
@pytest.mark.parametrize("program", list(programs()), ids=lambda text: text.strip().splitlines()[0])
def test_programs_run(tmp_path, program, n):
    script = tmp_path / "program.py"
    script.write_text(program, encoding="utf-8")
    ended = run(n, "-m", "mpi4py", script, within=90)
    assert ended.status == 0, ended.text


def test_the_diff_also_starts_from_a_script_that_runs(tmp_path):
    (diff,) = (body for kind, body in BLOCKS if kind == "diff")
    before = "".join(line[1:] for line in diff.splitlines(keepends=True) if not line.startswith("+"))
    script = tmp_path / "before.py"
    script.write_text(before, encoding="utf-8")
    assert "mpi" not in before.lower()
    assert run(1, script, within=90).status == 0


@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_the_program_for_torchrun(tmp_path, n):
    (program,) = (body for kind, body in TRAINING if kind == "python" and "mpi4py" not in body)
    script = tmp_path / "program.py"
    script.write_text(program, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), str(script)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=patience.limit(120), check=False)
    assert ended.returncode == 0, ended.stderr
    assert sorted(re.findall(r"rank (\d): sent \d+ bytes", ended.stdout)) == [str(rank) for rank in range(n)]


def distributed(script):
    """Return the script with the added lines of the README's diff, where they have their place in it."""
    (diff,) = (body for kind, body in BLOCKS if kind == "diff")
    added = [line[1:] for line in diff.splitlines() if line.startswith("+")]
    imports = [line for line in added if "import" in line]
    (share,), (wrap,) = (
        [line for line in added if word in line] for word in ("ShardedSampler", "DistributedOptimizer")
    )
    assert len(added) == len(imports) + 2
    lines = []
    for line in script.splitlines():
        lines += [share] if line.startswith("loader = ") else [line]
        lines += imports if line == "import torch" else [wrap] if line.startswith("optimizer = ") else []
    return "\n".join(lines)


@pytest.mark.parametrize("placement", ["update", "gradient"])
def test_a_training_script_of_forty_lines_becomes_distributed(tmp_path, placement):
    """On one rank, with the identity, it prints the same losses, bit for bit; on several it learns as well."""
    plain = Path(__file__).with_name("plain_training.py")
    script = tmp_path / "script.py"
    options = f'mpi_ef.Identity(), placement="{placement}")'
    text = distributed(plain.read_text()).replace("mpi_ef.TopK(0.05))", options)
    script.write_text(text.replace("batch=16", "batch=64, shuffle=False"))
    assert options in script.read_text()
    assert "shuffle=False" in script.read_text()
    before, after = run(1, plain, within=90), run(1, "-m", "mpi4py", script, within=90)
    losses = before.lines_with("loss")
    assert len(losses) == 6
    assert after.lines_with("loss") == losses, after.text
    ended = run(2, "-m", "mpi4py", script, within=90)
    assert ended.status == 0, ended.text
    values = [float.fromhex(line.split()[-1]) for line in ended.lines_with("epoch 5")]
    assert len(values) == 2
    assert max(values) < 0.7 * float.fromhex(losses[0].split()[-1])


@pytest.mark.parametrize("command", list(dict.fromkeys(commands())))
def test_commands_are_known(command, capsys):
    """Targets exist, and every flag of mpi-ef is one (what they do is tested elsewhere)."""
    words = shlex.split(command.partition("#")[0])
    while "=" in words[0] or words[0] in ("mpiexec", "srun", "python", "-n", "-m", "2", "4"):
        words = words[1:]
    if words[0] == "make":
        targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif words[0] == "mpi-ef":
        with pytest.raises(SystemExit) as caught:
            cli.main([*words[1:], "--help"])
        assert caught.value.code == 0
        known = capsys.readouterr().out
        assert all(word in known for word in words if word.startswith("--"))
    elif words[0] == "sbatch":
        assert (ROOT / words[-1]).is_file() or any((ROOT / word).is_file() for word in words)
    else:
        assert words[0] in ("git", "cd", "pip", "mpi4py", "my_training.py")


def test_nothing_is_left_to_fill_in_and_links_lead_somewhere():
    assert not re.findall(r"^[A-Z]+_[A-Z_]+$", TEXT, flags=re.MULTILINE)
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target
