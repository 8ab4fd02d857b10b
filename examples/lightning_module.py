"""Lightning over MPI: ``mpiexec -n 2 python -m mpi4py examples/lightning_module.py OUT``."""

import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from mpi4py.MPI import COMM_WORLD as comm
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from mpi_ef import DistributedOptimizer, TopK, seed_rank
from mpi_ef.integrations import MpiStrategy

BATCH = 64  # of all ranks together


def samples(count, seed):
    numbers = torch.randn(count, 10, generator=torch.Generator().manual_seed(seed))
    x, noise = numbers.split((8, 2), 1)  # the best loss that there is, is the variance of the noise, 0.25
    return TensorDataset(x, torch.stack([x[:, 0] + x[:, 1], x[:, 2].sin()], 1) + 0.5 * noise)


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 64), torch.nn.BatchNorm1d(64), torch.nn.Tanh(), torch.nn.Linear(64, 2))

    def training_step(self, batch, _):
        return F.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("val_loss", F.mse_loss(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        adamw = torch.optim.AdamW(self.parameters(), lr=1e-2, betas=(0.5, 0.999))
        optimizer = DistributedOptimizer(adamw, comm, TopK(0.1), model=self)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.3)]


def build(out):
    torch.manual_seed(0)
    model = Model()
    seed_rank(comm, 0)
    return model, Trainer(
        strategy=MpiStrategy(comm), accelerator="cpu", devices=1, max_epochs=6, gradient_clip_val=1.0,
        accumulate_grad_batches=2, default_root_dir=out, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[EarlyStopping("val_loss", patience=3),
                   ModelCheckpoint(out, "{epoch}", monitor="val_loss", save_top_k=-1)])


def main(out, resume=None):
    model, trainer = build(out)
    train = DataLoader(samples(2048, 1), BATCH // 2 // comm.size, shuffle=True)
    trainer.fit(model, train, DataLoader(samples(512, 2), 256), ckpt_path=resume)
    if trainer.is_global_zero:
        print(f"final loss {trainer.callback_metrics['val_loss']:.4f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
