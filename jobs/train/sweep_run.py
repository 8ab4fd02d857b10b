"""The run of a sweep: folders, rows, checkpoints, and what is said at the end.

Each training has a folder of its own in that of the sweep, with rows and a summary as of any other run; checkpoints are of
all together, after a step of all.
"""

import json
import sys
from contextlib import ExitStack, closing
from itertools import chain, repeat
from typing import Any
from zlib import crc32

from mpi_ef.comm.consensus import ranks_text
from mpi_ef.comm.protocol import MpiComm
from mpi_ef.errors import SilenceError, say
from mpi_ef.jobs.delays import FILE as DELAYS
from mpi_ef.jobs.delays import save_lateness
from mpi_ef.jobs.folder import RunFolder, by_first, write_whole
from mpi_ef.jobs.metrics import Metrics, Progress, announcing
from mpi_ef.jobs.options import to_toml
from mpi_ef.jobs.train.coded_run import CodedRun
from mpi_ef.jobs.train.config import FILES, PHASES, PROOF, TrainConfig
from mpi_ef.jobs.train.showing import line
from mpi_ef.jobs.train.sweep import Job, SweepTrainer, Together

__all__ = ["train_sweep"]

_COLUMNS = ["step", "epoch", "lr", "loss", "val_loss", "val_accuracy", "sent_nbytes", "dense_nbytes", "late", "seconds",
            *(f"{which}seconds_{phase}" for phase in PHASES for which in ("", "min_", "max_"))]


def train_sweep(comm: MpiComm, config: TrainConfig) -> dict[str, Any]:
    """Run the trainings of a sweep. All ranks call it; rank 0 returns their summaries by name, under "jobs".

    Raises
    ------
    DataError, OptionError, ConfigError, DisagreementError
        On all ranks, before the first step.
    SilenceError, NonFiniteError
        On rank 0, in a round; what was saved before is there to go on from.
    """
    with announcing(comm):
        trainer = SweepTrainer(comm, config)
        run = CodedRun(comm, trainer.config, trainer.models, Together(trainer.jobs), trainer.position, trainer.go_on)
        try:
            start = run.resume()  # what is wrong here is told on all ranks, which end by themselves
            by_first(comm, trainer.config.out, lambda: _prepare(trainer, run))
            with trainer.many:
                summary = _train(trainer, run, start)
        finally:
            run.close()
        trainer.many.leave(0)
        return summary


def _train(trainer: SweepTrainer, run: CodedRun, start: int) -> dict[str, Any]:
    if not trainer.is_server:
        return {"parameters_crc32": crc32(trainer.many.work().data)}
    if run.finished is None:
        return _decide(trainer, run, start)
    trainer.many.close(trainer.xs)
    return run.finished


def _prepare(trainer: SweepTrainer, run: CodedRun) -> None:
    """Refuse folders of trainings that hold something else, and clear them where the sweep begins. Local, of rank 0."""
    config = trainer.config
    for job in trainer.jobs:
        folder = RunFolder(run.alone, config.out / job.name)
        try:
            folder.refuse_others(FILES)
            folder.tidy(FILES)
            if config.resume == "no":
                folder.begin(PROOF, others=tuple(FILES), overwrite=config.overwrite)
        finally:
            folder.close()


def _decide(trainer: SweepTrainer, run: CodedRun, start: int) -> dict[str, Any]:
    """Train, on rank 0."""
    config, steps, progress = trainer.config, trainer.config.steps, Progress(trainer.config.steps)
    with ExitStack() as stack:
        with run.folder.writing():
            files = {job.name: stack.enter_context(closing(Metrics(config.out / job.name, _COLUMNS, after=start,
                                                                   events=bool(config.tensorboard))))
                     for job in trainer.jobs}
            write_whole(config.out / "config.toml", to_toml(trainer.record()))
        print(trainer.headline(), flush=True)
        ended = set(trainer.many.ended)
        while trainer.steps < steps:
            try:
                for job in trainer.run_to(_next_end(config, start, trainer.steps)):
                    _after(trainer, job, files[job.name], run, progress)
                for number in sorted(trainer.many.ended.keys() - ended):  # with a last row, for its summary and for reports
                    job = trainer.jobs[number]
                    _after(trainer, job, files[job.name], run, progress, last=True)
                ended |= trainer.many.ended.keys()
            except SilenceError:
                where = "checkpoints alone; go on with --resume redistribute, on the ranks that are left" \
                    if config.checkpoint_every else "the end alone; pass --checkpoint-every next time"
                say(sys.stderr, f"mpi-ef: trainings are saved at {where}\n")
                raise
            if run.ends_after(trainer.steps):
                break
    progress.close()
    missing = trainer.many.close(trainer.xs)
    if run.stopped is not None:
        return {"steps": trainer.steps, "stopped": run.stopped}
    summaries = trainer.summaries(missing)
    whole = {"jobs": summaries, **trainer.late()}
    with run.folder.writing():
        save_lateness(config.out / DELAYS, trainer.many.lateness)
        for name, summary in summaries.items():
            write_whole(config.out / name / PROOF, json.dumps(summary, indent=2) + "\n")
        write_whole(config.out / PROOF, json.dumps(whole, indent=2) + "\n")
    print(_table(trainer, whole, missing), flush=True)
    return whole


def _next_end(config: TrainConfig, start: int, step: int) -> int:
    """Return the step at which all trainings meet next, to be saved."""
    ends = [config.steps]
    if every := config.checkpoint_every:
        ends.append((step // every + 1) * every)
    if config.stop_after:
        ends.append(start + config.stop_after)
    return min(end for end in ends if end > step)


def _after(trainer: SweepTrainer, job: Job, metrics: Metrics, run: CodedRun, progress: Progress, *,
           last: bool = False) -> None:
    """Write and show a row of a training, if it is time, or its last one."""
    config, step = trainer.config, job.steps
    if last and job.row.get("step") == step and job.row["val_loss"] is not None:
        return
    evaluate = last or step == config.steps or step % config.eval_every == 0
    if not evaluate and step % config.log_every:
        return
    row = trainer.row(job, evaluate=evaluate)
    with run.folder.writing():
        metrics.write(row)
        if evaluate or progress.due():
            progress.show(step, f"{job.name}  {line(row)}", step_seconds=row["seconds"] * len(trainer.jobs) / max(1, step))


def _table(trainer: SweepTrainer, whole: dict[str, Any], missing: tuple[int, ...]) -> str:
    """Return what is said at the end."""
    summaries: dict[str, dict[str, Any]] = whole["jobs"]
    width, seconds = max(map(len, summaries)), sum(one["seconds"] for one in summaries.values())
    lines = [""]
    for name, one in summaries.items():
        right = "" if one["val_accuracy"] is None else f"  accuracy {100 * one['val_accuracy']:.2f} %"
        ended = "" if one["ended_at"] is None else f"  ended at step {one['ended_at']}: its gradient was not finite"
        losses = f"validation loss {one['val_loss']:.4f}  training loss {one['loss']:.4f}"
        lines.append(f"{name:<{width}}  {losses}{right}{ended}")
    metrics, steps = trainer.many.metrics, trainer.steps
    lines.append(f"time            {seconds:.1f} s, {1e3 * seconds / max(1, steps):.1f} ms per step of all; "
                 f"{metrics['rounds']:.0f} rounds, {metrics['waits']:.0f} with a wait, {metrics['late']:.0f} late answers")
    labels = chain(["who is slow"], repeat(""))
    lines += [f"{label:<16}{text}" for label, text in zip(labels, whole.get("lateness", {}).get("lines", []), strict=False)]
    lines += [f"missing         {ranks_text(missing)} at the end"] if missing else []
    return "\n".join([*lines, f"written to      {trainer.config.out}"])
