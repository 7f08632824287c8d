"""Tokens per cycle against the length of the context: how a draft fares beyond the lengths that it was trained on.

    PYTHONPATH=. python infra/evidence/context.py DRAFT CONVERSATIONS [--device cuda] [--last 256 512]

CONVERSATIONS is a JSON Lines file (may be gzipped) in ShareGPT form. For each length, rounds of other conversations are
put before a question until the prompt is about so long, the target answers greedily, and the draft's cycles are
replayed over the answers (`hass_core.decoding.replay`), in a tree of 6/10/60 and a chain of 3. With `--last` the draft
is also tried with only so many of the prompt's tokens, the last ones, at positions from 0 on; their features are those
of the whole prompt, and the answers stay the same. Prints JSON: τ with bootstrap intervals over answers.
"""

import argparse
import gzip
import json
from itertools import islice
from pathlib import Path

import torch

from hass_core.config import SamplingConfig, TargetConfig
from hass_core.data.templates import Message, encode_prompt
from hass_core.decoding.answers import StopRule
from hass_core.decoding.drafter import Drafter
from hass_core.decoding.replay import Recording
from hass_core.decoding.tree import TreeShape
from hass_core.draft_model.checkpoint import load_draft
from hass_core.store.provenance import provenance
from hass_core.target_model.loader import Target, load_target
from hass_core.target_model.runner import make_runner
from infra.evidence.sampling import TREES, Asked, recorded, replayed

LENGTHS = (128, 512, 1024, 2048, 4096, 7936)


def conversations_of(file: Path) -> list[list[Message]]:
    """The rounds of each conversation that begins with a user's message and an answer."""
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line)["conversations"] for line in lines]
    return [
        [{"role": message["role"], "content": message["content"]} for message in row[:2]]
        for row in rows
        if [message["role"] for message in row[:2]] == ["user", "assistant"]
    ]


def prompt_of(target: Target, rounds: list[list[Message]], length: int) -> list[int]:
    """The first round's question behind as many of the others as make at most `length` tokens."""
    question, history = rounds[0][:1], []
    prompt = encode_prompt(target.tokenizer, question)
    for other in rounds[1:]:
        longer = encode_prompt(target.tokenizer, [*history, *other, *question])
        if len(longer) > length:
            break
        history, prompt = [*history, *other], longer
    return prompt


def shortened(recording: Recording, last: int) -> Recording:
    """With the last so many tokens of the prompt alone."""
    dropped = max(0, recording.start - last)
    states = None if recording.taps is None else recording.taps[dropped:]
    return Recording(recording.token_ids[dropped:], recording.features[dropped:], recording.start - dropped, states)


def main() -> None:
    """Parse the command line, measure, print the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("draft", type=Path)
    parser.add_argument("conversations", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--answers", type=int, default=48, help="of each length")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of an answer")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--last", type=int, nargs="+", default=[], help="tokens of the prompt that the draft sees")
    options = parser.parse_args()
    target = load_target(TargetConfig(device=options.device))
    draft, runner = load_draft(options.draft, target), make_runner(target)
    rounds, record = conversations_of(options.conversations), {}
    step = len(rounds) // options.answers
    for length in options.lengths:
        groups = (rounds[i * step : i * step + step] for i in range(options.answers))
        asked: list[Asked] = [("", prompt_of(target, group, length)) for group in islice(groups, options.answers)]
        answers = recorded(runner, asked, SamplingConfig(), options.tokens, StopRule.of(target))
        found: dict[str, object] = {"prompt_tokens": sum(len(prompt) for _, prompt in asked) / len(asked)}
        for last in (None, *options.last):
            seen = [(name, answer if last is None else shortened(answer, last)) for name, answer in answers]
            for name in ("6/10/60", "chain 3"):
                drafter = Drafter(draft, TreeShape.of(TREES[name], draft.head.size))
                key = name if last is None else f"{name}, last {last}"
                found[key] = replayed(drafter, seen, target.head, SamplingConfig()).record()["tau"]
        record[length] = found
        print(length, json.dumps(found), flush=True)
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"
    print(json.dumps({"device": device, "dtype": str(target.dtype), "lengths": record, **provenance()}))


if __name__ == "__main__":
    main()
