"""What lies between networks: the straight path, its barrier, planes through three."""

from .path import Path, connect

__all__ = ["Path", "connect"]
