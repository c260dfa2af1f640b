"""Shared shape of Mamba 2 mixers: one projection in, a convolution and a scan, one projection out.

Rows of the projection in are the gate, what is scanned with its B and C, which pass the convolution
and an activation, and the time steps: no scale can leave any of them.  A gated norm, where there is
one, feeds the projection out alone.
"""

from __future__ import annotations

from lrquant.architectures.sites import Site, gated_norm_site


def names(mixer: str) -> tuple[str, str]:
    """The linears of a mixer."""
    return f"{mixer}.in_proj", f"{mixer}.out_proj"


def kept(mixer: str) -> tuple[str, ...]:
    """What of it stays in floating point: its convolution."""
    return (f"{mixer}.conv1d.weight",)


def norm_site(mixer: str, width: int) -> Site:
    """That of its gated norm of `width` channels."""
    return gated_norm_site(f"{mixer}.norm", f"{mixer}.out_proj", width)
