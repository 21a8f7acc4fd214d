"""Byte-pair merging: bytes become the tokens that merges in order of priority make of them.

At each step the pair of neighbours with the lowest priority number is merged, the leftmost one
first, until no pair can be (Sennrich et al. 2016; on bytes, Radford et al. 2019).
"""

from __future__ import annotations

import heapq
import itertools
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

_LONG = 256
"""Pieces of more bytes than this are merged through a queue, in n log n steps; of shorter ones
scanning all pairs for the next merge is faster, though it takes n^2."""

_NONE = 1 << 62
"""Priority of a pair that does not merge, in `_short`; -1 in `_long`."""


@dataclass(frozen=True)
class Merges:
    """Which pairs of tokens merge, in which order, into what.

    Attributes:
        byte_ids: token of each byte [256].
        size: all token ids are below it.
        priorities: by pair, `left * size + right`.
        merged: token that a merge makes, by priority.
    """

    byte_ids: Sequence[int]
    size: int
    priorities: Mapping[int, int]
    merged: Mapping[int, int] | Sequence[int]

    def merge(self, piece: bytes) -> list[int]:
        """Token ids of a piece of text."""
        tokens = (self.byte_ids[byte] for byte in piece)
        return self._long(tokens) if len(piece) > _LONG else self._short([*tokens])

    def _short(self, tokens: list[int]) -> list[int]:
        find, size, merged = self.priorities.get, self.size, self.merged
        order = [find(left * size + right, _NONE) for left, right in itertools.pairwise(tokens)]
        order.append(_NONE)  # of the last token, which has no neighbour
        while (best := min(order)) != _NONE:
            i = order.index(best)
            token = tokens[i] = merged[best]
            del tokens[i + 1], order[i + 1]
            order[i] = _NONE if i == len(order) - 1 else find(token * size + tokens[i + 1], _NONE)
            if i:
                order[i - 1] = find(tokens[i - 1] * size + token, _NONE)
        return tokens

    def _long(self, tokens: Iterable[int]) -> list[int]:
        """The same through a linked list and a queue of candidates, some of them outdated.

        A piece may be a whole document: what is held of each token is 4 numbers in arrays, 20 bytes
        together, and a candidate of 8; only candidates that merges make are Python's numbers.
        """
        find, size, merged = self.priorities.get, self.size, self.merged
        now = array("i", tokens)
        count = len(now)
        following, before = array("i", range(1, count + 1)), array("i", range(-1, count - 1))
        order = array(
            "i", (find(left * size + right, -1) for left, right in itertools.pairwise(now))
        )
        order.append(-1)
        # A candidate is `priority * count + place`: one number, and the leftmost comes first.
        first = _sorted(p * count + i for i, p in enumerate(order) if p >= 0)
        made: list[int] = []
        push, pop = heapq.heappush, heapq.heappop
        taken, last = 0, len(first)
        while made or taken < last:
            if taken < last and not (made and made[0] < first[taken]):
                candidate = first[taken]
                taken += 1
            else:
                candidate = pop(made)
            priority, left = divmod(candidate, count)
            if order[left] != priority:
                continue  # one of the two has merged with another since
            right = following[left]
            token = now[left] = merged[priority]
            now[right] = order[right] = -1
            after = following[left] = following[right]
            order[left] = -1
            if after < count:
                before[after] = left
                order[left] = found = find(token * size + now[after], -1)
                if found >= 0:
                    push(made, found * count + left)
            if (previous := before[left]) >= 0:
                order[previous] = found = find(now[previous] * size + token, -1)
                if found >= 0:
                    push(made, found * count + previous)
        return [token for token in now if token >= 0]


def _sorted(numbers: Iterable[int]) -> array[int]:
    """Numbers below 2^63 in order, 8 bytes each."""
    import numpy as np

    found = array("q", numbers)
    np.frombuffer(found, np.int64).sort()
    return found


def merges_of_ranks(ranks: Mapping[bytes, int]) -> Merges:
    """Two neighbours merge if the bytes of both together are a token, and its rank is the priority.

    Args:
        ranks: id of each token, all 256 single bytes among them; tiktoken's meaning.
    """
    size = max(ranks.values()) + 1
    priorities = {}
    find = ranks.get
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left = find(token[:cut])
            if left is not None and (right := find(token[cut:])) is not None:
                priorities[left * size + right] = rank
    return Merges(_byte_ids(ranks), size, priorities, range(size))


def merges_of_pairs(ids: Mapping[bytes, int], pairs: Sequence[tuple[bytes, bytes]]) -> Merges:
    """Neighbours merge only as the list of pairs says, in its order; GPT-2's meaning.

    Args:
        ids: of all tokens, all 256 single bytes among them.
        pairs: both parts and the whole of each are tokens.
    """
    size = max(ids.values()) + 1
    priorities: dict[int, int] = {}
    for place, (left, right) in enumerate(pairs):
        priorities[ids[left] * size + ids[right]] = place  # the later of two equal lines counts
    return Merges(_byte_ids(ids), size, priorities, [ids[left + right] for left, right in pairs])


def _byte_ids(ids: Mapping[bytes, int]) -> list[int]:
    return [ids[bytes([byte])] for byte in range(256)]
