"""One tool on one task, measured: what similarity.py runs in a process of its own."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import similarity_data as data
import torch
from similarity_peers import BANDWIDTH, PEERS, Layers
from torch import Tensor, nn

from isthmus.metrics import Gram, MinibatchHSIC, as_samples, capture, collect, similarity

OURS = {"linear": {}, "debiased": {"debiased": True}, "rbf": {"kernel": "rbf", "bandwidth": BANDWIDTH}}
TRUTH = "float64 reference"
DTYPES = {"float64": torch.float64, "float32": torch.float32}
MEMORY = 1 << 30


@dataclass
class Meter:
    """CPU and wall seconds, and the peak resident set, of what runs inside."""

    cpu: float = 0.0
    wall: float = 0.0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Measure a block."""
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.cpu += time.process_time() - cpu
        self.wall += time.perf_counter() - wall


def resident(field: str) -> int | None:
    """Resident set of this process in bytes, now (VmRSS) or at its peak (VmHWM); None where Linux does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Start the peak anew, so that making the data does not count."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure one tool on one task.

    Args:
        spec: "task", "who" (a name in `PEERS`, one of ours, or `TRUTH`), "size" (of the task).

    Returns:
        "values" (nested lists), "cpu", "wall" in seconds, "peak" and "loaded" in bytes, "note".
    """
    meter = Meter()
    tasks = {"models": models_task, "many": many_task, "offsets": offsets_task}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NaN of a peer is shown as such
        measured = tasks.get(spec["task"], arrays_task)(spec, meter)
    measured["values"] = np.asarray(measured["values"], dtype=np.float64).tolist()
    return {"note": "", "cpu": meter.cpu, "wall": meter.wall, **measured, "peak": resident("VmHWM")}


# A, B, C: two lists of arrays


def arrays_call(who: str, task: str) -> Callable[[Layers, Layers], Any]:
    if who == TRUTH:
        return lambda a, b: data.true_values(task, a, b)
    if who in PEERS:
        return PEERS[who].arrays[task]
    precision: Any = who.split()[1]

    def ours(a: Layers, b: Layers) -> np.ndarray:
        grams = []
        for layers in (a, b):
            gram = Gram(dtype=DTYPES.get(precision, torch.float32))
            gram.update({str(index): x for index, x in enumerate(layers)})
            grams.append(gram)
        return similarity(*grams, index="cka", precision=precision, **OURS[task]).values

    return ours


def arrays_task(spec: dict[str, Any], meter: Meter) -> dict[str, Any]:
    size, call = spec["size"], arrays_call(spec["who"], spec["task"])
    call(*data.activations([5, 3], 0, rows=12))  # loads what is loaded at first use
    a, b = data.activations(size["widths"], 0, size["samples"])
    forget_peak()
    loaded = resident("VmRSS")
    with meter():
        values = call(a, b)
    return {"values": values, "loaded": loaded}


# D: two networks with their forward passes


def models_task(spec: dict[str, Any], meter: Meter) -> dict[str, Any]:
    size, who = spec["size"], spec["who"]
    models, weights = data.networks(size["data_dir"], size["depths"])
    images, source = data.images(size["data_dir"], size["images"])
    layers = [data.chosen_layers(model, size["layers"]) for model in models]
    batches = list(images[: len(images) // size["batch"] * size["batch"]].split(size["batch"]))
    forget_peak()
    loaded = resident("VmRSS")
    with meter():
        values = models_call(who)(*models, *layers, batches)
    return {"values": values, "loaded": loaded, "note": f"{weights}; {source}"}


def models_call(who: str) -> Callable[..., Any]:
    if who.startswith(TRUTH):
        minibatch = "minibatch" in who
        return lambda a, b, names_a, names_b, x: data.true_model_values((a, b), (names_a, names_b), x, minibatch)
    if who == "forward passes alone":
        return lambda a, b, names_a, names_b, x: forward_alone(a, b, x)
    if who in PEERS:
        found = PEERS[who].models
        assert found is not None
        return found
    how, precision = who.split()[1:3]
    return ours_minibatch(precision) if how == "minibatch" else ours_exact(precision)


def forward_alone(a: nn.Module, b: nn.Module, batches: Sequence[Tensor]) -> list[float]:
    with torch.no_grad():
        for x in batches:
            a(x)
            b(x)
    return []


def ours_minibatch(precision: str) -> Callable[..., Tensor]:
    def call(a: nn.Module, b: nn.Module, names_a: Sequence[str], names_b: Sequence[str], batches: Any) -> Tensor:
        rows, columns = [f"a.{name}" for name in names_a], [f"b.{name}" for name in names_b]
        hsic = MinibatchHSIC(layers=(rows, columns), product_dtype=DTYPES[precision])
        with torch.no_grad(), capture(a, names_a) as of_a, capture(b, names_b) as of_b:
            for x in batches:
                a(x)
                b(x)
                read = {f"a.{name}": as_samples(of_a[name], "features") for name in names_a}
                hsic.update(read | {f"b.{name}": as_samples(of_b[name], "features") for name in names_b})
        return hsic.cka(rows, columns)

    return call


def ours_exact(precision: Any) -> Callable[..., np.ndarray]:
    def call(a: nn.Module, b: nn.Module, names_a: Sequence[str], names_b: Sequence[str], batches: Any) -> np.ndarray:
        grams = [
            collect(model, batches, layers=names, positions="features", max_bytes=2 * MEMORY, progress=False)
            for model, names in ((a, names_a), (b, names_b))
        ]
        return similarity(*grams, index="cka", debiased=True, precision=precision).values

    return call


# E: more samples than a dense kernel can hold


def many_task(spec: dict[str, Any], meter: Meter) -> dict[str, Any]:
    """Stream blocks of samples; making them does not count. The reference is that of the narrow layers."""
    size, who = spec["size"], spec["who"]
    narrow = [width for width in size["widths"] if width <= size["narrow"]]
    loaded = resident("VmRSS")
    count = size["samples"] // size["block"]
    if who == TRUTH:
        blocks = (data.activations(size["widths"], k, size["block"]) for k in range(count))
        return {"values": streamed_values([[x[: len(narrow)] for x in block] for block in blocks]), "loaded": loaded}
    grams = [Gram(max_bytes=size["memory"] // 4) for _ in range(2)]
    for k in range(count):
        for gram, layers in zip(grams, data.activations(size["widths"], k, size["block"]), strict=True):
            with meter():
                gram.update({str(index): x for index, x in enumerate(layers)})
    with meter():
        values = similarity(*grams, index="cka", precision=who.split()[1], max_bytes=size["memory"] // 2).values
    kept = sum(gram.nbytes for gram in grams)
    return {"values": values[: len(narrow), : len(narrow)], "loaded": loaded, "note": f"{kept / 1e9:.2f} GB of rows"}


def streamed_values(blocks: Sequence[Sequence[Layers]]) -> Tensor:
    """Compute linear CKA of narrow layers from units x units products in float64, held whole."""
    sides = [[torch.cat(parts).double() for parts in zip(*side, strict=True)] for side in zip(*blocks, strict=True)]
    a, b = ([x - x.mean(0) for x in side] for side in sides)
    cross = torch.stack([torch.stack([(x.T @ y).square().sum() for y in b]) for x in a])
    own = [torch.stack([(x.T @ x).norm() for x in side]) for side in (a, b)]
    return cross / (own[0][:, None] * own[1])


# F: a mean that is large beside the deviation


def offsets_task(spec: dict[str, Any], meter: Meter) -> dict[str, Any]:
    """One value per offset, of one pair of layers."""
    size, call = spec["size"], arrays_call(spec["who"], spec["kind"])
    values, notes = [], set()
    for offset in size["offsets"]:
        a, b = data.activations([size["width"]], 0, size["samples"], offset)
        try:
            with meter():
                values.append(np.asarray(call(a, b), dtype=np.float64).item())
        except AssertionError as error:  # how a peer says that it found NaN
            values.append(math.nan)
            notes.add(f"raised: {error}")
    return {"values": values, "loaded": None, "note": "; ".join(notes)}
