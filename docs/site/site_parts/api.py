"""The public names of the package: signatures and docstrings, as Python itself knows them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import lrquant
from lrquant.api.docstrings import TITLE

LONG = 80  # characters of a signature that still stand in one line
MANY = 20  # arguments of a class that are listed elsewhere: those of the settings


def markdown() -> str:
    """A section a name of `lrquant.__all__`, functions first."""
    names = [name for name in lrquant.__all__ if not name.startswith("__")]
    values = {name: getattr(lrquant, name) for name in names}
    functions = [name for name in names if not inspect.isclass(values[name])]
    classes = [name for name in names if inspect.isclass(values[name])]
    return "\n\n".join(_section(name, values[name]) for name in (*functions, *classes))


def _section(name: str, value: object) -> str:
    parts = [f"## lrquant.{name}"]
    if callable(value) and not _is_error(value):
        parts.append(_code(f"lrquant.{name}", value))
    parts.append(_docstring(value))
    if inspect.isclass(value):
        parts += _members(value)
    return "\n\n".join(parts)


def _members(value: type) -> Iterator[str]:
    """The public methods and properties of a class of this package that have a docstring."""
    own = [each for each in value.__mro__ if each.__module__.startswith("lrquant.")]
    for name, member in ((n, m) for each in own for n, m in vars(each).items()):
        if name.startswith("_") or not inspect.getdoc(member):
            continue
        if isinstance(member, property):
            yield f"**`{name}`**: {_docstring(member)}"
        elif isinstance(member, classmethod | staticmethod) or inspect.isfunction(member):
            yield f"{_code(name, getattr(value, name))}\n\n{_docstring(member)}"


def _is_error(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, Exception)


def _docstring(value: object) -> str:
    """Without the settings, which have a section of their own."""
    return (inspect.getdoc(value) or "").partition(TITLE)[0].rstrip()


def _code(name: str, value: Callable[..., object]) -> str:
    return f"```python\n{_signature(name, value)}\n```"


def _signature(name: str, value: Callable[..., object]) -> str:
    """A signature; with a line an argument where one would be too long, and cut where many are."""
    signature = _plain(inspect.signature(value))
    arguments = list(signature.parameters.values())
    if inspect.isclass(value) and len(arguments) > MANY:
        return f"{name}(**settings)"
    one = f"{name}{signature}"
    if len(one) <= LONG:
        return one
    lines = list(map(str, arguments))
    named = [each.kind is inspect.Parameter.KEYWORD_ONLY for each in arguments]
    if any(named):
        lines.insert(named.index(True), "*")
    returned = signature.return_annotation
    arrow = "" if returned is signature.empty else f" -> {returned!r}"
    return "\n".join([f"{name}(", *(f"    {line}," for line in lines), f"){arrow}"])


def _plain(signature: inspect.Signature) -> inspect.Signature:
    """Without `self`, and annotations without the quotes that they are kept in."""
    empty = signature.empty
    parameters = [
        each if each.annotation is empty else each.replace(annotation=_Words(each.annotation))
        for each in signature.parameters.values()
        if each.name != "self"
    ]
    returned = signature.return_annotation
    returned = returned if returned in (empty, None, "None") else _Words(returned)
    returned = empty if returned in (None, "None") else returned
    return signature.replace(parameters=parameters, return_annotation=returned)


class _Words:
    """An annotation that is shown as it is written."""

    def __init__(self, annotation: object) -> None:
        text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        self._text = text.strip("'\"")

    def __repr__(self) -> str:
        return self._text
