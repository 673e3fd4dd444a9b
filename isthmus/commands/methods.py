"""What the command line knows of the methods of matching without importing them; `--help` reads this."""

from __future__ import annotations

# Per method what it needs: nothing but the networks, data, or data with labels.
NEEDS = {
    "weights": "",
    "activations": "data",
    "iterated": "data",
    "frank_wolfe": "",
    "sinkhorn": "",
    "straight_through": "labels",
    "learned": "labels",
    "auto": "labels",
}
