"""A folder of checkpoints: saving, at once or in the background, and finding the newest valid one."""

import logging
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mpi_ef.comm.consensus import agree, together
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import CheckpointError, OptionError, briefly, everywhere

from .checksum import whole_checksum
from .dtypes import dtype_name
from .extents import Extent, StagingBuffer, layout
from .folder import Folder, identity
from .manifest import FORMAT, VERSION, checked_json, committed_steps, damaged_steps, rank_name
from .rankfile import FileEntry, write_rank_file
from .reader import Checkpoint
from .source import Array, pieces_of

__all__ = ["Pending", "Store"]

Arrays = Mapping[str, Array]
T = TypeVar("T")
_log = logging.getLogger("mpi_ef.checkpoint")


class Store:
    """Checkpoints of a run in a folder that all ranks see, one directory per step. Construction is local.

    A checkpoint becomes valid when its directory gets its name; a process that is killed leaves valid ones unchanged. One
    job at a time writes to a folder; any number may read.

    Parameters
    ----------
    folder : path
        Created when something is saved.
    keep_last : int
        How many of the newest checkpoints stay; older ones are deleted after a new one has become valid.
    keep_every : int
        Checkpoints whose step is a multiple of this stay for ever; 0 for none.
    job : str
        Identity of the batch job that stays when it is requeued.
    restart : int
        How often that job was started again: a later start takes over the lock of an earlier one, from any host.

    Attributes
    ----------
    run : str
        Identity of the run; that of the checkpoint that `newest` or `at` returned last.
    """

    def __init__(self, folder: str | Path, *, keep_last: int = 3, keep_every: int = 0, job: str = "",
                 restart: int = 0) -> None:
        if keep_last < 1 or keep_every < 0:
            raise OptionError(
                f"Store: keep_last={keep_last}, keep_every={keep_every}; keep at least the last one, and every N-th or 0"
            )
        self.folder = Path(folder)
        self.run = uuid.uuid4().hex
        self._on_disk = Folder(self.folder, keep_last, keep_every, job, restart)
        self._staging = StagingBuffer()
        self._pending: Pending | None = None

    def claim(self, comm: Comm, *, new: bool = False) -> None:
        """Take the right to write to the folder, before anything else is written for the run. Collective over `comm`.

        Otherwise the first save takes it. Where a job on another host has it, this waits until that one gives a sign of
        life, a quarter of a minute, or none for two minutes: its host died, and the right is taken over.

        Parameters
        ----------
        comm : MPI communicator
        new : bool
            The run is a new one: refuse a folder that has checkpoints. They would count as newer than the first of this run.

        Raises
        ------
        CheckpointError
            On all ranks: another job writes there, the folder cannot be made, or has checkpoints.
        """

        def take() -> None:
            self._on_disk.claim(self.run, wait=True)
            if new and (steps := self.steps()):
                raise CheckpointError(f"{self.folder} has checkpoints of another run, up to step {steps[-1]}; resume "
                                      "from them, or take another folder")

        _on_root(comm, "Store.claim", take)

    def save(self, comm: Comm, step: int, *, replicated: Arrays, per_rank: Arrays, document: Any,
             rank_document: Any) -> Path:
        """Save the state of a step. Collective over `comm`.

        Sends a few hundred bytes per rank; writes 1/n of the replicated bytes and all of its own on every rank.

        Parameters
        ----------
        comm : MPI communicator
        step : int
            A checkpoint of the same step is replaced.
        replicated : mapping of str to array
            The same on all ranks, bit for bit, which is compared; every rank writes a part. Any layout in memory; or
            :class:`mpi_ef.checkpoint.source.Pieced`, of which two passes are made, one of them over the part.
        per_rank : mapping of str to array
            This rank's own; names and shapes may differ.
        document : JSON
            The same on all ranks; rank 0's is written.
        rank_document : JSON
            This rank's own.

        Returns
        -------
        Path
            The directory of the checkpoint, which the disk has now.

        Raises
        ------
        CheckpointError
            On all ranks together. The attempt is removed, and older checkpoints are unchanged.
        """
        pending = Pending(self, "Store.save", step, document, rank_document)
        self._start(comm, pending, replicated, per_rank, None)
        pending.write()
        return pending.finish(comm)

    def save_async(self, comm: Comm, step: int, *, replicated: Arrays, per_rank: Arrays, document: Any,
                   rank_document: Any) -> "Pending":
        """Copy the state of a step, and write it in the background. Collective over `comm`.

        Arrays may change as soon as this returns. A thread writes and makes no MPI call; the checkpoint becomes valid
        in `finish`, which is collective. One save is in flight: one that is still there is finished first. The copies
        take 1/n of the replicated bytes plus all of this rank's own, in memory that is kept for the next save.

        Parameters and errors are those of `save`; what fails in the background is raised by `finish`, or by the next save
        instead of saving, on all ranks.
        """
        pending = Pending(self, "Store.save_async", step, document, rank_document)
        self._start(comm, pending, replicated, per_rank, self._staging)
        pending.write_in_background()
        return pending

    def finish(self, comm: Comm) -> Path | None:
        """Wait for the save in flight, make it valid, delete what is not kept any more. Collective over `comm`.

        Returns
        -------
        Path or None
            Its directory; None when there was none in flight.

        Raises
        ------
        CheckpointError
            On all ranks together when one of them could not write.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        subject, disk = f"{pending.subject}, step {pending.step}", self._on_disk

        def undo() -> None:
            if comm.Get_rank() == 0:
                disk.abandon(pending.place)

        with _may_pass():
            entries = together(comm, subject, pending.result, undo)
            _on_root(comm, subject, lambda: disk.publish(pending.place, pending.step, self.run, pending.document, entries),
                     undo)
        pending.path = disk.path_of(pending.step)
        return pending.path

    def poll(self, comm: Comm) -> Path | None:
        """Do what `finish` does if all ranks have written their files; else, or with nothing in flight, return None.

        Collective over `comm`; costs an allgather of a byte while a save is in flight. Call it now and then: a checkpoint
        that is written but not finished does not count.
        """
        if self._pending is None:
            return None
        done = np.empty(comm.Get_size(), np.uint8)
        comm.Allgather(np.array([self._pending.done], np.uint8), done)
        return self.finish(comm) if done.all() else None

    def newest(self, comm: Comm) -> Checkpoint | None:
        """Return the newest checkpoint whose every byte is what was written, None when there is none. Collective.

        Rank 0 lists the folder; the ranks share the work of reading all files. A damaged checkpoint gets a file
        ``BAD`` with the reason, and is skipped from then on.

        Raises
        ------
        CheckpointError
            On all ranks: the newest one cannot be read at all, or only by a newer mpi_ef. An older one is not taken then,
            as that might be repaired; put a file ``BAD`` into its directory to pass it over. Or all there are, are damaged,
            or of runs that have not written here.
        """
        rejected: set[str] = set()

        def candidate() -> str | None:
            for _, path in reversed(committed_steps(self.folder)):
                if path.name not in rejected and self._on_disk.opens(path):
                    return path.name
            if count := len(rejected | {path.name for path in damaged_steps(self.folder)}):
                raise CheckpointError(f"{self.folder}: of {count} checkpoints none is whole; see mpi-ef checkpoint verify, "
                                      "and move the folder away to start from nothing")
            if steps := self.steps():
                raise CheckpointError(f"{self.folder}: RUNS names no run that has written the checkpoints there, up to step "
                                      f"{steps[-1]}; remove RUNS if they are of this run, else move them away")
            return None

        while True:
            name = _on_root(comm, "Store.newest", candidate)
            if name is None:
                return None
            checkpoint, problems = self._verified(comm, "Store.newest", name)
            if not problems:
                return checkpoint
            rejected.add(name)

    def at(self, comm: Comm, step: int) -> Checkpoint:
        """Return the checkpoint of `step`, after reading all of it. Collective over `comm`.

        Raises
        ------
        CheckpointError
            On all ranks: there is none, or it is damaged.
        """
        subject = f"Store.at, step {step}"
        found = _on_root(comm, subject, lambda: self._on_disk.name_at(step))
        checkpoint, problems = self._verified(comm, subject, found)
        if problems:
            text = f"{subject}: {checkpoint.path} is damaged: {problems[0]}; use another checkpoint"
            raise everywhere(CheckpointError(text, damaged=True))
        return checkpoint

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints that were finished and not found damaged, in order. Local."""
        return [step for step, _ in committed_steps(self.folder)]

    def close(self) -> None:
        """Drop a save in flight, and let other jobs write to the folder. Local; also happens when the process ends."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()
            if pending.attributes["rank"] == 0:
                _log.warning("%s: the save of step %d was not finished, and is dropped", self.folder, pending.step)
                self._on_disk.abandon(pending.place)
        self._on_disk.release()

    def _start(self, comm: Comm, pending: "Pending", replicated: Arrays, per_rank: Arrays,
               staging: StagingBuffer | None) -> None:
        """Finish what is in flight, agree on what comes, make its directory."""
        self.finish(comm)
        rank, size = comm.Get_rank(), comm.Get_size()
        try:
            agree(comm, pending.subject, lambda: pending.prepare(replicated, per_rank, rank, size, staging),
                  "save the same replicated arrays everywhere")
        except Exception as raised:
            raise everywhere(CheckpointError(str(raised) or type(raised).__name__)) from raised
        with _may_pass():
            pending.place, self.run = _on_root(
                comm, pending.subject, lambda: (self._on_disk.make_directory(pending.step, self.run), self.run))
        pending.attributes = {"format": FORMAT, "version": VERSION, "rank": rank, "world_size": size, "step": pending.step,
                              "run": self.run}
        self._pending = pending

    def _verified(self, comm: Comm, subject: str, name: str) -> tuple[Checkpoint, list[str]]:
        """Open a checkpoint on all ranks, and verify it together: each rank every n-th file."""
        rank, path, opened = comm.Get_rank(), self.folder / name, list[Checkpoint]()
        seen = identity(path)

        def share() -> list[str]:
            opened.append(checkpoint := Checkpoint(path))
            return list(checkpoint.verify_files(range(rank, checkpoint.world_size, comm.Get_size())))

        problems = [problem for theirs in together(comm, subject, share) for problem in theirs]
        if not problems:
            self.run = opened[0].run
        elif rank == 0:
            self._on_disk.mark(path, problems, seen)
        return opened[0], problems


@contextmanager
def _may_pass() -> Iterator[None]:
    """Say of an error that it is of the file system, and not of what is saved. Local."""
    try:
        yield
    except CheckpointError as error:
        error.may_pass = True
        raise


def _on_root(comm: Comm, subject: str, action: Callable[[], T], undo: Callable[[], None] = lambda: None) -> T:
    """Call `action` on rank 0 and return its result on all ranks, or raise its error on all. Collective."""
    results: list[Any] = together(comm, subject, lambda: None if comm.Get_rank() else action(), undo)
    result: T = results[0]
    return result


class Pending:
    """A save that has begun: its arrays are copied, its files are being written.

    Attributes
    ----------
    step : int
    path : Path or None
        The directory of the checkpoint, when it has become valid.
    """

    def __init__(self, store: Store, subject: str, step: int, document: Any, rank_document: Any) -> None:
        self.subject, self.step, self.document = subject, step, document
        self.path: Path | None = None
        self.place = ""
        self.attributes: dict[str, str | int] = {}
        self._store, self._rank_document = store, rank_document
        self._packed: list[tuple[Extent, Iterable[memoryview]]] = []
        self._entry: FileEntry | None = None
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    @property
    def done(self) -> bool:
        """Whether this rank has written its file, or failed to. Local."""
        return self._thread is None or not self._thread.is_alive()

    def finish(self, comm: Comm) -> Path:
        """Do what `Store.finish` does, when this save is the one in flight. Collective over `comm`."""
        if self._store._pending is self:  # noqa: SLF001
            self._store.finish(comm)
        if self.path is None:
            raise CheckpointError(f"{self.subject}, step {self.step}: it was dropped or has failed; save again")
        return self.path

    def prepare(self, replicated: Arrays, per_rank: Arrays, rank: int, size: int,
                staging: StagingBuffer | None) -> dict[str, object]:
        """Check and pack everything, in `staging` or in place; return what must be equal on all ranks. Local."""
        if type(self.step) is not int or not 0 <= self.step < 10**18:
            raise OptionError(f"{self.subject}: step={briefly(self.step)} is no number of a step; count from 0")
        shapes = [(name, dtype_name(array.dtype), array.shape) for name, array in sorted(replicated.items())]
        values = {f"the values of {name}": f"hash {whole_checksum(pieces_of(array)):08x}"
                  for name, array in sorted(replicated.items())}
        self.document = checked_json(self.subject, self.document) if rank == 0 else None
        self._rank_document = checked_json(self.subject, self._rank_document)
        extents = list(layout(replicated, per_rank, rank, size))
        if staging is not None:
            staging.clear(sum(extent.nbytes for extent, _ in extents))
        for extent, array in extents:
            data = pieces_of(array, extent.begin, extent.begin + extent.nbytes)
            self._packed.append((extent, data if staging is None else [staging.copy(data)]))
        nbytes = sum(array.nbytes for array in replicated.values())
        digest = sha256(repr(shapes).encode("utf-8", "backslashreplace")).hexdigest()
        return {"step": self.step,
                "replicated arrays": f"{len(shapes)} arrays of {nbytes} bytes (layout {digest[:8]})", **values}

    def write(self) -> None:
        """Write this rank's file; an error is kept for `result`. Makes no MPI call."""
        path = self._store.folder / self.place / rank_name(int(self.attributes["rank"]))
        try:
            self._entry = write_rank_file(path, self._packed, self.attributes, self._rank_document)
        except Exception as error:
            self._error = error

    def write_in_background(self) -> None:
        """Start a thread that writes."""
        self._thread = threading.Thread(target=self.write, name=f"checkpoint {self.step}")
        try:
            self._thread.start()
        except RuntimeError:  # no more threads for this process: the other ranks must not notice
            self._thread = None
            self.write()

    def wait(self) -> None:
        """Wait for the thread. Local."""
        if self._thread is not None:
            self._thread.join()

    def result(self) -> FileEntry:
        """Return what was written, or raise what went wrong. Local; waits for the thread."""
        self.wait()
        self._packed.clear()
        if self._entry is None:
            raise self._error or CheckpointError("nothing was written")
        return self._entry
