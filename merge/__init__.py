"""The straight path between networks, the repair of what it loses, and merging.

The room can itself be called: `isthmus.merge(models, ...)` is the function `merge` of this room.
"""

import inspect
import sys
from types import ModuleType

from ..base.evaluation import Evaluation, evaluate
from ..base.interpolation import interpolate, weighted_mean
from .averages.fisher import fisher_mean
from .averages.soups import Soup, greedy_soup
from .ensemble import Ensemble
from .layerwise import FeatureConnectivity, LayerwisePaths, feature_connectivity, layerwise_paths
from .merging import Merged, merge, merge_states
from .paths import Path, Plane, connect, midpoint, plane, plot_paths
from .repairs import VarianceRatios, repair, variance_ratios
from .spawning import Spawning, spawn
from .task_vectors import dare, slerp, task_arithmetic, task_vector, ties
from .zipping import TaskAccuracy, Zipped, task_accuracy, zip_networks

__all__ = [
    "Ensemble",
    "Evaluation",
    "FeatureConnectivity",
    "LayerwisePaths",
    "Merged",
    "Path",
    "Plane",
    "Soup",
    "Spawning",
    "TaskAccuracy",
    "VarianceRatios",
    "Zipped",
    "connect",
    "dare",
    "evaluate",
    "feature_connectivity",
    "fisher_mean",
    "greedy_soup",
    "interpolate",
    "layerwise_paths",
    "merge",
    "merge_states",
    "midpoint",
    "plane",
    "plot_paths",
    "repair",
    "slerp",
    "spawn",
    "task_accuracy",
    "task_arithmetic",
    "task_vector",
    "ties",
    "variance_ratios",
    "weighted_mean",
    "zip_networks",
]


class _CallableRoom(ModuleType):
    # `isthmus.merge` names this package and, among the public functions, the function: whichever is
    # imported first, both must work, and the import system binds the package.
    __call__ = staticmethod(merge)


sys.modules[__name__].__class__ = _CallableRoom
__signature__ = inspect.signature(merge)
