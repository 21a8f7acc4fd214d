"""What a run records and shows: a line a step, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from torch import Tensor

from megalite.config import Config
from megalite.data.mixture import Evaluated, Mixture
from megalite.estimate import flops_per_token
from megalite.output import say

PEAK_FLOPS: Mapping[str, float] = MappingProxyType(
    {
        # Dense bf16, or fp16, from the vendors' data sheets, by a part of the device's name.
        "H100 PCIe": 756e12,
        "H100 NVL": 835e12,
        "H200 NVL": 835e12,
        "H100": 989e12,
        "H200": 989e12,
        "B200": 2250e12,
        "A100": 312e12,
        "L40S": 362e12,
        "RTX 4090": 165e12,
    }
)


@dataclass(frozen=True)
class Reading:
    """What one step left on the device.

    Attributes:
        values: the scalars.
        seconds: from `begin` to `push`, on the device's own clock on a GPU.
    """

    values: list[float]
    seconds: float


class DelayedScalars:
    """Scalars on the device, read one step late so that nothing waits for the step under way.

    `begin` and `end` mark a step; `push`, which may come after the next step, starts a copy of its
    scalars to pinned memory and returns the reading of the push before, which by then has arrived.
    A step that has not ended ends when its scalars are pushed.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._start = self._mark()
        self._ended: deque[tuple[Any, Any]] = deque()
        self._previous: tuple[Tensor, Any, Any, Any] | None = None

    def begin(self) -> None:
        """A step starts here."""
        self._start = self._mark()

    def end(self) -> None:
        """The step ends here."""
        self._ended.append((self._start, self._mark()))

    def push(self, scalars: Tensor) -> Reading | None:
        """Start reading `scalars` (1-d); returns the previous reading, None at the first call."""
        if not self._ended:
            self.end()
        if self._cuda:
            host = torch.empty(scalars.shape, dtype=scalars.dtype, pin_memory=True)
            host.copy_(scalars, non_blocking=True)
        else:
            host = scalars.clone()
        current = (host, *self._ended.popleft(), self._mark())
        previous = self.flush()
        self._previous = current
        return previous

    def flush(self) -> Reading | None:
        """The reading pushed last, once it has arrived."""
        if self._previous is None:
            return None
        host, start, end, arrived = self._previous
        self._previous = None
        if self._cuda:
            arrived.synchronize()
            return Reading(host.tolist(), start.elapsed_time(end) / 1e3)
        return Reading(host.tolist(), end - start)

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 and fp16 rate of the device [FLOP/s]; None for a CPU or an unlisted GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAK_FLOPS.items() if part in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: by the allocator on a GPU, resident in RAM otherwise [bytes]."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib if sys.platform == "darwin" else kib * 1024


class RunLog:
    """The run's record, kept by one rank.

    Args:
        config: the run.
        mixture: what it reads.
        folder: of the run; created.
        device: for the peak rate and the memory.
    """

    def __init__(self, config: Config, mixture: Mixture, folder: Path, device: torch.device):
        self._config, self._mixture, self._device = config, mixture, device
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / "metrics.jsonl", "a", encoding="utf-8")
        self._board = _open_tensorboard(config, folder)
        self._peak = peak_flops(device)
        self._bar = sys.stdout.isatty()
        self._training_s = 0.0
        self._steps_done = 0
        self._steps_skipped = 0

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._clear_bar()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def step(self, step: int, reading: Reading, lr: float) -> None:
        """Record optimizer step `step` (1 first); its reading is what `Trainer.train_step`
        returns, without the votes to stop."""
        grad_norm, loss, *others = reading.values
        seconds = max(reading.seconds, 1e-9)
        self._training_s += seconds
        self._steps_done += 1
        sizes, length = self._config.batch_sizes, self._config.model.seq_length
        tokens = sizes.size(step - 1) * length
        record: dict[str, Any] = {
            "step": step,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": sizes.consumed(step) * length,
            "tokens_per_s": tokens / seconds,
            "step_ms": seconds * 1e3,
            "memory_bytes": peak_memory_bytes(self._device),
        }
        if self._peak is not None:
            rate = flops_per_token(self._config) * tokens / seconds / self._config.world_size
            record["mfu"] = rate / self._peak
        if self._config.train.precision == "fp16":
            record["loss_scale"] = others.pop(0)
        if self._config.train.skip_spikes and others.pop(0):
            record["spike"] = True
        if "spike" in record or not math.isfinite(grad_norm):
            record["skipped"] = True
            self._steps_skipped += 1
        record["steps_skipped"] = self._steps_skipped
        self._write("train", step, record)
        if step % self._config.run.log_interval == 0 or step == self._config.train.steps:
            self.say(self._line(record))
        self._draw_bar(step)

    def validation(self, step: int, loss: float) -> None:
        """Record a validation after `step` steps."""
        self._evaluation("valid", step, loss)

    def test(self, step: int, loss: float) -> None:
        """Record the test after the last of `step` steps."""
        self._evaluation("test", step, loss)

    def _evaluation(self, which: Evaluated, step: int, loss: float) -> None:
        bits_per_byte = self._mixture.bits_per_byte(loss, which)
        record = {"step": step, f"{which}_loss": loss}
        text = f"{which:<5s} {step:>6d}  loss {loss:.4f}"
        if bits_per_byte is not None:
            record[f"{which}_bits_per_byte"] = bits_per_byte
            text += f"  {bits_per_byte:.4f} bits per byte"
        self._write(which, step, record)
        self.say(text)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._clear_bar()
        say(text)

    def _line(self, record: Mapping[str, Any]) -> str:
        steps = self._config.train.steps
        left = steps - record["step"]
        per_step = self._training_s / self._steps_done
        parts = [
            f"step {record['step']:>{len(str(steps))}d}/{steps}",
            f"loss {record['loss']:.4f}",
            f"lr {record['lr']:.2e}",
            f"norm {record['grad_norm']:.3f}",
            *_skipping(record),
            f"{_count(record['tokens_per_s'])} tok/s",
            f"{record['step_ms']:.0f} ms",
        ]
        if "mfu" in record:
            parts.append(f"MFU {100 * record['mfu']:.1f}%")
        parts.append(f"{record['memory_bytes'] / 2**30:.2f} GiB")
        parts.append(f"ETA {_duration(left * per_step)}")
        if record.get("skipped"):
            why = "spike" if "spike" in record else "gradient not finite"
            parts.append(f"{why}: step skipped")
        return "  ".join(parts)

    def _write(self, kind: str, step: int, record: Mapping[str, Any]) -> None:
        # JSON has no NaN: a loss that is not finite is written as a string.
        clean = {
            key: value if not isinstance(value, float) or math.isfinite(value) else str(value)
            for key, value in record.items()
        }
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in record.items():
                if key != "step" and not isinstance(value, bool):
                    self._board.add_scalar(f"{kind}/{key}", value, step)

    def _draw_bar(self, step: int) -> None:
        if not self._bar:
            return
        width, steps = 40, self._config.train.steps
        full = width * step // steps
        print(f"\r[{'█' * full}{'·' * (width - full)}] {step}/{steps}", end="", flush=True)

    def _clear_bar(self) -> None:
        if self._bar:
            print("\r\x1b[K", end="")


def _open_tensorboard(config: Config, folder: Path) -> Any:
    if config.run.tensorboard is False:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))


def _skipping(record: Mapping[str, Any]) -> Iterator[str]:
    """Of fp16 runs the loss scale, and how many steps have been skipped so far."""
    if "loss_scale" in record:
        yield f"scale {record['loss_scale']:.10g}"
    if record["steps_skipped"]:
        yield f"{record['steps_skipped']} skipped"


def _count(number: float) -> str:
    for limit, suffix in ((1e6, "M"), (1e3, "k")):
        # What rounds up to 1000 of a unit is 1 of the next.
        if number >= 0.99995 * limit:
            return f"{number / limit:.1f}{suffix}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
