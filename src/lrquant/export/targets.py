"""Which format a runtime takes, and the nearest settings that one of its formats can hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product

from lrquant.config.config import TARGETS, Config
from lrquant.config.scheme import FLOAT_BITS
from lrquant.errors import LRQuantError
from lrquant.export.format import Format
from lrquant.export.loading import Loading, merged
from lrquant.export.parts import Part

_BITS = (*range(2, 9), FLOAT_BITS)
_GROUPS = (None, 32, 64, 128)
_WHOLE_ROW = (
    1024  # how far one scale a row is from groups, as if it were a group of so many columns
)


def chosen_for_target(config: Config, known: dict[str, Format], first: str) -> Format:
    """The first format, `first` before all others, that `config.target` loads and that holds it.

    Dense weights do for what is learned at 16 bits; for less they are chosen by name alone.  Raises
    LRQuantError with what cannot be held and the nearest settings that can.
    """
    packed = sorted(known.values(), key=lambda form: (form.name != first, form.name))
    packed = [form for form in packed if not _dense(form, config)]
    for form in packed:
        if _reason(form, config) is None:
            return form
    start = f"--target {config.target}: "
    nearest = _nearest(config, packed)
    if nearest is None:
        reasons = "; ".join(f"{form.name}: {_loading_reason(form, config)}" for form in packed)
        raise LRQuantError(f"{start}no format here does for it ({reasons}); use another target")
    raise LRQuantError(
        f"{start}cannot hold {_differences(config, nearest)} of {config.quantization.name}; the "
        f"nearest that it holds is {_flags(config, nearest)}, to be asked for before learning"
    )


def mended(config: Config, forms: Sequence[Format]) -> str | None:
    """What to ask for so that one of `forms` holds it and the target loads it, or None."""
    nearest = _nearest(config, forms)
    if nearest is None:
        return None
    return f"the nearest that it loads is {_flags(config, nearest)}"


def _reason(form: Format, config: Config) -> str | None:
    """Why a format does not do for the settings and their target, of any part of the model."""
    return _refusal(form, config) or loading_refusal(form, config)


def _loading_reason(form: Format, config: Config) -> str | None:
    return loading_refusal(form, config) or _refusal(form, config)


def _refusal(form: Format, config: Config) -> str | None:
    return form.refusal(config) or tower_refusal(form, config)


def tower_refusal(form: Format, config: Config) -> str | None:
    """Why a format can't hold the vision tower's scheme, or None."""
    if config.vision_scheme is None:
        return None
    reason = form.refusal(config.for_tower())
    return None if reason is None else f"--vision-scheme {config.vision_scheme}: {reason}"


def loading_refusal(form: Format, config: Config) -> str | None:
    """Why the target can't load what a format holds of any part, or None."""
    target = config.target or ""
    reason = form.loading(config.quantization, target).refusal
    if reason is None and config.vision_quantization is not None:
        reason = form.loading(config.vision_quantization, target).refusal
        reason = None if reason is None else f"--vision-scheme {config.vision_scheme}: {reason}"
    return reason


def loading_of(form: Format, config: Config, target: str) -> Loading:
    """How a runtime takes all parts of what a format holds."""
    schemes = (config.quantization, config.vision_quantization)
    return merged([form.loading(scheme, target) for scheme in schemes if scheme is not None])


def verdicts(form: Format, config: Config) -> Iterator[tuple[bool, str]]:
    """Whether a runtime computes what was learned, and a sentence: the target's, or each one's."""
    for target in TARGETS if config.target is None else (config.target,):
        loading = loading_of(form, config, target)
        if loading.refusal is None:
            yield loading.as_learned, f"{target} computes {loading.computes}"


def _dense(form: Format, config: Config) -> bool:
    """Whether a format would hold quantised weights without packing them."""
    if config.wbits == FLOAT_BITS or form.refusal(config) is not None:
        return False
    return form.quantization_config([Part("", config.quantization)], []) is None


def _nearest(config: Config, forms: Sequence[Format]) -> Config | None:
    """The settings with the smallest change that one of the formats holds for the target."""
    for candidate in sorted(_candidates(config), key=lambda other: _distance(config, other)):
        if any(_reason(form, candidate) is None for form in forms):
            return candidate
    return None


def _candidates(config: Config) -> Iterator[Config]:
    """Settings whose scheme or rotation vectors differ; weights stay quantised, or not."""
    own, quantized = config.quantization, config.wbits != FLOAT_BITS
    sharings = dict.fromkeys((config.rotation_sharing, "site" if config.rotation else None))
    for weights, activations, group, symmetric, activation_symmetric, attention, sharing in product(
        _BITS[:-1] if quantized else (FLOAT_BITS,),
        _BITS,
        dict.fromkeys((config.group_size, *_GROUPS)),
        (False, True),
        (False, True),
        dict.fromkeys((own.attention_bits, FLOAT_BITS)),
        sharings,
    ):
        weight_only = activations == attention == FLOAT_BITS
        if weight_only and activation_symmetric != own.activation_symmetric:
            continue  # nothing would change
        yield dataclasses.replace(
            config,
            wbits=weights,
            abits=activations,
            group_size=group,
            symmetric=symmetric,
            activation_symmetric=activation_symmetric,
            qkv_bits=None if attention == activations else attention,
            rotation_sharing=sharing,
            rotate_rank=config.rotate_rank if sharing == config.rotation_sharing else 1,
        )


def _distance(config: Config, other: Config) -> float:
    """How far settings are from those that were asked for: a bit less weighs three bits more."""

    def bits(before: int, after: int) -> float:
        return max(after - before, 3 * (before - after))

    before, after = config.quantization, other.quantization
    group = math.log2((after.group_size or _WHOLE_ROW) / (before.group_size or _WHOLE_ROW))
    return (
        bits(before.weight_bits, after.weight_bits)
        + bits(before.activation_bits, after.activation_bits)
        + abs(group) / 2
        + (before.attention_bits != after.attention_bits) / 2
        + (before.symmetric != after.symmetric) / 4
        + (before.activation_symmetric != after.activation_symmetric) / 4
        + (config.rotation_sharing != other.rotation_sharing) / 8
    )


def _differences(config: Config, nearest: Config) -> str:
    """What of the settings has to change, in words."""

    def grid(symmetric: bool) -> str:
        return "symmetric" if symmetric else "asymmetric"

    before = config.quantization
    group = before.group_size
    words: dict[str, Callable[[Config], object]] = {
        f"{before.weight_bits}-bit weights": lambda settings: settings.wbits,
        f"{grid(before.symmetric)} weights": lambda settings: settings.symmetric,
        f"groups of {group}" if group else "scales per output channel": lambda settings: (
            settings.group_size
        ),
        f"{before.activation_bits}-bit activations": lambda settings: settings.abits,
        f"{grid(before.activation_symmetric)} activations": lambda settings: (
            settings.activation_symmetric
        ),
        f"{before.attention_bits}-bit Q, K and V": lambda settings: (
            settings.quantization.attention_bits
        ),
        f"--rotation_sharing {config.rotation_sharing}": lambda settings: settings.rotation_sharing,
    }
    parts = [text for text, of in words.items() if of(config) != of(nearest)]
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if parts[1:] else parts[0]


def _flags(config: Config, nearest: Config) -> str:
    """The command line's words for the settings that change."""
    flags = []
    if nearest.quantization.name != config.quantization.name:
        flags.append(f"--scheme {nearest.quantization.name}")
    if nearest.activation_symmetric != config.activation_symmetric:
        no = "" if nearest.activation_symmetric else "no-"
        flags.append(f"--{no}activation_symmetric")
    if nearest.rotation_sharing != config.rotation_sharing:
        flags.append(f"--rotation_sharing {nearest.rotation_sharing}")
    if nearest.rotate_rank != config.rotate_rank:
        flags.append(f"--rotate_rank {nearest.rotate_rank}")
    return " ".join(flags)
