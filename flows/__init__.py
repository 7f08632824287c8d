"""Prefect flows. Each is a program too: `python -m flows.NAME [PRESET] [section.key=value …]`.

As a program its arguments are checked here, before its module is even read: that loads torch and takes ten seconds.
"""

import sys

from flows.collector import importing

importing()
if sys.argv[:1] == ["-m"]:  # so Python says while it looks for the program's module
    _, _, _name = next((word for word in sys.orig_argv if word.startswith("flows.")), "").partition(".")
    if _name:
        from flows.arguments import check

        check(_name, sys.argv[1:])
