"""Train a real model over MPI with compressed communication: ``mpiexec -n 2 mpi-ef train``."""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpi_ef.comm.protocol import MpiComm
from mpi_ef.jobs.folder import write_whole
from mpi_ef.jobs.metrics import Metrics, Progress, announcing, made_here
from mpi_ef.jobs.options import parse, to_toml
from mpi_ef.jobs.train.config import PHASES, PROOF, TrainConfig
from mpi_ef.jobs.train.showing import record, table
from mpi_ef.jobs.visible import count_once
from mpi_ef.runtime import early_signals, launch, ulfm

if TYPE_CHECKING:
    from mpi_ef.jobs.train.loop import Trainer
    from mpi_ef.jobs.train.recovery import Interruptible

__all__ = ["main", "train"]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, before MPI is started, then train on COMM_WORLD."""
    config = parse(TrainConfig, argv, prog="mpi-ef train", description=__doc__ or "")
    count_once(os.environ)
    if config.checkpoint_every:
        early_signals.record()

    def program(comm: MpiComm) -> None:
        if config.on_failure == "shrink":
            ulfm.check()
        import torch

        torch.set_flush_denormal(True)  # subnormal gradients, common under plain SGD, take several times as long
        attempts = ulfm.Attempts()

        def attempt(comm: MpiComm, failures: int) -> None:
            torch.set_num_threads(launch.threads_per_rank(comm))
            if config.on_failure == "shrink":
                attempts.begin(comm, failures)
            train(comm, config, attempts)

        if config.on_failure == "shrink":
            ulfm.outlive(comm, attempt)
        attempt(comm, 0)
        if config.checkpoint_every:
            early_signals.ignore()

    launch.run(program)


def train(comm: MpiComm, config: TrainConfig, attempts: ulfm.Attempts | None = None) -> dict[str, Any]:
    """Run one training and return its summary, the same on all ranks but for times. Collective.

    With a code the server alone has that, see :func:`mpi_ef.jobs.train.coded.train_coded`.

    Rank 0 prints progress and writes ``metrics.jsonl``, ``metrics.csv``, ``config.toml`` and ``summary.json`` into
    ``config.out``. When a finished run is to go on and nothing is left to do, its files stay and its summary is returned.

    Raises
    ------
    DataError, OptionError, DisagreementError
        On all ranks, for unusable data or options; for a folder with another run, active or finished; for fewer steps than
        the run that is to go on has done.
    """
    if config.sweep is not None:
        from mpi_ef.jobs.train.sweep_run import train_sweep

        return train_sweep(comm, config)
    if config.code not in (None, "none"):
        from mpi_ef.jobs.train.coded import train_coded

        return train_coded(comm, config)
    from mpi_ef.jobs.train.loop import Trainer
    from mpi_ef.jobs.train.recovery import Interruptible

    with announcing(comm):
        trainer = Trainer(comm, config)
        run = Interruptible(comm, trainer, attempts or ulfm.Attempts())
        try:
            return _train(trainer, run)
        finally:
            run.close()


def _train(trainer: "Trainer", run: "Interruptible") -> dict[str, Any]:
    config = trainer.config  # all options that apply
    root, start = trainer.comm.Get_rank() == 0, run.resume()
    if run.finished is not None:
        return run.finished
    metrics = None
    if root:
        with run.folder.writing():
            metrics = Metrics(config.out, trainer.columns, after=start, events=bool(config.tensorboard))
            write_whole(config.out / "config.toml", to_toml(trainer.record()))
        print(trainer.headline(), flush=True)
    progress = Progress(config.steps)
    row: dict[str, Any] = {}
    with closing(metrics) if metrics is not None else nullcontext():
        for step in range(start + 1, config.steps + 1):
            evaluate = step == config.steps or step % config.eval_every == 0
            logged = evaluate or step % config.log_every == 0
            trainer.step(watched=logged)
            if evaluate:
                trainer.check_replicas()
            if logged:
                row = trainer.row(evaluate=evaluate)
                timed = step - trainer.untimed_steps
                with run.folder.writing():
                    record(row, metrics, progress, step_seconds=row["seconds"] / timed if timed else None)
            if run.ends_after(step):
                break
    if root:
        progress.close()
    if run.stopped is not None:
        return {"steps": trainer.steps, "stopped": run.stopped}
    summary = _summary(trainer, row or trainer.row(evaluate=True))  # no row: there was nothing left to do
    if root:
        with run.folder.writing():
            trainer.waiting.save(config.out)
            write_whole(config.out / PROOF, json.dumps(summary, indent=2) + "\n")
        print(table(summary), flush=True)
    return summary


def _summary(trainer: "Trainer", row: dict[str, Any]) -> dict[str, Any]:
    config = trainer.record()
    timed = config.steps - trainer.untimed_steps
    used = {name: value for name, value in asdict(config).items() if value is not None}
    phases = {name: row[f"seconds_{name}"] / max(1, timed) for name in PHASES}
    fingerprints = trainer.fingerprints()
    return {
        "ranks": trainer.comm.Get_size(), "parameters": trainer.optimizer.flat.d, "steps": config.steps,
        "loss": row["loss"], "val_loss": row["val_loss"], "val_accuracy": row["val_accuracy"],
        "sent_nbytes": row["sent_nbytes"], "link_nbytes": row["link_nbytes"],
        "nodes": trainer.optimizer.means()[0].nodes.count, "dense_nbytes": row["dense_nbytes"],
        "seconds": row["seconds"], "seconds_per_step": row["seconds"] / max(1, timed), "phases_seconds_per_step": phases,
        "untimed_steps": trainer.untimed_steps, "untimed_seconds": trainer.untimed_seconds,
        "skipped_steps": trainer.optimizer.skipped_steps,
        **trainer.rounds(), **_learned(trainer.optimizer), **_suspected(trainer),
        **_late(trainer, row["seconds"]),
        **({"own_parameters": True} if not getattr(trainer.optimizer, "synchronized", True) else {}),
        "replicas_equal": len(set(fingerprints)) == 1, "parameters_crc32": fingerprints[0],
        **made_here(trainer.comm), "devices": trainer.devices, "optimizer": trainer.optimizer.identity(),
        "config": {name: str(value) if isinstance(value, Path) else value for name, value in used.items()},
    }


def _learned(optimizer: Any) -> dict[str, Any]:
    """Return what a preconditioner has exchanged, in all launches, and when it was given up, if there is one. Local."""
    if (of := getattr(optimizer, "preconditioner", None)) is None:
        return {}
    nbytes = of.updates * of.plan.traffic.sent_nbytes
    return {"updates": of.updates, "fallen_back_at": of.fallen_back_at, "statistics_nbytes": nbytes}


def _suspected(trainer: "Trainer") -> dict[str, Any]:
    """Return how much each rank has been left out, where a robust rule says so. Collective."""
    from mpi_ef.jobs.train.suspects import suspicion_of

    found = suspicion_of(trainer.optimizer, trainer.comm)
    return {} if found is None else {"suspicion": found}


def _late(trainer: "Trainer", seconds: float) -> dict[str, Any]:
    """Return for whom ranks have waited in steps of so many seconds, where they meet. Collective."""
    own = trainer.position()["seconds"]
    return trainer.waiting.summary(seconds, own["data"] + own["compute"], rounds=bool(trainer.config.fragments))


if __name__ == "__main__":
    main(sys.argv[1:])
