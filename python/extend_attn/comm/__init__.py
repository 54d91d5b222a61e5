"""Collectives of tensor parallelism. Importing this package imports no torch."""
