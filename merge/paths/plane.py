"""The plane through three networks in weight space, and the loss on it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ...base.batches import Data, require_repeatable
from ...base.errors import ArchitectureError, DataError
from ...base.evaluation import Measure, choose_measures, measure_name
from ...base.interpolation import Span, span
from ...base.running import on_device
from ..repairs import choose_method
from .measuring import MEMORY, measure_points
from .repaired import Repaired

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A third network nearer to the line through two, relative to its distance from the first, tells rounding from rounding.
_FLATTEST = 1e-5


@dataclass(frozen=True, eq=False)
class Plane:
    """Loss and accuracy on the plane through three networks, as measured on a grid.

    Attributes:
        x: Places of the columns of the grid along b - a, in units of distance between weights; a is at 0.
        y: Places of the rows, at right angles to it, towards c.
        places: Where a, b and c are: (3, 2), distances between them as in weight space.
        loss: Mean loss (rows × columns); NaN or infinite where the network's outputs are.
        accuracy: Mean metric likewise, or None if none was measured.
        corner_loss: Loss of the three networks themselves.
        corner_accuracy: Their accuracy.
        metric_name: What `accuracy` holds.
        samples: How many inputs each point was measured on.
        repair: How each point but the three was repaired: "reset" or None.
    """

    x: np.ndarray
    y: np.ndarray
    places: np.ndarray
    loss: np.ndarray = field(repr=False)
    accuracy: np.ndarray | None = field(repr=False)
    corner_loss: np.ndarray
    corner_accuracy: np.ndarray | None
    metric_name: str | None
    samples: int
    repair: str | None = None

    def plot(
        self,
        ax: Axes | None = None,
        quantity: str = "loss",
        highest: float | None = None,
        labels: Sequence[str] = ("a", "b", "c"),
    ) -> Axes:
        """Draw the plane as filled contours, with the three networks and the lines between them.

        Args:
            ax: Where to draw; a new figure by default.
            quantity: "loss", "accuracy" or "error" (1 - accuracy).
            highest: Values above have the colour of this one. By default the highest on the lines and inside of the
                triangle, or a tenth of what there is beyond it, if that is more. For accuracy: the lowest.
            labels: What to call the three.

        Returns:
            The axes.

        Raises:
            DataError: There is no such quantity, or it was not measured.
        """
        from .contours import draw_plane

        return draw_plane(self, ax, quantity, highest, labels)

    def to_dict(self) -> dict[str, Any]:
        """Give the whole as numbers, lists and text; NaN and infinity stay what they are."""

        def lists(values: np.ndarray | None) -> list[Any] | None:
            return None if values is None else values.tolist()

        return {
            **{name: lists(getattr(self, name)) for name in ("x", "y", "places", "loss", "accuracy")},
            "corner_loss": self.corner_loss.tolist(),
            "corner_accuracy": lists(self.corner_accuracy),
            "metric": self.metric_name,
            "samples": self.samples,
            "repair": self.repair,
        }


def plane(
    a: nn.Module,
    b: nn.Module,
    c: nn.Module,
    data: Data,
    *,
    points: int = 21,
    margin: float = 0.2,
    repair: str | None = None,
    metric: Measure | None = None,
    loss: Measure | None = None,
    repair_data: Data | None = None,
    memory: int = MEMORY,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Plane:
    """Measure the loss on the plane through three networks (Garipov et al. 2018, appendix A.2).

    With u = b - a and v = (c - a) - <c - a, u> u / |u|², the point (x, y) is the network a + x u/|u| + y v/|v|:
    distances in the picture are distances between weights. Norm and inner product are over parameters, each counted
    once; statistics of batch norm follow in proportion, and can become negative variances beyond the triangle, where
    the loss is NaN: `repair="reset"` measures them anew at each point, as the paper does.

    Args:
        a: The network at the origin.
        b: The network on the horizontal axis, of the same architecture; its units in the order of `a`.
        c: The third network; its units in the order of `a`.
        data: Batches with labels, to measure on; read once if there is no repair.
        points: Points of the grid along each side, at least 3.
        margin: How far the grid goes beyond the three networks, as a share of their extent along each side.
        repair: None or "reset". Rescaling has no aim outside of the triangle, where the share of a network is negative.
        metric: Function (outputs, targets); accuracy beside the default loss.
        loss: Such a function; cross entropy by default.
        repair_data: Batches to repair on; `data` by default.
        memory: How many bytes of data, and of what is shared between points, may be held at once.
        device: Where to compute; that of `a` by default.
        progress: Show a bar always (True), never (False), or on a terminal (None).

    Returns:
        The plane.

    Raises:
        ArchitectureError: The networks differ in a name or shape, or lie on one line; or the repair does not fit.
        DataError: `points`, `margin` or `repair` is not valid, the data is empty or cannot be read again, or labels do
            not fit.
        NotFiniteError: A network or an input holds NaN or infinity.

    Warns:
        UserWarning: The loss is NaN or infinite somewhere.

    >>> networks = [nn.Linear(2, 1, bias=False) for _ in range(3)]
    >>> for network, weight in zip(networks, ([0.0, 0.0], [2.0, 0.0], [1.0, 1.0])):
    ...     network.weight.data = torch.tensor([weight])
    >>> found = plane(*networks, torch.eye(2), points=3, margin=0, loss=lambda out, _: out.square().sum() / 2)
    >>> found.places.tolist()
    [[0.0, 0.0], [2.0, 0.0], [1.0, 1.0]]
    >>> found.loss.tolist()  # (x² + y²) / 2
    [[0.0, 0.5, 2.0], [0.125, 0.625, 2.125], [0.5, 1.0, 2.5]]
    """
    _check(points, margin)
    measures = choose_measures(loss, metric)
    method = None if repair is None else _method(a, repair)
    calibration = data if repair_data is None else repair_data
    if method is not None:
        require_repeatable(data, "with repair each point is measured in a pass of its own")
        require_repeatable(calibration, "each point is repaired in a pass of its own")
    hull = span((a, b, c), device)
    hull.model.eval()
    places = _places(hull)
    x, y = (_grid(places[:, axis], points, margin) for axis in (0, 1))
    rows = [*np.eye(3).tolist(), *(_coefficients(places, s, t) for t in y.tolist() for s in x.tolist())]
    if method is None:
        each = [measure_points(hull, rows, data, measures, memory, progress, "plane")]
    else:
        parents = [on_device(model, device) for model in (a, b, c)]
        walk = Repaired(hull, parents, method, progress, memory)
        each = walk.measure(rows, {"": data}, repair_data, measures, "plane")[""]
    means, samples = np.concatenate([totals.means() for totals in each]), each[0].samples
    _warn(means[:, 0], method, hull)
    grids = means[3:].reshape(points, points, -1)
    measured = len(measures) > 1
    return Plane(
        x,
        y,
        places,
        loss=grids[..., 0],
        accuracy=grids[..., 1] if measured else None,
        corner_loss=means[:3, 0],
        corner_accuracy=means[:3, 1] if measured else None,
        metric_name=measure_name(measures[1]) if measured else None,
        samples=samples,
        repair=method,
    )


def _check(points: int, margin: float) -> None:
    if isinstance(points, bool) or not isinstance(points, int) or points < 3:
        raise DataError(f"points is {points!r}; expected a whole number of at least 3, along each side of the grid")
    if not 0 <= margin < np.inf:
        raise DataError(f"margin is {margin!r}; expected a share of at least 0, such as 0.2")


def _method(model: nn.Module, repair: str) -> str:
    method = choose_method(model, repair)
    if method != "reset":
        raise DataError(
            f"repair={repair!r} would be {method!r} here, which aims at a mixture of what the networks show: there is "
            "none outside of the triangle, where the share of a network is negative; use repair='reset' for networks "
            "with batch norm, or repair=None"
        )
    return method


def _places(hull: Span) -> np.ndarray:
    """Give the places of the three in the orthonormal basis of their plane."""
    uu = uv = vv = 0.0
    for name in dict(hull.model.named_parameters()):
        if name in hull.values:
            a, b, c = (value.to("cpu", torch.float64).flatten() for value in hull.values[name])
            u, v = b - a, c - a
            uu, uv, vv = uu + float(u @ u), uv + float(u @ v), vv + float(v @ v)
    height = vv - uv * uv / uu if uu else 0.0
    if min(uu, vv) == 0 or height <= (_FLATTEST**2) * vv:
        raise ArchitectureError(
            f"the three networks lie on one line in weight space: |b - a| = {uu**0.5:.4g}, |c - a| = {vv**0.5:.4g}, "
            f"and c is {max(height, 0.0) ** 0.5:.4g} from the line; pass three different ones, or use connect for two"
        )
    return np.array([[0.0, 0.0], [uu**0.5, 0.0], [uv / uu**0.5, height**0.5]])


def _grid(places: np.ndarray, points: int, margin: float) -> np.ndarray:
    low, high = places.min(), places.max()
    beyond = margin * (high - low)
    return np.linspace(low - beyond, high + beyond, points)


def _coefficients(places: np.ndarray, x: float, y: float) -> list[float]:
    third = y / places[2, 1]
    second = (x - third * places[2, 0]) / places[1, 0]
    return [1 - second - third, second, third]


def _warn(loss: np.ndarray, method: str | None, hull: Span) -> None:
    lost = int((~np.isfinite(loss)).sum())
    if not lost:
        return
    normed = method is None and any(name.endswith("running_var") for name in hull.values)
    why = (
        "variances of batch norm become negative beyond the triangle; use repair='reset'"
        if normed
        else "do the outputs overflow?"
    )
    warnings.warn(f"the loss is NaN or infinite at {lost} of {len(loss)} points: {why}", UserWarning, stacklevel=3)
