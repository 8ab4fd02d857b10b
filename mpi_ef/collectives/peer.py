"""What a rank knows of another one: its round, and its vectors that are still to be used."""

from collections.abc import Sequence

from .late import Frame, Late

__all__ = ["NONE", "Peer", "listed"]

NONE = -1  # the round of a rank of which nothing is known


class Peer:
    """Another rank.

    Attributes
    ----------
    round : int
        What its last message has said.
    reaches : int
        That, or the round in which it was answered, to which it may have jumped since.
    told : int
        Of the vectors of this rank, the last one that was sent to it.
    asks : bool
        It has spoken since.
    heard : float
        When it has spoken last.
    ended, failed : bool
        Whether its last message was its final one, and whether an error was the reason.
    silent, named : bool
        Whether it has said nothing for long, and whether that was printed.
    newest, newest_round : Frame or None, int
        Its last vector that was finite.
    frames : dict of int to Frame
        By round, of those that are still to come here.
    """

    def __init__(self, rank: int, host: str, late: Late) -> None:
        self.rank, self.host, self._late = rank, host, late
        self.round = self.reaches = self.told = self.newest_round = NONE
        self.asks = self.ended = self.failed = self.named = self.silent = False
        self.heard: float = late.now()
        self.newest: Frame | None = None
        self.frames: dict[int, Frame] = {}

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"

    def keep(self, frame: Frame, first: int, last: int) -> None:
        """Keep a frame as its newest vector, and for its round where that is from `first` to `last`."""
        if self.newest is not None:
            self._late.drop(self.newest)
        self.newest, self.newest_round = frame, self.round
        self._hold(first, last)

    def enter(self, first: int, last: int) -> None:
        """Keep vectors of these rounds alone, and the newest one."""
        for passed in [number for number in self.frames if number < first]:
            self._late.drop(self.frames.pop(passed))
        self._hold(first, last)

    def _hold(self, first: int, last: int) -> None:
        if self.newest is not None and first <= self.newest_round <= last and self.newest_round not in self.frames:
            self.newest.users += 1
            self.frames[self.newest_round] = self.newest


def listed(peers: Sequence[Peer]) -> str:
    """Return "rank 3 on node1, rank 7 on node2", the first eight of them."""
    return ", ".join(map(str, peers[:8])) + (f" and {len(peers) - 8} more" if len(peers) > 8 else "")
