"""Runs that are interrupted in every way a cluster has end with the parameters of one that was left alone."""

import os
import signal

import pytest
from cluster import BESIDE, STEPS, TINY, Place, assert_same, losses, summary

from mpi_ef import slurm
from mpi_ef.runtime.ulfm import OPTIONS

SAVING = [*TINY, "--checkpoint-every", 5]
ONE_NODE = ("--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")


@pytest.fixture(scope="module")
def whole(cluster):
    return cluster.whole(2, *SAVING)


@pytest.fixture(scope="module", autouse=True)
def limited(cluster):
    """A job that reaches its time limit while the other tests go on: Slurm looks at limits every 30 s only.

    It asks for its signal 100 s before its three minutes are over, and gets it 50 to 80 s after its start; 120 s after its
    start mpi-ef would stop by itself.
    """
    place = Place(cluster, cluster.folder / "time-limit")
    place.slow(2.0)
    options = (*ONE_NODE, "--nodelist=n1", "--time=3", "--signal=B:USR2@100")
    yield place.submit("train", *TINY, options=options)
    place.clear()


# It trains for no time at all: its first step ends when the signal comes.
HASTY = """#!/bin/bash
if [ "$1" = supervise ]; then exec mpi-ef "$@"; fi
[ "$1" = train ] || exit 0
while [ $# -gt 1 ]; do [ "$1" = --out ] && out=$2; shift; done
trap told=yes USR2
for ((i = 0; i < 2000; i++)); do [ -n "$told" ] && break; sleep 0.1; done
step=$out/checkpoints/step-$((1 + ${SLURM_RESTART_COUNT:-0}))
mkdir -p "$step"; touch "$step/COMMIT"
now=$(date +%s.000)
echo "SIGUSR2 on rank 0
steps from $now to $now" >"$out/requeue"
"""


@pytest.fixture(scope="module", autouse=True)
def hasty(cluster):
    """A job that asks for its signal when it begins; it is not in the way of others, and takes minutes."""
    place = Place(cluster, cluster.folder / "hasty")
    program = place.folder / "program"
    program.write_text(HASTY)
    program.chmod(0o755)
    options = ("--nodes=1", "--ntasks-per-node=1", "--nodelist=n1", "--time=2", "--signal=B:USR2@120")
    yield place.submit("train", options=options, MPI_EF=program, MPI_TYPE="none")
    place.clear()


def interrupted(place, template, options):
    """Submit a run that stays slow until it has been restarted, and wait until it can be interrupted."""
    place.slow()
    job = place.submit(template, *TINY, options=options)
    job.running_with_checkpoint()
    return job


def recovers(job, whole, reason=""):
    """Let an interrupted run go on to its end, and compare it with the undisturbed one."""
    job.restarted()
    job.completes()
    assert int(job.record()["Restarts"]) == 1, job
    job.says("parameters on 2 ranks", 2)  # the log of the first launch is still there
    job.says("no checkpoint yet")
    job.says("resumed after step")
    job.says(reason)
    assert not (job.run / "requeue").exists()
    assert_same(job.run, whole)


def test_usr2_to_the_batch_script(place, whole):
    job = interrupted(place, "train", ONE_NODE)
    job.signal("USR2")
    recovers(job, whole, "SIGUSR2 on rank")


def preempted(job, place):
    """Let a job of higher priority come and go that needs one of the nodes."""
    rival = place.job(place.run("sbatch", "--parsable", "--partition=high", "--nodelist=n2", "--exclusive",
                                "--output=rival", "--wrap=sleep 1").strip())
    rival.completes()


@pytest.mark.parametrize("partition", ["low", "gentle"])
def test_a_job_of_higher_priority(place, whole, partition):
    """With the seconds of KillWait, and with a GraceTime, in which Slurm tells the ranks only."""
    job = interrupted(place, "preemptible", (*TWO_NODES, f"--partition={partition}", "--nodelist=n2,n3"))
    preempted(job, place)
    recovers(job, whole, "stopped after step")


def test_a_job_of_higher_priority_before_the_first_save(place, whole):
    place.slow(2.0)
    job = place.submit("preemptible", *TINY, options=(*TWO_NODES, "--partition=gentle", "--nodelist=n2,n3"))
    job.until(lambda _: len(place.notes()) == 2, "start of the ranks")
    preempted(job, place)
    job.completes()
    assert int(job.record()["Restarts"]) == 1, job
    assert_same(job.run, whole)


def test_requeue_by_hand(place, whole):
    job = interrupted(place, "train", ONE_NODE)
    place.run("scontrol", "requeue", job.number)
    recovers(job, whole, "stopped after step")


def test_a_rank_is_killed(place, whole):
    job = interrupted(place, "train-nodes", TWO_NODES)
    job.running_with_checkpoint(2)
    victim = place.notes(SLURM_PROCID="1")[0]
    os.kill(victim["pid"], signal.SIGKILL)
    recovers(job, whole)


@pytest.mark.parametrize("which", [0, 1], ids=["with the batch script", "without it"])
def test_a_node_dies(cluster, place, whole, which):
    job = interrupted(place, "train-nodes", (*TWO_NODES, "--exclude=n1"))
    dead = job.nodes[which]
    try:
        cluster.crash(dead)
        recovers(job, whole)
        now = {note["host"] for note in place.notes(SLURM_RESTART_COUNT="1")}
        assert now == {"n2", "n3", "n4"} - {dead}
    finally:
        cluster.revive(dead)


def test_ranks_that_outlive_another(cluster, place):
    """Started by mpirun, with what ULFM needs: the job goes on without a new start; and it can still be told to stop."""
    if not (BESIDE / "prterun").exists():
        pytest.skip("only Open MPI lets ranks outlive others")
    place.slow()
    variables = {"LAUNCH": f"mpirun {OPTIONS}", "RUN_DIR": "runs/shrinking"}
    arguments = [*TINY, "--on-failure", "shrink", "--resume", "redistribute", "--keep", 20]
    job = place.submit(
        "train-nodes", *arguments, options=("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1"), **variables
    )
    run = place.folder / "runs" / "shrinking"
    job.until(lambda _: (run / "checkpoints" / "step-00000010").exists(), "two checkpoints")
    (victim,) = place.notes(OMPI_COMM_WORLD_RANK="2")
    os.kill(victim["pid"], signal.SIGKILL)
    job.until(lambda _: "rank 2 died; 3 of 4 go on" in job.log, "a shrunk world")
    job.until(lambda _: "resumed after step" in job.log, "going on")
    job.signal("USR2")
    job.restarted()
    job.completes()
    job.says("SIGUSR2 on rank")
    job.says("resumed after step", 2)
    job.says("parameters on 4 ranks", 2)  # the new start has all of them again
    assert int(job.record()["Restarts"]) == 1, job
    assert summary(run)["steps"] == STEPS
    assert summary(run)["replicas_equal"]
    assert [row[0] for row in losses(run)] == list(range(5, STEPS + 1, 5))


def test_the_time_limit(limited, whole):
    recovers(limited, whole, "SIGUSR2 on rank")


def test_a_time_limit_below_the_lead_of_the_signal(hasty):
    """Three starts; there were twenty-one. Its script asks for 300 s, which sbatch was told otherwise."""
    assert hasty.end(within=400) == "FAILED", hasty
    assert int(hasty.record()["Restarts"]) == 2, hasty
    hasty.says("and --signal=B:USR2@300 of its script comes 300 s before that: 0 s are left for start and training", 3)
    hasty.says("s, which trained for 0 s after ", 2)
    hasty.says("not started again: stopped 3 times in a row", 1)


# A program that stands for mpi-ef train where only the supervisor is of interest: each launch makes CHECKPOINTS checkpoints
# more, asks for a requeue when ASKS is set, and leaves with STATUS.
STAND_IN = """#!/bin/bash
if [ "$1" = supervise ]; then exec mpi-ef "$@"; fi
while [ $# -gt 1 ]; do [ "$1" = --out ] && out=$2; shift; done
if [ "${SLURM_PROCID:-0}" = 0 ]; then
    mkdir -p "$out/checkpoints"
    for ((i = 0; i < CHECKPOINTS; i++)); do
        printf -v step "$out/checkpoints/step-%08d" $((10 + $(ls "$out/checkpoints" | wc -l)))
        mkdir "$step"; touch "$step/COMMIT"
    done
    [ -n "$ASKS" ] && echo "asked to" >"$out/requeue"
    echo "launch ${SLURM_RESTART_COUNT:-0}"
fi
exit "$STATUS"
"""


def test_requeues_end(place):
    """A job that gets nowhere, fails before it has saved, has not trained at all, cannot work, never ends."""
    stand_in = place.folder / "stand-in"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)

    def submit(**variables):
        return place.submit("train", options=("--nodes=1", "--ntasks-per-node=1"), MPI_EF=stand_in, MPI_TYPE="none",
                            **variables)

    stuck = submit(CHECKPOINTS=0, ASKS=1, STATUS=0)
    broken = submit(CHECKPOINTS=0, ASKS="", STATUS=3)
    silent = submit(CHECKPOINTS=0, ASKS="", STATUS=0)
    wrong = submit(CHECKPOINTS=1, ASKS="", STATUS=2)
    endless = submit(CHECKPOINTS=1, ASKS=1, STATUS=0, MAX_RESTARTS=2)
    crashing = submit(CHECKPOINTS=1, ASKS="", STATUS=3, MAX_RESTARTS=1)
    for job, restarts, status, words in (
        (stuck, 0, None, "no progress"), (broken, 0, 3, "no progress"), (silent, 0, None, "no progress"), (wrong, 0, 2, ""),
        (endless, 2, None, "MAX_RESTARTS"), (crashing, 1, 3, "MAX_RESTARTS"),
    ):
        assert job.end() == "FAILED", job
        record = job.record()
        code = int(record["ExitCode"].partition(":")[0])
        assert code if status is None else code == status, job
        assert int(record["Restarts"]) == restarts, job
        assert words in job.log, job
        assert [line for line in job.log.splitlines() if line.startswith("launch")] == [
            f"launch {n}" for n in range(restarts + 1)
        ], job


# Its first launch goes on until it gets a signal, the second one finishes.
PATIENT = """#!/bin/bash
if [ "$1" = supervise ]; then exec mpi-ef "$@"; fi
[ "$1" = train ] || exit 0
if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then exec sleep 200; fi
while [ $# -gt 1 ]; do [ "$1" = --out ] && out=$2; shift; done
touch "$out/summary.json"
"""


def test_a_signal_in_the_first_moment(place):
    """While the script runs, while Python starts, or just after: the job does not end, and it does not go on for ever."""
    program, script = place.folder / "patient", place.folder / "script.sbatch"
    program.write_text(PATIENT)
    program.chmod(0o755)
    begun = place.folder / "begun"
    profile = slurm.Profile("mine", "my site", lines=(f"touch {begun}", "sleep 3 # modules are loaded"))
    script.write_text(slurm.render(slurm.read_template("train"), profile))
    job = place.submit(script, options=("--nodes=1", "--ntasks-per-node=1"), MPI_EF=program, MPI_TYPE="none")
    job.until(lambda _: begun.exists(), "start of the script")
    job.signal("USR2")
    job.restarted()
    job.completes()
    assert int(job.record()["Restarts"]) == 1, job


def test_a_finished_run_is_not_trained_again(place, whole):
    """The last save and the end of the job may fall together: a requeue then finds nothing left to do."""
    folder = place.folder / "finished"
    for _ in range(2):
        job = place.submit("train", *TINY, options=ONE_NODE, RUN_DIR=folder)
        job.completes()
        assert_same(folder, whole)
    job.says("nothing is left to do")
