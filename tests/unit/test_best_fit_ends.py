"""Best-fit packing needs the ends of documents: data without them is refused, wherever they are
missing; which options follow from it, and which contradict it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import run, violations
from datasets import open_data
from packing import EOD, packed, write

from megalite.data.indexed_reader import IndexedReader
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.mixture import prepare_mixture
from megalite.data.sidecar import read_sidecar
from megalite.data.token_store import TokenStore
from megalite.errors import DataError


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
    [({"append_eod": False}, "by its sidecar: preprocess it with --append-eod$"),
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
