"""Unit to unit and net to net: symmetry, permutations, and the matching of two networks."""

from .derive import symmetry
from .matching import Matching, match
from .permutation import Permutation
from .symmetry import Group, Pinned, Symmetry
from .trace import Call, rule
from .verify import Verification, verify

__all__ = [
    "Call",
    "Group",
    "Matching",
    "Permutation",
    "Pinned",
    "Symmetry",
    "Verification",
    "match",
    "rule",
    "symmetry",
    "verify",
]
