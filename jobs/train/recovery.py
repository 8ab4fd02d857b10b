"""What lets a run be interrupted: checkpoints, signals, deadlines, and going on from there."""

import os
import threading
from typing import Any

from mpi_ef.checkpoint import Store
from mpi_ef.comm.protocol import MpiComm
from mpi_ef.documents import shown
from mpi_ef.jobs.folder import RunFolder
from mpi_ef.jobs.train.config import FILES, PROOF
from mpi_ef.jobs.train.loop import Trainer
from mpi_ef.runtime import early_signals
from mpi_ef.runtime.stopper import SIGNALS, Stopper
from mpi_ef.runtime.ulfm import Attempts, all_are_here
from mpi_ef.state.training import Training

__all__ = ["Interruptible"]

_FAILURES = 100_000  # more than a launch has ranks


class Interruptible:
    """The folder of one training run, its checkpoints, and when it stops. Every method is collective.

    Without ``checkpoint_every`` and ``resume`` there are no checkpoints, and signals do what they always do. Construction
    takes the folder, see :class:`RunFolder`.

    Attributes
    ----------
    stopped : str or None
        Why the run has stopped before its end.
    finished : dict or None
        The summary of a run that was finished when this one was to go on with it: there is nothing to do, nor to write.
    """

    def __init__(self, comm: MpiComm, trainer: Trainer, attempts: Attempts) -> None:
        self.comm, self.trainer, self.attempts = comm, trainer, attempts
        self.config = config = trainer.config
        self.stopped: str | None = None
        self.finished: dict[str, Any] | None = None
        self._store = self._stopper = None
        self._policy: str = config.resume
        if attempts.last is not None and config.resume != "reset":
            self._policy = "redistribute"
        job, restart = os.environ.get("SLURM_JOB_ID", attempts.launch), os.environ.get("SLURM_RESTART_COUNT", "0")
        restarts = (int(restart) if restart.isdecimal() else 0) * _FAILURES + attempts.failures
        if config.checkpoint_every or config.resume != "no":  # without the first nothing is saved, and nothing kept
            self._store = Store(config.out / "checkpoints", keep_last=config.keep or 1, job=job, restart=restarts)
        if config.checkpoint_every:
            end = os.environ.get("SLURM_JOB_END_TIME", "")
            # Python lets only the main thread have signals, which is where programs run.
            signals = SIGNALS if threading.current_thread() is threading.main_thread() else ()
            self._stopper = Stopper(comm, signals=signals, deadline=float(end) if end.isdecimal() else None)
            if number := early_signals.pending() or attempts.asked:
                self._stopper.request(number)
        self._training = Training(model=trainer.model, optimizer=trainer.optimizer, seed=config.seed,
                                  changes=trainer.changes)
        try:
            self.folder = RunFolder(comm, config.out, job=job, restart=restarts)
        except BaseException:
            self._leave()
            raise

    def resume(self) -> int:
        """Put everything back to where the newest checkpoint was, and return its step; 0 without one.

        Of a finished run nothing is changed, see `finished`.

        Raises
        ------
        DataError, CheckpointError, ConfigError
            On all ranks: the run begins, and there is another one, or it cannot go on from there; nothing in the folder was
            changed then.
        """
        config, folder = self.config, self.folder
        folder.refuse_others(FILES)
        folder.tidy(FILES)
        if self._policy == "no":
            folder.begin(PROOF, others=tuple(FILES), overwrite=config.overwrite)
        if self._store is not None and config.checkpoint_every:  # before anything in the folder is changed
            self._store.claim(self.comm, new=self._policy == "no")
        start = self._resumed()
        if self.finished is not None:
            return start
        if self._policy != "no" and not start:
            folder.begin(PROOF)  # there may be a finished run without checkpoints
        folder.remove("requeue", PROOF)  # files of the end of a run
        if self._store is not None and self.attempts.last is None:
            stop = start + self.config.stop_after if self.config.stop_after else self.config.steps
            self.attempts.last = min(self.config.steps, stop)
        return start

    def _resumed(self) -> int:
        if self._store is None or self._policy == "no":
            return 0
        start = self._training.resume(self._store, self.comm, policy=self._policy)
        changed = self.trainer.go_on(start, self._training.document) if start else []
        if start:
            self.trainer.waiting.load(self.config.out)
        if start == self.config.steps:
            self.finished = self.folder.finished(PROOF)
        if self.finished is not None:
            changed = []  # nothing is done with it
        if self.comm.Get_rank() == 0:
            left = f"{self.config.steps - start} steps left" if start < self.config.steps else "nothing is left to do"
            print(f"resumed after step {start}; {left}" if start else "no checkpoint yet: starting from nothing", flush=True)
            for text in changed:
                print(f"not as in the run that saved: {shown(text)}", flush=True)
        return start

    def ends_after(self, step: int) -> bool:
        """Save after this step if it is time; return whether the run is to end here."""
        config = self.config
        if self._store is None or self._stopper is None:
            return False
        self._store.poll(self.comm)
        ends = self._stopper.should_stop() or step == self.attempts.last
        if ends or step % config.checkpoint_every == 0:
            if config.on_failure == "shrink":
                all_are_here(self.comm)  # so that nothing is saved that a death has spoiled
            background = bool(config.save_in_background) and not ends
            self._training.save(self._store, self.comm, step, document=self.trainer.position(), background=background)
            with self.folder.writing():
                self.trainer.waiting.save(config.out)
        if not ends or step == config.steps:
            return False
        self.stopped = self._stopper.reason or f"after {config.stop_after} steps of this launch"
        with self.folder.writing():
            self._stopper.mark_requeue(config.out / "requeue", self.stopped)
        if self.comm.Get_rank() == 0:
            print(f"stopped after step {step}: {self.stopped}; go on with --resume exact", flush=True)
        return True

    def close(self) -> None:
        """Give signals and the folder back."""
        self.folder.close()
        self._leave()

    def _leave(self) -> None:
        if self._stopper is not None:
            self._stopper.close()
            self.attempts.asked = self._stopper.asked
        if self._store is not None:
            self._store.close()
