"""Tables of rotary angles, with Llama 3's scaling of low frequencies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megalite.config_model import ModelConfig


def rope_tables(
    model: ModelConfig, length: int, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position times frequency.

    Args:
        model: head_dim D, theta and scaling.
        length: positions 0 .. length - 1.
        dtype: of the tables; at least fp32.
        device: of the tables.

    Returns:
        (cos, sin), each [length, D/2].
    """
    angles = torch.outer(torch.arange(length, dtype=torch.float64), rope_frequencies(model))
    dtype = torch.promote_types(dtype, torch.float32)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def rope_frequencies(model: ModelConfig) -> Tensor:
    """Angle per position of each pair of features, fp64 [D/2]: theta^(-2 i / D).

    With llama3 scaling, wavelengths longer than the original length / low factor are divided by
    the factor, those shorter than the original length / high factor are kept, and the ones between
    are interpolated. Source: Meta's Llama 3.1 reference, `apply_scaling`.
    """
    exponents = torch.arange(0, model.head_dim, 2, dtype=torch.float64) / model.head_dim
    frequencies = model.rope_theta**-exponents
    if model.rope_scaling == "none":
        return frequencies
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    turns = model.rope_original_seq_length * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / model.rope_scaling_factor)
