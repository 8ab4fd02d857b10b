"""What a model has that is not trained: workers of coded training are not sent it, and compute with what they have."""

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mpi_ef.buffers import broadcast_buffers
from mpi_ef.comm.consensus import agree
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import OptionError
from mpi_ef.vectors import FlatParameters
from mpi_ef.vectors.places import fingerprints

from .parts import is_statistic

__all__ = ["Untrained"]


class Untrained:
    """Notices that the server alone has changed it. Construction is collective, and makes buffers those of rank 0.

    Parameters that the optimizer does not train, its own and those of the model, and buffers that are saved with the model
    and are no running statistics. What a program writes between :meth:`check` and :meth:`settle` is not looked at: all ranks
    write it, as a function of the step. Cost: hashes of what was written to.

    Parameters
    ----------
    flat : FlatParameters
        Whose frozen parameters are the same on all ranks.

    Raises
    ------
    DisagreementError
        Parameters of the model that the optimizer does not have differ between ranks.
    """

    def __init__(self, subject: str, comm: Comm, model: object, flat: FlatParameters) -> None:
        self._subject, self._model, self._flat = subject, model if isinstance(model, nn.Module) else None, flat
        if self._model is not None:
            known = {id(p) for p in (*flat.parameters, *flat.frozen)}
            others = {name: p for name, p in self._model.named_parameters() if id(p) not in known and not is_lazy(p)}
            agree(comm, subject, lambda: {f"parameter {name}": f"{tuple(p.shape)} {p.dtype} {fingerprints([p])[0]:08x}"
                                          for name, p in others.items()},
                  "parameters of the model that the optimizer does not train are not exchanged: let them begin alike")
            broadcast_buffers(self._model, comm)
        self._written: dict[str, tuple[int, int]] = {}  # what changes when torch writes to it
        self._known: dict[str, int] = {}  # hashes
        self._look()
        self.settle()

    def _look(self) -> None:
        named = {} if self._model is None else self._model.state_dict(keep_vars=True)
        trained = {id(p) for p in self._flat.parameters}
        found = {name: t for name, t in named.items() if isinstance(t, Tensor) and not is_lazy(t) and not t.is_meta
                 and id(t) not in trained and not is_statistic(name, t)}
        there = {id(t) for t in found.values()}
        self._named = found | {f"frozen parameter {number}": p for number, p in enumerate(self._flat.frozen)
                               if id(p) not in there}

    def settle(self) -> list[str]:
        """Take it as it is now; return the names of what has other values than before. Local."""
        now = {name: (t._version, id(t)) for name, t in self._named.items()}  # noqa: SLF001
        written = [name for name in now if now[name] != self._written.get(name)]
        self._written = now
        if not written:
            return []
        hashes = dict(zip(written, fingerprints([self._named[name] for name in written]).tolist(), strict=True))
        changed = [name for name in written if self._known.get(name, hashes[name]) != hashes[name]]
        self._known |= hashes
        return changed

    def check(self, *, again: bool) -> None:
        """Raise where it is not what it was when it was settled; with `again` look which tensors there are. Local."""
        if again:
            self._look()
        if changed := self.settle():
            raise OptionError(f"{self._subject}: {changed[0]}, which is not trained, was changed on the server, and workers "
                              "go on with another one; write it on all ranks, before construction or at the beginning of "
                              "each turn of the loop")
