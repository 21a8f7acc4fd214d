"""What `resolve` and `resolve_device` derive, and that a field's name alone says which it is."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from megalite.config import Config, fields, resolve, resolve_device
from megalite.presets import PRESETS


def derived(world_size: int | None = None, **values: Any) -> dict[str, Any]:
    """All values by name, after `resolve`."""
    parts = resolve(Config().replace(**values), world_size).to_dict().values()
    return {name: value for part in parts for name, value in part.items()}


@pytest.mark.parametrize(
    ("world_size", "values", "want"),
    [
        # dp
        (None, {}, dict(dp=1)),
        (None, dict(tp=2, pp=2), dict(dp=1)),
        (None, dict(dp=3), dict(dp=3)),
        (8, {}, dict(dp=8)),
        (8, dict(tp=2, pp=2), dict(dp=2)),
        (8, dict(tp=2, pp=2, dp=4), dict(dp=4)),
        (8, dict(tp=3), dict(dp=2)),
        (2, dict(tp=4), dict(dp=1)),
        # heads
        (None, {}, dict(num_kv_heads=4, head_dim=32)),
        (None, dict(num_attention_heads=8), dict(num_kv_heads=8, head_dim=16)),
        (None, dict(num_kv_heads=2), dict(num_kv_heads=2, head_dim=32)),
        (None, dict(head_dim=48), dict(num_kv_heads=4, head_dim=48)),
        # vocabulary
        (None, {}, dict(vocab_size=257)),
        (None, dict(vocab_size=1000), dict(vocab_size=1000)),
        # sequence parallelism
        (None, {}, dict(sequence_parallel=False)),
        (None, dict(tp=2), dict(sequence_parallel=True)),
        (None, dict(tp=2, sequence_parallel=False), dict(sequence_parallel=False)),
        (None, dict(sequence_parallel=True), dict(sequence_parallel=True)),
        # batch
        (None, {}, dict(global_batch_size=4)),
        (None, dict(dp=3, micro_batch_size=5), dict(global_batch_size=15)),
        (6, dict(tp=2, micro_batch_size=5), dict(global_batch_size=15)),
        (6, dict(global_batch_size=7), dict(global_batch_size=7)),
        # steps
        (None, dict(steps=9), dict(steps=9, tokens=0)),
        (None, dict(tokens=4 * 128), dict(steps=1, tokens=512)),
        (None, dict(tokens=4 * 128 + 1), dict(steps=2, tokens=513)),
        (None, dict(tokens=1), dict(steps=1, tokens=1)),
        (4, dict(tokens=10_000, seq_length=50), dict(steps=13)),  # 16 x 50 tokens a step
        (None, {}, dict(steps=0)),
        # learning rate
        (None, dict(steps=200), dict(lr_decay_steps=200, lr_warmup_steps=20, lr_wsd_decay_steps=0)),
        (None, dict(tokens=100 * 512), dict(lr_decay_steps=100, lr_warmup_steps=10)),
        (None, dict(steps=200, lr_decay_steps=50), dict(lr_decay_steps=50, lr_warmup_steps=5)),
        (None, dict(steps=29, lr_warmup_fraction=0.25), dict(lr_warmup_steps=7)),
        (None, dict(steps=200, lr_warmup_steps=0), dict(lr_warmup_steps=0)),
        (None, dict(steps=200, lr_warmup_steps=33), dict(lr_warmup_steps=33)),
        (None, {}, dict(lr_decay_steps=1, lr_warmup_steps=0)),
        (None, dict(steps=200, lr_decay_style="WSD"), dict(lr_wsd_decay_steps=20)),
        (None, dict(steps=5, lr_decay_style="WSD"), dict(lr_wsd_decay_steps=1)),
        (
            None,
            dict(steps=200, lr_decay_steps=90, lr_decay_style="WSD"),
            dict(lr_wsd_decay_steps=9),
        ),
        (
            None,
            dict(steps=200, lr_wsd_decay_steps=7, lr_decay_style="WSD"),
            dict(lr_wsd_decay_steps=7),
        ),
        # left to `resolve_device`
        (8, dict(steps=1), dict(device="auto", precision="auto")),
    ],
)
def test_derived_values(
    world_size: int | None, values: dict[str, Any], want: dict[str, Any]
) -> None:
    got = derived(world_size, **values)
    assert {name: got[name] for name in want} == want


DERIVED = {
    "zero",
    *(
        "dp",
        "eod_mask_loss",
        "reset_position_ids",
        "num_kv_heads",
        "head_dim",
        "vocab_size",
        "sequence_parallel",
        "global_batch_size",
    ),
    *("steps", "lr_decay_steps", "lr_warmup_steps", "lr_wsd_decay_steps"),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_resolve_changes_nothing_that_is_given_and_is_done_after_once(preset: str) -> None:
    config = Config().replace(model=preset, tp=2, **PRESETS[preset])
    once = resolve(config, 8)
    assert resolve(once, 8) == once == resolve(once)
    before = {n: v for part in config.to_dict().values() for n, v in part.items()}
    after = {n: v for part in once.to_dict().values() for n, v in part.items()}
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= DERIVED
    assert once.derived == changed
    assert once.given() == config
    assert {before[name] for name in changed} <= {0, -1, None}


@pytest.mark.parametrize(
    "values",
    [
        *(dict(num_attention_heads=n) for n in (0, -1)),
        *(dict(tp=n, pp=n) for n in (0, -1)),
        *(dict(tokens=100, seq_length=n) for n in (0, -1)),
        *(dict(tokens=100, micro_batch_size=n) for n in (0, -1)),
        *(dict(lr_warmup_fraction=x) for x in (-1.0, 2.0, float("nan"), float("inf"))),
        *(dict(steps=n, lr_decay_style="WSD") for n in (0, -5)),
    ],
    ids=str,
)
def test_resolve_leaves_bad_values_to_the_rules(values: dict[str, Any]) -> None:
    """Nothing may fail there: `check` says what is wrong."""
    got = derived(8, **values)
    for name in set(values) - {"tokens", "lr_warmup_fraction", "steps"}:
        assert got[name] == values[name]


@pytest.mark.parametrize(
    ("precision", "device", "want"),
    [
        *(("auto", "cpu", "fp32"), ("auto", "cuda", "bf16"), ("bf16", "cpu", "bf16")),
        *(("fp32", "cuda", "fp32"), ("fp64", "cuda", "fp64"), ("fp16", "cuda", "fp16")),
    ],
)
def test_resolve_device(precision: str, device: str, want: str) -> None:
    before = resolve(Config().replace(precision=precision, steps=3))
    after = resolve_device(before, device)
    assert (after.parallel.device, after.train.precision) == (device, want)
    assert after.replace(device="auto", precision=precision) == before
    assert after.given() == before.given(), "what was derived on one machine is open on another"


@pytest.mark.parametrize(
    ("vocab_size", "multiple", "tp", "want"),
    [
        *((257, 128, 1, 384), (257, 128, 2, 512), (257, 128, 4, 512), (257, 128, 8, 1024)),
        *((256, 128, 2, 256), (256, 128, 1, 256), (1, 128, 1, 128), (257, 1, 1, 257)),
        *((257, 1, 2, 258), (32000, 128, 8, 32768), (128256, 128, 8, 129024), (7, 3, 5, 15)),
    ],
)
def test_padded_vocab_size(vocab_size: int, multiple: int, tp: int, want: int) -> None:
    config = Config().replace(vocab_size=vocab_size, make_vocab_size_divisible_by=multiple)
    assert config.model.padded_vocab_size(tp) == want
    assert config.model.padded_vocab_size(tp) % tp == 0


def test_sizes_that_follow() -> None:
    config = resolve(
        Config().replace(
            **dict(micro_batch_size=2, global_batch_size=48, dp=3, tp=4, pp=5, seq_length=10),
            **dict(num_attention_heads=8, num_kv_heads=2, head_dim=6),
        )
    )
    assert config.num_micro_batches == 8
    assert config.tokens_per_step == 480
    assert config.world_size == 60
    assert config.model.qkv_features == (8 + 2 + 2) * 6


def test_field_names_are_unique_over_all_groups() -> None:
    counts = Counter(spec.name for spec in fields())
    assert len(counts) > 50
    assert [name for name, count in counts.items() if count > 1] == []


def test_every_field_says_what_it_is() -> None:
    for spec in fields():
        assert spec.doc.endswith(".") and spec.doc == spec.doc.strip(), spec.name
        assert spec.flag == f"--{spec.name.replace('_', '-')}"
        is_bool = "bool" in str(spec.type)
        assert is_bool or spec.choices or spec.metavar, f"{spec.name}: no unit"
        if spec.choices:
            assert spec.default in spec.choices, spec.name


def test_replace_changes_one_field_of_whichever_group() -> None:
    config = Config()
    for spec in fields():
        changed = config.replace(**{spec.name: "changed"})
        assert getattr(getattr(changed, spec.group), spec.name) == "changed"
        assert changed.replace(**{spec.name: spec.default}) == config
    assert config == Config(), "the original is as it was"


@pytest.mark.parametrize("name", ["model_size", "Tp", "train", "parallel", ""])
def test_replace_refuses_names_that_no_group_has(name: str) -> None:
    with pytest.raises(KeyError, match=f"'{name}'"):
        Config().replace(**{"tp": 2, name: 1})


def test_to_dict_holds_plain_values_by_group() -> None:
    config = Config().replace(pp_layers=(1, 3), lr=0.5)
    values = config.to_dict()
    groups = "model parallel train parameters scaling data checkpoint supervision run"
    assert list(values) == groups.split()
    assert json.loads(json.dumps(values)) == values
    assert values["parallel"]["pp_layers"] == [1, 3]
    assert values["parallel"]["sequence_parallel"] is None
    assert values["train"]["lr"] == 0.5
    assert [s.name for s in fields()] == [name for part in values.values() for name in part]
