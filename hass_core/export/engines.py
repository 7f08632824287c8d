"""What each serving engine expects of a draft, as read in vLLM 0.32, SGLang 0.5.23 and the official EAGLE code."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Engine:
    """One engine's rules. Consequences of breaking them are in `checks.py`."""

    name: str
    title: str
    architecture: str
    fc_bias: Literal["ignored", "required", "by_config"]
    embedding: Literal["optional", "replaced", "required"]
    rejects_extra: bool  # refuses to load a file with tensors it does not know
    tree: bool  # can verify a tree; otherwise a chain


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("vllm", "vLLM", "LlamaForCausalLM", "ignored", "optional", rejects_extra=True, tree=False),
        Engine("sglang", "SGLang", "LlamaForCausalLMEagle", "required", "replaced", rejects_extra=False, tree=True),
        Engine("eagle", "EAGLE", "LlamaForCausalLM", "by_config", "required", rejects_extra=True, tree=True),
    )
}
