"""`hass <verb>`: every part of the pipeline by hand, without a server."""

from hass_core.cli.app import main
