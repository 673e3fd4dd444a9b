"""Net to net: which unit of one network is which unit of another, for every group of their symmetry."""

from .activations import activation_matching
from .frank_wolfe import frank_wolfe_matching
from .iterated import iterated_activation_matching
from .learned import learned
from .many import ManyMatching, match_many
from .matching import match, match_checkpoints
from .result import Matching
from .sinkhorn_matching import sinkhorn_matching
from .straight_through import straight_through
from .weights import weight_matching

__all__ = [
    "ManyMatching",
    "Matching",
    "activation_matching",
    "frank_wolfe_matching",
    "iterated_activation_matching",
    "learned",
    "match",
    "match_checkpoints",
    "match_many",
    "sinkhorn_matching",
    "straight_through",
    "weight_matching",
]
