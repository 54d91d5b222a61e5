"""Fused operations of tensor parallelism."""
