"""`mpi_ef.MoNNA` from rank to rank on the digits, where one lies and one is stopped: ``python monna_training.py OPTIONS``.

OPTIONS is JSON: steps, f, and, where there are any: liar, a rank; stopped, a rank, with the rounds from which on it stops,
and from which on rank 0 lets it go on. Every rank prints one line of JSON.
"""

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from time import sleep

import torch
from mpi4py.MPI import COMM_WORLD as comm
from sklearn.datasets import load_digits

from mpi_ef import MoNNA

options = {"steps": 200, "f": 2, "liar": None, "stopped": None, "patience": 240.0} | json.loads(sys.argv[1])
victim, stop_at, go_at = options["stopped"] or (None, 0, 0)
process = comm.allgather(os.getpid())[0 if victim is None else victim]
warnings.simplefilter("ignore")
torch.set_num_threads(1)

pixels, labels = load_digits(return_X_y=True)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
x, y = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
cut = len(labels) * 4 // 5
mine = torch.arange(cut)[comm.rank :: comm.size]
draw = torch.Generator().manual_seed(comm.rank + 1)

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
optimizer = MoNNA(model.parameters(), comm, lr=0.5, f=options["f"], beta=0.9, wait_for=comm.size - options["f"],
                  patience_seconds=options["patience"])


def let_it_go_on():
    """Tell whether the stopped rank was stopped, and goes on now."""
    if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        return False
    os.kill(process, signal.SIGCONT)
    return True


stopped, freed, taken = False, victim is None or comm.rank != 0, 0
while optimizer.peers.round < options["steps"]:
    if comm.rank == victim and not stopped and optimizer.peers.round >= stop_at:
        stopped = True
        os.kill(os.getpid(), signal.SIGSTOP)
    if not freed and optimizer.peers.round >= go_at:
        freed = let_it_go_on()
    batch = mine[torch.randint(len(mine), (25,), generator=draw)]
    if comm.rank == options["liar"]:
        with torch.no_grad():
            for p in model.parameters():
                p.neg_()
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
    optimizer.step()
    taken += 1
if comm.rank == victim and not stopped:  # it was so far behind that it has jumped to the end
    os.kill(os.getpid(), signal.SIGSTOP)
while not freed:
    optimizer.peers.progress()
    sleep(0.01)
    freed = let_it_go_on()
left = optimizer.close()
with torch.no_grad():
    accuracy = (model(x[cut:]).argmax(1) == y[cut:]).float().mean().item()
told = {"rank": comm.rank, "accuracy": accuracy, "steps": taken, "jumps": optimizer.jumps, "left": len(left),
        "suspect": int(optimizer.suspicion.argmax()), "suspicion": float(optimizer.suspicion.max())}
print(json.dumps(told), flush=True)
