"""Drafts that come with the package, as data: a folder per target, with its card; see `draft_model/shipped.py`."""
