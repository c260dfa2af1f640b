"""What each runtime computes of each scheme in each format, as the formats themselves say it."""

from __future__ import annotations

from lrquant.config.core import TARGETS
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.formats.choice import formats
from lrquant.formats.format import Format
from lrquant.formats.targets import loading_of
from site_parts.tables import code, table

SCHEMES = (  # one of each kind, from the most to the fewest bits
    *("W8A16", "W8A16g128-sym", "W4A16", "W4A16g128", "W4A16g128-sym", "W4A16g16"),
    *("W3A16g64", "W3A16g64-sym", "W2A16g64", "W2A16g64-sym"),
    *("W4A16-hadamard", "W8A8-sym-qkv16", "W4A8-sym-qkv16", "W4A4-sym-qkv16"),
    *("W4A4-sym-qkv16-hadamard", "W8A8", "W6A6", "W4A4", "W4A4-r3-hadamard"),
)


def markdown() -> str:
    """A row a scheme and format that holds it, then what is to be said of some of them."""
    notes: dict[str, int] = {}  # each sentence once, by its number
    rows = [
        (code(name), code(form.name), *(_cell(form, _schemes(name), t, notes) for t in TARGETS))
        for name in SCHEMES
        for form in _holding(_schemes(name))
    ]
    said = "\n".join(f"{number}. {note}." for note, number in notes.items())
    return f"{table(('scheme', 'format', *map(code, TARGETS)), rows)}\n\n{said}"


def _holding(schemes: Schemes) -> list[Format]:
    """The packed formats that hold a scheme; the native one, which holds all, where alone."""
    holding = [form for form in formats().values() if form.name != "dequantized"]
    holding = [form for form in holding if form.schemes_refusal(schemes) is None]
    return [form for form in holding if form.name != "lrquant"] or holding


def _schemes(name: str) -> Schemes:
    """A scheme by its name; symmetric activations where the name leaves Q, K and V alone."""
    scheme = Scheme.parse(name)
    symmetric = scheme.activation_bits < 16 and scheme.attention_bits == 16
    return Schemes(
        Scheme(**{**scheme.to_dict(), "activation_symmetric": symmetric})  # type: ignore[arg-type]
    )


def _cell(form: Format, schemes: Schemes, target: str, notes: dict[str, int]) -> str:
    """Yes, or see where it does not always compute what was learned; numbers of what is said."""
    loading = loading_of(form, schemes, target)
    if loading.refusal is not None:
        return "–"
    said = loading.notes if loading.as_learned else (f"computes {loading.computes}", *loading.notes)
    numbers = sorted(notes.setdefault(note, len(notes) + 1) for note in said)
    word = "yes" if loading.as_learned else "see"
    return f"{word} ({', '.join(map(str, numbers))})" if numbers else word
