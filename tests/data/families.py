"""Tokenizers of the kinds real families use, trained on a few sentences, with the families' real chat templates."""

from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "chat_templates"
SPECIAL = {
    "llama-2": ("<s>", "</s>", ["<s>", "</s>", "<unk>"]),
    "mistral": ("<s>", "</s>", ["<s>", "</s>", "<unk>"]),
    "llama-3": (
        "<|begin_of_text|>",
        "<|eot_id|>",
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "qwen2": (None, "<|im_end|>", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    "qwen3": (None, "<|im_end|>", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    "smollm2": ("<|im_start|>", "<|im_end|>", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
}
# Llama-3 and Qwen cut text so that a run of line breaks stays one piece, whatever follows it
LINE_BREAKS_TOGETHER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "You are a helpful assistant. Name a colour.\n\nRed is a colour, and blue is one too.\n",
    "The answer is four, because two and two make four.\n\nWhat else would you like to know about it?\n",
    "Be brief and kind. Thank you for the answer! [INST] [/INST] <<SYS>> <</SYS>> system user assistant\n\n",
] * 4


@cache
def family_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE, or Metaspace BPE with byte fallback for Llama-2 and Mistral, with merges across words' ends."""
    bos, eos, special = SPECIAL[family]
    spaced = family in ("llama-2", "mistral")
    tokenizer = _metaspace(special) if spaced else _byte_level(special, family)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=special[-1])
    fast.add_special_tokens({"additional_special_tokens": special})
    fast.chat_template = (TEMPLATES / f"{family}.jinja").read_text().rstrip("\n")
    return fast


def _byte_level(special: list[str], family: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if family.startswith("qwen"):
        tokenizer.normalizer = normalizers.NFC()
    if family == "smollm2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(LINE_BREAKS_TOGETHER), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _metaspace(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=520, special_tokens=special + bytes_, show_progress=False)
    )
    return tokenizer
