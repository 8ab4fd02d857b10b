"""The doctor's judgement of made-up facts, its checks on this machine, its page. Ranks: launch/test_doctor_on_ranks.py."""

import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from time import sleep
from types import SimpleNamespace

import h5py
import mpi4py
import numpy as np
import patience
import pytest

from mpi_ef.comm.consensus import ranks_text
from mpi_ef.errors import ConfigError
from mpi_ef.jobs.doctor import all_ranks, registry, watchdog
from mpi_ef.jobs.doctor import checks as doctor_checks
from mpi_ef.jobs.doctor import finding as doctor_finding
from mpi_ef.jobs.doctor.checks import (
    allreduce,
    cores,
    files,
    kernels,
    launcher,
    link,
    mpi,
    shared,
    space,
    torch,
    versions,
    warm_up,
    workers,
)
from mpi_ef.jobs.doctor.finding import FAILED, LEVELS, TOPICS, Finding, Placement
from mpi_ef.jobs.doctor.registry import Check, Context, DoctorConfig, Launcher
from mpi_ef.jobs.doctor.report import Report, document, page, verdict
from mpi_ef.jobs.link_fit import fit_line

ROOT = Path(__file__).resolve().parents[1]
HYDRA, SRUN = Launcher("mpiexec (Hydra)", "PMI_SIZE", 2, 0), Launcher("srun", "SLURM_STEP_NUM_TASKS", 4, 0)
of = dict


def context(environment=(), out="runs", **rest):
    return Context(DoctorConfig(out=Path(out)), dict(environment), **rest)


def judged(module, *facts):
    """Judge the facts of ranks, with their node among them if it is not the first."""
    nodes = [mine.get("node", 0) for mine in facts]
    places = [Placement(rank, f"n{node}", nodes[:rank].count(node)) for rank, node in enumerate(nodes)]
    return list(registry.judge(Check("it", "Files", module), places, facts))


def agrees(found, expected):
    """Compare findings with names, levels and words: all that is not well, and what else is named."""
    names = {one.name: one for one in found}
    texts = {name: text.split("|") for name, text in expected.items()}
    ill = {name: one.level for name, one in names.items() if one.level != "ok"}
    assert ill == {name: level for name, (level, *_) in texts.items() if level != "ok"}, found
    for name, (level, *words) in texts.items():
        assert names[name].level == level
        assert all(word in f"{names[name]}" for word in words), names[name]
    assert all(bool(one.todo) == (one.level != "ok") for one in found)


# ---- facts of ranks, and what they mean

MPI = of(installed=True, library="MPICH", release="5.0.2", abi="mpich", built_for="mpich", file="/opt/lib/libmpi.so.12")
MPI |= of(standard="5.0", threads=3, large=True)
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "asked")


def rank(on, of_node=8, omp="", **rest):
    free = dict.fromkeys(THREADS, "") | of(world=True, quota=None, processor="x", cores=list(on), of_node=of_node)
    return free | {"OMP_NUM_THREADS": omp} | rest


def spread(facts, *nodes):
    return [mine | {"node": node} for mine, node in zip(facts, nodes, strict=True)]


EACH = [rank([core], omp="1") for core in range(4)]
FULL = [rank([0, 1], 2, omp="1")] * 16
NO_GPU = of(import_seconds=1.0, available=False, count=0, names=[], built="", torch="2.9+cpu", hardware=0)
GPUS = NO_GPU | of(available=True, count=4, names=["A100"], built="12.8", hardware=4, aware="yes")
GPUS |= of(kernels=["A100, kernels in Triton"], nodes=2, triton_path="/tmp/t", triton_kind="ext4", unpinned="")
GPUS |= of(memory_lock=-1)
AMD = NO_GPU | of(built="6.4", hip=True, hardware=1, ROCR_VISIBLE_DEVICES="1", CUDA_VISIBLE_DEVICES="1")
OLD = "P100, kernels in torch (compute capability 6.0 is below 7.0)"
WORKER = of(default="fork", mpi_here=True, mpi_in_worker=False, seconds=0.3)
CACHE = of(right=True, path="/tmp/numba", kind="ext4", open=False, write="", there=30, total=30, nodes=2, warm_up=False)
FOLDER = dict.fromkeys(("write", "fsync", "link", "rename", "lock", "hdf5_write", "locking"), "")
FOLDER |= of(path="/scratch", asked="/scratch", kind="lustre", free=10**12, files_left=10**6, fsync_seconds=0.01)
FOLDER |= of(versions="HDF5 2.0.0 (h5py 3.16)")
SPACE = of(tmp_path="/tmp", tmp_kind="ext4", tmp_free=10**10, tmp_write="", shm_path="/dev/shm", shm_free=10**10)
SPACE |= of(shm_write="", memory_lock=-1, infiniband=True, ranks_here=4)
VERSIONS = dict.fromkeys(versions.PACKAGES, "9.1") | of(python="3.11.2", program="/python", least={"numpy": "1.26"})


def links(*some, devices=()):
    return [{"links": [one], "devices": devices, "node": number} for number, one in enumerate(some)]


def pair(kind="network", ranks=(0, 1), latency=2e-6, speed=1e10):
    nodes = [f"n{number}" for number in ranks]
    return of(kind=kind, pair=ranks, nodes=nodes, latency_seconds=latency, bytes_per_second=speed)


LOST = of(kind="network", pair=(0, 1), nodes=["n0", "n1"], lost_nbytes=8192)
WARM, LOADED = of(first=True, seconds=60.0, compiled=40), of(first=False, seconds=1.0, compiled=0)
NO_SPACE = "No space left on device"

CASES = [
    (mpi, [MPI, MPI], {"thread-level": "ok|multiple"}),
    (mpi, [MPI, MPI | of(release="4.1")], {"mpi-differs": "error|rank 1 (n0)"}),
    (mpi, [MPI, MPI | of(library="Open MPI")], {"mpi-differs": "error|rank 1 (n0)"}),
    (mpi, [MPI, MPI | of(file="/other/libmpi.so.12")], {"mpi-differs": "warning|rank 1 (n0)"}),
    (mpi, [MPI, MPI | of(threads=1)], {"thread-level": "warning|rank 1 (n0)|(1,)"}),
    (mpi, [MPI | of(built_for="openmpi")], {"mpi-abi": "error|unset MPI4PY_MPIABI"}),
    (mpi, [MPI | of(large=False)], {"large-counts": "ok|no large counts"}),
    (mpi, [of(installed=False)], {"mpi4py-missing": "error"}),
    (mpi, [of(installed=True, problem="no library", launched=False)], {"mpi-missing": "warning"}),
    (mpi, [of(installed=True, problem="no library", launched=True)], {"mpi-missing": "error"}),
    (mpi, [MPI | of(problem="status 134", ended=True)], {"mpi-singleton": "note|MPICH 5.0.2 does not start|134"}),
    (launcher, [{}], {"no-launcher": "note"}),
    (launcher, [asdict(SRUN) | of(size=4)], {"world": "ok|one world of 4 ranks"}),
    (launcher, [asdict(SRUN) | of(size=2)], {"world-size": "warning|4 tasks|has 2 ranks"}),
    (cores, EACH, {"nodes": "ok|4 ranks on n0", "binding": "ok|1 core of its own"}),
    (cores, spread(EACH, 0, 0, 1, 1), {"nodes": "ok|2 ranks on each of 2 nodes: n0, n1"}),
    (cores, [rank(range(8), omp="2")] * 4, {"binding": "ok|not bound"}),
    (cores, [rank([0], world=False)], {"binding": "ok|1 of 8 cores"}),
    (cores, [rank([0, 1], 2, omp="1")] * 4, {"oversubscribed": "warning|4 ranks share 2 cores"}),
    (cores, spread(FULL, *[0, 1, 2, 3] * 4), {"oversubscribed": "warning|4 ranks share 2 cores|ranks=()"}),
    (cores, spread([rank([0], 1, omp="1")] * 2 + EACH[:2], 0, 0, 1, 1), {"oversubscribed": "warning|on n0|(0, 1)"}),
    (cores, [EACH[0]] * 2, {"binding": "warning|ranks 0,1 share core 0"}),
    (cores, [rank([0]), rank([0]), rank([1]), rank([2])], {"binding": "warning"}),
    (cores, [rank([0, 1])] * 3 + [rank([4, 5])], {"binding": "warning|ranks 0-2 share cores 0,1", "threads": "note"}),
    (cores, [rank(range(8))] * 2, {"threads": "note|OMP_NUM_THREADS=4"}),
    (cores, [rank([0]), rank([1])], {"threads": "ok|as many threads as cores"}),
    (cores, [rank(range(8), omp="8")] * 2, {"threads": "warning|16 threads on 8 cores"}),
    (cores, [rank(range(8), omp="many")] * 2, {"threads": "warning|not a number"}),
    (cores, [rank(range(8), omp="1")] * 2, {"threads": "note|4 cores a rank"}),
    (cores, [rank([0], omp="1"), rank([1])], {"threads-differ": "warning|1, not set"}),
    (cores, [rank([0], asked="4")], {"few-cores": "warning|on 1 core"}),
    (cores, [rank(range(4), quota=2.0, omp="1")] * 4, {"cpu-quota": "warning"}),
    (cores, [rank(range(4), quota=2.0)], {"cpu-quota": "note"}),
    (cores, spread(EACH, 0, 0, 0, 1), {"uneven-nodes": "note|from 1 (n1) to 3"}),
    (cores, spread(EACH[:2], "1#1", "1#2"), {"split-host": "warning|ranks on n1 do not"}),
    (cores, spread([EACH[0], EACH[0] | of(processor="y")], 0, 1), {"processors": "note|x; y"}),
    (torch, [NO_GPU], {"gpu": "ok|none"}),
    (torch, [NO_GPU | of(hardware=2)], {"gpu-torch": "note"}),
    (torch, [NO_GPU | of(hardware=2, built="12.8")], {"gpu-hidden": "note|nvidia-smi"}),
    (torch, [NO_GPU | of(hardware=2, built="12.8", CUDA_VISIBLE_DEVICES="")], {"gpu-hidden": "note|unset CUDA"}),
    (torch, [GPUS] * 4, {"gpu": "ok|4 GPUs for 4 ranks", "gpu-aware": "ok|arrived",
                         "gpu-kernels": "ok|'A100, kernels in Triton'"}),
    (torch, [GPUS, GPUS | of(kernels=["H200, kernels in Triton"])],
     {"gpu-kernels": "ok|'A100, kernels in Triton on rank 0 (n0); H200, kernels in Triton on rank 1 (n0)'"}),
    (torch, [GPUS, GPUS | of(kernels=[OLD])], {"gpu-kernels": f"warning|{OLD} on rank 1 (n0): the bits|newer|(1,)"}),
    (torch, [GPUS | of(kernels=["A100, kernels in torch (triton cannot be imported (No module named 'triton'))"])] * 4,
     {"gpu-kernels": "warning|cannot be imported|install the Triton"}),
    (torch, [GPUS | of(kernels=["A100, kernels in torch (MPI_EF_DEVICE_KERNELS=torch is set)"])] * 4,
     {"gpu-kernels": "note|unset MPI_EF"}),
    (torch, [GPUS | of(unpinned="out of memory", memory_lock=65536), GPUS | of(unpinned=None)],
     {"gpu-page-locked": "warning|on rank 0 (n0) (out of memory; ulimit -l is 65.5 kB)|(0,)"}),
    (torch, [GPUS | of(unpinned="busy")], {"gpu-page-locked": "warning|(busy; ulimit -l is unlimited)"}),
    (torch, [GPUS | of(triton_kind="nfs4", triton_path="/home/t")] * 4,
     {"triton-cache-network": "warning|in /home/t (nfs4), which|export TRITON_CACHE_DIR=${SLURM_TMPDIR:-/tmp}"}),
    (torch, [GPUS | of(triton_kind="nfs4", nodes=1)], {}),
    (torch, [AMD], {"gpu-hidden": "warning|ROCR_VISIBLE_DEVICES=1 leaves some, and CUDA_VISIBLE_DEVICES=1|unset CUDA"}),
    (torch, [AMD | of(CUDA_VISIBLE_DEVICES=None)], {"gpu-hidden": "note|rocminfo"}),
    (torch, [GPUS | of(count=1), AMD | of(HIP_VISIBLE_DEVICES="0")],
     {"gpu-hidden": "warning|HIP_VISIBLE_DEVICES=0|rank 1 (n0)|(1,)", "gpu-differs": "warning", "gpu-shared": "note"}),
    (torch, [GPUS] * 8, {"gpu-shared": "note|8 ranks on a node share 4 GPUs"}),
    (torch, [GPUS | of(count=1, CUDA_VISIBLE_DEVICES=str(n)) for n in range(4)], {}),
    (torch, [GPUS, GPUS | of(count=3)], {"gpu-differs": "warning|3 on rank 1 (n0)"}),
    (torch, [GPUS | of(aware="no")] * 4, {"gpu-aware": "ok|does not take"}),
    (torch, [GPUS | of(aware="exit status 1: no reason given")], {"gpu-aware": "note|exit status 1"}),
    (torch, [NO_GPU, NO_GPU | of(import_seconds=100.0)], {"slow-import": "warning|rank 1 (n0)|(1,)"}),
    (workers, [WORKER], {"loader": "ok|fork, does not go with MPI"}),
    (workers, [WORKER, WORKER | of(problem="status 1")], {"loader": "warning|status 1 on rank 1"}),
    (workers, [WORKER | of(mpi_in_worker=True)], {"loader": "error"}),
    (kernels, [CACHE, CACHE], {"cache": "ok|/tmp/numba (ext4)"}),
    (kernels, [CACHE, CACHE | of(right=False)], {"kernels": "error|rank 1"}),
    (kernels, [CACHE, CACHE | of(path="")], {"cache": "warning|no folder can be written"}),
    (kernels, [CACHE, CACHE | of(write="Read-only")], {"cache": "warning|/tmp/numba: Read-only"}),
    (kernels, [CACHE, CACHE | of(kind="nfs4")], {"cache-network": "warning|${SLURM_TMPDIR:-/tmp}"}),
    (kernels, [CACHE, CACHE | of(kind="nfs4", nodes=1)], {}),
    (kernels, [CACHE, CACHE | of(open=True)], {"cache-open": "warning"}),
    (kernels, [CACHE, CACHE | of(there=3)], {"cache-cold": "note|3 of 30"}),
    (kernels, [CACHE | of(there=3, warm_up=True)] * 2, {}),
    (warm_up, [WARM, LOADED], {"warm-up": "ok|40 compiled in 60.0 s; the other ranks loaded them in 1.0 s"}),
    (warm_up, [WARM | of(compiled=0), LOADED | of(compiled=3)], {"warm-up-again": "warning|3 kernels|rank 1"}),
    (warm_up, [of(failed="OSError: full")], {"check-failed": "warning"}),
    (files, [FOLDER, FOLDER], {"hdf5": "ok|with its locks"}),
    (files, [FOLDER | of(locking="FALSE")], {"hdf5": "ok|without locks (HDF5_USE_FILE_LOCKING)"}),
    (files, [FOLDER | of(lock="No locks available")], {"hdf5": "ok|although this file system has no locks"}),
    (files, [FOLDER, FOLDER | of(write=NO_SPACE)], {"folder": "error|rank 1|--out"}),
    (files, [FOLDER, FOLDER | of(free=5 * 10**8)], {"folder-space": "warning"}),
    (files, [FOLDER, FOLDER | of(free=10**6)], {"folder-space": "error"}),
    (files, [FOLDER | of(files_left=3), FOLDER], {"folder-files": "warning|3 more files"}),
    (files, [FOLDER, FOLDER | of(link="not permitted")], {"hard-links": "error|lustre|rank 1"}),
    (files, [FOLDER, FOLDER | of(fsync="Input/output error")], {"fsync": "error"}),
    (files, [FOLDER, FOLDER | of(rename="Permission denied")], {"rename": "error"}),
    (files, [FOLDER | of(lock="no locks", hdf5_write="unable to lock file")], {"hdf5-lock": "warning|FALSE"}),
    (files, [FOLDER | of(hdf5_write="Input/output error")], {"hdf5": "error"}),
    (files, [FOLDER | of(fsync_seconds=4.0)], {"slow-disk": "note|4.0 s"}),
    (files, [FOLDER | of(kind="tmpfs")], {"folder-in-memory": "warning"}),
    (shared, spread([of(folder=True, folder_path="/runs")] * 2, 0, 1), {"folder-shared": "ok|all 2 nodes|/runs"}),
    (shared, spread([of(folder=there, folder_path="/runs") for there in (True, False)], 0, 1),
     {"folder-not-shared": "error|/runs on n0 is not the same folder on n1|(1,)"}),
    (shared, spread([{}] * 2, 0, 1), {}),
    (space, [SPACE, SPACE], {"tmp": "ok", "shm": "ok"}),
    (space, [SPACE, SPACE | of(tmp_write=NO_SPACE)], {"tmp": "error|rank 1"}),
    (space, [SPACE, SPACE | of(tmp_free=10**7)], {"tmp-space": "warning|on n0"}),
    (space, [SPACE | of(tmp_kind="nfs")] * 2, {"tmp-network": "warning"}),
    (space, [SPACE | of(tmp_path="/" + "long/" * 20)], {"tmp-path": "warning|101 characters"}),
    (space, [SPACE, SPACE | of(shm_path=None)], {"shm": "warning|no /dev/shm on rank 1"}),
    (space, [SPACE, SPACE | of(shm_free=64 << 20)], {"shm": "warning|for 4 ranks"}),
    (space, [SPACE, SPACE | of(shm_write=NO_SPACE)], {"shm": f"warning|{NO_SPACE}"}),
    (space, [SPACE, SPACE | of(memory_lock=65536)], {"memory-lock": "warning|rank 1"}),
    (link, links(pair(), pair("node")), {"link-network": "ok|2.0 us", "link-node": "ok|10.0 GB/s"}),
    (link, links(LOST), {"link-dead": "error|8192 bytes between rank 0 (n0) and rank 1 (n1)|(0, 1)"}),
    (link, links(pair(speed=1e9)), {}),
    (link, links(pair(speed=1e9), devices=["mlx5_0"]), {"slow-network": "warning|mlx5_0"}),
    (link, links(pair("node", latency=5e-3)), {"slow-node": "note"}),
    (link, links(pair(), pair(ranks=(1, 2)), pair(ranks=(2, 3), speed=1e9)), {"slow-link": "warning|n2 and n3|(2, 3)"}),
    (allreduce, [of(arrived=True, right=True)] * 2, {"allreduce": "ok|all 2 ranks"}),
    (allreduce, [of(arrived=True, right=there) for there in (True, False)], {"allreduce": "error|is wrong|(1,)"}),
    (allreduce, [of(arrived=False)] * 2, {"allreduce": "error|had not arrived after 10 s"}),
    (versions, [VERSIONS, VERSIONS], {"versions": "ok|the same on all 2 ranks"}),
    (versions, [VERSIONS, VERSIONS | of(torch="8.0")], {"versions-differ": "warning|8.0 on rank 1 (n0)|(1,)"}),
    (versions, [VERSIONS, VERSIONS | of(mpi_ef="0.0.1")], {"versions-differ": "error|rank 1 (n0)"}),
    (versions, [VERSIONS, VERSIONS | of(python="3.12.0")], {"versions-differ": "warning"}),
    (versions, [VERSIONS | of(numpy="1.25.4")], {"version-old": "error|numpy>=1.26"}),
    (versions, [VERSIONS | of(numpy="1.26+local")], {}),
    (versions, [VERSIONS | of(h5py="")], {"package-missing": "error|pip install h5py"}),
]


@pytest.mark.parametrize(("module", "facts", "expected"), CASES)
def test_judgements(module, facts, expected):
    agrees(judged(module, *facts), expected)


def test_every_finding_of_the_table_is_raised_and_none_besides(monkeypatch):
    """With all fields that its texts have."""
    raised, texts = set(), doctor_finding.texts()

    class Recorded(dict):
        def __getitem__(self, key):
            raised.add(key)
            return super().__getitem__(key)

    monkeypatch.setattr(doctor_finding, "texts", lambda: Recorded(texts))
    monkeypatch.setattr(launcher, "ask_srun", lambda _: "")
    for module, facts, _ in CASES:
        judged(module, *facts)
    for some in (SRUN, HYDRA):
        alone = context(launcher=some, mpi=MPI | {"size": 1})
        judged(launcher, launcher.collect(alone))
        launcher.ended_at_start(alone, some)
    for reason in ("no end", "ImportError", "OSError"):
        registry.failure("MPI", "it", reason)
    all_ranks._silent([1], 60.0)
    monkeypatch.setattr(Report, "show", lambda self: None)
    Report(context()).show_hanging("MPI_Init")
    assert raised == set(texts)


def test_the_documentation_is_that_of_the_table():
    """Else: python -m mpi_ef.jobs.doctor.finding > docs/findings.md."""
    assert (ROOT / "docs" / "findings.md").read_text(encoding="utf-8") == doctor_finding.documentation()
    assert all(text["todo"] and text["means"] for text in doctor_finding.texts().values() if text["level"] != "ok")


@pytest.mark.parametrize(("ranks", "text"), [
    ([3], "rank 3"), ([1, 0], "ranks 0,1"), ([5, 0, 1, 2], "ranks 0-2,5"), (range(64), "ranks 0-63"),
    (range(0, 40, 2), "ranks 0,2,4,6,8,10,12,14 and 12 more")])
def test_ranks_are_named_shortly(ranks, text):
    assert ranks_text(ranks) == text


# ---- the page

MANY = [Finding(topic, f"name-{level}", level, f"{topic} is: " + "words " * 40, "" if level == "ok" else "do this " * 30)
        for topic in TOPICS for level in LEVELS]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_page_fits_the_terminal(width):
    lines = page("mpi-ef doctor: 2 ranks", MANY, width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert [line for line in lines if line in TOPICS] == list(TOPICS)
    assert "[name-ok]" not in " ".join(lines)
    assert sum("-> do this" in line for line in lines) == 3 * len(TOPICS)
    assert any(line.startswith("verdict: ") for line in lines[-2:])
    assert "\x1b" not in "".join(lines)
    assert "\x1b[" in page("", MANY, color=True)


OK, NOTE, WARNING, ERROR = (Finding("MPI", level, level, "it is") for level in LEVELS)
ALONE = Finding("MPI", "no-launcher", "note", "it is")


@pytest.mark.parametrize(("findings", "text"), [
    ([OK, NOTE], "nothing stands in the way of a training"),
    ([OK, WARNING], "a training works; 1 warning (warning) of what makes it slow or fragile"),
    ([OK, ALONE], "nothing stands in the way here; what lies between ranks was not looked at"),
    ([WARNING, ALONE], "1 warning (warning); what lies between ranks was not looked at"),
    ([ERROR, WARNING, ERROR], "2 errors: put right first what stops a training (error)")])
def test_verdict_and_exit_status(findings, text):
    assert verdict(findings) == text
    report = Report(context())
    report.add(findings)
    assert report.status == (ERROR in findings)


def test_the_document():
    read = json.loads(document(MANY, ranks=2))
    assert (read["ranks"], len(read["findings"]), read["counts"]) == (2, len(MANY), dict.fromkeys(LEVELS, len(TOPICS)))
    assert set(read["findings"][0]) == {"topic", "name", "level", "what", "todo", "ranks"}


# ---- launchers, and how MPI is started

@pytest.mark.parametrize(("environment", "expected"), [
    (of(OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="3"), ("mpiexec of Open MPI", 4, 3)),
    (of(OMPI_COMM_WORLD_SIZE="4", SLURM_STEP_NUM_TASKS="2"), ("mpiexec of Open MPI", 4, None)),
    (of(PMI_SIZE="2", PMI_RANK="0", MPI_LOCALNRANKS="2"), ("mpiexec (Hydra)", 2, 0)),
    (of(PMI_SIZE="2", PMI_RANK="1", SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="1"), ("srun", 2, 1)),
    (of(SLURM_STEP_NUM_TASKS="8"), ("srun", 8, None)),
    (of(PMI_SIZE="3"), ("mpiexec", 3, None)),
    (of(PMI_SIZE="0"), None),
    (of(), None),
    (of(SLURM_NTASKS="4", SLURM_PROCID="0"), None),  # a batch script
    (of(SLURM_STEP_NUM_TASKS="1", SLURM_STEP_ID="4294967290"), None)])  # a shell in a job
def test_launchers(environment, expected):
    found = launcher.launcher_of(environment)
    assert (found and (found.name, found.tasks, found.rank)) == expected


@pytest.mark.parametrize(("library", "environment", "offered", "words"), [
    ("Open MPI", of(PMI_FD="7"), "none pmi2 pmix", "Open MPI wants srun --mpi=pmix (|started with --mpi=pmi2"),
    ("MPICH", of(PMIX_RANK="0"), "none pmi2 pmix", "MPICH wants srun --mpi=pmi2|started with --mpi=pmix"),
    ("Cray MPICH", of(), "cray_shasta", "Cray MPICH wants srun --mpi=cray_shasta|started with --mpi=none"),
    ("An own one", of(SLURM_MPI_TYPE="openmpi"), "none", "others of srun --mpi=list|with --mpi=openmpi"),
    ("Open MPI", of(), "none pmi2", "srun here does not have|srun here has: none, pmi2"),
    ("Open MPI", of(), "none pmi2 pmix_v4", "Open MPI wants srun --mpi=pmix_v4 ("),
    ("Open MPI", None, "", "mpiexec that belongs to this library (that of Open MPI)")])
def test_ranks_that_are_no_world_have_a_remedy(monkeypatch, library, environment, offered, words):
    """Each is rank 0 of its own world, or MPI ends all of them when it is started."""
    monkeypatch.setattr(launcher, "ask_srun", lambda _: offered)
    some = HYDRA if environment is None else SRUN
    alone = context(environment or {}, launcher=some, mpi=MPI | {"library": library, "size": 1})
    words += "|--mpi=pmix|--mpi=pmi2|--mpi=cray_shasta"
    agrees(judged(launcher, launcher.collect(alone)), {"lonely-ranks": f"error|{some.tasks} tasks|{words}"})
    agrees([launcher.ended_at_start(alone, some)], {"mpi-init": f"error|{words}"})


ABORTING = "'hello\\naborting: MPI_Init failed'"


@pytest.mark.parametrize(("program", "seconds", "problem"), [
    ("import os; os.abort()", 30.0, "exit status -6: no reason given"),
    (f"import sys; sys.exit({ABORTING})", 30.0, "exit status 1: aborting: MPI_Init failed"),
    ("import time; time.sleep(60)", 1.0, "no end after 1 s"),
    ('print(\'facts {"library": "Cray MPICH"}\', flush=True); import os; os.abort()', 30.0, "exit status -6")])
def test_an_mpi_that_ends_its_process(monkeypatch, program, seconds, problem):
    """As on login nodes of Cray machines: the doctor goes on, with the name of the library."""
    monkeypatch.setattr(mpi, "_CHILD", program)
    facts = mpi.facts_of_process(seconds)
    assert facts["problem"].startswith(problem)
    assert facts["ended"]
    assert facts.get("library") == ("Cray MPICH" if "facts" in program else None)


class Library(SimpleNamespace):
    """What the doctor needs of mpi4py's extension module."""

    Exception = type("Exception", (RuntimeError,), {})


@pytest.mark.parametrize(("file", "vendor", "abi"), [("openmpi", "MPICH", "openmpi"), ("abi3", "Open MPI", "openmpi"),
                                                    ("abi3", "Intel MPI", "mpich"), ("abi3", "LAM", "unknown")])
def test_what_mpi4py_was_built_for(file, vendor, abi):
    """According to its file, or the library that it was compiled with."""
    assert mpi._built_for(Library(__file__=f"/site/MPI.{file}.so", get_vendor=lambda: (vendor, 1))) == abi


@pytest.mark.parametrize(("threads", "started"), [(True, ["Init_thread", 3]), (False, ["Init"])])
@pytest.mark.parametrize("large", [True, False])
def test_mpi_is_started_as_mpi4py_is_configured(monkeypatch, threads, started, large):
    """What one call takes is tried; Open MPI 5 takes less than MPICH 5."""
    calls = []

    def send(message, target, *, recvbuf, source):
        assert message[1] > 1 << 31
        if not large:
            raise OverflowError("value too large to convert to int")

    kind = SimpleNamespace(Create_contiguous=lambda n: kind, Commit=lambda: kind, Free=lambda: None)
    library = Library(Is_initialized=lambda: False, THREAD_MULTIPLE=3, Query_thread=lambda: 2, BYTE=kind)
    library.COMM_WORLD, library.COMM_SELF = SimpleNamespace(Get_size=lambda: 4), SimpleNamespace(Sendrecv=send)
    library.Init, library.Init_thread = lambda: calls.append("Init"), lambda level: calls.extend(["Init_thread", level])
    settings = SimpleNamespace(threads=threads, thread_level="multiple")
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(rc=settings, MPI=library))
    assert mpi.start() == {"threads": 2, "large": large, "size": 4}
    assert calls == started


# ---- facts of this machine, and of machines that lack something

def test_facts_of_this_machine(tmp_path, monkeypatch):
    """JSON holds them, and trying leaves nothing behind. Space may be short here, and others may write to the cache."""
    monkeypatch.setattr(space, "_SHM", tmp_path)
    here = context(os.environ | {"TMPDIR": str(tmp_path)}, tmp_path / "runs" / "one")
    modules = {check.name: check.module for check in doctor_checks.CHECKS}
    facts = {name: modules[name].collect(here) for name in ("workers", "kernels", "folder", "space", "versions")}
    assert json.loads(json.dumps(facts)) == facts
    assert list(tmp_path.iterdir()) == []
    facts["folder"]["fsync_seconds"] = 0.001  # the disk may be slow just now
    for name in ("workers", "folder", "versions"):
        agrees(judged(modules[name], facts[name]), {})
    assert not any(judged(modules[name], facts[name])[0].name.startswith("check-") for name in facts)
    assert facts["space"]["tmp_write"] == facts["space"]["shm_write"] == ""
    assert facts["folder"]["path"] == facts["space"]["tmp_path"] == str(tmp_path)
    assert facts["workers"]["mpi_in_worker"] is False
    assert facts["kernels"]["right"]
    assert 0 < facts["kernels"]["there"] <= facts["kernels"]["total"]  # the kernel that was just run is there
    assert facts["versions"]["numpy"] == np.__version__


def test_a_machine_that_lacks_something(tmp_path, monkeypatch):
    absent = tmp_path / "absent"
    monkeypatch.setattr(space, "_SHM", absent)
    agrees(judged(space, space.collect(context({"TMPDIR": str(absent)}))), {"tmp": "error", "shm": "warning"})
    agrees(judged(files, files.collect(context(out="/proc/self/runs"))), {"folder": "error"})  # not for root either
    monkeypatch.setattr(kernels, "dispatchers", lambda: iter([print]))
    agrees(judged(kernels, kernels.collect(context())), {"cache": "warning|no folder"})
    assert registry.lines_of(absent) == []
    for module in (mpi, cores):
        monkeypatch.setattr(module, "lines_of", lambda _: [])
    mpi.start()  # other tests of this process may need it
    assert mpi.facts_of_library()["file"] == ""
    assert {"processor": "", "quota": None}.items() <= cores.collect(context()).items()

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    monkeypatch.setattr(metadata, "requires", missing)
    facts = versions.collect(context())
    assert (facts["numpy"], facts["least"]) == ("", {})
    agrees(judged(versions, facts), {"package-missing": "error"})


def test_folders_that_refuse(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, NO_SPACE)

    with monkeypatch.context() as patch:
        patch.setattr(registry.tempfile, "mkdtemp", full)
        agrees(judged(kernels, kernels.collect(context()) | {"warm_up": True}), {"cache": f"warning|{NO_SPACE}"})
        assert files.collect(context(out=tmp_path))["write"] == NO_SPACE
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda *_: np.zeros(2))
    facts = files.collect(context(out=tmp_path)) | {"fsync_seconds": 0.001}
    agrees(judged(files, facts), {"hdf5": "error|what was written is not what is read"})
    monkeypatch.setattr(Path, "write_bytes", full)
    facts = files.collect(context(out=tmp_path))
    assert NO_SPACE in facts["write"]
    assert "link" not in facts
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_is_that_of_the_nearest_mount(tmp_path):
    mounts = tmp_path / "mounts"
    (tmp_path / "a" / "b").mkdir(parents=True)
    mounts.write_text(f"1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:1 / {tmp_path} rw shared:1 - nfs4 server:/x rw\n"
                      f"3 2 0:2 / {tmp_path}/a/b rw - lustre l rw\n")
    kinds = [files.file_system(path, mounts) for path in (Path("/"), tmp_path / "a", tmp_path / "a" / "b")]
    assert kinds == ["ext4", "nfs4", "lustre"]
    assert files.file_system(tmp_path, tmp_path / "absent") == files.UNKNOWN


@pytest.mark.parametrize(("written", "place", "limit"), [
    ({"a/cpu.max": "150000 100000"}, "0::/a/b", 1.5),
    ({"a/cpu.max": "max 100000"}, "0::/a", None),
    ({"cpu.max": "300000 100000", "a/cpu.max": "200000 100000"}, "0::/a", 2.0),
    ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/docker/x", 0.5),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/", None),
    ({"cpu.max": "100000 100000"}, "4:memory:/", None)])
def test_limits_of_containers(tmp_path, written, place, limit):
    for name, text in {"self": place, **written}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert cores.quota(tmp_path, tmp_path / "self") == limit


@pytest.mark.parametrize(("program", "seconds", "answer"), [
    ("print('gpu_data True')", 30.0, "yes"),
    ("print('gpu_data False')", 30.0, "no"),
    ("import os; os.kill(os.getpid(), 11)", 30.0, "no"),  # an MPI that does not know device pointers
    ("raise SystemExit('no device')", 30.0, "exit status 1: no device"),
    ("import os; print('gpu_data', 'SLURM_PROCID' not in os.environ and 'KEPT' in os.environ)", 30.0, "yes"),
    ("import time; time.sleep(1000)", 0.2, "no end after 0 s")])
def test_whether_mpi_takes_memory_of_the_gpu_is_tried_apart(monkeypatch, program, seconds, answer):
    monkeypatch.setattr(torch, "_MESSAGE", program)
    assert torch.gpu_aware({"SLURM_PROCID": "0", "KEPT": "1"}, seconds) == answer


@pytest.mark.parametrize("rank", [0, 1])
def test_gpus_that_torch_sees(monkeypatch, rank):
    """Rank 0 tries whether MPI takes their memory."""
    from torch import cuda

    names = {0: "H200", 1: "A100", 2: "H200"}
    made_up = {"is_available": lambda: True, "device_count": lambda: 3, "get_device_capability": lambda _: (6, 1),
               "get_device_name": lambda device: names[getattr(device, "index", device)]}
    for name, value in made_up.items():
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(torch, "_MESSAGE", "print('gpu_data True')")
    facts = torch.collect(context(os.environ, placement=Placement(rank)))
    assert (facts["count"], facts["names"], facts.get("aware")) == (3, ["A100", "H200"], None if rank else "yes")
    why = "kernels in torch (compute capability 6.1 is below 7.0)"
    assert facts["kernels"] == [f"A100, {why}", f"H200, {why}"]
    assert "triton_path" not in facts
    assert facts["unpinned"].startswith("pin_memory=True requires")  # torch for CPUs cannot
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize(("alive", "status", "problem"),
                         [(True, None, "had not ended after 30 s"), (False, 3, "ended with status 3")])
def test_workers_that_hang_or_fail(monkeypatch, alive, status, problem):
    killed = []
    process = SimpleNamespace(start=lambda: None, join=lambda seconds: None, is_alive=lambda: alive, exitcode=status,
                              kill=lambda: killed.append(True))
    fork_server = SimpleNamespace(SimpleQueue=list, Process=lambda **_: process)
    monkeypatch.setattr("mpi_ef.data.loader_context", lambda: fork_server)
    agrees(judged(workers, workers.collect(context())), {"loader": f"warning|a worker {problem}"})
    assert bool(killed) == alive


def test_the_ranks_that_compile_first(monkeypatch):
    """One of every node, or of all where they share a folder; the others load afterwards."""
    places = [Placement(rank, f"n{rank // 2}", rank % 2) for rank in range(4)]
    monkeypatch.setattr("mpi_ef.testing.virtual.results", lambda *_: None)
    for together, first in ((False, {0, 2}), (True, {0})):
        for turn, expected in enumerate((first, {0, 1, 2, 3} - first)):
            ready = [warm_up.collect(context(placement=one, shared_cache=together, turn=turn)) for one in places]
            assert {rank for rank, facts in enumerate(ready) if facts} == expected
            assert all(facts["first"] == (turn == 0) for facts in ready if facts)


def test_fast_devices_and_pairs_to_measure(tmp_path):
    for name in ("infiniband/mlx5_0", "net/hsn0", "net/eth0"):
        (tmp_path / name).mkdir(parents=True)
    assert link.fast_devices(tmp_path) == ["mlx5_0", "hsn0"]
    rounds = link.pairs_of([Placement(rank, f"n{rank // 2}", rank % 2) for rank in range(8)])
    assert rounds == [("node", [(0, 1), (2, 3), (4, 5), (6, 7)]), ("network", [(0, 2), (4, 6)]), ("network", [(2, 4)])]
    assert link.pairs_of([Placement()]) == []


def test_the_fit_finds_latency_and_bandwidth():
    sizes = [8, 1 << 13, 1 << 22]
    assert fit_line(sizes, [3e-6 + size / 2e9 for size in sizes]) == pytest.approx((3e-6, 2e9))


def test_containers_of_one_host_that_share_no_memory_are_nodes():
    places = all_ranks.placements_of([("n1", 0, 0), ("n1", 0, 1), ("n2", 0, 2), ("n2", 1, 2)])
    assert places == [Placement(0, "n1#1"), Placement(1, "n1#2"), Placement(2, "n2"), Placement(3, "n2", 1)]


# ---- what goes wrong in a check

def fail(_=None):
    raise PermissionError(13, "Permission denied", "/scratch")


def check(collect, name="it", **rest):
    judge = lambda ranks: [Finding("Files", "it", "ok", str(one["a"])) for one in ranks]  # noqa: E731
    return Check(name, "Files", SimpleNamespace(collect=collect, judge=judge), **rest)


RAISES = (fail, "check-failed|warning|on rank 1 (n0): PermissionError: [Errno 13] Permission denied: '/scratch'")
LACKS = (lambda _: __import__("no_such_package"), "check-import|error|ModuleNotFoundError")


@pytest.mark.parametrize(("collect", "expected", "uses_mpi"), [
    (*RAISES, False), (*RAISES, True), (*LACKS, False), (*LACKS, True),
    # In a thread alone: otherwise that is the watchdog's, or the end of this process.
    (lambda _: sleep(30), "check-hangs|warning|no end after 1 s", False),
    (lambda _: sys.exit(3), "check-failed|warning|SystemExit: 3", False)])
def test_a_check_that_breaks_on_one_rank_is_a_finding(collect, expected, uses_mpi):
    name, _, rest = expected.partition("|")
    places = [Placement(rank, "n0", rank) for rank in range(2)]
    broken, whole = check(collect, uses_mpi=uses_mpi), check(lambda _: {"a": 1}, uses_mpi=uses_mpi)
    facts = [whole.facts(context(), 30.0), broken.facts(context(), 1.0 if name == "check-hangs" else 30.0)]
    findings = list(registry.judge(broken, places, facts))
    agrees(findings, {name: f"{rest}|(1,)"})
    assert [one.name for one in findings] == [name, "it"]
    assert "Traceback" not in str(findings)


def test_a_judgement_that_breaks_is_a_finding():
    """What it has found before stays."""
    module = SimpleNamespace(judge=lambda ranks: (Finding("MPI", "mpi", "ok", f"{1 / one['a']}") for one in ranks))
    assert [one.name for one in judged(module, {"a": 1}, {"a": 0})] == ["mpi", "check-failed"]


def test_a_check_for_nodes_is_done_once_a_node():
    places, once = [Placement(rank, "n0", rank) for rank in range(2)], check(lambda _: {"a": 1}, per_node=True)
    facts = [once.facts(context(placement=place), 5.0) for place in places]
    assert facts == [{"a": 1}, {}]
    assert len(list(registry.judge(once, places, facts))) == 1


@pytest.mark.parametrize(("end", "printed"), [("message.cancel()", ""), ("", "gone"), ("os.abort()", "gone")])
def test_an_exit_message_is_printed_by_another_process(end, printed):
    code = f"import os; from mpi_ef.jobs.doctor.watchdog import ExitMessage; message = ExitMessage('gone'); {end}"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=patience.limit(60),
                          check=False, cwd=ROOT)
    assert done.stdout.strip() == printed


# ---- ranks that do not answer. With real ones, which end in MPI_Abort: launch/test_doctor_on_ranks.py

NEVER = SimpleNamespace(Test=lambda: False)
QUIET = SimpleNamespace(enter=lambda *_: None)


def fake_comm(rank, size, **calls):
    return SimpleNamespace(**of(Get_rank=lambda: rank, Get_size=lambda: size, isend=lambda *_: NEVER) | calls)


@pytest.mark.parametrize(("rank", "missing"), [(0, [1, 2]), (1, [0])])
def test_polling_ranks_that_do_not_answer(monkeypatch, rank, missing):
    monkeypatch.setattr(watchdog, "wait_until", lambda done, seconds, rest: done())
    poller = watchdog.RankPoller(fake_comm(rank, 3, iprobe=lambda *_: False, improbe=lambda tag: None))
    with pytest.raises(watchdog.NoAnswerError) as caught:
        poller.exchange("here", 5.0, list)
    assert caught.value.ranks == missing
    assert poller.sent(5.0) == (rank == 0)  # rank 0 has sent nothing


def test_messages_that_do_not_arrive_are_kept(monkeypatch):
    """MPI may still write to their memory."""
    comm = fake_comm(1, 2, Iallreduce=lambda *_: NEVER, Irecv=lambda *_: NEVER, Isend=lambda *_: NEVER)
    pending = []
    for module in (allreduce, link):
        monkeypatch.setattr(module, "MESSAGE_SECONDS", 0.0)
        monkeypatch.setattr(module, "PENDING", pending)
    second = context(comm=comm, placements=[Placement(0), Placement(1)], placement=Placement(1))
    assert allreduce.collect(second) == {"arrived": False}
    facts = link.collect(second)
    assert (facts["links"], facts["arrived"]) == ([], False)
    assert len(pending) == 2


@pytest.mark.parametrize(("second", "everywhere", "names"), [
    (of(arrived=True, right=False), {"arrived"}, ["it", "it"]),
    (of(failed="OSError: full"), set(), ["check-failed", "it"])])
def test_ranks_take_turns_and_all_get_what_holds_on_all_of_them(second, everywhere, names):
    """Rank 1 has facts of the second turn only; those of both are judged together."""
    answers, sent = [(1, second), (1, {})], []
    message = lambda tag: SimpleNamespace(recv=answers.pop) if len(answers) + len(sent) == 2 else None  # noqa: E731
    comm = fake_comm(0, 2, improbe=message, isend=lambda value, rank, tag: sent.append(value) or NEVER)
    places = [Placement(0, "n0"), Placement(1, "n0", 1)]
    report = Report(context(comm=comm, placements=places, placement=places[0]))
    examination = all_ranks._Examination(report, QUIET)
    turns = []
    taking_turns = check(lambda now: turns.append(now.turn) or of(a=1, arrived=True, right=True), turns=2)
    assert examination._step(taking_turns) == sent[-1] == everywhere
    assert turns == [0, 1]
    assert [one.name for one in report.findings] == names


class Ended(Exception):
    """Ends a rank in the place of MPI_Abort."""


@pytest.mark.parametrize(("rank", "error", "found"), [
    (0, watchdog.NoAnswerError([1, 2]), "silent-ranks|no answer from ranks 1,2"),
    (1, watchdog.NoAnswerError([0]), None),
    (0, KeyError("word"), "check-failed|KeyError")])
def test_a_doctor_that_gets_no_answers_ends_all(monkeypatch, capsys, rank, error, found):
    """Rank 0 at once, and others when it has not done so."""
    slept, comm = [], fake_comm(rank, 3)

    def run(_):
        raise error

    def abort(ended, status):
        assert (ended, status) == (comm, 1)
        raise Ended

    monkeypatch.setitem(sys.modules, "mpi4py.MPI", SimpleNamespace())
    monkeypatch.setattr(mpi4py, "MPI", sys.modules["mpi4py.MPI"], raising=False)
    monkeypatch.setattr(all_ranks._Examination, "run", run)
    monkeypatch.setattr(all_ranks.launch, "abort", abort)
    monkeypatch.setattr(all_ranks, "sleep", slept.append)
    report = Report(Context(DoctorConfig(json=True), {}, comm=comm))
    with pytest.raises(Ended):
        all_ranks.examine(report, None)
    assert len(slept) == rank
    assert bool(capsys.readouterr().out) == (rank == 0)
    name, _, words = (found or "").partition("|")
    assert [one.name for one in report.findings] == [name][: found is not None]
    assert words in f"{report.findings}"


@pytest.mark.parametrize(("broken", "cache"), [(False, True), (False, False), (True, True)])
def test_files_that_other_nodes_look_for_are_removed(tmp_path, monkeypatch, broken, cache):
    """Also when looking for them breaks; there is none without a folder. On two nodes: tests/slurm/test_newcomer.py."""
    folders, seen = {"folder": tmp_path / "runs", "kernels": tmp_path / "cache"}, []
    for folder in list(folders.values())[: 1 if broken else 2]:
        folder.mkdir()

    def look(now):
        assert [Path(token).parent for token in now.tokens.values()] == [path for path in folders.values() if path.exists()]
        seen.append(shared.collect(now))
        return fail() if broken else seen[0]

    looking = [check(lambda _, path=path: {"path": str(path)}, name) for name, path in folders.items()]
    monkeypatch.setattr(doctor_checks, "CHECKS", looking)
    monkeypatch.setattr(doctor_checks, "FOLDERS", check(look))
    comm = fake_comm(0, 2, improbe=lambda tag: SimpleNamespace(recv=lambda: (1, of(folder=True, kernels=cache))))
    both = context(comm=comm, placements=[Placement(0, "n0"), Placement(1, "n1")])
    all_ranks._Examination(Report(both), QUIET).check_each_rank(5.0)
    assert seen[0].items() >= of(folder=True, folder_path=str(folders["folder"])).items()
    assert both.shared_cache == (cache and not broken)
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []


def test_a_check_has_its_whole_time_until_one_hangs(monkeypatch):
    """On a busy machine all are slow, and none is to blame for the others; what is dead may stop all that follow."""
    given = []

    def facts(self, _, seconds):
        given.append(seconds)
        return {"it": {FAILED: "no end after 60 s"}, "other": {FAILED: "ValueError: of its own"}}.get(self.name, {"a": 1})

    monkeypatch.setattr(registry.Check, "facts", facts)
    monkeypatch.setattr(doctor_checks, "CHECKS", [check(None, name) for name in ("first", "other", "it", "next", "last")])
    all_ranks._Examination(Report(context()), QUIET).check_each_rank(60.0)
    assert given == [60.0] * 3 + [all_ranks._LESS_PATIENCE] * 2


@pytest.mark.parametrize(("load", "said"), [(2.0, ""), (97.0, ", at a load of 97 on 2 cores")])
def test_what_has_no_end_says_how_busy_the_machine_is(monkeypatch, load, said):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    released = threading.Event()
    found = watchdog.run_with_timeout(lambda: released.wait(60) and {}, 0.05)
    released.set()
    assert found == {FAILED: f"no end after 0 s{said}"}


def test_a_check_that_hangs_leaves_nothing_behind(tmp_path, monkeypatch):
    here, released = context(os.environ, tmp_path / "runs"), threading.Event()
    monkeypatch.setattr(files, "_tried", lambda file: file.write_bytes(b"x") and released.wait(60) and {})
    hanging = Check("folder", "Files", files)
    assert hanging.facts(here, 0.2)[FAILED].startswith("no end")
    assert list(tmp_path.iterdir()) != []
    registry.remove_trials()
    assert list(tmp_path.iterdir()) == []
    released.set()


# ---- the program without a launcher

LAUNCHED = ("OMPI_", "PMI", "PRTE", "SLURM_", "HYDI_", "MPI_LOCAL")
LARGE = {"torch", "mpi4py", "mpi4py.MPI", "numba", "numpy", "h5py"}


def doctor(*arguments, code="", **environment):
    """Run the doctor without a launcher, after some code."""
    program = f"import sys\n{code}\nfrom mpi_ef.jobs.doctor.program import main\n"
    program += f"assert not {LARGE} & {{name for name, module in sys.modules.items() if module}}\nmain(sys.argv[1:])"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHED) or "OMPI_MCA" in name}
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True,
                          timeout=patience.limit(120), check=False, cwd=ROOT, env=kept | environment)
    assert "Traceback" not in done.stdout + done.stderr
    return done


@pytest.mark.parametrize(("out", "code", "environment", "expected", "status"), [
    pytest.param(".", "sys.modules['mpi4py'] = None", {}, {"mpi4py-missing": ["mpi4py"]}, 1, marks=pytest.mark.slow),
    pytest.param(".", "", of(MPI4PY_LIBMPI="/nowhere/libmpi.so"), {"mpi-missing": ["mpi4py"]}, 0, marks=pytest.mark.slow),
    ("/proc/self/runs", "for name in ('torch', 'h5py', 'numba'): sys.modules[name] = None", {},
     {"check-import": ["GPU", "workers", "kernels", "folder"]}, 1)])
def test_without_a_package_everything_else_is_looked_at(tmp_path, out, code, environment, expected, status):
    done = doctor("--json", "--out", tmp_path / out, code=code, **environment)
    findings = json.loads(done.stdout)["findings"]
    assert done.returncode == status, done.stdout
    for name, words in expected.items():
        assert [re.split("[: ]", one["what"])[0] for one in findings if one["name"] == name] == words
    names = {one["name"] for one in findings}
    assert {"no-launcher", "binding", "tmp", "shm", "versions"} <= names
    assert "check-import" in names or {"gpu", "loader", "cache", "folder", "hdf5"} <= names


@pytest.mark.slow
def test_one_process_without_a_launcher(tmp_path):
    done = doctor("--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "one process, started without a launcher" in done.stdout
    assert any(line.startswith("verdict:") for line in done.stdout.splitlines()[-2:])  # it may be two lines
    assert all(len(line) <= 100 for line in done.stdout.splitlines())
    assert list(tmp_path.iterdir()) == []


def test_wrong_options_are_one_line():
    done = doctor("--patience", "0")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "patience=0.0 is not positive" in done.stderr


def test_one_process_says_that_it_has_no_advice(monkeypatch, capsys):
    monkeypatch.setattr(doctor_checks, "CHECKS", [])
    assert all_ranks.examine_alone(Report(Context(DoctorConfig(advise=1000), {}))) == 0
    assert "--advise: one rank exchanges nothing; start as many as" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="take one of --advise and --json"):
        DoctorConfig(advise=1000, json=True)


def test_the_warm_up_of_one_process(monkeypatch, capsys):
    monkeypatch.setattr(doctor_checks, "CHECKS", [])
    monkeypatch.setattr(warm_up, "collect", lambda now: {} if now.turn else of(first=True, seconds=2.0, compiled=3))
    assert all_ranks.examine_alone(Report(Context(DoctorConfig(warmup=True, json=True), {}))) == 0
    [found] = json.loads(capsys.readouterr().out)["findings"]
    assert (found["name"], found["level"]) == ("warm-up", "ok")
    assert "3 compiled" in found["what"]
