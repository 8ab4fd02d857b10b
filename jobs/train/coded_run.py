"""The folder of a run with a gradient code, its checkpoints, which the server alone writes, and when it stops."""

import os
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mpi_ef.checkpoint import Store
from mpi_ef.comm.protocol import MpiComm
from mpi_ef.documents import shown
from mpi_ef.errors import MpiEfError, say
from mpi_ef.jobs.folder import RunFolder, by_first
from mpi_ef.jobs.train.config import FILES, PROOF, TrainConfig
from mpi_ef.runtime import early_signals
from mpi_ef.runtime.stopper import SIGNALS, Stopper
from mpi_ef.state.training import Training

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CodedRun"]


class CodedRun:
    """As :class:`Interruptible`, of a run whose rank 0 saves alone. Construction and :meth:`resume` are collective.

    Parameters
    ----------
    comm : MPI.Comm
    config : TrainConfig
        All options that apply.
    model : torch.nn.Module
    optimizer : CodedOptimizer, or what has its state
    position : callable
        Returns what `go_on` needs.
    go_on : callable
        ``go_on(steps, position, policy)`` restores it, and returns what is not as it was.

    Attributes
    ----------
    alone : communicator
        Of this rank alone.
    stopped : str or None
        Why the run has stopped before its end. Of the server.
    finished : dict or None
        The summary of a run that was finished when this one was to go on with it.
    """

    def __init__(self, comm: MpiComm, config: TrainConfig, model: "nn.Module", optimizer: object,
                 position: Callable[[], dict[str, Any]], go_on: Callable[[int, dict[str, Any], str], list[str]]) -> None:
        self.comm, self.config, self._position, self._go_on = comm, config, position, go_on
        self.stopped: str | None = None
        self.finished: dict[str, Any] | None = None
        self.alone: Any = comm.Split(int(comm.Get_rank()))
        self._saved, self._last, self._claimed = -1, config.steps, False
        job, restart = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")
        restarts = int(restart) if restart.isdecimal() else 0
        self._store = Store(config.out / "checkpoints", keep_last=config.keep or 1, job=job, restart=restarts)
        self._stopper: Stopper | None = None
        if config.checkpoint_every:  # workers have one as well, and end when the server does
            end = os.environ.get("SLURM_JOB_END_TIME", "")
            signals = SIGNALS if threading.current_thread() is threading.main_thread() else ()
            self._stopper = Stopper(self.alone, signals=signals, deadline=float(end) if end.isdecimal() else None)
            if number := early_signals.pending():
                self._stopper.request(number)
        self._training = Training(model=model, optimizer=optimizer, seed=config.seed, random=False)
        try:
            self.folder = RunFolder(comm, config.out, job=job, restart=restarts)
        except BaseException:
            self._leave()
            raise

    def resume(self) -> int:
        """Put everything back to where the newest checkpoint was, and return its step; 0 without one. Collective.

        Raises
        ------
        DataError
            On all ranks: the run begins, and there is another one, or it cannot go on from there.
        """
        config, folder = self.config, self.folder
        folder.refuse_others(FILES)
        folder.tidy(FILES)
        if config.resume == "no":
            folder.begin(PROOF, others=tuple(FILES), overwrite=config.overwrite)
        start = by_first(self.comm, config.out, self._resume_alone)
        if start == config.steps and config.resume != "no":
            self.finished = folder.finished(PROOF)
        if self.finished is not None:
            return start
        if config.resume != "no" and not start:
            folder.begin(PROOF)
        folder.remove("requeue", PROOF)
        self._last = start + config.stop_after if config.stop_after else config.steps
        return start

    def _resume_alone(self) -> int:
        config = self.config
        if config.checkpoint_every:
            self._claim(new=config.resume == "no")
        if config.resume == "no":
            return 0
        start = self._training.resume(self._store, self.alone)
        changed = self._go_on(start, self._training.document, config.resume) if start else []
        self._saved = start or -1
        left = f"{config.steps - start} steps left" if start < config.steps else "nothing is left to do"
        print(f"resumed after step {start}; {left}" if start else "no checkpoint yet: starting from nothing", flush=True)
        for text in changed:
            print(f"not as in the run that saved: {shown(text)}", flush=True)
        return start

    def _claim(self, *, new: bool) -> None:
        self._claimed = True
        self._store.claim(self.alone, new=new)

    def _save(self, step: int, *, background: bool = False) -> None:
        self._training.save(self._store, self.alone, step, document=self._position(), background=background)
        self._saved = step

    def ends_after(self, step: int) -> bool:
        """Save after this step if it is time; return whether the run is to end here. Local, of the server."""
        config = self.config
        if self._stopper is None:
            return False
        self._store.poll(self.alone)
        ends = self._stopper.should_stop() or step == self._last
        if ends or step % config.checkpoint_every == 0:
            self._save(step, background=bool(config.save_in_background) and not ends)
        if not ends or step == config.steps:
            return False
        self.stopped = self._stopper.reason or f"after {config.stop_after} steps of this launch"
        with self.folder.writing():
            self._stopper.mark_requeue(config.out / "requeue", self.stopped)
        print(f"stopped after step {step}: {self.stopped}; go on with --resume exact", flush=True)
        return True

    def save_last(self, step: int) -> None:
        """Write a checkpoint of the last step that was finished, when the next one cannot be, and say so. Local."""
        if step < 1:
            return
        try:
            if not self._claimed:
                self._claim(new=False)
            if step != self._saved:
                self._save(step)
            self._store.finish(self.alone)
        except MpiEfError as error:
            say(sys.stderr, f"mpi-ef: step {step} could not be saved: {shown(error)}\n")
            return
        print(f"saved after step {step}; go on with --resume redistribute, on the ranks that are left", flush=True)

    def close(self) -> None:
        """Give signals and the folder back. Local."""
        self.folder.close()
        self._leave()

    def _leave(self) -> None:
        if self._stopper is not None:
            self._stopper.close()
        self._store.close()
