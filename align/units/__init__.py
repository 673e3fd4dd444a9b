"""Unit to unit: which units of two layers are the same, which combine into which, and which form clusters."""

from .baselines import omp_prediction, one_to_one_prediction, ridge_prediction
from .cluster_scores import ClusterScores, cluster_scores
from .clusters import Clusters, spectral_clusters
from .contact_sheet import Strip, contact_sheet
from .correspondence import ANALYSES, Correspondence, UnitCorrespondence, correspond, correspondence_of
from .hierarchy import hierarchical_clusters
from .joint import JointAffinity, joint_affinity
from .maximisation import Maximised, maximise
from .mean_activations import MeanActivations, mean_activations
from .one_to_one import UnitMatching, bipartite_matching, semi_matching, semi_matching_gain
from .pictures import matched_curves
from .prediction import Prediction, PredictionPath
from .receptive_field import ReceptiveField, receptive_field
from .rotation import RotationTest, rotation_test
from .seeing import see_cluster, see_pairs
from .sparse_prediction import sparse_prediction
from .stability import Stability, matching_stability
from .top_inputs import TopInputs, top_inputs
from .transport import SoftMatch, soft_matching

__all__ = [
    "ANALYSES",
    "ClusterScores",
    "Clusters",
    "Correspondence",
    "JointAffinity",
    "Maximised",
    "MeanActivations",
    "Prediction",
    "PredictionPath",
    "ReceptiveField",
    "RotationTest",
    "SoftMatch",
    "Stability",
    "Strip",
    "TopInputs",
    "UnitCorrespondence",
    "UnitMatching",
    "bipartite_matching",
    "cluster_scores",
    "contact_sheet",
    "correspond",
    "correspondence_of",
    "hierarchical_clusters",
    "joint_affinity",
    "matched_curves",
    "matching_stability",
    "maximise",
    "mean_activations",
    "omp_prediction",
    "one_to_one_prediction",
    "receptive_field",
    "ridge_prediction",
    "rotation_test",
    "see_cluster",
    "see_pairs",
    "semi_matching",
    "semi_matching_gain",
    "soft_matching",
    "sparse_prediction",
    "spectral_clusters",
    "top_inputs",
]
