"""Every Slurm template, submitted: one world on the right nodes, and the results of mpiexec."""

import json
from collections import Counter

import pytest
from cluster import STEPS, TEMPLATES, TINY, assert_same, summary

SAVING = [*TINY, "--checkpoint-every", 5]


def on(nodes, per_node):
    return (f"--nodes={nodes}", f"--ntasks-per-node={per_node}", "--cpus-per-task=1")


def one_world(place, job, nodes, per_node, word="train"):
    """Check where the tasks of a job ran, and that the program saw all of them as one world."""
    notes = place.notes(word, SLURM_JOB_ID=job.number)
    ranks = nodes * per_node
    assert [int(note["SLURM_PROCID"]) for note in notes] == list(range(ranks))
    assert len(job.nodes) == nodes
    assert Counter(note["host"] for note in notes) == dict.fromkeys(job.nodes, per_node)
    assert {note["OMP_NUM_THREADS"] for note in notes} == {"1"}
    job.says(f"parameters on {ranks} rank", 1)
    assert summary(job.run)["ranks"] == ranks


def nothing_left(cluster, job):
    """Of the folders that the templates make on the nodes; MPI and torch have theirs beside them."""
    assert not [name for name in cluster.local_files() if f"mpi-ef-0-{job.number}" in name]


def test_train(cluster, place):
    """With a text that is copied to the node."""
    text = place.folder / "corpus.txt"
    text.write_text("".join(f"{n} bottles on the wall, and {n * n % 97} under it.\n" for n in range(1000)))
    job = place.submit("train", *TINY, options=on(1, 2), TEXT="corpus.txt")
    job.completes()
    one_world(place, job, 1, 2)
    for note in place.notes():
        read = note["words"][note["words"].index("--text") + 1]
        assert read.startswith(str(cluster.disk))
        assert note["NUMBA_CACHE_DIR"].startswith(str(cluster.disk))
    assert_same(job.run, cluster.whole(2, *SAVING, "--text", text))
    nothing_left(cluster, job)


def test_train_nodes(cluster, place):
    """By mpi-ef slurm submit."""
    sets = [word for option in on(4, 1) for word in ("--set", option.removeprefix("--"))]
    said = place.run(cluster.program, "slurm", "submit", "train-nodes", *sets, "--", *TINY)
    job = place.job(said.split()[-1])
    job.completes()
    one_world(place, job, 4, 1)
    assert_same(job.run, cluster.whole(4, *SAVING))
    nothing_left(cluster, job)


def test_train_gpu(cluster, place):
    """GPUs that are none: the ranks of a node see all of them."""
    job = place.submit("train-gpu", *TINY, options=(*on(2, 1), "--gpus-per-node=2"), DEVICE="auto")
    job.completes()
    one_world(place, job, 2, 1)
    assert {note["CUDA_VISIBLE_DEVICES"] for note in place.notes()} == {"0,1"}
    assert_same(job.run, cluster.whole(2, *SAVING))
    nothing_left(cluster, job)


# Which of the pretended GPUs a rank takes, as torch would number those that Slurm lets it see.
GPU_PROGRAM = """
import os, sys
from types import SimpleNamespace
from mpi4py import MPI
taken = None
if "CUDA_VISIBLE_DEVICES" in os.environ:
    import mpi_ef, torch
    visible = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: len(visible)
    torch.cuda.get_device_properties = lambda index: SimpleNamespace(uuid=visible[index])
    taken = visible[mpi_ef.local_device(MPI.COMM_WORLD).index]
variables = [os.environ.get(name) for name in ("LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")]
seen = MPI.COMM_WORLD.gather((MPI.Get_processor_name(), *variables, taken))
if seen:
    print("seen", sorted(seen), sys.argv[1:], flush=True)
"""


def test_a_program_of_ones_own(place):
    (place.folder / "program.py").write_text(GPU_PROGRAM)
    job = place.submit("train-gpu", "--some", "option", options=(*on(2, 2), "--gpus-per-node=2"), PROGRAM="program.py")
    other = place.submit("train-nodes", "--other", options=on(2, 1), PROGRAM="program.py")
    job.completes()
    seen = [(node, local, "0,1", "0,1", local) for node in job.nodes for local in ("0", "1")]
    assert f"seen {seen} ['--some', 'option']" in job.log
    other.completes()
    assert f"seen {[(node, None, None, None, None) for node in other.nodes]} ['--other']" in other.log


@pytest.mark.parametrize("option", ["--gpus-per-task=1", "--gpu-bind=single:1"])
def test_every_task_sees_a_gpu_of_its_own(place, option):
    """And takes it: number 0 of those that it sees."""
    (place.folder / "program.py").write_text(GPU_PROGRAM)
    job = place.submit("train-gpu", options=(*on(1, 2), option), PROGRAM="program.py")
    job.completes()
    assert f"seen {[(*job.nodes, local, local, local, local) for local in ('0', '1')]} []" in job.log


def test_sweep(cluster, place):
    """Every task of the array has options of its own."""
    (place.folder / "list").write_text("--lr 0.006\n--lr 0.003 --ratio 0.05\n")
    job = place.submit("sweep", *TINY, options=(*on(1, 2), "--array=1-2"), CONFIGS="list")
    job.completes()
    first, second = (job.run / task for task in ("1", "2"))
    assert_same(first, cluster.whole(2, *SAVING))
    assert summary(second)["config"] == summary(first)["config"] | {
        "lr": 0.003, "ratio": 0.05, "out": str(second.relative_to(place.folder)),
    }
    assert summary(second)["parameters_crc32"] != summary(first)["parameters_crc32"]
    for task in ("1", "2"):
        notes = place.notes(SLURM_ARRAY_TASK_ID=task)
        assert len(notes) == 2
        assert len({note["host"] for note in notes}) == 1
    best = place.run(cluster.program, "report", "--best", first, second)
    table = [line.split()[0] for line in best.splitlines() if line.strip()][:3]  # who was slow may follow
    assert table == ["run", "1", "2"], best


def test_chain(cluster, place):
    """Two tasks of an array stop early; of a second one, which waits for it, one finishes and one has nothing to do."""
    options = (*on(2, 1), "--array=1-2%1")
    arguments = [*TINY, "--stop-after", 20]
    first = place.submit("chain", *arguments, options=options, RUN_DIR="runs/long")
    waiting = (*options, f"--dependency=afterany:{first.number}")
    second = place.submit("chain", *arguments, options=waiting, RUN_DIR="runs/long")
    assert first.end() == "COMPLETED FAILED", first
    first.says("the training does not")
    first.says("stopped after step 20")
    first.says("stopped after step 40")
    second.completes()
    second.says("resumed after step 40")
    second.says("the training is finished")
    assert len(place.notes()) == 3 * 2  # the last task has not trained
    run = place.folder / "runs/long"
    assert summary(run)["steps"] == STEPS
    assert_same(run, cluster.whole(2, *SAVING))


def test_preemptible(cluster, place):
    """Undisturbed; test_survival.py takes its nodes away."""
    job = place.submit("preemptible", *TINY, options=(*on(2, 1), "--partition=low"))
    job.completes()
    one_world(place, job, 2, 1)
    assert_same(job.run, cluster.whole(2, *SAVING))
    nothing_left(cluster, job)


APPTAINER = """#!/bin/bash
# apptainer exec --bind A,B IMAGE COMMAND...: runs the command, outside of any container.
echo "$*" >>apptainer-calls
[ "$1" = exec ] && shift || exit 9
if [ "$1" = --bind ]; then
    for folder in ${2//,/ }; do [ -d "$folder" ] || { echo "no folder $folder" >&2; exit 9; }; done
    shift 2
fi
[ -f "$1" ] && shift || exit 9
exec "$@"
"""


def test_container(cluster, place):
    """Apptainer is not here: a script stands for it, which runs the command outside of any container."""
    tool = place.folder / "bin" / "apptainer"
    tool.parent.mkdir()
    tool.write_text(APPTAINER)
    tool.chmod(0o755)
    (place.folder / "image.sif").touch()
    path = f"{tool.parent}:{cluster.environment['PATH']}"
    job = place.submit("container", *TINY, options=on(2, 1), IMAGE="image.sif", PATH=path)
    job.completes()
    one_world(place, job, 2, 1)
    assert_same(job.run, cluster.whole(2, *SAVING))
    calls = (place.folder / "apptainer-calls").read_text().splitlines()
    assert len([call for call in calls if " train " in call]) == 2
    nothing_left(cluster, job)


def test_bench(cluster, place):
    job = place.submit("bench", "--d", 1000, "--repeats", 1, "--only", "topk", options=on(2, 1))
    job.completes()
    for nodes in (1, 2):
        result = json.loads((job.run / f"nodes-{nodes}.json").read_text())
        assert result["ranks"] == nodes
    steps = Counter(note["SLURM_STEP_ID"] for note in place.notes("bench"))
    assert sorted(steps.values()) == [1, 2]
    assert {note["host"] for note in place.notes("bench")} == set(job.nodes)
    nothing_left(cluster, job)


def test_tests(cluster, place):
    variables = {"SOURCE": TEMPLATES.parent, "RANKS": "1 3"}
    job = place.submit("tests", "-k", "counts_beyond or different_models", options=on(2, 2), **variables)
    job.completes()
    job.says("1 ranks on 1 nodes")
    job.says("3 ranks on 2 nodes")
    job.says(" passed", 3)  # two summaries of pytest, and "all passed"
    nothing_left(cluster, job)


def test_every_template_is_here():
    tested = {name.removeprefix("test_").replace("_", "-") for name in globals() if name.startswith("test_")}
    missing = {path.stem for path in TEMPLATES.glob("*.sbatch")} - tested
    assert not missing
