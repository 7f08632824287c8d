"""Every preset of a large target from prompts to evaluation at its true width: random weights, two layers, a byte
tokenizer, two optimizer steps. What is left out is the depth, and with it all quality.

    PYTHONPATH=. python infra/evidence/wide_presets.py [--device cuda] [PRESET …]

Prints one JSON object a preset: parameters of the draft, seconds of the whole, most GPU memory.
"""

import argparse
import json
import tempfile
import time
import traceback
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from hass_core.config import load_config
from hass_core.presets import recorded_shapes
from hass_core.stages import run_until
from hass_core.store import Store
from hass_core.store.provenance import provenance
from tests.conftest import byte_tokenizer
from tests.forecast.test_presets_run import LARGE, small_run

LAYERS, BYTES = 2, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def wide_target(source: str, folder: Path, device: str, layers: int = LAYERS) -> None:
    """The target's own sizes but for the number of layers."""
    config = AutoConfig.for_model(**recorded_shapes()[source]["config"] | BYTES | {"num_hidden_layers": layers})
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    naming_all(config.vocab_size).save_pretrained(folder)


def naming_all(vocab_size: int) -> PreTrainedTokenizerFast:
    """The byte tokenizer with words for the rest of the vocabulary, which are never read but can be drawn: an answer of
    tokens without a text counts as empty."""
    tokenizer = byte_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    known = state["model"]["vocab"]
    known |= {f"Ġ{number}": number for number in range(len(known), vocab_size)}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    # random weights whose output projection is the embedding repeat the prompt's last token: not a blank one then
    tokenizer.chat_template = str(tokenizer.chat_template).replace("\n", ":")
    return tokenizer


def measured(preset: str, folder: Path, device: str) -> dict[str, object]:
    """One preset's record."""
    wide_target(load_config(preset).target.source, folder / "target", device)
    run = small_run(preset, folder)
    run = run.model_copy(update={"target": run.target.model_copy(update={"device": device, "dtype": "bfloat16"})})
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    made = run_until("evaluation", run)
    config = json.loads(Store(run.store).open(made["draft"]).local_path("config.json").read_text(encoding="utf-8"))
    return {
        "preset": preset, "hidden_size": config["hidden_size"], "draft_vocabulary": config.get("draft_vocab_size"),
        "draft": {name: made["draft"].summary[name] for name in ("steps", "loss")},
        "seconds": round(time.perf_counter() - started, 1),
        "peak_gib": None if device == "cpu" else round(torch.cuda.max_memory_allocated() / 2**30, 1),
    }  # fmt: skip


def main() -> None:
    """Parse the command line; one line a preset, and one that says where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", metavar="PRESET", default=LARGE)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    for preset in options.presets:
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(json.dumps(measured(preset, Path(folder), options.device)), flush=True)
            except Exception as error:
                traceback.print_exc()
                print(json.dumps({"preset": preset, "failed": f"{type(error).__name__}: {error}"}), flush=True)
        if options.device != "cpu":
            torch.cuda.empty_cache()
    device = torch.cuda.get_device_name() if options.device != "cpu" else "cpu"
    print(json.dumps({"device": device, **provenance()}))


if __name__ == "__main__":
    main()
