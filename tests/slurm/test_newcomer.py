"""What somebody does who has never been here, and what happens when the site's MPI is not as expected."""

import pytest
from cluster import STEPS, TINY, assert_same


@pytest.fixture
def newcomer(cluster, place):
    """With mpi-ef on PATH, and no variable set that a template knows."""
    place.variables["PATH"] = f"{cluster.program.parent}:{cluster.environment['PATH']}"
    for name in ("MPI_EF", "CHECKPOINT_EVERY"):
        del place.variables[name]
    return place


def test_from_a_template_to_a_report(cluster, newcomer):
    newcomer.run("mpi-ef", "slurm", "copy", "train")
    script = newcomer.folder / "train.sbatch"
    text = script.read_text()
    assert text.count("##SBATCH --account=project\n") == 1
    script.write_text(text.replace("##SBATCH --account=project\n", "#SBATCH --account=physics\n"))
    newcomer.slow()
    job = newcomer.job(newcomer.run("sbatch", "--parsable", "train.sbatch", *TINY).strip())
    assert job.record()["Account"] == "physics"
    job.until(lambda _: f"step 30/{STEPS}" in job.log, "progress in the log")
    shown = newcomer.run("squeue", "--noheader", "--format=%i %j %T")
    assert f"{job.number} mpi-ef-train RUNNING" in shown
    newcomer.fast()
    job.completes()
    assert_same(job.run, cluster.whole(2, *TINY, "--checkpoint-every", 5))
    report = newcomer.run("mpi-ef", "report", job.run.relative_to(newcomer.folder))
    assert job.run.name in report
    assert "val. loss" in report


def test_the_wrong_mpi_type_is_named(newcomer):
    """Every task is then a world of its own: training so would only look well."""
    job = newcomer.submit("train", *TINY, MPI_TYPE="none", options=("--nodes=1", "--ntasks-per-node=2"))
    assert job.end() == "FAILED", job
    assert job.record()["ExitCode"] == "2:0"
    assert job.record()["Restarts"] == "0"
    job.says("SLURM_STEP_NUM_TASKS=2, but the MPI world has 1 rank")
    job.says("--mpi=pmix")


def test_the_doctor_in_a_job(newcomer):
    options = ("--nodes=2", "--ntasks-per-node=1", "--output=doctor-%j.log")
    script = newcomer.folder / "doctor.sh"
    script.write_text('#!/bin/bash\nsrun --mpi="${MPI_TYPE:-$(mpi-ef slurm mpi-type)}" mpi-ef doctor\n')
    well = newcomer.submit(script, options=options)
    ill = newcomer.submit(script, options=options, MPI_TYPE="none")
    well.completes()
    well.says("2 ranks on 2 nodes")
    assert ill.end() == "FAILED", ill
    ill.says("lonely-ranks")
    ill.says("--mpi=pmix")
