"""Reference networks, data sets and one training recipe: what demonstrations, tests and benchmarks train."""

from .data import DATASETS, Dataset, Loader, load_data, loader
from .networks import NETWORKS, all_cnn, build, mlp, vgg
from .resnet import resnet
from .training import RECIPES, History, Recipe, RecipeError, evaluate, train

__all__ = [
    "DATASETS",
    "NETWORKS",
    "RECIPES",
    "Dataset",
    "History",
    "Loader",
    "Recipe",
    "RecipeError",
    "all_cnn",
    "build",
    "evaluate",
    "load_data",
    "loader",
    "mlp",
    "resnet",
    "train",
    "vgg",
]
