"""Steps until somebody stops it; every rank writes which process it is, and after which step it left the loop."""

import os
import sys
import time
from pathlib import Path

from mpi4py.MPI import COMM_WORLD as comm

from mpi_ef import Stopper

folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
deadline = time.time() + seconds if seconds else None
with Stopper(comm, deadline=deadline, margin_seconds=0.5) as stopper:
    (folder / f"pid-{comm.rank}").write_text(str(os.getpid()))
    step = 0
    while not stopper.should_stop():
        time.sleep(0.002 * (1 + comm.rank))
        step += 1
    stopper.mark_requeue(folder / "requeue")
(folder / f"left-{comm.rank}").write_text(f"{step} {stopper.reason}")
