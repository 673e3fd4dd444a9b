"""The lines of keys in TOML, held against the parser that reads their values."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.recipe_lines import lines

tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")

TEXT = '''seed = 1 # "a comment = [
a.b."c.d" = { x = [1, 2.5e-3,
 {y = 1}], 'layer1.*' = [0.7,
 0.3] }

[[inputs]]
path = "a\\"b = 3"  # [x]
note = """one
[not.a.table]
it's = "two" """
[inputs.base]
path = 'q'
[ [ inputs ] ]
'path' = "b"
day = 1979-05-27 07:32:00
"\\u00e9" = [ [1, 2], [3] , ]
[data . "more"]
many = \'\'\'
x = 1\'\'\'
last = { }
'''.replace("[ [ inputs ] ]", "[[ inputs ]]")


def test_lines_of_everything_that_toml_can_write():
    tomllib.loads(TEXT)
    found = lines(TEXT)
    assert found["seed",] == 1
    assert found["a", "b", "c.d"] == found["a", "b", "c.d", "x"] == found["a", "b", "c.d", "x", 1] == 2
    assert found["a", "b", "c.d", "x", 2, "y"] == 3
    assert found["a", "b", "c.d", "layer1.*"] == found["a", "b", "c.d", "layer1.*", 0] == 3
    assert found["a", "b", "c.d", "layer1.*", 1] == 4
    assert found["inputs", 0] == 6
    assert found["inputs", 0, "path"] == 7
    assert found["inputs", 0, "note"] == 8
    assert found["inputs", 0, "base"] == 11
    assert found["inputs", 0, "base", "path"] == 12
    assert found["inputs", 1] == 13
    assert found["inputs", 1, "path"] == 14
    assert found["inputs", 1, "é", 1, 0] == 16
    assert found["data", "more"] == 17
    assert found["data", "more", "last"] == 20
    assert ("not",) not in found


def test_lines_are_counted_alike_with_windows_line_ends():
    assert lines(TEXT.replace("\n", "\r\n")) == lines(TEXT)


def places(value: Any, place: tuple = ()) -> set[tuple]:
    found = {place} if place else set()
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        found |= places(part, (*place, key))
    return found


def test_every_place_that_the_parser_knows_has_a_line_and_no_other():
    assert set(lines(TEXT)) == places(tomllib.loads(TEXT))


KEYS = st.text("a.é[=]#\"'\\\\ 1", max_size=3)
SCALARS = st.booleans() | st.integers(-9, 9) | st.floats(-2, 2) | KEYS.map(lambda text: f'[{text}] = "#')
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2),
    max_leaves=4,
)


def value_text(value: Any, gap: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{quoted(key)} = {value_text(part, gap)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + "".join(f"{gap}{value_text(part, gap)}," for part in value) + gap + "]"
    return quoted(value) if isinstance(value, str) else repr(value)


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def table_text(table: dict[str, Any], gap: str) -> str:
    return "".join(f"{quoted(key)} = {value_text(value, gap)} # [x]\n" for key, value in table.items())


@given(
    st.dictionaries(KEYS.map("k".__add__), VALUES, max_size=2),
    st.dictionaries(KEYS, VALUES, max_size=2),
    st.lists(st.dictionaries(KEYS, VALUES, max_size=2), min_size=1, max_size=2),
    st.sampled_from(["", " ", "\n", " # x = [1]\n\n"]),
)
@settings(max_examples=30, deadline=None)
def test_any_document(top, table, rows, gap):
    headers = [((), "", top), (("table",), "[table]\n", table)]
    headers += [(("rows", index), "[[rows]]\n", row) for index, row in enumerate(rows)]
    text = "".join(header + table_text(content, gap) for _, header, content in headers)
    found = lines(text)
    assert set(found) == places(tomllib.loads(text))
    assert all(found[place] == text[: text.index(header)].count("\n") + 1 for place, header, _ in headers[1:3])
    for place, _, content in headers:  # a key's line holds the key, and later keys stand further below
        begun = [found[(*place, key)] for key in content]
        assert begun == sorted(begun)
        assert all(quoted(key) in text.split("\n")[line - 1] for key, line in zip(content, begun, strict=True))
