"""Decoding with and without a draft: trees, verification, the cycle, planning and benchmarking."""
