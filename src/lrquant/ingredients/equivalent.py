"""Learnable equivalent transformation (LET): per-channel scales and shifts at a block's sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lrquant.architectures.sites import UNTOUCHED, Fold, Site
from lrquant.errors import LRQuantError
from lrquant.ingredients.statistics import ChannelStatistics

SMALLEST_ACTIVATION = 1e-5


def logarithmic_scale(maxima: Tensor) -> Tensor:
    """``a / log2(2 + a)``, the logarithmic activation equivalent (LRQuant, ACL 2024).

    `maxima` are the largest magnitudes of the channels; both they and the result are >= 1e-5.
    """
    maxima = maxima.clamp(min=SMALLEST_ACTIVATION)
    return (maxima / torch.log2(2 + maxima)).clamp(min=SMALLEST_ACTIVATION)


def equivalent_parameters(
    sites: Sequence[Site],
    shifted: frozenset[str],
    statistics: ChannelStatistics,
    block_name: str,
    device: torch.device,
) -> dict[str, Tensor]:
    """Scales, and shifts for the sites named in `shifted`, at their published start."""
    parameters = {}
    for site in sites:
        scale = torch.ones(site.size)
        if site.measured is not None:
            maxima = _reduce(site, _statistic(statistics.maxima, site, block_name), "amax")
            scale = logarithmic_scale(maxima)
        parameters[f"let.{site.name}.scale"] = scale.to(device)
        if site.name in shifted:
            shift = torch.zeros(site.size)
            if statistics.midpoints:
                shift = _reduce(site, _statistic(statistics.midpoints, site, block_name), "mean")
            parameters[f"let.{site.name}.shift"] = shift.to(device)
    return parameters


def _statistic(values: dict[str, Tensor], site: Site, block_name: str) -> Tensor:
    name = f"{block_name}.{site.measured}"
    if name not in values:
        raise LRQuantError(
            f"statistics: no entry for {name}; they are of another model, make them again with "
            "`lrquant stats`"
        )
    channels = len(site.consumers[0].index)
    if values[name].numel() != channels:
        raise LRQuantError(
            f"statistics: {name} has {values[name].numel()} channels, this model has {channels}; "
            "they are of another model"
        )
    return values[name]


def _reduce(site: Site, values: Tensor, how: str) -> Tensor:
    """Input-channel values of the measured consumer -> one value an element of the scale."""
    index = torch.tensor(site.consumers[0].index)
    return torch.zeros(site.size).scatter_reduce_(0, index, values, how, include_self=False)


@dataclass
class Factors:
    """What a block's sites ask of its modules, by module name; absent means 1 or 0.

    rows (out,) and columns (in,) multiply a linear's weight, norms (hidden,) a norm's weight and
    bias.  Before that, `subtract` (out or hidden,) leaves the module's bias and ``W @ add`` (in,)
    enters it, W being the unscaled weight.
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    subtract: dict[str, Tensor] = field(default_factory=dict)
    add: dict[str, Tensor] = field(default_factory=dict)


def fold_factors(sites: Sequence[Site], parameters: dict[str, Tensor]) -> Factors:
    """Compose the scales and shifts of all sites into one factor a module and axis."""
    factors = Factors()
    for site in sites:
        scale = parameters[f"let.{site.name}.scale"]
        shift = parameters.get(f"let.{site.name}.shift")
        powers = {1: scale, -1: scale.reciprocal()}
        for fold in site.folds:
            table = {"rows": factors.rows, "columns": factors.columns, "norm": factors.norms}
            into = table[fold.axis]
            factor = _spread(powers[fold.power], fold, 1.0)
            into[fold.module] = into[fold.module] * factor if fold.module in into else factor
            if shift is not None:
                moved = factors.subtract if fold is site.producer else factors.add
                moved[fold.module] = _spread(shift, fold, 0.0)
    return factors


def _spread(values: Tensor, fold: Fold, untouched: float) -> Tensor:
    """One value a channel; `untouched` where the site leaves a channel as it is."""
    if fold.index == tuple(range(len(values))):
        return values
    if UNTOUCHED in fold.index:
        values = torch.cat([values, values.new_full((1,), untouched)])  # which index -1 finds
    return values[torch.tensor(fold.index, device=values.device)]
