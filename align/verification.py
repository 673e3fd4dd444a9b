"""What a verification has measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..base.errors import SymmetryError

TOLERANCE = 1e-8


@dataclass(frozen=True)
class Verification:
    """What was measured.

    Attributes:
        error: Largest change of the outputs under a random permutation of all groups, relative to their size.
        sensitivity: Change of the outputs between two different inputs, relative to their size.
        insensitive: Groups whose units never reached the outputs, so that nothing is known about them.
        failing: Groups that change the outputs when they are permuted alone.
        tolerance: What counts as unchanged.
    """

    error: float
    sensitivity: float
    insensitive: tuple[str, ...]
    failing: tuple[str, ...]
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        """Whether the symmetry holds and the network was sensitive enough to show it."""
        return not self.failing and not self.insensitive and self.error <= self.tolerance and self.sensitive

    @property
    def sensitive(self) -> bool:
        """Whether different inputs gave clearly different outputs."""
        return self.sensitivity > 1e3 * self.tolerance

    def check(self) -> Verification:
        """Return itself if the symmetry holds.

        Raises:
            SymmetryError: It does not, or the network does not react to its input; the failing groups are named.
        """
        if self.passed:
            return self
        if self.error > self.tolerance:
            groups = f"group {', '.join(self.failing)}" if self.failing else "no single group, but all together"
            why = f"permuting {groups} changes the outputs by {self.error:.1e}"
        elif not self.sensitive:
            why = (
                f"its outputs do not depend on its input (relative change {self.sensitivity:.1e}), so nothing is proved"
            )
        else:
            why = (
                f"the outputs do not depend on group {', '.join(self.insensitive)}, so nothing is proved about it; "
                "pass example inputs that reach it (longer, larger, or more of them: also=[...])"
            )
        raise SymmetryError(f"the symmetry could not be verified in float64: {why}")

    def to_json(self) -> dict[str, Any]:
        """Give the measurements as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Verification:
        """Read what `to_json` gave.

        >>> found = Verification(1e-15, 0.5, (), ())
        >>> Verification.from_json(found.to_json()) == found
        True
        """
        error, sensitivity, tolerance = (float(value[name]) for name in ("error", "sensitivity", "tolerance"))
        return cls(error, sensitivity, tuple(value["insensitive"]), tuple(value["failing"]), tolerance)
