"""Whether two networks find the same subclasses: clusters matched to clusters, beside what shuffled samples give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...base.errors import DataError
from ...base.plain import plain
from .finding import Subclasses
from .tables import adjusted_rand, contingency, matched

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class SubclassMatching:
    """Clusters of one network matched to those of another on the same samples, one to one inside each class.

    Attributes:
        partner: (clusters of a,) int64, the cluster of b; -1 for none.
        overlap: Share of the samples that are in a cluster and in its partner.
        ari: Mean over the samples of the adjusted Rand index inside each class: 1 if equal, 0 by chance.
        class_overlap: (classes,) float64, `overlap` inside each class.
        class_ari: (classes,) float64, adjusted Rand index inside each class.
        null_overlap: Mean `overlap` when the samples of each class are shuffled; matching makes it larger than chance.
        null_ari: Mean `ari` of the same.
        p_value: (1 + shuffles whose overlap is at least as large) / (1 + shuffles); Phipson & Smyth (2010).
        table: (clusters of a x clusters of b) int64, samples of each.
        names: (classes,) int64, the classes.
        classes_a: (clusters of a,) int64, the class of each cluster of a.
        shuffles: How many.
    """

    partner: Tensor
    overlap: float
    ari: float
    class_overlap: Tensor
    class_ari: Tensor
    null_overlap: float
    null_ari: float
    p_value: float
    table: Tensor
    names: Tensor
    classes_a: Tensor
    shuffles: int

    def __repr__(self) -> str:
        return (
            f"SubclassMatching(overlap {self.overlap:.3f}, by chance {self.null_overlap:.3f}, p {self.p_value:.3g}; "
            f"ARI inside classes {self.ari:.3f})"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the table of the clusters of a and of b, partners in one order, each row coloured by its shares.

        Args:
            ax: Where to draw. Default: a new figure.

        Returns:
            The axes.
        """
        from .pictures import matrix

        partners = self.partner[self.partner >= 0].tolist()
        order = partners + [column for column in range(self.table.shape[1]) if column not in partners]
        rows = [f"class {name}, cluster {place}" for place, name in enumerate(self.classes_a.tolist())]
        labels = ("clusters of a", "clusters of b")
        return matrix(ax, self.table[:, order], rows, [str(column) for column in order], labels, self.classes_a)

    def to_dict(self) -> dict[str, Any]:
        """Give everything as plain lists and numbers for JSON."""
        return plain(dict(vars(self)))


def match_subclasses(a: Subclasses, b: Subclasses, *, shuffles: int = 200, seed: int = 0) -> SubclassMatching:
    """Match the clusters that two networks give the same samples.

    Args:
        a: Clusters of the one network.
        b: Clusters of the other network, of the same samples in the same order.
        shuffles: How often the samples of b are shuffled inside each class.
        seed: Of the shuffles.

    Raises:
        DataError: The samples or their classes differ, or there is no shuffle.

    >>> from isthmus.align.subclasses import subclasses
    >>> generator = torch.Generator().manual_seed(0)
    >>> fine = torch.arange(80) % 4
    >>> x, y = 10 * torch.eye(4)[fine] + torch.randn(2, 80, 4, generator=generator)
    >>> a, b = (subclasses(z, fine // 2, count=2, project="pca") for z in (x, y))
    >>> found = match_subclasses(a, b)
    >>> found.overlap, found.ari, round(found.null_overlap, 2), round(found.p_value, 3)
    (1.0, 1.0, 0.56, 0.005)
    """
    _check(a, b, shuffles)
    generator = torch.Generator().manual_seed(seed)
    table = contingency(a.labels, b.labels, len(a.classes), len(b.classes))
    partner = torch.full((len(a.classes),), -1)
    each, null = [], []
    for name in a.names.tolist():
        rows, columns = ((side.classes == name).nonzero().flatten() for side in (a, b))
        taken, met = matched(table[rows][:, columns])
        # A match without a sample is none.
        partner[rows[taken]] = torch.where(table[rows[taken], columns[met]] > 0, columns[met], -1)
        own = a.coarse == name
        left, right = (_local(side.labels[own], members) for side, members in ((a, rows), (b, columns)))
        shape = len(rows) + 1, len(columns) + 1
        each.append(_scores(contingency(left, right, *shape)))
        orders = (torch.randperm(len(right), generator=generator) for _ in range(shuffles))
        null.append([_scores(contingency(left, right[order], *shape)) for order in orders])
    return _result(a, partner, table, torch.tensor(each, dtype=torch.float64), torch.tensor(null, dtype=torch.float64))


def _check(a: Subclasses, b: Subclasses, shuffles: int) -> None:
    if not torch.equal(a.coarse, b.coarse):
        raise DataError(
            f"a has {len(a.coarse)} samples, b has {len(b.coarse)}, and their classes are not the same; give the same "
            "samples in the same order"
        )
    if shuffles < 1:
        raise DataError(f"shuffles is {shuffles}; a null needs at least one, 200 say")


def _result(a: Subclasses, partner: Tensor, table: Tensor, each: Tensor, null: Tensor) -> SubclassMatching:
    """Average over the samples: `each` is (classes x 2), `null` (classes x shuffles x 2), of overlaps and indices."""
    sizes = torch.bincount(a.coarse)[a.names].double()
    shares = sizes / sizes.sum()
    overlap, ari = (shares @ each).tolist()
    chance = torch.einsum("c,csk->sk", shares, null)
    shuffles = len(chance)
    # A shuffle that changes nothing must count as alike, whatever its rounding.
    p_value = (1 + int((chance[:, 0] >= overlap - 1e-12).sum())) / (1 + shuffles)
    null_overlap, null_ari = chance.mean(0).tolist()
    return SubclassMatching(
        partner, overlap, ari, each[:, 0], each[:, 1], null_overlap, null_ari, p_value, table, a.names, a.classes,
        shuffles,
    )  # fmt: skip


def _local(labels: Tensor, members: Tensor) -> Tensor:
    # The clusters of a class have successive numbers; samples in none come after the last.
    return torch.where(labels >= 0, labels - members[0], len(members))


def _scores(part: Tensor) -> tuple[float, float]:
    """Give overlap and adjusted Rand index of the table of a class, whose last row and column are of no cluster."""
    rows, columns = matched(part[:-1, :-1])
    return float(part[rows, columns].sum() / part.sum()), adjusted_rand(part)
