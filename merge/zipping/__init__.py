"""Merging of units within and across networks, up to a chosen layer, each network with a head of its own."""
