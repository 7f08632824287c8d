"""What requests may say and how answers look: OpenAI's chat and completion protocol, as far as one answer needs it.

`null` is the same as leaving a field out. A field that would change the answer and is not served is refused by name,
unless it asks for nothing; one that changes no answer is taken and has no effect; any other is unknown and refused.
"""

import json
import secrets
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from hass_core.config import SamplingConfig, Temperature
from hass_core.decoding.answers import Finished

MAX_STOP_STRINGS = 16


def _encodable(text: str) -> str:
    """`text`, unless half of a surrogate pair stands in it, which no tokenizer and no answer can hold."""
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("holds half of a surrogate pair, which is no character")
    return text


def _text_or_list(value: Any) -> str:
    return "text" if isinstance(value, str) else "list"


def unserved(*nothing: Any) -> AfterValidator:
    """Marks a field that this server does not serve: only values that ask for `nothing` are taken."""

    def check(value: Any) -> Any:
        if not any(type(value) is type(neutral) and value == neutral for neutral in nothing):
            raise ValueError("not supported by this server; leave it out")
        return None

    return AfterValidator(check)


Text = Annotated[str, AfterValidator(_encodable)]
StopString = Annotated[Text, Field(min_length=1, max_length=200)]
Stops = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]
Ids = Annotated[list[int], Field(min_length=1)]
Penalty = Annotated[Any, unserved(0, 0.0)]


class Body(BaseModel):
    """An object of a request: unknown fields are refused, null is the default."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)  # "yes" is no boolean, true no number

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, values: Any) -> Any:
        return {name: v for name, v in values.items() if v is not None} if isinstance(values, dict) else values


class TextPart(Body):
    """A piece of a message; only text is understood."""

    type: Literal["text"]
    text: Text


TEXT_OR_LIST = Discriminator(_text_or_list)  # so that an error tells of the form that was meant
Content = Annotated[Annotated[Text, Tag("text")] | Annotated[list[TextPart], Tag("list")], TEXT_OR_LIST]
Stop = Annotated[Annotated[StopString, Tag("text")] | Annotated[Stops, Tag("list")], TEXT_OR_LIST]
Prompt = Annotated[Annotated[Text, Field(min_length=1), Tag("text")] | Annotated[Ids, Tag("list")], TEXT_OR_LIST]


class CalledFunction(Body):
    """What an answer asked to be called: `arguments` is a JSON object, written as a string."""

    name: Annotated[Text, Field(min_length=1)]
    arguments: Text = "{}"

    @property
    def values(self) -> dict[str, Any]:
        return json.loads(self.arguments or "{}")

    @model_validator(mode="after")
    def _is_json(self) -> "CalledFunction":
        try:
            found = self.values
            json.dumps(found, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            raise ValueError("arguments: not valid JSON") from None
        if not isinstance(found, dict):
            raise ValueError("arguments: not a JSON object")
        return self


class ToolCall(Body):
    """One call of an answer in the history."""

    id: Text = ""
    type: Literal["function"] = "function"
    index: int | None = None  # streams number the calls, and clients send the message back as it came
    function: CalledFunction


class ChatMessage(Body):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "tool", "developer"]
    content: Content | None = None
    name: Text | None = None
    tool_calls: list[ToolCall] = []
    tool_call_id: Text | None = None
    reasoning_content: Text | None = None
    refusal: Annotated[Any, unserved()] = None
    audio: Annotated[Any, unserved()] = None
    function_call: Annotated[Any, unserved()] = None
    annotations: Annotated[Any, unserved([])] = None

    @model_validator(mode="after")
    def _says_something(self) -> "ChatMessage":
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls: only an assistant calls, not {self.role}")
        if self.content is None and not self.tool_calls:
            raise ValueError("content: missing or null, and there are no tool_calls")
        return self

    def plain(self) -> dict[str, Any]:
        """For the chat template."""
        parts = self.content if isinstance(self.content, list) else ()
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in parts)  # as vLLM
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": c.id, "type": c.type, "function": {"name": c.function.name, "arguments": c.function.values}}
                for c in self.tool_calls
            ]
        return message


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool = False  # padding of chunks: there is none


class GenerationRequest(Body):
    """What both kinds of request share."""

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: Temperature = 1.0
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1)  # -1 and 0 = all tokens, as vLLM and SGLang take them
    min_p: float = Field(default=0.0, ge=0, lt=1)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=10)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stop: Stop | None = None
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    frequency_penalty: Penalty = None
    presence_penalty: Penalty = None
    logit_bias: Annotated[Any, unserved({})] = None
    user: Any = None  # changes no answer, as the last ones of ChatRequest

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self) -> SamplingConfig:
        """The decoder's settings; without a seed every request draws anew."""
        return SamplingConfig(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=secrets.randbits(31) if self.seed is None else self.seed,
        )


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions"""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    tools: Annotated[Any, unserved([])] = None
    tool_choice: Annotated[Any, unserved("none", "auto")] = None
    functions: Annotated[Any, unserved([])] = None
    function_call: Annotated[Any, unserved("none", "auto")] = None
    response_format: Annotated[Any, unserved({"type": "text"})] = None
    logprobs: Annotated[Any, unserved(False)] = None
    top_logprobs: Annotated[Any, unserved(0)] = None
    modalities: Annotated[Any, unserved(["text"])] = None
    audio: Annotated[Any, unserved()] = None
    reasoning_effort: Annotated[Any, unserved("none")] = None
    verbosity: Annotated[Any, unserved()] = None
    web_search_options: Annotated[Any, unserved()] = None
    moderation: Annotated[Any, unserved()] = None

    metadata: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        return self


class CompletionRequest(GenerationRequest):
    """POST /v1/completions"""

    prompt: Prompt

    best_of: Annotated[Any, unserved(1)] = None
    echo: Annotated[Any, unserved(False)] = None
    logprobs: Annotated[Any, unserved()] = None
    suffix: Annotated[Any, unserved("")] = None


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


def error_body(message: str, kind: str, field: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients expect it."""
    readable = message.encode(errors="backslashreplace").decode()  # what a client sent may be no text
    return {"error": {"message": readable, "type": kind, "param": field, "code": None}}
