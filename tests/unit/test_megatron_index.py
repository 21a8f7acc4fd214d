"""The indices are Megatron-LM's: its golden vectors, a transliteration of the semantics in plain
loops, and where megatron-core is installed its own functions."""

from __future__ import annotations

import random
import warnings
from types import SimpleNamespace
from typing import Any

import megatron_semantics
import numpy as np
import pytest

from megalite.data import megatron_index
from megalite.data.megatron_index import (
    build_index,
    build_sample_index,
    plan_epochs,
    position_dtype,
    sample_dtype,
)

LENGTHS = np.array([5, 3, 9, 4, 7], np.int32)


@pytest.fixture(scope="module")
def megatron() -> SimpleNamespace:
    """megatron-core's builders."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the other parts of that package
        dataset = pytest.importorskip("megatron.core.datasets.gpt_dataset")
        helpers = pytest.importorskip("megatron.core.datasets.helpers")
    return SimpleNamespace(dataset=dataset, helpers=helpers)


def test_golden_vectors() -> None:
    one = build_index(LENGTHS, 0, 5, 5, 4, 1234)
    assert one.documents.tolist() == [4, 0, 1, 2, 3]
    starts = [[0, 0], [0, 4], [1, 1], [2, 0], [3, 1], [3, 5], [4, 0]]
    assert one.samples.tolist() == starts
    assert one.shuffle.tolist() == [5, 2, 3, 1, 0, 4]
    two = build_index(LENGTHS, 0, 5, 9, 4, 1234)
    assert two.documents.tolist() == [4, 0, 1, 2, 3, 3, 2, 1, 0, 4]
    more = [[5, 0], [6, 0], [6, 4], [6, 8], [8, 0], [8, 4], [9, 3]]
    assert two.samples.tolist() == [*starts, *more]
    assert two.shuffle.tolist() == [0, 4, 3, 2, 5, 1, 7, 6, 9, 8, 11, 10, 12]
    three = build_index(LENGTHS, 0, 5, 14, 4, 1234)
    assert three.documents.tolist() == [2, 2, 4, 1, 0, 3, 4, 0, 1, 3, 0, 4, 3, 2, 1]
    assert three.shuffle.tolist() == [
        *(7, 11, 2, 3, 1, 9, 5, 4, 0, 8, 6, 10, 12, 19, 17, 14, 18, 16, 13, 15)
    ]


def random_case(number: int) -> tuple[np.ndarray, int, int, int | None, int, int]:
    """(lengths, begin, end, samples, sequence length, seed), with at least one sample."""
    draw = random.Random(number)
    longest = draw.choice((2, 9, 60))
    lengths = np.array([draw.randint(1, longest) for _ in range(draw.randint(2, 40))], np.int32)
    if draw.random() < 0.2:  # sequences without a token; Megatron-LM passes over them
        lengths[draw.randrange(1, len(lengths))] = 0
    begin = draw.choice((0, 0, len(lengths) // 3))
    end = draw.choice((len(lengths), len(lengths), max(begin + 1, len(lengths) - 2)))
    tokens = int(lengths[begin:end].sum())
    seq = draw.randint(1, max(1, min(tokens - 1, 3 * longest)))
    if tokens <= seq:
        return random_case(number + 1_000_003)
    epoch = (tokens - 1) // seq
    count = draw.choice((None, draw.randint(1, epoch), draw.randint(1, 6 * epoch + 2)))
    return lengths, begin, end, count, seq, draw.randrange(2**32)


def check_case(number: int) -> int:
    """Compare one case; returns how many epochs it has."""
    lengths, begin, end, count, seq, seed = random_case(number)
    built = build_index(lengths, begin, end, count, seq, seed)
    want = megatron_semantics.indices(lengths.tolist(), begin, end, count, seq, seed)
    assert built.documents.tolist() == want[0], number
    assert built.samples.tolist() == want[1], number
    assert built.shuffle.tolist() == want[2], number
    assert (built.documents.dtype, built.samples.dtype) == (np.int32, np.int32)
    assert built.shuffle.dtype == np.uint32
    return len(built.documents) // (end - begin)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_random_cases_equal_plain_loops(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_index, "_CHUNK_SEQUENCES", chunk)
    epochs = [check_case(number) for number in range(250)]
    assert min(epochs) == 1 and max(epochs) >= 5, "both kinds occur"


@pytest.mark.full
def test_ten_thousand_random_cases_equal_plain_loops() -> None:
    for number in range(10_000):
        check_case(number)


def test_the_cases_hold_final_epochs_that_are_separate_and_not() -> None:
    kinds = set()
    for number in range(250):
        lengths, begin, end, count, seq, _ = random_case(number)
        plan = plan_epochs(int(lengths[begin:end].sum()), count, seq)
        kinds.add((plan.epochs > 1, plan.separate_from is not None))
    assert kinds == {(False, False), (True, False), (True, True)}


def check_against_megatron(megatron: Any, number: int) -> None:
    lengths, begin, end, count, seq, seed = random_case(number)
    built = build_index(lengths, begin, end, count, seq, seed)
    tokens = int(lengths[begin:end].sum())
    plan = plan_epochs(tokens, count, seq)
    state = np.random.RandomState(seed)
    separate = plan.separate_from is not None
    documents = megatron.dataset._build_document_index(
        np.arange(begin, end, dtype=np.int32), plan.epochs, state, separate
    )
    samples = megatron.helpers.build_sample_idx(lengths, documents, seq, plan.epochs, tokens)
    together = plan.separate_from if separate else plan.samples
    shuffle = megatron.dataset._build_shuffle_index(together, plan.samples, state)
    for ours, theirs in (
        (built.documents, documents),
        (built.samples, samples),
        (built.shuffle, shuffle),
    ):
        assert ours.dtype == theirs.dtype
        assert (ours == theirs).all(), number


def test_random_cases_equal_megatron_core(megatron: SimpleNamespace) -> None:
    for number in range(500):
        check_against_megatron(megatron, number)


@pytest.mark.full
def test_ten_thousand_random_cases_equal_megatron_core(megatron: SimpleNamespace) -> None:
    for number in range(10_000):
        check_against_megatron(megatron, number)


def test_many_documents_equal_megatron_core(megatron: SimpleNamespace) -> None:
    """More than one chunk of the vectorised search."""
    lengths = np.random.default_rng(0).integers(1, 100, 2_500_000, dtype=np.int32)
    documents = np.random.RandomState(1).permutation(len(lengths)).astype(np.int32)
    tokens = int(lengths.sum())
    ours = build_sample_index(lengths, documents, (tokens - 1) // 64, 64)
    assert (ours == megatron.helpers.build_sample_idx(lengths, documents, 64, 1, tokens)).all()


def test_dtypes_grow_where_megatrons_do() -> None:
    assert position_dtype(2**31 - 1, 5) == position_dtype(5, 2**31 - 1) == np.int32
    assert position_dtype(2**31, 5) == np.int64
    assert sample_dtype(2**32 - 3) == np.uint32
    assert sample_dtype(2**32 - 2) == np.int64


def test_unaligned_lengths_are_read_as_they_lie_in_a_file() -> None:
    content = np.frombuffer(b"xx" + LENGTHS.tobytes(), np.int32, 5, offset=2)
    assert not content.flags.aligned
    built = build_index(content, 0, 5, 5, 4, 1234)
    assert built.shuffle.tolist() == [5, 2, 3, 1, 0, 4]
