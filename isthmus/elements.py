"""The elements of a report's page: figures, tables, lists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any


def figures_section(figures: Iterable[str]) -> str:
    """Put figures beside one another."""
    return '<section class="figures" aria-label="Figures">\n' + "\n".join(figures) + "\n</section>"


def columns_section(columns: Mapping[str, str], small: bool = False) -> str:
    """Put elements beside one another, each under its heading."""
    parts = "\n".join(f"<div><h2>{escape(heading)}</h2>\n{element}\n</div>" for heading, element in columns.items())
    return f'<section class="columns{" small" if small else ""}">\n{parts}\n</section>'


def headed(heading: str, element: str) -> str:
    """Put an element under a heading, in a section of its own."""
    return f"<section><h2>{escape(heading)}</h2>\n{element}\n</section>"


def figure(picture: str, heading: str, caption: str, wide: bool = False) -> str:
    """Show a picture, an element already, with its caption; a wide one across all columns."""
    kind = ' class="wide"' if wide else ""
    return (
        f"<figure{kind}>\n<h3>{escape(heading)}</h3>\n<div class='card'>{picture}</div>\n"
        f"<figcaption>{escape(caption)}</figcaption>\n</figure>"
    )


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table whose first column names the rows.

    >>> table(("network", "loss"), [("A & B", "0.1")]).count("<td>")
    1
    """
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in headers)
    body = "\n".join(
        f"<tr><th scope='row'>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def pairs(values: Mapping[str, Any]) -> str:
    """List names and values."""
    rows = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in values.items())
    return f"<dl class='pairs'>\n{rows}\n</dl>"


def file_list(files: Sequence[Mapping[str, Any]]) -> str:
    """List files as `provenance.describe_files` gives them."""
    if not files:
        return "<p>The networks were given in memory, not as files.</p>"
    items = "\n".join(
        f"<li><strong>{escape(file['name'])}</strong> {escape(file['role'])}, {file['bytes']:,} bytes"
        f"<code>sha256 {file['sha256']}</code></li>"
        for file in files
    )
    return f"<ul class='files'>\n{items}\n</ul>"
