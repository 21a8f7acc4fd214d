"""Saving and loading a training state beside torch.distributed.checkpoint, on one disk.

    python examples/bench_checkpoints.py                          the preset 1b, on a GPU: about 14 GB
    python examples/bench_checkpoints.py --model tiny --folder /tmp/x
    python examples/bench_checkpoints.py --rounds 5 --csv checkpoints.csv

The state is that of one rank: bf16 weights, fp32 master weights and two moments (on a CPU fp32
without master weights). Contestants in turn, each round in new files; medians. Ours hashes every
byte while it writes, and checks every byte before it reads; DCP does neither.

    copy     the values, to pinned memory: what an asynchronous save has to wait for at least
    stall    how long the training thread stands still
    save     until all is on the disk and has its name; DCP's files are synced too (`sync_files`)
    load     into the running state; verify: ours alone, every byte of it
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter

from megalite.checkpoint.reader import Checkpoint
from megalite.checkpoint.saver import Saver
from megalite.checkpoint.state import load_optimizer, load_weights, saved_parts
from megalite.config import Config, resolve, resolve_device
from megalite.data.mixture import prepare_mixture
from megalite.data.splits import open_samples
from megalite.parallel.groups import ParallelGroups
from megalite.presets import PRESETS
from megalite.trainer import Trainer

GB = 1e9


def main() -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="1b", help="a preset")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path, help="append the medians")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        bench = Bench(make_trainer(given.model), folder)
        rows = bench.measure(given.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    tell(bench, rows)
    if given.csv:
        append(given.csv, bench, rows)
    return 0


def make_trainer(model: str) -> Trainer:
    """A rank of its own, with one step taken, so that no state is zero."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    values = dict(mock_data=True, steps=2, global_batch_size=1, micro_batch_size=1, eval_steps=0)
    config = resolve(Config().replace(**PRESETS[model]).replace(**values))
    config = resolve_device(config, device.type)
    mixture = prepare_mixture(config.data)
    samples = open_samples(config, mixture)
    trainer = Trainer(config, samples, ParallelGroups.solo(), device)
    trainer.train_step(0)
    trainer.optimizer.validate()
    return trainer


class Bench:
    """Both contestants over one state.

    Args:
        trainer: whose state it is.
        folder: for their files, which are removed after each round.
    """

    def __init__(self, trainer: Trainer, folder: Path):
        self.trainer, self._folder = trainer, folder
        self._parts = list(saved_parts(trainer.flat, trainer.optimizer, trainer.groups))
        self.num_bytes = sum(part.values.nbytes for part in self._parts)
        self._saver = Saver(folder / "ours", 0, 1, dist.HashStore(), trainer.device, limit_s=3600.0)
        self._rounds = 0

    def measure(self, rounds: int) -> dict[str, list[float]]:
        """Seconds of each row, one a round; of several the first, which pins memory, is left
        out."""
        found: dict[str, list[float]] = {}
        for number in range(rounds + (rounds > 1)):
            for contestant in (self._copy, self._ours, self._dcp, self._dcp_async):
                for name, seconds in contestant().items():
                    print(f"round {number}: {name} {seconds:.3f} s", file=sys.stderr, flush=True)
                    if number or rounds == 1:
                        found.setdefault(name, []).append(seconds)
        return found

    def _copy(self) -> dict[str, float]:
        """The values to pinned memory, one copy a tensor, as fast as the bus is."""
        device = self.trainer.device
        pinned = device.type == "cuda"
        room = [torch.empty_like(p.values, device="cpu", pin_memory=pinned) for p in self._parts]

        def copy() -> None:
            for part, target in zip(self._parts, room, strict=True):
                target.copy_(part.values, non_blocking=True)
            self._wait()

        copy()
        return {"copy": self._timed(copy)}

    def _ours(self) -> dict[str, float]:
        self._rounds += 1
        begun = time.perf_counter()
        copied = self._saver.start(self._rounds, self._parts, {}, 0, 0)
        host_s = time.perf_counter() - begun
        if copied is not None:
            copied.synchronize()
        stall_s = time.perf_counter() - begun
        saved = self._saver.finish(is_last=True)
        save_s = time.perf_counter() - begun
        assert saved is not None
        forget(saved.folder)
        before = [part.values.flatten()[:1000].clone() for part in self._parts]
        for part in self._parts:
            part.values.zero_()
        verify_s = self._timed(lambda: _right(Checkpoint.open(saved.folder)))
        load_s = verify_s + self._timed(lambda: self._load(saved.folder))
        after = [part.values.flatten()[:1000] for part in self._parts]
        assert all(map(torch.equal, before, after))
        shutil.rmtree(saved.folder)
        return {
            "ours, host in save call": host_s,
            "ours, stall": stall_s,
            "ours, save": save_s,
            "ours, verify": verify_s,
            "ours, verify and load": load_s,
        }

    def _load(self, folder: Path) -> None:
        checkpoint = Checkpoint.open(folder)
        load_weights(self.trainer.flat, checkpoint)
        load_optimizer(self.trainer.flat, self.trainer.optimizer, checkpoint)
        self._wait()

    def _dcp(self) -> dict[str, float]:
        path = self._folder / "dcp"
        state = self._state()
        save_s = self._timed(lambda: dcp.save(state, storage_writer=_writer(path), no_dist=True))
        forget(path)
        load_s = self._timed(lambda: dcp.load(state, checkpoint_id=path, no_dist=True))
        shutil.rmtree(path)
        return {"DCP, save": save_s, "DCP, load": load_s}

    def _dcp_async(self) -> dict[str, float]:
        path = self._folder / "dcp-async"
        state = self._state()
        begun = time.perf_counter()
        future: Any = dcp.async_save(state, storage_writer=_writer(path), no_dist=True)
        stall_s = time.perf_counter() - begun
        future.result()
        save_s = time.perf_counter() - begun
        shutil.rmtree(path)
        return {"DCP, async stall": stall_s, "DCP, async save": save_s}

    def _state(self) -> dict[str, Tensor]:
        return {part.name: part.values for part in self._parts}

    def _timed(self, call: Callable[[], object]) -> float:
        self._wait()
        begun = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - begun

    def _wait(self) -> None:
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize()


def _writer(path: Path) -> FileSystemWriter:
    return FileSystemWriter(path, thread_count=min(16, os.cpu_count() or 1), sync_files=True)


def _right(checkpoint: Checkpoint) -> None:
    assert not checkpoint.damages()


def forget(folder: Path) -> None:
    """Take files out of the system's cache, as far as it lets us, so that the disk is read."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with open(path, "rb") as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def card(bench: Bench) -> str:
    """What it ran on."""
    device = bench.trainer.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def tell(bench: Bench, rows: dict[str, list[float]]) -> None:
    """The table."""
    print(f"{bench.num_bytes / GB:.2f} GB of {card(bench)}, torch {torch.__version__}")
    print(f"{'':<26s}{'seconds':>9s}{'GB/s':>9s}   all rounds")
    for name, seconds in rows.items():
        median = statistics.median(seconds)
        every = " ".join(f"{each:.2f}" for each in seconds)
        print(f"{name:<26s}{median:>9.3f}{bench.num_bytes / GB / median:>9.2f}   {every}")


def append(path: Path, bench: Bench, rows: dict[str, list[float]]) -> None:
    """The medians, a line each."""
    is_new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(["card", "torch", "bytes", "row", "seconds", "rounds"])
        for name, seconds in rows.items():
            median = round(statistics.median(seconds), 4)
            writer.writerow(
                [card(bench), torch.__version__, bench.num_bytes, name, median, len(seconds)]
            )


if __name__ == "__main__":
    sys.exit(main())
