"""The doctor's judgement of made-up facts, its checks on this machine, its page. Ranks: launch/test_doctor_on_ranks.py."""

import ast
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from itertools import count
from pathlib import Path
from time import sleep
from types import SimpleNamespace

import mpi4py
import numpy as np
import patience
import pytest
from programs import PLANS

from mpi_ef.jobs.doctor import checks as doctor_checks
from mpi_ef.jobs.doctor import files as doctor_files
from mpi_ef.jobs.doctor import kernels as doctor_kernels
from mpi_ef.jobs.doctor import link as doctor_link
from mpi_ef.jobs.doctor import mpi as doctor_mpi
from mpi_ef.jobs.doctor import program as doctor_module
from mpi_ef.jobs.doctor import ranks as doctor_ranks
from mpi_ef.jobs.doctor import roll as doctor_roll
from mpi_ef.jobs.doctor import space as doctor_space
from mpi_ef.jobs.doctor import together as doctor_together
from mpi_ef.jobs.doctor import torch as doctor_torch
from mpi_ef.jobs.doctor import world as doctor_world
from mpi_ef.jobs.doctor.checks import Asked, Check, Group, collect, judge
from mpi_ef.jobs.doctor.finding import (
    LEVELS,
    TOPICS,
    Finding,
    Spot,
    Told,
    document,
    page,
    ranks_text,
    status_of,
    verdict,
)
from mpi_ef.jobs.doctor.report import DoctorConfig, Report
from mpi_ef.jobs.doctor.roll import bounded
from mpi_ef.jobs.doctor.together import judge_shared, judge_warm_up, spots_of
from mpi_ef.jobs.doctor.versions import judge_versions, version_facts

ROOT = Path(__file__).resolve().parents[1]


def told(*facts, nodes=None, **same):
    """What ranks have told: a dictionary each, and what all have in common. `nodes`: how many ranks a node has."""
    places = [(n, local) for n, ranks in enumerate(nodes or [len(facts)]) for local in range(ranks)]
    return [Told(Spot(rank, f"n{node}", local), same | mine)
            for rank, ((node, local), mine) in enumerate(zip(places, facts, strict=True))]  # fmt: skip


def by_name(findings):
    return {finding.name: finding for finding in findings}


def worst(findings):
    """The names of what is not well."""
    return {finding.name: finding.level for finding in findings if finding.level != "ok"}


# ---- the page


MANY = [
    Finding(
        topic,
        f"name-{level}",
        level,
        f"{topic} is as it is: " + "words " * 40,
        "" if level == "ok" else "do this " * 30,
    )
    for topic in TOPICS
    for level in LEVELS
]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_page_fits_the_terminal(width):
    lines = page("mpi-ef doctor: 2 ranks", MANY, width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert [line for line in lines if line in TOPICS] == list(TOPICS)
    assert "[name-ok]" not in " ".join(lines)
    assert sum("-> do this" in line for line in lines) == 3 * len(TOPICS)
    assert lines[-1].startswith("verdict: ") or lines[-2].startswith("verdict: ")
    assert "\x1b" not in "".join(lines)
    assert "\x1b[" in page("", MANY, color=True)


def test_the_verdict_and_the_exit_status():
    ok, note, warning, error = (Finding("MPI", level, level, "it is") for level in LEVELS)
    assert verdict([ok, note]) == "nothing stands in the way of a training"
    assert verdict([ok, warning]) == "a training works; 1 warning (warning) of what makes it slow or fragile"
    alone = Finding("MPI", "no-launcher", "note", "it is")
    assert verdict([ok, alone]) == "nothing stands in the way here; what lies between ranks was not looked at"
    assert verdict([warning, alone]) == "1 warning (warning); what lies between ranks was not looked at"
    assert verdict([error, warning, error]).startswith("2 errors")
    assert (status_of([ok, note, warning]), status_of([ok, error])) == (0, 1)


def test_the_document_has_all_findings():
    read = json.loads(document(MANY, ranks=2))
    assert read["ranks"] == 2
    assert len(read["findings"]) == len(MANY)
    assert read["counts"] == dict.fromkeys(LEVELS, len(TOPICS))
    assert set(read["findings"][0]) == {"topic", "name", "level", "what", "todo", "ranks"}


def test_ranks_are_named_shortly():
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([5, 0, 1, 2]) == "ranks 0-2,5"
    assert ranks_text(range(0, 40, 2)) == "ranks 0,2,4,6,8,10 and 14 more"


def findings_in_the_source():
    """Yield levels and names of everything that the doctor can say; where they are computed, all that they can be."""
    for path in sorted((ROOT / "jobs" / "doctor").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            kind = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
            if kind in ("Finding", "_Row"):
                name, level = node.args[1:3] if kind == "Finding" else node.args[1::-1]
                yield _strings(level), _strings(name)


def _strings(node):
    strings = [leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str)]
    return [text for text in strings if re.fullmatch(r"[a-z][a-z0-9-]+", text)]


def test_every_finding_is_in_the_troubleshooting_table():
    """All that is not well by itself; the words for it lead there."""
    table = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("cluster*.md"))
    rows = set(re.findall(r"^\| `([a-z0-9-]+)`", table, re.MULTILINE))
    said = {name for levels, names in findings_in_the_source() if levels != ["ok"] for name in names}
    said |= {"hard-links", "rename", "fsync"}  # whose names stand elsewhere in the source
    assert len(said) > 50
    assert said == rows


# ---- MPI and launchers


@pytest.mark.parametrize(
    ("environment", "name", "tasks", "rank"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, "mpiexec of Open MPI", 4, 3),
        ({"OMPI_COMM_WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"}, "mpiexec of Open MPI", 4, None),
        ({"PMI_SIZE": "2", "PMI_RANK": "0", "MPI_LOCALNRANKS": "2"}, "mpiexec (Hydra)", 2, 0),
        ({"PMI_SIZE": "2", "PMI_RANK": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "srun", 2, 1),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "srun", 8, None),
        ({"PMI_SIZE": "3"}, "mpiexec", 3, None),
    ],
)  # fmt: skip
def test_launchers_are_known(environment, name, tasks, rank):
    launcher = doctor_world.launcher_of(environment)
    assert (launcher.name, launcher.tasks, launcher.rank) == (name, tasks, rank)


@pytest.mark.parametrize(
    "environment",
    [{}, {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "4294967290"}],
)
def test_batch_scripts_and_shells_in_jobs_are_no_launchers(environment):
    assert doctor_world.launcher_of(environment) is None


MPI = {"library": "MPICH", "release": "5.0.2", "abi": "mpich", "built_for": "mpich", "file": "/opt/lib/libmpi.so.12",
       "standard": "5.0", "threads": 3, "large": True}  # fmt: skip


def test_a_good_mpi_is_all_ok():
    assert not worst(doctor_mpi.judge_mpi(told(MPI, MPI)))


@pytest.mark.parametrize(
    ("second", "name", "level"),
    [
        ({"release": "4.1"}, "mpi-differs", "error"),
        ({"library": "Open MPI", "abi": "openmpi", "built_for": "openmpi"}, "mpi-differs", "error"),
        ({"file": "/other/lib/libmpi.so.12"}, "mpi-differs", "warning"),
        ({"threads": 1}, "thread-level", "warning"),
    ],
)
def test_ranks_with_another_mpi_are_named(second, name, level):
    finding = by_name(doctor_mpi.judge_mpi(told(MPI, MPI | second)))[name]
    assert finding.level == level
    assert "rank 1 (n0)" in finding.what
    assert finding.todo


def test_an_mpi4py_for_another_abi():
    finding = by_name(doctor_mpi.judge_mpi(told(MPI | {"built_for": "openmpi"})))["mpi-abi"]
    assert finding.level == "error"
    assert "unset MPI4PY_MPIABI" in finding.todo


def test_worlds():
    srun = doctor_world.Launcher("srun", "SLURM_STEP_NUM_TASKS", 4, 0)
    assert not worst(doctor_world.judge_world(4, srun))
    assert worst(doctor_world.judge_world(2, srun)) == {"world-size": "warning"}
    assert worst(doctor_world.judge_world(1, None)) == {"no-launcher": "note"}


@pytest.mark.parametrize(
    ("library", "environment", "words"),
    [
        ("Open MPI", {"PMI_FD": "7"}, ["Open MPI wants srun --mpi=pmix", "started with --mpi=pmi2"]),
        ("MPICH", {"PMIX_RANK": "0"}, ["MPICH wants srun --mpi=pmi2", "started with --mpi=pmix"]),
        ("Cray MPICH", {}, ["Cray MPICH wants srun --mpi=cray_shasta", "started with --mpi=none"]),
        ("An own one", {"SLURM_MPI_TYPE": "openmpi"}, ["srun --mpi=list", "started with --mpi=openmpi"]),
    ],
)
def test_lonely_ranks_are_told_what_to_say_to_srun(monkeypatch, library, environment, words):
    monkeypatch.setattr(doctor_world, "offered_by_srun", lambda: ["none", "pmi2", "pmix", "cray_shasta"])
    srun = doctor_world.Launcher("srun", "SLURM_STEP_NUM_TASKS", 4, 0)
    finding = doctor_world.lonely(srun, MPI | {"library": library}, environment)
    assert finding.level == "error"
    assert "4 tasks" in finding.what
    assert all(text in finding.todo for text in ("--mpi=pmix", "--mpi=pmi2", "--mpi=cray_shasta", *words))


def test_lonely_ranks_where_srun_has_not_what_they_need(monkeypatch):
    monkeypatch.setattr(doctor_world, "offered_by_srun", lambda: ["none", "pmi2"])
    srun = doctor_world.Launcher("srun", "SLURM_STEP_NUM_TASKS", 4, 0)
    assert "srun here does not have" in doctor_world.lonely(srun, MPI | {"library": "Open MPI"}, {}).todo
    monkeypatch.setattr(doctor_world, "offered_by_srun", lambda: ["none", "pmi2", "pmix_v4"])
    assert "Open MPI wants srun --mpi=pmix_v4 (" in doctor_world.lonely(srun, MPI | {"library": "Open MPI"}, {}).todo


def test_lonely_ranks_of_another_mpiexec():
    hydra = doctor_world.Launcher("mpiexec (Hydra)", "PMI_SIZE", 2, 0)
    finding = doctor_world.lonely(hydra, MPI | {"library": "Open MPI"}, {})
    assert "the mpiexec that belongs to this library (that of Open MPI)" in finding.todo
    assert "--mpi=pmix" in finding.todo


@pytest.mark.parametrize(
    ("text", "offered"),
    [
        (
            "MPI plugin types are...\n\tnone\n\tpmi2\n\tpmix\nspecific pmix plugin versions available: pmix_v4\n",
            ("none", "pmi2", "pmix", "pmix_v4"),
        ),
        ("srun: MPI types are...\nsrun: none\nsrun: pmi2\nsrun: pmix\n", ("none", "pmi2", "pmix")),
    ],
)
def test_what_srun_offers(tmp_path, monkeypatch, text, offered):
    program = tmp_path / "srun"
    program.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{text}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert doctor_world.offered_by_srun() == offered


@pytest.mark.parametrize("program", [None, "", "#!/bin/sh\nexec /bin/sleep 1000\n"])
def test_an_srun_that_says_nothing_offers_nothing(tmp_path, monkeypatch, program):
    """There is none, it is no program, it does not come back."""
    if program is not None:
        (tmp_path / "srun").write_text(program)
        (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor_world.offered_by_srun(0.2) == ()


def test_reasons_why_there_is_no_mpi(monkeypatch):
    no_library = {"failed": "RuntimeError: cannot load MPI library"}
    assert doctor_mpi.mpi_missing(MPI, launched=False) is None
    assert doctor_mpi.mpi_missing(no_library, launched=False).level == "warning"
    assert doctor_mpi.mpi_missing(no_library, launched=True).level == "error"
    ended = doctor_mpi.mpi_missing(MPI | {"failed": "exit status 134: MPID_Init failed", "ended": True}, launched=False)
    assert (ended.name, ended.level) == ("mpi-singleton", "note")
    assert "MPICH 5.0.2 does not start without a launcher here: exit status 134" in ended.what
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert doctor_mpi.mpi_missing({"failed": ""}, launched=False).name == "mpi4py-missing"


@pytest.mark.parametrize(
    ("program", "seconds", "words"),
    [
        ("import os; os.abort()", 30.0, "exit status -6: no reason given"),
        (
            "import sys; print('hello\\naborting: MPI_Init failed', file=sys.stderr); sys.exit(255)",
            30.0,
            "exit status 255: aborting: MPI_Init failed",
        ),
        ("import time; time.sleep(60)", 1.0, "no end after 1 s"),
    ],
)
def test_an_mpi_that_takes_its_process_down(monkeypatch, program, seconds, words):
    """As on login nodes of Cray machines: the doctor stays alive."""
    monkeypatch.setattr(doctor_mpi, "_CHILD", program)
    facts = doctor_mpi.start_in_a_child(seconds)
    assert facts["failed"] == words
    assert facts["ended"]


def test_what_is_known_of_a_library_that_does_not_start(monkeypatch):
    program = 'print(\'facts {"library": "Cray MPICH"}\', flush=True); import os; os.abort()'
    monkeypatch.setattr(doctor_mpi, "_CHILD", program)
    assert doctor_mpi.start_in_a_child(30.0)["library"] == "Cray MPICH"


def test_an_mpi_that_ends_the_tasks_of_a_launcher(monkeypatch):
    monkeypatch.setattr(doctor_world, "offered_by_srun", list)
    srun = doctor_world.Launcher("srun", "SLURM_STEP_NUM_TASKS", 4, 0)
    finding = doctor_world.ended_at_start(srun, MPI, {"PMIX_RANK": "0"})
    assert finding.level == "error"
    assert "MPICH wants srun --mpi=pmi2 (these tasks were started with --mpi=pmix)" in finding.todo


@pytest.mark.parametrize(("end", "printed"), [("word.take_back()", ""), ("", "gone"), ("os.abort()", "gone")])
def test_a_last_word_is_said_by_another_process(end, printed):
    code = f"import os; from mpi_ef.jobs.doctor.roll import LastWord; word = LastWord('gone'); {end}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        timeout=patience.limit(60),
        check=False,
        cwd=ROOT,
    )
    assert done.stdout.strip() == printed


# ---- nodes, cores, threads


def rank(cores, of_node=8, **rest):
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "asked")
    return {
        "cores": list(cores),
        "of_node": of_node,
        "quota": None,
        "processor": "x",
        **dict.fromkeys(names, ""),
        **rest,
    }


ONE_EACH = [rank([core], OMP_NUM_THREADS="1") for core in range(4)]


@pytest.mark.parametrize(
    ("ranks", "nodes", "expected"),
    [
        (ONE_EACH, [4], {}),
        (ONE_EACH, [2, 2], {}),
        ([rank(range(8), OMP_NUM_THREADS="2")] * 4, [4], {}),
        ([rank(range(2), 2, OMP_NUM_THREADS="1")] * 4, [4], {"oversubscribed": "warning"}),
        ([rank([0], OMP_NUM_THREADS="1")] * 2, [2], {"binding": "warning"}),
        ([rank([0]), rank([0]), rank([1]), rank([2])], [4], {"binding": "warning"}),
        ([rank([0, 1]), rank([0, 1]), rank([0, 1]), rank([4, 5])], [4], {"binding": "warning", "threads": "note"}),
        ([rank(range(8))] * 2, [2], {"threads": "note"}),
        ([rank(range(8), OMP_NUM_THREADS="8")] * 2, [2], {"threads": "warning"}),
        ([rank(range(8), OMP_NUM_THREADS="many")] * 2, [2], {"threads": "warning"}),
        ([rank(range(8), OMP_NUM_THREADS="1")] * 2, [2], {"threads": "note"}),
        ([rank([0], OMP_NUM_THREADS="1"), rank([1])], [2], {"threads-differ": "warning"}),
        ([rank([0], asked="4")], [1], {"few-cores": "warning"}),
        ([rank(range(4), quota=2.0, OMP_NUM_THREADS="1")] * 4, [4], {"cpu-quota": "warning"}),
        ([rank(range(4), quota=2.0)], [1], {"cpu-quota": "note"}),
        (ONE_EACH, [3, 1], {"uneven-nodes": "note"}),
        ([rank([0], OMP_NUM_THREADS="1"), rank([0], OMP_NUM_THREADS="1", processor="y")], [1, 1], {"processors": "note"}),
    ],
)  # fmt: skip
def test_cores_and_threads(ranks, nodes, expected):
    found = list(doctor_ranks.judge_ranks(told(*ranks, nodes=nodes)))
    names = worst(found)
    if "oversubscribed" in names:
        names.pop("threads", None)
    assert names == expected
    assert all(finding.todo for finding in found if finding.level != "ok")


def test_two_ranks_on_one_core_of_many_nodes_are_told_once():
    ranks = [rank([0, 1], 2, OMP_NUM_THREADS="1")] * 16
    findings = [f for f in doctor_ranks.judge_ranks(told(*ranks, nodes=[4] * 4)) if f.name == "oversubscribed"]
    assert len(findings) == 1
    assert "4 ranks share 2 cores" in findings[0].what
    assert findings[0].ranks == ()


def test_one_node_of_several_is_named():
    ranks = [rank([0], 1, OMP_NUM_THREADS="1")] * 2 + [rank([core], 2, OMP_NUM_THREADS="1") for core in range(2)]
    finding = by_name(doctor_ranks.judge_ranks(told(*ranks, nodes=[2, 2])))["oversubscribed"]
    assert "on n0" in finding.what
    assert finding.ranks == (0, 1)


def test_containers_of_one_host_that_share_no_memory():
    spots = spots_of([("n1", 0, 0), ("n1", 0, 1), ("n2", 0, 2), ("n2", 1, 2)])
    assert [spot.node for spot in spots] == ["n1#1", "n1#2", "n2", "n2"]
    told_by = [Told(spot, rank([spot.rank], OMP_NUM_THREADS="1")) for spot in spots]
    assert "split-host" in worst(doctor_ranks.judge_ranks(told_by))


@pytest.mark.parametrize(
    ("files", "place", "limit"),
    [
        ({"a/cpu.max": "150000 100000"}, "0::/a/b", 1.5),
        ({"a/cpu.max": "max 100000"}, "0::/a", None),
        ({"cpu.max": "300000 100000", "a/cpu.max": "200000 100000"}, "0::/a", 2.0),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/docker/x", 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/", None),
    ],
)  # fmt: skip
def test_limits_of_containers(tmp_path, files, place, limit):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "self").write_text(place + "\n")
    assert doctor_ranks.quota(tmp_path, tmp_path / "self") == limit


# ---- GPUs, workers

NO_GPU = {
    "import_seconds": 1.0,
    "available": False,
    "count": 0,
    "names": [],
    "built": "",
    "torch": "2.9+cpu",
    "hardware": 0,
}
GPUS = NO_GPU | {"available": True, "count": 4, "names": ["A100"], "built": "12.8", "hardware": 4, "aware": "yes"}


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([NO_GPU], {}),
        ([NO_GPU | {"hardware": 2}], {"gpu-torch": "note"}),
        ([NO_GPU | {"hardware": 2, "built": "12.8", "CUDA_VISIBLE_DEVICES": ""}], {"gpu-hidden": "note"}),
        ([GPUS] * 4, {}),
        ([GPUS] * 8, {"gpu-shared": "note"}),
        ([GPUS | {"count": 1, "CUDA_VISIBLE_DEVICES": str(n)} for n in range(4)], {}),
        ([GPUS, GPUS | {"count": 3}], {"gpu-differs": "warning"}),
        ([GPUS | {"aware": "no"}] * 4, {}),
        ([GPUS | {"aware": "exit status 1: no reason given"}], {"gpu-aware": "note"}),
        ([NO_GPU, NO_GPU | {"import_seconds": 100.0}], {"slow-import": "warning"}),
    ],
)
def test_gpus(ranks, expected):
    assert worst(doctor_torch.judge_gpu(told(*ranks))) == expected


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("print('gpu_data True')", "yes"),
        ("print('gpu_data False')", "no"),
        ("import os; os.kill(os.getpid(), 11)", "no"),
        ("raise SystemExit('no device')", "exit status 1: no device"),
        ("import os; print('gpu_data', 'SLURM_PROCID' not in os.environ and 'KEPT' in os.environ)", "yes"),
    ],
)
def test_the_data_test_of_gpus_is_run_apart(monkeypatch, program, words):
    """An MPI that does not know device pointers kills the process."""
    monkeypatch.setattr(doctor_torch, "DATA_TEST", program)
    assert doctor_torch.gpu_aware({"SLURM_PROCID": "0", "KEPT": "1"}, 30.0) == words


def test_a_worker_of_a_dataloader_has_no_mpi():
    facts = doctor_torch.loader_facts()
    assert facts["mpi_in_worker"] is False
    assert not worst(doctor_torch.judge_loader(told(facts)))


def test_workers_that_do_not_start_or_start_mpi():
    good = {"default": "fork", "mpi_here": True, "mpi_in_worker": False, "seconds": 0.3}
    assert "fork, does not go with MPI" in by_name(doctor_torch.judge_loader(told(good)))["loader"].what
    assert worst(doctor_torch.judge_loader(told(good, good | {"problem": "status 1"}))) == {"loader": "warning"}
    assert worst(doctor_torch.judge_loader(told(good | {"mpi_in_worker": True}))) == {"loader": "error"}


# ---- kernels

CACHE = {"right": True, "named": "", "path": "/tmp/numba", "kind": "ext4", "of_others": False, "open": False, "write": "",
         "there": 30, "total": 30}  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "several", "expected"),
    [
        ({}, True, {}),
        ({"right": False}, False, {"kernels": "error"}),
        ({"path": ""}, False, {"cache": "warning"}),
        ({"write": "Read-only file system"}, False, {"cache": "warning"}),
        ({"kind": "nfs4"}, True, {"cache-network": "warning"}),
        ({"kind": "nfs4"}, False, {}),
        ({"open": True}, False, {"cache-open": "warning"}),
        ({"of_others": True}, False, {"cache-open": "warning"}),
        ({"there": 3}, False, {"cache-cold": "note"}),
    ],
)
def test_the_place_of_machine_code(facts, several, expected):
    assert worst(doctor_kernels.judge_kernels(told(CACHE, CACHE | facts), several, False)) == expected


def test_the_place_of_machine_code_here():
    facts = doctor_kernels.kernel_facts({})
    assert facts["right"]
    assert Path(facts["path"]).is_dir()
    assert 0 < facts["there"] <= facts["total"]  # the kernel that was just run is there


def test_numba_without_a_place_for_machine_code(monkeypatch):
    monkeypatch.setattr(doctor_kernels, "_dispatchers", lambda: iter([print]))
    facts = doctor_kernels.kernel_facts({})
    assert (facts["right"], facts["path"]) == (True, "")
    assert worst(doctor_kernels.judge_kernels(told(facts), False, False)) == {"cache": "warning"}


def test_a_warm_up_that_others_cannot_use():
    first, then = told({"seconds": 60.0, "compiled": 40}, {"seconds": 1.0, "compiled": 0}, nodes=[2])
    assert not worst(judge_warm_up([first], [then]))
    assert worst(judge_warm_up([first], [Told(then.spot, {"seconds": 60.0, "compiled": 40})])) == {
        "warm-up-again": "warning"
    }
    assert worst(judge_warm_up([Told(first.spot, {"failed": "OSError: full"})], [])) == {"check-failed": "warning"}


# ---- files


def test_trying_a_folder_leaves_nothing_there(tmp_path):
    facts = doctor_files.folder_facts({}, tmp_path / "runs" / "one")
    assert list(tmp_path.iterdir()) == []
    assert facts["path"] == str(tmp_path)
    assert not any(facts[name] for name in ("write", "link", "rename", "fsync", "lock", "hdf5_write"))
    assert facts["fsync_seconds"] > 0
    facts["fsync_seconds"] = 0.001  # the disk may be slow just now
    assert not worst(doctor_files.judge_folder(told(facts)))


def test_a_folder_that_cannot_be_written_to():
    facts = doctor_files.folder_facts({}, Path("/proc/self/runs"))  # not for root either
    findings = list(doctor_files.judge_folder(told(facts)))
    assert worst(findings) == {"folder": "error"}
    assert "--out" in findings[0].todo


FINE = dict.fromkeys(("write", "fsync", "link", "rename", "lock", "hdf5_write", "locking"), "")
FOLDER = FINE | {"path": "/scratch", "asked": "/scratch", "kind": "lustre", "free": 10**12, "files_left": 10**6,
                 "fsync_seconds": 0.01, "h5py": "3.16", "hdf5": "2.0.0"}  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, {}),
        ({"write": "No space left on device"}, {"folder": "error"}),
        ({"free": 5 * 10**8}, {"folder-space": "warning"}),
        ({"free": 10**6}, {"folder-space": "error"}),
        ({"files_left": 3}, {"folder-files": "warning"}),
        ({"link": "Operation not permitted"}, {"hard-links": "error"}),
        ({"fsync": "Input/output error"}, {"fsync": "error"}),
        ({"rename": "Permission denied"}, {"rename": "error"}),
        ({"lock": "No locks available", "hdf5_write": "unable to lock file, errno = 37"}, {"hdf5-lock": "warning"}),
        ({"lock": "No locks available"}, {}),
        ({"hdf5_write": "Input/output error"}, {"hdf5": "error"}),
        ({"fsync_seconds": 4.0}, {"slow-disk": "note"}),
        ({"kind": "tmpfs"}, {"folder-in-memory": "warning"}),
    ],
)
def test_folders(facts, expected):
    findings = list(doctor_files.judge_folder(told(FOLDER | facts, FOLDER, nodes=[1, 1])))
    assert worst(findings) == expected
    assert all(finding.todo for finding in findings if finding.level != "ok")


SPACE = {"tmp_path": "/tmp", "tmp_kind": "ext4", "tmp_free": 10**10, "tmp_write": "", "shm_path": "/dev/shm",
         "shm_free": 10**10, "shm_write": "", "memory_lock": -1, "infiniband": True}  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, {}),
        ({"tmp_write": "No space left on device"}, {"tmp": "error"}),
        ({"tmp_free": 10**7}, {"tmp-space": "warning"}),
        ({"tmp_kind": "nfs"}, {"tmp-network": "warning"}),
        ({"tmp_path": "/" + "long/" * 20}, {"tmp-path": "warning"}),
        ({"shm_path": None}, {"shm": "warning"}),
        ({"shm_free": 64 << 20}, {"shm": "warning"}),
        ({"shm_write": "No space left on device"}, {"shm": "warning"}),
        ({"memory_lock": 65536}, {"memory-lock": "warning"}),
    ],
)
def test_space(facts, expected):
    findings = list(doctor_space.judge_space(told(SPACE | facts, SPACE | facts, nodes=[1, 1]), {"n0": 4, "n1": 4}))
    assert worst(findings) == expected


def test_space_here(tmp_path):
    facts = doctor_space.space_facts({"TMPDIR": str(tmp_path)}, tmp_path)
    assert facts["shm_path"] == str(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert facts["tmp_write"] == facts["shm_write"] == ""
    assert facts["tmp_path"] == str(tmp_path)
    facts = doctor_space.space_facts({"TMPDIR": str(tmp_path / "absent")}, tmp_path / "absent")
    assert worst(doctor_space.judge_space(told(facts), {"n0": 1})) == {"tmp": "error", "shm": "warning"}


def test_a_file_system_is_that_of_the_nearest_mount(tmp_path):
    mounts = tmp_path / "mounts"
    (tmp_path / "a" / "b").mkdir(parents=True)
    mounts.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda rw\n"
        f"2 1 0:1 / {tmp_path} rw shared:1 - nfs4 server:/x rw\n"
        f"3 2 0:2 / {tmp_path}/a/b rw - lustre l rw\n"
    )
    kinds = [doctor_files.file_system(path, mounts) for path in (Path("/"), tmp_path / "a", tmp_path / "a" / "b")]
    assert kinds == ["ext4", "nfs4", "lustre"]
    assert doctor_files.file_system(tmp_path, tmp_path / "absent") == ""


def test_a_folder_that_is_another_one_on_another_node():
    nodes = told({"folder": True}, {"folder": False}, nodes=[1, 1])
    assert worst(judge_shared(nodes, {"folder": "/runs"})) == {"folder-not-shared": "error"}
    assert not worst(judge_shared(nodes[:1] * 2, {"folder": "/runs"}))
    assert not list(judge_shared(nodes, {}))


# ---- network


def link(kind="network", pair=(0, 1), latency=2e-6, speed=1e10, **rest):
    return {"kind": kind, "pair": pair, "latency_seconds": latency, "bytes_per_second": speed} | rest


NODES = {0: "n0", 1: "n1", 2: "n2", 3: "n3"}


def test_whom_to_measure():
    spots = [Spot(rank, f"n{rank // 2}", rank % 2) for rank in range(8)]
    rounds = doctor_link.pairs_of(spots)
    assert rounds == [("node", [(0, 1), (2, 3), (4, 5), (6, 7)]), ("network", [(0, 2), (4, 6)]), ("network", [(2, 4)])]
    for _, pairs in rounds:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(ranks) == len(set(ranks))
    assert doctor_link.pairs_of([Spot()]) == []


@pytest.mark.parametrize(
    ("links", "devices", "expected"),
    [
        ([link(), link("node")], [], {}),
        ([{"kind": "network", "pair": (0, 1), "lost_nbytes": 8192}], [], {"link-dead": "error"}),
        ([link(speed=1e9)], [], {}),
        ([link(speed=1e9)], ["infiniband/mlx5_0"], {"slow-network": "warning"}),
        ([link(speed=1e9)], ["net/hsn0"], {"slow-network": "warning"}),
        ([link(speed=1e9)], ["net/eth0"], {}),
        ([link("node", latency=5e-3)], [], {"slow-node": "note"}),
        ([link(), link(pair=(1, 2)), link(pair=(2, 3), speed=1e9)], [], {"slow-link": "warning"}),
    ],
)
def test_links(tmp_path, links, devices, expected):
    for device in devices:
        (tmp_path / device).mkdir(parents=True)
    found = list(doctor_link.judge_link(told(*({"links": [one]} for one in links)), 10.0, NODES, tmp_path))
    assert worst(found) == expected
    if "slow-link" in expected:
        assert "n2 and n3" in by_name(found)["slow-link"].what


def test_sums_over_all_ranks():
    assert not worst(doctor_link.judge_data(told({"right": True}, {"right": True}), 10.0))
    wrong = by_name(doctor_link.judge_data(told({"right": True}, {"right": False}), 10.0))["allreduce"]
    late = by_name(doctor_link.judge_data(told({"late": True}, {"late": True}), 10.0))["allreduce"]
    assert (wrong.level, wrong.ranks, late.level, late.ranks) == ("error", (1,), "error", ())


# ---- versions


def versions(**other):
    return {**dict.fromkeys(("mpi_ef", "numpy", "torch", "numba", "llvmlite", "h5py", "mpi4py"), "9.1"), "python": "3.11.2",
            "program": "/venv/bin/python", "least": {"numpy": "1.26"}} | other  # fmt: skip


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ({}, {}),
        ({"torch": "8.0"}, {"versions-differ": "warning"}),
        ({"mpi_ef": "0.0.1"}, {"versions-differ": "error"}),
        ({"python": "3.12.0"}, {"versions-differ": "warning"}),
    ],
)
def test_versions_of_ranks(second, expected):
    found = list(judge_versions(told(versions(), versions(**second))))
    assert worst(found) == expected
    if expected:
        assert "rank 1 (n0)" in by_name(found)["versions-differ"].what


def test_old_and_missing_packages():
    assert worst(judge_versions(told(versions(numpy="1.25.4")))) == {"version-old": "error"}
    assert worst(judge_versions(told(versions(h5py="")))) == {"package-missing": "error"}
    assert not worst(judge_versions(told(versions(numpy="1.26+local"))))


def test_versions_here():
    facts = version_facts()
    assert not worst(judge_versions(told(facts)))
    assert facts["numpy"] == np.__version__


# ---- what goes wrong in a check


def check(facts, name="it", **rest):
    return Check(
        name, "Files", facts, lambda told, _: (Finding("Files", "it", "ok", str(one.facts)) for one in told), **rest
    )


def fail(_):
    raise PermissionError(13, "Permission denied", "/scratch")


@pytest.mark.parametrize(
    ("facts", "name", "level"),
    [
        (fail, "check-failed", "warning"),
        (lambda _: sleep(30), "check-hangs", "warning"),
        (lambda _: __import__("no_such_package"), "check-import", "error"),
        (lambda _: sys.exit(3), "check-failed", "warning"),
        (lambda _: 1 / 0, "check-failed", "warning"),
    ],
)
def test_a_check_that_breaks_is_a_finding(monkeypatch, facts, name, level):
    seconds = 1.0 if name == "check-hangs" else 30.0
    monkeypatch.setattr(doctor_checks, "_LEAST_SECONDS", seconds)
    checks, spots = [check(facts), check(lambda _: {"a": 1}, "other")], [Spot(0, "n0"), Spot(1, "n1")]
    found = [Told(spot, collect(Asked(spot, {}, Path()), seconds, checks)) for spot in spots]
    findings = list(judge(found, Group(spots), checks))
    assert worst(findings) == {name: level}
    assert sum(finding.name == "it" for finding in findings) == 2
    assert "Traceback" not in str(findings)


def test_a_check_that_breaks_on_one_rank_names_it():
    turns = count()
    checks = [check(lambda _: fail(_) if next(turns) else {"a": 1})]
    spots = [Spot(0, "n0"), Spot(1, "n1")]
    found = [Told(spot, collect(Asked(spot, {}, Path()), 5.0, checks)) for spot in spots]
    finding = by_name(judge(found, Group(spots), checks))["check-failed"]
    assert finding.ranks == (1,)
    assert "on rank 1 (n1): PermissionError: [Errno 13] Permission denied: '/scratch'" in finding.what


def test_a_judgement_that_breaks_is_a_finding():
    checks = [Check("it", "Files", lambda _: {"a": 1}, lambda told, _: (one.facts["b"] for one in told))]
    found = [Told(Spot(), {"it": {"a": 1}})]
    assert worst(judge(found, Group([Spot()]), checks)) == {"check-failed": "warning"}


def test_a_check_for_nodes_is_done_once_a_node():
    asked = [Asked(Spot(rank, "n0", rank), {}, Path()) for rank in range(2)]
    checks = [check(lambda _: {"a": 1}, every_rank=False)]
    assert [len(collect(one, 5.0, checks)) for one in asked] == [1, 0]


def test_what_hangs_is_left_behind():
    assert bounded(lambda: {"a": 1}, 5.0) == {"a": 1}
    assert bounded(lambda: sleep(20) or {}, 0.1) == {"failed": "no end after 0 s"}


def test_a_report_survives_a_judgement_that_breaks():
    report = Report(DoctorConfig())
    report.add(Finding("MPI", "mpi", "ok", f"1 / {n} = {1 / n}") for n in (1, 0))
    assert [finding.name for finding in report.findings] == ["mpi", "check-failed"]


def test_the_doctor_itself_needs_nothing_that_may_be_broken():
    program = "import sys, mpi_ef.jobs.doctor.program; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=patience.limit(60),
        check=True,
        cwd=ROOT,
    )
    assert not set(done.stdout.split()) & {"torch", "mpi4py", "mpi4py.MPI", "numba", "numpy", "h5py"}


# ---- the program without a launcher

LAUNCHED = ("OMPI_", "PMI", "PRTE", "SLURM_", "HYDI_", "MPI_LOCAL")


def doctor(*arguments, code="", **environment):
    """Run the doctor as nobody has launched it, after some code."""
    program = f"import sys\n{code}\nfrom mpi_ef.jobs.doctor.program import main\nmain(sys.argv[1:])"
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(LAUNCHED) or name.startswith("OMPI_MCA")
    }
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True,
                          timeout=patience.limit(120),
                          check=False, cwd=ROOT, env=kept | environment)  # fmt: skip
    assert "Traceback" not in done.stdout + done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "environment", "name", "status"),
    [
        ("sys.modules['mpi4py'] = None", {}, "mpi4py-missing", 1),
        ("", {"MPI4PY_LIBMPI": "/nowhere/libmpi.so"}, "mpi-missing", 0),
    ],
)
def test_without_mpi_everything_else_is_looked_at(tmp_path, code, environment, name, status):
    done = doctor("--json", "--out", tmp_path, code=code, **environment)
    read = json.loads(done.stdout)
    findings = {finding["name"]: finding for finding in read["findings"]}
    assert done.returncode == status, done.stdout
    assert findings[name]["todo"]
    assert {"binding", "gpu", "loader", "cache", "folder", "hdf5", "tmp", "shm", "versions"} <= findings.keys()
    assert "no-launcher" in findings


@pytest.mark.slow
def test_one_process_without_a_launcher(tmp_path):
    done = doctor("--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "one process, started without a launcher" in done.stdout
    assert any(line.startswith("verdict:") for line in done.stdout.splitlines()[-2:]), (
        done.stdout
    )  # it may be two lines
    assert all(len(line) <= 100 for line in done.stdout.splitlines())
    assert list(tmp_path.iterdir()) == []


def test_broken_packages_are_findings(tmp_path):
    code = "for name in ('torch', 'h5py', 'numba'): sys.modules[name] = None"
    done = doctor("--json", "--out", tmp_path, code=code)
    findings = json.loads(done.stdout)["findings"]
    assert done.returncode == 1
    broken = [finding["what"] for finding in findings if finding["name"] == "check-import"]
    assert [text.split(":")[0] for text in broken] == ["GPU", "workers", "kernels", "folder"]


@pytest.mark.slow
def test_a_folder_for_nobody_gives_status_1():
    done = doctor("--out", "/proc/self/runs")
    assert done.returncode == 1
    assert "nothing can be written to /proc/self" in " ".join(done.stdout.split())
    assert "put right first what stops a training (folder)" in " ".join(done.stdout.split())


def test_wrong_options_are_one_line():
    done = doctor("--patience", "0")
    assert done.returncode == 2
    assert "patience=0.0 is not positive" in done.stderr


# ---- what this machine has not, or does not do


class Library(SimpleNamespace):
    """What the doctor asks of mpi4py's extension module."""

    Exception = type("Exception", (RuntimeError,), {})


@pytest.mark.parametrize(("file", "vendor", "built"), [
    ("MPI.openmpi.so", "MPICH", "openmpi"), ("MPI.cpython-311-x86_64-linux-gnu.so", "Open MPI", "openmpi"),
    ("MPI.cpython-311-x86_64-linux-gnu.so", "Intel MPI", "mpich"), ("MPI.abi3.so", "LAM", "unknown"),
])  # fmt: skip
def test_what_mpi4py_was_built_for(file, vendor, built):
    """Its file tells, or it was built with the library itself."""
    assert (
        doctor_mpi._built_for(Library(__file__=f"/site/mpi4py/{file}", get_vendor=lambda: (vendor, (1, 2, 3)))) == built
    )


@pytest.mark.parametrize(("threads", "started"), [(True, ["Init_thread", 3]), (False, ["Init"])])
@pytest.mark.parametrize("large", [True, False])
def test_mpi_is_started_as_mpi4py_is_told(monkeypatch, threads, started, large):
    """What one call takes is tried; Open MPI 5 takes less than MPICH 5."""
    calls = []

    def send(message, target, *, recvbuf, source):
        assert message[1] > 1 << 31
        if not large:
            raise OverflowError("value too large to convert to int")

    world = SimpleNamespace(Get_size=lambda: 4)
    kind = SimpleNamespace(Create_contiguous=lambda n: kind, Commit=lambda: kind, Free=lambda: None)
    library = Library(Is_initialized=lambda: False, Init=lambda: calls.append("Init"), THREAD_MULTIPLE=3, COMM_WORLD=world,
                      Init_thread=lambda level: calls.extend(["Init_thread", level]), Query_thread=lambda: 2, BYTE=kind,
                      COMM_SELF=SimpleNamespace(Sendrecv=send))  # fmt: skip
    settings = SimpleNamespace(threads=threads, thread_level="multiple")
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(rc=settings, MPI=library))
    assert doctor_mpi.start() == {"threads": 2, "large": large, "size": 4}
    assert calls == started


def test_without_proc_there_is_nothing_to_say(tmp_path, monkeypatch):
    for module in (doctor_mpi, doctor_ranks):
        monkeypatch.setattr(module, "Path", lambda _: tmp_path / "absent")
    assert doctor_mpi._loaded_library() == ""
    assert doctor_ranks._processor() == ""
    assert doctor_ranks.quota(tmp_path, tmp_path / "absent") is None


def test_packages_that_are_not_installed(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    monkeypatch.setattr(metadata, "requires", absent)
    facts = version_facts()
    assert facts["numpy"] == ""
    assert facts["least"] == {}
    assert worst(judge_versions(told(facts))) == {"package-missing": "error"}


@pytest.mark.parametrize("rank", [0, 1])
def test_gpus_that_torch_sees(monkeypatch, rank):
    """Rank 0 tries whether MPI takes their memory."""
    import torch

    names = {0: "H200", 1: "A100", 2: "H200"}
    for name, value in {"is_available": lambda: True, "device_count": lambda: 3, "get_device_name": names.get}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(doctor_torch, "DATA_TEST", "print('gpu_data True')")
    facts = doctor_torch.gpu_facts(Spot(rank, "n0", rank), dict(os.environ))
    assert (facts["count"], facts["names"], facts.get("aware")) == (3, ["A100", "H200"], None if rank else "yes")


def test_a_data_test_of_gpus_that_does_not_come_back(monkeypatch):
    monkeypatch.setattr(doctor_torch, "DATA_TEST", "import time; time.sleep(1000)")
    assert doctor_torch.gpu_aware({}, 0.2) == "no end after 0 s"


@pytest.mark.parametrize(("alive", "status", "problem"), [
    (True, None, "a worker had not ended after 30 s"), (False, 3, "a worker ended with status 3"),
])  # fmt: skip
def test_workers_that_hang_or_fail(monkeypatch, alive, status, problem):
    killed = []
    process = SimpleNamespace(start=lambda: None, join=lambda seconds: None, is_alive=lambda: alive, exitcode=status,
                              kill=lambda: killed.append(True))  # fmt: skip
    context = SimpleNamespace(SimpleQueue=list, Process=lambda **_: process)
    monkeypatch.setattr("mpi_ef.data.loader_context", lambda: context)
    facts = doctor_torch.loader_facts()
    assert facts["problem"] == problem
    assert bool(killed) == alive
    assert worst(doctor_torch.judge_loader(told(facts))) == {"loader": "warning"}


def test_a_place_of_machine_code_that_cannot_be_written_to(monkeypatch):
    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor_kernels.tempfile, "NamedTemporaryFile", refuse)
    facts = doctor_kernels.kernel_facts({})
    assert facts["write"] == "Read-only file system"
    assert worst(doctor_kernels.judge_kernels(told(facts), False, True)) == {"cache": "warning"}


@pytest.mark.parametrize("plan", ["gather topk", "gather sign", "two-phase sign", "two-phase int8"])
def test_the_other_rank_of_the_warm_up_echoes(plan):
    """The mean of two equal messages is the message; in two parts as at once."""
    echo, x = doctor_kernels._Echo(), np.linspace(-1, 2, 300, dtype=np.float32)
    plans = [PLANS[plan](echo, 300, np.float32) for _ in range(2)]
    plans[0].exchange(x)
    plans[1].start(x)
    plans[1].progress()
    plans[1].wait()
    (own, mean), others = ([np.zeros_like(x) for _ in range(2)] for _ in range(2))
    for plan_, (mine, all_) in zip(plans, ((own, mean), others), strict=True):
        plan_.add_own(mine)
        plan_.add_mean(all_)
    np.testing.assert_array_equal(others, (own, mean))
    if "gather" in plan:
        np.testing.assert_allclose(mean, own, rtol=1e-6)


def test_the_warm_up_of_one_process(monkeypatch, capsys):
    monkeypatch.setattr(doctor_checks, "CHECKS", [])
    monkeypatch.setattr(doctor_kernels, "warm_up", lambda: {"seconds": 2.0, "compiled": 3, "loaded": 4})
    report = Report(DoctorConfig(warmup=True, json=True))
    assert doctor_module._look_here(DoctorConfig(warmup=True, json=True), report) == 0
    [found] = json.loads(capsys.readouterr().out)["findings"]
    assert (found["name"], found["level"]) == ("warm-up", "ok")
    assert "3" in found["what"]


def test_a_full_disk_is_all_there_is_to_say(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    facts = doctor_files.folder_facts({}, tmp_path)
    assert "No space left on device" in facts["write"]
    assert "link" not in facts
    assert list(tmp_path.iterdir()) == []


def test_an_hdf5_that_reads_something_else(tmp_path, monkeypatch):
    import h5py

    class File(dict):
        def __init__(self, path, mode):
            super().__init__(x=np.zeros(2))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(h5py, "File", File)
    facts = doctor_files.folder_facts({}, tmp_path)
    assert facts["hdf5_write"] == "what was written is not what is read"
    facts["fsync_seconds"] = 0.001
    assert worst(doctor_files.judge_folder(told(facts))) == {"hdf5": "error"}


@pytest.mark.parametrize(("facts", "words"), [
    ({}, "with its locks"), ({"locking": "FALSE"}, "without locks (HDF5_USE_FILE_LOCKING)"),
    ({"lock": "No locks available"}, "although this file system has no locks"),
])  # fmt: skip
def test_hdf5_writes_with_locks_or_without(facts, words):
    assert words in by_name(doctor_files.judge_folder(told(FOLDER | facts)))["hdf5"].what


# ---- ranks that do not answer. With real ones, which end in MPI_Abort: launch/test_doctor_on_ranks.py

NEVER = SimpleNamespace(Test=lambda: False)


@pytest.mark.parametrize(("rank", "missing"), [(0, [1, 2]), (1, [0])])
def test_a_roll_call_without_answers(monkeypatch, rank, missing):
    monkeypatch.setattr(doctor_roll, "wait_for", lambda done, seconds, rest: done())
    comm = SimpleNamespace(Get_rank=lambda: rank, Get_size=lambda: 3, isend=lambda *_: NEVER, iprobe=lambda *_: False,
                           improbe=lambda tag: None)  # fmt: skip
    roll = doctor_roll.Roll(comm)
    with pytest.raises(doctor_roll.SilenceError) as caught:
        roll.call("here", 5.0, list)
    assert caught.value.ranks == missing
    assert roll.sent(5.0) == (rank == 0)  # rank 0 has sent nothing
    monkeypatch.undo()
    assert not doctor_roll.wait_for(lambda: False, 0.0)


def test_messages_that_do_not_arrive_are_kept():
    """MPI may still write to their memory."""
    comm = SimpleNamespace(Get_rank=lambda: 1, Get_size=lambda: 2, Iallreduce=lambda *_: NEVER, Irecv=lambda *_: NEVER,
                           Isend=lambda *_: NEVER)  # fmt: skip
    before = len(doctor_link._LEFT)
    assert doctor_link.data_test(comm, 0.0) == {"late": True}
    assert doctor_link.measure_link(comm, [("node", [(1, 0)])], 0.0) == {
        "links": [{"kind": "node", "pair": (1, 0), "lost_nbytes": 8}]
    }
    assert len(doctor_link._LEFT) == before + 2
    del doctor_link._LEFT[before:]


class Ended(Exception):
    """Ends a rank in the place of MPI_Abort."""


@pytest.mark.parametrize(("rank", "error", "found"), [
    (0, doctor_roll.SilenceError([1, 2]), "silent-ranks"), (1, doctor_roll.SilenceError([0]), None),
    (0, KeyError("word"), "check-failed"),
])  # fmt: skip
def test_a_doctor_that_gets_no_answers_ends_all(monkeypatch, capsys, rank, error, found):
    """Rank 0 at once, and others when it has not done so."""
    slept, examined = [], SimpleNamespace(Get_rank=lambda: rank, Get_size=lambda: 3)

    def run(*_):
        raise error

    def abort(comm, status):
        assert (comm, status) == (examined, 1)
        raise Ended

    monkeypatch.setitem(sys.modules, "mpi4py.MPI", SimpleNamespace())
    monkeypatch.setattr(mpi4py, "MPI", sys.modules["mpi4py.MPI"], raising=False)
    monkeypatch.setattr(doctor_together._Examination, "run", run)
    monkeypatch.setattr(doctor_together.launch, "abort", abort)
    monkeypatch.setattr(doctor_together, "sleep", slept.append)
    report = Report(DoctorConfig(json=True))
    with pytest.raises(Ended):
        doctor_together.examine(examined, {}, None, DoctorConfig(json=True), report, None)
    assert len(slept) == rank
    assert [finding.name for finding in report.findings] == ([found] if found else [])
    assert bool(capsys.readouterr().out) == (rank == 0)
    if found == "silent-ranks":
        assert "no answer from ranks 1-2" in report.findings[0].what


def test_files_that_other_nodes_look_for_are_taken_away_again(tmp_path, monkeypatch):
    """Also when looking for them breaks. On two nodes: tests/slurm/test_newcomer.py."""
    comm = SimpleNamespace(Get_rank=lambda: 0, Get_size=lambda: 2)
    examination = doctor_together._Examination(comm, DoctorConfig(), Report(DoctorConfig()), None)
    facts = {"folder": {"path": str(tmp_path)}, "kernels": {"path": str(tmp_path / "absent")}}
    for second, checks in (("n0", []), ("n1", ["folder"])):
        examination.spots = [Spot(0, "n0"), Spot(1, second)]
        examination.tokens = examination._leave_tokens(facts)
        assert list(examination.tokens) == checks
    assert [str(path) for path in tmp_path.iterdir()] == [examination.tokens["folder"]]

    def broken(_):
        raise RuntimeError("no folder")

    monkeypatch.setattr(examination, "_look", lambda *_: {})
    monkeypatch.setattr(examination, "_see_folders", broken)
    with pytest.raises(RuntimeError, match="no folder"):
        examination.run({}, None)
    assert list(tmp_path.iterdir()) == []


def test_what_breaks_between_ranks_is_told_to_rank_0():
    comm = SimpleNamespace(Get_rank=lambda: 0, Get_size=lambda: 1, improbe=lambda tag: None)
    watch = SimpleNamespace(enter=lambda *_: None)
    examination = doctor_together._Examination(comm, DoctorConfig(), Report(DoctorConfig()), watch)
    [word] = examination._together("looking", lambda: fail(None), 1.0, list)
    assert word == {"failed": "PermissionError: [Errno 13] Permission denied: '/scratch'"}
