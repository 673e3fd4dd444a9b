"""Net to net: which unit of one network is which unit of another, for every group of their symmetry."""

from .matching import Matching, match

__all__ = ["Matching", "match"]
