"""The straight path between networks, the repair of what it loses, and merging.

The room can itself be called: `isthmus.merge(models, ...)` is the function `merge` of this room.
"""

import inspect
import sys
from types import ModuleType

from ..base.evaluation import Evaluation, evaluate
from ..base.interpolation import interpolate, weighted_mean
from .merging import Merged, merge
from .paths import Path, connect
from .repairs import repair

__all__ = ["Evaluation", "Merged", "Path", "connect", "evaluate", "interpolate", "merge", "repair", "weighted_mean"]


class _CallableRoom(ModuleType):
    # `isthmus.merge` names this package and, among the public functions, the function: whichever is
    # imported first, both must work, and the import system binds the package.
    __call__ = staticmethod(merge)


sys.modules[__name__].__class__ = _CallableRoom
__signature__ = inspect.signature(merge)
