"""Repair of what averaging does to the statistics of units."""

from .prepared import Prepared, choose_method, prepare
from .repair import repair
from .statistics import UnitStatistics
from .variances import VarianceRatios, variance_ratios

__all__ = [
    "Prepared",
    "UnitStatistics",
    "VarianceRatios",
    "choose_method",
    "prepare",
    "repair",
    "variance_ratios",
]
