"""The conversations of the training tests."""

from tests.training.conftest import talks

__all__ = ["talks"]
