"""Hugging Face `Trainer`: means over ranks, the same decisions on all of them, and checkpoints that have all of them."""

from functools import partial, partialmethod, wraps
from pathlib import Path
from typing import Any

from mpi_ef.buffers import synchronize_buffers
from mpi_ef.comm.consensus import agree, gather_values
from mpi_ef.comm.protocol import Comm
from mpi_ef.data import random_state, seed_rank, set_random_state
from mpi_ef.metrics import mean_metrics
from mpi_ef.optim.flat import FlatOptimizer

from .accelerate import collect_over_ranks
from .collect import first_of
from .first_batch import compare_first_batch
from .saving import FOLDER, flat_optimizer, not_loading, resume_ranks, save_ranks

__all__ = ["prepare_trainer"]

_BEST = ("best_metric", "best_global_step", "best_model_checkpoint")
_FLAGS = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")


def prepare_trainer(trainer: Any, comm: Comm, *, policy: str = "exact") -> None:
    """Let a `Trainer` be one of all ranks: call it right after the trainer is built, on all ranks. Local.

    * Numbers in logs and of evaluations are means over the ranks. Predictions that are evaluated are those of all ranks. So
      early stopping and the best checkpoint are the same everywhere.
    * What a callback decides on one rank (to stop, evaluate, save, log) is done on all ranks, after the same step. The best
      checkpoint is rank 0's.
    * Buffers (BatchNorm) become those of all ranks before evaluations, saves, and at the end.
    * Random numbers differ between ranks (dropout), from ``args.seed``.
    * Rank 0 alone reports, prints and saves; beside what it saves, each checkpoint has a folder ``mpi_ef`` with what each
      rank has, and ``train(resume_from_checkpoint=...)`` puts that back.

    ``train``, ``evaluate`` and ``predict`` are collective then. A warning says where all ranks begin with the same batch.

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
    # What it has kept of the accelerator's at its first evaluation, which cuts the last batch to this rank's samples.
    gather, objects = trainer.accelerator.gather_for_metrics, getattr(trainer.args, "eval_use_gather_object", False)
    trainer.gather_function = partial(gather, use_gather_object=objects)
    _add_callbacks(trainer.callback_handler, *_callbacks(_Ranks(trainer, comm, optimizer)))
    compare_first_batch(trainer.model, optimizer, comm, "Trainer")
    _save_all_ranks(trainer, comm, optimizer, policy)
    _return_mean_loss(trainer)


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

    def decide(self, control: Any, event: str) -> Any:
        """Let all do what any wants."""
        mine = sum(bool(getattr(control, name)) << bit for bit, name in enumerate(_FLAGS))
        wanted = gather_values(self._comm, f"Trainer, {event}", mine)
        for bit, name in enumerate(_FLAGS):
            setattr(control, name, any(of_rank >> bit & 1 for of_rank in wanted))
        return control

    def choose(self, state: Any) -> None:
        """Let the best checkpoint be rank 0's: the others may have looked before it was written."""
        for name, value in first_of({name: getattr(state, name, None) for name in _BEST}, self._comm).items():
            setattr(state, name, value)

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

        def on_step_end(self, _: Any, __: Any, control: Any, *, event: str = "a step", **___: Any) -> Any:
            ranks.decide(control, event)
            if control.should_evaluate or control.should_save:
                ranks.settle()
            return control

        on_epoch_end = partialmethod(on_step_end, event="the end of an epoch")

        def on_substep_end(self, _: Any, __: Any, control: Any, *, event: str = "a batch", **___: Any) -> Any:
            return ranks.decide(control, event)

        on_evaluate = partialmethod(on_substep_end, event="an evaluation")
        on_log = partialmethod(on_substep_end, event="a log")

        def on_save(self, _: Any, state: Any, control: Any, **__: Any) -> Any:
            ranks.decide(control, "a save")  # no rank is past a save before rank 0 is
            ranks.choose(state)
            return control

        def on_train_end(self, *_: Any, **__: Any) -> None:
            ranks.settle()

    return MeanOverRanks(), SameDecisions()


def _add_callbacks(handler: Any, first: Any, last: Any) -> None:
    """Put one before all callbacks, which report, and one after all, also those that are added later. Local."""
    callbacks, add = handler.callbacks, handler.add_callback
    callbacks.insert(0, first)
    callbacks.append(last)

    @wraps(add)
    def add_callback(callback: Any) -> None:
        add(callback)
        callbacks.remove(last)
        callbacks.append(last)

    handler.add_callback = add_callback


def _return_mean_loss(trainer: Any) -> None:
    train = trainer.train

    @wraps(train)
    def mean_loss(*rest: Any, **options: Any) -> Any:
        output = train(*rest, **options)
        mean = getattr(output, "metrics", {}).get("train_loss")
        return output if mean is None else output._replace(training_loss=mean)

    trainer.train = mean_loss


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
