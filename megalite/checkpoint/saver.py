"""Saving while training goes on: values are copied to the host, and a thread writes them.

    rank r   copy -> write and hash rank-r.safetensors, fsync -> tell rank 0
    rank 0            ... wait for all -> manifest, fsync -> rename -> tell all

Ranks talk through a store, apart from the collectives of training, which go on meanwhile. One save
is under way at a time. One that fails anywhere fails everywhere, and what was written of it is
removed; training goes on, and ends only after several failures in a row, or if the last one fails.

Source: the protocol that XTuner and NeMo-RL came to (a temporary folder, renamed when all ranks are
done), with the digests of Megatron-LM's `--verify-integrity` taken while writing.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalite.checkpoint.directory import Directory
from megalite.checkpoint.manifest import NAME, Manifest, Slice, StoredFile, StoredTensor
from megalite.checkpoint.parts import Part
from megalite.checkpoint.reader import threads
from megalite.checkpoint.regions import Region
from megalite.checkpoint.tensor_file import Layout
from megalite.checkpoint.writer import Staging, layout_of, read_back, write_file
from megalite.errors import RunError
from megalite.exit_codes import ExitCode
from megalite.faults import Faults

MOST_FAILURES = 3
"""In a row; then a run ends."""


class SaveError(RunError):
    """Checkpoints can't be written, which starting again would not change."""

    def __init__(self, message: str):
        super().__init__(message, ExitCode.BAD_INPUT)


@dataclass(frozen=True)
class Saved:
    """How a save ended; equal on all ranks but for the times.

    Attributes:
        step: of it.
        folder: of the checkpoint.
        problem: why there is none; empty: it is there.
        num_bytes: of all files.
        stall_s: that training waited [s].
        seconds: from the beginning to the end [s].
        removed: steps of the checkpoints that had to go.
    """

    step: int
    folder: Path
    problem: str
    num_bytes: int
    stall_s: float
    seconds: float
    removed: tuple[int, ...]


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay.

    Attributes:
        keep_last: so many of the newest; 0: all.
        keep_every: those of steps that are multiples of it, too; 0: no others.
    """

    keep_last: int = 0
    keep_every: int = 0


class Saver:
    """Writes the checkpoints of one rank's run.

    Args:
        path: the folder that they are in, the same on all machines.
        rank, size: of the world.
        store: that all ranks can talk through while others of their threads do; a connection of its
            own.
        device: of this rank.
        limit_s: how long ranks wait for each other's writing [s].
        retention: which ones stay.
        faults: to inject.
    """

    def __init__(
        self,
        path: Path,
        rank: int,
        size: int,
        store: dist.Store,
        device: torch.device,
        limit_s: float,
        retention: Retention | None = None,
        faults: Faults | None = None,
    ):
        self._directory = Directory(path)
        self._rank, self._size, self._store = rank, size, store
        self._limit = timedelta(seconds=limit_s)
        self._retention, self._faults = retention or Retention(), faults or Faults.none()
        self._staging = Staging(device)
        self._threads = max(1, threads() // max(1, min(size, os.cpu_count() or 1)))
        if rank == 0:
            store.set("run", uuid.uuid4().hex[:8])
        self._run_id = store.get("run").decode()
        self._saves = self._failures = 0
        self._problem = ""
        self._under_way: _UnderWay | None = None

    def reserve(self, parts: Sequence[Part]) -> None:
        """Take the memory that saving these will need, before the first save has to wait for it."""
        self._staging.reserve(layout_of(parts, self._rank).num_bytes)

    def start(
        self, step: int, parts: Sequence[Part], facts: Mapping[str, Any], samples: int, tokens: int
    ) -> torch.cuda.Event | None:
        """Begin to save; the one before has to be finished.

        Args:
            step: optimizer steps taken.
            parts: what this rank writes.
            facts, samples, tokens: for the manifest; rank 0's count.

        Returns:
            On a GPU: reached when the values have been copied; until then nothing may write there.
        """
        assert self._under_way is None, "one save at a time"
        begun = time.monotonic()
        layout = layout_of(parts, self._rank)
        copied = self._staging.take(parts, layout)
        self._saves += 1
        told = f"{self._saves}/"
        manifest = Manifest(step, samples, tokens, facts, {}, ())
        slices = {part.name: (part.dtype, part.shape, part.region) for part in parts}

        def write() -> None:
            if copied is not None:
                copied.synchronize()
            self._tell(told, self._write(step, layout, slices))
            if self._rank == 0:
                self._decide(told, manifest)

        thread = threading.Thread(target=write, name="checkpoint")
        self._under_way = _UnderWay(step, told, thread, begun, time.monotonic() - begun)
        thread.start()
        return copied

    @property
    def is_busy(self) -> bool:
        """Whether a save has begun that `finish` has not been called for."""
        return self._under_way is not None

    def is_done(self) -> bool:
        """Whether `finish` would not wait."""
        return self._under_way is None or self._store.check([self._under_way.told + "verdict"])

    def finish(self, *, is_last: bool = False) -> Saved | None:
        """How the save under way ended; waits for it. None: there is none.

        All ranks call it, after the same steps.

        Raises:
            SaveError: it is the last one and failed, or too many before it have.
        """
        save, self._under_way = self._under_way, None
        if save is None:
            if is_last and self._problem:
                raise SaveError(f"the last save failed: {self._problem}")
            return None
        waited = time.monotonic()
        save.thread.join()
        key = save.told + "verdict"
        self._store.wait([key], 2 * self._limit)
        verdict = json.loads(self._store.get(key))
        now = time.monotonic()
        saved = Saved(
            save.step,
            self._directory.folder(save.step),
            verdict["problem"],
            verdict["bytes"],
            stall_s=save.stall_s + now - waited,
            seconds=now - save.begun,
            removed=tuple(verdict["removed"]),
        )
        self._problem = saved.problem
        self._failures = self._failures + 1 if saved.problem else 0
        if saved.problem and (is_last or self._failures >= MOST_FAILURES):
            which = "the last save" if is_last else f"{self._failures} saves in a row"
            raise SaveError(f"{which} failed: {saved.problem}")
        return saved

    def _write(
        self,
        step: int,
        layout: Layout,
        slices: Mapping[str, tuple[str, tuple[int, ...], Region]],
    ) -> dict[str, Any]:
        """Write this rank's file; what rank 0 has to know of it."""
        name = f"rank-{self._rank:05d}.safetensors"
        try:
            self._faults.at("before-shard", step)
            folder = self._directory.temporary(step, self._run_id)
            folder.mkdir(parents=True, exist_ok=True)
            if not slices:
                return {"file": None}
            path = folder / name
            digests = write_file(
                path,
                layout,
                self._staging,
                self._threads,
                lambda: self._faults.at("half-shard", step),
            )
            if self._retention.keep_last and not read_back(path, layout, digests, self._threads):
                return {"problem": f"{path} holds something else than was written"}
        except Exception as error:
            return {"problem": f"rank {self._rank}: {_reason(error)}"}
        file = StoredFile(name, layout.num_bytes, digests)
        told = {
            key: (dtype, shape, asdict(region)) for key, (dtype, shape, region) in slices.items()
        }
        return {"file": asdict(file), "slices": told}

    def _tell(self, told: str, what: Mapping[str, Any]) -> None:
        self._store.set(f"{told}{self._rank}", json.dumps(what))

    def _decide(self, told: str, manifest: Manifest) -> None:
        """Rank 0: make a checkpoint of what all have written, or remove it; then tell all."""
        step, problem, num_bytes, removed = manifest.step, "", 0, list[int]()
        try:
            keys = [f"{told}{rank}" for rank in range(self._size)]
            self._store.wait(keys, self._limit)
            written = [json.loads(self._store.get(key)) for key in keys]
            problem = next((each["problem"] for each in written if "problem" in each), "")
            if not problem:
                manifest = _complete(manifest, written)
                num_bytes = sum(file.num_bytes for file in manifest.files)
                self._faults.at("before-manifest", step)
                _write_text(
                    self._directory.temporary(step, self._run_id) / NAME, manifest.to_json()
                )
                self._faults.at("before-rename", step)
                self._directory.commit(step, self._run_id)
                self._faults.at("after-rename", step)
                removed = self._prune(step)
        except Exception as error:
            problem = _reason(error)
        if problem:
            shutil.rmtree(self._directory.temporary(step, self._run_id), ignore_errors=True)
        verdict = {"problem": problem, "bytes": num_bytes, "removed": removed}
        self._store.set(told + "verdict", json.dumps(verdict))

    def _prune(self, step: int) -> list[int]:
        """Remove what retention does not keep; a folder that can't be removed now stays."""
        keep = self._retention
        with suppress(OSError):
            return self._directory.prune(step, keep.keep_last, keep.keep_every)
        return []

    def join(self) -> None:
        """Return when no thread of this rank writes."""
        if self._under_way is not None:
            self._under_way.thread.join()


@dataclass
class _UnderWay:
    """A save that has begun; `told` begins its keys in the store."""

    step: int
    told: str
    thread: threading.Thread
    begun: float
    stall_s: float


def _complete(manifest: Manifest, written: Sequence[Mapping[str, Any]]) -> Manifest:
    """The manifest with what the ranks have written."""
    files: list[StoredFile] = []
    found: dict[str, tuple[str, tuple[int, ...], list[Slice]]] = {}
    for each in written:
        if each["file"] is None:
            continue
        file = each["file"]
        files.append(StoredFile(file["name"], file["num_bytes"], tuple(file["digests"])))
        for name, (dtype, shape, region) in each["slices"].items():
            slices = found.setdefault(name, (dtype, tuple(shape), []))[2]
            slices.append(Slice(len(files) - 1, Region(**region)))
    tensors = {
        name: StoredTensor(dtype, shape, tuple(slices))
        for name, (dtype, shape, slices) in found.items()
    }
    return Manifest(
        manifest.step, manifest.samples, manifest.tokens, manifest.facts, tensors, tuple(files)
    )


def _write_text(path: Path, text: str) -> None:
    """A new file, on the disk when this returns."""
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _reason(error: Exception) -> str:
    """For people: `No space left on device` rather than a number."""
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}"
    return f"{type(error).__name__}: {error}"
