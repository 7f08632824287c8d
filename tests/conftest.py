"""Shared fixtures: a tiny random target with a byte tokenizer, a store on disk, one on a real S3 server."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from flows.collector import imported, importing

importing()

import fsspec
import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hass_core.store import Store
from hass_core.target_model.loader import Target, freeze
from tests.s3_server import ACCESS_KEY, BUCKET, SECRET_KEY, FaultyProxy, seaweedfs

IMPATIENT = {"read_timeout": 1, "connect_timeout": 1, "retries": {"max_attempts": 2, "mode": "standard"}}

LONGEST = (  # files of a minute and more, the longest first
    "test_deployment", "test_retrain", "test_six_months", "test_kernels", "test_shards", "test_readme", "test_train",
    "test_launch", "test_division", "test_export", "test_verbs", "test_tokenise", "test_prompts", "test_gate_trials",
)  # fmt: skip

hypothesis.settings.register_profile(  # tests do not time, and try the same examples everywhere
    "busy machine", deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("busy machine")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 256 + len(SPECIAL)
SIZES: dict[str, object] = {  # of tiny models of any family
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: begun last, one process works on them while the others have nothing left."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(Path(item.path).stem, len(rank)))


def pytest_collection_finish() -> None:
    """All test files are imported."""
    imported()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, plus chat markers: ids 0-2 are special, 3.. are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.add_special_tokens({"additional_special_tokens": SPECIAL})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_llama(seed: int = 0, **overrides: object) -> LlamaForCausalLM:
    """A random two-layer Llama in float32."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | {"initializer_range": 0.2} | overrides))).float()


@pytest.fixture(scope="session")
def tiny_target() -> Target:
    return freeze(tiny_llama(), byte_tokenizer(), name="tiny")


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store", cache=tmp_path / "cache")


@pytest.fixture(scope="session")
def s3_proxy(tmp_path_factory):
    """A proxy in front of a real S3 server; it can be told to fail."""
    pytest.importorskip("s3fs")
    with seaweedfs(tmp_path_factory.mktemp("weed")) as port:
        proxy = FaultyProxy(port)
        yield proxy
        proxy.close()


@pytest.fixture
def s3_store(s3_proxy, tmp_path, monkeypatch):
    """A store behind the proxy, with short patience."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_proxy.port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": IMPATIENT, "use_listings_cache": False})
    monkeypatch.setattr("hass_core.store.store.UPLOAD_PATIENCE_SECONDS", 6.0)
    s3_proxy.mode = "pass"
    store = Store(f"s3://{BUCKET}/store/{tmp_path.name}", cache=tmp_path / "cache", cache_gb=0.001)
    monkeypatch.setattr(type(store.fs), "retries", 2)
    if not store.fs.exists(BUCKET):
        store.fs.mkdir(BUCKET)
    yield store
    s3_proxy.mode = "pass"
