"""Documents inside samples: where they begin, and what attention and positions make of them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run
from datasets import data_config, open_data
from torch import Tensor

from megalite.data.documents import document_bounds, document_starts
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.loader import Loader
from megalite.errors import DataError
from megalite.layers.attention import Attention
from megalite.layers.batch import Documents, DropoutPlace
from megalite.layers.rope import rope_tables
from megalite.models.llama import LlamaStage
from megalite.models.stage import stage_specs
from megalite.parallel.groups import ParallelGroups
from megalite.parallel.tensor import TensorGroup

EOD = 9


def rows(seed: int, shape: tuple[int, ...] = (3, 40), share: float = 0.15) -> np.ndarray:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, EOD, shape)
    tokens[generator.random(shape) < share] = EOD
    return tokens


def documents_of(tokens: np.ndarray) -> Documents:
    starts = document_starts(tokens, EOD)
    bounds, longest = document_bounds(starts)
    return Documents(torch.from_numpy(starts), torch.from_numpy(bounds), longest)


def by_hand(row: list[int]) -> tuple[Tensor, Tensor]:
    """Mask and positions as Megatron-LM's `_get_ltor_masks_and_position_ids` defines them."""
    length = len(row)
    mask = [[key <= query for key in range(length)] for query in range(length)]
    positions = list(range(length))
    previous = 0
    for place, token in enumerate(row):
        if token != EOD:
            continue
        for query in range(place + 1, length):
            for key in range(place + 1):
                mask[query][key] = False
            positions[query] -= place + 1 - previous
        previous = place + 1
    return torch.tensor(mask), torch.tensor(positions)


@pytest.mark.parametrize("share", [0.0, 0.15, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_mask_and_positions_are_megatron_s(seed: int, share: float) -> None:
    tokens = rows(seed, share=share)
    documents = documents_of(tokens)
    for row, mask, positions in zip(tokens, documents.mask(), documents.positions(), strict=True):
        wanted_mask, wanted_positions = by_hand(row.tolist())
        assert torch.equal(mask[0], wanted_mask)
        assert torch.equal(positions, wanted_positions)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_bounds_cut_the_rows_at_ends_of_documents(share: float) -> None:
    tokens = rows(7, share=share)
    documents = documents_of(tokens)
    flat, pieces = tokens.ravel(), []
    for begin, end in zip(documents.bounds[:-1], documents.bounds[1:], strict=True):
        piece = flat[begin:end].tolist()
        assert EOD not in piece[:-1], "a document goes on after its end"
        assert piece[-1] == EOD or int(end) % tokens.shape[1] == 0, "a document is cut"
        pieces.append(piece)
    assert [token for piece in pieces for token in piece] == flat.tolist()
    assert max(map(len, pieces)) == documents.longest


def model_of(*flags: str) -> LlamaStage:
    config = run("--num-kv-heads", "2", "--precision", "fp64", "--device", "cpu", *flags)
    (spec,) = stage_specs(config)
    stage = LlamaStage(
        config, spec, tp=TensorGroup.solo(), dtype=torch.float64, device=torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in stage.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(0.1 * noise + (parameter.dim() == 1))
    return stage


@pytest.mark.parametrize("dropout", [False, True])
def test_a_document_is_computed_as_if_it_stood_alone(dropout: bool) -> None:
    """Through all layers; with dropout on the unfused path, whose masks then keep everything."""
    stage = model_of("--reset-attention-mask")
    if dropout:
        for layer in stage.layers:
            layer.attention.dropout = 1e-15
    place = DropoutPlace(1, 0, torch.arange(2)) if dropout else None
    tokens = rows(3, (2, 60), 0.1)
    together = stage(torch.from_numpy(tokens), place, documents_of(tokens))
    flat = together.transpose(0, 1).reshape(-1, together.shape[-1])
    bounds = documents_of(tokens).bounds.tolist()
    assert len(bounds) > 6
    for begin, end in pairwise(bounds):
        alone = stage(torch.from_numpy(tokens.ravel()[None, begin:end].copy()))
        assert (alone[:, 0] - flat[begin:end]).abs().max() < 1e-12


def test_nothing_of_a_document_reaches_the_next_one() -> None:
    """Neither forward nor backward; without the mask both do."""
    tokens = np.array([[1, 2, 3, EOD, 4, 5, 6, 7]])
    model = run("--reset-attention-mask").model
    attention = Attention(model, 0, tp=TensorGroup.solo(), dtype=torch.float64)
    torch.nn.init.normal_(attention.qkv.weight)
    torch.nn.init.normal_(attention.out.weight)
    cos, sin = (table[:, None] for table in rope_tables(model, 8, torch.float64))
    x = torch.randn(8, 1, model.hidden_size, dtype=torch.float64, requires_grad=True)

    def reach(documents: Documents | None) -> Tensor:
        out = attention(x, cos, sin, None, documents)
        (gradient,) = torch.autograd.grad(out[4:].sum(), x)
        return gradient[:4].abs().sum()

    assert reach(documents_of(tokens)) == 0.0
    assert reach(None) > 0.1, "a mask that leaks would be seen"


def test_positions_alone_leave_attention_open() -> None:
    stage = model_of("--reset-position-ids")
    tokens = rows(5, (1, 30), 0.1)
    documents = documents_of(tokens)
    reset = stage(torch.from_numpy(tokens), None, documents)
    other = tokens.copy()
    other[0, 0] = (other[0, 0] + 1) % EOD
    changed = stage(torch.from_numpy(other), None, documents_of(other))
    assert (changed[-1] - reset[-1]).abs().max() > 1e-9
    assert (stage(torch.from_numpy(tokens)) - reset).abs().max() > 1e-6


class Ends:
    """Samples in which every seventh token ends a document."""

    num_samples = 64

    def read(self, index: int) -> np.ndarray:
        tokens = np.arange(index, index + 33) % 250
        tokens[(np.arange(33) + index) % 7 == 0] = 256
        return tokens

    def order(self, places: np.ndarray) -> np.ndarray:
        return places % self.num_samples


@pytest.mark.parametrize("rows_", [1, 2])
def test_the_loader_knows_documents_and_masks_the_label_across_their_ends(rows_: int) -> None:
    flags = f"--seq-length 32 --micro-batch-size {rows_} --global-batch-size 4"
    config = run(*flags.split(), "--reset-attention-mask")
    groups = ParallelGroups.solo()
    loader = Loader(config, Ends(), Ends(), groups.dp, torch.device("cpu"))
    for micro_batch in loader.train_batch(3).micro_batches:
        assert torch.equal(micro_batch.mask, micro_batch.tokens != 256)
        assert micro_batch.documents is not None
        for tokens, starts in zip(micro_batch.tokens, micro_batch.documents.starts, strict=True):
            ends = [-1, *torch.where(tokens == 256)[0].tolist()]
            wanted = [max(e for e in ends if e < place) + 1 for place in range(32)]
            assert starts.tolist() == wanted
    for batch in loader.validation_batches():
        assert all(m.documents is not None for m in batch.micro_batches)


def test_without_the_flags_nothing_is_looked_up() -> None:
    config = run("--seq-length", "32")
    loader = Loader(config, Ends(), Ends(), ParallelGroups.solo().dp, torch.device("cpu"))
    assert loader.train_batch(0).micro_batches[0].documents is None


def test_the_flags_follow_from_the_mask() -> None:
    data = run("--reset-attention-mask").data
    assert data.reset_position_ids and data.eod_mask_loss
    data = run("--reset-attention-mask", "--no-eod-mask-loss", "--no-reset-position-ids").data
    assert not data.reset_position_ids and not data.eod_mask_loss
    data = run().data
    assert not data.reset_position_ids and not data.eod_mask_loss


@pytest.mark.parametrize("flag", ["--reset-attention-mask", "--reset-position-ids"])
def test_data_without_marked_ends_is_refused(tmp_path: Path, flag: str) -> None:
    """Where the options would silently do nothing."""
    name = flag.removeprefix("--").replace("-", "_")
    for last, is_right in ((256, True), (5, False)):
        writer = IndexedWriter(tmp_path / f"ends{last}", np.dtype("<u2"))
        for _ in range(50):
            writer.add_sequence(np.array([*range(20), last]))
            writer.end_document()
        writer.close()
        values = {name: True, "tokenizer_type": "ByteTokenizer"}
        config = data_config(tmp_path, tmp_path / f"ends{last}", **values)
        if is_right:
            assert open_data(config)[0].num_samples
            continue
        with pytest.raises(DataError, match=f"{flag}: .* with token 5 or others, not with 256"):
            open_data(config)
        off = dict.fromkeys(("reset_attention_mask", "reset_position_ids", "eod_mask_loss"), False)
        assert open_data(config.replace(**off))[0].num_samples
