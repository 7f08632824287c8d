"""Time plain tokens and speculative cycles for a target of a given shape with random weights, one row.

    python infra/evidence/cycle.py llama3-8b [--contexts 200 2000]

Prints one JSON line: microseconds of a plain token, of verifying N nodes that cost nothing to draft, and of whole
cycles of 6 levels, top-k 10, 60 nodes, with the draft's full vocabulary and 32,000 tokens, in bfloat16 and fp8.
"""

import argparse
import json
from typing import Any, cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hass_core.bench.training import SHAPES
from hass_core.decoding.drafter import Drafter, NoDraft, TreeDrafter
from hass_core.decoding.planner import FixedTree, cycle_seconds
from hass_core.decoding.tree import TreeShape
from hass_core.draft_model.architecture import DraftArchitecture
from hass_core.draft_model.checkpoint import Draft
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import DraftModel
from hass_core.store.provenance import provenance
from hass_core.target_model.identity import TargetIdentity
from hass_core.target_model.loader import Target
from hass_core.target_model.runner import make_runner

LAYERS = {"smollm2-135m": 30, "llama3-8b": 32, "tiny": 2}
TIED = {"smollm2-135m", "tiny"}  # output projection and input embedding are one
TREE, SMALL_VOCABULARY, CYCLES = TreeShape(depth=6, top_k=10, nodes=60, static=False), 32_000, 24


def random_target(shape: str, device: torch.device) -> Target:
    """A Llama of that shape in bfloat16; it has no tokenizer."""
    sizes = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=sizes["vocabulary"], hidden_size=sizes["hidden"], intermediate_size=sizes["inner"],
        num_attention_heads=sizes["heads"], num_key_value_heads=sizes["groups"], num_hidden_layers=LAYERS[shape],
        tie_word_embeddings=shape in TIED, max_position_embeddings=8192, dtype=torch.bfloat16,
    )  # fmt: skip
    with device:
        model = cast(Any, LlamaForCausalLM(config)).to(torch.bfloat16).eval().requires_grad_(False)
    return Target(shape, "", model, cast(Any, None), TargetIdentity("", "", "", "", ""))


def drafters_of(target: Target) -> dict[str, TreeDrafter]:
    """What to time by name: no draft, nodes that cost nothing, and the tree by vocabulary and bits of the weights."""
    model = DraftModel(DraftArchitecture.from_target_config(target.model.config), target.embedding).to(target.dtype)
    whole = DraftHead.from_target(target.head)
    small = DraftHead.from_target(target.head, torch.arange(min(SMALL_VOCABULARY, whole.size)))
    drafters: dict[str, TreeDrafter] = {"plain": NoDraft(), "verify_16": FixedTree(16), "verify_60": FixedTree(60)}
    for bits in ("", "_eight_bits"):
        for name, head in (("tree", whole), ("tree_vocabulary_32000", small)):
            drafters[name + bits] = Drafter(Draft(model, head, {}, eight_bits=bool(bits)), TREE)
    return drafters


def timed(shape: str, contexts: list[int], device: torch.device) -> dict[str, Any]:
    """Microseconds by context length and kind of cycle."""
    target = random_target(shape, device)
    runner, drafters = make_runner(target), drafters_of(target)
    return {
        str(context): {
            name: round(1e6 * cycle_seconds(runner, drafter, cycles=CYCLES, context=context))
            for name, drafter in drafters.items()
        }
        for context in contexts
    }


def main() -> None:
    """Parse the command line, measure, print the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=LAYERS)
    parser.add_argument("--contexts", type=int, nargs="+", default=[200])
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    record = {"shape": options.shape, "device": name, "us_by_context": timed(options.shape, options.contexts, device)}
    print(json.dumps(record | provenance()))


if __name__ == "__main__":
    main()
