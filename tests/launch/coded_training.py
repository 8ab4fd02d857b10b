"""``mpi-ef train --code`` with workers that are stopped for good: ``python coded_training.py STOPPED ARGUMENTS...``.

STOPPED is JSON: by rank, from which step on it stops itself, in the first step that it is given.
"""

import json
import os
import signal
import sys
from unittest import mock

from mpi_ef.jobs.train import program
from mpi_ef.jobs.train.coded import CodedTrainer

stopped = {int(rank): step for rank, step in json.loads(sys.argv[1]).items()}
took = CodedTrainer.step


def step(self, number):
    if number >= stopped.get(self.comm.Get_rank(), 1 << 62):
        os.kill(os.getpid(), signal.SIGSTOP)
    took(self, number)


with mock.patch.object(CodedTrainer, "step", step):
    program.main(sys.argv[2:])
