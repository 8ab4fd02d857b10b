"""An optimizer of one's own: steps of length lr along a momentum of EF21's estimates. Saves and resumes as those built in.

mpiexec -n 2 python -m mpi4py examples/my_optimizer.py
mpiexec -n 2 mpi-ef train --optimizer "my_optimizer:Normalized(beta=0.8)"      # with examples/ on PYTHONPATH
"""

from dataclasses import InitVar

import numpy as np

from mpi_ef.compress import Compressor, TopK
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.optim import ReplicatedOptimizer
from mpi_ef.ranges import option, with_options


@with_options
class Normalized(ReplicatedOptimizer):
    """``m = beta m + (1 - beta) g``, ``x = x - lr m / ||m||`` in each group; g is EF21's estimate of the mean gradient."""

    lr: InitVar[float] = 0.05
    compressor: InitVar[Compressor] = TopK(0.1)
    beta: float = option(0.9, "[0, 1)", "try 0.9")  # ranks that disagree on it raise

    def build(self, plan):
        self.rules["ef21"] = ErrorFeedback("ef21", plan)
        self.arrays["m"] = self.zeros()  # the same on all ranks

    def update(self):
        """Exchange, and move the parameters; ranks know by now that all their gradients are finite."""
        g, m = self.rules["ef21"].step(self.flat.gradients), self.arrays["m"]
        m *= self.beta
        m += (1 - self.beta) * g
        for group, part in self.slices():
            x = self.flat.values[part]
            x *= 1 - group["lr"] * group["weight_decay"]
            x -= group["lr"] / max(float(np.linalg.norm(m[part])), 1e-12) * m[part]


if __name__ == "__main__":
    import torch
    from mpi4py.MPI import COMM_WORLD as comm

    net = torch.nn.Linear(20, 1)
    optimizer = Normalized(net.parameters(), comm)
    x = torch.from_numpy(np.random.default_rng(comm.rank).normal(size=(64, 20)).astype(np.float32))
    for _ in range(100):
        optimizer.zero_grad()
        loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
    print(comm.rank, loss.item())
