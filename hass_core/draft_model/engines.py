"""What each serving engine can hold of an EAGLE-1/2/HASS draft.

Read in vLLM 0.32.0 (`model_executor/models/{registry,llama_eagle,llama}.py`, `layers/rotary_embedding`), SGLang 0.5.23
(`srt/models/{llama_eagle,llama}.py`, `srt/layers/rotary_embedding/factory.py`) and SafeAILab/EAGLE (`model/cnets1.py`).
`unheld` decides exports and the family of a new draft; `table` is what docs/engines.md shows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from hass_core.draft_model.architecture import O_BIAS, QK_NORMS, QKV_BIASES, DraftArchitecture

ROPE_SETTINGS = {  # by kind: what both engines read the way transformers does; dynamic and longrope they read otherwise
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset({"factor", "beta_fast", "beta_slow", "original_max_position_embeddings"}),
}


@dataclass(frozen=True)
class Engine:
    """One engine's rules. Consequences of breaking them are in `export/checks.py`."""

    name: str
    title: str
    version: str
    architecture: str  # config.json's, of the class that an export is written for
    classes: tuple[str, ...]  # families that have an EAGLE-1 class of their own
    fc_bias: Literal["ignored", "required", "by_config"]
    embedding: Literal["optional", "replaced", "required"]
    qkv_bias: Literal["qkv_bias", "attention_bias"]  # the setting that builds these biases
    o_bias: bool
    own_head_dim: bool  # one that is not hidden_size / heads
    activations: tuple[str, ...] | None  # None = all that transformers knows
    ropes: Mapping[str, frozenset[str]]
    scaled_theta: float | None  # the only base that a scaled rope can have
    rejects_extra: bool  # refuses to load a file with tensors it does not know
    tree: bool  # can verify a tree; otherwise a chain
    eagle3: bool = True  # is exported to in the second architecture


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            name="vllm",
            title="vLLM",
            version="0.32",
            architecture="LlamaForCausalLM",
            classes=("Llama", "Llama 4", "MiniCPM", "Cohere", "Mistral", "DeepSeek"),
            fc_bias="ignored",
            embedding="optional",
            qkv_bias="qkv_bias",
            o_bias=True,
            own_head_dim=True,
            activations=("silu",),
            ropes=ROPE_SETTINGS,
            scaled_theta=None,
            rejects_extra=True,
            tree=False,
        ),
        Engine(
            name="sglang",
            title="SGLang",
            version="0.5.23",
            architecture="LlamaForCausalLMEagle",
            classes=("Llama", "Qwen2", "Mistral"),
            fc_bias="required",
            embedding="replaced",
            qkv_bias="attention_bias",  # builds all four
            o_bias=True,
            own_head_dim=True,
            activations=("silu",),
            ropes=ROPE_SETTINGS,
            scaled_theta=None,
            rejects_extra=False,
            tree=True,
        ),
        Engine(
            name="eagle",
            title="EAGLE",
            version="official code",
            architecture="LlamaForCausalLM",
            classes=("Llama",),
            fc_bias="by_config",
            embedding="required",
            qkv_bias="qkv_bias",
            o_bias=False,
            own_head_dim=False,
            activations=None,
            ropes={"default": frozenset(), "linear": frozenset({"factor"})},
            scaled_theta=10_000.0,
            rejects_extra=True,
            tree=True,
            eagle3=False,
        ),
    )
}
SERVING = (ENGINES["vllm"], ENGINES["sglang"])  # a draft that no setting says otherwise of must load in these


def unheld(engine: Engine, draft: DraftArchitecture) -> Iterator[str]:
    """What of a draft the engine has no place for: tensors by name, settings with their value."""
    if draft.own_head and not engine.eagle3:
        yield "an eagle3 draft as it is written for the others (it fuses three states of its own choice)"
    if draft.qk_norm:
        yield f"{', '.join(QK_NORMS)} (norms on queries and keys)"
    if draft.o_bias and not engine.o_bias:
        yield f"{O_BIAS} (a bias on the attention's output)"
    if engine.activations and draft.hidden_act not in engine.activations:
        yield f'hidden_act "{draft.hidden_act}" (it computes {", ".join(engine.activations)} only)'
    if not engine.own_head_dim and draft.head_dim * draft.num_attention_heads != draft.hidden_size:
        yield f"head_dim {draft.head_dim} (it takes hidden_size / heads)"
    yield from unheld_rope(engine, draft)


def unheld_rope(engine: Engine, draft: DraftArchitecture) -> Iterator[str]:
    """What of a draft's rotary embedding the engine cannot compute."""
    rope = draft.rope_parameters
    kind, settings = rope["rope_type"], rope.keys() - {"rope_type", "rope_theta"}
    if kind not in engine.ropes:
        yield f'rope_type "{kind}" (of scaled ropes it computes {", ".join(sorted(engine.ropes.keys() - {"default"}))})'
    elif other := sorted(settings - engine.ropes[kind]):
        yield f'{", ".join(other)} of rope_type "{kind}"'
    elif kind != "default" and engine.scaled_theta not in (None, rope["rope_theta"]):
        yield f"rope_theta {rope['rope_theta']:g} of a scaled rope (it computes {engine.scaled_theta:g} only)"


def table() -> str:
    """The engines' rules in Markdown."""
    rows: dict[str, list[str]] = {
        "EAGLE-1 classes": [", ".join(e.classes) for e in ENGINES.values()],
        "class an export is written for": [f"`{e.architecture}`" for e in ENGINES.values()],
        "`fc.bias`": [e.fc_bias.replace("_", " ") for e in ENGINES.values()],
        "own embedding": [e.embedding for e in ENGINES.values()],
        f"biases on q/k/v (`{QKV_BIASES[0]}` …)": [f"by `{e.qkv_bias}`" for e in ENGINES.values()],
        "bias on the attention's output": [_yes(e.o_bias) for e in ENGINES.values()],
        "norms on queries and keys": ["no" for _ in ENGINES],
        "own `head_dim`": [_yes(e.own_head_dim) for e in ENGINES.values()],
        "activations": [", ".join(e.activations or ("all",)) for e in ENGINES.values()],
        "rope types": [", ".join(e.ropes) + _only(e.scaled_theta) for e in ENGINES.values()],
        "tensors it does not know": ["refused" if e.rejects_extra else "ignored" for e in ENGINES.values()],
        "verifies": ["a tree" if e.tree else "a chain" for e in ENGINES.values()],
    }
    head = ["", *(f"{e.title} {e.version}" for e in ENGINES.values())]
    lines = [head, ["---"] * len(head), *([name, *cells] for name, cells in rows.items())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _only(theta: float | None) -> str:
    return f" (scaled ones of base {theta:,.0f} only)" if theta else ""
