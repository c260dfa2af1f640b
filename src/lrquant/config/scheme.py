"""A scheme, as "W4A4" or "W3A16g64": bits, groups and symmetry of weights and activations."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from lrquant.errors import LRQuantError, nearest

FLOAT_BITS = 16
USUAL = (  # schemes that people ask for
    *("W4A16g128", "W4A16g64", "W4A16g32", "W4A16", "W3A16g64", "W2A16g64", "W8A16", "W8A8"),
    *("W8A8-sym-qkv16", "W4A8-sym-qkv16", "W6A6", "W4A4", "W4A4-qkv16", "W4A4-sym-qkv16"),
    *("W4A16-hadamard", "W4A4-r3-hadamard"),
)
_NAME = re.compile(
    r"w([0-9]{1,9})a([0-9]{1,9})(?:g([0-9]{1,9}))?(-sym)?(-asym)?(?:-ag([0-9]{1,9}))?"
    r"(?:-qkv([0-9]{1,9}))?(-r3)?(-hadamard)?"
    r"(?:-(?!sym|asym|qkv|hadamard|r3(?:-|$)|ag(?:[0-9]|$))([a-z][a-z0-9]*))?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Scheme:
    """Bits of every quantised linear and of attention's Q, K and V; 16 means floating point.

    Weights: static, per output row (`group_size` None) or per `group_size` input columns.
    Activations: dynamic, per token, or per token and `activation_group_size` channels.  Q, K (after
    the rotary embedding) and V: dynamic, per token and head, at `activation_bits` unless `qkv_bits`
    says otherwise.  `weight_grid` is the kind of grid that weights lie on: integers, or what
    another package declares.  With `hadamard` what a linear reads is multiplied by a Hadamard
    matrix at run time, and its weight by the same, before either is put on its grid; with
    `qk_hadamard` queries and keys by one of a head's size (SpinQuant's R3).
    """

    weight_bits: int = 4
    activation_bits: int = 16
    group_size: int | None = None
    symmetric: bool = False
    activation_symmetric: bool = False
    qkv_bits: int | None = None
    weight_grid: str = "int"
    activation_group_size: int | None = None
    hadamard: bool = False
    qk_hadamard: bool = False

    def __post_init__(self) -> None:
        for what, bits in (
            ("weight bits", self.weight_bits),
            ("activation bits", self.activation_bits),
            ("Q/K/V bits", self.attention_bits),
        ):
            if bits != FLOAT_BITS and not 2 <= bits <= 8:
                raise LRQuantError(f"{what} {bits}: use 2 to 8, or 16 for floating point")
        if self.activation_bits == FLOAT_BITS and self.activation_group_size is not None:
            raise LRQuantError(
                f"activation group size {self.activation_group_size} with 16-bit activations: they "
                "have no scales; give activations below 16 bits"
            )
        if self.hadamard and not self.quantizes_weights:
            raise LRQuantError(
                "Hadamard matrices with 16-bit weights: they are multiplied into weights that are "
                "quantised; give weights below 16 bits"
            )
        if self.qk_hadamard and self.attention_bits == FLOAT_BITS:
            raise LRQuantError(
                "Q and K times Hadamard matrices, at 16 bits: that changes nothing; give Q, K and "
                "V below 16 bits"
            )
        for what, size, whole in (
            ("group size", self.group_size, "output channel"),
            ("activation group size", self.activation_group_size, "token"),
        ):
            if size is not None and size < 1:
                raise LRQuantError(
                    f"{what} {size}: use a positive number, or leave it out for one scale per "
                    f"{whole}"
                )

    @classmethod
    def parse(cls, name: str) -> Scheme:
        """Read "W4A16g128", "W4A4", "W4A4-qkv16", "W8A8-sym" (symmetric weights), "W4A4-ag64",
        "W4A4-r3-hadamard"."""
        match = _NAME.fullmatch(name.strip())
        if match is None or (match[4] and match[5]):
            raise LRQuantError(
                f"scheme {name!r}: expected W<bits>A<bits>[g<size>][-sym][-ag<size>][-qkv<bits>]"
                f"[-r3][-hadamard], for example W4A4, W4A16g128 or W4A4-qkv16{_nearest(name)}"
            )
        return cls(
            weight_bits=int(match[1]),
            activation_bits=int(match[2]),
            group_size=int(match[3]) if match[3] else None,
            symmetric=match[4] is not None,
            qkv_bits=int(match[7]) if match[7] else None,
            weight_grid=match[10].lower() if match[10] else "int",
            activation_group_size=int(match[6]) if match[6] else None,
            hadamard=match[9] is not None,
            qk_hadamard=match[8] is not None,
        )

    @property
    def attention_bits(self) -> int:
        """Bits of Q, K and V."""
        return self.activation_bits if self.qkv_bits is None else self.qkv_bits

    @property
    def name(self) -> str:
        """The short name, which `parse` reads back (activation symmetry apart)."""
        group = f"g{self.group_size}" if self.group_size else ""
        symmetry = "-sym" if self.symmetric else ""
        attention = f"-qkv{self.qkv_bits}" if self.attention_bits != self.activation_bits else ""
        grid = f"-{self.weight_grid}" if self.weight_grid != "int" else ""
        across = f"-ag{self.activation_group_size}" if self.activation_group_size else ""
        bits = f"W{self.weight_bits}A{self.activation_bits}"
        heads = "-r3" if self.qk_hadamard else ""
        rotated = "-hadamard" if self.hadamard else ""
        return f"{bits}{group}{symmetry}{across}{attention}{heads}{rotated}{grid}"

    @property
    def quantizes_weights(self) -> bool:
        """Whether weights do not stay in floating point."""
        return self.weight_bits != FLOAT_BITS

    @property
    def weight_only(self) -> bool:
        """Whether activations, Q, K and V all stay in floating point."""
        return self.activation_bits == FLOAT_BITS and self.attention_bits == FLOAT_BITS

    @property
    def floating_point(self) -> bool:
        """Whether nothing at all is quantised."""
        return self.weight_only and self.weight_bits == FLOAT_BITS

    def to_dict(self) -> dict[str, int | bool | str | None]:
        """Its fields, but for those that older readers lack where they say nothing new."""
        usual: dict[str, object] = {"weight_grid": "int", "activation_group_size": None}
        usual |= {"hadamard": False, "qk_hadamard": False}
        pairs = dataclasses.asdict(self).items()
        return {name: value for name, value in pairs if name not in usual or value != usual[name]}

    def describe(self) -> str:
        """One line for people: what is quantised, and how."""

        def words(bits: int, how: str) -> str:
            return "floating point" if bits == FLOAT_BITS else f"{bits} bits, {how}"

        kind = "symmetric" if self.symmetric else "asymmetric"
        kind = kind if self.weight_grid == "int" else f"{self.weight_grid} grid, {kind}"
        per = f"groups of {self.group_size}" if self.group_size else "per output channel"
        activation_kind = "symmetric" if self.activation_symmetric else "asymmetric"
        size = self.activation_group_size
        across = f"per token and {size} channels" if size else "per token"
        rotated = ", of inputs times Hadamard matrices" if self.hadamard else ""
        heads = ", Q and K times Hadamard matrices" if self.qk_hadamard else ""
        return (
            f"{self.name}: weights {words(self.weight_bits, f'{kind}, {per}')}; activations "
            f"{words(self.activation_bits, f'{activation_kind}, {across}')}{rotated}; "
            f"Q, K, V {words(self.attention_bits, 'per token and head')}{heads}"
        )


def _nearest(name: str) -> str:
    """The scheme that a name may mean: by its spelling, else by its bits and group."""
    bits = re.findall(r"[0-9]+", name)
    if not name.strip().lower().startswith("w") and bits and 2 <= int(bits[0][:9]) <= 8:
        group = f"g{bits[-1]}" if len(bits) > 1 and int(bits[-1][:9]) > FLOAT_BITS else ""
        return f"; the nearest is W{int(bits[0])}A16{group}"
    return nearest(name.strip(), USUAL)


FLOATING_POINT = Scheme(weight_bits=FLOAT_BITS, activation_bits=FLOAT_BITS)
