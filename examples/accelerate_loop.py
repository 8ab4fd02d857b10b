"""A loop with `accelerate` over MPI: ``mpiexec -n 2 python -m mpi4py examples/accelerate_loop.py``."""

import torch
from accelerate import Accelerator
from mpi4py.MPI import COMM_WORLD as comm
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from mpi_ef import DistributedOptimizer, TopK, mean_metrics, print_metrics, seed_rank, shard, synchronize_buffers
from mpi_ef.integrations import one_process, prepare_accelerator

BATCH, EPOCHS = 64, 6  # a batch is of all ranks together


def samples(count, seed):
    numbers = torch.randn(count, 10, generator=torch.Generator().manual_seed(seed))
    x, noise = numbers.split((8, 2), 1)  # the best loss that there is, is the variance of the noise, 0.25
    return TensorDataset(x, torch.stack([x[:, 0] + x[:, 1], x[:, 2].sin()], 1) + 0.5 * noise)


def main():
    one_process(comm)  # before there is an Accelerator
    accelerator = Accelerator(gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.BatchNorm1d(64), torch.nn.Tanh(), torch.nn.Linear(64, 2))
    seed_rank(comm, 0)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.5, 0.999))
    optimizer = DistributedOptimizer(adamw, comm, TopK(0.1), model=model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 150, 0.3)
    loader = DataLoader(shard(samples(2048, 1), comm), batch_size=BATCH // 2 // comm.size, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    prepare_accelerator(accelerator, comm, model=model, optimizer=optimizer)
    held_out = shard(samples(512, 2), comm)[:]
    for epoch in range(EPOCHS):
        model.train()
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = F.mse_loss(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        synchronize_buffers(model, comm)
        model.eval()
        with torch.no_grad():
            loss = F.mse_loss(model(held_out[0]), held_out[1])
        means = print_metrics(f"epoch {epoch}", comm, loss=loss)
        if means["loss"] < 1e-3:  # the same on all ranks
            break
    means = mean_metrics({"loss": loss}, comm)
    accelerator.print(f"final loss {means['loss']:.4f}")


if __name__ == "__main__":
    main()
