"""Repair of what averaging does to the statistics of units."""

from .prepared import Prepared, prepare
from .repair import choose_method, repair

__all__ = ["Prepared", "choose_method", "prepare", "repair"]
