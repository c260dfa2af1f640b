"""LRQuant+'s rotation vectors: elementwise factors on the de-quantised weight, learned as 1.

``W' = (r1 r2) * W^`` with r1 (out, k) and r2 (k, in) (LRQuant+, TPAMI 2025).  What the factors are
and where they act is the `sharing`:

"site"    r1 a row and group, in the de-quantisation scale; one r2 (in,) for all that read a norm,
          folded into that norm: ``y = r1 * (Q(x * r2) W^T)``, no operation at run time
"linear"  r1 likewise; one r2 (in,) a linear, multiplied with its input before the quantizer
"none"    r1 alone
"weight"  the published form, of any rank: a dense factor on the de-quantised weight

Behind the value-output and up-down sites no r2 is needed: the producer's own r1 is the same factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lrquant.architectures.sites import Site
from lrquant.ingredients.equivalent import Factors


def rotation_parameters(
    linear: str, rows: int, columns: int, groups: int, sharing: str, rank: int, device: torch.device
) -> dict[str, Tensor]:
    """The factors of one linear, float32, whose product is exactly 1 at every rank.

    "weight": r1 (out, rank) is 1 in its first column and 0 in the others; the rows of r2
    (rank, in) are cosines of rising frequency, the first constant, so that no two learn the same.
    Else r1 is (out, groups) and r2, for "linear", (in,).
    """
    if sharing == "weight":
        output = torch.zeros(rows, rank)
        output[:, 0] = 1.0
        phases = (torch.arange(columns, dtype=torch.float64) + 0.5) * (math.pi / columns)
        waves = torch.cos(torch.arange(rank, dtype=torch.float64)[:, None] * phases)
        pair = output, waves.float()
    else:
        pair = torch.ones(rows, groups), torch.ones(columns)
    named = {output_name(linear): pair[0].to(device)}
    if sharing in ("linear", "weight"):
        named[input_name(linear)] = pair[1].to(device)
    return named


def shared_parameters(sites: Sequence[Site], device: torch.device) -> dict[str, Tensor]:
    """One input factor (hidden,) for each of the norm sites, 1 at the start."""
    return {input_name(site.name): torch.ones(site.size, device=device) for site in sites}


def output_name(linear: str) -> str:
    """Name of a linear's r1."""
    return f"rotation.{linear}.output"


def input_name(owner: str) -> str:
    """Name of the r2 of a linear or of a norm site."""
    return f"rotation.{owner}.input"


def weight_factor(parameters: dict[str, Tensor], linear: str) -> tuple[Tensor, Tensor] | None:
    """r1 (out, k) and r2 (k, in) of the dense form, whose r2 alone has two axes."""
    second = parameters.get(input_name(linear))
    if second is None or second.dim() == 1:
        return None
    return parameters[output_name(linear)], second


def scale_gain(parameters: dict[str, Tensor], linear: str) -> Tensor | None:
    """r1 (out, groups), the factor on the de-quantisation scale, where there is one."""
    if weight_factor(parameters, linear) is not None:
        return None
    return parameters.get(output_name(linear))


def scale_norms(factors: Factors, parameters: dict[str, Tensor], sites: Sequence[Site]) -> None:
    """Fold the shared input factors into the norms' factors."""
    for site in sites:
        shared = parameters.get(input_name(site.name))
        if shared is not None:
            norm = site.producer.module
            before = factors.norms.get(norm)
            factors.norms[norm] = shared if before is None else before * shared
