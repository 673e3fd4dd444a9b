"""Connectivity layer by layer, of losses and of features."""

from .cosines import commutativity, feature_distance, weak_additivity
from .features import FeatureConnectivity, feature_connectivity
from .layer_paths import LayerwisePaths, layerwise_paths

__all__ = [
    "FeatureConnectivity",
    "LayerwisePaths",
    "commutativity",
    "feature_connectivity",
    "feature_distance",
    "layerwise_paths",
    "weak_additivity",
]
