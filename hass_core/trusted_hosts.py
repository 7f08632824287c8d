"""To which servers the operator's credentials may go.

Addresses come from settings, which a colleague may have written; keys come from the environment of the machine. A key
goes to this machine itself, and to the hosts that the operator of the machine names in HASS_TRUSTED_HOSTS: names
separated by commas, each with a port or without, `*.example.org` for all hosts below one.
"""

import ipaddress
import os
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

VARIABLE = "HASS_TRUSTED_HOSTS"


def is_trusted(url: str) -> bool:
    """Whether credentials may be sent to this address: a loopback one, or one of the hosts in HASS_TRUSTED_HOSTS."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:  # no address at all
        return False
    if not host:
        return False
    allowed = [name.strip().lower() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    forms = (host, f"{host}:{port}" if port else host)
    return is_loopback(host) or any(fnmatchcase(form, name) for form in forms for name in allowed)


def is_loopback(host: str) -> bool:
    """Whether a host name is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
