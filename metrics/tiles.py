"""HSIC and CKA of all pairs of layers from the samples themselves, exact for any number of samples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ..base.errors import DataError, NotFiniteError
from .batch_checks import check_alike
from .cost import Plan, Space, needed, plan
from .gram import Gram
from .hsic import KernelName as Kernel
from .precision import Precision, check_precision
from .tile_products import RBF, Linear, Stack, feature_products, sample_products
from .tile_rows import TileRows, median_distance
from .ustatistic import LEAST

__all__ = ["Kernel", "Precision", "Space", "cka_from_gram", "hsic_from_gram", "median_distance"]


# How far above its rounding errors a debiased estimate of a layer with itself must stand.
_MARGIN = 16.0


def cka_from_gram(
    gram: Gram,
    layers_a: Iterable[str],
    layers_b: Iterable[str],
    *,
    kernel: Kernel = "linear",
    debiased: bool = False,
    bandwidth: float = 1.0,
    sigma: Mapping[str, float] | None = None,
    precision: Precision = "float32",
    space: Space = "auto",
    max_bytes: int = 1 << 30,
    progress: bool | None = None,
) -> Tensor:
    """Compute centred kernel alignment of each layer with each other (Kornblith et al. 2019, equation 2).

    HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)), with every kernel computed once, tile by tile: no matrix of samples x samples
    is ever whole. The error against float64 is the same at any offset of the activations, since rows are centred first.
    Bounds for linear CKA: 1e-6 with "float32", of which a hundredth is typical at 2,000 samples; 2⁻⁷/√n with "bf16" and
    "tf32" at n samples (2e-5 at 2,000 is typical of bfloat16).

    Args:
        gram: The samples.
        layers_a: Layers of the rows.
        layers_b: Layers of the columns.
        kernel: "linear", or "rbf": exp(-d²/(2σ²)).
        debiased: Use the unbiased estimator of HSIC (Song et al. 2012), which can be negative; else the biased one,
            which goes to 1 where there are many more units than samples.
        bandwidth: σ of each layer in units of its median distance, see `median_distance`.
        sigma: σ by layer, in the units of the activations, instead of `bandwidth`.
        precision: Of the products of centred rows: "float32", "float64", "tf32" (float32 on a CPU) or "bf16". Products
            of kernels are summed in float64.
        space: Where linear kernels are computed: "auto" by cost (see `plan`), "sample", "feature" or "mixed".
        max_bytes: Bound on the memory taken beside the store. Rows that do not fit are read again when needed.
        progress: Show it: always, never, or on a terminal only (None).

    Returns:
        (layers of a x layers of b) in float64, in main memory; NaN, with a warning that names the layer, where a
        layer's own HSIC is not positive (one that does not vary).

    Raises:
        LayerNotFoundError: A layer is not in the store.
        DataError: Layers differ in their samples or devices, there are too few samples, an argument is out of range, or
            `max_bytes` is too small.

    >>> x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    >>> gram = Gram(dtype=torch.float64)
    >>> gram.update({"x": x, "relu": x.relu()})
    >>> cka_from_gram(gram, ["x"], ["x", "relu"])
    tensor([[1.0000, 0.7955]], dtype=torch.float64)
    """
    work = _Work.of(gram, layers_a, layers_b, kernel, debiased, precision, max_bytes)
    found = work.hsic(bandwidth, sigma, space, own=True, show=progress)
    size = found.values.diagonal().sqrt()
    for name, own, noise in zip(work.names, found.values.diagonal().tolist(), found.noise.tolist(), strict=True):
        if not own > noise:
            size[work.names.index(name)] = math.nan
            warnings.warn(f"layer {name!r}: its CKA is NaN, {_reason(own, noise, debiased)}", stacklevel=2)
    return work.chosen(found.values / size / size[:, None])


def hsic_from_gram(
    gram: Gram,
    layers_a: Iterable[str],
    layers_b: Iterable[str],
    *,
    kernel: Kernel = "linear",
    debiased: bool = False,
    bandwidth: float = 1.0,
    sigma: Mapping[str, float] | None = None,
    precision: Precision = "float32",
    space: Space = "auto",
    max_bytes: int = 1 << 30,
    progress: bool | None = None,
) -> Tensor:
    """Compute the Hilbert-Schmidt independence criterion of each layer with each other.

    Biased: tr(KHLH)/(n−1)² (Gretton et al. 2005). Debiased: the U-statistic of Song et al. (2012), equation 5, with K̃
    the kernel without its diagonal: [tr(K̃L̃) + 1ᵀK̃1 1ᵀL̃1/((n−1)(n−2)) − 2/(n−2) 1ᵀK̃L̃1] / (n(n−3)).

    Args:
        gram: See `cka_from_gram`; so for all that follow.
        layers_a: Layers of the rows.
        layers_b: Layers of the columns.
        kernel: "linear" or "rbf".
        debiased: Which estimator.
        bandwidth: Width of RBF kernels in units of the median distance.
        sigma: Width of RBF kernels by layer.
        precision: Of the products of centred rows.
        space: Where linear kernels are computed.
        max_bytes: Bound on the memory taken beside the store.
        progress: Show it: always, never, or on a terminal only (None).

    Returns:
        (layers of a x layers of b) in float64, in main memory; NaN, with a warning that names the layer, for an RBF
        kernel whose median distance is 0.

    Raises:
        LayerNotFoundError: A layer is not in the store.
        DataError: As for `cka_from_gram`.
        NotFiniteError: A value overflows float64.

    >>> x = torch.arange(6.0)[:, None]
    >>> gram = Gram()
    >>> gram.update({"x": x})
    >>> hsic_from_gram(gram, ["x"], ["x"])  # the squared variance
    tensor([[12.2500]], dtype=torch.float64)
    """
    work = _Work.of(gram, layers_a, layers_b, kernel, debiased, precision, max_bytes)
    found = work.hsic(bandwidth, sigma, space, own=False, show=progress)
    values = work.chosen(found.values)
    if kernel == "linear":  # of scaled rows
        scale = torch.pow(4.0, torch.tensor([work.rows.exponent[name] for name in work.names], dtype=torch.float64))
        values = work.chosen(found.values * scale * scale[:, None])
        if values.isinf().any():
            raise NotFiniteError("HSIC overflows float64; scale the activations down, or take CKA, which has no scale")
    for name, noise in zip(work.names, found.noise.tolist(), strict=True):
        if math.isnan(noise):
            warnings.warn(f"layer {name!r}: its HSIC is NaN, {_reason(0.0, noise, debiased)}", stacklevel=2)
    return values


def _reason(own: float, noise: float, debiased: bool) -> str:
    if math.isnan(noise):
        return "the median distance of its samples is 0; pass sigma= to set the width of the kernel"
    if debiased:  # samples that are all equally far apart leave zero, or what rounding makes of it
        why = "it does not vary over the samples, or hardly, or all of them are equally far apart"
        return f"its debiased HSIC is within rounding errors: {why}; compare float64, or use the biased estimator"
    return f"its own HSIC is {own:g}: it does not vary over the samples"


@dataclass(frozen=True)
class _Found:
    """HSIC of scaled rows, (layers x layers), NaN where not asked for; and what rounding may leave of a layer's own."""

    values: Tensor
    noise: Tensor


@dataclass(frozen=True)
class _Work:
    """One comparison: checked arguments, and the rows."""

    layers_a: list[str]
    layers_b: list[str]
    names: list[str]
    rows: TileRows
    kernel: str
    debiased: bool
    max_bytes: int

    @classmethod
    def of(
        cls,
        gram: Gram,
        layers_a: Iterable[str],
        layers_b: Iterable[str],
        kernel: str,
        debiased: bool,
        precision: Precision,
        max_bytes: int,
    ) -> _Work:
        if kernel not in get_args(Kernel):
            raise DataError(f"kernel is {kernel!r}; expected {' or '.join(get_args(Kernel))}")
        check_precision(precision)
        first, second = (_listed(layers) for layers in (layers_a, layers_b))
        names = list(dict.fromkeys((*first, *second)))
        _check_samples(gram, names, LEAST if debiased else 2)
        with torch.inference_mode(False), torch.no_grad():
            rows = TileRows(gram, names, precision, max_bytes // 2)
        left = max_bytes - rows.kept_bytes
        return cls(first, second, names, rows, kernel, debiased, left)

    def chosen(self, values: Tensor) -> Tensor:
        a, b = ([self.names.index(name) for name in layers] for layers in (self.layers_a, self.layers_b))
        return values[a][:, b]

    def hsic(
        self, bandwidth: float, sigma: Mapping[str, float] | None, space: Space, *, own: bool, show: bool | None
    ) -> _Found:
        with torch.inference_mode(False), torch.no_grad():
            if self.kernel == "linear":
                if sigma is not None:
                    raise DataError("sigma is for kernel='rbf'; a linear kernel has no width")
                return self._linear(space, own=own, show=show)
            if space not in ("auto", "sample"):
                raise DataError(f"space is {space!r}, but RBF kernels have sample space only; take 'auto' or 'sample'")
            return self._rbf(self._widths(bandwidth, sigma), own=own, show=show)

    def _linear(self, space: Space, *, own: bool, show: bool | None) -> _Found:
        found = self._empty()
        chosen = self._plan(space, own)
        norms = {name: self.rows.squared_norms(name) for name in self.names} if self.debiased else {}
        wide = [name for name in self.names if chosen.space[name] == "sample"]
        a, b = ([name for name in dict.fromkeys(side) if name in wide] for side in (self.layers_a, self.layers_b))
        if wide:
            stack = Stack.of(a, b, own=own) if a and b else Stack.alone(wide)
            kernel = Linear.u_centred(norms, self.rows.dtype) if self.debiased else Linear()
            products, _ = sample_products(self.rows, stack, kernel, self.max_bytes, show)
            self._put(found, stack.names, products / self._pairs_of_samples)
        narrow = [pair for pair in needed(self.layers_a, self.layers_b, own=own) if not set(pair) <= set(wide)]
        for (x, y), product in feature_products(self.rows, narrow, self.max_bytes, show).items():
            i, j = self.names.index(x), self.names.index(y)
            if self.debiased:
                if x == y:
                    found.noise[i] = _MARGIN * self._eps * product / self._pairs_of_samples
                product = self._without_diagonal(product, norms[x], norms[y])
            found.values[i, j] = found.values[j, i] = product / self._pairs_of_samples
        for name in wide if self.debiased else ():
            found.noise[self.names.index(name)] = self._entry_noise(name, norms[name]) ** 2
        return found

    def _plan(self, space: Space, own: bool) -> Plan:
        sides = ({name: self.rows.units[name] for name in side} for side in (self.layers_a, self.layers_b))
        return plan(self.rows.samples, *sides, space=space, own=own)

    def _empty(self) -> _Found:
        count = len(self.names)
        values = torch.full((count, count), math.nan, dtype=torch.float64)
        return _Found(values, torch.zeros(count, dtype=torch.float64))

    def _put(self, found: _Found, names: Sequence[str], values: Tensor) -> None:
        at = torch.tensor([self.names.index(name) for name in names])
        values = values.cpu()
        found.values[at[:, None], at] = torch.where(values.isnan(), values.T, values)

    @property
    def _pairs_of_samples(self) -> int:
        n = self.rows.samples
        return n * (n - 3) if self.debiased else (n - 1) ** 2

    @property
    def _eps(self) -> float:
        return torch.finfo(self.rows.dtype).eps

    def _entry_noise(self, name: str, norms: Tensor) -> float:
        """Bound the rounding errors of one entry of a linear kernel, which equal distances would leave behind."""
        rounded = 2**-7 / math.sqrt(self.rows.units[name]) if self.rows.precision == "bf16" else 0.0
        return max(_MARGIN * self._eps, rounded) * float(norms.mean())

    def _without_diagonal(self, product: float, x: Tensor, y: Tensor) -> float:
        """Turn ‖XᵀY‖² into n(n−3) times the U-statistic; rows of a kernel without its diagonal sum to minus that."""
        n = self.rows.samples
        shared, whole = float(x @ y), float(x.sum() * y.sum())
        return product - shared + whole / ((n - 1) * (n - 2)) - 2 / (n - 2) * shared

    def _widths(self, bandwidth: float, sigma: Mapping[str, float] | None) -> dict[str, float]:
        """Give σ of scaled rows by layer; 0 where the median distance is."""
        if sigma is None:
            if not 0 < bandwidth < math.inf:
                raise DataError(
                    f"bandwidth is {bandwidth}; expected a positive number, in units of the median distance"
                )
            return {name: bandwidth * self.rows.median_distance(name) for name in self.names}
        for name in self.names:
            if name not in sigma or not 0 < sigma[name] < math.inf:
                raise DataError(
                    f"sigma has {sigma.get(name)!r} for layer {name!r}; expected a positive number for each"
                )
        return {name: sigma[name] * 2.0 ** -self.rows.exponent[name] for name in self.names}

    def _rbf(self, widths: Mapping[str, float], *, own: bool, show: bool | None) -> _Found:
        found = self._empty()
        for at, name in enumerate(self.names):
            found.noise[at] = 0.0 if widths[name] else math.nan
        a, b = ([name for name in dict.fromkeys(side) if widths[name]] for side in (self.layers_a, self.layers_b))
        if not (a and b):
            return found
        stack = Stack.of(a, b, own=own)
        norms = {name: self.rows.squared_norms(name) for name in stack.names}
        kernel = RBF.of(norms, widths, self.rows.dtype, hollow=self.debiased)
        products, sums = sample_products(self.rows, stack, kernel, self.max_bytes, show)
        n, whole = self.rows.samples, sums.sum(1)
        shared, whole = sums @ sums.T, whole * whole[:, None]
        if self.debiased:
            values = products + whole / ((n - 1) * (n - 2)) - 2 / (n - 2) * shared
            for name, product in zip(stack.names, products.diagonal().tolist(), strict=True) if own else ():
                noise = 8 * self._eps * product / self._pairs_of_samples + kernel.entry_noise(name) ** 2
                found.noise[self.names.index(name)] = noise
        else:
            values = products - 2 / n * shared + whole / n**2
        self._put(found, stack.names, values / self._pairs_of_samples)
        return found


def _listed(layers: Iterable[str]) -> list[str]:
    layers = [layers] if isinstance(layers, str) else list(layers)
    if not layers:
        raise DataError("there is no layer to compare: name at least one for each side")
    return layers


def _check_samples(gram: Gram, names: Sequence[str], least: int) -> None:
    first = names[0]
    for name in names:
        counts, devices = (gram.count(first), gram.count(name)), (gram.device(first), gram.device(name))
        check_alike(first, name, counts, devices)
    if gram.count(first) < least:
        raise DataError(f"layer {first!r} has {gram.count(first)} samples; this estimator needs at least {least}")
