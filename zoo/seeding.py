"""Random numbers of a seed, with the caller's random state left alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int | None, device: torch.device | str | None = None) -> Iterator[None]:
    """Draw from a seed inside the block; the state of the caller's generators is restored after it.

    Args:
        seed: The seed; None leaves the generators as they are, and draws advance them.
        device: A device whose generator is seeded beside that of the CPU; None for torch's default device.

    >>> with seeded(0):
    ...     first = torch.rand(2)
    >>> with seeded(0):
    ...     second = torch.rand(2)
    >>> torch.equal(first, second)
    True
    """
    if seed is None:
        yield
        return
    device = torch.get_default_device() if device is None else torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # torch.manual_seed would reseed every accelerator of the caller, not only the one that is restored.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
