"""Which samples each rank takes, where in an epoch a run is, and random numbers that differ between ranks.

A training script with all of it, which an interrupted run continues with ``sampler.load_state_dict(state)``::

    sampler = ShardedSampler(len(dataset), comm, batch=32, seed=seed)
    loader = DataLoader(dataset, batch_sampler=sampler, generator=generator_for(comm, seed), num_workers=2,
                        multiprocessing_context=loader_context(), persistent_workers=True)
    torch.manual_seed(seed)
    model = Model()  # the same on all ranks
    seed_rank(comm, seed)  # from here on, dropout and noise differ
    while sampler.epoch < epochs:
        for x, y in loader:
            ...  # forward, backward, optimizer.step()
            sampler.advance()
            # here sampler.state_dict() has exactly the samples that were used
"""

import multiprocessing
import random
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.context import ForkServerContext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from mpi_ef.comm.consensus import agree, check_not_freed
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import DataError, OptionError
from mpi_ef.ranges import whole

__all__ = ["ShardedSampler", "generator_for", "loader_context", "random_state", "rank_seed", "seed_rank",
           "set_random_state"]

Indices = NDArray[np.int64]

# First word of the spawn keys: streams for different purposes share no key, nor one with SeedSequence(seed).spawn(n).
_ORDER, _STREAM, _TORCH, _NUMPY, _PYTHON = (0x6D70_6965 + purpose for purpose in range(5))
_ODD = 0x9E37_79B1  # rank * _ODD mod 2^32 is different for each rank


class ShardedSampler(Sampler[list[int]]):
    """Batches of sample numbers for one rank, for ``DataLoader(dataset, batch_sampler=...)``.

    All ranks draw the same order of an epoch, a function of (seed, epoch), and deal it out in turn: this rank takes
    the places rank, rank + n, rank + 2n, ... So after every step all ranks together have used the first so many
    samples of the order, however many ranks there are; ``batch`` times n samples in a step are the same samples for
    every n. All ranks take equally many batches of equal sizes, so that none waits for another at the end of an epoch:

    * ``drop_last=False``: every sample is used. Where n does not divide what is left of the epoch, up to n - 1 samples
      from the beginning of its order are used again. Only the last batch may be shorter, on all ranks alike.
    * ``drop_last=True``: every batch is full, no sample is used twice. Up to batch * n - 1 samples at the end of the
      order are left out, other ones in each epoch when shuffled.

    **Where a run is.** A DataLoader with workers draws batches ahead, so batches that were drawn need not have been used.
    Therefore the loop calls :meth:`advance` after each batch. An iteration (``for ... in
    loader``) begins where :meth:`advance`, :meth:`set_epoch` or :meth:`load_state_dict` have led to; after the last
    batch that is the next epoch. A loop that calls none of them need not: when one iteration has run to its end and
    none of them was called since it began, the next one takes the next epoch. All this is right for DataLoaders that keep
    the order of the batches, as they do by default (not with ``in_order=False``).

    **Another number of ranks.** The place in the state counts samples of all ranks together. A run that goes on with
    other ranks, batch or drop_last uses every sample of the epoch that was not used yet, in the same order.

    Parameters
    ----------
    size : int
        Number of samples, at least one for every rank.
    comm : MPI.Comm
    batch : int
        Samples of this rank in a batch.
    shuffle : bool
        Otherwise the order is 0 ... size-1 in every epoch.
    seed : int
        Of the orders.
    drop_last : bool

    Attributes
    ----------
    epoch : int
        Epoch of the next batch to be used.
    position : int
        How many samples of that epoch all ranks together have used.

    Raises
    ------
    DisagreementError
        On all ranks, when they were given different arguments.
    DataError, OptionError
        Fewer samples than ranks, with ``drop_last`` fewer than a batch for each of them; numbers out of range.

    Notes
    -----
    Building one and loading a state is collective, everything else local, and to be done alike on all ranks. To draw
    an order takes 16 bytes for each of all samples; 8 bytes for each sample of this rank are kept. The orders are those
    of random words whose generator (PCG64) is fixed for all versions of NumPy: a run that goes on elsewhere sees the
    same.
    """

    def __init__(self, size: int, comm: Comm, *, batch: int, shuffle: bool = True, seed: int = 0,
                 drop_last: bool = False) -> None:
        super().__init__()
        check_not_freed(comm, "ShardedSampler")
        self.comm, self.ranks, self.rank = comm, int(comm.Get_size()), int(comm.Get_rank())
        self.shuffle, self.drop_last = bool(shuffle), bool(drop_last)
        self.epoch = self.position = 0
        self._moves = 0  # how often the place was set
        self._drawn_out: int | None = None  # _moves at the start of the last iteration that ran to its end

        def facts() -> dict[str, object]:
            self.size, self.batch = _whole(size, "size", 0), _whole(batch, "batch", 1)
            self.seed = _whole(seed, "seed", 0)
            self._check_size()
            return {name: getattr(self, name) for name in ("size", "batch", "shuffle", "seed", "drop_last")}

        agree(comm, "ShardedSampler", facts, "give all ranks the same data and options")

    def _check_size(self) -> None:
        if self.size < self.ranks:
            raise DataError(f"ShardedSampler: {self.size} samples for {self.ranks} ranks; use more data or fewer ranks")
        if self._batches_from(0) == 0:
            raise DataError(f"ShardedSampler: {self.size} samples are not a batch of {self.batch} for each of "
                            f"{self.ranks} ranks; use a smaller batch or drop_last=False")

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch, wherever the run is."""
        return self._batches_from(0)

    @property
    def batches_left(self) -> int:
        """Number of batches from where the run is to the end of the epoch; at least 1."""
        return self._batches_from(self.position)

    def _batches_from(self, position: int) -> int:
        left, step = self.size - position, self.batch * self.ranks
        return left // step if self.drop_last else -(-left // step)

    def __iter__(self) -> Iterator[list[int]]:
        """Return the batches of this rank from where the run is to the end of the epoch."""
        if self._drawn_out == self._moves:
            self._go_to(self.epoch + 1, 0)
        return self._draw(self._part(), self._moves)

    def _draw(self, part: Indices, moves: int) -> Iterator[list[int]]:
        for start in range(0, part.size, self.batch):
            yield part[start : start + self.batch].tolist()
        self._drawn_out = moves

    def _part(self) -> Indices:
        """Return what is left of the epoch for this rank."""
        left = self.size - self.position
        count = left // (self.batch * self.ranks) * self.batch if self.drop_last else -(-left // self.ranks)
        places = self.position + self.rank + self.ranks * np.arange(count, dtype=np.int64)
        places %= self.size  # the order begins again for the few that are missing
        return _order(self.size, self.seed, self.epoch)[places] if self.shuffle else places

    def advance(self, batches: int = 1) -> None:
        """Count this many more batches as used. Local; equally often on all ranks.

        After the last batch of an epoch the run is at the start of the next one. More batches than that go on through
        the next epochs: where only the number of steps was saved, ``advance(steps)`` on a new sampler of the same
        number of ranks and the same batch leads to the right place.

        Parameters
        ----------
        batches : int
            Not negative; more than 1 for example when gradients are accumulated over several.

        Raises
        ------
        OptionError
        """
        batches, epoch, position = _whole(batches, "batches", 0), self.epoch, self.position
        if batches >= self.batches_left:
            epochs, batches = divmod(batches - self.batches_left, len(self))
            epoch, position = epoch + 1 + epochs, 0
        self._go_to(epoch, position + batches * self.batch * self.ranks)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch, or stay in it when the run is there already. Local; alike on all ranks.

        For loops over ``range(sampler.epoch, epochs)``; a run that was resumed in the middle of the epoch stays there.

        Raises
        ------
        OptionError
        """
        epoch = _whole(epoch, "epoch", 0)
        self._go_to(epoch, self.position if epoch == self.epoch else 0)

    def _go_to(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        self._moves += 1

    def state_dict(self) -> dict[str, int | bool]:
        """Return where the run is, and of which data: the same on all ranks. Local."""
        return {name: getattr(self, name) for name in ("epoch", "position", "size", "shuffle", "seed")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where another run was, on any number of ranks; takes effect in the next iteration. Collective.

        Where less than a full batch for every rank is left and `drop_last` is set, that is the next epoch.

        Parameters
        ----------
        state : mapping
            What :meth:`state_dict` has returned, on any rank.

        Raises
        ------
        OptionError
            The state is none of a sampler, or of one with another size, seed or shuffle: then the rest of its epoch is
            not known here.
        DisagreementError
            On all ranks, when they were given different states.
        """

        def facts() -> dict[str, object]:
            for name, mine in self.state_dict().items():
                if name not in state:
                    raise OptionError(f"ShardedSampler: the state has no {name}; pass what state_dict() returned")
                if name not in ("epoch", "position") and state[name] != mine:
                    raise OptionError(f"ShardedSampler: {name} is {state[name]} in the state and {mine} here; build the "
                                      f"sampler with {name}={state[name]}")
            _whole(state["epoch"], "epoch", 0)
            if _whole(state["position"], "position", 0) >= self.size:
                raise OptionError(f"ShardedSampler: position={state['position']} in the state is beyond {self.size} "
                                  "samples; pass what state_dict() returned")
            return {name: int(state[name]) for name in ("epoch", "position")}

        agree(self.comm, "ShardedSampler", facts, "load the same checkpoint on all ranks")
        self._go_to(int(state["epoch"]), int(state["position"]))
        if self.batches_left == 0:
            self._go_to(self.epoch + 1, 0)


def _whole(value: Any, name: str, least: int, subject: str = "ShardedSampler") -> int:
    remedy = "len(dataset)" if name == "size" else f"a whole number from {least} on"
    return whole(subject, least, f"pass {remedy}", **{name: value})


def _order(size: int, seed: int, epoch: int) -> Indices:
    words = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(_ORDER, epoch))).random_raw(size)
    return np.argsort(words, kind="stable")


def _words(count: int, seed: int, *key: int) -> NDArray[np.uint32]:
    sequence = np.random.SeedSequence(_whole(seed, "seed", 0, "random numbers"), spawn_key=key)
    return sequence.generate_state(count).astype(np.uint32, copy=False)


def rank_seed(seed: int, rank: int, *, stream: int = 0) -> int:
    """Return a seed of 64 bits that differs between ranks, and between streams. Local.

    Torch's generator on the CPU uses the lower 32 bits alone, where random seeds of a few thousand ranks would
    collide now and then: here those bits differ between any two ranks of a stream.

    Parameters
    ----------
    seed, rank : int
        Not negative.
    stream : int
        Number of a purpose, where one rank needs several independent generators.

    Raises
    ------
    OptionError
    """
    return _rank_seed(seed, rank, _STREAM, stream)


def _rank_seed(seed: int, rank: int, *key: int) -> int:
    low = (int(_words(1, seed, *key)[0]) + rank * _ODD) % 2**32
    return int(_words(1, seed, *key, rank)[0]) << 32 | low


def generator_for(comm: Comm, seed: int, *, stream: int = 0) -> torch.Generator:
    """Return a new torch generator on the CPU whose numbers differ between ranks. Local.

    As ``DataLoader(generator=...)`` it makes the random numbers of worker processes (torch, numpy and python) differ
    between ranks: workers are seeded from it, by default from torch's global generator, which after
    ``torch.manual_seed(0)`` is the same everywhere, so that all ranks would augment alike.

    Parameters
    ----------
    comm : MPI.Comm
    seed, stream : int
        See :func:`rank_seed`.
    """
    check_not_freed(comm, "generator_for")
    return torch.Generator().manual_seed(rank_seed(seed, comm.Get_rank(), stream=stream))


def seed_rank(comm: Comm, seed: int) -> None:
    """Seed the global generators of torch, numpy and python of this rank, differently on every rank. Local.

    Build the model before, after ``torch.manual_seed(seed)``, if it is to begin with the same numbers on all ranks.

    Parameters
    ----------
    comm : MPI.Comm
    seed : int
        Not negative.
    """
    check_not_freed(comm, "seed_rank")
    rank = comm.Get_rank()
    torch.manual_seed(_rank_seed(seed, rank, _TORCH))
    np.random.seed(_words(8, seed, _NUMPY, rank))  # noqa: NPY002 - the global one is what libraries use
    random.seed(int.from_bytes(_words(8, seed, _PYTHON, rank).astype("<u4").tobytes(), "little"))


def random_state() -> dict[str, Any]:
    """Return the states of the global generators of torch, numpy and python. Local; differs between ranks.

    Those of GPUs, by their numbers, are part of it once the program has used one. Tensors, numbers, strings and dictionaries
    only: ``torch.load(..., weights_only=True)`` reads it.
    """
    version, words, spare = random.getstate()
    used = torch.cuda.default_generators if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    return {
        "torch": torch.get_rng_state(),
        # As signed numbers with the same bits, which every torch can store.
        "numpy": _mapped(np.random.get_state(legacy=False), np.ndarray,  # noqa: NPY002
                         lambda words: torch.from_numpy(words.view(f"i{words.itemsize}").copy())),
        "python": {"version": version, "words": torch.tensor(words), "spare": spare},
        **({"cuda": {str(number): generator.get_state() for number, generator in enumerate(used)}} if used else {}),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the global generators of torch, numpy and python where they were; those of GPUs that are here too. Local.

    Parameters
    ----------
    state : mapping
        What :func:`random_state` has returned, on this rank.

    Raises
    ------
    OptionError
        A part is missing; nothing was changed.
    """
    for name in ("torch", "numpy", "python"):
        if name not in state:
            raise OptionError(f"set_random_state: the state has no part {name}; pass what random_state() returned")
    python = state["python"]
    torch.set_rng_state(state["torch"].cpu())
    np.random.set_state(_mapped(state["numpy"], torch.Tensor,  # noqa: NPY002
                                lambda words: words.cpu().numpy().view(f"u{words.itemsize}")))
    if state.get("cuda") and torch.cuda.is_available():
        torch.cuda.init()  # type: ignore[no-untyped-call]
        for number, generator in enumerate(torch.cuda.default_generators):
            if str(number) in state["cuda"]:
                generator.set_state(state["cuda"][str(number)].cpu())
    random.setstate((python["version"], tuple(python["words"].tolist()), python["spare"]))


def _mapped(value: Any, kind: type, of: Callable[[Any], Any]) -> Any:
    """Return a nested dict with ``of(part)`` in the place of every part of a kind."""
    if isinstance(value, dict):
        return {name: _mapped(part, kind, of) for name, part in value.items()}
    return of(value) if isinstance(value, kind) else value


def loader_context() -> ForkServerContext:
    """Return the ``multiprocessing_context`` for a DataLoader with workers in an MPI program. Local.

    A process that has started MPI should not fork: some networks' registered memory and MPI's own threads do not
    survive it. Workers from a fork server have no MPI, and do not start it here. It requires:

    * The script runs its program under ``if __name__ == "__main__":``, because workers import it. An import of
      ``mpi4py.MPI`` outside is fine, a call of MPI is not.
    * The dataset can be pickled, and so can ``collate_fn`` and ``worker_init_fn``.
    * Call this before anything else in the process starts a fork server: there is only one, and what it imports first
      is decided when it starts.

    Pass ``persistent_workers=True`` as well: workers import torch when they start. For random numbers in workers
    see :func:`generator_for`. A run that goes on in the middle of an epoch sees the right samples there; what workers
    draw at random for them is not the same as it would have been.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mpi_ef.workers"])
    return context
