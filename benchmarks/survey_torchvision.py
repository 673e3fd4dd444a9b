"""The classification models of torchvision for the survey."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 2
SIZE = 64
# Models that do not take the size above: by the start of their names, the size and what they are built with.
SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "alexnet": (96, {}),
    "googlenet": (96, {"init_weights": False}),
    "inception": (128, {"init_weights": False}),
    "maxvit": (224, {}),
    "swin": (128, {}),
    "vit_b_16": (64, {"image_size": 64}),
    "vit_b_32": (128, {"image_size": 128}),
    "vit_l_16": (64, {"image_size": 64}),
    "vit_l_32": (128, {"image_size": 128}),
    "vit_h_14": (56, {"image_size": 56}),
}
QUICK = ("resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "mobilenet_v3_small")

_declared: list[torch.library.Library] = []


def admit_foreign_build() -> None:
    """Let torchvision be imported where its compiled part was built for another build of torch.

    Its Python part registers meta functions for compiled operators at import, which fails where these did not load;
    declared here with a dummy schema, they do no harm. Where the compiled part loads, nothing needs to be done.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or _declared:
        return
    package = Path(found.origin).parent
    compiled = next(package.glob("_C*.so"), None) or next(package.glob("_C*.pyd"), None)
    try:
        if compiled is not None:
            torch.ops.load_library(compiled)
            return
    except OSError:
        pass
    text = (package / "_meta_registrations.py").read_text()
    operators = set(re.findall(r"register_meta\(\"(\w+)\"", text)) | set(re.findall(r"torchvision::(\w+)", text))
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in sorted(operators):
        library.define(f"{operator}(Tensor x) -> Tensor")
    _declared.append(library)  # what it declares ends with it


def names() -> list[str]:
    """List the models."""
    admit_foreign_build()
    models = importlib.import_module("torchvision.models")
    return models.list_models(models)


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Build a model with random weights, and its example input."""
    admit_foreign_build()
    models = importlib.import_module("torchvision.models")
    size, options = next((SIZES[start] for start in SIZES if name.startswith(start)), (SIZE, {}))
    model = models.get_model(name, weights=None, **options)
    return model, torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(0))
