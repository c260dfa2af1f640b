"""Devices that compute nothing: an operation on two of them, or on one and the host, is an error.

Imported by scripts that run in a process of their own, for which it is changed.
"""

from __future__ import annotations

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


def begin() -> None:
    """From now on there are devices by the name "pretended", and attention on them."""
    _setup_privateuseone_for_python_backend("pretended")
    torch.nn.functional.scaled_dot_product_attention = _sdpa


def _sdpa(query, key, value, attn_mask=None, is_causal=False, scale=None, **others):
    """Kernels are chosen by the device: here the mathematics."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(repeats, 1) for states in (key, value))
    scores = query @ key.transpose(-1, -2)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -1.0)
    return scores.softmax(-1) @ value
