"""A target whose layers lie in several places gives features, and decodes nothing. Disk stands for a second GPU."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hass_core.config import TargetConfig
from hass_core.errors import TargetError
from hass_core.target_model import loader
from hass_core.target_model.capture import capture_features
from hass_core.target_model.identity import TargetIdentity
from hass_core.target_model.loader import Target, load_target
from hass_core.target_model.packed import packed_pass
from hass_core.target_model.runner import make_runner
from tests.conftest import byte_tokenizer, tiny_llama

HERE = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def spread(folder, tmp_path) -> Target:
    places = dict.fromkeys(HERE, "cpu") | {"model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "rest")
    return Target("spread", str(folder), model.eval().requires_grad_(False), byte_tokenizer(), TargetIdentity(*"abcde"))


def test_its_features_are_those_of_the_same_target_in_one_place(spread, folder):
    whole = load_target(TargetConfig(source=str(folder), dtype="float32", device="cpu"))
    assert (spread.is_spread, whole.is_spread) == (True, False)
    assert packed_pass(spread) is None
    rows = [[5, 6, 7], [9] * 20]
    for one, other in zip(capture_features(spread, rows), capture_features(whole, rows), strict=True):
        torch.testing.assert_close(one, other)


def test_it_is_not_decoded_with(spread):
    with pytest.raises(TargetError, match=r"spread lies on several GPUs, which gives features only"):
        make_runner(spread)


@pytest.mark.parametrize(("device", "gpus", "placed"), [("balanced", True, "balanced"), ("balanced", False, "cpu")])
def test_the_setting_spreads_it_where_there_are_gpus(folder, monkeypatch, device, gpus, placed):
    real, asked = AutoModelForCausalLM.from_pretrained, []

    def load(source, device_map, **options):
        asked.append(device_map)
        return real(source, device_map="cpu", **options)

    monkeypatch.setattr(loader.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(loader, "choose_device", lambda name: torch.device("cuda" if gpus else "cpu"))
    load_target(TargetConfig(source=str(folder), dtype="float32", device=device))
    assert asked == [placed]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_features_of_one(folder):
    spread, whole = (load_target(TargetConfig(source=str(folder), device=device)) for device in ("balanced", "cuda"))
    assert spread.is_spread
    assert spread.fingerprint == whole.fingerprint
    rows = [[5, 6, 7], [9] * 20]
    for one, other in zip(capture_features(spread, rows), capture_features(whole, rows), strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
