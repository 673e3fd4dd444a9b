"""Isthmus: align the neurons of two trained networks, walk the path between them, merge them.

>>> import torch, isthmus
>>> _ = torch.manual_seed(0)
>>> a, b = (torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2)) for _ in range(2))
>>> matching = isthmus.match(a, b, torch.randn(8, 4))
>>> data = [(torch.randn(32, 4), torch.randint(2, (32,)))]
>>> isthmus.connect(a, matching.apply(b), data).samples
32
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import isthmus.align as align
    import isthmus.metrics as metrics
    import isthmus.zoo as zoo
    from isthmus.align import Correspondence, Matching, Permutation, Symmetry, correspond, match, symmetry
    from isthmus.merge import connect, merge, repair
    from isthmus.metrics import Moments, compare
    from isthmus.metrics.collapse import collapse

    __version__: str

# At the root of a source tree Python finds this folder before an installed copy. The rooms are then
# its siblings, not its children: look for them there, so that one tree is imported whole.
_here = Path(__file__).parent
if not (_here / "align").exists() and (_here.parent / "align" / "__init__.py").exists():
    __path__.append(str(_here.parent))

__all__ = [
    "Correspondence",
    "Matching",
    "Moments",
    "Permutation",
    "Symmetry",
    "__version__",
    "align",
    "collapse",
    "compare",
    "connect",
    "correspond",
    "match",
    "merge",
    "metrics",
    "repair",
    "symmetry",
    "zoo",
]

# `merge` is a room and a function: the room itself can be called.
_ROOMS = ("align", "merge", "metrics", "zoo")
_ROOM_OF = {
    "Correspondence": "align",
    "Matching": "align",
    "Moments": "metrics",
    "Permutation": "align",
    "Symmetry": "align",
    "collapse": "metrics.collapse",
    "compare": "metrics",
    "connect": "merge",
    "correspond": "align",
    "match": "align",
    "repair": "merge",
    "symmetry": "align",
}


def __getattr__(name: str) -> Any:
    # On first use, so that importing this package, as the command line does, leaves torch alone (PEP 562).
    if name == "__version__":
        value: Any = _version()
    elif name in _ROOMS:
        value = import_module(f".{name}", __name__)
    elif name in _ROOM_OF:
        value = getattr(import_module(f".{_ROOM_OF[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("isthmus")
    except PackageNotFoundError:
        return "0+source"  # a source tree that was never installed
