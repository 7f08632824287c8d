"""A small server that answers as vLLM does with a draft: the chat endpoint, and the counters on its metrics page."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.loopback import Quiet, serving

TRAFFIC = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="tiny"}} 0.0
# HELP vllm:request_success_total Count of successfully processed requests.
# TYPE vllm:request_success_total counter
vllm:request_success_total{{engine="0",finished_reason="stop",model_name="tiny"}} 0.0
vllm:request_success_total{{engine="0",finished_reason="length",model_name="tiny"}} {requests:.1f}
# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{{engine="0",model_name="tiny"}} {generated:.1f}
"""
DRAFTS = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{{engine="0",model_name="tiny"}} {drafts:.1f}
# HELP vllm:spec_decode_num_draft_tokens_total Number of draft tokens.
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{{engine="0",model_name="tiny"}} {tokens:.1f}
# HELP vllm:spec_decode_num_accepted_tokens_total Number of accepted tokens.
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{{engine="0",model_name="tiny"}} {accepted:.1f}
# HELP vllm:spec_decode_num_accepted_tokens_per_pos_total Accepted tokens per draft position.
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",model_name="tiny",position="0"}} {first:.1f}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",model_name="tiny",position="1"}} {second:.1f}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",model_name="tiny",position="2"}} 0.0
"""
DRAFTS_PER_ANSWER = 100
Answering = Callable[[dict[str, Any]], tuple[int, list[int]]]


class Engine:
    """Its counters; `shares` of the drafts are accepted at the first and second position, none at the third.

    Without shares it has no draft. `answering` makes prompt length and token ids of a request, else there are none.
    """

    def __init__(self, shares: tuple[float, float] | None, seconds: float = 0.0, answering: Answering | None = None):
        self.shares, self.seconds, self.answering = shares, seconds, answering
        self.drafts, self.accepted = 0.0, [0.0, 0.0]
        self.requests, self.generated = 0, 0
        self.asked: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.url = ""

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Make an answer, and count it."""
        time.sleep(self.seconds)
        with self.lock:
            prompt, ids = self.answering(asked) if self.answering else (5, [0] * asked["max_tokens"])
            self.asked.append(asked)
            self.serve()
            self.requests, self.generated = self.requests + 1, self.generated + len(ids)
        choice = {"message": {"content": "Yes."}}
        if asked.get("return_token_ids") and self.answering:
            choice["token_ids"] = ids
        return {"choices": [choice], "usage": {"prompt_tokens": prompt, "completion_tokens": len(ids)}}

    def serve(self, drafts: float = DRAFTS_PER_ANSWER) -> None:
        """Count as if so many drafts had been verified."""
        if self.shares is None:
            return
        self.drafts += drafts
        self.accepted = [old + drafts * share for old, share in zip(self.accepted, self.shares, strict=True)]

    def page(self) -> str:
        first, second = self.accepted
        traffic = TRAFFIC.format(requests=self.requests, generated=self.generated)
        if self.shares is None:
            return traffic
        return traffic + DRAFTS.format(
            drafts=self.drafts, tokens=3 * self.drafts, accepted=first + second, first=first, second=second
        )


@contextmanager
def running(engine: Engine) -> Iterator[Engine]:
    """Serve on a free port of the loopback."""

    class Handler(Quiet):
        def do_GET(self) -> None:
            self.send(200, engine.page() if self.path == "/metrics" else json.dumps({"data": [{"id": "tiny"}]}))

        def do_POST(self) -> None:
            self.send(200, json.dumps(engine.answer(json.loads(self.body()))))

    with serving(Handler) as engine.url:
        yield engine
