"""torch's names of the precisions."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from megalite.config import Config
from megalite.precisions import precisions

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "fp32": torch.float32,
        "fp64": torch.float64,
    }
)
"""By the keys of `megalite.precisions.BYTES`."""


def weights_dtype(config: Config) -> torch.dtype:
    """Of the weights and activations of a run with a precision other than `auto`."""
    return DTYPES[precisions(config.train).weights]
