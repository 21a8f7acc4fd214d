"""In packed samples every pair of neighbouring tokens of a document stands once an epoch, and
padding counts nowhere; loader, ledger, epochs and whole runs read them as others."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import open_data
from packing import EOD, packed, random_lengths, write
from pool import RankPool
from runs import SMALL, run_in_pool

from megalite.data.indexed_reader import IndexedReader
from megalite.data.ledger import ledger
from megalite.data.loader import Loader
from megalite.data.mixture import prepare_mixture
from megalite.data.samples import PADDING, Samples
from megalite.data.splits import of_epochs


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
