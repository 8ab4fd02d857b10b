"""Train a real model over MPI with compressed communication: ``mpiexec -n 2 mpi-ef train``."""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mpi_ef.errors import ConfigError, DataError
from mpi_ef.jobs import early, launch, survivors
from mpi_ef.jobs.config import option, parse, to_toml

if TYPE_CHECKING:
    from mpi_ef.jobs.interruptible import Interruptible
    from mpi_ef.jobs.metrics import Metrics, Progress
    from mpi_ef.jobs.trainer import Trainer

__all__ = ["PHASES", "TrainConfig", "learning_rate", "main", "train", "writing"]

# Parts of a step: load a batch; forward and backward; compress; wait for messages; apply messages; all else of the
# optimizer's step.
PHASES = ("data", "compute", "encode", "communicate", "decode", "update")


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run; every field is a flag and a key of the TOML file."""

    model: Literal["gpt", "mlp", "cnn"] = option("gpt", "gpt on text; mlp or cnn on scikit-learn's digits")
    text: Path | None = option(None, "UTF-8 text for the gpt; the help texts that come with Python when left out")
    split: Literal["shuffled", "by-label"] = option("shuffled", "how the digits are dealt to the ranks")
    steps: int = option(800, "optimizer steps")
    batch: int = option(16, "samples per rank and step")
    context: int = option(64, "characters per sample")
    layers: int = option(4, "blocks of the gpt")
    heads: int = option(4, "attention heads of the gpt")
    width: int = option(128, "width of the gpt")
    optimizer: Literal["adamw", "sgd", "onebit-adam", "zero-one-adam", "onebit-lamb", "lion", "signum", "ef21-muon",
                       "powersgd"] = option("adamw", "adamw, sgd: torch's on every rank, with a rule under it")  # fmt: skip
    lr: float = option(0.006, "peak learning rate; linear warm-up, then cosine to a tenth of it")
    warmup: int = option(40, "steps of linear warm-up")
    momentum: float = option(0.9, "of sgd")
    beta1: float | None = option(
        None, "momentum of Adam's kind; 0.9, but 0.5 for adamw when compressed, because feedback delays updates"
    )
    beta2: float = option(0.99, "of Adam's kind: weight of the past in the variance")
    weight_decay: float = option(0.1, "of the optimizer")
    rule: Literal["ef14", "ef21", "econtrol"] = option("ef14", "error-feedback rule")
    placement: Literal["update", "gradient"] = option(
        "update", "what is exchanged: the optimizer's update, or the gradient"
    )
    compressor: Literal["topk", "randk", "sign", "vote", "low-rank", "quantize", "identity"] | None = option(
        None, "identity exchanges everything; what the optimizer is made for when left out, topk for most"
    )
    ratio: float = option(0.01, "share of entries that topk and randk keep")
    block: int = option(1024, "entries that share a scale of sign")
    rank: int = option(4, "of low-rank")
    freeze: int = option(0, "steps of dense warm-up of the 1-bit optimizers; 0 waits until the variance has settled")
    local_steps: int = option(200, "steps of zero-one-adam after which the time between two exchanges doubles")
    overlap: bool = option(False, "let buckets travel during the backward pass; placement gradient, no clipping")
    per_parameter: bool = option(False, "topk keeps its share of every parameter, not of the whole model")
    values: Literal["full", "bf16", "fp16", "int8"] = option("bf16", "how kept or quantized values travel")
    eta: float | None = option(
        None, "strength of econtrol's feedback; 0.3 times the contraction constant when left out"
    )
    dense_steps: int = option(0, "first steps that exchange everything")
    clip: float = option(1.0, "largest norm of a rank's own gradient, before compression; 0 for no limit")
    seed: int = option(0, "of model, shards and order")
    log_every: int = option(10, "steps between rows of metrics")
    eval_every: int = option(100, "steps between validations")
    checkpoint_every: int = option(0, "steps between two checkpoints in the folder checkpoints of --out; 0 writes none")
    save_in_background: bool = option(False, "copy what is saved and write it while the training goes on")
    stop_after: int = option(
        0, "save and stop after so many steps of this launch, as a signal would; 0 goes on to the end"
    )
    keep: int = option(3, "how many of the last checkpoints stay")
    resume: Literal["no", "exact", "redistribute", "reset"] = option(
        "no",
        "go on from the newest checkpoint in --out, if there is one; the last two also with another number of ranks",
    )
    on_failure: Literal["stop", "shrink"] = option(
        "stop",
        "shrink goes on from the newest checkpoint with the ranks that are left when one dies; Open MPI with ULFM",
    )
    out: Path = option(Path("runs/train"), "folder for metrics.jsonl, metrics.csv, summary.json and config.toml")

    def __post_init__(self) -> None:
        """Refuse what would fail later, before MPI is started."""
        ones = (
            "keep",
            "steps",
            "batch",
            "context",
            "layers",
            "heads",
            "width",
            "block",
            "rank",
            "local_steps",
            "log_every",
            "eval_every",
        )
        zeros = (
            "checkpoint_every",
            "stop_after",
            "freeze",
            "warmup",
            "dense_steps",
            "seed",
            "lr",
            "weight_decay",
            "clip",
        )
        least = dict.fromkeys(ones, 1.0) | dict.fromkeys(zeros, 0.0)
        for name, limit in least.items():
            if not getattr(self, name) >= limit:  # also refuses NaN
                raise ConfigError(f"{name}={getattr(self, name)} is too small; the least is {limit:g}")
        for name in ("momentum", "beta1", "beta2"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise ConfigError(f"{name}={value} is not in [0, 1)")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if (self.stop_after or self.save_in_background) and not self.checkpoint_every:
            raise ConfigError("stop_after and save_in_background are about checkpoints; pass checkpoint_every as well")
        if self.on_failure == "shrink" and not self.checkpoint_every:
            raise ConfigError("on_failure=shrink goes on from a checkpoint; pass checkpoint_every as well")
        if self.overlap and self.clip:
            raise ConfigError("overlap sends gradients before their norm is known; pass clip=0 with it")
        if self.per_parameter and self.compressor not in (None, "topk"):
            raise ConfigError(f"per_parameter goes with compressor=topk; here it is {self.compressor}")
        if not 0.0 < self.ratio <= 1.0:
            raise ConfigError(f"ratio={self.ratio} is not in (0, 1]; 0.01 keeps one entry in a hundred")
        if self.width % self.heads:
            raise ConfigError(f"width={self.width} is not divisible by heads={self.heads}")
        if self.split == "by-label" and self.model == "gpt":
            raise ConfigError("split=by-label needs labels; take model=mlp or cnn")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, before MPI is started, then train on COMM_WORLD."""
    config = parse(TrainConfig, argv, prog="mpi-ef train", description=__doc__ or "")
    if config.checkpoint_every:
        early.note()

    def program(comm: Any) -> None:
        if config.on_failure == "shrink":
            survivors.check()
        import torch

        torch.set_flush_denormal(True)  # subnormal gradients, common under plain SGD, take several times as long
        attempts = survivors.Attempts()

        def attempt(comm: Any, failures: int) -> None:
            torch.set_num_threads(launch.threads_per_rank(comm))
            if config.on_failure == "shrink":
                attempts.begin(comm, failures)
            train(comm, config, attempts)

        if config.on_failure == "shrink":
            survivors.outlive(comm, attempt)
        attempt(comm, 0)
        if config.checkpoint_every:
            early.ignore()

    launch.run(program)


def train(comm: Any, config: TrainConfig, attempts: survivors.Attempts | None = None) -> dict[str, Any]:
    """Run one training and return its summary, the same on all ranks but for times. Collective.

    Rank 0 prints progress and writes ``metrics.jsonl``, ``metrics.csv``, ``config.toml`` and ``summary.json`` into
    ``config.out``.

    Raises
    ------
    DataError, OptionError, DisagreementError
        For unusable data or options, on all ranks.
    """
    from mpi_ef.jobs.interruptible import Interruptible
    from mpi_ef.jobs.metrics import announcing
    from mpi_ef.jobs.trainer import Trainer

    with announcing(comm):
        trainer = Trainer(comm, config)
        run = Interruptible(comm, config, trainer, attempts or survivors.Attempts())
        try:
            return _train(trainer, config, run)
        finally:
            run.close()


def _train(trainer: "Trainer", config: TrainConfig, run: "Interruptible") -> dict[str, Any]:
    from mpi_ef.jobs.metrics import Metrics, Progress

    root, start = trainer.comm.Get_rank() == 0, run.resume()
    metrics = None
    if root:
        with writing(config.out):
            metrics = Metrics(config.out, trainer.columns, after=start)
            (config.out / "config.toml").write_text(to_toml(config), encoding="utf-8")
        print(trainer.headline(), flush=True)
    progress = Progress(config.steps)
    row: dict[str, Any] = {}
    for step in range(start + 1, config.steps + 1):
        evaluate = step == config.steps or step % config.eval_every == 0
        logged = evaluate or step % config.log_every == 0
        trainer.step(watched=logged)
        if logged:
            row = trainer.row(evaluate=evaluate)
            timed = step - trainer.untimed_steps
            with writing(config.out):
                _record(row, metrics, progress, step_seconds=row["seconds"] / timed if timed else None)
        if run.ends_after(step):
            break
    if metrics is not None:
        progress.close()
        metrics.close()
    if run.stopped is not None:
        return {"steps": trainer.steps, "stopped": run.stopped}
    summary = _summary(trainer, config, row or trainer.row(evaluate=True))  # no row: there was nothing left to do
    if root:
        with writing(config.out):
            (config.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        print(_table(summary), flush=True)
    return summary


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what a file system refuses into one line. Local: only rank 0 writes these files."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror or error}; make room there, or give another --out") from error


def _record(
    row: dict[str, Any], metrics: "Metrics | None", progress: "Progress", *, step_seconds: float | None
) -> None:
    """Let rank 0 write a row, and show it when it was evaluated or there was nothing to see for a while."""
    if metrics is not None:
        metrics.write(row)
        if row["val_loss"] is not None or progress.due():
            progress.show(row["step"], _line(row), step_seconds=step_seconds)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of step 1, 2, ...: linear warm-up to `lr`, cosine to a tenth of it at the end."""
    if step <= config.warmup:
        return config.lr * step / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.55 + 0.45 * math.cos(math.pi * min(1.0, done)))


def _line(row: dict[str, Any]) -> str:
    from mpi_ef.jobs.metrics import in_bytes

    held_out = "" if row["val_loss"] is None else f"  val {row['val_loss']:.3f}"
    if row["val_accuracy"] is not None:
        held_out += f" ({100 * row['val_accuracy']:.1f} %)"
    saved = row["dense_nbytes"] / max(1, row["sent_nbytes"])
    return f"loss {row['loss']:.3f}{held_out}  sent {in_bytes(row['sent_nbytes'])} ({saved:.0f}x less than dense)"


def _summary(trainer: "Trainer", config: TrainConfig, row: dict[str, Any]) -> dict[str, Any]:
    timed = config.steps - trainer.untimed_steps
    phases = {name: row[f"seconds_{name}"] / max(1, timed) for name in PHASES}
    fingerprints = trainer.fingerprints()
    return {
        "ranks": trainer.comm.Get_size(), "parameters": trainer.optimizer.flat.d, "steps": config.steps,
        "loss": row["loss"], "val_loss": row["val_loss"], "val_accuracy": row["val_accuracy"],
        "sent_nbytes": row["sent_nbytes"], "dense_nbytes": row["dense_nbytes"],
        "seconds": row["seconds"], "seconds_per_step": row["seconds"] / max(1, timed), "phases_seconds_per_step": phases,
        "untimed_steps": trainer.untimed_steps, "untimed_seconds": trainer.untimed_seconds,
        "skipped_steps": trainer.optimizer.skipped_steps,
        "replicas_equal": len(set(fingerprints)) == 1, "parameters_crc32": fingerprints[0],
        "config": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()},
    }  # fmt: skip


def _table(summary: dict[str, Any]) -> str:
    from mpi_ef.jobs.metrics import in_bytes

    sent, dense = summary["sent_nbytes"], summary["dense_nbytes"]
    share = f"{dense / sent:.0f}x less, {100 * sent / dense:.2f} %" if sent else "one rank sends nothing"
    rows = [("validation loss", f"{summary['val_loss']:.4f}"), ("training loss", f"{summary['loss']:.4f}")]
    if summary["val_accuracy"] is not None:
        rows.append(("validation accuracy", f"{100 * summary['val_accuracy']:.2f} %"))
    rows += [
        ("bytes sent per rank", f"{in_bytes(sent)} (dense: {in_bytes(dense)}; {share})"),
        ("time", f"{summary['seconds']:.1f} s, {1e3 * summary['seconds_per_step']:.1f} ms per step"),
        *(
            (f"  {name}", f"{1e3 * value:.2f} ms per step")
            for name, value in summary["phases_seconds_per_step"].items()
        ),
        *_untimed(summary),
        ("steps skipped", str(summary["skipped_steps"])),
        ("replicas", "equal bit for bit" if summary["replicas_equal"] else "DIFFERENT"),
        ("written to", summary["config"]["out"]),
    ]
    return "\n".join(["", *(f"{name:<22}{value}" for name, value in rows)])


def _untimed(summary: dict[str, Any]) -> list[tuple[str, str]]:
    steps, seconds = summary["untimed_steps"], summary["untimed_seconds"]
    text = f"{seconds:.1f} s, {steps} step{'s' if steps > 1 else ''} in which kernels were compiled or loaded"
    return [("  not counted", text)] if steps else []


if __name__ == "__main__":
    main(sys.argv[1:])
