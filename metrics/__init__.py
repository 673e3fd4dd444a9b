"""Activations, their moments, and the similarity of layers that is read off them."""

from .capture import as_samples, capture
from .cka import cka, cka_from_moments
from .compare import Similarity, compare
from .moments import Moments

__all__ = ["Moments", "Similarity", "as_samples", "capture", "cka", "cka_from_moments", "compare"]
