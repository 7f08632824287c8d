"""`python -m hass_core.cli` is `hass`."""

from hass_core.cli import main

main()
