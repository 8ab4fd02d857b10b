"""A model and data of one's own in mpi-ef train: saved, resumed, evaluated and recorded as those that come with it.

mpiexec -n 2 mpi-ef train --model "my_model:build(width=16)" --optimizer sgd --lr 0.05     # with examples/ on PYTHONPATH
"""

import torch
from torch import nn

from mpi_ef.jobs.train.datasets import Tensors


def build(config, *, width=32, samples=1000):
    """Return a model, data that are the same on all ranks, and a loss: here for a curve with noise.

    config: the options of the run, for example config.seed. Others are those of the specification.
    """
    generator = torch.Generator().manual_seed(config.seed)
    x = torch.rand(samples, 1, generator=generator) * 6 - 3
    y = torch.sin(2 * x) + 0.1 * torch.randn(samples, 1, generator=generator)
    cut = samples * 4 // 5  # the last fifth is held out
    model = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(-1, 1, generator=generator)
    return model, Tensors((x[:cut], y[:cut]), (x[cut:], y[cut:])), nn.functional.mse_loss


if __name__ == "__main__":
    from mpi_ef.jobs.train.program import main

    main(["--model", "my_model:build", "--optimizer", "sgd", "--lr", "0.05", "--steps", "60", "--overwrite"])
