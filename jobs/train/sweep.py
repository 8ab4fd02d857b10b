"""Several trainings at once that differ in an option: rank 0 has their models and optimizers, all ranks compute gradients.

A gradient is a sum over samples of a step, which do not depend on how a scheme shares them out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from platform import node
from time import perf_counter
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mpi_ef.coded import GC, ManyTrainings
from mpi_ef.comm.consensus import agree
from mpi_ef.comm.protocol import MpiComm
from mpi_ef.errors import ConfigError, DataError, counted
from mpi_ef.jobs.delays import said_of
from mpi_ef.jobs.device import described, device_for, move_to
from mpi_ef.jobs.folder import by_first
from mpi_ef.jobs.metrics import in_bytes, made_here
from mpi_ef.jobs.train import choices
from mpi_ef.jobs.train.config import PHASES, TrainConfig, learning_rate
from mpi_ef.jobs.train.datasets import Dataset
from mpi_ef.jobs.train.models import cross_entropy
from mpi_ef.jobs.train.optimizers import build_inner
from mpi_ef.jobs.train.problem import build, differences, evaluated, shaping
from mpi_ef.jobs.train.scheming import chosen_scheme
from mpi_ef.jobs.train.settings import swept
from mpi_ef.jobs.train.texts import in_texts, naming_texts
from mpi_ef.optim.parts import Statistics, alone_at_random, seed_of
from mpi_ef.vectors import FlatParameters

__all__ = ["Job", "SweepTrainer", "Together"]

_DRAW = 0x5EE9  # of the random numbers that draw batches
Vector = NDArray[Any]


class Job:
    """One of the trainings, as rank 0 has it. All is local."""

    def __init__(self, name: str, config: TrainConfig, model: nn.Module) -> None:
        self.name, self.config, self.model = name, config, model
        self.optimizer, self.flat = build_inner(config, model), FlatParameters(model.parameters())
        self.steps, self.losses, self.loss = 0, list[float](), 0.0
        self.row: dict[str, Any] = {}

    def step(self, g: Vector, loss: float) -> None:
        """Take a step with the mean gradient."""
        flat, clip = self.flat, self.config.clip
        flat.gradients[:] = flat.kernels.place(g)
        if clip and (norm := float(flat.kernels.norm(flat.gradients))) > clip:
            flat.gradients *= flat.dtype.type(clip / norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.steps + 1)
        with flat.lent():
            self.optimizer.step()
        flat.write_back()
        self.steps += 1
        self.losses.append(loss)

    def values(self) -> Vector:
        """Return the parameters, (d,), on the host."""
        values: Vector = self.flat.kernels.fetch(self.flat.values)
        return values


class Together:
    """The optimizers of all trainings as one, for a checkpoint."""

    def __init__(self, jobs: list[Job]) -> None:
        self._jobs = jobs

    def state_dict(self) -> dict[str, Any]:
        """Return what each of them returns. Local."""
        return {str(number): job.optimizer.state_dict() for number, job in enumerate(self._jobs)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` has returned. Local."""
        for number, job in enumerate(self._jobs):
            job.optimizer.load_state_dict(state[str(number)])


class SweepTrainer:
    """One rank's part of a sweep. Construction is collective, all else is local.

    Attributes
    ----------
    config : TrainConfig
        All options that apply; with ``code="auto"`` the scheme that was chosen.
    jobs : list of Job
        The trainings. Of rank 0, elsewhere empty.
    many : ManyTrainings
    """

    def __init__(self, comm: MpiComm, config: TrainConfig) -> None:
        self.comm, self.names, self.is_server = comm, list(swept(config)), int(comm.Get_rank()) == 0
        self._each, config = [each.resolved() for each in swept(config).values()], config.resolved()
        self.workers = int(comm.Get_size()) - bool(config.dedicated)
        seeds = list(dict.fromkeys(each.seed for each in self._each))

        def facts() -> dict[str, object]:
            if self.workers < 1:
                raise ConfigError("dedicated=True on one rank leaves no worker; start more ranks")
            built = {seed: build(replace(self._each[0], seed=seed)) for seed in seeds}
            self._data: dict[int, Dataset] = {seed: found[0] for seed, found in built.items()}
            data, self.model, *loss = built[seeds[0]]
            self.data, self._loss_of = data, loss[0] if loss else cross_entropy
            if config.data not in (None, data.content):
                raise DataError(f"data={config.data}, but here there are {data.content}; give the same, or leave the option "
                                "out")
            if Statistics("train", self.model).count:
                raise ConfigError(f"sweep={config.sweep}: the model has running statistics, such as BatchNorm's, which are "
                                  "not exchanged; take another norm, or code=fr:1 for one training after the other")
            self.flat = FlatParameters(self.model.parameters())
            if self.flat.mixed:
                raise ConfigError(f"sweep={config.sweep}: parameters in 16 bits; take float32, or code=fr:1")
            options = {f"option {k}": v for k, v in asdict(config).items() if k not in ("text", "out", "profile")}
            return {"training samples": data.size, "their content": data.content, "parameters": self.flat.d, **options}

        agree(comm, "train", facts, "give every rank the same data and options")
        self.device = device_for(comm, config.device, "train")
        models = [build(each)[1] for each in self._each] if self.is_server else []
        together = nn.ModuleList([self.model, *models])
        move_to(together, self.device, comm, "train")
        self.flat = FlatParameters(self.model.parameters())
        self.jobs = [Job(*each) for each in zip(self.names, self._each, models, strict=True)] if models else []
        self.models = nn.ModuleList(models)
        self.devices, self.made = described(comm, self.device, self.flat.device), made_here(comm)
        self.hosts: list[str] = comm.allgather(node())
        self._spent = dict.fromkeys(("all", *PHASES), 0.0)
        self._loaded, self._drawn, self._earlier_sent = (-1, -1), np.empty(0, np.int64), 0.0
        self.sample_count = min(self.data.size, config.batch * self.workers)
        if config.code == "auto":
            config = replace(config, code=by_first(comm, config.out, lambda: self._chosen(config)), profile=None)
        self.config = config
        with naming_texts(str(config.code)):
            self.many = ManyTrainings(comm, self._gradient, len(self.names), self.flat.d, self.flat.dtype, str(config.code),
                                      samples=self.sample_count, extras=1, dedicated=bool(config.dedicated),
                                      patience_seconds=float(config.patience_seconds or 300.0))
        self.xs = np.array([job.values() for job in self.jobs])

    def _chosen(self, config: TrainConfig) -> str:
        """Return the scheme that would have been the fastest, and print why."""
        def part() -> float:
            began = perf_counter()
            x = self.flat.kernels.fetch(self.flat.values).copy()
            self._gradient(x, 0, range(min(config.batch, self.sample_count)), 0)
            return perf_counter() - began

        text, lines = chosen_scheme(Path(config.profile or ""), self.workers, len(self.names), lambda: min(
            part() for _ in range(3)), dedicated=bool(config.dedicated))
        print("\n".join(lines), flush=True)
        self._loaded, self._spent = (-1, -1), dict.fromkeys(self._spent, 0.0)
        return text

    def headline(self) -> str:
        """Return a line about models, data and the scheme."""
        many, whole = self.many, in_bytes(self.flat.d * self.flat.dtype.itemsize)
        most = many.scheme.vectors
        answer = "an answer of as much" if most == 1 else f"an answer of up to {most} times that"
        return (f"{self.config.model}: {counted(many.models, 'training')} of {self.flat.d:,} parameters at once "
                f"({', '.join(self.names)}); {counted(many.n, 'worker')}, {self.data.size:,} training samples; "
                f"{self.config.optimizer}, {in_texts(str(many.scheme))}: an order of {whole} and {answer} per round and "
                "worker")

    def epoch(self, step: int) -> int:
        """Return how often all samples have been drawn, on average, before step 0, 1, ..."""
        return step * self.sample_count // self.data.size

    def samples(self, job: int, step: int) -> NDArray[np.int64]:
        """Return which samples step 0, 1, ... of a training has: a function of its seed and of the step."""
        draw = np.random.default_rng((_DRAW, self._each[job].seed, step))
        chosen: NDArray[np.int64] = draw.choice(self.data.size, self.sample_count, replace=False)
        return chosen

    def _gradient(self, x: Vector, job: int, samples: range, step: int) -> tuple[Vector, list[float]]:
        flat, seed, began = self.flat, self._each[job].seed, perf_counter()
        if self._loaded != (job, step):
            flat.values[:] = flat.kernels.place(x)
            self._loaded, self._drawn = (job, step), self.samples(job, step)
        chosen = self._drawn[samples.start : samples.stop]
        inputs, targets = (part.to(self.device) for part in self._data[seed].batch(chosen, self.epoch(step)))
        loaded = perf_counter()
        flat.zero_gradients()
        with alone_at_random(self.device):
            torch.manual_seed(seed_of(seed, step, samples.start))
            loss = self._loss_of(self.model(inputs), targets) * chosen.size
            loss.backward()  # type: ignore[no-untyped-call]
        flat.collect_gradients()
        flat.spend_gradients()
        self._spent["data"] += loaded - began
        self._spent["compute"] += perf_counter() - loaded
        return flat.kernels.fetch(flat.gradients), [float(loss.detach())]

    def row(self, job: Job, *, evaluate: bool) -> dict[str, Any]:
        """Return one row of metrics of a training; times and bytes are its share of those of all, as of rank 0."""
        job.loss = float(np.mean(job.losses)) if job.losses else job.loss
        job.losses.clear()
        size, share = int(self.comm.Get_size()), 1 / len(self.jobs)
        nbytes = self.flat.d * self.flat.dtype.itemsize
        row = {"step": job.steps, "epoch": self.epoch(job.steps), "lr": learning_rate(job.config, job.steps),
               "loss": job.loss, "val_loss": None, "val_accuracy": None,
               "sent_nbytes": int(self._earlier_sent + self._traffic() * share / size),
               "dense_nbytes": job.steps * nbytes * 2 * (size - 1) // size, "late": self.many.metrics["late"],
               "seconds": self._spent["all"] * share}
        if evaluate:
            every = np.arange(self.data.held_out_size)
            total, hits, count = evaluated(job.model, self._data[job.config.seed], self._loss_of, every, self.device)
            row |= {"val_loss": total / count, "val_accuracy": None if self.data.labels is None else hits / count}
        others = ("data", "compute", "update")
        spent = self._spent | {"communicate": self._spent["all"] - sum(self._spent[name] for name in others)}
        job.row = row | {f"{which}seconds_{phase}": spent[phase] * share for phase in PHASES
                         for which in ("", "min_", "max_")}
        return job.row

    def _traffic(self) -> int:
        return self.many.sent_nbytes + self.many.rounds.received_nbytes

    def run_to(self, end: int) -> Iterator[Job]:
        """Make steps of all trainings until they have `end` of them; yield whose step was made."""
        began = perf_counter()
        for model, _, g, extras in self.many.run(self.xs, end - self.steps, self.steps):
            job, before = self.jobs[model], perf_counter()
            job.step(g, float(extras[0]) / self.sample_count)
            self.xs[model] = job.values()
            now = perf_counter()
            self._spent["update"] += now - before
            self._spent["all"] += now - began
            yield job
            began = perf_counter()  # what is written and evaluated is not of the training
        self._spent["all"] += perf_counter() - began

    @property
    def steps(self) -> int:
        """Steps that all trainings have made that have not ended. Of rank 0."""
        return max(job.steps for job in self.jobs)

    def record(self) -> TrainConfig:
        """Return the options of what was built."""
        return replace(self.config, data=self.data.content)

    def position(self) -> dict[str, Any]:
        """Return what :meth:`go_on` needs besides the state in a checkpoint."""
        return {"spent": dict(self._spent), "losses": [[*job.losses] for job in self.jobs],
                "row_losses": [job.loss for job in self.jobs], "steps": [job.steps for job in self.jobs],
                "sent_nbytes": self._earlier_sent + self._traffic() / len(self.jobs) / int(self.comm.Get_size()),
                "ended": [[model, step] for model, step in self.many.ended.items()],
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
        for job, losses, loss, done in zip(self.jobs, position["losses"], position["row_losses"], position["steps"],
                                           strict=True):
            job.losses, job.loss, job.steps = list(losses), loss, done
            job.flat.adopt()
        self.xs = np.array([job.values() for job in self.jobs])
        self.many.rounds.ended |= dict(position["ended"])
        self._spent |= position["spent"]
        self._earlier_sent = position["sent_nbytes"]
        return differences(then, {name: value for name, value in now.items() if name not in choices.kept()})

    def summaries(self, missing: tuple[int, ...]) -> dict[str, dict[str, Any]]:
        """Return the summary of each training, by its name, at the end of a run."""
        used = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self.record()).items()
                if value is not None}
        found, metrics = dict[str, dict[str, Any]](), self.many.metrics
        for number, job in enumerate(self.jobs):
            row = job.row or self.row(job, evaluate=True)
            kept = ("loss", "val_loss", "val_accuracy", "sent_nbytes", "dense_nbytes", "seconds", "late")
            option = self.names[number].partition("=")[0]
            config = used | {"compressor": "identity", option: getattr(job.config, option),
                             "out": str(self.config.out / job.name)}
            found[job.name] = {
                "ranks": int(self.comm.Get_size()), "parameters": self.flat.d, "steps": job.steps,
                **{name: row[name] for name in kept}, "seconds_per_step": row["seconds"] / max(1, job.steps),
                "phases_seconds_per_step": {name: row[f"seconds_{name}"] / max(1, job.steps) for name in PHASES},
                "ended_at": self.many.ended.get(number), "missing": list(missing), "rounds": metrics["rounds"],
                "waits": metrics["waits"], "parameters_crc32": crc32(job.values().data), **self.made,
                "devices": self.devices,
                "optimizer": {"optimizer": type(job.optimizer).__name__, "code": repr(self.many.scheme),
                              "compressor": "Identity()"},
                "config": config}
        return found

    def late(self) -> dict[str, Any]:
        """Return who was slow, for a summary."""
        late, scheme = self.many.lateness, self.many.scheme
        if late.n < 2 or not late.steps:
            return {}
        several, ranks = len(set(self.hosts)) > 1, range(self.many.dedicated, len(self.hosts))
        names = [f"rank {rank}" + f" on {self.hosts[rank]}" * several for rank in ranks]
        s = scheme.code(late.n).s if isinstance(scheme, GC) else None  # others finish jobs in later rounds
        return {"lateness": said_of(late, late.lines(self._spent["all"], names, s=s, steps="rounds"), ranks)}
