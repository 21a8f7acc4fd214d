"""Which random numbers round which elements: copies share theirs, others have their own, and
layouts that cut the same slices draw the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megalite.config import Config, resolve
from megalite.models.llama import LlamaStage
from megalite.models.stage import stage_specs
from megalite.optim.buckets import Slot, Span, make_buckets, own_spans
from megalite.optim.segments import Segment, segments
from megalite.parallel.tensor import TensorGroup
from megalite.treatment import treatments

Element = tuple[str, int, int]
"""(name of the whole tensor, row, column)"""
Draw = tuple[int, int]
"""(key, place)"""

SHAPE: dict[str, Any] = dict(
    num_layers=2,
    hidden_size=24,
    num_attention_heads=4,
    ffn_hidden_size=20,
    vocab_size=37,
    make_vocab_size_divisible_by=8,
    seq_length=16,
    steps=1,
)
BUCKET = 700
"""Elements: several buckets for each stage."""


def elements(slots: tuple[Slot, ...], at: int) -> Element | None:
    """What lies at a place of the flat buffers; None: padding."""
    for slot in slots:
        if slot.start <= at < slot.stop:
            columns = slot.parameter.shape[1] if slot.parameter.dim() > 1 else 1
            local = divmod(at - slot.start, columns)
            for piece in slot.shard.pieces:
                inside = local[piece.dim] - piece.local_start
                if 0 <= inside < piece.length:
                    place = list(local)
                    place[piece.dim] = piece.start + inside
                    return piece.name, place[0], place[1]
    return None


def draws_of(found: tuple[tuple[Segment, ...], ...], spans: tuple[Span, ...]) -> dict[int, Draw]:
    """Place in the flat buffers to the numbers that round what is there."""
    drawn: dict[int, Draw] = {}
    for span, parts in zip(spans, found, strict=True):
        for segment in parts:
            assert segment.draws is not None
            key, place = segment.draws
            for offset in range(segment.stop - segment.start):
                at = span.start + segment.start + offset
                assert at not in drawn, "once"
                assert at < span.stop
                drawn[at] = key, place + offset
    return drawn


def drawn(tp: int, pp: int, shards: int, tied: bool, seed: int = 7) -> dict[Element, Draw]:
    """Of all ranks of a layout, put together."""
    config = resolve(Config().replace(**SHAPE, tp=tp, pp=pp, num_kv_heads=2, tie_embeddings=tied))
    whole: dict[Element, Draw] = {}
    for spec in stage_specs(config):
        for rank in range(tp):
            group = TensorGroup.solo()
            group.rank, group.size, group.sequence_parallel = rank, tp, tp > 1
            meta = torch.device("meta")
            stage = LlamaStage(config, spec, tp=group, dtype=torch.float32, device=meta)
            buckets = make_buckets({spec.stage: stage}, shards, BUCKET)
            slots = tuple(slot for bucket in buckets for slot in bucket.slots)
            for shard in range(shards):
                spans = own_spans(buckets, shard, shards)
                places = draws_of(segments(slots, spans, treatments(config), seed), spans)
                for span in spans:
                    for at in range(span.start, span.stop):
                        element = elements(slots, at)
                        assert at in places
                        if element is not None:
                            draw = whole.setdefault(element, places[at])
                            assert draw == places[at], f"copies of {element} differ"
    assert len(set(whole.values())) == len(whole), "two elements share their numbers"
    return whole


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_copies_share_their_numbers_and_no_others_do(tp: int, tied: bool) -> None:
    """Of norm weights, of key/value heads on two of four ranks, of a tied embedding."""
    one = drawn(tp, 1, 1, tied)
    assert drawn(tp, 2, 1, tied) == one
    assert drawn(tp, 1, 3, tied) == one
    assert drawn(tp, 2, 2, tied) == one


def test_another_seed_is_other_numbers() -> None:
    one, other = drawn(1, 1, 1, False), drawn(1, 1, 1, False, seed=8)
    assert not set(one.values()) & set(other.values())
