"""Partial zipping: units merged within and across networks by how alike they are, heads kept for each task."""

from .accuracy import TaskAccuracy, task_accuracy
from .greedy import zip_units
from .slots import Slots
from .zipped import Zipped, ZippedGroup
from .zipping import zip_networks

__all__ = ["Slots", "TaskAccuracy", "Zipped", "ZippedGroup", "task_accuracy", "zip_networks", "zip_units"]
