"""The page of a report: its structure and its style."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from string import Template

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root {
  --paper: #faf9f6; --ink: #1d2127; --muted: #5d646e; --rule: #dcdad4; --card: #ffffff; --accent: #0072b2;
  --text: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --display: ui-serif, "Iowan Old Style", Charter, Georgia, "Times New Roman", serif;
}
@media (prefers-color-scheme: dark) {
  :root { --paper: #15171b; --ink: #e9e7e2; --muted: #a0a6af; --rule: #33373e; --card: #f6f5f2; --accent: #56b4e9; }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: clamp(1.25rem, 4vw, 4rem) clamp(1rem, 4vw, 3rem); max-width: 74rem;
  background: var(--paper); color: var(--ink); font: 1rem/1.55 var(--text); overflow-wrap: anywhere;
}
h1 {
  font: 600 clamp(1.6rem, 4.2vw, 2.6rem)/1.18 var(--display); margin: .3rem 0 1rem; max-width: 24em;
  text-wrap: balance; overflow-wrap: normal;
}
h2 { font: 600 1.3rem/1.3 var(--display); margin: 0 0 .8rem; }
h3 { font-size: 1rem; font-weight: 600; margin: 0 0 .5rem; }
.kicker {
  color: var(--accent); font-size: .8rem; font-weight: 600; letter-spacing: .08em; text-transform: uppercase; margin: 0;
}
.lead { max-width: 46rem; color: var(--muted); margin: 0 0 2rem; }
section { margin-top: 3rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1.2rem 2rem; margin: 0; }
.tiles div { border-top: 2px solid var(--ink); padding-top: .5rem; }
.tiles dt { color: var(--muted); font-size: .85rem; line-height: 1.35; }
.tiles dd { margin: .15rem 0 0; font: 500 1.9rem/1.2 var(--display); font-variant-numeric: tabular-nums; }
.figures, .columns { display: grid; gap: 2.5rem; grid-template-columns: minmax(0, 1fr); }
figure { margin: 0; min-width: 0; }
.wide { grid-column: 1 / -1; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 6px; padding: .6rem; }
.card svg { display: block; width: 100%; height: auto; }
.card svg text { font-family: var(--text) !important; }
figcaption { color: var(--muted); font-size: .87rem; line-height: 1.5; margin-top: .6rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem 0 .4rem .7rem; text-align: right; font-weight: 400; vertical-align: baseline; }
th:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--muted); font-size: .8rem; line-height: 1.3; overflow-wrap: normal; vertical-align: bottom; }
tbody tr { border-top: 1px solid var(--rule); }
td { white-space: nowrap; }
.pairs { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .25rem 1.2rem; margin: 0; }
.pairs dt { color: var(--muted); }
.pairs dd { margin: 0; }
.files { list-style: none; margin: 0; padding: 0; }
.files li { border-top: 1px solid var(--rule); padding: .5rem 0; }
.files code { display: block; color: var(--muted); font: .78rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
.small { font-size: .9rem; }
@media (min-width: 52rem) { .figures, .columns { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
@media print { body { background: none; } figure, table { break-inside: avoid; } }
</style>
</head>
<body>
<header>
<p class="kicker">Isthmus report</p>
<h1>$title</h1>
<p class="lead">$lead</p>
<dl class="tiles">
$tiles
</dl>
</header>
<main>
$main
</main>
</body>
</html>
""")


def page(title: str, lead: str, tiles: Sequence[tuple[str, str]], sections: Iterable[str]) -> str:
    """Lay out a report: one self-contained page that fetches nothing.

    Args:
        title: What was found, in a sentence.
        lead: What was done, in a paragraph.
        tiles: The few figures that matter most, each with what it is.
        sections: Elements, from `elements`.

    >>> "<h1>A &lt; B</h1>" in page("A < B", "Measured on nothing.", [("barrier", "0.1")], [])
    True
    """
    return _PAGE.substitute(
        title=escape(title),
        lead=escape(lead),
        tiles="\n".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles),
        main="\n".join(sections),
    )
