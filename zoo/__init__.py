"""Reference networks, data sets and one training recipe: what demonstrations, tests and benchmarks train."""

from .coarse import Coarse, coarsen, pairs_of
from .data import DATASETS, Dataset, Loader, load_data, loader
from .distillation import SoftTargets, Subclassed, Taught, sum_subclasses, taught
from .networks import NETWORKS, all_cnn, build, mlp, vgg
from .recipe import RECIPES, Recipe, RecipeError
from .resnet import resnet
from .resuming import steps_in, train_until
from .text import TEXTS, Text, TextLoader, load_text
from .training import History, evaluate, train
from .transformer import transformer, vit

__all__ = [
    "DATASETS",
    "NETWORKS",
    "RECIPES",
    "TEXTS",
    "Coarse",
    "Dataset",
    "History",
    "Loader",
    "Recipe",
    "RecipeError",
    "SoftTargets",
    "Subclassed",
    "Taught",
    "Text",
    "TextLoader",
    "all_cnn",
    "build",
    "coarsen",
    "evaluate",
    "load_data",
    "load_text",
    "loader",
    "mlp",
    "pairs_of",
    "resnet",
    "steps_in",
    "sum_subclasses",
    "taught",
    "train",
    "train_until",
    "transformer",
    "vgg",
    "vit",
]
