"""What a judge's server says is read, or refused in one sentence."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hass_core.config import SamplingConfig
from hass_core.errors import BadInput
from hass_core.evaluation.server import Server

MODELS = '{"data": [{"id": "m"}]}'
MESSAGES = ({"role": "user", "content": "Why?"},)


@pytest.fixture
def server():
    """A server whose `models` and `answer` are the texts that it sends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send(self.server.models)

        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.send(self.server.answer)

        def send(self, text):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.models, server.answer = MODELS, "{}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("models", ["<html>", "[]", "{}", '{"data": []}', '{"data": [{"id": 5}]}', '{"data": 3}'])
def test_a_list_of_models_that_names_none_is_refused(server, models):
    server.models = models
    with pytest.raises(BadInput, match="does not answer as an OpenAI server: "):
        Server(f"http://127.0.0.1:{server.server_port}")


@pytest.mark.parametrize(
    "answer", ["<html>", "[]", "{}", '{"usage": null}', '{"usage": {"prompt_tokens": "5"}}', "NaN"]
)
def test_an_answer_without_its_counts_is_refused(server, answer):
    server.answer = answer
    with pytest.raises(BadInput, match="does not answer as an OpenAI server: "):
        Server(f"http://127.0.0.1:{server.server_port}").answer(MESSAGES, SamplingConfig(), 8)


def test_an_answer_is_timed_and_counted(server):
    server.answer = '{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}'
    found = Server(f"http://127.0.0.1:{server.server_port}").answer(MESSAGES, SamplingConfig(), 8)
    assert (found.prompt_tokens, found.new_tokens) == (5, 7)
