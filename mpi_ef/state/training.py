"""What is saved of a training, and how it is put back, on as many ranks or on others."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import sha256
from typing import Any, Protocol

import torch
from torch import nn

from mpi_ef.checkpoint.manifest import versions
from mpi_ef.comm.consensus import agree, gather_values
from mpi_ef.comm.protocol import Comm
from mpi_ef.documents import shown
from mpi_ef.errors import CheckpointError, DisagreementError, MpiEfError, OptionError, briefly, counted, shortage, told
from mpi_ef.optim.flat import FlatOptimizer
from mpi_ef.statetree import PER_RANK, REPLICATED

from .components import Component, Finish, ModelComponent, RandomComponent, component_of
from .reshard import EITHER, RestoreView, Snapshot, Stored
from .tree import Array, Filed

__all__ = ["POLICIES", "Storage", "Training"]

_log = logging.getLogger("mpi_ef.state")
FORMAT = 1
POLICIES = ("exact", "redistribute", "reset")
_SPARSE_MEANS = {"GatherMean", "TwoPhaseMean"}  # which of them follows from the number of ranks, and nothing is lost between
_OTHER = "build the training as it was, or start from nothing in another directory"


class Storage(Protocol):
    """The part of :class:`mpi_ef.checkpoint.Store` that :class:`Training` needs."""

    def save(self, comm: Comm, step: int, *, replicated: Mapping[str, Filed], per_rank: Mapping[str, Filed], document: Any,
             rank_document: Any) -> Any:
        """Write a checkpoint. Collective."""

    def save_async(self, comm: Comm, step: int, *, replicated: Mapping[str, Filed], per_rank: Mapping[str, Filed],
                   document: Any, rank_document: Any) -> Any:
        """Copy, and write in the background. Collective."""

    def newest(self, comm: Comm) -> Stored | None:
        """Return the newest checkpoint that can be read. Collective."""


class Training:
    """The complete state of a run, named once, then saved and resumed.

    ::

        training = Training(model=model, optimizer=optimizer, scheduler=scheduler, sampler=sampler)
        start = training.resume(store, comm)  # 0 when there is no checkpoint
        for step in range(start, steps):
            ...  # forward, backward, optimizer.step(), sampler.advance()
            training.save(store, comm, step + 1)

    Parameters
    ----------
    model : torch.nn.Module, optional
        Parameters, buffers and extra state.
    random : bool
        Whether the global generators of torch, numpy and python belong to it; those of GPUs once one was used.
    seed : int
        Of random numbers on ranks that a run did not have before.
    **parts
        By name: optimizers of this package, rules at work (`ErrorFeedback`), torch generators, and whatever has
        ``state_dict()`` and ``load_state_dict()`` of plain containers and tensors: torch optimizers and schedulers,
        `GradScaler`, `ShardedSampler`, `FeedbackHook`, your own. None is no part.

    Attributes
    ----------
    document : object
        What the checkpoint from which it was resumed had as ``document=``; None before.
    notes : tuple of str
        What is not as it was, after resuming on another number of ranks.
    versions : dict of str to str
        Of the programs that wrote the checkpoint.

    Notes
    -----
    **What is written once, what by each rank.** Optimizers and rules say which of their arrays differ between ranks. Of
    everything else that is found out when saving, by a hash: a scaler that has backed off on one rank only, or BatchNorm
    statistics without synchronisation, are saved for each rank.

    **Another number of ranks.** ``policy="exact"`` refuses it. ``"redistribute"`` keeps what the rules rely on: errors,
    momenta and moments of a wrapped torch optimizer become the mean of the old ranks' on every new rank, added up in
    float64 in rank order; estimates become the aggregate, so that it is their mean to the last bit; residuals of chunks
    are re-cut; what belongs to clients moves with them. ``"reset"`` does the same and then sets errors, residuals and
    estimates to zero, as at the start. Both warn on rank 0 and leave what they have done in `notes`.

    An object of your own that has differed between ranks takes on rank r the state of old rank r mod their number, unless it
    has ``state_dict_from(states, rank, size)``, as `FeedbackHook` has: that returns what rank `rank` of `size` loads, given
    what ``state_dict()`` was on all old ranks, in rank order: mappings whose values are read at access.
    ``"reset"`` then calls ``forget()`` where there is one.

    **Precision.** Of parameters in 16 bits the float32 masters are saved.
    """

    def __init__(self, *, model: nn.Module | None = None, random: bool = True, seed: int = 0, **parts: Any) -> None:
        self._model, self._random, self.seed = model, random, seed
        self._values = {name: part for name, part in parts.items() if part is not None}
        self.document: Any = None
        self.notes: tuple[str, ...] = ()
        self.versions: dict[str, str] = {}

    def _parts(self, comm: Comm) -> dict[str, Component]:
        """Return the parts by name, the model first: what optimizers derive from parameters comes after them."""
        if "document" in self._values:
            raise OptionError("Training: document is no name for a part; pass it to save(), or take another name")
        parts = {name: component_of(name, value) for name, value in sorted(self._values.items())}
        flat = {name: value for name, value in self._values.items() if isinstance(value, FlatOptimizer)}
        named: dict[str, Component] = {"model": ModelComponent(self._model, flat)} | parts
        return named | ({"random": RandomComponent(comm)} if self._random else {})

    def save(self, store: Storage, comm: Comm, step: int, *, document: Any = None, background: bool = False) -> None:
        """Write a checkpoint after so many steps, between two steps. Collective.

        Parameters
        ----------
        store : Store
        comm : MPI.Comm
            The one the optimizer has.
        step : int
            Completed steps: what :meth:`resume` returns.
        document : object, optional
            Plain containers and tensors of your own: the position in a metrics file, the configuration.
        background : bool
            Copy everything and write it while the training goes on, see :meth:`Store.save_async`; the checkpoint counts
            after ``store.finish(comm)``, which the next save calls as well.

        Raises
        ------
        OptionError, DtypeError
            A part of a type that is not stored; ranks where everything is fine raise `PeerError`.
        DisagreementError
            On all ranks, when their parts or steps differ.
        CheckpointError
            On all ranks, when it could not be written.
        """
        snapshot, parts = Snapshot(), {}

        def facts() -> dict[str, object]:
            parts.update(self._parts(comm))
            if errors := _tried(partial(part.collect, snapshot) for part in parts.values()):
                raise errors[0]
            snapshot.add("document", document, EITHER)
            shared = repr((snapshot.trees[REPLICATED], sorted(snapshot.trees[PER_RANK])))
            return {"step": step, "seed": self.seed, "parts": sorted(parts),
                    "what is replicated": sha256(shared.encode()).hexdigest()[:16],
                    "what is there": sorted(snapshot.trees[EITHER])}

        agree(comm, "Training.save", facts, "save the same training after the same step on all ranks")
        snapshot.decide(comm.allgather(snapshot.undecided()))
        shared = {"format": FORMAT, "seed": self.seed, "versions": _versions(), "values": snapshot.trees[REPLICATED],
                  "parts": {name: part.identity() for name, part in parts.items()}}
        write = store.save_async if background else store.save
        write(comm, step, replicated=snapshot.arrays[REPLICATED], per_rank=snapshot.arrays[PER_RANK], document=shared,
              rank_document={"values": snapshot.trees[PER_RANK]})

    def resume(self, store: Storage, comm: Comm, *, policy: str = "exact") -> int:
        """Put everything back from the newest checkpoint and return its step; 0 when there is none. Collective.

        Parameters
        ----------
        store : Store
        comm : MPI.Comm
            The one the optimizer has.
        policy : {"exact", "redistribute", "reset"}
            What to do when another number of ranks has written it, see :class:`Training`.

        Raises
        ------
        OptionError, ShapeError, DtypeError
            On all ranks, when the checkpoint is of another training or number of ranks; nothing was changed.
        CheckpointError, OutOfMemoryError
            When something in it could not be read or put back; ranks where all could be raise `PeerError`. Everything is as
            it was before then: until the end of the call there is a copy of it, in as much memory as this rank's parts have.
        """
        found = store.newest(comm)
        past = None if found is None else RestoreView(found, int(comm.Get_rank()), int(comm.Get_size()))
        parts, held = dict[str, Component](), list[_Held | None]()

        def facts() -> dict[str, object]:
            if not (isinstance(policy, str) and policy in POLICIES):
                raise OptionError(f"Training.resume: policy={briefly(policy)} is unknown; take one of {', '.join(POLICIES)}")
            if past is None:
                return {"policy": policy}
            parts.update(self._parts(comm))
            with _readable(past):
                _check(parts, past, policy)
            held.append(_Held.of(parts, past))
            return {"policy": policy, "step": past.found.step}

        agree(comm, "Training.resume", facts, "resume the same training from the same directory on all ranks" if past else
              "pass the same policy on all ranks")
        if past is None:
            return 0

        try:
            document, versions = self._put_back(comm, parts, past, forgets=policy == "reset" and _moves(past))
        except DisagreementError:  # ranks are in different calls
            raise
        except MpiEfError:  # on all ranks
            [before] = held
            if all(gather_values(comm, "Training.resume", before is not None)) and before is not None:
                before.put_back(parts)
            raise
        self.document, self.versions = document, versions
        self.notes = (_ABOUT[policy], *past.notes) if _moves(past) else ()
        if self.notes and comm.Get_rank() == 0:
            here = f"{past.size}{' on other nodes' * past.other_nodes}"
            warnings.warn(f"step {past.found.step} of {counted(past.found.world_size, 'rank')} goes on with {here}: "
                          f"{'; '.join(self.notes)}", RuntimeWarning, stacklevel=2)
        return past.found.step

    def _put_back(self, comm: Comm, parts: Mapping[str, Component], past: RestoreView, *,
                  forgets: bool) -> tuple[Any, dict[str, str]]:
        """Put all parts back, and return the document of the program and versions. Collective; raises on all ranks."""
        finishes, read = list[Finish](), list[Any]()

        def put_back() -> dict[str, object]:
            with _readable(past):
                finishes.extend(finish for part in parts.values() if (finish := part.restore(past)) is not None)
                read.extend((past.value("document"), dict(past.found.document["versions"])))
            if forgets:
                finishes.extend(_forgetting(parts, past))
            return {}

        agree(comm, "Training.resume", put_back, "resume from the same directory on all ranks")
        _finish(comm, past, parts, finishes)
        return read[0], read[1]


_ABOUT = {
    "redistribute": "errors and momenta are the mean over the old ranks, of robust rules none, estimates their aggregate, "
                    "residuals cut anew",
    "reset": "errors, residuals and estimates begin anew, momenta are the mean over the old ranks, of robust rules none",
}


class _Held:
    """A copy of the parts of a training on this rank: a checkpoint in memory, as :class:`Stored` has it."""

    def __init__(self, past: RestoreView, snapshot: Snapshot) -> None:
        snapshot.decide([dict.fromkeys(snapshot.trees[EITHER], value) for value in (b"0", b"1")])  # all are of a rank
        self.step, self.world_size, self._rank = past.found.step, past.size, past.rank
        self.document = {"values": snapshot.trees[REPLICATED], "seed": 0}
        self._trees, self._arrays = snapshot.trees[PER_RANK], {
            kind: {name: array.copy() for name, array in arrays.items()} for kind, arrays in snapshot.arrays.items()}

    @classmethod
    def of(cls, parts: Mapping[str, Component], past: RestoreView) -> "_Held | None":
        """Copy all parts; None where one of them cannot be saved at this moment. Local."""
        snapshot = Snapshot()
        try:
            for part in parts.values():
                part.collect(snapshot)
            return cls(past, snapshot)
        except Exception:
            return None

    def rank_document(self, rank: int) -> Any:  # noqa: ARG002
        return {"values": self._trees}

    def replicated(self, name: str) -> Array:
        return self._arrays[REPLICATED][name]

    def per_rank(self, name: str, rank: int) -> Array:  # noqa: ARG002
        return self._arrays[PER_RANK][name]

    def put_back(self, parts: Mapping[str, Component]) -> None:
        """Let all parts be as they were; tell of those that refuse their own state. Collective."""
        view = RestoreView(self, self._rank, self.world_size)
        for name, part in parts.items():
            try:
                if (finish := part.restore(view)) is not None:
                    finish()
            except Exception as error:  # the one that is on its way says why
                _log.warning("resume: %s cannot be put back as it was (%s); build it anew", name, shown(told(error)))


@contextmanager
def _readable(past: RestoreView) -> Iterator[None]:
    """Raise `CheckpointError` for any error that the content of a checkpoint causes; show what it holds escaped."""
    try:
        yield
    except MpiEfError as error:
        error.args = (shown(error), *error.args[1:])
        raise
    except Exception as error:
        if short := shortage("resume", error):
            raise short from error
        raise CheckpointError(f"resume: the checkpoint at step {past.found.step} cannot be put back: "
                              f"{type(error).__name__}: {shown(error)}; resume from another one") from error


def _versions() -> dict[str, str]:
    known = versions() | {"torch": torch.__version__}
    return {name: known[name] for name in ("mpi_ef", "torch", "numpy", "python")}


def _moves(past: RestoreView) -> bool:
    """Tell whether ranks are others than those that have written, or on other nodes where that matters."""
    return past.other_nodes or not past.same_world


def _check(parts: Mapping[str, Component], past: RestoreView, policy: str) -> None:
    """Raise unless the checkpoint is of the same parts, and of as many ranks where the policy asks for it."""
    document, old, at = past.found.document, past.found.world_size, f"the checkpoint at step {past.found.step}"
    if document.get("format") != FORMAT:
        raise OptionError(f"resume: {at} has format {document.get('format')}; this version reads {FORMAT}; take the version "
                          "that wrote it")
    if policy == "exact" and not past.same_world:
        of = counted(old, "rank")
        raise OptionError(f'resume: step {past.found.step} was saved by {of}, here there are {past.size}; pass '
                          f'policy="redistribute" or "reset", or start {of}')
    saved = document["parts"]
    for name in sorted(saved.keys() ^ parts.keys()):
        has, misses = ("has", "here there is none") if name in saved else ("has no", "here there is one")
        raise OptionError(f"resume: {at} {has} {name}, {misses}; {_OTHER}")
    for name, part in parts.items():
        theirs, mine = saved[name], part.identity()
        for fact in [*mine, *(theirs.keys() - mine.keys())]:
            if theirs.get(fact) != mine.get(fact) and not {theirs.get(fact), mine.get(fact)} <= _SPARSE_MEANS:
                subject = fact if name == "model" else f"{name}: {fact}"
                raise OptionError(f"resume: {at} has {subject} {theirs.get(fact, 'not at all')}, here it is "
                                  f"{mine.get(fact, 'not there')}; {_OTHER}")
        part.check(past)
    if policy == "exact" and past.other_nodes:
        raise OptionError(f"resume: ranks were on other nodes at step {past.found.step}, or one of the two plans knows of "
                          'none; pass policy="redistribute" or "reset", or start them as they were')


def _forgetting(parts: Mapping[str, Component], past: RestoreView) -> Iterator[Finish]:
    """Note the parts that are reset, and yield the calls that do it once everything is put back."""
    for name, part in parts.items():
        if (forget := part.forget()) is not None:
            past.notes.append(f"{name} starts without errors and estimates")
            yield forget


def _tried(actions: Iterable[Callable[[], None]]) -> list[Exception]:
    """Call all actions, which may be collective, also after one has failed, and return their errors."""
    errors: list[Exception] = []
    for action in actions:
        try:
            action()
        except Exception as error:
            errors.append(error)
    return errors


def _finish(comm: Comm, past: RestoreView, parts: Mapping[str, Component], finishes: list[Finish]) -> None:
    """Do what may be collective, and see that what was put back is a state."""
    errors = _tried(finishes)

    def facts() -> dict[str, object]:
        for error in errors:
            if isinstance(error, MpiEfError):
                with _readable(past):
                    raise error
            raise OptionError(f"resume: load_state_dict: {type(error).__name__}: {shown(error)}") from error
        with _readable(past), suppress(MpiEfError):
            for part in parts.values():  # what is of a wrong type cannot be saved again
                part.collect(Snapshot())
        return {}

    agree(comm, "Training.resume", facts, "resume the same training on all ranks")
