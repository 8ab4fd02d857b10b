"""What an optimizer has sent, and how long that took."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from mpi_ef.collectives import Lateness, Plan
from mpi_ef.comm.consensus import OnAllRanks, SharedErrors
from mpi_ef.comm.protocol import Comm
from mpi_ef.feedback import ErrorFeedback, NodeFeedback
from mpi_ef.vectors import FlatParameters

from .handshake import Handshake

__all__ = ["BucketReport", "Channel", "Communicating"]

Channel = Plan | ErrorFeedback


@dataclass(frozen=True)
class BucketReport:
    """What an observed step says of a bucket.

    Attributes
    ----------
    step, bucket : int
    sent_nbytes, dense_nbytes : int
        Of this step, and of an uncompressed allreduce.
    lost : float or None
        ``||x - C(x)||^2 / ||x||^2`` of this rank's message; None in a dense step.
    norms : dict of str to float
        Of this rank's state.
    seconds : dict of str to float
        Of this step, by phase.
    """

    step: int
    bucket: int
    sent_nbytes: int
    dense_nbytes: int
    lost: float | None
    norms: dict[str, float]
    seconds: dict[str, float]


class Communicating(OnAllRanks, Optimizer, metaclass=SharedErrors):
    """A torch optimizer that exchanges through plans and rules, and counts their traffic."""

    built = "the building of an optimizer"

    comm: Comm
    flat: FlatParameters
    _handshake: Handshake
    _retired_nbytes: int  # of channels that are gone, and what travels outside of channels
    _retired_seconds: dict[str, float]

    def __repr__(self) -> str:
        """Return torch's text, after a line that says what is exchanged, and how. Local."""
        try:
            rules = [channel for channel in self.channels() if isinstance(channel, ErrorFeedback)]
        except AttributeError:  # not built yet, or not whole
            return super().__repr__()
        several = f", {len(rules)} buckets" if len(rules) > 1 else ""
        return f"{rules[0]}{several}\n{super().__repr__()}" if rules else super().__repr__()

    @property
    def is_watched(self) -> bool:
        """Whether hooks of torch's want to see a step, or its profiler."""
        hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        return bool(hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks or _profiler_enabled())

    @abstractmethod
    def channels(self) -> Sequence[Channel]:
        """Return the rules and plans through which this optimizer exchanges now. Local."""

    def note_loss(self, loss: Any) -> None:
        """Take note of this rank's loss in this step, where the optimizer goes by it; a closure's by itself. Local."""

    @property
    def sent_nbytes(self) -> int:
        """Bytes that have left this rank in all exchanges so far, see :class:`mpi_ef.collectives.Traffic`."""
        return self._retired_nbytes + sum(channel.sent_nbytes for channel in self.channels())

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of this rank in "encode", "communicate" and "decode", over all steps so far.

        Communicating includes waiting for the last rank at the beginning of each step.
        """
        spent = dict(self._retired_seconds)
        spent["communicate"] += self._handshake.waits.total
        for channel in self.channels():
            for name, seconds in channel.seconds.items():
                spent[name] += seconds
        return spent

    def lateness(self) -> Lateness:
        """Return how many seconds after the first one each rank has come to each step: who is slow. Collective.

        ::

            for line in optimizer.lateness().lines(seconds):  # rank 3 is last in 71 % of steps, by .52 s (median)
                print(line)

        A step begins with a message to all ranks, and each waits until the last has come. A row is a step, or a round of
        steps where ranks meet only at its end; not those in which a rank had no data (`join`), nor the first one since the
        optimizer was built. It is the same object each time; a call adds the rows since the last one, at most the last 4096.
        Empty where ranks do not meet.

        Cost of a step: a float32 of memory, the clock read once. Cost of a call: 4 bytes of each rank for each row.
        """
        return self._handshake.waits.gathered()

    @property
    def waited(self) -> tuple[int, float]:
        """How often this rank has met the others for :meth:`lateness`, and how many seconds it has waited the last time."""
        return self._handshake.waits.count, self._handshake.waits.last

    def plans(self) -> list[Plan]:
        """Return the plans of the channels. Local."""
        return [channel if isinstance(channel, Plan) else channel.plan for channel in self.channels()]

    def means(self) -> list[Plan]:
        """Return the plans of whole vectors: of nodes, where those of the channels are of slices. Local."""
        return [getattr(channel, "node", plan) for channel, plan in zip(self.channels(), self.plans(), strict=True)]

    def watch(self, watched: bool) -> None:
        """Let the next steps measure what compression loses, in passes of their own, or not. Local."""
        for plan in self.plans():
            plan.watched, plan.lost = watched, None

    @property
    def lost(self) -> float | None:
        """``||x - C(x)||^2 / ||x||^2`` of this rank's last watched step, mean over its exchanges; None in a dense one."""
        seen = [plan.lost for plan in self.plans() if plan.lost is not None]
        return sum(seen) / len(seen) if seen else None

    def crossed_nbytes(self, sent_nbytes: int) -> int:
        """Return how much has come over the link of a node, each way, when so many bytes have left this rank. Local.

        What has not gone through plans counts as dense means; what ranks of a node with :class:`NodeMean` tell each other,
        whole vectors where they share no memory, as nothing.
        """
        crossed = 0
        for channel, plan in zip(self.channels(), self.means(), strict=True):
            if isinstance(channel, NodeFeedback):
                through, each, all_of_it = channel.between_nbytes, channel.plan.traffic.sent_nbytes, channel.sent_nbytes
            else:
                through, each, all_of_it = plan.sent_nbytes, plan.traffic.sent_nbytes, plan.sent_nbytes
            if each:
                crossed += through * plan.link_traffic.nbytes // each
                sent_nbytes -= all_of_it
        return crossed + self.means()[0].nodes.crossing(0, max(0, sent_nbytes))

    @property
    def dense_nbytes(self) -> int:
        """Bytes that a bandwidth-optimal uncompressed allreduce of one gradient sends from every rank."""
        size = int(self.comm.Get_size())
        return 2 * (size - 1) * self.flat.values.nbytes // size
