"""Class moments that the processes of `torch.distributed` filled with parts of a data set, joined in every process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..distributed import _meet
from .class_moments import ClassMoments, add_product

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def all_reduce_class_moments(moments: ClassMoments, group: ProcessGroup | None = None) -> ClassMoments:
    """Join the class moments of all processes, see `ClassMoments.all_reduce`.

    The common means are averages of means relative to one sample; each process moves its scatter to them by
    Σ_k n_k δ_k δ_kᵀ (Chan, Golub & LeVeque 1983), and these are summed: no two large sums are subtracted.
    """
    own = moments._shift
    # Units are known where a batch was seen only; the others allocate alike.
    peers = _meet(
        "class moments", moments._shared(), {"units": moments.units}, None if own is None else own.device, group
    )
    if peers.lead is None:
        return moments
    with torch.inference_mode(False), torch.no_grad():
        home = peers.device if own is None else own.device
        if own is None:
            moments._allocate(torch.zeros(peers.states[peers.lead]["units"], dtype=torch.float64, device=home))
        assert moments._shift is not None
        # A copy: what arrives is written over what was sent.
        shift = peers.broadcast(moments._shift.clone(), peers.lead).to(home)
        relative = moments._means + (moments._shift - shift)
        counts = moments._counts.to(torch.float64)
        total = counts.clone()
        peers.sum(total)
        means = relative * (counts / total.clamp(min=1))[:, None]
        peers.sum(means)
        delta = relative - means
        moments._squares += counts * torch.linalg.vecdot(delta, delta)
        peers.sum(moments._squares)
        if moments._products is not None:
            add_product(moments._products, delta * counts.sqrt()[:, None])
            peers.sum(moments._products)
        moments._shift, moments._means, moments._counts = shift, means, total.to(torch.int64)
    return moments
