"""What an eagle3 draft does on a GPU that a CPU cannot show: kernels and CUDA graphs beside plain PyTorch.

    python infra/evidence/eagle3_gpu.py --draft FOLDER        a trained eagle3 draft of SmolLM2-135M-Instruct

For each kind of tree, in bfloat16: how many answers with CUDA graphs and kernels equal plain ones (near-ties may fall
otherwise), and their tokens a cycle; and of one forward pass of the draft, states and logits by its kernels beside
those by its modules. The last line is one JSON object.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from hass_core.config import SamplingConfig, TargetConfig, TreeConfig
from hass_core.data.holdout import heldout_prompts
from hass_core.data.templates import encode_prompt
from hass_core.decoding.answers import StopRule
from hass_core.decoding.decoder import PlainDecoder, SpeculativeDecoder
from hass_core.decoding.draft_runner import DraftRunner
from hass_core.draft_model.checkpoint import Draft, load_draft
from hass_core.store.provenance import provenance
from hass_core.target_model.kv_cache import FixedShapes
from hass_core.target_model.loader import load_target
from hass_core.target_model.runner import make_runner

TREES = {
    "chain": TreeConfig(kind="chain", depth=4, top_k=1, nodes=5),
    "tree": TreeConfig(depth=6, top_k=10, nodes=60),
    "eight bits": TreeConfig(depth=6, top_k=10, nodes=60, eight_bits=True),
}
PROMPTS, NEW_TOKENS, ROWS = 16, 128, 8


def main(draft: Annotated[Path, typer.Option()], device: str = "cuda") -> None:
    target = load_target(TargetConfig(device=device))
    loaded, runner, stop = load_draft(draft, target), make_runner(target), StopRule.of(target)
    prompts = [encode_prompt(target.tokenizer, record.messages[:1]) for record in heldout_prompts()[:PROMPTS]]
    plain = PlainDecoder(runner).generate(prompts, SamplingConfig(), NEW_TOKENS, stop)
    record: dict[str, object] = {"device": torch.cuda.get_device_name(), **provenance()}
    for name, tree in TREES.items():
        answers = SpeculativeDecoder(runner, loaded, tree).generate(prompts, SamplingConfig(), NEW_TOKENS, stop)
        same = sum(a.token_ids == b.token_ids for a, b in zip(answers, plain, strict=True))
        cycles = [cycle.accepted for answer in answers for cycle in answer.cycles]
        record[name] = {"equal_answers": f"{same} of {PROMPTS}", "tau": 1 + sum(cycles) / max(1, len(cycles))}
    record["one_pass"] = one_pass(loaded)
    print(json.dumps(record))


@torch.inference_mode()
def one_pass(draft: Draft) -> dict[str, float]:
    """Relative differences of states and logits between the kernels' pass and the modules', over one row of tokens."""
    model, runner = draft.model, DraftRunner(draft.model)
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(model.architecture.vocab_size, (1, ROWS), generator=generator).to(runner.device)
    features = torch.randn(1, ROWS, model.architecture.hidden_size, generator=generator).to(runner.device, runner.dtype)
    positions = torch.arange(ROWS, device=runner.device)[None]
    cache = runner.new_cache(1, 256)
    inputs, rotation = runner.inputs(token_ids, features), runner.rope.at(positions)
    states = runner.forward(inputs, rotation, cache, fixed=FixedShapes(256))
    expected = model(token_ids, features, positions)
    pairs = {"states": (states, expected)}
    pairs["logits"] = draft.head.logits(runner.read(states)), draft.head.logits(model.read(expected))
    return {
        name: float((ours - theirs).float().norm() / theirs.float().norm()) for name, (ours, theirs) in pairs.items()
    }


if __name__ == "__main__":
    typer.run(main)
