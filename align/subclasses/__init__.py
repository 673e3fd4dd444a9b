"""Subclasses: the structure that survives inside a collapsed class."""

from .across import SubclassMatching, match_subclasses
from .agreement import Agreement, agreement, agreements
from .finding import Subclasses, subclasses
from .linear_probe import LinearProbe, linear_probe
from .probing import ClusterProbe, cluster_and_probe
from .projection import SubclassProjection, subclass_projection
from .subspaces import SubspaceAngles, subspace_angles

__all__ = [
    "Agreement",
    "ClusterProbe",
    "LinearProbe",
    "SubclassMatching",
    "SubclassProjection",
    "Subclasses",
    "SubspaceAngles",
    "agreement",
    "agreements",
    "cluster_and_probe",
    "linear_probe",
    "match_subclasses",
    "subclass_projection",
    "subclasses",
    "subspace_angles",
]
