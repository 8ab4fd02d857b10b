"""The training loop's inside: model, shards, optimizer, validation, times."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np

from mpi_ef.collectives import chunk_bounds, use_gpu_aware_mpi
from mpi_ef.comm.consensus import agree, ranks_text
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import ConfigError, DataError, DisagreementError, counted, everywhere
from mpi_ef.feedback import ErrorFeedback, NodeFeedback
from mpi_ef.jobs.device import described, device_for, move_to
from mpi_ef.jobs.metrics import in_bytes
from mpi_ef.jobs.train import choices, models
from mpi_ef.jobs.train.advised import built
from mpi_ef.jobs.train.changes import Changes
from mpi_ef.jobs.train.config import PHASES, TrainConfig, learning_rate
from mpi_ef.jobs.train.datasets import batches, shard
from mpi_ef.jobs.train.problem import EVALUATION_BATCH, evaluated
from mpi_ef.jobs.train.problem import build as _build
from mpi_ef.jobs.train.problem import differences as _differences
from mpi_ef.jobs.train.problem import shaping as _shaping
from mpi_ef.jobs.train.settings import CHANGES, rule_in
from mpi_ef.jobs.train.waiting import Waiting
from mpi_ef.kernels import machine_code
from mpi_ef.kernels.backend import backend_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Trainer"]

_TIMES = ("all", *PHASES)
_UNSETTLED = 1000  # steps after which the ranks compare their latest ones without a row


class Trainer:
    """One rank's part of a training run. Every method is collective unless marked otherwise.

    Times are those of steps in which no rank's kernels were compiled or loaded: the others wait for it, in "communicate".

    Parameters
    ----------
    comm : MPI.Comm
    config : TrainConfig

    Attributes
    ----------
    config : TrainConfig
        All options that apply.
    device : torch.device
        Where this rank computes.
    devices : dict of str to str
        Devices and what their kernels are written in, each with its ranks.
    changes : Changes or None
        What makes the gradients of rules whose inputs are changes.
    waiting : Waiting
        For whom ranks wait in steps that have times.
    untimed_steps, untimed_seconds : int, float
        Those of the other steps, on this rank; up to the last row.
    """

    def __init__(self, comm: Comm, config: TrainConfig) -> None:
        self._asked, config = config, config.resolved()
        self.comm, self.config, self.steps, self.epoch = comm, config, 0, 0
        self._earlier_sent = 0  # bytes, by another number of ranks
        self._samples = 0  # that this rank has seen, or would have if it had been there from the start
        size, rank = comm.Get_size(), comm.Get_rank()

        def facts() -> dict[str, object]:
            self.data, self.model, *loss = _build(config)
            self._loss_of = loss[0] if loss else models.cross_entropy
            if config.data not in (None, self.data.content):
                raise DataError(f"data={config.data}, but here there are {self.data.content}; give the same, or leave the "
                                "option out")
            shard(self.data.size, size, rank)
            options = {f"option {k}": v for k, v in asdict(config).items() if k not in ("text", "out")}
            return {"training samples": self.data.size, "their content": self.data.content, **options}

        agree(comm, "train", facts, "give every rank the same data and options; ranks take their own part of the data")
        order = np.random.default_rng(config.seed).permutation(self.data.size)
        if config.split == "by-label" and self.data.labels is not None:
            order = np.argsort(self.data.labels, kind="stable")
        self._own = shard(self.data.size, size, rank, order=order)
        self._batches = batches(self._own, config.batch, seed=config.seed, rank=rank)
        bounds = chunk_bounds(self.data.held_out_size, size)
        self._held_out = np.arange(bounds[rank], bounds[rank + 1])
        self.device = device_for(comm, config.device, "train")
        move_to(self.model, self.device, comm, "train")  # drawn on the CPU: the same numbers everywhere
        if config.gpu_aware_mpi:
            use_gpu_aware_mpi(comm, self.device)
        self.optimizer, self.config = built(comm, config, self.model)
        self.devices = described(comm, self.device, self.optimizer.flat.device)
        self.changes: Changes | None = None
        if rule_in(config.rule) in CHANGES:
            whole = config.whole or config.batch / (config.batch + self.data.size // size)
            self.changes = Changes(self.optimizer, str(rule_in(config.rule)), whole=whole, seed=config.seed)
        self._loss_sum, self._loss_count, self._loss = 0.0, 0, 0.0  # since the last row; in that row
        self._seconds = {"data": 0.0, "compute": 0.0, "optimizer": 0.0}
        self._earlier = dict.fromkeys(_TIMES, 0.0)  # before the run was interrupted
        self.waiting = Waiting(comm, self.optimizer)
        self._latest: list[tuple[bool, float, np.ndarray]] = []  # steps: were kernels made here? what was waited, spent
        self._left_out = np.zeros(len(_TIMES))
        self.untimed_steps, self.untimed_seconds = 0, 0.0
        self._began = perf_counter()

    def headline(self) -> str:
        """Return a line about the model, its data and the bytes of a step. Local."""
        plans, dense = self.optimizer.means(), in_bytes(self.optimizer.dense_nbytes)
        sent, links = in_bytes(sum(plan.traffic.sent_nbytes for plan in plans)), [plan.link_traffic for plan in plans]
        every, rest = self.config.exchange_every or 1, f"; {plans[0].label}"
        if plans[0].nodes.count > 1:
            rest += (f"; {in_bytes(sum(link.nbytes for link in links))} each way over the link of one of "
                     f"{plans[0].nodes.count} nodes (dense: {in_bytes(sum(link.dense_nbytes for link in links))})")
        when = "step" if every == 1 else f"{every} steps"
        return (f"{self.config.model}: {self.optimizer.flat.d:,} parameters on {counted(self.comm.Get_size(), 'rank')}, "
                f"{self.data.size:,} training samples; {self.config.optimizer}, {plans[0].compressor}: {sent} per {when} "
                f"and rank when compressed (dense: {dense}{'' if every == 1 else ' per step'}){rest}")

    @property
    def columns(self) -> list[str]:
        """Names of what :meth:`row` returns. Local."""
        times = [f"{which}seconds_{phase}" for phase in PHASES for which in ("", "min_", "max_")]
        return ["step", "epoch", "lr", "loss", "val_loss", "val_accuracy", "sent_nbytes", "link_nbytes", "dense_nbytes",
                "lost", *(f"norm_{name}" for name in self._state()), "seconds", *times]

    def _state(self) -> "dict[str, np.ndarray]":
        return self.optimizer.per_rank() | self.optimizer.replicated()

    def step(self, *, watched: bool = False) -> None:
        """Take one optimizer step on the next batch of this rank; a watched one measures what compression loses.

        The last one ends with the same parameters on all ranks, also where replicas differ meanwhile.
        """
        made, spent = machine_code.made, self._measured()
        self._step(watched=watched)
        self._latest.append((machine_code.made > made, self.waiting.last(), self._measured() - spent))
        if len(self._latest) == _UNSETTLED:
            self._settle()

    def _step(self, *, watched: bool) -> None:
        self.steps += 1
        self.optimizer.watch(watched)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.steps)
        began = perf_counter()
        inputs, targets = self.next_batch()
        loaded = perf_counter()
        self.optimizer.zero_grad()
        if self.changes is None:
            loss = self.backward(inputs, targets)
        else:
            loss = self.changes.gradient(self.steps, lambda: self.backward(inputs, targets), self._backward_all)
        self.optimizer.note_loss(loss)
        self._clip()
        done = perf_counter()
        self._seconds["data"] += loaded - began
        self._seconds["compute"] += done - loaded
        self._loss_sum, self._loss_count = self._loss_sum + loss, self._loss_count + 1
        began = perf_counter()
        self.optimizer.step()
        if self.steps == self.config.steps:
            self.optimizer.synchronize()
        self._seconds["optimizer"] += perf_counter() - began

    def backward(self, inputs: "Tensor", targets: "Tensor", share: float = 1.0) -> float:
        """Add the gradient of a share of the mean loss over a batch; return that. Local."""
        loss = share * self._loss_of(self.model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def _backward_all(self) -> float:
        """Add the gradient of the mean loss over all samples of this rank; return that. Local."""
        parts = [self._own[start : start + EVALUATION_BATCH] for start in range(0, self._own.size, EVALUATION_BATCH)]
        return sum(self.backward(*self._there(self.data.batch(part, self.epoch)), part.size / self._own.size)
                   for part in parts)

    def _settle(self) -> None:
        """Leave out of the times those of the latest steps in which any rank's kernels were made."""
        if not self._latest:
            return
        told = self._all([value for made, waited, _ in self._latest for value in (made, waited)])
        made = np.asarray(told[:, ::2].any(axis=0))
        self.waiting.add(told[:, 1::2], made)
        for left_out, (_, _, spent) in zip(made, self._latest, strict=True):
            if left_out:
                self._left_out += spent
                self.untimed_steps += 1
                self.untimed_seconds += float(spent[0])
        self._latest.clear()

    def _there(self, batch: "tuple[Tensor, Tensor]") -> "tuple[Tensor, Tensor]":
        """Return inputs and targets where the model is. Local."""
        inputs, targets = batch
        return inputs.to(self.device), targets.to(self.device)

    def next_batch(self) -> "tuple[Tensor, Tensor]":
        """Return the next inputs and targets of this rank, where the model is. Local."""
        indices = self._next()
        return self._there(self.data.batch(indices, self.epoch))

    def _next(self) -> "np.ndarray":
        self.epoch, indices = next(self._batches)
        self._samples += indices.size
        return indices

    def _clip(self) -> None:
        if self.config.clip and not self.optimizer.clip:  # those that clip by all ranks' gradients do it themselves
            self.optimizer.clip_gradients(self.config.clip)

    def row(self, *, evaluate: bool) -> dict[str, Any]:
        """Return one row of metrics; the loss is the mean since the row before, or that of it after no step."""
        self._settle()
        loss, count = self._sum(self._loss_sum, self._loss_count)
        if count:
            self._loss = loss / count
        self._loss_sum, self._loss_count = 0.0, 0
        row = {"step": self.steps, "epoch": self.epoch, "lr": learning_rate(self.config, self.steps),
               "loss": self._loss, "val_loss": None, "val_accuracy": None,
               "sent_nbytes": self._sent(), "link_nbytes": self.optimizer.crossed_nbytes(self._sent()),
               "dense_nbytes": self.steps * self.optimizer.dense_nbytes,
               **self._diagnosis()}
        if evaluate:
            paused = perf_counter()
            row |= self._evaluate()
            self._began += perf_counter() - paused  # training time, without validation
        seconds = self._spent()
        row["seconds"] = seconds["all"]
        spent = self._all([seconds[phase] for phase in PHASES])
        for prefix, values in (("", spent.mean(axis=0)), ("min_", spent.min(axis=0)), ("max_", spent.max(axis=0))):
            row |= {f"{prefix}seconds_{phase}": float(value) for phase, value in zip(PHASES, values, strict=True)}
        return row

    def _sent(self) -> int:
        return self._earlier_sent + self.optimizer.sent_nbytes

    def _spent(self) -> dict[str, float]:
        """Return the seconds of this rank by phase, and of all, those before an interruption included. Local."""
        spent = (self._measured() - self._left_out).tolist()
        return {name: self._earlier[name] + seconds for name, seconds in zip(_TIMES, spent, strict=True)}

    def _measured(self) -> "np.ndarray":
        """Return the seconds of this rank in the order of _TIMES, those of all steps of this launch. Local."""
        exchanges = self.optimizer.seconds
        seconds = self._seconds | exchanges | {"all": perf_counter() - self._began}
        seconds["update"] = seconds["optimizer"] - sum(exchanges.values())
        return np.array([seconds[name] for name in _TIMES])

    def record(self) -> TrainConfig:
        """Return the options of what was built: all that apply, also those that follow from it. Local."""
        config, etas = replace(self.config, data=self.data.content), self._etas()
        if len(etas) == 1:  # buckets may have different ones
            config = replace(config, eta=etas.pop())
        return config if self.changes is None else replace(config, whole=self.changes.whole)

    def _etas(self) -> set[float]:
        """Return the strengths of the feedback of all buckets, where that is an option. Local."""
        if "eta" not in self._asked.chosen():
            return set()
        return {channel.options["eta"] for channel in self.optimizer.channels() if isinstance(channel, ErrorFeedback)}

    def position(self) -> dict[str, Any]:
        """Return what :meth:`go_on` needs besides the state in a checkpoint."""
        self._settle()
        return {"seconds": self._spent(), "untimed": [self.untimed_steps, self.untimed_seconds],
                "loss": [self._loss_sum, self._loss_count, self._loss], "samples": self._samples,
                "sent_nbytes": self._sent(), "ranks": self.comm.Get_size(), "data": self.data.content,
                "options": _shaping(self.record())}

    def go_on(self, steps: int, position: dict[str, Any]) -> list[str]:
        """Restore the position after so many steps: this rank's batches, times, losses since the last row. Local.

        With another number of ranks: where this rank has seen its part of as many samples as all have seen then.

        Returns
        -------
        list of str
            Options that were others then, and are about more than what is written where.

        Raises
        ------
        DataError, ConfigError
            On all ranks: the run that saved had other data, or an option that made its model, its ranks' data or its state
            and that was another one, or has done more steps than this one is to do.
        """
        if steps > self.config.steps:
            raise everywhere(ConfigError(f"resume: {steps} steps are done, and steps={self.config.steps} are fewer; "
                                          "give it as many or more, or another --out"))
        if position.get("data", self.data.content) != self.data.content:
            raise everywhere(DataError(f"resume: the run that saved had other data ({position['data']}; here "
                                        f"{self.data.content}); give it the same, or another --out"))
        changed = self._changed(position["options"])
        self.steps, self._earlier = steps, position["seconds"]
        self.untimed_steps, self.untimed_seconds = position.get("untimed", (0, 0.0))
        self._loss_sum, self._loss_count, *last = position["loss"]
        self._loss = last[0] if last else 0.0  # older checkpoints have none
        self._earlier_sent = position["sent_nbytes"] - self.optimizer.sent_nbytes  # 0 after another number of ranks
        size, samples = self.comm.Get_size(), position["samples"] * position["ranks"]
        while self._samples * size < samples:
            self._next()
        self._began = perf_counter()
        if "data" not in position:  # an older checkpoint: only the name of the text is known
            changed += _differences(position["options"], {"text": str(self.config.text)})
        return changed

    def _changed(self, options: dict[str, Any]) -> list[str]:
        """Return what is not as in the run that saved; raise for what its state has, which is loaded by now. Local."""
        then, now = choices.earlier(options), _shaping(self.record())
        if self._asked.eta is None:  # it is what was loaded
            then["eta"] = now.get("eta")
        else:
            now["eta"], then["eta"] = self._asked.eta, ", ".join(map(str, sorted(self._etas() - {self._asked.eta})))
            then["eta"] = then["eta"] or now["eta"]
        if self._asked.weight_decay is None:  # as well; the default was another one once
            now["weight_decay"] = then["weight_decay"]
            self.config = replace(self.config, weight_decay=then["weight_decay"])
        then["whole"] = now.get("whole") if self._asked.whole is None else then.get("whole")
        then["plan"] = now.get("plan") if self._asked.plan == "auto" else then.get("plan")  # its state is loaded
        lost = _differences(then, {name: now.get(name) for name in sorted(choices.kept())})
        if lost:
            raise everywhere(ConfigError(f"resume: {lost[0]}; a run goes on with the model, data and optimizer that "
                                          "it has: give it the same options, or another --out"))
        return _differences(then, {name: value for name, value in now.items() if name not in choices.kept()})

    def _diagnosis(self) -> dict[str, float | None]:
        """Return what the last exchange lost, mean over ranks, and norms of the state, mean square over ranks."""
        state, lost = self._state(), self.optimizer.lost
        lost = np.nan if lost is None else lost
        means = self._all([lost, *(backend_of(array).norm(array) ** 2 for array in state.values())]).mean(axis=0)
        # Arrays of plans are parts of a vector: their norms add up, as those of a node; those of others are averaged.
        n = self.comm.Get_size()
        nodes = next((rule.node.placement.nodes for rule in self.optimizer.channels() if isinstance(rule, NodeFeedback)), n)
        parts = [n if ".plan." in f".{name}" else n / nodes for name in state]
        norms = np.sqrt(parts * means[1:]).tolist()
        row = {f"norm_{name}": norm for name, norm in zip(state, norms, strict=True)}
        return {"lost": None if np.isnan(means[0]) else float(means[0]), **row}

    def _evaluate(self) -> dict[str, float | None]:
        with getattr(self.optimizer, "shared", nullcontext)():  # in a round of steps of each rank by itself, what all share
            counted_here = evaluated(self.model, self.data, self._loss_of, self._held_out, self.device)
        total, hits, number = self._sum(*counted_here)
        return {"val_loss": total / number, "val_accuracy": None if self.data.labels is None else hits / number}

    def _sum(self, *values: float) -> list[float]:
        return self._all(values).sum(axis=0).tolist()  # type: ignore[no-any-return]

    def _all(self, values: Sequence[float]) -> "np.ndarray":
        """Return the values of all ranks, (ranks, values)."""
        rows = np.empty((self.comm.Get_size(), len(values)))
        self.comm.Allgather(np.array(values, np.float64), rows)
        return rows

    def rounds(self) -> dict[str, int]:
        """Return how many exchanges there were, where not every step has one, and how many were skipped. Local."""
        return {name: getattr(self.optimizer, name) for name in ("rounds", "skipped_rounds") if self.config.fragments}

    def fingerprints(self) -> list[int]:
        """Return a hash of the parameters of every rank, as far as they are to be the same. Collective."""
        shared = np.ascontiguousarray(self.optimizer.flat.kernels.fetch(self.optimizer.shared_values))
        hashes: list[int] = self.comm.allgather(crc32(shared.data))
        return hashes

    def check_replicas(self) -> None:
        """Raise `DisagreementError` on all ranks where parameters differ that are to be the same. Collective."""
        flat, shared = self.optimizer.flat, self.optimizer.shared_values
        prints = self.comm.allgather(crc32(flat.fingerprints(shared).data))  # formed where they are
        if others := [rank for rank, of_rank in enumerate(prints) if of_rank != prints[0]]:
            raise DisagreementError(
                f"mpi-ef train: after step {self.steps} parameters on {ranks_text(others)} are not those on rank 0; "
                f"{type(self.optimizer).__name__} gives ranks different results, and the laws in mpi_ef.testing find why"
            )
