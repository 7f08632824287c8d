"""Prefect flows: each composes tasks, holds no logic of its own, and takes one typed parameter."""
