"""How long do the indices of Megatron-LM's order, of blends and of packing take; how much memory?

    python examples/bench_index.py
    python examples/bench_index.py --documents 10_000_000 --epochs 3
    python examples/bench_index.py --blend 10_000_000
    python examples/bench_index.py --packing --documents 10_000_000

Documents of random lengths, one sequence each. The floor is what no exact implementation can avoid:
numpy's own RandomState.shuffle of as many int32. Memory is the highest resident size of this
process, the lengths (4 bytes a document) included.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from megalite.data.best_fit import pack
from megalite.data.best_fit_samples import BLOCK_DOCUMENTS
from megalite.data.blend import Greedy, compiler
from megalite.data.megatron_index import build_index


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=100_000_000)
    parser.add_argument("--mean", type=int, default=500, help="tokens of a document")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--blend", type=int, default=0, metavar="SAMPLES", help="a blend instead")
    parser.add_argument("--packing", action="store_true", help="best-fit packing instead")
    options = parser.parse_args()
    if options.packing:
        packing(options.documents, options.mean, options.seq_length)
    elif options.blend:
        blend(options.blend)
    else:
        index(options.documents, options.mean, options.seq_length, options.epochs)


def index(documents: int, mean: int, seq_length: int, epochs: int) -> None:
    """Time of the three arrays, beside the floor."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, 2 * mean, documents, dtype=np.int32)
    at_start = peak_bytes()
    whole = int(lengths.sum(dtype=np.int64))
    num_samples = (epochs * whole - 1) // seq_length
    start = Clock()
    built = build_index(lengths, 0, documents, num_samples, seq_length, 1234)
    taken = start.taken()
    print(
        f"{documents:,} documents, {whole:,} tokens, {epochs} epoch{'s' if epochs > 1 else ''}, "
        f"sequence {seq_length}: {len(built.shuffle):,} samples"
    )
    print(f"index        {taken}")
    arrays = (built.documents, built.samples, built.shuffle)
    print(f"its arrays   {sum(array.nbytes for array in arrays) / 2**20:8.0f} MiB")
    print(f"peak         {peak_bytes() / 2**20:8.0f} MiB, before {at_start / 2**20:.0f} MiB")
    start = Clock()
    np.random.RandomState(1234).shuffle(built.documents)
    print(f"floor        {start.taken()}, the shuffle of documents alone")


def packing(documents: int, mean: int, seq_length: int) -> None:
    """Time of best-fit packing, beside the floor: sorting the lengths, as 16-bit numbers."""
    random = np.random.default_rng(0)
    # As of web pages: many short ones, some longer than a sample.
    lengths = np.empty(documents, np.int32)
    for i in range(0, documents, BLOCK_DOCUMENTS):
        block = lengths[i : i + BLOCK_DOCUMENTS]
        block[:] = 1 + random.lognormal(np.log(mean) - 0.5, 1.0, len(block))
    at_start = peak_bytes()
    start = Clock()
    found = pack(
        lambda: (lengths[i : i + BLOCK_DOCUMENTS] for i in range(0, documents, BLOCK_DOCUMENTS)),
        seq_length,
    )
    taken = start.taken()
    samples = len(found.firsts) - 1 + len(found.whole)
    print(
        f"{documents:,} documents, {lengths.sum(dtype=np.int64):,} tokens, sequence {seq_length}: "
        f"{samples:,} samples, {100 * (1 - found.num_tokens / samples / (seq_length + 1)):.2g}% "
        f"empty, {100 * found.num_cut / documents:.2g}% of the documents cut"
    )
    print(f"packing      {taken}")
    arrays = (found.documents, found.firsts, found.whole)
    print(f"its arrays   {sum(array.nbytes for array in arrays) / 2**20:8.0f} MiB")
    print(f"peak         {peak_bytes() / 2**20:8.0f} MiB, before {at_start / 2**20:.0f} MiB")
    start = Clock()
    for first in range(0, documents, BLOCK_DOCUMENTS):
        block = np.minimum(lengths[first : first + BLOCK_DOCUMENTS], 65535).astype(np.uint16)
        np.argsort(block, kind="stable")
    print(f"floor        {start.taken()}, sorting the lengths alone")


def blend(samples: int) -> None:
    """Time of a blend of eight datasets, with the compiler if there is one."""
    weights = [0.31, 0.23, 0.17, 0.11, 0.08, 0.05, 0.03, 0.02]
    for name, compiled in (("Python", None), ("numba", compiler())):
        if name == "numba" and compiled is None:
            print("numba is not installed")
            continue
        greedy = Greedy(weights, compiled=compiled)
        greedy.extend(1)  # compiles
        start = Clock()
        greedy.extend(samples - 1)
        print(f"{name:<8s} {samples:,} samples of 8 datasets: {start.taken()}")


class Clock:
    """Wall time, and this process's own beside it: on a busy machine they differ."""

    def __init__(self) -> None:
        self._wall_s, self._cpu_s = time.perf_counter(), time.process_time()

    def taken(self) -> str:
        """Since the start."""
        wall_s, cpu_s = time.perf_counter() - self._wall_s, time.process_time() - self._cpu_s
        return f"{wall_s:8.2f} s ({cpu_s:.2f} s of CPU)"


def peak_bytes() -> int:
    """Highest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
