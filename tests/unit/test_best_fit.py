"""Best-fit packing cuts no document that fits, leaves as little room as best-fit-decreasing one by
one, and has every pair of neighbouring tokens of a document in exactly one sample."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import run, violations
from datasets import data_config, open_data
from pool import RankPool
from runs import SMALL, run_in_pool

from megalite.config import Config
from megalite.data.best_fit import Packing, pack, plan, remainders
from megalite.data.indexed_reader import IndexedReader
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.ledger import ledger
from megalite.data.loader import Loader
from megalite.data.mixture import prepare_mixture
from megalite.data.samples import PADDING, Samples
from megalite.data.sidecar import read_sidecar
from megalite.data.splits import of_epochs
from megalite.data.token_store import TokenStore
from megalite.errors import DataError

EOD = 256

# The packing


def one_by_one(lengths: list[int], places: int) -> list[int]:
    """Best-fit-decreasing as it is defined; the room left in each bin, in order."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = bisect_left(rooms, length)
        room = rooms.pop(at) if at < len(rooms) else places
        insort(rooms, room - length)
    return rooms


def in_blocks(lengths: np.ndarray, size: int) -> Callable[[], Iterator[np.ndarray]]:
    return lambda: (lengths[i : i + size] for i in range(0, len(lengths), size))


def samples_of(packing: Packing, lengths: np.ndarray, seq: int) -> list[list[tuple[int, int]]]:
    """The spans of tokens of each sample; documents stand one after the other from token 0."""
    ends = np.cumsum(lengths)
    _, rest = remainders(lengths, seq)
    packed = [
        [(int(ends[d] - rest[d]), int(ends[d])) for d in packing.documents[a:b].tolist()]
        for a, b in pairwise(packing.firsts.tolist())
    ]
    return packed + [[(start, start + seq + 1)] for start in packing.whole.tolist()]


def check_packing(lengths: np.ndarray, seq: int, block: int) -> None:
    packing = pack(in_blocks(lengths, block), seq)
    samples = samples_of(packing, lengths, seq)
    sizes = [sum(stop - start for start, stop in spans) for spans in samples]
    assert max(sizes, default=0) <= seq + 1
    # As many bins with each room left as the definition leaves.
    _, rest = remainders(lengths, seq)
    rooms = one_by_one(rest[rest > 0].tolist(), seq + 1)
    assert sorted(seq + 1 - size for size in sizes[: len(packing.firsts) - 1]) == rooms
    assert packing.num_tokens == sum(sizes)
    # Every pair of neighbours of a document, and no other, is in one sample.
    pairs = Counter(t for spans in samples for start, stop in spans for t in range(start, stop - 1))
    ends = np.cumsum(lengths)
    wanted = set(range(int(ends[-1]) if len(ends) else 0)) - set((ends - 1).tolist())
    assert pairs == Counter(wanted)
    # What fits is whole; what does not is cut as little as can be.
    spans_of = Counter(
        int(np.searchsorted(ends, start, side="right")) for spans in samples for start, _ in spans
    )
    for document, length in enumerate(lengths.tolist()):
        needed = -(-(length - 1) // seq) if length > 1 else 0
        assert spans_of[document] == needed
    assert packing.num_cut == sum(count > 1 for count in spans_of.values())


def random_case(seed: int) -> None:
    draw = np.random.default_rng(seed)
    seq = int(draw.integers(1, 60))
    count = int(draw.integers(0, 120))
    kind = draw.integers(0, 3)
    if kind == 0:
        lengths = draw.integers(0, draw.integers(2, 4 * seq + 3), count)
    elif kind == 1:  # few different lengths
        lengths = draw.choice(draw.integers(0, 2 * seq + 3, 4), count)
    else:
        lengths = np.minimum(draw.lognormal(1.5, 1.2, count), 8 * seq).astype(np.int64)
    check_packing(lengths.astype(np.int32), seq, int(draw.integers(1, 150)))


@pytest.mark.parametrize("hundred", range(3))
def test_packing_is_best_fit_decreasing(hundred: int) -> None:
    for seed in range(100 * hundred, 100 * hundred + 100):
        random_case(seed)


@pytest.mark.full
@pytest.mark.parametrize("thousand", range(10))
def test_packing_is_best_fit_decreasing_ten_thousand_times(thousand: int) -> None:
    for seed in range(1000 + 1000 * thousand, 2000 + 1000 * thousand):
        random_case(seed)


def test_packing_by_hand() -> None:
    """Ten places: 9 alone (nothing has length 1), 7 + 3, 6 + 4, 5 + 5, 4 + 3 + 3, 2."""
    lengths = np.array([3, 4, 9, 5, 3, 7, 2, 5, 6, 4, 3])
    packing = pack(in_blocks(lengths, 4), 9)
    found = [
        sorted(lengths[packing.documents[a:b]].tolist(), reverse=True)
        for a, b in pairwise(packing.firsts.tolist())
    ]
    assert sorted(found, reverse=True) == [[9], [7, 3], [6, 4], [5, 5], [4, 3, 3], [2]]
    assert (packing.num_cut, len(packing.whole)) == (0, 0)


def test_documents_longer_than_a_sample() -> None:
    """Of 5 places: neighbouring parts share a token, and the remainder is packed."""
    lengths = np.array([5, 9, 11, 2, 6, 1, 0])
    packing = pack(in_blocks(lengths, 3), 4)
    # 9 = 5 + 4 new ones; 11 = 5 + 4 + a remainder of 2 + 1; 6 = 5 + a remainder of 1 + 1.
    assert packing.whole.tolist() == [0, 5, 9, 14, 18, 27]
    assert remainders(lengths, 4)[1].tolist() == [0, 0, 3, 2, 2, 0, 0]
    assert [sorted(x) for x in np.split(packing.documents, packing.firsts[1:-1])] == [[2, 3], [4]]
    assert packing.num_cut == 3


def test_the_plan_takes_few_steps() -> None:
    """Some for each length, however many items there are: no loop over documents."""
    counts = np.random.default_rng(0).integers(0, 10**9, 4098)
    counts[0] = 0
    for many in (1, 10**6, 10**9):
        assert len(plan(counts // (10**9 // many)).each) < 2 * 4098


def test_a_million_documents_of_any_length() -> None:
    """More lengths than 16 bits hold, and documents of more than a block."""
    lengths = (np.random.default_rng(1).lognormal(6, 1.5, 300_000) + 1).astype(np.int32)
    packing = pack(in_blocks(lengths, 70_001), 100_000)
    whole, rest = remainders(lengths, 100_000)
    assert len(packing.whole) == whole.sum()
    assert sorted(packing.documents.tolist()) == np.flatnonzero(rest).tolist()
    sizes = np.add.reduceat(rest[packing.documents], packing.firsts[:-1])
    assert sizes.max() <= 100_001
    assert len(sizes) - 1 < rest.sum() / 100_001 + 1, "one more sample than there must be at most"


def test_the_packing_of_a_seed_never_changes() -> None:
    lengths = np.random.default_rng(7).integers(0, 300, 5000)
    packing = pack(in_blocks(lengths, 999), 128)
    content = b"".join(
        array.astype("<i8").tobytes()
        for array in (packing.documents, packing.firsts, packing.whole)
    )
    assert hashlib.sha256(content).hexdigest()[:16] == "25a945d636047b23"
    again = pack(in_blocks(lengths, 123), 128)
    assert again.documents.tolist() == packing.documents.tolist(), "whatever the blocks"


# Samples


def write(prefix: Path, lengths: list[int], seed: int = 0, *, gaps: bool = False) -> Path:
    """Documents of random bytes that end as the byte tokenizer ends them.

    With gaps some documents are empty and some have two sequences.
    """
    draw = np.random.default_rng(seed)
    writer = IndexedWriter(prefix, np.dtype("<u2"))
    for number, length in enumerate(lengths):
        tokens = np.append(draw.integers(0, 256, length - 1), EOD)
        cut = length // 2 if gaps and number % 3 == 0 else 0
        for part in (tokens[:cut], tokens[cut:]):
            if len(part):
                writer.add_sequence(part)
        writer.end_document()
        if gaps and number % 5 == 0:
            writer.end_document()
    writer.close()
    return prefix


def random_lengths(seed: int, count: int = 150) -> list[int]:
    return np.random.default_rng(seed).integers(2, 60, count).tolist()


def packed(folder: Path, *words: str | Path, **values: object) -> Config:
    return data_config(folder, *words, packing="best-fit", tokenizer_type="ByteTokenizer", **values)


def pairs_in(rows: list[list[int]]) -> Counter:
    """(Token, next token), without what follows an end of document."""
    return Counter(
        pair for row in rows for pair in pairwise(row) if pair[0] != EOD and PADDING not in pair
    )


def epoch_of(samples: Samples, epoch: int = 0) -> list[list[int]]:
    places = epoch * samples.num_samples + np.arange(samples.num_samples)
    return [samples.read(int(number)).tolist() for number in samples.order(places)]


@pytest.mark.parametrize("gaps", [False, True])
def test_every_pair_of_neighbours_is_in_one_sample_of_an_epoch(tmp_path: Path, gaps: bool) -> None:
    prefix = write(tmp_path / "a", random_lengths(1), gaps=gaps)
    reader = IndexedReader(prefix)
    tokens = reader.tokens.tolist()
    inside = 0
    for share in (50.5, 66, 72.5, 80, 86.5):
        train, valid = open_data(packed(tmp_path, prefix, split=f"{share},{100 - share}"))
        assert pairs_in(epoch_of(train)) == pairs_in(epoch_of(train, 3))
        assert epoch_of(train) != epoch_of(train, 3)
        # The split is by sequences: of a document that it cuts each part stands for itself.
        last = round(share / 100 * len(reader.lengths))
        cut = int(reader.lengths[:last].sum())
        assert pairs_in(epoch_of(train)) == pairs_in([tokens[:cut]])
        assert pairs_in(epoch_of(valid)) == pairs_in([tokens[cut:]])
        inside += last not in reader.documents
    assert (inside > 1) == gaps, "some cut a document"


def test_a_sample_is_whole_documents_and_padding(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", random_lengths(2), gaps=True)
    config = packed(tmp_path, prefix, seq_length=64)
    train, _ = open_data(config)
    for number in range(train.num_samples):
        row = train.read(number)
        assert row.shape == (65,) and row.dtype == np.int64
        filled = row[row != PADDING]
        assert (row[len(filled) :] == PADDING).all(), "padding stands at the end"
        pieces = train.pieces(number)
        assert sum(piece.stop - piece.start for piece in pieces) == len(filled)
        assert all(piece.start == 0 for piece in pieces), "no document is longer than a sample"
        assert [piece.document for piece in pieces] == sorted(p.document for p in pieces)
        assert (filled == EOD).sum() in (len(pieces), len(pieces) - 1), "the split cuts one"


def test_a_document_that_the_split_cuts_stands_last(tmp_path: Path) -> None:
    """It has no end: whatever stood behind it would seem to go on with it."""
    prefix = write(tmp_path / "a", [9] * 40, gaps=True)
    before_padding = 0
    for split in ("50,50", "49,51", "47,53", "45,55"):
        train, _ = open_data(packed(tmp_path, prefix, split=split, seq_length=40))
        for number in range(train.num_samples):
            row = train.read(number)
            filled = row[row != PADDING]
            pieces = train.pieces(number)
            stops = np.cumsum([piece.stop - piece.start for piece in pieces]) - 1
            assert (filled[stops[:-1]] == EOD).all()
            cut = pieces[-1].stop < 9
            assert (filled[-1] != EOD) == (cut or pieces[-1].stop > 9)
            before_padding += cut and len(pieces) > 1 and len(filled) < len(row)
    assert before_padding, "a cut document stood behind others, and padding behind it"


def test_the_loader_keeps_padding_out_of_the_loss(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", random_lengths(3))
    config = packed(tmp_path, prefix, reset_attention_mask=True)
    train, valid = open_data(config)
    loader = Loader(config, train, valid, SimpleNamespace(rank=0, size=1), torch.device("cpu"))
    padded = 0
    for step in range(5):
        batch = loader.train_batch(step)
        numbers = train.order(8 * step + np.arange(8))
        rows = torch.tensor(np.stack([train.read(int(number)) for number in numbers]))
        tokens = torch.cat([mb.tokens for mb in batch.micro_batches])
        labels = torch.cat([mb.labels for mb in batch.micro_batches])
        mask = torch.cat([mb.mask for mb in batch.micro_batches])
        assert ((tokens >= 0) & (labels >= 0)).all()
        assert torch.equal(tokens, rows[:, :-1].where(rows[:, :-1] != PADDING, EOD))
        assert torch.equal(mask, (rows[:, 1:] != PADDING) & (rows[:, :-1] != EOD))
        assert batch.counted_tokens == int(mask.sum())
        padded += int((rows == PADDING).sum())
        # Documents begin where the pieces do.
        starts = torch.cat([mb.documents.starts for mb in batch.micro_batches if mb.documents])
        for number, row in zip(numbers, starts.tolist(), strict=True):
            at = 0
            for piece in train.pieces(int(number)):
                size = piece.stop - piece.start
                assert set(row[at : at + size]) <= {at}
                at += size
    assert padded > 0
    # The loss of an epoch counts every token but the first of its document, once.
    whole = Loader(
        config.replace(steps=1, global_batch_size=1, micro_batch_size=1),
        train, valid, SimpleNamespace(rank=0, size=1), torch.device("cpu"),
    )  # fmt: skip
    counted = sum(whole.train_batch(i).counted_tokens for i in range(train.num_samples))
    lengths = IndexedReader(prefix).lengths
    assert counted == int((lengths[: round(0.8 * len(lengths))] - 1).sum())


@pytest.mark.parametrize("weights", [False, True])
def test_data_ranks_share_the_samples_of_a_step(tmp_path: Path, weights: bool) -> None:
    """The same ones in every layout, and in a longer run."""
    sets = [write(tmp_path / name, random_lengths(seed)) for seed, name in enumerate("ab")]
    words = [0.7, sets[0], 0.3, sets[1]] if weights else sets
    found = []
    for dp, steps in ((1, 30), (2, 30), (2, 40)):
        config = packed(tmp_path, *words, dp=dp, steps=steps)
        samples = open_data(config)
        loaders = [
            Loader(config, *samples, SimpleNamespace(rank=r, size=dp), torch.device("cpu"))
            for r in range(dp)
        ]
        rows = [
            sorted(
                (*row, int(mask))
                for loader in loaders
                for mb in loader.train_batch(step).micro_batches
                for row, mask in zip(mb.tokens.tolist(), mb.mask.sum(1).tolist(), strict=True)
            )
            for step in (20, 29)
        ]
        found.append(rows)
    assert found[0] == found[1] == found[2]


def test_the_ledger_names_the_documents(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", random_lengths(5))
    config = packed(tmp_path, prefix)
    train, _ = open_data(config)
    reader = IndexedReader(prefix)
    firsts = np.cumsum([0, *reader.lengths.tolist()])
    numbers = train.order(16 + np.arange(8)).tolist()
    entries = ledger(config, 3, None)
    assert [entry.sample for entry in entries] == numbers
    for entry in entries:
        tokens = train.read(entry.sample)
        found = [
            reader.tokens[firsts[p.document] + p.start : firsts[p.document] + p.stop]
            for p in entry.pieces
        ]
        assert np.concatenate(found).tolist() == tokens[tokens != PADDING].tolist()
        assert all(text is not None for text in entry.texts)


def test_epochs_and_the_line_at_the_start(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [30, 9, 9, 9, 9, 9, 9, 9, 9, 9])
    config = packed(tmp_path, prefix, steps=0, num_epochs=3, split="1,0", eval_steps=0)
    config = of_epochs(config, prepare_mixture(config.data))
    train, _ = open_data(config)
    # 30 tokens: one of 17 places and a remainder of 14; then one 9 in each: 9 + 9 > 17.
    assert train.num_samples == 11
    assert config.train.steps == 33 // 8
    empty = 100 * (1 - (17 + 14 + 81) / (11 * 17))
    assert train.describe() == (
        f"{prefix}: packed by best fit into 11 samples, {empty:.2g}% of their places empty; "
        "1 of 10 documents (10%) are longer than a sample and cut"
    )


def test_a_packing_is_found_again_and_follows_the_data(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", random_lengths(6))
    folder = tmp_path / "cache"

    def entries() -> list[str]:
        return sorted(path.name for path in folder.glob("best-fit-*") if path.is_dir())

    open_data(packed(tmp_path, prefix))
    before = entries()
    assert len(before) == 2, "training and validation"
    open_data(packed(tmp_path, prefix))
    open_data(packed(tmp_path, prefix, seed=5, dp=2))
    assert entries() == before
    open_data(packed(tmp_path, prefix, seq_length=17))
    assert len(entries()) == 4
    write(prefix, random_lengths(8))
    open_data(packed(tmp_path, prefix))
    assert len(entries()) == 6


# Options


def test_what_follows_from_packing() -> None:
    data = run("--packing", "best-fit").data
    assert data.eod_mask_loss and not data.reset_attention_mask and not data.reset_position_ids
    assert not run("--packing", "best-fit", "--no-eod-mask-loss").data.eod_mask_loss
    assert not run().data.eod_mask_loss
    assert run().data.packing == "stream"


def test_what_contradicts_packing(tmp_path: Path) -> None:
    (found,) = violations("--packing", "best-fit", "--data-order", "megatron")
    assert found.startswith("--packing best-fit contradicts --data-order megatron")
    assert found.endswith("give --data-order epoch, or --packing stream")
    prefix = write(tmp_path / "a", [5, 5])
    (found,) = violations("--packing", "best-fit", "--data", str(prefix))
    assert found.startswith("--packing best-fit needs the ends of documents")
    (found,) = violations("--packing", "bestfit")
    assert found == ("--packing bestfit: expected one of stream, best-fit; did you mean best-fit?")


def test_data_without_marked_ends_is_refused(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "a", np.dtype("<u2"))
    for _ in range(50):
        writer.add_sequence(np.arange(20))
        writer.end_document()
    writer.close()
    with pytest.raises(
        DataError, match=r"--packing best-fit: 40 of the 40 documents .* token 19 or "
    ):
        open_data(packed(tmp_path, tmp_path / "a"))


def some_without_end(prefix: Path, without: set[int], count: int = 3000) -> Path:
    writer = IndexedWriter(prefix, np.dtype("<u2"))
    for number in range(count):
        writer.add_sequence(np.array([1, 2]))
        writer.add_sequence(np.array([3, 4 if number in without else EOD]))
        writer.end_document()
        writer.end_document()  # one without tokens has no end
    writer.close()
    return prefix


def test_documents_without_end_are_found_wherever_they_stand(tmp_path: Path) -> None:
    """As when a part that was preprocessed without --append-eod was merged in."""
    right = some_without_end(tmp_path / "a", set())
    assert open_data(packed(tmp_path, right))[0].num_samples
    half = some_without_end(tmp_path / "b", set(range(0, 3000, 2)))
    with pytest.raises(DataError, match=r"2\d\d of the \d+ documents of .*b that were looked at"):
        open_data(packed(tmp_path, half, split="50,50"))
    first = some_without_end(tmp_path / "c", set(range(100)))
    with pytest.raises(DataError, match=r"3\d of the \d+ documents of .*c .* end with token 4 or"):
        open_data(packed(tmp_path, first, split="50,50"))
    few = some_without_end(tmp_path / "d", {2}, 5)
    with pytest.raises(DataError, match=r"1 of the 4 documents of .* have no end"):
        open_data(packed(tmp_path, few, split="80,20"))


def test_last_tokens_are_of_the_documents_that_end_in_a_range(tmp_path: Path) -> None:
    store = TokenStore(IndexedReader(some_without_end(tmp_path / "a", {2}, 5)), "", 257)
    assert store.last_tokens(0, 10, 99).tolist() == [EOD, EOD, 4, EOD, EOD]
    assert store.last_tokens(0, 5, 9).tolist() == [EOD, EOD], "the cut one ends behind it"
    assert store.last_tokens(5, 6, 9).tolist() == [4], "and in the next range"
    assert store.last_tokens(6, 7, 9).tolist() == [EOD], "of the dataset, where none ends"
    assert len(store.last_tokens(0, 10, 3)) <= 3


@pytest.mark.parametrize(
    ("change", "told"),
    [({"append_eod": False}, "was preprocessed without --append-eod"),
     ({"eod": 255}, r"end with token 255, by its sidecar, not with 256")],
)  # fmt: skip
def test_a_sidecar_that_tells_of_other_ends_is_believed(
    tmp_path: Path, change: dict[str, object], told: str
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("a line of text\n" * 500)
    config = packed(tmp_path, text)
    prefix = prepare_mixture(config.data).train[0].corpus.prefix
    assert open_data(packed(tmp_path, prefix))[0].num_samples
    sidecar = read_sidecar(prefix)
    assert sidecar is not None
    replace(sidecar, **change).write(Path(f"{prefix}.json"))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=f"--packing best-fit: .*{told}"):
        open_data(packed(tmp_path, prefix))


def test_a_share_without_a_pair_of_tokens_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [1] * 10 + [5] * 90)
    with pytest.raises(DataError, match="training share of --split 1,9 holds no document of two"):
        open_data(packed(tmp_path, prefix, split="1,9"))


# Whole runs


def test_a_run_on_packed_documents(pool: RankPool, tmp_path: Path) -> None:
    """The same losses in two layouts, and a line that says how full samples are."""
    prefix = write(tmp_path / "a", random_lengths(9, 400))
    words = [
        *(*SMALL, "--data", str(prefix), "--tokenizer-type", "ByteTokenizer", "--packing"),
        *("best-fit", "--reset-attention-mask", "--data-cache-path", f"{tmp_path}/cache"),
        *("--eval-steps", "1", "--precision", "fp32"),
    ]
    one = run_in_pool(pool, words, 1, tmp_path / "runs")
    two = run_in_pool(pool, [*words, "--dp", "2"], 2, tmp_path / "runs")
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    assert two.valid_losses == pytest.approx(one.valid_losses, rel=1e-5)
    assert f"{prefix}: packed by best fit into " in one.stdout
    assert "% of their places empty" in one.stdout
