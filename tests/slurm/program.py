"""``mpi-ef`` as the jobs of these tests start it: tasks note down where they run, and a file makes steps slow.

MPI_EF_TEST_NOTES names the file for the notes. While the file that MPI_EF_TEST_BRAKE names is there, every step takes as
many seconds more as it says, until Slurm has restarted the job: a test has time to interrupt the run, on machines of any
speed, and the results stay.
Compiled kernels come from where other tests have left them: each job would spend ten seconds on its own.
"""

import json
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

NAMES = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "SLURM_STEP_NUM_TASKS",
         "SLURM_RESTART_COUNT", "SLURM_ARRAY_TASK_ID", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS",
         "NUMBA_CACHE_DIR")
TASK = {"SLURM_STEP_ID", "OMPI_COMM_WORLD_RANK"}  # of srun, of mpirun


def note(path):
    """Append a line; one write of few bytes, so that lines of several tasks stay whole."""
    line = {name: os.environ[name] for name in NAMES if name in os.environ}
    line |= {"host": socket.gethostname(), "pid": os.getpid(), "words": sys.argv[1:]}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def with_brake(path):
    """Let the trainer's steps look at the file. MPI is imported before torch, as ever."""
    from mpi_ef.runtime import launch

    run = launch.run

    def slowly(program):
        def braked(comm):
            from mpi_ef.jobs.train.loop import Trainer

            step = Trainer.step

            def slow(self, **options):
                with suppress(OSError):
                    time.sleep(float(path.read_text()))
                step(self, **options)

            Trainer.step = slow
            program(comm)

        run(braked)

    launch.run = slowly


if __name__ == "__main__":
    if not TASK.isdisjoint(os.environ) and "MPI_EF_TEST_NOTES" in os.environ:
        note(Path(os.environ["MPI_EF_TEST_NOTES"]))
    os.environ.pop("NUMBA_CACHE_DIR", None)
    first = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
    if sys.argv[1:2] == ["train"] and "MPI_EF_TEST_BRAKE" in os.environ and first:
        with_brake(Path(os.environ["MPI_EF_TEST_BRAKE"]))
    from mpi_ef.jobs.cli import main

    main()
