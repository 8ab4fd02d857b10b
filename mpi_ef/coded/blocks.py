"""A gradient code where s + 1 does not divide n: blocks of repetition, and one cyclic block at the end."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mpi_ef.errors import OptionError, counted

from .codes import Coefficients, Cyclic, FractionalRepetition, GradientCode, mask_of

__all__ = ["Blocks", "code_for", "quorums"]

_MOST = 1e3  # of the amplification of a code that is taken unasked


@dataclass(frozen=True, repr=False)
class Blocks(GradientCode):
    """Blocks of s + 1 workers that repeat their parts, as `FractionalRepetition`, and the rest of the workers as `Cyclic`.

    Each worker computes s + 1 parts and any s may be missing, as with both, where neither s + 1 divides n nor n - s is odd:
    16 workers, s = 4. Messages are amplified as by the last block alone, which is short: 6 in place of 19 for n = 10,
    s = 3; 57 in place of 414 for 16, 5. Workers of a block are far apart, as those of one node may be slow together.
    """

    def __repr__(self) -> str:
        return f"Blocks({self.s})"

    def tail(self, n: int) -> int:
        """Return how many workers the cyclic block has; 0: there is none."""
        rest = n % (self.s + 1)
        if rest == 0:
            return 0
        rest += self.s + 1
        return rest if (rest - self.s) % 2 else rest + self.s + 1

    def check(self, n: int) -> None:
        """Raise `OptionError` where the cyclic block would have n - s even."""
        super().check(n)
        tail = self.tail(n)
        if tail and ((tail - self.s) % 2 == 0 or tail > n):
            raise OptionError(f"{self}: there is no such code for {counted(n, 'worker')}; take s={self.s + 1}")

    def block(self, i: int, n: int) -> tuple[int, ...]:
        """Return the workers of the block of worker i, ascending; their parts have the same numbers."""
        first = n - self.tail(n)
        groups = first // (self.s + 1)
        return tuple(range(i % groups, first, groups)) if i < first else tuple(range(first, n))

    def _is_cyclic(self, i: int, n: int) -> bool:
        return i >= n - self.tail(n)

    def parts(self, i: int, n: int) -> tuple[int, ...]:
        """Return all of its block, or of the last block s + 1, beginning with its own."""
        block = self.block(i, n)
        if not self._is_cyclic(i, n):
            return block
        return tuple(block[part] for part in Cyclic(self.s).parts(i - block[0], len(block)))

    def row(self, i: int, n: int) -> Coefficients:
        """Return ones, or of the last block the coefficients of the cyclic code."""
        return Cyclic(self.s).row(0, self.tail(n)) if self._is_cyclic(i, n) else np.ones(self.s + 1)

    def decodable(self, mask: int, n: int) -> bool:
        """Tell whether one worker of each block is there, and of the last block all but s."""
        members, least = quorums(self, n)
        have = np.array([mask >> i & 1 for i in range(n)], np.float32)
        return bool((have @ members >= least).all())

    def decode(self, mask: int, n: int) -> Coefficients:
        """Return 1 for the first worker of each block, and the least coefficients for the last block."""
        if not self.decodable(mask, n):
            raise self._missing(mask, n)
        a, tail = np.zeros(n), self.tail(n)
        first = n - tail
        groups = first // (self.s + 1)
        for group in range(groups):
            a[next(i for i in range(group, first, groups) if mask >> i & 1)] = 1.0
        if tail:
            a[first:] = Cyclic(self.s).decode(mask >> first, tail)
        a.flags.writeable = False
        return a


@lru_cache(1024)
def quorums(code: GradientCode, n: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return which workers are of which block, (n, blocks), and how many of each have to be there, (blocks,). Local.

    ``(have @ members >= least).all()`` says for a set of workers, (n,) bool, what `decodable` says for its mask.
    """
    code.check(n)
    if isinstance(code, FractionalRepetition):
        q = code.groups(n)
        of, least = [code.group(i, n) for i in range(n)], [code.votes] * q
    elif isinstance(code, Blocks):
        blocks = sorted({code.block(i, n) for i in range(n)})
        number = {i: b for b, block in enumerate(blocks) for i in block}
        of = [number[i] for i in range(n)]
        least = [1 if len(block) == code.s + 1 else len(block) - code.s for block in blocks]
    else:
        of, least = [0] * n, [n - code.s]
    members = np.zeros((n, len(least)), np.float32)
    members[np.arange(n), of] = 1
    members.flags.writeable = False
    return members, np.array(least, np.float32)


@lru_cache(1024)
def code_for(n: int, s: int) -> GradientCode:
    """Return the code for n workers of which s may be missing; one for more of them where there is none. Local.

    Fractional repetition where s + 1 divides n, else `Blocks` whose amplification is up to 1000, else the same for the
    next s, in the end all parts on each worker.

    Raises
    ------
    OptionError
        Unless 0 <= s < n.
    """
    FractionalRepetition(s)
    Cyclic(0).check(n)
    if not s < n:
        raise OptionError(f"s={s} of {counted(n, 'worker')} cannot all be missing; take s={n - 1} or less")
    for more in range(s, n):
        if n % (more + 1) == 0:
            return FractionalRepetition(more)
        tail = Blocks(more).tail(n)
        if tail <= n and (tail - more) % 2 and _worst(more, tail) <= _MOST:
            return Blocks(more)
    raise AssertionError


def _worst(s: int, n: int) -> float:
    """Return the amplification of a cyclic code: that where s neighbours are missing, seen to be the largest."""
    return float(np.abs(Cyclic(s).decode(mask_of(range(s, n)), n)).max())
