"""Answering many prompts at once: this product's engine, or vLLM, on the same prompts and settings of one GPU.

    python infra/evidence/bulk.py local CONVERSATIONS.jsonl.gz --target FOLDER --prompts 4000
    python infra/evidence/bulk.py vllm  CONVERSATIONS.jsonl.gz --target FOLDER --prompts 4000    # vLLM's own Python

The first question of each conversation is answered once, sampled, ending where the target ends. A tenth of the prompts
is answered before without being counted, which sizes graphs and caches. Prints one JSON line: tokens, seconds,
tokens/s.
"""

import argparse
import gzip
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEMPERATURE, SEED = 0.7, 0
Answering = Callable[[list[list[int]]], int]  # prompts as token ids -> tokens made


def prompts_of(file: Path, target: str, count: int) -> list[list[int]]:
    """The first user messages, rendered by the target's own chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8") as lines:
        asked = [json.loads(line)["conversations"][0]["content"] for line in lines][:count]
    messages = [[{"role": "user", "content": content}] for content in asked]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def local(options: argparse.Namespace) -> Answering:
    """By `hass_core.data.engines`, as the responses stage does."""
    from hass_core.config import SamplingShare, TargetConfig
    from hass_core.data.engines.base import Request, RequestQueue
    from hass_core.data.engines.local import LocalEngine
    from hass_core.target_model.loader import load_target

    engine = LocalEngine(load_target(TargetConfig(source=options.target, device=options.device)), options.rows)
    sampling = SamplingShare(temperature=TEMPERATURE)

    def answer(prompts: list[list[int]]) -> int:
        requests = [Request(str(i), ids, sampling, options.tokens, SEED + i) for i, ids in enumerate(prompts)]
        return sum(len(completion.token_ids) for completion in engine.complete(RequestQueue(requests)))

    return answer


def vllm(options: argparse.Namespace) -> Answering:
    """By vLLM's offline engine, in this process."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    engine: Any = LLM(
        model=options.target, dtype="bfloat16", max_model_len=2048, max_num_seqs=options.rows,
        gpu_memory_utilization=0.6, enable_prefix_caching=False,
    )  # fmt: skip
    sampling = SamplingParams(temperature=TEMPERATURE, max_tokens=options.tokens, seed=None, detokenize=False)

    def answer(prompts: list[list[int]]) -> int:
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return answer


ENGINES = {"local": local, "vllm": vllm}


def main() -> None:
    """Parse the command line, answer, print the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("conversations", type=Path)
    parser.add_argument("--target", required=True, help="a Hugging Face folder")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompts", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of an answer, at most")
    parser.add_argument("--rows", type=int, default=512, help="answered at once")
    options = parser.parse_args()
    prompts = prompts_of(options.conversations, options.target, options.prompts)
    answer = ENGINES[options.engine](options)
    answer(prompts[: max(1, len(prompts) // 10)])
    started = time.perf_counter()
    tokens = answer(prompts)
    seconds = time.perf_counter() - started
    record = {"engine": options.engine, "prompts": len(prompts), "rows": options.rows, "tokens": tokens}
    print(json.dumps({**record, "seconds": round(seconds, 2), "tokens_per_second": round(tokens / seconds)}))


if __name__ == "__main__":
    main()
