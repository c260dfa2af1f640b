"""Learnable equivalent transformation (LET): per-channel scales and shifts at a block's sites."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from lrquant.config.choices import KINDS
from lrquant.config.core import FASTEST
from lrquant.config.schemes import Schemes
from lrquant.config.settings import setting
from lrquant.errors import LRQuantError
from lrquant.ingredients.base.folding import Factors, multiply
from lrquant.ingredients.ingredient import SMALLEST_FACTOR, Chart, Ingredient

if TYPE_CHECKING:
    from torch import Tensor

    from lrquant.architectures.sites import Site
    from lrquant.ingredients.base.block import BlockShapes, Start
    from lrquant.ingredients.ingredient import Parameters

SMALLEST_ACTIVATION = 1e-5
STRENGTHS = (1.0, 0.75, 0.5, 0.25, 0.0)


@dataclass(frozen=True)
class Equivalent(Ingredient):
    """One `scale` a site, and where its modules may have one a `shift`: (elements,)."""

    let: bool | None = setting(None, "learn equivalent transformations")
    vision_let: bool | None = setting(
        None, "learn transformations in the tower (default: --let if given, else as it asks)"
    )
    let_sites: tuple[str, ...] = setting(
        ("norm", "value_output", "up_down"),
        f"site kinds to use, of {', '.join(KINDS)}",
        KINDS,
        paper=("norm", "value_output", "query_key"),
    )
    let_shift: str = setting(
        "auto",
        "learn shifts: where every module has a bias (auto), wherever one fits, or nowhere",
        ("auto", "always", "never"),
        paper="always",
    )
    let_init: float | None = setting(
        None,
        "power of the published scales that scales start at, 0: none (papers: 1); default: "
        f"of {', '.join(f'{each:g}' for each in STRENGTHS)} the one at which a block errs least",
        limits=(0, 1),
        paper=1.0,
    )
    let_lr: float = setting(
        5e-3,
        "learning rate of scales and shifts (ACL paper: 1e-3)",
        limits=(0, FASTEST),
        paper=5e-3,
    )
    tta_let_lr: float = setting(
        1e-3, "learning rate of scales and shifts while adapting", limits=(0, FASTEST)
    )

    name = "let"
    switch = "let"
    tower_switch = "vision_let"
    by_default = True
    afterwards = ("tta_let_lr",)
    held_as = ("shift",)
    charts: ClassVar[dict[str, Chart]] = {
        "scale": Chart(
            "Learned scales",
            "Scale of each channel at the places where scales move from one module into the next",
            "log",
        ),
        "shift": Chart("Learned shifts", "Shift of each channel"),
    }

    @classmethod
    def refusal(cls, schemes: Schemes) -> str | None:
        if not schemes.floating_point:
            return None
        return (
            "with W16A16: nothing is quantised, so scales have no effect; give --wbits or --abits "
            "below 16"
        )

    @classmethod
    def applies(cls, schemes: Schemes) -> bool:
        return not schemes.weight_only

    @property
    def rate(self) -> float:
        return self.let_lr

    @property
    def description(self) -> str:
        return f"equivalent transformation at {', '.join(self.let_sites)} (lr {self.let_lr:g})"

    @property
    def reads_statistics(self) -> bool:
        return True

    @property
    def strengths(self) -> tuple[float, ...]:
        return STRENGTHS if self.let_init is None else ()

    def sites(self, block: BlockShapes) -> tuple[Site, ...]:
        """The sites of a block that are learned: not those of matrices that stay as they are."""
        return tuple(
            site
            for site in block.sites
            if site.kind in self.let_sites
            and not block.alone.issuperset(f.module for f in site.folds if f.axis != "norm")
        )

    def shifts(self, site: Site, block: BlockShapes) -> bool:
        """Whether a shift is learned at a site: never where a module has no place for a bias."""
        modules = {fold.module for fold in site.folds}
        if self.let_shift == "never" or not site.shiftable or modules & block.unbiased:
            return False
        return self.let_shift == "always" or modules <= block.biased

    def shapes(self, block: BlockShapes) -> dict[str, tuple[int, ...]]:
        return {
            f"let.{site.name}.{name}": (site.size,)
            for site in self.sites(block)
            for name in (("scale", "shift") if self.shifts(site, block) else ("scale",))
        }

    def start(self, block: BlockShapes, start: Start) -> Parameters:
        """Scales of the channels' maxima to a power, and shifts to their midpoints."""
        import torch

        statistics = start.statistics
        power = start.strength if self.let_init is None else self.let_init
        parameters = {}
        for site in self.sites(block):
            scale = torch.ones(site.size)
            if site.measured is not None:
                maxima = _statistic(statistics.maxima, site, start.block_name)
                scale = logarithmic_scale(_reduced(site, maxima, "amax"))
                scale = scale if power == 1 else scale**power
                if site.consumers[0].power == 2:  # of which the consumers get the square
                    scale = scale.sqrt()
            parameters[f"let.{site.name}.scale"] = scale.to(block.device)
            if self.shifts(site, block):
                shift = torch.zeros(site.size)
                if statistics.midpoints:
                    midpoints = _statistic(statistics.midpoints, site, start.block_name)
                    shift = _reduced(site, midpoints, "mean")
                parameters[f"let.{site.name}.shift"] = shift.to(block.device)
        return parameters

    def fold(self, block: BlockShapes, parameters: Parameters, factors: Factors) -> None:
        """One factor a module and axis, composed of those of all sites."""
        for site in self.sites(block):
            scale = parameters[f"let.{site.name}.scale"]
            shift = parameters.get(f"let.{site.name}.shift")
            powers = {1: scale, -1: scale.reciprocal()}
            if site.consumers[0].power == 2:
                powers[2] = scale.square()
            for fold in site.folds:
                table = {"rows": factors.rows, "columns": factors.columns, "norm": factors.norms}
                factor = block.spread(powers[fold.power], fold, 1.0)
                multiply(table[fold.axis], fold.module, factor)
                if shift is not None:
                    moved = factors.subtract if fold is site.producer else factors.add
                    moved[fold.module] = block.spread(shift, fold, 0.0)

    def constrain_(self, parameters: Parameters) -> None:
        for name, parameter in parameters.items():
            if name.endswith(".scale"):
                parameter.clamp_(min=SMALLEST_FACTOR)

    def adapted(self) -> Equivalent:
        return replace(self, let_lr=self.tta_let_lr)

    @classmethod
    def shown(cls, parameter: str, values: Tensor) -> tuple[str, Tensor]:
        return parameter, values

    def needs(self, block: BlockShapes | None) -> dict[str, str]:
        if block is None:
            return {}
        modules = {
            fold.module
            for site in self.sites(block)
            if self.shifts(site, block)
            for fold in site.folds
        }
        missing = sorted(modules - block.biased)
        if not missing:
            return {}
        return {
            "shift": (
                f"--let_shift {self.let_shift}: shifts need biases that this architecture lacks "
                f"({', '.join(missing)}); learn with --let_shift auto, or use --format lrquant"
            )
        }


def logarithmic_scale(maxima: Tensor) -> Tensor:
    """``a / log2(2 + a)``, the logarithmic activation equivalent (LRQuant, ACL 2024).

    `maxima` are the largest magnitudes of the channels; both they and the result are >= 1e-5.
    """
    maxima = maxima.clamp(min=SMALLEST_ACTIVATION)
    return (maxima / (2 + maxima).log2()).clamp(min=SMALLEST_ACTIVATION)


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


def _reduced(site: Site, values: Tensor, how: str) -> Tensor:
    """Input-channel values of the measured consumer -> one value an element of the scale."""
    import torch

    index = torch.tensor(site.consumers[0].index)
    return torch.zeros(site.size).scatter_reduce_(0, index, values, how, include_self=False)


INGREDIENT = Equivalent
