"""Connectivity layer by layer, of losses and of features."""
