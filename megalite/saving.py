"""When a run saves, and what it says of it: between the trainer and `checkpoint.saver`."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megalite
from megalite.checkpoint.directory import LOCK, Directory, Lock
from megalite.checkpoint.parts import Part
from megalite.checkpoint.reader import Checkpoint
from megalite.checkpoint.saver import Retention, Saved, SaveError, Saver
from megalite.checkpoint.state import saved_parts
from megalite.config import Config
from megalite.errors import ConfigError, DamagedError
from megalite.estimate import whole_parameters
from megalite.events import Events
from megalite.faults import Faults
from megalite.optim.flat import FlatParameters
from megalite.optim.optimizer import Optimizer
from megalite.parallel.agree import agree
from megalite.parallel.groups import ParallelGroups
from megalite.resume import Candidate, find

SLOWEST_DISK_BYTES_PER_S = 5e6
"""Slower than this, saving and loading is a hang."""
LIMIT_S = 300.0
STATE_BYTES = 16
"""Of a parameter in a checkpoint, at most: weight, master weight, two moments, rounded up."""

Tell = Callable[[str], None]


def nothing(text: str) -> None:
    """What ranks say that show nothing."""


class Saves:
    """The checkpoints of one rank's run.

    Args:
        path: the folder that they are in.
        config: the run.
        facts: fingerprints of its data and tokenizer.
        groups: of this rank.
        store: in which ranks leave word for each other.
        device: of this rank.
        events: what happened to the run.
        faults: to inject.
        weights_only: without the optimizer's states.

    Attributes:
        in_background: training goes on while a checkpoint is written.
        tell: shows a line, on the rank that shows any.

    Raises:
        ConfigError: another run writes there, not all ranks see the folder, or it can't be written.
    """

    def __init__(
        self,
        path: Path,
        config: Config,
        facts: Mapping[str, Any],
        groups: ParallelGroups,
        store: dist.Store,
        device: torch.device,
        *,
        events: Events | None = None,
        faults: Faults | None = None,
        weights_only: bool = False,
    ):
        options = config.checkpoint
        self._config, self._groups, self._device = config, groups, device
        self._events, self._weights_only = events or Events(None), weights_only
        self.tell: Tell = nothing
        self._interval = options.save_interval
        self.in_background = options.async_save
        self._facts = facts_of(config, facts)
        self._saved_step = -1
        self._lock = _taken(path, config, groups.world_rank, store, shared=not weights_only)
        self.saver = Saver(
            path,
            groups.world_rank,
            config.world_size,
            store,
            device,
            # Who waits too long for a rank is told by the watchdog, before this ends the wait.
            2 * limit_s(config, STATE_BYTES * whole_parameters(config)) + LIMIT_S,
            Retention(options.keep_last, options.keep_every),
            faults,
        )

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint belongs after so many steps."""
        return bool(self._interval) and step % self._interval == 0 and step != self._saved_step

    def start(
        self, step: int, flat: FlatParameters, optimizer: Optimizer
    ) -> torch.cuda.Event | None:
        """Begin to save, once the save before has ended; nothing if this step is saved already.

        Args:
            step: steps taken.
            flat, optimizer: validated.

        Returns:
            On a GPU: reached when the values are copied; until then nothing may write there.
        """
        if step == self._saved_step:
            return None
        self.finish()
        if self._lock is not None and self._lock.is_lost:
            raise SaveError(
                "another run has taken the folder of checkpoints, as this one stood still"
            )
        self._saved_step = step
        if self._config.train.offload_optimizer and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # states are on their way to the host
        sizes, length = self._config.batch_sizes, self._config.model.seq_length
        samples = sizes.consumed(step)
        parts = self._parts(flat, optimizer)
        return self.saver.start(step, parts, self._facts, samples, samples * length)

    def reserve(self, flat: FlatParameters, optimizer: Optimizer) -> None:
        """Take the memory for saves between steps, so that the first one does not wait for it."""
        if self._interval and self._device.type == "cuda":
            self.saver.reserve(self._parts(flat, optimizer))

    def _parts(self, flat: FlatParameters, optimizer: Optimizer) -> list[Part]:
        return list(saved_parts(flat, None if self._weights_only else optimizer, self._groups))

    def goes_on(self, start: Candidate, path: Path) -> None:
        """The run has started from a checkpoint.

        Args:
            start: that one.
            path: of the folder of this run's own checkpoints.
        """
        if start.folder.parent == path and not start.anew:
            self._saved_step = start.step

    def look(self) -> None:
        """Tell of a save that has ended; waits for nothing."""
        if self.saver.is_busy and self.saver.is_done():
            self.finish()

    def finish(self, *, is_last: bool = False) -> None:
        """Wait for a save under way, and tell how it ended.

        Raises:
            SaveError: it is the last one and failed, or too many before it have.
        """
        saved = self.saver.finish(is_last=is_last)
        if saved is None:
            return
        if saved.problem:
            self._saved_step = -1
            self.tell(f"*** no checkpoint of step {saved.step}: {saved.problem}; training goes on")
            self._events.write("save failed", step=saved.step, why=saved.problem)
            return
        self._events.write("save", step=saved.step, seconds=saved.stall_s, bytes=saved.num_bytes)
        self.tell(_words(saved))

    def close(self) -> None:
        """Let others write to the folder."""
        self.saver.join()
        if self._lock is not None:
            self._lock.release()


def facts_of(config: Config, fingerprints: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of the run."""
    return {
        "config": config.to_saved(),
        **fingerprints,
        "versions": {
            "megalite": megalite.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def start_point(
    config: Config, rank: int, store: dist.Store, attempt: int = 0, tell: Tell = nothing
) -> Candidate | None:
    """The checkpoint that the run starts from, the same one on all ranks; None: initial weights.

    Ranks share the work of checking every byte. A damaged one is told of, and the one before is
    taken.

    Raises:
        DamagedError: none can be used, or --no-fallback and the newest can't.
    """
    if rank == 0:
        store.set("found", _found(config, attempt))
    said = store.get("found").decode()
    kind, *lines = said.splitlines()
    if kind == "damaged":
        raise DamagedError(lines)
    damaged = [line.removeprefix("!") for line in lines if line.startswith("!")]
    for line in damaged:
        tell(f"*** passed over: {line}")
    folders = [Path(line) for line in lines if not line.startswith("!")]
    for number, folder in enumerate(folders):
        wrong = _wrong(config, folder, rank, dist.PrefixStore(f"candidate/{number}", store))
        if not wrong:
            found = find(config, attempt).candidates
            return next(each for each in found if each.folder == folder)
        damaged += wrong
        for line in wrong:
            tell(f"*** passed over: {line}")
        if not config.checkpoint.fallback:
            break
    if folders:
        raise DamagedError(["no checkpoint can be used", *damaged])
    return None


def _found(config: Config, attempt: int) -> str:
    """What rank 0 tells all: a word, then folders, best first, and `!` with what is wrong."""
    try:
        found = find(config, attempt)
    except ConfigError as error:
        return "\n".join(["damaged", *error.violations])
    return "\n".join(
        [
            "found",
            *(f"!{line}" for line in found.damaged),
            *(str(c.folder) for c in found.candidates),
        ]
    )


def _wrong(config: Config, folder: Path, rank: int, store: dist.Store) -> list[str]:
    """What any rank finds wrong with a checkpoint's bytes; each looks at its share of the files."""
    problems: list[str] = []
    size = config.world_size
    try:
        checkpoint = Checkpoint.open(folder)
        if config.checkpoint.verify_load == "full":
            mine = range(rank, len(checkpoint.manifest.files), size)
            problems = [f"{folder}: {damage}" for damage in checkpoint.damages(mine)]
    except DamagedError as error:
        problems = error.violations
    try:
        num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        agree(store, rank, size, {}, problems, limit_s(config, num_bytes))
    except ConfigError as error:
        return error.violations
    return []


def limit_s(config: Config, num_bytes: float) -> float:
    """How long writing or reading so many bytes may take [s]."""
    return config.supervision.save_timeout or LIMIT_S + num_bytes / SLOWEST_DISK_BYTES_PER_S


def _taken(
    path: Path, config: Config, rank: int, store: dist.Store, *, shared: bool
) -> Lock | None:
    """Rank 0's lock of a folder that other runs may want too; all ranks see the folder
    afterwards."""
    lock, problems, size = None, list[str](), config.world_size
    if rank == 0:
        try:
            path.mkdir(parents=True, exist_ok=True)
            if shared:
                lock = Lock(path, config.run.name)
                Directory(path).sweep()
        except OSError as error:
            problems = [f"{path}: {error.strerror}"]
        except ConfigError as error:
            problems = error.violations
    agree(dist.PrefixStore("lock", store), rank, size, {}, problems)
    if not (path / LOCK if shared else path).exists():
        problems = [f"{path} is not the same folder on all machines; give one that they share"]
    agree(dist.PrefixStore("folder", store), rank, size, {}, problems)
    return lock


def _words(saved: Saved) -> str:
    text = (
        f"saved {saved.folder}: {saved.num_bytes / 2**30:.2f} GiB in {saved.seconds:.1f} s; "
        f"training waited {saved.stall_s * 1e3:.0f} ms"
    )
    if saved.removed:
        text += f"; removed step {', '.join(map(str, saved.removed))}"
    return text
