"""Training on stored features needs a target's embedding and head alone, and takes no others for them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hass_core.config import TargetConfig
from hass_core.errors import TargetError
from hass_core.target_model.embeddings import MadeWith, load_embeddings
from hass_core.target_model.identity import tensor_digest
from hass_core.target_model.loader import load_target
from hass_core.training.train import draft_folder, train_draft
from tests.conftest import byte_tokenizer, tiny_llama
from tests.training.conftest import store_features
from tests.training.test_train import settings

PEAK = """
import resource, sys
from pathlib import Path
from hass_core.config import TargetConfig
from hass_core.target_model.embeddings import MadeWith, load_embeddings

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

small, large = (TargetConfig(source=folder, dtype="bfloat16", device="cpu") for folder in sys.argv[1:])
load_embeddings(small, MadeWith.model_validate_json((Path(small.source) / "made_with.json").read_text()))
before = peak()
found = load_embeddings(large, MadeWith.model_validate_json((Path(large.source) / "made_with.json").read_text()))
print((peak() - before) / (2 * (found.embedding.numel() + found.head.numel())))
"""


@pytest.fixture(params=[False])
def sharded(request, tmp_path) -> TargetConfig:
    """A target whose tensors lie in several files; its head is the embedding where the parameter says so."""
    tiny_llama(tie_word_embeddings=request.param).save_pretrained(tmp_path / "tiny", max_shard_size="30KB")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    return TargetConfig(source=str(tmp_path / "tiny"), device="cpu", dtype="float32")


def spoil_layers(folder: Path) -> int:
    """Make every file unreadable that holds neither end; how many."""
    shards = [file for file in folder.glob("*.safetensors") if not {"embed_tokens", "lm_head"} & ends_in(file)]
    for file in shards:
        file.write_bytes(b"unreadable")
    return len(shards)


def ends_in(file: Path) -> set[str]:
    return {name.split(".")[-2] for name in load_file(file)}


@pytest.mark.parametrize("sharded", [False, True], indirect=True, ids=["untied", "tied"])
def test_they_are_those_of_the_whole_target_and_no_other_file_is_opened(sharded):
    whole = load_target(sharded)
    made_with = MadeWith.of(whole)
    assert spoil_layers(Path(sharded.source)) > 3
    found = load_embeddings(sharded, made_with)
    assert torch.equal(found.embedding, whole.embedding)
    assert torch.equal(found.head, whole.head)
    assert (found.identity, found.name, found.eos_token_ids) == (whole.identity, whole.name, whole.eos_token_ids)
    assert (found.head is found.embedding) == whole.config.tie_word_embeddings
    assert found.differing(whole.record()) == []
    load_embeddings(sharded.model_copy(update={"dtype": "bfloat16"}), made_with)  # the same target, loaded otherwise


def test_those_of_another_target_are_refused(sharded):
    made_with = MadeWith.of(load_target(sharded))
    folder = Path(sharded.source)
    [file] = [file for file in folder.glob("*.safetensors") if "embed_tokens" in ends_in(file)]
    tensors = load_file(file)
    save_file({name: tensor + (0.01 if "embed" in name else 0) for name, tensor in tensors.items()}, file)
    with pytest.raises(TargetError, match=r"made with another target than .*: its embedding"):
        load_embeddings(sharded, made_with)
    save_file(tensors, file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    with pytest.raises(TargetError, match=r"made with another target than .*: its config differ"):
        load_embeddings(sharded, made_with)


def test_a_draft_trained_without_the_layers_is_the_one_that_is_trained_with_them(sharded, store):
    whole = load_target(sharded)
    features, config = store_features(store, whole), settings(max_steps=2)
    made_with = MadeWith.of(whole)
    spoil_layers(Path(sharded.source))
    found = load_embeddings(sharded, made_with)
    assert draft_folder(config, features, store, found).digest == draft_folder(config, features, store, whole).digest
    without = store.open(train_draft(config, features, store, found)).local_path("model.safetensors").read_bytes()
    store.fs.rm(f"{store.root}/draft", recursive=True)
    assert (
        store.open(train_draft(config, features, store, whole)).local_path("model.safetensors").read_bytes() == without
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is told in other units")
def test_no_more_memory_is_taken_than_twice_their_own(tmp_path):
    for name, vocabulary, width in (("small", 259, 48), ("large", 24_000, 1024)):
        checkpoint(tmp_path / name, vocabulary, width)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "small", tmp_path / "large"], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 2


def checkpoint(folder: Path, vocabulary: int, width: int) -> None:
    """Ends of zeros in files of their own; the layers' file has its sizes and no content."""
    model = tiny_llama(num_hidden_layers=1)
    config = model.config.to_dict() | {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 8 * width}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 40}))
    byte_tokenizer().save_pretrained(folder)
    end = torch.zeros(vocabulary, width, dtype=torch.bfloat16)
    files = {"model.embed_tokens.weight": "first.safetensors", "lm_head.weight": "last.safetensors"}
    for name, file in files.items():
        save_file({name: end}, folder / file)
    with (folder / "layers.safetensors").open("wb") as layers:
        layers.truncate(40 * 27 * 2 * width**2)
    weights = {"weight_map": files | {"model.layers.0.mlp.up_proj.weight": "layers.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))
    digest = tensor_digest(end)
    made_with = MadeWith(identity={"weights": "of a test"}, embedding=digest, head=digest)
    (folder / "made_with.json").write_text(made_with.model_dump_json())
