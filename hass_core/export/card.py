"""The model card beside an exported draft: front matter for model hubs, and the command that serves it."""

import json
import re
import shlex
from typing import Any

from huggingface_hub import ModelCardData

from hass_core.config import TreeConfig
from hass_core.draft_model.eagle3 import is_eagle3
from hass_core.draft_model.engines import Engine
from hass_core.target_model.licence import NOT_STATED

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

WHEN_SAMPLING = {
    "vllm": """At temperature 0 the gain is largest. When requests sample, vLLM by default still drafts the likeliest
tokens and accepts each with its probability. `"draft_sample_method": "probabilistic"` in the speculative config lets it
sample drafts, and `"rejection_sample_method": "block"` beside it accepts more of them. In 0.25.1 the default runner is
biased with sampled drafts; the slower V1 runner (VLLM_USE_V2_MODEL_RUNNER=0) is not, and has no block verification.
Expect nothing at temperature 1: a HASS draft for SmolLM2-135M made 0.25.1 1.95 × as fast at temperature 0 and 0.95 × at
1, by its defaults, one request at a time on an H200, a chain of 3; sampled drafts were accepted more often (τ 1.98 for
1.52) and yet 0.79 × as fast.""",
    "sglang": """At temperature 0 the gain is largest. When requests sample, SGLang by default drafts the likeliest
tokens. With `--speculative-eagle-topk 1` on CUDA, `--speculative-use-rejection-sampling` lets it sample drafts, and
`--speculative-use-block-verification` accepts more of them; a trimmed draft vocabulary is refused there. On a CPU it
verifies greedily whatever the temperature. Not measured: time it before you serve at temperature 1.""",
    "eagle": """At temperature 0 the gain is largest. The likeliest tokens are drafted at any temperature, and the fewer
are accepted the higher it is: time it before you serve at temperature 1.""",
}
"""What to expect of each engine at temperature > 0; `hass serve` drafts with the target's own noise instead."""


def method_of(config: dict[str, Any]) -> str:
    """How engines call the drafting of such a draft, from its config.json: eagle or eagle3."""
    return "eagle3" if is_eagle3(config, {}) else "eagle"


def serving_command(
    engine: Engine,
    tree: TreeConfig,
    target_name: str,
    draft: str = "THIS_FOLDER",
    token_map: bool = False,
    method: str = "eagle",
) -> str:
    """A command to paste into a shell, with the tree the planner chose.

    vLLM verifies a chain: num_speculative_tokens is its length. SGLang's num-draft-tokens counts the root; with
    `token_map` it drafts among the tokens of the exported list only. `method`: eagle or eagle3.
    """
    target_name = shlex.quote(target_name)
    if engine.name == "vllm":
        settings = {"method": method, "model": draft, "num_speculative_tokens": tree.depth}
        return f"vllm serve {target_name} --speculative-config {shlex.quote(json.dumps(settings))}"
    mapped = f" --speculative-token-map {shlex.quote(draft + '/token_map.pt')}" if token_map else ""
    draft = shlex.quote(draft)
    if engine.name == "sglang":
        top_k = 1 if tree.kind == "chain" else tree.top_k
        nodes = tree.depth + 1 if tree.kind == "chain" else tree.nodes
        return (
            f"python -m sglang.launch_server --model-path {target_name} --speculative-algorithm {method.upper()} "
            f"--speculative-draft-model-path {draft} --speculative-num-steps {tree.depth} "
            f"--speculative-eagle-topk {top_k} --speculative-num-draft-tokens {nodes}{mapped}"
        )
    return (
        f"python -m eagle.evaluation.gen_ea_answer_llama3chat --base-model-path {target_name} --ea-model-path {draft}"
    )


def model_card(
    config: dict[str, Any],
    engine: Engine,
    tree: TreeConfig,
    target_name: str,
    licence: str,
    token_map: bool = False,
) -> str:
    """Markdown: what the draft is, which target it serves, how to serve it."""
    made = config.get("hass", {})
    facts = "\n".join(f"| {key} | {cell(value)} |" for key, value in sorted(made.items()))
    method, size = method_of(config), config.get("draft_vocab_size")
    among = "all of its tokens" if size in (None, config.get("vocab_size")) else f"{size} of its tokens"
    among = "the tokens of `token_map.pt`" if token_map else among
    what = "A HASS draft"
    if method == "eagle3":
        what = "A draft in EAGLE-3's architecture (arXiv 2503.01840), trained by HASS"
    return f"""---
{front_matter(made, engine, target_name, licence, method)}---

# Draft model for {cell(made.get("target", target_name))}

{what} (arXiv 2408.15766) in the layout of {engine.title} {engine.version}: one decoder layer that reads the
target's hidden states and token embeddings and guesses the next tokens. The target verifies every guess, so its output
does not change.

```
{serving_command(engine, tree, target_name, token_map=token_map, method=method)}
```

{WHEN_SAMPLING[engine.name]}

| | |
|---|---|
{facts}

It serves only the target with this fingerprint, chat template and vocabulary, and drafts among {among}.
Licence of the target, which applies to the draft too: {cell(licence)}.
"""


def front_matter(made: dict[str, Any], engine: Engine, target_name: str, licence: str, method: str = "eagle") -> str:
    """The card's metadata in YAML, as model hubs read it. A base model is named as the hub names it, where known."""
    named = target_name if HUB_ID.fullmatch(target_name) else made.get("target", target_name)
    # a licence that no hub lists is `other` and named beside it
    known = re.fullmatch(r"[a-z0-9.-]+", licence) is not None
    about = ModelCardData(
        base_model=str(named),
        library_name=engine.name,
        license=licence if known else "unknown" if licence == NOT_STATED else "other",
        license_name=None if known or licence == NOT_STATED else licence,
        pipeline_tag="text-generation",
        tags=["speculative-decoding", "draft-model", method, "hass", engine.name],
    )
    return about.to_yaml() + "\n"


def cell(value: Any) -> str:
    """A value inside a Markdown table, its markup made harmless."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
