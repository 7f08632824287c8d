"""HASS: train, measure and export draft models for speculative decoding.

The science of the project. Nothing here knows about workflow engines or experiment trackers:
every function works from a notebook or on a bare GPU machine.
"""

__version__ = "0.1.0"
