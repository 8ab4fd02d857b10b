"""A training in which rank 1 loads its data late, in all steps but every fourth: what rank 0 prints is JSON.

``python slow_rank_program.py plain|overlap SECONDS``: how late.
"""

import json
import sys
import time

import torch
from mpi4py.MPI import COMM_WORLD as comm

from mpi_ef.compress import TopK
from mpi_ef.optim import DistributedOptimizer

SECONDS = float(sys.argv[2])

net = torch.nn.Linear(4, 2)
optimizer = DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), comm, TopK(0.5),
                                 **({"placement": "gradient", "overlap": True} if "overlap" in sys.argv else {}))
for step in range(13):
    if comm.rank == 1 and step % 4:
        time.sleep(SECONDS)
    optimizer.zero_grad()
    net(torch.ones(1, 4) + comm.rank).sum().backward()
    optimizer.step()

lateness = optimizer.lateness()
assert lateness.rows.tobytes() == comm.bcast(lateness.rows.tobytes())
if comm.rank == 0:
    print(json.dumps({"last": lateness.holding().sum(axis=0).tolist(), "in_time": lateness.in_time.tolist(),
                      "missing": lateness.missing.tolist(), "slow": lateness.slow(), "lines": lateness.lines(4.0),
                      "median": lateness.quantiles()[0].tolist()}))
