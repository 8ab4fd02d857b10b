"""Workers that compute the same, *twins*: what each has said, and who is wrong."""

from typing import NamedTuple

from .codes import FractionalRepetition, GradientCode, members

__all__ = ["Dispute", "Twins"]

_REMEMBERED = 64  # steps of which answers are compared, late ones too


class Dispute(NamedTuple):
    """Twins that have said different things.

    Attributes
    ----------
    step : int
    wrong, right : tuple of int
        Workers; without a majority both sides, `decided` is False then.
    decided : bool
    """

    step: int
    wrong: tuple[int, ...]
    right: tuple[int, ...]
    decided: bool


class Twins:
    """Compares hashes, of 16 bits, of what the workers of a group have computed. Local.

    Attributes
    ----------
    wrong : dict of int to int
        How often a worker was in the wrong, or in a dispute that is not decided.
    """

    def __init__(self, code: GradientCode, n: int) -> None:
        self._code, self._n = code, n
        self._compares = isinstance(code, FractionalRepetition) and code.s > 0
        self._said: dict[int, dict[int, dict[int, int]]] = {}  # by step and group: which workers, by what they said
        self.wrong: dict[int, int] = {}

    def note(self, i: int, step: int, said: int) -> list[Dispute]:
        """Note what a worker has said in a step; return what is wrong then."""
        if not isinstance(self._code, FractionalRepetition) or not self._compares:
            return []
        group = self._said.setdefault(step, {}).setdefault(self._code.group(i, self._n), {})
        group[said] = group.get(said, 0) | 1 << i
        if len(self._said) > _REMEMBERED:
            del self._said[min(self._said)]
        if len(group) == 1:
            return []
        right = max(group, key=lambda value: group[value].bit_count())
        disputes = []
        if 2 * group[right].bit_count() > self._code.s + 1:
            losers = [members(group.pop(value)) for value in list(group) if value != right]
            disputes = [Dispute(step, tuple(them), tuple(members(group[right])), True) for them in losers]
        elif sum(mask.bit_count() for mask in group.values()) == self._code.s + 1:
            first, *others = sorted(members(mask) for mask in group.values())
            disputes = [Dispute(step, tuple(j for side in others for j in side), tuple(first), False)]
        for dispute in disputes:
            for j in dispute.wrong + (() if dispute.decided else dispute.right):
                self.wrong[j] = self.wrong.get(j, 0) + 1
        return disputes

    def undecided(self, step: int) -> int:
        """Return the mask of workers whose answers are not to be used yet.

        Their twins have said something else and others may still decide; or fewer have said the same than `votes` asks for.
        """
        if not isinstance(self._code, FractionalRepetition):
            return 0
        mask = 0
        for group in self._said.get(step, {}).values():
            disputed = len(group) > 1 and sum(workers.bit_count() for workers in group.values()) <= self._code.s
            for workers in group.values():
                if disputed or workers.bit_count() < self._code.votes:
                    mask |= workers
        return mask
