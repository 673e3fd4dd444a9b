"""Merging of fine-tuned networks by what each has added to their common parent."""

from .arithmetic import task_arithmetic
from .dare import dare
from .slerp import slerp
from .ties import ties
from .vectors import TaskVectors, task_vector

__all__ = ["TaskVectors", "dare", "slerp", "task_arithmetic", "task_vector", "ties"]
