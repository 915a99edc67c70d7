"""Read YAML and JSON from others, such as a recipe from the Hub, in bounded time and memory.

YAML is read with the safe loader, which makes plain values and runs nothing. Three more things are refused: a
key that is given twice (plain YAML silently takes the last), deeper nesting than any recipe has, and more
than `MOST` values after aliases are expanded. A few lines that expand to a billion values are therefore
refused before anything walks through them.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

import yaml

DEEPEST = 32  # levels of nested lists and mappings
# control characters except tab and newline; after an odd number of backslashes `u` spells itself
CONTROLS = re.compile(
    r"(?<!\\)(?:\\\\)*\\u00(?:0[0-8bcef]|1[0-9a-f]|7f|[89][0-9a-f])|[\x7f-\x9f]", re.IGNORECASE
)
LONGEST = 4096  # bits of an integer in YAML
SURROGATES = re.compile("[\ud800-\udfff]")
MOST = 20_000  # values of a YAML text, aliases expanded
MOST_COUNTED = 10**9  # the largest number of steps, ranks, rows and the like that a recipe may ask for
MOST_STORED = 10**15  # the most parameters or bytes


class Unreadable(ValueError):
    """The text can't be read; the message gives the reason in one line."""


class _Loader(yaml.SafeLoader):
    """The safe loader with bounds, which are counted while nodes are composed, before any value is made."""

    def __init__(self, text: str | bytes) -> None:
        super().__init__(text)
        self._depth = self._count = 0
        # values in each composed node, by its id; a missing one is not finished
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        mark: Any = event.start_mark
        alias, before = self.check_event(yaml.AliasEvent), self._count
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.constructor.ConstructorError(
                None, None, f"it is more than {DEEPEST} levels deep", mark
            )
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.ScalarNode) and SURROGATES.search(node.value):
            raise yaml.constructor.ConstructorError(
                None, None, "it spells half a code point, which no file can hold", mark
            )
        if alias and id(node) not in self._sizes:
            raise yaml.constructor.ConstructorError(None, None, "it holds itself", mark)
        self._count += self._sizes[id(node)] if alias else 1
        if self._count > MOST:
            raise yaml.constructor.ConstructorError(None, None, f"it spells more than {MOST} values", mark)
        if not alias:
            self._sizes[id(node)] = self._count - before
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f'"{key.value}" is given twice', key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number = int(super().construct_yaml_int(node))
        if number.bit_length() > LONGEST:  # Python refuses to print integers of more than 4300 digits
            raise yaml.constructor.ConstructorError(
                None, None, "it spells a number that is too long", node.start_mark
            )
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def yaml_of(text: str | bytes, *, largest: int) -> Any:
    """Return the value of a YAML text of at most `largest` bytes. Raises Unreadable if it is not valid YAML
    or exceeds a bound."""
    _require_size(text, largest)
    try:
        return yaml.load(text, _Loader)
    except (
        yaml.YAMLError,
        UnicodeDecodeError,
        RecursionError,
        ValueError,
        TypeError,
    ) as error:  # TypeError: odd merge keys
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        place = f" (line {line + 1})" if line is not None else ""
        raise Unreadable(
            f"is no YAML{place}: {_one_line(getattr(error, 'problem', None) or error)}"
        ) from None


def json_of(text: str | bytes, *, largest: int) -> Any:
    """Return the value of a JSON text of at most `largest` bytes with finite numbers only. Raises Unreadable
    if it is not valid or too large."""
    _require_size(text, largest)
    if CONTROLS.search(text if isinstance(text, str) else text.decode("utf-8", "replace")):
        raise Unreadable("is no JSON for people: it spells control characters, which could steer a terminal")
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"is no JSON ({_one_line(error)})") from None


def _require_size(text: str | bytes, largest: int) -> None:
    if len(text) > largest:
        raise Unreadable(f"has {len(text)} bytes and may have {largest}")


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:200]


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _refuse(digits)
