"""A strict reading of YAML that keeps the place of every key and value, executes nothing and stays small."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

DEPTH = 8
"""How deep lists and mappings may nest."""

_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_DECIMAL = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_UNSURE = {
    "bool": "is true or false to some YAML readers and text to others: write true or false",
    "int": "is not a plain decimal number: write one such as 16",
    "float": "is not a plain decimal number: write one such as 0.5",
}
_HINTS = {
    "scanning an alias": 'a pattern that starts with * needs quotes, as in "*.q_proj"',
    "unknown escape": "a pattern with backslashes needs single quotes, as in 're:.*\\.q_proj'",
    "'\\t'": "indent with spaces instead of tabs",
    "single document": "keep one recipe per file",
}


class Place(NamedTuple):
    """Line and column of a file, both counted from 1."""

    line: int
    column: int


class YamlProblem(Exception):
    """What is wrong with a text, and where."""

    def __init__(self, place: Place, text: str) -> None:
        super().__init__(text)
        self.place = place


class _Loader(yaml.SafeLoader):
    """Composes nodes, which hold text and marks only; refuses what would let a small file grow or run."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        """Returns the next node after a look at the event that opens it."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        place = _place(event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            raise YamlProblem(
                place, f"*{event.anchor} is a YAML alias, which recipes do not take; {_HINTS['scanning an alias']}"
            )
        if event.anchor is not None:
            raise YamlProblem(place, f"&{event.anchor} is a YAML anchor, which recipes do not take: repeat the value")
        if event.tag is not None:
            raise YamlProblem(place, f"{event.tag[:60]!r} is a YAML tag, which recipes do not take: remove it")
        if self.depth == DEPTH:
            raise YamlProblem(place, f"lists and mappings nest deeper than {DEPTH} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _place(mark: Any) -> Place:
    return Place(mark.line + 1, mark.column + 1)


@dataclass(frozen=True)
class Document:
    """One parsed text: its plain value, and the places of that value's parts."""

    value: Any
    root: yaml.Node | None

    def place(self, location: Sequence[str | int], *, of_key: bool = False) -> Place:
        """Returns where the part begins, or the innermost part around it where it does not exist.

        Args:
            location: keys and indices from the root on.
            of_key: the place of the last key instead of its value's.
        """
        node = self.root
        found = Place(1, 1) if node is None else _place(node.start_mark)
        for step in location:
            key, node = _child(node, step)
            if node is None:
                break
            found = _place((key or node).start_mark if of_key else node.start_mark)
        return found


def _child(node: yaml.Node | None, step: str | int) -> tuple[yaml.Node | None, yaml.Node | None]:
    """Returns the key, where there is one, and the value of a node's part."""
    if isinstance(node, yaml.MappingNode):
        return next(((key, value) for key, value in node.value if key.value == step), (None, None))
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        return None, node.value[step]
    return None, None


def parse(text: str) -> Document:
    """Returns the text's one document.

    Numbers, true, false and null are what YAML 1.1 and 1.2 both say, with 1e-3 a number as in 1.2; what the two
    disagree on (on, no, 010, 1:30) is refused, so that the file means what an editor shows.

    Raises:
        YamlProblem: not YAML; aliases, anchors, tags; deep nesting; a key twice; a word with two readings.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = Place(before.count("\n") + 1, error.position - before.rfind("\n"))
        raise YamlProblem(place, f"character U+{_code(error.character):04X} cannot be in a YAML file") from None
    except yaml.MarkedYAMLError as error:
        raise _problem(error) from None
    return Document(None if root is None else _plain(root), root)


def _code(character: Any) -> int:
    return character if isinstance(character, int) else ord(character)


def _problem(error: yaml.MarkedYAMLError) -> YamlProblem:
    said = f"{error.problem} {error.context or ''}".strip()
    hint = next((f"; {hint}" for words, hint in _HINTS.items() if words in said), "")
    return YamlProblem(_place(error.problem_mark or error.context_mark), f"not YAML: {said}{hint}")


def _plain(node: yaml.Node) -> Any:
    """Returns what a node stands for: None, bool, int, float, str, list or dict."""
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return _mapping(node)
    return _scalar(node) if node.style is None else node.value  # type: ignore[attr-defined]


def _mapping(node: yaml.MappingNode) -> dict[str, Any]:
    """Returns the mapping with its keys as they are written."""
    lines: dict[str, int] = {}
    found: dict[str, Any] = {}
    for key, value in node.value:
        place = _place(key.start_mark)
        if not isinstance(key, yaml.ScalarNode):
            raise YamlProblem(place, "a key must be a word, not a list or a mapping")
        if key.value in lines:
            raise YamlProblem(place, f"key {key.value[:60]!r} stands on line {lines[key.value]} already: remove one")
        lines[key.value] = place.line
        found[key.value] = _plain(value)
    return found


def _scalar(node: yaml.Node) -> Any:
    """Returns what a word without quotes stands for."""
    text: str = node.value
    if text in _WORDS:
        return _WORDS[text]
    if _WHOLE.fullmatch(text):
        # Python refuses to read very long integers; none that is an option's value has 20 digits.
        return int(text) if len(text) < 20 else float(text)
    if _DECIMAL.fullmatch(text):
        return float(text)
    reason = _UNSURE.get(node.tag.rpartition(":")[2])
    if reason:
        raise YamlProblem(_place(node.start_mark), f"{text[:60]} {reason}, or put it in quotes if it is text")
    return text
