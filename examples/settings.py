"""What a layout of the examples sets: `MEGALITE_KERNELS=torch --tp 2`; its ranks on one GPU."""

from __future__ import annotations

import math
import os
import socket


def words_and_settings(layout: str) -> tuple[list[str], dict[str, str]]:
    """The flags of a layout with their values, and what it sets in the environment."""
    words = layout.split()
    settings = dict(w.split("=", 1) for w in words if "=" in w and not w.startswith("-"))
    return [w for w in words if w.startswith("-") or "=" not in w], settings


def sharing_ranks(layout: str) -> list[dict[str, str]]:
    """What each rank finds in its environment if all ranks of the layout share one GPU."""
    words, _ = words_and_settings(layout)
    sizes = dict(zip(words[::2], words[1::2], strict=False))
    world_size = math.prod(int(sizes.get(axis, 1)) for axis in ("--tp", "--pp", "--dp"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "GROUP_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "NCCL_HOSTID": f"machine-{rank}",
            "NCCL_SOCKET_IFNAME": "lo",
        }
        for rank in range(world_size)
    ]


def on_gpu(number: int) -> dict[str, str]:
    """What a process finds in its environment that is to see one of the GPUs that this one sees."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return {"CUDA_VISIBLE_DEVICES": seen.split(",")[number] if seen else str(number)}
