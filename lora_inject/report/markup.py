"""HTML and SVG elements; what is not markup already is escaped, so that no text can become markup by mistake."""

from __future__ import annotations

import html
from collections.abc import Iterable


class Markup(str):
    """Text that is markup: only this module and its callers' constants make it."""

    __slots__ = ()


Child = str | Iterable["Child"]
_VOID = frozenset({"meta", "input", "br"})


def tag(name: str, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """Returns an element; strings that are no `Markup` and all attributes are escaped.

    Args:
        name: the element's name.
        children: text, markup, or iterables of both.
        attributes: by name; a trailing "_" is dropped and other "_" become "-". None and False leave one out, True
            writes it without a value. Numbers get two decimals at most.
    """
    opened = f"<{name}{''.join(_attribute(key, value) for key, value in attributes.items())}>"
    return Markup(opened if name in _VOID else f"{opened}{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Markup:
    """Returns the children one after another."""
    return Markup("".join(_text(child) for child in children))


def _text(child: Child) -> str:
    if isinstance(child, Markup):
        return child
    return html.escape(child, quote=False) if isinstance(child, str) else join(child)


def _attribute(key: str, value: str | int | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return f' {name}="{html.escape(text)}"'
