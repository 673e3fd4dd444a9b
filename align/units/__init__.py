"""Unit to unit: which units of two layers are the same, which combine into which, and which form clusters."""
