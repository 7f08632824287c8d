"""The model card beside an exported draft: front matter for model hubs, and the command that serves it."""

import json
import re
import shlex
from typing import Any

from huggingface_hub import ModelCardData

from hass_core.config import TreeConfig
from hass_core.draft_model.engines import Engine
from hass_core.target_model.licence import NOT_STATED

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def serving_command(
    engine: Engine, tree: TreeConfig, target_name: str, draft: str = "THIS_FOLDER", token_map: bool = False
) -> str:
    """A command to paste into a shell, with the tree the planner chose.

    vLLM verifies a chain: num_speculative_tokens is its length. SGLang's num-draft-tokens counts the root; with
    `token_map` it drafts among the tokens of the exported list only.
    """
    target_name = shlex.quote(target_name)
    if engine.name == "vllm":
        settings = {"method": "eagle", "model": draft, "num_speculative_tokens": tree.depth}
        return f"vllm serve {target_name} --speculative-config {shlex.quote(json.dumps(settings))}"
    mapped = f" --speculative-token-map {shlex.quote(draft + '/token_map.pt')}" if token_map else ""
    draft = shlex.quote(draft)
    if engine.name == "sglang":
        top_k = 1 if tree.kind == "chain" else tree.top_k
        nodes = tree.depth + 1 if tree.kind == "chain" else tree.nodes
        return (
            f"python -m sglang.launch_server --model-path {target_name} --speculative-algorithm EAGLE "
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
    among = "the tokens of `token_map.pt`" if token_map else "all of its tokens"
    return f"""---
{front_matter(made, engine, target_name, licence)}---

# Draft model for {cell(made.get("target", target_name))}

A HASS draft (arXiv 2408.15766) in the layout of {engine.title} {engine.version}: one decoder layer that reads the
target's hidden states and token embeddings and guesses the next tokens. The target verifies every guess, so its output
does not change.

```
{serving_command(engine, tree, target_name, token_map=token_map)}
```

| | |
|---|---|
{facts}

It serves only the target with this fingerprint, chat template and vocabulary, and drafts among {among}.
Licence of the target, which applies to the draft too: {cell(licence)}.
"""


def front_matter(made: dict[str, Any], engine: Engine, target_name: str, licence: str) -> str:
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
        tags=["speculative-decoding", "draft-model", "eagle", "hass", engine.name],
    )
    return about.to_yaml() + "\n"


def cell(value: Any) -> str:
    """A value inside a Markdown table, its markup made harmless."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
