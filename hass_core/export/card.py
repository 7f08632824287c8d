"""The model card beside an exported draft, with the commands that serve it."""

import json
import shlex
from typing import Any

from hass_core.config import TreeConfig
from hass_core.export.engines import Engine


def serving_command(engine: Engine, tree: TreeConfig, target_name: str, draft: str = "THIS_FOLDER") -> str:
    """A command to paste into a shell, with the tree the planner chose.

    vLLM verifies a chain: num_speculative_tokens is its length. SGLang's num-draft-tokens counts the root.
    """
    target_name = shlex.quote(target_name)
    if engine.name == "vllm":
        settings = {"method": "eagle", "model": draft, "num_speculative_tokens": tree.depth}
        return f"vllm serve {target_name} --speculative-config {shlex.quote(json.dumps(settings))}"
    draft = shlex.quote(draft)
    if engine.name == "sglang":
        top_k = 1 if tree.kind == "chain" else tree.top_k
        nodes = tree.depth + 1 if tree.kind == "chain" else tree.nodes
        return (
            f"python -m sglang.launch_server --model-path {target_name} --speculative-algorithm EAGLE "
            f"--speculative-draft-model-path {draft} --speculative-num-steps {tree.depth} "
            f"--speculative-eagle-topk {top_k} --speculative-num-draft-tokens {nodes}"
        )
    return (
        f"python -m eagle.evaluation.gen_ea_answer_llama3chat --base-model-path {target_name} --ea-model-path {draft}"
    )


def model_card(config: dict[str, Any], engine: Engine, tree: TreeConfig, target_name: str, licence: str) -> str:
    """Markdown: what the draft is, which target it serves, how to serve it."""
    made = config.get("hass", {})
    facts = "\n".join(f"| {key} | {cell(value)} |" for key, value in sorted(made.items()))
    return f"""# Draft model for {cell(made.get("target", target_name))}

A HASS draft (arXiv 2408.15766) in the layout of {engine.title}: one decoder layer that reads the target's hidden states
and token embeddings and guesses the next tokens. The target verifies every guess, so its output does not change.

```
{serving_command(engine, tree, target_name)}
```

| | |
|---|---|
{facts}

It serves only the target with this fingerprint, chat template and vocabulary, and drafts among all of its tokens.
Licence of the target, which applies to the draft too: {cell(licence)}.
"""


def cell(value: Any) -> str:
    """A value inside a Markdown table, its markup made harmless."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
