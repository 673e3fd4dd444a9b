"""What lies between networks: the straight path, its barrier, planes through three."""

from .connecting import connect, midpoint
from .drawing import plot_paths
from .path import Path
from .plane import Plane, plane

__all__ = ["Path", "Plane", "connect", "midpoint", "plane", "plot_paths"]
