"""Activations, streamed once into moments or samples, and every index of similarity that is read off them."""

from .capture import as_samples, capture
from .cca import CCA, PWCCA, SVCCA, cca, pwcca, svcca
from .cka import CKA, cka, cka_from_moments
from .collect import collect
from .compare import compare
from .cost import plan
from .coupling import soft_coupling
from .fisher import diagonal_fisher
from .folds import UnitFolds, unit_folds
from .gram import Gram
from .hsic import HSIC, hsic
from .index import Index, Invariances
from .indices import INDICES
from .joint_counts import JointCounts
from .minibatch import MinibatchHSIC
from .moments import Moments
from .neighbours import MutualKNN, mutual_knn
from .pictures import difference_map, layer_map, shared_eigenvectors, training_map
from .procrustes import Bures, Procrustes, bures, procrustes
from .reading import reader
from .regression import LinearRegression, linear_regression
from .rsa import RSA, rdm, rsa
from .similarity import similarity
from .similarity_map import Similarity
from .soft_matching import SoftMatching, soft_matching
from .tiles import cka_from_gram, hsic_from_gram
from .units import mutual_information, unit_correlation

__all__ = [
    "CCA",
    "CKA",
    "HSIC",
    "INDICES",
    "PWCCA",
    "RSA",
    "SVCCA",
    "Bures",
    "Gram",
    "Index",
    "Invariances",
    "JointCounts",
    "LinearRegression",
    "MinibatchHSIC",
    "Moments",
    "MutualKNN",
    "Procrustes",
    "Similarity",
    "SoftMatching",
    "UnitFolds",
    "as_samples",
    "bures",
    "capture",
    "cca",
    "cka",
    "cka_from_gram",
    "cka_from_moments",
    "collect",
    "compare",
    "diagonal_fisher",
    "difference_map",
    "hsic",
    "hsic_from_gram",
    "layer_map",
    "linear_regression",
    "mutual_information",
    "mutual_knn",
    "plan",
    "procrustes",
    "pwcca",
    "rdm",
    "reader",
    "rsa",
    "shared_eigenvectors",
    "similarity",
    "soft_coupling",
    "soft_matching",
    "svcca",
    "training_map",
    "unit_correlation",
    "unit_folds",
]
