"""Averages of networks: weighted, by Fisher information, by regression, by least squares, soups."""
