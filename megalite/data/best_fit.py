"""Documents into samples with as few cuts as possible: best-fit-decreasing bin packing.

A sample is a bin of seq + 1 places. A document that is longer is cut into whole samples, neighbours
of which share one token as they do in a stream, and a remainder; documents that fit stay whole.
Whole samples are full; the others are packed, longest first, each into the fullest sample with room
for it. So no document is cut that fits into a sample, and every pair of neighbouring tokens of a
document is in exactly one sample.

Which of many documents of one length goes where does not matter, so the packing is done over the
histogram of lengths: all samples with one room that are filled alike are one range of numbers. A
range takes part in O(log seq) steps, so planning takes O(seq log seq) steps however many documents
there are; what remains is a few passes of numpy over the lengths, block by block.

Sources of the method: Ding et al., "Fewer Truncations Improve Language Modeling" (2024),
arXiv:2404.10830; the histogram: Krell et al., "Efficient Sequence Packing without
Cross-contamination" (2021), arXiv:2107.02027. No torch import.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

Lengths = Callable[[], Iterable[np.ndarray]]
"""The lengths of all documents [tokens] in blocks of any size, from the start at each call."""


@dataclass(frozen=True)
class Plan:
    """Where the items of each length go: items are numbered longest first, bins from 0.

    Step i puts `each[i]` items into every one of `bins[i]` bins from `first_bin[i]` on, which hold
    `held[i]` items already. All arrays are int64 [steps].

    Attributes:
        first_item: number of the first item of each step.
        first_bin, bins, each, held: see above.
        num_bins: of all steps.
    """

    first_item: np.ndarray
    first_bin: np.ndarray
    bins: np.ndarray
    each: np.ndarray
    held: np.ndarray
    num_bins: int


@dataclass(frozen=True)
class Packing:
    """The samples that documents were packed into: first those of some documents, then whole ones.

    Attributes:
        documents: the documents that end in each sample, sample after sample; uint32, or int64 if
            there are more than that holds.
        firsts: int64 [packed samples + 1], where each begins in `documents`, and the end.
        whole: int64, the token at which each of the other samples begins, counted from that of the
            first document.
        num_cut: documents that are in more than one sample.
        num_tokens: of all samples; a token that two of them share counts twice.
    """

    documents: np.ndarray
    firsts: np.ndarray
    whole: np.ndarray
    num_cut: int
    num_tokens: int


def remainders(lengths: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
    """How documents are cut: (whole samples, tokens of the remainder; 0 if there is none).

    A document of one token has neither: there is nothing in it to predict.

    Args:
        lengths: int [n], of documents [tokens].
        seq_length: of a sample without its last label [tokens].

    Returns:
        int64 [n] each. The remainder is the end of the document, 2 to `seq_length` tokens.
    """
    pairs = np.maximum(lengths.astype(np.int64) - 1, 0)
    whole, left = np.divmod(pairs, seq_length)
    return whole, np.where(left > 0, left + 1, 0)


def plan(counts: np.ndarray) -> Plan:
    """Pack items by best-fit-decreasing, given how many there are of each length.

    Args:
        counts: int [places + 1], items of each length; a bin has `places`. Items of length 0 are
            not packed.

    Returns:
        The plan of bins as best-fit-decreasing over the items one by one would leave them: as many
        with each room. Of bins with equal room any may be taken.
    """
    places = len(counts) - 1
    by_room: dict[int, list[tuple[int, int, int]]] = {}  # (first bin, stop, items in each)
    rooms: list[int] = []  # in order, of those that are not empty
    steps: list[tuple[int, int, int, int]] = []  # (first bin, bins, items into each, held)
    num_bins = 0

    def put(room: int, first: int, stop: int, held: int) -> None:
        if room not in by_room:
            by_room[room] = []
            insort(rooms, room)
        by_room[room].append((first, stop, held))

    for length in np.flatnonzero(counts[1:])[::-1].tolist():
        length += 1
        left = int(counts[length])
        while left:
            at = bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms[at]
                first, stop, held = by_room[room].pop()
                if not by_room[room]:
                    del by_room[room], rooms[at]
            else:
                room, held, first = places, 0, num_bins
                stop = num_bins = first + -(-left // (places // length))
            # A bin that took one is the fullest with room for the next, until it has none.
            each = room // length
            full = min(stop - first, left // each)
            if full:
                steps.append((first, full, each, held))
                put(room - each * length, first, first + full, held + each)
                left -= full * each
                first += full
            if first < stop and left:
                steps.append((first, 1, left, held))
                put(room - left * length, first, first + 1, held + left)
                left = 0
                first += 1
            if first < stop:
                put(room, first, stop, held)
    columns = np.array(steps, np.int64).reshape(-1, 4).T.copy()
    items = columns[1] * columns[2]
    first_item = np.cumsum(items) - items
    return Plan(first_item, columns[0], columns[1], columns[2], columns[3], num_bins)


def pack(lengths: Lengths, seq_length: int) -> Packing:
    """Pack documents into samples.

    Beside the result it holds a few arrays of one block, and 8 bytes for each sample.

    Args:
        lengths: of the documents.
        seq_length: of a sample without its last label [tokens].
    """
    counts = np.zeros(seq_length + 2, np.int64)
    starts = []
    num_documents = num_cut = token = 0
    for block in lengths():
        whole, rest = remainders(block, seq_length)
        counts += np.bincount(rest, minlength=len(counts))
        ends = token + np.cumsum(block, dtype=np.int64)
        starts.append(_whole_starts(ends - block, whole, seq_length))
        num_cut += int(np.count_nonzero(whole + (rest > 0) > 1))
        num_documents, token = num_documents + len(block), int(ends[-1]) if len(block) else token
    counts[0] = 0
    found = plan(counts)
    firsts = _first_slots(found)
    dtype = np.uint32 if num_documents <= 1 << 32 else np.int64
    documents = np.empty(firsts[-1], dtype)
    # Items of a length are numbered behind all that are longer, and there by document.
    next_item = counts[::-1].cumsum()[::-1] - counts
    first = 0
    for block in lengths():
        _, rest = remainders(block, seq_length)
        numbers, items = _items(rest, next_item)
        documents[_slots(found, firsts, items)] = first + numbers
        first += len(block)
    starts_of_whole = np.concatenate(starts) if starts else np.empty(0, np.int64)
    tokens = int((counts * np.arange(len(counts))).sum()) + len(starts_of_whole) * (seq_length + 1)
    return Packing(documents, firsts, starts_of_whole, num_cut, tokens)


def _whole_starts(starts: np.ndarray, whole: np.ndarray, seq_length: int) -> np.ndarray:
    """The tokens at which documents' whole samples begin, int64."""
    which = np.flatnonzero(whole)
    count = whole[which]
    before = np.repeat(np.cumsum(count) - count, count)
    return np.repeat(starts[which], count) + (np.arange(len(before)) - before) * seq_length


def _first_slots(found: Plan) -> np.ndarray:
    """Where the items of each bin begin, int64 [bins + 1]."""
    firsts = np.zeros(found.num_bins + 1, np.int64)
    for first, bins, each in zip(
        found.first_bin.tolist(), found.bins.tolist(), found.each.tolist(), strict=True
    ):
        firsts[first + 1 : first + bins + 1] += each
    return np.cumsum(firsts, out=firsts)


def _items(rest: np.ndarray, next_item: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A block's documents that are packed, by length, and their numbers as items.

    Args:
        rest: tokens of the remainder of each document of the block.
        next_item: the next item of each length; moved on.
    """
    numbers = np.flatnonzero(rest)
    # numpy sorts 16-bit numbers by radix, several times faster than others.
    keys = rest[numbers].astype(np.min_scalar_type(len(next_item)))
    numbers = numbers[np.argsort(keys, kind="stable")]
    here = np.bincount(keys, minlength=len(next_item))
    # The numbers stand by length, so each is as far behind the first of its length as here.
    shifts = next_item - (np.cumsum(here) - here)
    items = np.arange(len(numbers)) + np.repeat(shifts, here)
    next_item += here
    return numbers, items


def _slots(found: Plan, firsts: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Where items stand in the list of all bins' items, int64."""
    step = np.searchsorted(found.first_item, items, side="right") - 1
    which, within = np.divmod(items - found.first_item[step], found.each[step])
    return firsts[found.first_bin[step] + which] + found.held[step] + within
