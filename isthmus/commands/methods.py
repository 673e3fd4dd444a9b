"""What the command line knows of the methods of matching and merging without importing them; `--help` reads this."""

from __future__ import annotations

# Per method of matching what it needs: nothing but the networks, data, or data with labels.
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

# How networks can be brought into one order before they are merged: pair by pair, or all at once.
ALIGN = {**NEEDS, "universe": ""}

# Ways of repair.
REPAIRS = ("auto", "reset", "rescale", "both")

# Per method of merging what it needs: the same, and a common parent where it works on what was added to one.
MERGING = {
    "mean": "",
    "greedy_soup": "labels",
    "fisher": "data",
    "regmean": "data",
    "least_squares": "data",
    "zip": "data",
    "task_arithmetic": "",
    "ties": "",
    "dare": "",
    "slerp": "",
}
BASED = ("task_arithmetic", "ties", "dare")

# What finds an order of its own.
UNALIGNED = ("zip",)
