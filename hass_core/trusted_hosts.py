"""To which servers the operator's credentials may go.

Addresses come from settings, which a colleague may have written; keys come from the environment of the machine. A key
goes to this machine itself, and to the hosts that the operator of the machine names in HASS_TRUSTED_HOSTS: names
separated by commas, each with a port or without, `*.example.org` for all hosts below one.
"""

import ipaddress
import os
import re
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

VARIABLE = "HASS_TRUSTED_HOSTS"
PORTS = {"http": 80, "https": 443}
# What else stands there, programs read differently: in http://evil.example\\@localhost some see one, some the other
CLEAR = re.compile(r"(?:[^@\\]*@)?(?:[\w.-]+|\[[0-9A-Fa-f:.]+\])(?::\d*)?")


def is_trusted(url: str) -> bool:
    """Whether credentials may be sent to this address: a loopback one, or one of the hosts in HASS_TRUSTED_HOSTS."""
    try:
        parts = urlsplit(url)
        host, port = _plain(parts.hostname or ""), parts.port or PORTS.get(parts.scheme)
    except ValueError:  # no address at all
        return False
    if not host or not url.isprintable() or " " in url or not CLEAR.fullmatch(parts.netloc):
        return False
    return is_loopback(host) or any(_names(name, host, port) for name in os.environ.get(VARIABLE, "").split(","))


def is_loopback(host: str) -> bool:
    """Whether a host name is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _names(trusted: str, host: str, port: int | None) -> bool:
    """Whether an entry of HASS_TRUSTED_HOSTS names this host, and this port where it has one."""
    named = trusted.strip()
    try:
        whole = ipaddress.ip_address(named)  # of version 6 without brackets: its colons lead to no port
    except ValueError:
        pass
    else:
        return str(whole) == host
    try:
        parts = urlsplit(f"//{named}")
        return fnmatchcase(host, _plain(parts.hostname or "")) and parts.port in (None, port) and not parts.path
    except ValueError:
        return False


def _plain(host: str) -> str:
    """A host's name in one form: small letters, no dot at the end, addresses shortened."""
    host = host.lower().rstrip(".")
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host
