"""Isthmus: align the neurons of two trained networks, walk the path between them, merge them."""

from __future__ import annotations

from pathlib import Path

# At the root of a source tree Python finds this folder before an installed copy. The rooms are then
# its siblings, not its children: look for them there, so that one tree is imported whole.
_here = Path(__file__).parent
if not (_here / "align").exists() and (_here.parent / "align" / "__init__.py").exists():
    __path__.append(str(_here.parent))
