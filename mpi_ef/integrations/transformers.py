"""Hugging Face `Trainer`: means over ranks, the same decisions on all of them, and checkpoints that have all of them."""

from functools import wraps
from pathlib import Path
from typing import Any

from mpi_ef.buffers import synchronize_buffers
from mpi_ef.comm.consensus import agree
from mpi_ef.comm.protocol import Comm
from mpi_ef.data import random_state, seed_rank, set_random_state
from mpi_ef.metrics import mean_metrics
from mpi_ef.optim.flat import FlatOptimizer

from .accelerate import collect_over_ranks
from .saving import FOLDER, flat_optimizer, not_loading, resume_ranks, save_ranks

__all__ = ["prepare_trainer"]

_FLAGS = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")


def prepare_trainer(trainer: Any, comm: Comm, *, policy: str = "exact") -> None:
    """Let a `Trainer` be one of all ranks: call it right after the trainer is built, on all ranks. Local.

    * Numbers in logs and of evaluations are means over the ranks. Predictions that are evaluated are those of all ranks. So
      early stopping and the best checkpoint are the same everywhere.
    * What a callback decides on one rank (to stop, evaluate, save, log) is done on all ranks, after the same step.
    * Buffers (BatchNorm) become those of all ranks before evaluations, saves, and at the end.
    * Random numbers differ between ranks (dropout), from ``args.seed``.
    * Rank 0 alone reports, prints and saves; beside what it saves, each checkpoint has a folder ``mpi_ef`` with what each
      rank has, and ``train(resume_from_checkpoint=...)`` puts that back.

    ``train``, ``evaluate`` and ``predict`` are collective then.

    Parameters
    ----------
    trainer : transformers.Trainer
        Or a child of it. Built after :func:`one_process`, with ``accelerator_config={"use_configured_state": True}`` in its
        arguments and one of this package's optimizers in ``optimizers=(optimizer, scheduler or None)``. Its data are this
        rank's: :func:`mpi_ef.shard`.
    comm : MPI.Comm
        That of the optimizer.
    policy : {"exact", "redistribute", "reset"}
        What to do with a checkpoint of another number of ranks, see :class:`mpi_ef.Training`.

    Raises
    ------
    OptionError
        The trainer has several processes, or an optimizer that is none of this package.
    """
    collect_over_ranks(trainer.accelerator, comm, "prepare_trainer")
    optimizer = flat_optimizer(trainer.optimizer, "prepare_trainer")
    first, last = _callbacks(_Ranks(trainer, comm, optimizer))
    trainer.callback_handler.callbacks.insert(0, first)  # before those that report
    trainer.add_callback(last)
    _save_all_ranks(trainer, comm, optimizer, policy)


class _Ranks:
    """What callbacks do over the ranks. All methods are collective."""

    def __init__(self, trainer: Any, comm: Comm, optimizer: FlatOptimizer) -> None:
        self._trainer, self._comm, self._optimizer = trainer, comm, optimizer

    def begin(self, args: Any, state: Any) -> None:
        """Raise `DisagreementError` where ranks are to take other steps; draw other random numbers on each."""
        loader = self._trainer.callback_handler.train_dataloader

        def facts() -> dict[str, object]:
            batches = len(loader) if hasattr(self._trainer.train_dataset, "__len__") else "unknown"
            return {"max_steps": state.max_steps, "epochs": state.num_train_epochs, "batches of an epoch": batches,
                    "gradient_accumulation_steps": args.gradient_accumulation_steps, "steps done": state.global_step}

        agree(self._comm, "Trainer.train", facts, "give all ranks the same arguments, and as many samples (mpi_ef.shard)")
        if not state.global_step:
            seed_rank(self._comm, args.seed)

    def average(self, state: Any, logs: dict[str, Any]) -> None:
        """Put means over ranks in the place of numbers that are logged."""
        numbers = {name: value for name, value in logs.items() if _is_number(value)}
        numbers = mean_metrics(numbers, self._comm)
        logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)

    def decide(self, control: Any) -> Any:
        """Let all do what any wants."""
        wanted = self._comm.allgather(sum(bool(getattr(control, name)) << bit for bit, name in enumerate(_FLAGS)))
        for bit, name in enumerate(_FLAGS):
            setattr(control, name, any(of_rank >> bit & 1 for of_rank in wanted))
        return control

    def settle(self) -> None:
        """Make the models equal, with their buffers."""
        self._optimizer.synchronize()
        synchronize_buffers(self._trainer.model, self._comm)


def _callbacks(ranks: _Ranks) -> tuple[Any, Any]:
    from transformers import TrainerCallback

    class MeanOverRanks(TrainerCallback):  # type: ignore[misc, unused-ignore]
        """Comes first: logs are means over ranks before anything sees them."""

        def on_train_begin(self, args: Any, state: Any, _: Any, **__: Any) -> None:
            ranks.begin(args, state)

        def on_log(self, _: Any, state: Any, __: Any, logs: Any = None, **___: Any) -> None:
            ranks.average(state, logs if logs is not None else {})

    class SameDecisions(TrainerCallback):  # type: ignore[misc, unused-ignore]
        """Comes last: what one rank wants, all do."""

        def on_step_end(self, _: Any, __: Any, control: Any, **___: Any) -> Any:
            ranks.decide(control)
            if control.should_evaluate or control.should_save:
                ranks.settle()
            return control

        on_epoch_end = on_step_end

        def on_substep_end(self, _: Any, __: Any, control: Any, **___: Any) -> Any:
            return ranks.decide(control)

        on_evaluate = on_log = on_save = on_substep_end  # no rank is past a save before rank 0 is

        def on_train_end(self, *_: Any, **__: Any) -> None:
            ranks.settle()

    return MeanOverRanks(), SameDecisions()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _save_all_ranks(trainer: Any, comm: Comm, optimizer: FlatOptimizer, policy: str) -> None:
    """Let the calls that save and load optimizer and random numbers do so for each rank. Local."""
    save, load = trainer._save_optimizer_and_scheduler, trainer._load_optimizer_and_scheduler  # noqa: SLF001
    save_random, load_random = trainer._save_rng_state, trainer._load_rng_state  # noqa: SLF001
    resumed: list[dict[str, Any]] = []

    @wraps(save)
    def save_optimizer(output_dir: str) -> None:
        save(output_dir)
        save_ranks(Path(output_dir) / FOLDER, comm, trainer.model, [optimizer])

    @wraps(load)
    def load_optimizer(checkpoint: str | None) -> None:
        with not_loading(optimizer):
            load(checkpoint)
        if checkpoint is not None:
            resume_ranks(Path(checkpoint) / FOLDER, comm, trainer.model, [optimizer], policy)
            resumed[:] = [random_state()]

    @wraps(save_random)
    def save_numbers(output_dir: str) -> None:
        if comm.Get_rank() == 0:  # all would write the same file
            save_random(output_dir)

    @wraps(load_random)
    def load_numbers(checkpoint: str | None) -> None:
        if checkpoint is not None and resumed:
            set_random_state(resumed[0])
        else:
            load_random(checkpoint)

    trainer._save_optimizer_and_scheduler, trainer._load_optimizer_and_scheduler = save_optimizer, load_optimizer  # noqa: SLF001
    trainer._save_rng_state, trainer._load_rng_state = save_numbers, load_numbers  # noqa: SLF001
