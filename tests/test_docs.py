"""What the pages beside the README show runs as printed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

EXTENDING = Path(__file__).resolve().parents[1] / "docs" / "extending.md"


def test_a_rule_is_added_as_the_page_says(run_code: Callable[[str], str]) -> None:
    rule, its_test = re.findall(r"^```python\n(.*?)^```", EXTENDING.read_text(), re.MULTILINE | re.DOTALL)
    assert len([line for line in rule.splitlines() if line.strip()]) < 10
    before = its_test.replace("test_units_under_a_trace_are_free()\n", "")
    run_code(before + "found = symmetry(Traced(), torch.randn(5, 4))\nassert [p.operator for p in found.unruled]")
    run_code(rule + its_test)


def test_what_the_page_names_is_where_it_says() -> None:
    from isthmus.align import Call, depend, terms, trace, unify

    for module, names in (
        (unify, ("factor", "cut", "equate")),
        (depend, ("mix", "admit")),
        (terms, ("product", "concatenation")),
        (trace, ("NoRuleError",)),
        (Call, ("axes", "pin", "fixed", "point", "positions")),
    ):
        for name in names:
            assert hasattr(module, name)
            assert name in EXTENDING.read_text()
