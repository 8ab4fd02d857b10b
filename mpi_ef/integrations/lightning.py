"""Lightning: a strategy whose processes are MPI's ranks; importing this imports Lightning."""

import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from mpi_ef.buffers import synchronize_buffers
from mpi_ef.comm.consensus import gather_values
from mpi_ef.comm.protocol import Comm
from mpi_ef.optim.flat import FlatOptimizer

from .collect import first_of, reduced, stacked
from .first_batch import digest, warn_of_the_same
from .processes import one_process
from .saving import flat_optimizer, remove_ranks, resume_ranks, save_ranks

__all__ = ["MpiStrategy"]


class _Ranks(ClusterEnvironment):
    """The ranks of a communicator, which a launcher has started."""

    creates_processes_externally, main_address, main_port = True, "", 0

    def __init__(self, comm: Comm) -> None:
        self._size, self._rank = int(comm.Get_size()), int(comm.Get_rank())

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._size

    def set_world_size(self, size: int) -> None:
        """Leave it as it is."""

    def global_rank(self) -> int:
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        """Leave it as it is."""

    local_rank = global_rank

    def node_rank(self) -> int:
        return 0


class _SameDecision(Callback):
    """Comes last: where a callback or a step has set ``trainer.should_stop`` on one rank, it is set on all."""

    def __init__(self, comm: Comm) -> None:
        self._comm, self._compared, self._first = comm, False, b""
        self._told: set[str] = set()

    def on_train_batch_start(self, _: Any, __: Any, batch: Any, *___: Any) -> None:
        if not (self._compared or self._first):
            self._first = digest(batch)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        digests = self._decide(trainer, "the end of a batch")
        if not self._compared:
            self._compared = True
            warn_of_the_same(digests, int(self._comm.Get_rank()), "MpiStrategy")

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        self._decide(trainer, "the end of a validation")
        names = {str(name) for callback in trainer.callbacks if (name := getattr(callback, "monitor", None))}
        mine = {name: repr(float(trainer.callback_metrics.get(name, 0.0))) for name in sorted(names)}
        of_ranks = gather_values(self._comm, "Lightning, what callbacks monitor", mine)
        for name in mine:
            values = [of_rank.get(name) for of_rank in of_ranks]
            if name not in self._told and len(set(values)) > 1 and self._comm.Get_rank() == 0:
                self._told.add(name)
                text = (f"MpiStrategy: {name}, which a callback monitors, is {values[0]} on rank 0 and another on others; "
                        "log it with sync_dist=True")
                warnings.warn(text, RuntimeWarning, stacklevel=2)

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        self._decide(trainer, "the end of an epoch")

    def _decide(self, trainer: Any, event: str) -> list[bytes]:
        mine = (bool(trainer.should_stop), self._first)
        answers = gather_values(self._comm, f"Lightning, {event}", mine)
        trainer.should_stop, self._first = any(stop for stop, _ in answers), b""
        return [first for _, first in answers]


class MpiStrategy(ParallelStrategy):
    """For ``Trainer(strategy=MpiStrategy(comm), accelerator="cpu", devices=1)``, the same on all ranks.

    ``configure_optimizers`` returns optimizers of this package, on `comm`. Lightning deals the data to the ranks (its
    ``DistributedSampler``), takes means for what is logged with ``sync_dist=True``, stops on all ranks together, and logs
    and saves on rank 0; the strategy does for it what `DDPStrategy` does elsewhere, but for gradients. Buffers (BatchNorm)
    become those of all ranks before validations, tests and saves. What torchmetrics in the module compute is that of all
    ranks. A warning says where all ranks begin with the same batch. A checkpoint has a folder beside it,
    ``NAME.ckpt.ranks``, with what each rank has, optimizer, errors, random numbers, and ``fit(ckpt_path=...)`` puts that
    back.

    Parameters
    ----------
    comm : MPI.Comm
    policy : {"exact", "redistribute", "reset"}
        What to do with a checkpoint of another number of ranks, see :class:`mpi_ef.Training`.

    Raises
    ------
    OptionError
        From ``fit``: an optimizer that is none of this package.
    """

    strategy_name = "mpi_ef"
    is_distributed = True  # Lightning deals the samples

    def __init__(self, comm: Comm, *, policy: str = "exact") -> None:
        one_process(comm)
        super().__init__(parallel_devices=[torch.device("cpu")], cluster_environment=_Ranks(comm))
        self.comm, self.policy = comm, policy
        self.set_world_ranks()

    def set_world_ranks(self) -> None:
        """Tell what is done on rank 0 alone who that is. Local."""
        rank_zero_only.rank = self.global_rank

    @property
    def root_device(self) -> torch.device:
        """Where parameters are."""
        return torch.device("cpu")

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """What a ``DistributedSampler`` is given."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def model_to_device(self) -> None:
        """Leave the model where it is."""

    def setup(self, trainer: Any) -> None:
        """Set everything up; check the optimizers. Collective."""
        super().setup(trainer)
        self._flat()
        self._connect_metrics(self.lightning_module)
        if not any(isinstance(callback, _SameDecision) for callback in trainer.callbacks):
            trainer.callbacks.append(_SameDecision(self.comm))

    def _flat(self) -> list[FlatOptimizer]:
        return [flat_optimizer(optimizer, "MpiStrategy") for optimizer in self.optimizers]

    def _connect_metrics(self, model: Any) -> None:
        """Let torchmetrics ask the ranks where they would ask torch.distributed. Local."""
        kind, size = getattr(sys.modules.get("torchmetrics"), "Metric", ()), self.world_size

        def gather(state: Tensor, group: Any = None) -> list[Tensor]:
            del group
            return gather_values(self.comm, "torchmetrics", state.detach().clone())

        for metric in (part for part in model.modules() if isinstance(part, kind)):
            metric.distributed_available_fn = lambda: size > 1
            if metric.dist_sync_fn is None:
                metric.dist_sync_fn = gather

    def barrier(self, name: str | None = None) -> None:
        """Return when all ranks have come here. Collective."""
        gather_values(self.comm, f"Lightning, barrier {name or ''}".rstrip(), None)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return the object of one rank. Collective."""
        return first_of(obj, self.comm, src)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Return the mean over ranks, or what else `reduce_op` says. Collective."""
        del group
        name = "mean" if reduce_op is None else str(reduce_op).rpartition(".")[2].lower()
        value = tensor if isinstance(tensor, Tensor) else torch.as_tensor(tensor)
        return reduced(value, self.comm, "mean" if name == "avg" else name)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Return the tensors of all ranks, (ranks, ...), without gradients. Collective."""
        del group, sync_grads
        whole: Tensor = stacked(tensor, self.comm)
        return whole

    def _settle(self) -> None:
        for optimizer in self._flat():
            optimizer.synchronize()
        synchronize_buffers(self.model, self.comm)

    def on_validation_start(self) -> None:
        """Make buffers those of all ranks. Collective."""
        self._settle()

    on_test_start = on_predict_start = on_train_end = on_validation_start

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the model's state, the same on all ranks. Collective."""
        self._settle()
        state: dict[str, Any] = super().lightning_module_state_dict()
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Let rank 0 write its file, and all ranks their state beside it. Collective."""
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if "optimizer_states" in checkpoint and self.optimizers:
            save_ranks(f"{filepath}.ranks", self.comm, self.lightning_module, self._flat())

    def load_checkpoint(self, checkpoint_path: Any, *rest: Any, **options: Any) -> dict[str, Any]:
        """Return what rank 0 has written. Local."""
        self._loaded = checkpoint_path
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, *rest, **options)
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Put the state of this rank back: model, optimizers, random numbers. Collective."""
        del checkpoint  # what is in it is rank 0's
        resume_ranks(f"{self._loaded}.ranks", self.comm, self.lightning_module, self._flat(), self.policy)

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint of all ranks. Local."""
        super().remove_checkpoint(filepath)
        remove_ranks(f"{filepath}.ranks", self.comm)
