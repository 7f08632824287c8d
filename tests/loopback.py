"""HTTP servers on loopback for tests."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Quiet(BaseHTTPRequestHandler):
    """A handler that prints nothing and sends texts."""

    def body(self) -> bytes:
        """What came with the request."""
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def send(self, status: int, text: str = "", **headers: str) -> None:
        """A whole reply; in a header's name `_` stands for `-`."""
        data = text.encode()
        self.send_response(status)
        for name, value in {"content_length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class Roomy(ThreadingHTTPServer):
    """Lets as many connect at once as an engine does; five, as it would be else, reset the rest."""

    request_queue_size = 256


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server that runs while the block does."""
    server = Roomy(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def answering(status: int, text: str = "", asked: list[dict[str, str]] | None = None, **headers: str) -> Iterator[str]:
    """One reply to whatever is asked; the headers of every request are appended to `asked`."""

    class Handler(Quiet):
        def do_GET(self) -> None:
            self.body()
            if asked is not None:
                asked.append(dict(self.headers))
            self.send(status, text, **headers)

        do_POST = do_HEAD = do_GET

    with serving(Handler) as address:
        yield address


@contextmanager
def replying(models: str, answer: Callable[[], str]) -> Iterator[str]:
    """Texts of a test's own where an OpenAI server lists its models and answers."""

    class Handler(Quiet):
        def do_GET(self) -> None:
            self.send(200, models)

        def do_POST(self) -> None:
            self.body()
            self.send(200, answer())

    with serving(Handler) as address:
        yield address
