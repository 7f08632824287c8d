"""What requests may say and how answers look: OpenAI's chat and completion protocol, as far as one answer needs it."""

import secrets
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hass_core.config import SamplingConfig
from hass_core.decoding.answers import Finished

MAX_STOP_STRINGS = 16
StopString = Annotated[str, Field(min_length=1, max_length=200)]


class TextPart(BaseModel):
    """A piece of a message; only text is understood."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "tool", "developer"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """For the chat template."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool = False


class GenerationRequest(BaseModel):
    """What both kinds of request share. Fields this server does not know are ignored."""

    model_config = ConfigDict(extra="ignore")
    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=5)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, lt=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self) -> SamplingConfig:
        """The decoder's settings; without a seed every request draws anew."""
        return SamplingConfig(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=secrets.randbits(31) if self.seed is None else self.seed,
        )


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions"""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        return self


class CompletionRequest(GenerationRequest):
    """POST /v1/completions"""

    prompt: str | list[int] = Field(min_length=1)


class Answered:
    """Builds the JSON of one answer, whole or in chunks."""

    def __init__(self, kind: Literal["chat", "text"], model: str, prompt_tokens: int):
        self._chat = kind == "chat"
        self._prompt_tokens = prompt_tokens
        self._head = {
            "id": ("chatcmpl-" if self._chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, finished: Finished, new_tokens: int) -> dict[str, Any]:
        """The answer in one piece."""
        content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        body = self._body("chat.completion" if self._chat else "text_completion", content, finished)
        return body | {"usage": self._usage(new_tokens)}

    def chunk(self, text: str, finished: Finished | None, first: bool) -> dict[str, Any]:
        """A piece of a streamed answer."""
        role = {"role": "assistant"} if first else {}
        content = {"delta": role | {"content": text}} if self._chat else {"text": text}
        return self._body("chat.completion.chunk" if self._chat else "text_completion", content, finished)

    def usage_chunk(self, new_tokens: int) -> dict[str, Any]:
        """The last chunk, when the client asked for the counts."""
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": [], "usage": self._usage(new_tokens)}

    def _body(self, kind: str, content: Mapping[str, Any], finished: Finished | None) -> dict[str, Any]:
        reason = None if finished is None else "length" if finished == "length" else "stop"
        return {**self._head, "object": kind, "choices": [{"index": 0, **content, "finish_reason": reason}]}

    def _usage(self, new_tokens: int) -> dict[str, int]:
        total = self._prompt_tokens + new_tokens
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": new_tokens, "total_tokens": total}


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients expect it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
