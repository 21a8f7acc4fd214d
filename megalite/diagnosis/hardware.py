"""Rows for the machine: processor, GPUs, their links, and what the ranks talk through."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import torch
import torch.distributed as dist

from megalite.diagnosis.row import ABSENT, BROKEN, OK, SLOWER, Row
from megalite.parallel.devices import usable_cores

QUERY_LIMIT_S = 5.0

_SLOW_LINKS = frozenset({"SYS", "NODE", "PHB", "PXB", "PIX"})
"""Of `nvidia-smi topo`: everything that is not NVLink."""


def hardware() -> list[Row]:
    """All rows of this room."""
    return [_python(), _torch(), _processor(), _gpus(), *_links(), *_communication()]


def has_nvidia_gpu() -> bool:
    """Whether the kernel knows an NVIDIA GPU, whatever torch says."""
    folder = Path("/proc/driver/nvidia/gpus")
    return folder.is_dir() and any(folder.iterdir())


def _python() -> Row:
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Row("python", OK, f"{text}, {sys.executable}")


def _torch() -> Row:
    cuda = torch.version.cuda
    text = f"{torch.__version__}, " + (f"built for CUDA {cuda}" if cuda else "CPU build")
    if cuda is None and has_nvidia_gpu():
        why = "this machine has an NVIDIA GPU, which a CPU build cannot use"
        return Row("torch", SLOWER, text, why, "pip uninstall -y torch && pip install torch")
    return Row("torch", OK, text)


def _processor() -> Row:
    cores = usable_cores()
    instructions = torch.backends.cpu.get_cpu_capability()
    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        memory = f", {size / 2**30:.0f} GiB of memory"
    return Row("processor", OK, f"{cores} usable cores, {instructions}{memory}")


def _gpus() -> Row:
    if not torch.cuda.is_available():
        return _no_gpus()
    kinds: Counter[str] = Counter()
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        size = f"{gpu.total_memory / 2**30:.0f} GiB"
        kinds[f"{gpu.name} (sm_{gpu.major}{gpu.minor}, {size})"] += 1
    text = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return Row("GPUs", OK, f"{text}, driver {_driver()}")


def _no_gpus() -> Row:
    """Why torch sees none."""
    on_the_cpu = "ranks run on the CPU"
    if not has_nvidia_gpu():
        return Row("GPUs", ABSENT, f"none found: {on_the_cpu}")
    if torch.version.cuda is None:
        return Row("GPUs", ABSENT, f"not usable by this build of torch: {on_the_cpu}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return Row("GPUs", ABSENT, f"hidden by CUDA_VISIBLE_DEVICES={visible}: {on_the_cpu}")
    if not list(Path("/dev").glob("nvidia[0-9]*")):
        why = "this container or job step was not given one"
        return Row("GPUs", ABSENT, f"on this machine, but not here: {on_the_cpu}", why)
    why = f"the driver ({_driver()}) and torch {torch.__version__} do not fit together"
    return Row("GPUs", BROKEN, "found, but torch cannot use them", why, "nvidia-smi")


def _links() -> list[Row]:
    """How the GPUs of this machine reach each other."""
    count = torch.cuda.device_count()
    if count < 2:
        return []
    apart = [
        pair
        for pair in combinations(range(count), 2)
        if not torch.cuda.can_device_access_peer(*pair)
    ]
    if apart:
        pairs = ", ".join(f"{a}-{b}" for a, b in apart[:4])
        why = f"GPUs {pairs} cannot reach each other's memory: everything goes through the host"
        return [
            Row("links", SLOWER, "no peer access between all GPUs", why, "nvidia-smi topo -p2p r")
        ]
    kinds = links_of(_query("topo", "-m"))
    if not kinds:
        return [Row("links", OK, "peer access between all GPUs")]
    text = ", ".join(f"{kind} between {n} pairs" for kind, n in kinds.items())
    if _SLOW_LINKS & set(kinds):
        why = "PCIe is a tenth of NVLink: keep tp within GPUs that NVLink joins"
        return [Row("links", SLOWER, text, why, "nvidia-smi topo -m")]
    return [Row("links", OK, text)]


def links_of(matrix: str) -> dict[str, int]:
    """Kinds of link between GPUs, and between how many pairs, from `nvidia-smi topo -m`.

    A row reads `GPU1  NV18  X  SYS ...`, one cell for each GPU, then cells for other things.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", matrix)
    rows = [line.split() for line in plain.splitlines() if re.match(r"\s*GPU\d+\s+\S", line)]
    rows = [row for row in rows if "X" in row[1:]]
    counts: Counter[str] = Counter()
    for index, row in enumerate(rows):
        counts.update(row[1 : index + 1])
    return dict(counts)


def _communication() -> list[Row]:
    rows = []
    if torch.cuda.is_available():
        if dist.is_nccl_available():
            version = ".".join(map(str, torch.cuda.nccl.version()))
            rows.append(Row("NCCL", OK, f"{version}, between ranks on GPUs"))
        else:
            why = "this build of torch lacks it: ranks on GPUs cannot talk to each other"
            rows.append(Row("NCCL", BROKEN, "none", why, "pip install --force-reinstall torch"))
    if dist.is_gloo_available():
        rows.append(Row("gloo", OK, "between ranks on CPUs"))
    else:
        why = "this build of torch lacks it: ranks on CPUs cannot talk to each other"
        rows.append(Row("gloo", BROKEN, "none", why, "pip install --force-reinstall torch"))
    return rows


def _driver() -> str:
    version = _query("--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    return version or "of unknown version"


def _query(*words: str) -> str:
    """Output of nvidia-smi; empty if it is not there or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, *words], capture_output=True, text=True, timeout=QUERY_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
