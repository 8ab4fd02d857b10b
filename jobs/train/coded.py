"""Training with a gradient code: rank 0 decides, evaluates, writes and saves; the others compute what they are asked for.

Nothing in the loop is collective: a rank that is late, stopped or dead holds up nobody, as long as the code allows it.
"""

import json
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from platform import node
from time import perf_counter
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from mpi_ef.comm.consensus import agree
from mpi_ef.comm.protocol import MpiComm
from mpi_ef.errors import ConfigError, DataError, MpiEfError, counted
from mpi_ef.jobs.delays import FILE as DELAYS
from mpi_ef.jobs.delays import said_of, save_lateness
from mpi_ef.jobs.device import described, device_for, move_to
from mpi_ef.jobs.folder import write_whole
from mpi_ef.jobs.metrics import Metrics, Progress, announcing, in_bytes, made_here
from mpi_ef.jobs.options import to_toml
from mpi_ef.jobs.train import choices
from mpi_ef.jobs.train.coded_run import CodedRun
from mpi_ef.jobs.train.config import PHASES, PROOF, TrainConfig, learning_rate
from mpi_ef.jobs.train.datasets import shard
from mpi_ef.jobs.train.models import cross_entropy
from mpi_ef.jobs.train.optimizers import build_coded
from mpi_ef.jobs.train.problem import build, differences, evaluated, shaping
from mpi_ef.jobs.train.showing import record, table
from mpi_ef.jobs.train.texts import in_texts
from mpi_ef.kernels import machine_code

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CodedTrainer", "train_coded"]

_DRAW = 0xC0DE  # of the random numbers that draw batches


class CodedTrainer:
    """One rank's part of a training with a code. Construction is collective, all else is local, and most the server's.

    Attributes
    ----------
    config : TrainConfig
        All options that apply.
    optimizer : CodedOptimizer
    steps : int
        That are completed. Of the server.
    """

    def __init__(self, comm: MpiComm, config: TrainConfig) -> None:
        self.comm, self._asked, self.config = comm, config, config.resolved()
        config, size = self.config, int(comm.Get_size())

        def facts() -> dict[str, object]:
            self.data, self.model, *loss = build(config)
            self._loss_of = loss[0] if loss else cross_entropy
            if config.data not in (None, self.data.content):
                raise DataError(f"data={config.data}, but here there are {self.data.content}; give the same, or leave the "
                                "option out")
            shard(self.data.size, size, 0)
            options = {f"option {k}": v for k, v in asdict(config).items() if k not in ("text", "out")}
            return {"training samples": self.data.size, "their content": self.data.content, **options}

        agree(comm, "train", facts, "give every rank the same data and options; ranks take their own part of the data")
        self.device = device_for(comm, config.device, "train")
        move_to(self.model, self.device, comm, "train")
        self.optimizer = build_coded(config, self.model, comm)
        self.devices, self._made = described(comm, self.device, self.optimizer.flat.device), made_here(comm)
        self.hosts: list[str] = comm.allgather(node())
        order = np.random.default_rng(config.seed).permutation(self.data.size)
        if config.split == "by-label" and self.data.labels is not None:
            order = np.argsort(self.data.labels, kind="stable")
        self.parts = self.optimizer.coded.n
        self._shards = [shard(self.data.size, self.parts, part, order=order) for part in range(self.parts)]
        self.steps, self._losses, self._loss = 0, list[float](), 0.0
        self._seconds = dict.fromkeys(("all", *PHASES), 0.0)
        self.untimed_steps, self.untimed_seconds, self._earlier_sent = 0, 0.0, 0.0

    def headline(self) -> str:
        """Return a line about the model, its data and the code."""
        coded, config = self.optimizer.coded, self.config
        order = in_bytes(coded.order_compressor.wire_nbytes(coded.d, coded.dtype))
        answer = in_bytes(coded.compressor.wire_nbytes(coded.d, coded.dtype))
        of = "and" if coded.dedicated else "that is one of"
        return (f"{config.model}: {coded.d:,} parameters, a server {of} {counted(coded.n, 'worker')}, "
                f"{self.data.size:,} training samples; {config.optimizer}, {in_texts(str(coded.code))}, "
                f"{coded.compressor}: an order of {order} and an answer of {answer} per step and worker")

    @property
    def columns(self) -> list[str]:
        """Names of what :meth:`row` returns."""
        times = [f"{which}seconds_{phase}" for phase in PHASES for which in ("", "min_", "max_")]
        return ["step", "epoch", "lr", "loss", "val_loss", "val_accuracy", "sent_nbytes", "dense_nbytes", "late", "wrong",
                "not_finite", "seconds", *times]

    def epoch(self, step: int) -> int:
        """Return how often all samples have been drawn, on average, before step 0, 1, ..."""
        return step * self.config.batch * self.parts // self.data.size

    def samples(self, step: int, part: int) -> NDArray[np.int64]:
        """Return which samples a part of step 0, 1, ... has: a function of the seed and of these two."""
        own = self._shards[part]
        draw = np.random.default_rng((_DRAW, self.config.seed, step, part))
        chosen: NDArray[np.int64] = own[draw.choice(own.size, min(self.config.batch, own.size), replace=False)]
        return chosen

    def batch(self, step: int, part: int) -> "tuple[Tensor, Tensor]":
        """Return inputs and targets of these samples, where the model is."""
        inputs, targets = self.data.batch(self.samples(step, part), self.epoch(step))
        return inputs.to(self.device), targets.to(self.device)

    def step(self, step: int) -> None:
        """Take step 0, 1, ..., or this rank's part in it."""
        coded, made, spent = self.optimizer, machine_code.made, dict.fromkeys(self._seconds, 0.0)
        if coded.is_server:
            for group in coded.param_groups:
                group["lr"] = learning_rate(self.config, step + 1)
        began, waited = perf_counter(), coded.waited
        for part in coded.parts():
            before = perf_counter()
            inputs, targets = self.batch(step, part.number)
            spent["data"] += perf_counter() - before
            part.backward(self._loss_of(self.model(inputs), targets), samples=targets.numel())
        computed = perf_counter()
        coded.step()
        if not coded.is_server:
            return
        self.steps += 1
        self._losses.append(coded.loss)
        spent["all"] = perf_counter() - began
        spent["compute"] = computed - began - spent["data"]
        spent["communicate"] = coded.waited - waited
        spent["update"] = spent["all"] - (computed - began) - spent["communicate"]
        if machine_code.made > made:
            self.untimed_steps, self.untimed_seconds = self.untimed_steps + 1, self.untimed_seconds + spent["all"]
            return
        for name, seconds in spent.items():
            self._seconds[name] += seconds

    def row(self, *, evaluate: bool) -> dict[str, Any]:
        """Return one row of metrics; the loss is the mean since the row before, or that of it after no step."""
        coded = self.optimizer
        self._loss = float(np.mean(self._losses)) if self._losses else self._loss
        self._losses.clear()
        row = {"step": self.steps, "epoch": self.epoch(self.steps), "lr": learning_rate(self.config, self.steps),
               "loss": self._loss, "val_loss": None, "val_accuracy": None, "sent_nbytes": self._sent(),
               "dense_nbytes": self.steps * coded.coded.dense_nbytes // int(self.comm.Get_size()),
               **{name: coded.metrics[name] for name in ("late", "wrong", "not_finite")}, "seconds": self._seconds["all"]}
        if evaluate:
            every = np.arange(self.data.held_out_size)
            total, hits, count = evaluated(self.model, self.data, self._loss_of, every, self.device)
            row |= {"val_loss": total / count, "val_accuracy": None if self.data.labels is None else hits / count}
        return row | {f"{which}seconds_{phase}": self._seconds[phase] for phase in PHASES for which in ("", "min_", "max_")}

    def _sent(self) -> int:
        """Return how much a rank has sent, on average: orders and answers."""
        coded = self.optimizer.coded
        return int(self._earlier_sent + (coded.sent_nbytes + coded.received_nbytes) / int(self.comm.Get_size()))

    def record(self) -> TrainConfig:
        """Return the options of what was built."""
        return replace(self.config, data=self.data.content)

    def position(self) -> dict[str, Any]:
        """Return what :meth:`go_on` needs besides the state in a checkpoint."""
        return {"seconds": dict(self._seconds), "untimed": [self.untimed_steps, self.untimed_seconds],
                "loss": [*self._losses], "row_loss": self._loss, "sent_nbytes": self._sent(),
                "ranks": int(self.comm.Get_size()), "data": self.data.content, "options": shaping(self.record())}

    def go_on(self, steps: int, position: dict[str, Any], policy: str) -> list[str]:
        """Restore the position after so many steps; return options that were others then.

        Raises
        ------
        DataError, ConfigError
            It was another run, or one of other ranks where `policy` is "exact".
        """
        config, ranks = self.config, int(self.comm.Get_size())
        if steps > config.steps:
            raise ConfigError(f"resume: {steps} steps are done, and steps={config.steps} are fewer; give it as many or "
                              "more, or another --out")
        if policy == "exact" and position["ranks"] != ranks:
            raise ConfigError(f"resume: step {steps} was saved by {counted(position['ranks'], 'rank')}, here there are "
                              f"{ranks}; pass --resume redistribute")
        if position["data"] != self.data.content:
            raise DataError(f"resume: the run that saved had other data ({position['data']}; here {self.data.content}); "
                            "give it the same, or another --out")
        then, now = choices.earlier(position["options"]), shaping(self.record())
        if lost := differences(then, {name: now.get(name) for name in sorted(choices.kept())}):
            raise ConfigError(f"resume: {lost[0]}; a run goes on with the model, data and optimizer that it has: give it "
                              "the same options, or another --out")
        if policy == "reset":
            self.optimizer.forget()
        self.steps, self._losses, self._loss = steps, list(position["loss"]), position["row_loss"]
        self._seconds |= position["seconds"]
        self.untimed_steps, self.untimed_seconds = position["untimed"]
        self._earlier_sent = position["sent_nbytes"]
        return differences(then, {name: value for name, value in now.items() if name not in choices.kept()})

    def fingerprint(self) -> int:
        """Return a hash of the parameters of this rank."""
        flat = self.optimizer.flat
        return crc32(np.ascontiguousarray(flat.kernels.fetch(flat.values)).data)

    def names(self) -> list[str]:
        """Return what workers are called."""
        several = len(set(self.hosts)) > 1
        return [f"rank {rank}" + f" on {self.hosts[rank]}" * several for rank in self.optimizer.coded.ranks]

    def summary(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the summary of the server at the end of a run."""
        coded, timed = self.optimizer, max(1, self.steps - self.untimed_steps)
        used = {name: value for name, value in asdict(self.record()).items() if value is not None}
        kept = ("loss", "val_loss", "val_accuracy", "sent_nbytes", "dense_nbytes", "seconds")
        return {
            "ranks": int(self.comm.Get_size()), "parameters": coded.flat.d, "steps": self.steps,
            **{name: row[name] for name in kept}, "seconds_per_step": row["seconds"] / timed,
            "phases_seconds_per_step": {name: row[f"seconds_{name}"] / timed for name in PHASES},
            "untimed_steps": self.untimed_steps, "untimed_seconds": self.untimed_seconds,
            **{name: coded.metrics[name] for name in ("late", "wrong", "not_finite")},
            "skipped_steps": coded.skipped_steps, "missing": list(coded.missing), **self._late(row["seconds"]),
            "parameters_crc32": self.fingerprint(), **self._made, "devices": self.devices,
            "optimizer": {"optimizer": f"{type(coded).__name__} of {type(coded.optimizer).__name__}",
                          "code": repr(coded.coded.code), "compressor": repr(coded.coded.compressor),
                          "order_compressor": repr(coded.coded.order_compressor)},
            "config": {name: str(value) if isinstance(value, Path) else value for name, value in used.items()},
        }

    def _late(self, seconds: float) -> dict[str, Any]:
        late, code = self.optimizer.lateness, self.optimizer.coded.code
        if late.n < 2 or not late.steps:
            return {}
        if (timed := self.steps - self.untimed_steps) and not self.optimizer.coded.dedicated:  # without kernels being loaded
            late.part_seconds = (self._seconds["data"] + self._seconds["compute"]) / timed / (code.s + 1)
        return {"lateness": said_of(late, late.lines(seconds, self.names(), s=code.s), self.optimizer.coded.ranks)}


def train_coded(comm: MpiComm, config: TrainConfig) -> dict[str, Any]:
    """Run one training with a code. All ranks call it; rank 0 returns its summary, the others which step they had last.

    Raises
    ------
    DataError, OptionError, ConfigError, DisagreementError
        On all ranks, before the first step, as :func:`mpi_ef.jobs.train.program.train`.
    SilenceError, NonFiniteError, DisagreementError
        On the server, in a step; a checkpoint of the last one that was finished is written before.
    """
    with announcing(comm):
        trainer = CodedTrainer(comm, config)
        run = CodedRun(comm, trainer.config, trainer.model, trainer.optimizer, trainer.position, trainer.go_on)
        try:
            summary = _train(trainer, run)
        finally:
            run.close()
        trainer.optimizer.leave(0)
        return summary


def _train(trainer: CodedTrainer, run: CodedRun) -> dict[str, Any]:
    config, coded = trainer.config, trainer.optimizer
    start = run.resume()
    if run.finished is not None:
        return run.finished
    if not coded.is_server:
        for step in coded.steps(config.steps):
            trainer.step(step)
        return {"steps": coded.done}
    with run.folder.writing():
        metrics = Metrics(config.out, trainer.columns, after=start, events=bool(config.tensorboard))
        write_whole(config.out / "config.toml", to_toml(trainer.record()))
    print(trainer.headline(), flush=True)
    progress, row = Progress(config.steps), dict[str, Any]()
    with closing(metrics):
        try:
            for step in coded.steps(config.steps):
                trainer.step(step)
                row = _after(trainer, run, metrics, progress) or row
                if run.ends_after(trainer.steps):
                    break
        except MpiEfError:
            run.save_last(trainer.steps)
            raise
    progress.close()
    if run.stopped is not None:
        return {"steps": trainer.steps, "stopped": run.stopped}
    summary = trainer.summary(row or trainer.row(evaluate=True))
    with run.folder.writing():
        save_lateness(config.out / DELAYS, coded.lateness)
        write_whole(config.out / PROOF, json.dumps(summary, indent=2) + "\n")
    print(table(summary), flush=True)
    return summary


def _after(trainer: CodedTrainer, run: CodedRun, metrics: Metrics, progress: Progress) -> dict[str, Any]:
    """Write and show a row, if it is time; return it."""
    config, step = trainer.config, trainer.steps
    evaluate = step == config.steps or step % config.eval_every == 0
    if not evaluate and step % config.log_every:
        return {}
    row = trainer.row(evaluate=evaluate)
    timed = step - trainer.untimed_steps
    with run.folder.writing():
        record(row, metrics, progress, step_seconds=row["seconds"] / timed if timed else None)
    return row
