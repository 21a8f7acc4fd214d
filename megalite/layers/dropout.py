"""Dropout whose mask is a function of the place in the run, not of a generator's state.

The mask at (seed, step, layer, site, sample, position, feature or head) is the same in every layout
and when a layer is computed again in backward.

Legend: S sequence, B micro-batch, H hidden, N query heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.layers.batch import DropoutPlace
from megalite.parallel.rng import keep_mask, make_key


def hidden_dropout(
    x: Tensor, drop: float, place: DropoutPlace | None, site: str, first_position: int
) -> Tensor:
    """Drop features of hidden states and scale the others by 1 / (1 - drop).

    Args:
        x: [S', B, H], positions `first_position ...` of the sequence.
        drop: probability to drop.
        place: None (evaluation) drops nothing.
        site: names the layer and the place in it.
        first_position: of this rank's part of the sequence.
    """
    if not drop or place is None:
        return x
    positions = torch.arange(first_position, first_position + x.shape[0], device=x.device)
    # The longest sequence the index has room for; any constant above all lengths serves.
    row = place.samples[None, :] * (1 << 24) + positions[:, None]
    index = row[..., None] * x.shape[-1] + torch.arange(x.shape[-1], device=x.device)
    keep = keep_mask(make_key(place.seed, place.step, site), index, drop)
    return x * keep * (1.0 / (1.0 - drop))


def attention_keep(
    drop: float, place: DropoutPlace, site: str, heads: range, num_heads: int, length: int
) -> Tensor:
    """Mask of attention weights, bool [B, len(heads), S, S]; True keeps.

    Args:
        drop: probability to drop.
        place: of the forward pass.
        site: names the layer.
        heads: this rank's heads among all `num_heads`.
        num_heads: N of the whole model.
        length: S.
    """
    device = place.samples.device
    head = torch.arange(heads.start, heads.stop, device=device)
    row = place.samples[:, None] * num_heads + head
    pair = torch.arange(length * length, device=device).view(length, length)
    index = row[..., None, None] * (length * length) + pair
    return keep_mask(make_key(place.seed, place.step, site), index, drop)
