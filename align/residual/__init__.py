"""Orthogonal alignment of residual streams that are read through norms only."""

from .alignment import Alignment
from .folding import Folded, Recipe, fold_norms, rotate
from .learned import LearnedAlignment, learned_alignment
from .matching import orthogonal_matching
from .norms import Norm
from .orthogonal import procrustes, random_rotation
from .readers import Reader
from .streams import Stream

__all__ = [
    "Alignment",
    "Folded",
    "LearnedAlignment",
    "Norm",
    "Reader",
    "Recipe",
    "Stream",
    "fold_norms",
    "learned_alignment",
    "orthogonal_matching",
    "procrustes",
    "random_rotation",
    "rotate",
]
