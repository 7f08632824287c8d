"""Servers started for a measurement: reached when they answer, told of when they do not, gone afterwards."""

import shlex
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from hass_core.errors import BadInput
from hass_core.evaluation.server import Server
from hass_core.evaluation.server_process import serving

SCRIPT = """
import json, os, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # as engines have workers
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        told = {name: value for name, value in os.environ.items() if name.startswith("HASS_")}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": "tiny", **told}]}).encode())
    def log_message(self, *given):
        pass
HTTPServer(("127.0.0.1", int(os.environ["HASS_PORT"])), Handler).serve_forever()
"""


def test_the_command_is_told_what_to_serve_and_ends_with_its_children(tmp_path):
    (tmp_path / "serve.py").write_text(SCRIPT)
    command = f"exec {shlex.quote(sys.executable)} {tmp_path}/serve.py"
    before = set(psutil.Process().children(recursive=True))
    with serving(command, "/targets/tiny", Path("/drafts/7"), 3) as url:
        told = httpx.get(f"{url}/v1/models").json()["data"][0]
        assert (told["HASS_TARGET"], told["HASS_DRAFT"], told["HASS_DEPTH"]) == ("/targets/tiny", "/drafts/7", "3")
        assert url.endswith(f":{told['HASS_PORT']}")
        assert Server(url).url == url
        started = set(psutil.Process().children(recursive=True)) - before
        assert len(started) == 2
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []


def test_a_server_that_ends_is_told_with_what_it_said(tmp_path):
    command = "echo 'no memory for the draft' >&2; exit 3"
    with pytest.raises(BadInput, match=r"ended with 3 before it served .*; it said: no memory for the draft"):  # noqa: SIM117
        with serving(command, "t", tmp_path, 3):
            pytest.fail("it does not serve")


def test_of_many_lines_the_errors_are_told_and_the_cause_first(tmp_path):
    said = "ValueError: too little memory\\n  File x, line 3\\nRuntimeError: the engine did not start, see above\\n"
    command = f"printf '{said}' >&2; seq 4000 >&2; exit 1"
    told = "it said: ValueError: too little memory / RuntimeError: the engine did not start, see above$"
    with pytest.raises(BadInput, match=told):  # noqa: SIM117
        with serving(command, "t", tmp_path, 3):
            pytest.fail("it does not serve")
