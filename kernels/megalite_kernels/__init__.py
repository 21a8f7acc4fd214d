"""The operations between the matrix products, one name each: what megalite's layers call.

This is the one dispatch page. Each name is bound to its implementation here and nowhere else;
`BACK_ENDS` says which one that is, for the lines that a run prints at its start.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from megalite_kernels.reference import rms_norm, rope, swiglu

BACK_ENDS: Mapping[str, str] = MappingProxyType(
    {"rms_norm": "torch", "rope": "torch", "swiglu": "torch"}
)

__all__ = ["BACK_ENDS", "rms_norm", "rope", "swiglu"]
