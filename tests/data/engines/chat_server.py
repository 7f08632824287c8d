"""A small chat server for tests: `python chat_server.py [sick] [MODEL]` fails some requests on purpose, `sick` all.

Every question's first request is answered 429, with Retry-After, when it contains "busy"; 500 when it contains
"broken"; always 400 when it contains "refuse"; always 503 when it contains "down".
"""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

seen: set[str] = set()
state = {"now": 0, "most": 0, "models": 0, "answered": 0}
sick = "sick" in sys.argv[1:]
served = next((word for word in sys.argv[1:] if word != "sick"), "tiny")
lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path.startswith("/warming"):
            state["models"] += 1
            return self.reply(200, "<html>warming up</html>" if state["models"] == 1 else {"data": [{"id": "tiny"}]})
        if self.path.startswith("/closed"):
            return self.reply(401, {"error": {"message": "no key, no models"}})
        if self.path.startswith("/two"):
            return self.reply(200, {"data": [{"id": "tiny"}, {"id": "other"}]})
        return self.reply(200, state if self.path.endswith("/state") else {"data": [{"id": served}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with lock:
            first = question not in seen
            seen.add(question)
            state["now"] += 1
            state["most"] = max(state["most"], state["now"])
        threading.Event().wait(0.02)
        with lock:
            state["now"] -= 1
        status = 503 if sick else self.fault(question, first)
        state["answered"] += status == 200
        if "dripping" in question:
            return self.drip()
        if "moved" in question:
            return self.reply(307, "", {"Location": "http://evil.example/v1"})
        if status != 200:
            return self.reply(status, {"error": "on purpose"}, {"Retry-After": "0.01"})
        if odd := self.oddity(question, first):
            return self.reply(200, odd)
        if refusal := self.refusal(question, body):
            return self.reply(400, refusal)
        return self.reply(200, {"choices": [self.choice(question, body)]})

    def drip(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        for _ in range(100):
            threading.Event().wait(0.05)
            self.wfile.write(b" ")

    @staticmethod
    def refusal(question: str, body: dict):
        if "max_tokens" in body and "new style" in question:
            return {"error": {"message": "use 'max_completion_tokens' instead of 'max_tokens'"}}
        if "seed" in body and "seedless" in question:
            return {"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}
        return None

    def choice(self, question: str, body: dict):
        finished = "long" not in question
        text = f"You said: {question} (T={body['temperature']})"
        if "key?" in question:
            text = f"key {self.headers.get('Authorization')}"
        if "fields?" in question:
            text = " ".join(sorted(body))
        content = [{"type": "text", "text": text}] if "parts" in question else text
        if "call" in question:
            content = None
        message = {"role": "assistant", "content": content}
        if "call" in question:
            message["tool_calls"] = [{"function": {"name": "f", "arguments": "{}"}}]
        ids = {"token_ids": [int(word) for word in question.split() if word.isdecimal()]} if "ids" in question else {}
        return {"message": message, "finish_reason": "stop" if finished else "length"} | ids

    @staticmethod
    def oddity(question: str, first: bool):
        odd = {
            "html": "<html><body>warming up</body></html>",
            "empty": {"choices": []},
            "object": {"error": {"message": "the provider failed"}},
        }
        return next((odd[word] for word in odd if word in question and (first or "always" in question)), None)

    @staticmethod
    def fault(question: str, first: bool) -> int:
        always = {"refuse": 400, "down": 503}
        once = {"busy": 429, "broken": 500}
        for word, status in (always | (once if first else {})).items():
            if word in question:
                return status
        return 200

    def reply(self, status, content, headers=None):
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    sys.stdout.flush()
    server.serve_forever()
