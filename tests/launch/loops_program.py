"""Loops of other libraries in which something happens on rank 1 alone: ``loops_program.py LIBRARY CASE OUT``."""

import sys
from pathlib import Path

import torch
from mpi4py.MPI import COMM_WORLD as comm

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
STEP = 5


def transformers(case, out):
    from hf_trainer import build
    from transformers import TrainerCallback

    class OnRankOne(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if case == "raises" and comm.rank == 1 and state.global_step == STEP:
                raise RuntimeError("no more")

        def on_step_end(self, args, state, control, **_):
            if case == "stops" and comm.rank == 1 and state.global_step == STEP:
                control.should_training_stop = True

    trainer = build(out)
    trainer.callback_handler.callbacks.insert(1, OnRankOne())
    trainer.train()
    return trainer.state.global_step


def lightning(case, out):
    from lightning.pytorch.callbacks import Callback
    from lightning_module import BATCH, build, samples
    from torch.utils.data import DataLoader

    class OnRankOne(Callback):
        def on_train_batch_end(self, trainer, *_):
            if comm.rank == 1 and trainer.global_step == STEP:
                if case == "raises":
                    raise RuntimeError("no more")
                trainer.should_stop = True

    model, trainer = build(out)
    trainer.callbacks.append(OnRankOne())
    trainer.fit(model, DataLoader(samples(2048, 1), BATCH // 2 // comm.size, shuffle=True), DataLoader(samples(512, 2), 256))
    return trainer.global_step


def accelerate(case, out):
    from accelerate import Accelerator

    from mpi_ef import DistributedOptimizer, TopK, seed_rank
    from mpi_ef.integrations import one_process, prepare_accelerator

    one_process(comm)
    accelerator = Accelerator()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))
    seed_rank(comm, 0)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = DistributedOptimizer(adamw, comm, TopK(0.1), model=model)
    model, optimizer = accelerator.prepare(model, optimizer)
    prepare_accelerator(accelerator, comm, model=model, optimizer=optimizer)
    assert accelerator.gather(torch.tensor([comm.rank])).tolist() == [*range(comm.size)]
    assert accelerator.is_main_process == (comm.rank == 0)

    def train(steps):
        for step in range(steps):
            if step == STEP and comm.rank == 1:
                if case == "raises":
                    raise RuntimeError("no more")
                accelerator.set_trigger()
            if case == "stops" and accelerator.check_trigger():
                return step
            x = torch.randn(16, 8)
            accelerator.backward((model(x) - x[:, :1]).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        return steps

    if case == "resumes":
        train(10)
        accelerator.save_state(out)
        train(10)
        went_on = [p.detach().clone() for p in model.parameters()]
        accelerator.load_state(out)
        train(10)
        assert all(torch.equal(*pair) for pair in zip(went_on, model.parameters(), strict=True))
        return 20
    return train(20)


if __name__ == "__main__":
    steps = globals()[sys.argv[1]](*sys.argv[2:])
    sys.stdout.write(f"rank {comm.rank}: {steps} steps\n")
