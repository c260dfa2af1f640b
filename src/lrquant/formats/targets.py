"""Which format a runtime takes, and the nearest settings that one of its formats can hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product

from lrquant.blocks.plan import Plan
from lrquant.config.core import TARGETS
from lrquant.config.scheme import FLOAT_BITS, Scheme
from lrquant.config.schemes import Schemes
from lrquant.errors import LRQuantError
from lrquant.formats.format import Format
from lrquant.formats.loading import Loading, merged
from lrquant.formats.parts import Part
from lrquant.ingredients.ingredient import Ingredient

_BITS = (*range(2, 9), FLOAT_BITS)
_GROUPS = (None, 32, 64, 128)
_WHOLE_ROW = (
    1024  # how far one scale a row is from groups, as if it were a group of so many columns
)


def chosen_for_target(plan: Plan, target: str, forms: dict[str, Format], first: str) -> Format:
    """The first format, `first` before all others, that the target loads and that holds the plan.

    Dense weights do for what is learned at 16 bits; for less they are chosen by name alone.  Raises
    LRQuantError with what cannot be held and the nearest settings that can.
    """
    packed = _packed(plan, forms, first)
    chosen = taken_by(plan, target, forms, first)
    if chosen is not None:
        return chosen
    start = f"--target {target}: "
    nearest = _nearest(plan, target, packed)
    if nearest is None:
        reasons = "; ".join(f"{f.name}: {_loading_reason(f, plan, target)}" for f in packed)
        raise LRQuantError(f"{start}no format here does for it ({reasons}); use another target")
    raise LRQuantError(
        f"{start}cannot hold {_differences(plan, nearest)} of {plan.schemes.name}; the nearest "
        f"that it holds is {_flags(plan, nearest)}, to be asked for before learning"
    )


def taken_by(plan: Plan, target: str, forms: dict[str, Format], first: str) -> Format | None:
    """The first packed format, `first` before all others, that holds the plan for the target."""
    fitting = (f for f in _packed(plan, forms, first) if _reason(f, plan, target) is None)
    return next(fitting, None)


def _packed(plan: Plan, forms: dict[str, Format], first: str) -> list[Format]:
    """Formats in order, `first` first, without those that would hold quantised weights dense."""
    ordered = sorted(forms.values(), key=lambda form: (form.name != first, form.name))
    return [form for form in ordered if not _dense(form, plan)]


def mended(plan: Plan, target: str, forms: Sequence[Format]) -> str | None:
    """What to ask for so that one of `forms` holds it and the target loads it, or None."""
    nearest = _nearest(plan, target, forms)
    if nearest is None:
        return None
    return f"the nearest that it loads is {_flags(plan, nearest)}"


def _reason(form: Format, plan: Plan, target: str) -> str | None:
    """Why a format does not do for a plan and its target, of any part of the model."""
    return refusal_of(form, plan) or loading_refusal(form, plan.schemes, target)


def _loading_reason(form: Format, plan: Plan, target: str) -> str | None:
    return loading_refusal(form, plan.schemes, target) or refusal_of(form, plan)


def refusal_of(form: Format, plan: Plan) -> str | None:
    """Why a format can't hold the schemes, or what is learned as far as settings tell; or None."""
    reason = form.schemes_refusal(plan.schemes)
    needed = [each.needs(None) for each in (*plan.ingredients, *plan.tower_ingredients)]
    odd = [why for needs in needed for what, why in needs.items() if what not in form.holds]
    return reason or (odd[0] if odd else None)


def loading_refusal(form: Format, schemes: Schemes, target: str) -> str | None:
    """Why the target can't load what a format holds of any part, or None."""
    for scheme in schemes.every:
        reason = None if _left_alone(schemes, scheme) else form.loading(scheme, target).refusal
        if reason is not None:
            of_tower = scheme == schemes.tower != schemes.default
            return f"--vision-scheme {scheme.name}: {reason}" if of_tower else reason
    return None


def loading_of(form: Format, schemes: Schemes, target: str) -> Loading:
    """How a runtime takes all parts of what a format holds."""
    taken = [scheme for scheme in schemes.every if not _left_alone(schemes, scheme)]
    return merged([form.loading(scheme, target) for scheme in taken])


def verdicts(form: Format, schemes: Schemes, target: str | None) -> Iterator[tuple[bool, str]]:
    """Whether a runtime computes what was learned, and a sentence: the target's, or each one's.

    Of runtimes that refuse it themselves there is none.
    """
    for name in TARGETS if target is None else (target,):
        loading = loading_of(form, schemes, name)
        if loading.refusal is None:
            yield loading.as_learned, f"{name} computes {loading.computes}"
        elif loading.unsaid:
            yield False, f"not for {name}: {loading.refusal}"


def _left_alone(schemes: Schemes, scheme: Scheme) -> bool:
    """Whether it is that of matrices in floating point beside others."""
    return scheme.floating_point and not schemes.floating_point


def _dense(form: Format, plan: Plan) -> bool:
    """Whether a format would hold quantised weights without packing them."""
    if not plan.schemes.quantizes_weights or refusal_of(form, plan) is not None:
        return False
    return form.quantization_config([Part("", plan.schemes)], []) is None


def _nearest(plan: Plan, target: str, forms: Sequence[Format]) -> Plan | None:
    """The plan with the smallest change that one of the formats holds for the target."""
    for candidate in sorted(_candidates(plan), key=lambda other: _distance(plan, other)):
        if any(_reason(form, candidate, target) is None for form in forms):
            return candidate
    return None


def _candidates(plan: Plan) -> Iterator[Plan]:
    """Plans whose schemes or ingredients differ; weights stay quantised, or not."""
    own = plan.schemes.default
    for *bits, group, symmetric, of_tokens, across, attention, kept, learned in product(
        _BITS[:-1] if own.quantizes_weights else (FLOAT_BITS,),
        _BITS,
        dict.fromkeys((own.group_size, *_GROUPS)),
        (False, True),
        (False, True),
        dict.fromkeys((own.activation_group_size, None)),
        dict.fromkeys((own.attention_bits, FLOAT_BITS)),
        dict.fromkeys((plan.schemes.hadamard, False)),
        _simpler(plan.ingredients),
    ):
        weights, activations = bits
        weight_only = activations == attention == FLOAT_BITS
        if weight_only and of_tokens != own.activation_symmetric:
            continue  # nothing would change
        if across is not None and activations == FLOAT_BITS:
            continue
        scheme = Scheme(
            weights,
            activations,
            group,
            symmetric,
            of_tokens,
            None if attention == activations else attention,
            own.weight_grid,
            across,
            own.hadamard and kept,
            own.qk_hadamard and attention != FLOAT_BITS,
        )
        patterns = _like(plan, scheme, kept)
        schemes = dataclasses.replace(plan.schemes, default=scheme, patterns=patterns)
        yield dataclasses.replace(plan, schemes=schemes, ingredients=learned)


def _simpler(ingredients: tuple[Ingredient, ...]) -> list[tuple[Ingredient, ...]]:
    """The ingredients as they are, and with one of them simpler."""
    ways = [ingredients]
    for index, each in enumerate(ingredients):
        for other in each.simpler():
            ways.append((*ingredients[:index], other, *ingredients[index + 1 :]))
    return ways


def _like(plan: Plan, scheme: Scheme, rotated: bool) -> tuple[tuple[str, Scheme], ...]:
    """Patterns with their own weight bits and groups, and all else as the default's change.

    Hadamard matrices stay where they are, or go.
    """
    before = plan.schemes.default
    changes = {
        name: value for name, value in vars(scheme).items() if value != getattr(before, name)
    }
    kept = "weight_bits", "group_size", "hadamard"
    changes = {k: v for k, v in changes.items() if k not in kept}
    return tuple(
        (
            pattern,
            own
            if own.floating_point
            else dataclasses.replace(own, **changes, hadamard=own.hadamard and rotated),
        )
        for pattern, own in plan.schemes.patterns
    )


def _distance(plan: Plan, other: Plan) -> float:
    """How far settings are from those that were asked for: a bit less weighs three bits more."""

    def bits(before: int, after: int) -> float:
        return max(after - before, 3 * (before - after))

    before, after = plan.schemes.default, other.schemes.default
    group = math.log2((after.group_size or _WHOLE_ROW) / (before.group_size or _WHOLE_ROW))
    return (
        bits(before.weight_bits, after.weight_bits)
        + bits(before.activation_bits, after.activation_bits)
        + abs(group) / 2
        + (before.attention_bits != after.attention_bits) / 2
        + (before.symmetric != after.symmetric) / 4
        + (before.activation_symmetric != after.activation_symmetric) / 4
        + (before.activation_group_size != after.activation_group_size) / 2
        + (plan.schemes.hadamard != other.schemes.hadamard) / 2
        + (plan.ingredients != other.ingredients) / 8
    )


def _differences(plan: Plan, nearest: Plan) -> str:
    """What of the settings has to change, in words."""

    def grid(symmetric: bool) -> str:
        return "symmetric" if symmetric else "asymmetric"

    before, after = plan.schemes.default, nearest.schemes.default
    group = before.group_size
    words: dict[str, Callable[[Scheme], object]] = {
        f"{before.weight_bits}-bit weights": lambda scheme: scheme.weight_bits,
        f"{grid(before.symmetric)} weights": lambda scheme: scheme.symmetric,
        f"groups of {group}" if group else "scales per output channel": lambda scheme: (
            scheme.group_size
        ),
        f"{before.activation_bits}-bit activations": lambda scheme: scheme.activation_bits,
        f"{grid(before.activation_symmetric)} activations": lambda scheme: (
            scheme.activation_symmetric
        ),
        f"activations in groups of {before.activation_group_size}": lambda scheme: (
            scheme.activation_group_size
        ),
        f"{before.attention_bits}-bit Q, K and V": lambda scheme: scheme.attention_bits,
    }
    changes = [text for text, of in words.items() if of(before) != of(after)]
    if plan.schemes.hadamard != nearest.schemes.hadamard:
        changes.append("Hadamard matrices")
    pairs = zip(plan.ingredients, nearest.ingredients, strict=True)
    changes += [flag for own, other in pairs for flag in _changed(other, own)]
    return f"{', '.join(changes[:-1])} and {changes[-1]}" if changes[1:] else changes[0]


def _changed(before: Ingredient, after: Ingredient) -> list[str]:
    """Flags of the settings of an ingredient that are not as before."""
    settings = vars(after).items()
    return [_flag(name, value) for name, value in settings if value != getattr(before, name)]


def _flag(name: str, value: object) -> str:
    """The command line's words for a setting's value."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value}"


def _flags(plan: Plan, nearest: Plan) -> str:
    """The command line's words for the settings that change."""
    flags = []
    before, after = plan.schemes, nearest.schemes
    if after.default.name != before.default.name:
        flags.append(f"--scheme {after.default.name}")
    for (pattern, own), (_, other) in zip(before.patterns, after.patterns, strict=True):
        if own.name != other.name:
            flags.append(f"--scheme-for '{pattern}={other.name}'")
    if after.default.activation_symmetric != before.default.activation_symmetric:
        flags.append(_flag("activation_symmetric", after.default.activation_symmetric))
    for each, simpler in zip(plan.ingredients, nearest.ingredients, strict=True):
        flags += _changed(each, simpler)
    return " ".join(flags)
