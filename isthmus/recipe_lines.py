"""On which line of a TOML text each key stands, for messages that point at it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

Place = tuple[str | int, ...]

_TOKEN = re.compile(
    r"""
    (?P<comment>\#[^\n]*)
    | (?P<string>\"{3}(?:\\.|[^\\])*?\"{3,5} | '{3}.*?'{3,5} | "(?:\\.|[^"\\\n])*" | '[^'\n]*')
    | (?P<newline>\n)
    | (?P<mark>[\[\]{}=,.])
    | (?P<word>[^\s\[\]{}=,.\#"']+)
    """,
    re.VERBOSE | re.DOTALL,
)


def lines(text: str) -> dict[Place, int]:
    """Give the line, from 1, of every key, table and element of an array.

    Args:
        text: TOML that a parser has accepted.

    Returns:
        By place, a key or the index in an array for each level, the line on which it begins; a table that was never
        opened by a line of its own stands where its first key does.

    >>> text = '''
    ... [[inputs]]
    ... path = "a"
    ... '''
    >>> lines(text)[("inputs", 0, "path")]
    3
    """
    return _Scanner(text).scan()


class _Scanner:
    def __init__(self, text: str) -> None:
        self.tokens = list(_tokens(text.replace("\r\n", "\n")))
        self.at = 0
        self.found: dict[Place, int] = {}
        self.counts: dict[Place, int] = {}  # of the elements of arrays of tables

    def scan(self) -> dict[Place, int]:
        table: Place = ()
        while self._skip_lines():
            if self.tokens[self.at][0] == "[":
                table = self._header()
            else:
                self._pair(table)
        return self.found

    def _header(self) -> Place:
        line = self.tokens[self.at][2]
        double = self.tokens[self.at + 1][0] == "["
        self.at += 2 if double else 1
        *outer, last = self._key()
        self.at += 2 if double else 1
        place = self._entered((), outer, line)
        place = (*place, last)
        self.found.setdefault(place, line)
        if double:
            index = self.counts[place] = self.counts.get(place, -1) + 1
            place = (*place, index)
            self.found[place] = line
        return place

    def _entered(self, place: Place, names: list[str], line: int) -> Place:
        """Follow names from a table inwards; in an array of tables that is the last one so far."""
        for name in names:
            place = (*place, name)
            self.found.setdefault(place, line)
            if place in self.counts:
                place = (*place, self.counts[place])
        return place

    def _pair(self, table: Place) -> None:
        line = self.tokens[self.at][2]
        *outer, last = self._key()
        place = (*self._entered(table, outer, line), last)
        self.found[place] = line
        self.at += 1  # the equals sign
        self._value(place)

    def _key(self) -> list[str]:
        parts = [self._name()]
        while self.tokens[self.at][0] == ".":
            self.at += 1
            parts.append(self._name())
        return parts

    def _name(self) -> str:
        name = self.tokens[self.at][1]
        self.at += 1
        return name

    def _value(self, place: Place) -> None:
        kind = self.tokens[self.at][0]
        if kind in ("[", "{"):
            self.at += 1
            self._inside(place, "]" if kind == "[" else "}")
            return
        while self.at < len(self.tokens) and self.tokens[self.at][0] not in (",", "]", "}", "newline"):
            self.at += 1  # a number with a point, or a date with a time, is several tokens

    def _inside(self, place: Place, end: str) -> None:
        index = 0
        while self._skip_lines() and self.tokens[self.at][0] != end:
            if end == "}":
                self._pair(place)
            else:
                self.found[(*place, index)] = self.tokens[self.at][2]
                self._value((*place, index))
                index += 1
            self._skip_lines()
            if self.tokens[self.at][0] == ",":
                self.at += 1
        self.at += 1

    def _skip_lines(self) -> bool:
        while self.at < len(self.tokens) and self.tokens[self.at][0] == "newline":
            self.at += 1
        return self.at < len(self.tokens)


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    """Cut into (kind, name, line); a mark is its own kind, and comments are left out."""
    line = 1
    for token in _TOKEN.finditer(text):
        kind, content = str(token.lastgroup), token[0]
        if kind == "mark":
            yield content, content, line
        elif kind != "comment":
            yield kind, _unquoted(content) if kind == "string" else content, line
        line += content.count("\n")


def _unquoted(string: str) -> str:
    if string.startswith(("'", '"""')):  # only short strings are keys
        return string.strip("'")
    # the escapes of a TOML key are among those of Python
    return ast.literal_eval(string)
