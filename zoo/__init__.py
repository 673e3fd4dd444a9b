"""Reference networks, data sets and one training recipe: what demonstrations, tests and benchmarks train."""

from .data import DATASETS, Dataset, Loader, load_data, loader
from .networks import NETWORKS, all_cnn, build, mlp, vgg
from .resnet import resnet
from .text import TEXTS, Text, TextLoader, load_text
from .training import RECIPES, History, Recipe, RecipeError, evaluate, train
from .transformer import transformer, vit

__all__ = [
    "DATASETS",
    "NETWORKS",
    "RECIPES",
    "TEXTS",
    "Dataset",
    "History",
    "Loader",
    "Recipe",
    "RecipeError",
    "Text",
    "TextLoader",
    "all_cnn",
    "build",
    "evaluate",
    "load_data",
    "load_text",
    "loader",
    "mlp",
    "resnet",
    "train",
    "transformer",
    "vgg",
    "vit",
]
