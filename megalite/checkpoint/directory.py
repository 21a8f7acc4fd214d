"""The folder that a run's checkpoints are in. No torch.

    DIR/step-00001200/             a checkpoint: complete, or not there
    DIR/step-00001300.tmp-<run>/   one that is being written, or was when its run died
    DIR/step-00001100.damaged-<run>/    one that was in the way of a new one of its step
    DIR/lock                       who writes here

A checkpoint is there once its folder has its name, which it gets last, when all it consists of is
on the disk. Which one is the newest is seen by looking; no file says it, so none can be wrong.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from megalite.checkpoint.manifest import read_manifest
from megalite.errors import ConfigError, DamagedError

LOCK = "lock"
BEAT_S = 5.0
STALE_S = 30.0
"""A lock that nobody has touched for so long is nobody's."""
SETTLE_S = 0.2
"""Two runs may find a lock to be nobody's at once, and one remove the other's: it looks again."""

_NAME = re.compile(r"step-(\d{8,12})")


class Directory:
    """A folder of checkpoints.

    Args:
        path: it need not exist.
    """

    def __init__(self, path: Path):
        self.path = path

    def folder(self, step: int) -> Path:
        """Of the checkpoint after so many steps."""
        return self.path / f"step-{step:08d}"

    def temporary(self, step: int, run_id: str) -> Path:
        """Where it is written."""
        return self.path / f"step-{step:08d}.tmp-{run_id}"

    def steps(self) -> list[int]:
        """Of the checkpoints that are there, damaged ones too, newest first."""
        try:
            names = [path.name for path in self.path.iterdir()]
        except OSError:
            return []
        return sorted((int(m[1]) for m in map(_NAME.fullmatch, names) if m), reverse=True)

    def sweep(self) -> None:
        """Remove what dead runs were writing; whoever calls it has the lock."""
        for path in self.path.glob("step-*.tmp-*"):
            shutil.rmtree(path, ignore_errors=True)

    def commit(self, step: int, run_id: str) -> None:
        """Give a checkpoint, all of whose files are on the disk, its name.

        One that is there already is damaged, or the run would have gone on from it: it is put
        aside under another name, not removed.
        """
        temporary, final = self.temporary(step, run_id), self.folder(step)
        sync_folder(temporary)
        if final.exists():
            os.rename(final, self.path / f"{final.name}.damaged-{run_id}")
        os.rename(temporary, final)
        sync_folder(self.path)

    def prune(self, newest: int, keep_last: int, keep_every: int) -> list[int]:
        """Remove checkpoints, oldest first; returns their steps. The newest one, which has just
        been read back, always stays.

        Args:
            newest: step of that one; what is of later steps is damaged, or of another run, and is
                neither counted nor touched.
            keep_last: how many of the newest stay, 0: all.
            keep_every: those of steps that are multiples of it stay too, 0: none more.
        """
        if not keep_last:
            return []
        old = [step for step in self.steps() if step <= newest][keep_last:]
        gone_steps = [step for step in sorted(old) if not keep_every or step % keep_every]
        for step in gone_steps:
            # Under another name first: half of a checkpoint must not look like one.
            gone = self.path / f"step-{step:08d}.tmp-removed"
            shutil.rmtree(gone, ignore_errors=True)
            os.rename(self.folder(step), gone)
            shutil.rmtree(gone, ignore_errors=True)
        return gone_steps

    def valid_steps(self) -> Iterator[tuple[int, str]]:
        """Each checkpoint, newest first, and what is wrong with its manifest, or with sizes or
        headers of its files; empty: nothing."""
        for step in self.steps():
            try:
                manifest = read_manifest(self.folder(step))
                wrong = "" if manifest.step == step else f"its manifest is of step {manifest.step}"
            except DamagedError as error:
                wrong = error.violations[0]
            yield step, wrong


class Lock:
    """A folder of checkpoints for this run alone, until `release`.

    A thread touches the file, so that another machine sees that its owner lives. On the same
    machine a process that is gone gives its lock back at once.

    Args:
        path: of the folder, which is made.
        run_id: of this run.

    Raises:
        ConfigError: another run writes there, or the folder can't be written to.

    Attributes:
        is_lost: another run has taken the folder, as this one did not move for too long.
    """

    def __init__(self, path: Path, run_id: str):
        self._file = path / LOCK
        self._said = json.dumps({"run": run_id, "pid": os.getpid(), **_machine()})
        self.is_lost = False
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            raise ConfigError(f"--save {path}: {error.strerror}: choose another folder") from None
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lock")
        self._thread.start()

    def release(self) -> None:
        """Give the folder back."""
        self._released.set()
        self._thread.join()
        if self._is_ours():
            self._file.unlink(missing_ok=True)

    def _take(self) -> None:
        deadline, seen = time.monotonic() + STALE_S, None
        while not self._created():
            owner, beat = self._owner(), self._last_beat()
            if seen is not None and beat != seen:
                raise ConfigError(self._refusal(owner))
            seen = beat
            is_old = beat is not None and time.time() - beat > STALE_S
            if _is_gone(owner) or (_is_here(owner) and is_old) or time.monotonic() > deadline:
                self._file.unlink(missing_ok=True)
                deadline, seen = time.monotonic() + STALE_S, None
            elif _is_here(owner):
                raise ConfigError(self._refusal(owner))
            else:
                time.sleep(1.0)

    def _created(self) -> bool:
        """Whether the lock was nobody's, and is ours now."""
        try:
            with open(self._file, "x", encoding="utf-8") as file:
                file.write(self._said)
        except FileExistsError:
            return False
        time.sleep(SETTLE_S)
        return self._is_ours()

    def _refusal(self, owner: dict[str, object]) -> str:
        return (
            f"--save {self._file.parent}: the run {owner.get('run')} writes there, process "
            f"{owner.get('pid')} on {owner.get('host')}: stop it, or choose another folder"
        )

    def _owner(self) -> dict[str, object]:
        try:
            owner = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _last_beat(self) -> float | None:
        try:
            return self._file.stat().st_mtime
        except OSError:
            return None

    def _is_ours(self) -> bool:
        return self._owner() == json.loads(self._said)

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            try:
                os.utime(self._file)
                self.is_lost = not self._is_ours()
            except OSError:
                continue  # the disk may be back at the next one


def _is_here(owner: dict[str, object]) -> bool:
    """Whether the owner's process number means something here: of this machine, since it was
    started, and of this container."""
    return all(owner.get(name) == value for name, value in _machine().items())


def _is_gone(owner: dict[str, object]) -> bool:
    """Whether the owner was a process of this machine that is no more."""
    here, pid = _machine(), owner.get("pid")
    if owner.get("host") != here["host"] or not isinstance(pid, int):
        return False
    if owner.get("boot") != here["boot"]:
        return True
    if not _is_here(owner):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _machine() -> dict[str, str]:
    """This machine, since it was started, and the container: process numbers are of these."""
    found = {"host": socket.gethostname(), "boot": "", "container": ""}
    try:
        found["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        found["container"] = os.readlink("/proc/self/ns/pid")
    except OSError:
        pass  # not on this system
    return found


def sync_folder(folder: Path) -> None:
    """Put a folder's names on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
