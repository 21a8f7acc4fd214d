"""How many tokens a second does one process read into training batches?

    python examples/bench_loader.py
    python examples/bench_loader.py --tokens 4_000_000_000 --folder /scratch

A dataset of random tokens in documents of random lengths is written once; then batches are read
from it in each order, as `Loader.train_batch` does it on one data rank on the CPU. The floor is
what any loader does at least: copying as many tokens, widened to int64, from one array to another.
The readings are medians over rounds in which all orders take turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from megalite.config import Config, resolve
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.loader import Loader
from megalite.data.mixture import prepare_mixture
from megalite.data.splits import open_samples

VOCAB_SIZE = 32_000
STEPS = 1000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=400_000_000, help="of the dataset")
    parser.add_argument("--mean", type=int, default=500, help="tokens of a document")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=32, help="samples of a step")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--folder", help="for the dataset; default: temporary")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write(folder / "a", options.tokens, options.mean)
        measure(folder, options.seq_length, options.batch, options.rounds)


def write(prefix: Path, tokens: int, mean: int) -> None:
    """The dataset."""
    draw = np.random.default_rng(0)
    stream = draw.integers(0, VOCAB_SIZE, 1 << 24, dtype=np.uint16)
    writer = IndexedWriter(prefix, np.dtype("<u2"))
    written = 0
    while written < tokens:
        length = int(draw.integers(1, 2 * mean))
        first = int(draw.integers(0, len(stream) - length))
        writer.add_sequence(stream[first : first + length])
        writer.end_document()
        written += length
    writer.close()


def measure(folder: Path, seq_length: int, batch: int, rounds: int) -> None:
    """Rates of each order beside the floor."""
    path = str(folder / "a")
    cases: dict[str, dict[str, Any]] = {
        "epoch": {"data": (path,)},
        "megatron": {"data": (path,), "data_order": "megatron"},
        "epoch, blend": {"data": ("0.6", path, "0.4", path)},
        "megatron, blend": {"data": ("0.6", path, "0.4", path), "data_order": "megatron"},
    }
    loaders = {name: loader(folder, seq_length, batch, case) for name, case in cases.items()}
    tokens = batch * (seq_length + 1)
    source = np.random.default_rng(1).integers(0, VOCAB_SIZE, tokens, dtype=np.uint16)
    target = np.empty(tokens, np.int64)
    taken: dict[str, list[float]] = {name: [] for name in ["floor", *loaders]}
    for step in range(rounds):
        start = time.perf_counter()
        np.copyto(target, source)
        taken["floor"].append(time.perf_counter() - start)
        for name, reader in loaders.items():
            start = time.perf_counter()
            reader.train_batch(step)
            taken[name].append(time.perf_counter() - start)
    print(f"batches of {batch} samples of {seq_length} tokens, medians of {rounds}")
    for name, times in taken.items():
        median = statistics.median(times)
        print(f"{name:<16s} {batch * seq_length / median / 1e6:8.1f} million tokens/s")


def loader(folder: Path, seq_length: int, batch: int, case: dict[str, Any]) -> Loader:
    """Of one data rank, on the CPU."""
    config = resolve(
        Config().replace(
            data_cache_path=str(folder / "cache"),
            vocab_size=VOCAB_SIZE,
            seq_length=seq_length,
            micro_batch_size=batch,
            global_batch_size=batch,
            steps=STEPS,
            eval_steps=0,
            **case,
        )
    )
    samples = open_samples(config, prepare_mixture(config.data))
    alone: Any = SimpleNamespace(rank=0, size=1)
    return Loader(config, samples.train, samples.valid, alone, torch.device("cpu"))


if __name__ == "__main__":
    main()
