"""Scale symmetries: factors on weights that leave a function as it is, and the form that they cannot change."""

from .canonical import Canonical, canonical_scales
from .groups import ScaleGroups, apply_scales
from .homogeneity import scale_groups

__all__ = ["Canonical", "ScaleGroups", "apply_scales", "canonical_scales", "scale_groups"]
