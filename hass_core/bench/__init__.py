"""Benchmarks: what the product does, timed. Nothing of the product imports this package."""
