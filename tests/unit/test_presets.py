"""The presets have the shapes of the published models: parameter counts agree to the last one."""

from __future__ import annotations

import pytest

from megalite.config import Config, resolve
from megalite.estimate import whole_parameters
from megalite.models.stage import stage_specs
from megalite.presets import PRESETS

PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
}
OWN = {
    # layers (q k v o + gate up down + 2 norms) + embedding + head + norm
    "tiny": 4 * (4 * 128 * 128 + 3 * 128 * 352 + 2 * 128) + 2 * 257 * 128 + 128,
    "125m": 12 * (4 * 768 * 768 + 3 * 768 * 2048 + 2 * 768) + 2 * 32000 * 768 + 768,
    "1b": 16 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048)
    + 2 * 32000 * 2048
    + 2048,
}


def preset(name: str) -> Config:
    return resolve(Config().replace(model=name, **PRESETS[name]))


def test_every_preset_is_counted() -> None:
    assert set(PUBLISHED) | set(OWN) == set(PRESETS)


@pytest.mark.parametrize(("name", "count"), [*PUBLISHED.items(), *OWN.items()])
def test_parameter_count(name: str, count: int) -> None:
    assert whole_parameters(preset(name)) == count


@pytest.mark.parametrize(
    ("name", "rope", "sequence", "tied", "kv_heads"),
    [
        ("llama2-7b", (10000.0, "none"), 4096, False, 32),
        ("llama2-13b", (10000.0, "none"), 4096, False, 40),
        ("llama2-70b", (10000.0, "none"), 4096, False, 8),
        ("llama3-8b", (500000.0, "none"), 8192, False, 8),
        ("llama3-70b", (500000.0, "none"), 8192, False, 8),
        ("llama3.1-8b", (500000.0, "llama3", 8.0, 1.0, 4.0, 8192), 8192, False, 8),
        ("llama3.1-70b", (500000.0, "llama3", 8.0, 1.0, 4.0, 8192), 8192, False, 8),
        ("llama3.1-405b", (500000.0, "llama3", 8.0, 1.0, 4.0, 8192), 8192, False, 8),
        ("llama3.2-1b", (500000.0, "llama3", 32.0, 1.0, 4.0, 8192), 8192, True, 8),
        ("llama3.2-3b", (500000.0, "llama3", 32.0, 1.0, 4.0, 8192), 8192, True, 8),
    ],
)
def test_what_a_parameter_count_does_not_show(
    name: str, rope: tuple, sequence: int, tied: bool, kv_heads: int
) -> None:
    model = preset(name).model
    scaling = (
        *(model.rope_scaling_factor, model.rope_low_freq_factor),
        *(model.rope_high_freq_factor, model.rope_original_seq_length),
    )
    assert (model.rope_theta, model.rope_scaling, *scaling)[: len(rope)] == rope
    assert (model.seq_length, model.tie_embeddings, model.num_kv_heads) == (
        *(sequence, tied, kv_heads),
    )
    assert model.norm_epsilon == 1e-5


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_known_fields_and_a_whole_run(name: str) -> None:
    config = preset(name)
    (spec,) = stage_specs(config)
    assert spec.num_layers == config.model.num_layers
    assert config.train.steps > 0
    assert config.train.min_lr < config.train.lr
    assert config.train.global_batch_size % config.train.micro_batch_size == 0
    assert config.model.head_dim * config.model.num_attention_heads == config.model.hidden_size
