"""Tables of rotary angles, with scalings for texts longer than those first trained on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megalite.config_model import ModelConfig


def rope_tables(
    model: ModelConfig,
    length: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position times frequency.

    Args:
        model: head_dim D, theta and scaling.
        length: of the tables.
        dtype: of the tables; at least fp32.
        device: of the tables.
        first: their first position, for a sequence that goes on elsewhere.

    Returns:
        (cos, sin), each [length, D/2], of the positions first .. first + length - 1.
    """
    positions = torch.arange(first, first + length, dtype=torch.float64)
    angles = torch.outer(positions, rope_frequencies(model))
    size = rope_amplitude(model)
    dtype = torch.promote_types(dtype, torch.float32)
    return (angles.cos() * size).to(device, dtype), (angles.sin() * size).to(device, dtype)


def rope_frequencies(model: ModelConfig) -> Tensor:
    """Angle per position of each pair of features, fp64 [D/2]: theta^(-2 i / D), then scaled.

    Linear scaling divides all by the factor (Chen et al., arXiv:2306.15595). The others keep what
    turns often within the original length, divide what turns seldom by the factor, and interpolate
    between: llama3 by the number of turns (Meta's Llama 3.1 reference, `apply_scaling`), YaRN by
    the feature's index (Peng et al., arXiv:2309.00071, and its authors' code).
    """
    exponents = torch.arange(0, model.head_dim, 2, dtype=torch.float64) / model.head_dim
    frequencies = model.rope_theta**-exponents
    if model.rope_scaling == "none":
        return frequencies
    kept = torch.zeros_like(frequencies)
    if model.rope_scaling == "llama3":
        low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
        turns = model.rope_original_seq_length * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    elif model.rope_scaling == "yarn":
        start = max(0, math.floor(_pair_that_turns(model, model.rope_yarn_beta_fast)))
        end = math.ceil(_pair_that_turns(model, model.rope_yarn_beta_slow))
        end = max(start, min(end, model.head_dim - 1))
        index = torch.arange(len(frequencies), dtype=torch.float64)
        # As in the authors' code, one point is a step from 1 to 0 right after it.
        kept = 1.0 - ((index - start) / (end - start or 0.001)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / model.rope_scaling_factor)


def rope_amplitude(model: ModelConfig) -> float:
    """What YaRN multiplies cosines and sines by, so that attention stays as sharp; otherwise 1."""
    if model.rope_scaling != "yarn":
        return 1.0
    return model.rope_yarn_attention_factor or (
        0.1 * math.log(max(1.0, model.rope_scaling_factor)) + 1.0
    )


def _pair_that_turns(model: ModelConfig, turns: float) -> float:
    """Index, with a fraction, of the pair that turns so many times within the original length."""
    wavelength = model.rope_original_seq_length / (2 * math.pi * turns)
    return model.head_dim * math.log(wavelength) / (2 * math.log(model.rope_theta))
