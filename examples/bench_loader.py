"""How many tokens a second does one process read into training batches?

    python examples/bench_loader.py
    python examples/bench_loader.py --documents
    python examples/bench_loader.py --tokens 4_000_000_000 --folder /scratch --device cuda

A dataset of random tokens in documents of random lengths is written once; then batches are read
from it in each order, with all that the reader's thread does for a step of one data rank: tokens,
mask and counts as tensors in the host's memory, pinned with `--device cuda`, and with `--documents`
where documents begin. The floor is what any loader does at least: copying as many tokens, widened
to int64, from one array to another. The readings are medians over rounds in which all orders take
turns, by the clock and by the CPU time of the thread, which other work on the machine delays less.
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
    parser.add_argument("--documents", action="store_true", help="with --reset-attention-mask")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--folder", help="for the dataset; default: temporary")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write(folder / "a", options.tokens, options.mean)
        measure(folder, options)


def write(prefix: Path, tokens: int, mean: int) -> None:
    """The dataset; its documents end with the last token of the vocabulary, and nothing else is."""
    draw = np.random.default_rng(0)
    stream = draw.integers(0, VOCAB_SIZE - 1, 1 << 24, dtype=np.uint16)
    writer = IndexedWriter(prefix, np.dtype("<u2"))
    written = 0
    while written < tokens:
        length = int(draw.integers(1, 2 * mean))
        first = int(draw.integers(0, len(stream) - length))
        document = stream[first : first + length].copy()
        document[-1] = VOCAB_SIZE - 1
        writer.add_sequence(document)
        writer.end_document()
        written += length
    writer.close()


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Rates of each order beside the floor."""
    path = str(folder / "a")
    cases: dict[str, dict[str, Any]] = {
        "epoch": {"data": (path,)},
        "megatron": {"data": (path,), "data_order": "megatron"},
        "epoch, blend": {"data": ("0.6", path, "0.4", path)},
        "megatron, blend": {"data": ("0.6", path, "0.4", path), "data_order": "megatron"},
    }
    loaders = {name: loader(folder, options, case) for name, case in cases.items()}
    tokens = options.batch * (options.seq_length + 1)
    source = np.random.default_rng(1).integers(0, VOCAB_SIZE, tokens, dtype=np.uint16)
    target = np.empty(tokens, np.int64)

    def copy(_: int) -> None:
        np.copyto(target, source)

    # `read_step`, not `train_batch`: the next batch would be read while another order is timed.
    reads = {"floor": copy, **{name: each.read_step for name, each in loaders.items()}}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in reads}
    for step in range(options.rounds):
        for name, read in reads.items():
            clock, cpu = time.perf_counter(), time.thread_time()
            read(step)
            taken[name].append((time.perf_counter() - clock, time.thread_time() - cpu))
    counted = options.batch * options.seq_length
    what = "where documents begin included" if options.documents else "without documents"
    print(
        f"batches of {options.batch} samples of {options.seq_length} tokens on {options.device}, "
        f"{what}, medians of {options.rounds}; million tokens/s"
    )
    print(f"{'':<16s} {'by the clock':>14s} {'by CPU time':>14s}")
    for name, times in taken.items():
        clock, cpu = (statistics.median(each) for each in zip(*times, strict=True))
        print(f"{name:<16s} {counted / clock / 1e6:14.1f} {counted / cpu / 1e6:14.1f}")


def loader(folder: Path, options: argparse.Namespace, case: dict[str, Any]) -> Loader:
    """Of one data rank."""
    config = resolve(
        Config().replace(
            data_cache_path=str(folder / "cache"),
            tokenizer_type="NullTokenizer",
            vocab_size=VOCAB_SIZE,
            seq_length=options.seq_length,
            micro_batch_size=options.batch,
            global_batch_size=options.batch,
            reset_attention_mask=options.documents,
            steps=STEPS,
            eval_steps=0,
            **case,
        )
    )
    samples = open_samples(config, prepare_mixture(config.data))
    alone: Any = SimpleNamespace(rank=0, size=1)
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    return Loader(config, samples.train, samples.valid, alone, device)


if __name__ == "__main__":
    main()
