"""Orthogonal alignment of residual streams that are read through norms only."""
