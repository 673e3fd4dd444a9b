"""Neural collapse: how far the features of a class have fallen onto their mean, and the means onto a simplex."""

from .class_moments import ClassMoments
from .curves import CollapseCurves, collapse_over
from .geometry import class_distance_variance, duality, frame, minority_cosine, orthogonal_distance, uniformity
from .heads import find_classifier
from .margins import one_vs_rest_margin
from .networks import Collapse, collapse
from .values import CollapseValues, collapse_of, collapse_values

__all__ = [
    "ClassMoments",
    "Collapse",
    "CollapseCurves",
    "CollapseValues",
    "class_distance_variance",
    "collapse",
    "collapse_of",
    "collapse_over",
    "collapse_values",
    "duality",
    "find_classifier",
    "frame",
    "minority_cosine",
    "one_vs_rest_margin",
    "orthogonal_distance",
    "uniformity",
]
