"""Unit to unit and net to net: symmetry, permutations, and the matching of two networks."""

from .matching import Matching, match
from .overrides import add_group, hold_groups
from .permutation import Permutation
from .symmetry import Group, Pinned, Symmetry
from .trace import Call, rule
from .verification import Verification
from .verify import verify

# Last, so that the function is what is left of the name that it shares with a module.
from .derive import symmetry  # isort: skip

__all__ = [
    "Call",
    "Group",
    "Matching",
    "Permutation",
    "Pinned",
    "Symmetry",
    "Verification",
    "add_group",
    "hold_groups",
    "match",
    "rule",
    "symmetry",
    "verify",
]
