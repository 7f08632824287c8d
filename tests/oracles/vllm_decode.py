"""Runs in vLLM's own environment: decode prompts greedily and write what came out and what was counted.

    python vllm_decode.py REQUEST.json ANSWER.json

REQUEST: target and draft folders (draft null = plain), prompts as token ids, max_new_tokens, depth,
method of speculation.
ANSWER: token_ids, and with a draft: drafts, accepted_per_position; versions of vLLM and torch.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}


def main() -> None:
    import torch
    import vllm
    from vllm import LLM, SamplingParams

    request = json.loads(Path(sys.argv[1]).read_text())
    speculation = None
    if request["draft"]:
        speculation = {
            "method": request["method"],
            "model": request["draft"],
            "num_speculative_tokens": request["depth"],
        }
    engine = LLM(
        model=request["target"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=1,
        enable_prefix_caching=False,
        disable_log_stats=False,
        seed=0,
        speculative_config=speculation,
    )
    sampling = SamplingParams(temperature=0, max_tokens=request["max_new_tokens"], ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in request["prompts"]], sampling)
    answer = {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "token_ids": [list(output.outputs[0].token_ids) for output in outputs],
    }
    counted = {metric.name.removeprefix("vllm:spec_decode_"): metric for metric in engine.get_metrics()}
    if request["draft"]:
        answer["drafts"] = counted["num_drafts"].value
        answer["accepted_per_position"] = list(counted["num_accepted_tokens_per_pos"].values)
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
