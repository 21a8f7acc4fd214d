"""One GPU: the same initial weights and dropout as a CPU, the same training, and nothing waits."""

from __future__ import annotations

import pytest
import torch

from megalite.config import Config, resolve
from megalite.data.mixture import prepare_mixture
from megalite.data.splits import open_samples
from megalite.layers.batch import DropoutPlace
from megalite.layers.dropout import attention_keep, hidden_dropout
from megalite.layers.sdpa import fastest_attention
from megalite.metrics import DelayedScalars
from megalite.parallel.groups import ParallelGroups
from megalite.parallel.rng import normal_slice
from megalite.trainer import Trainer

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def make_trainer(device: torch.device, **values: object) -> Trainer:
    small = dict(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        num_kv_heads=2,
        ffn_hidden_size=96,
        seq_length=32,
        micro_batch_size=2,
        global_batch_size=8,
        steps=20,
        lr=1e-3,
        precision="fp32",
        device=device.type,
    )
    config = resolve(Config().replace(**{**small, **values}))
    samples = open_samples(config, prepare_mixture(config.data))
    return Trainer(config, samples, ParallelGroups.solo(), device)


def train(trainer: Trainer, steps: int) -> list[float]:
    return [trainer.train_step(step)[1].item() for step in range(steps)]


def worst(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))


def test_random_values_are_the_cpu_s_bit_for_bit() -> None:
    rows, columns = range(3, 1500), range(10, 700)
    on_cpu = normal_slice(99, (2000, 1000), rows, columns, CPU)
    on_gpu = normal_slice(99, (2000, 1000), rows, columns, CUDA)
    assert torch.equal(on_gpu.cpu(), on_cpu)


def test_dropout_masks_are_the_cpu_s() -> None:
    masks = []
    for device in (CPU, CUDA):
        place = DropoutPlace(5, 7, torch.arange(3, device=device))
        x = torch.ones(16, 3, 24, device=device)
        hidden = hidden_dropout(x, 0.3, place, "site", 16)
        keep = attention_keep(0.3, place, "site", range(2, 4), 8, 16)
        masks.append((hidden.cpu(), keep.cpu()))
    assert torch.equal(masks[0][0], masks[1][0])
    assert torch.equal(masks[0][1], masks[1][1])


def test_training_equals_the_cpu_s() -> None:
    want, got = train(make_trainer(CPU), 20), train(make_trainer(CUDA), 20)
    assert worst(got, want) <= 1e-5
    want = train(make_trainer(CPU, precision="fp64"), 20)
    got = train(make_trainer(CUDA, precision="fp64"), 20)
    assert worst(got, want) <= 1e-11


def test_bf16_follows_fp32() -> None:
    want = train(make_trainer(CUDA), 20)
    with fastest_attention(CUDA):
        got = train(make_trainer(CUDA, precision="bf16"), 20)
    assert worst(got, want) <= 5e-3


def test_recompute_and_dropout_change_nothing() -> None:
    drop = dict(hidden_dropout=0.1, attention_dropout=0.1)
    plain = train(make_trainer(CUDA, **drop), 5)
    for recompute in ("selective", "full"):
        assert worst(train(make_trainer(CUDA, recompute=recompute, **drop), 5), plain) <= 1e-6


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_waits_for_the_gpu_in_a_step() -> None:
    trainer = make_trainer(CUDA, precision="bf16")
    scalars = DelayedScalars(CUDA)
    trainer.train_step(0)  # allocations and handles of the first step may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        statistics = trainer.train_step(1)
        scalars.begin()
        scalars.push(statistics)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    reading = scalars.flush()
    assert reading is not None
    assert reading.values == statistics.tolist()
