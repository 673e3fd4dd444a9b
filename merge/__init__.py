"""The straight path between networks, the repair of what it loses, and merging."""

from .evaluation import Evaluation, evaluate
from .interpolation import interpolate, weighted_mean
from .merging import Merged, merge
from .path import Path, connect
from .repair import repair

__all__ = ["Evaluation", "Merged", "Path", "connect", "evaluate", "interpolate", "merge", "repair", "weighted_mean"]
