"""How fast vLLM decodes the prompts of `hass bench decode` on this CPU; runs in vLLM's own environment.

    python infra/evidence/vllm_speed.py REQUEST.json

REQUEST: target folder, draft folder exported for vLLM (null = plain), prompts as token ids, max_new_tokens, depth and
dtype. Prints one JSON line: tokens per second over all prompts, one after the other, and with a draft tokens per cycle.
"""

import argparse
import json
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def asked() -> dict:
    """The request. Ends with 2 where it, a folder that it names, or vLLM is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("request", type=Path)
    file = parser.parse_args().request
    if not file.is_file():
        parser.error(f"there is no file {file}")
    request = json.loads(file.read_text(encoding="utf-8"))
    for folder in filter(None, (request["target"], request["draft"])):
        if not Path(folder, "config.json").is_file():
            parser.error(f"{folder}, which {file} names, is no model's folder: it has no config.json")
    if find_spec("vllm") is None:
        parser.error(f"{sys.executable} has no vllm: run this with the Python of vLLM's environment")
    return request


def main() -> None:
    """Decode and print."""
    request = asked()
    import vllm

    speculation = None
    if request["draft"]:
        speculation = {"method": "eagle", "model": request["draft"], "num_speculative_tokens": request["depth"]}
    engine = vllm.LLM(
        model=request["target"],
        skip_tokenizer_init=True,
        dtype=request["dtype"],
        max_model_len=512,
        max_num_seqs=1,
        enable_prefix_caching=False,
        disable_log_stats=False,
        speculative_config=speculation,
        enforce_eager=True,
    )
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=request["max_new_tokens"], ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    engine.generate(prompts[:1], sampling)
    started = time.perf_counter()
    tokens = sum(len(engine.generate([prompt], sampling)[0].outputs[0].token_ids) for prompt in prompts)
    speed = tokens / (time.perf_counter() - started)
    record = {"vllm": vllm.__version__, "dtype": request["dtype"], "depth": request["depth"] if speculation else 0}
    counted = {metric.name.removeprefix("vllm:spec_decode_"): metric for metric in engine.get_metrics()}
    if speculation:
        record["tau"] = 1 + counted["num_accepted_tokens"].value / counted["num_drafts"].value
    print(json.dumps({**record, "tokens_per_second": round(speed, 2)}))


if __name__ == "__main__":
    main()
