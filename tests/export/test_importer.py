"""Existing checkpoints come in, and a bias is folded only where that is exact."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hass_core.config import TreeConfig
from hass_core.draft_model.architecture import DraftArchitecture
from hass_core.draft_model.checkpoint import save_draft
from hass_core.draft_model.engines import ENGINES
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import DraftModel
from hass_core.errors import BadInput, CorruptFile, DraftMismatch
from hass_core.export.checks import check_draft
from hass_core.export.exporter import export_draft
from hass_core.export.importer import fold_bias, import_draft


@pytest.fixture
def official(tmp_path, tiny_target):
    """A checkpoint as the official trainers write it: pytorch_model.bin with embedding and fc.bias."""
    config = tiny_target.model.config.to_dict() | {"num_hidden_layers": 1, "bias": True}
    torch.manual_seed(2)
    shapes = DraftArchitecture.from_target_config(tiny_target.model.config).tensors()
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    tensors |= {"fc.bias": torch.randn(48), "embed_tokens.weight": tiny_target.embedding.clone()}
    folder = tmp_path / "official"
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_official_checkpoint_is_imported(official, tiny_target, tmp_path):
    out = import_draft(official, tiny_target, tmp_path / "imported")
    tensors = load_file(str(out / "model.safetensors"))
    original = torch.load(official / "pytorch_model.bin", weights_only=True)
    assert "embed_tokens.weight" not in tensors
    assert all(torch.equal(tensors[name], original[name]) for name in tensors)
    assert json.loads((out / "config.json").read_text())["bias"] is True


def test_a_folded_bias_gives_the_same_output_and_serves_under_vllm(official, tiny_target, tmp_path):
    imported = import_draft(official, tiny_target, tmp_path / "imported")
    folding = fold_bias(imported, tiny_target, tmp_path / "folded")
    assert folding.relative_error < 1e-4
    before, after = (load_file(str(tmp_path / name / "model.safetensors")) for name in ("imported", "folded"))
    tokens, features = torch.randint(259, (50,)), torch.randn(50, 48)
    biased = torch.cat([tiny_target.embedding[tokens], features], -1) @ before["fc.weight"].T + before["fc.bias"]
    folded = torch.cat([after["embed_tokens.weight"][tokens], features], -1) @ after["fc.weight"].T
    torch.testing.assert_close(folded, biased, rtol=1e-3, atol=1e-3)
    tree = TreeConfig(kind="chain", depth=3, nodes=4)
    out = export_draft(
        tmp_path / "folded",
        tiny_target,
        "vllm",
        tmp_path / "vllm",
        tree,
        "org/target",
    )
    assert check_draft(out, tiny_target, ENGINES["vllm"]) == []


def test_a_bias_that_cannot_be_folded_is_refused_with_the_condition_number(official, tiny_target, tmp_path):
    imported = import_draft(official, tiny_target, tmp_path / "imported")
    tensors = load_file(str(imported / "model.safetensors"))
    tensors["fc.weight"][0, :48] = tensors["fc.weight"][1, :48]  # singular embedding half
    save_file(tensors, str(imported / "model.safetensors"))
    with pytest.raises(DraftMismatch, match="condition number"):
        fold_bias(imported, tiny_target, tmp_path / "folded")


def test_a_pickle_with_code_in_it_is_refused(official, tiny_target, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"fc.weight": Evil()}, official / "pytorch_model.bin")
    with pytest.raises(CorruptFile, match="not a plain file of tensors"):
        import_draft(official, tiny_target, tmp_path / "imported")


def test_an_incomplete_or_foreign_checkpoint_is_refused(official, tiny_target, tmp_path):
    tensors = torch.load(official / "pytorch_model.bin", weights_only=True)
    del tensors["fc.weight"]
    torch.save(tensors, official / "pytorch_model.bin")
    with pytest.raises(DraftMismatch, match=r"has no fc\.weight"):
        import_draft(official, tiny_target, tmp_path / "imported")
    torch.save(tensors | {"fc.weight": torch.randn(48, 96)}, official / "pytorch_model.bin")
    config = json.loads((official / "config.json").read_text())
    (official / "config.json").write_text(json.dumps(config | {"vocab_size": 7}))
    with pytest.raises(DraftMismatch, match="vocab_size is 7"):
        import_draft(official, tiny_target, tmp_path / "imported")


def test_folding_without_a_bias_says_so(official, tiny_target, tmp_path):
    tensors = torch.load(official / "pytorch_model.bin", weights_only=True)
    del tensors["fc.bias"]
    torch.save(tensors, official / "pytorch_model.bin")
    config = json.loads((official / "config.json").read_text())
    (official / "config.json").write_text(json.dumps(config | {"bias": False}))
    imported = import_draft(official, tiny_target, tmp_path / "imported")
    with pytest.raises(BadInput, match="nothing to fold"):
        fold_bias(imported, tiny_target, tmp_path / "folded")


def test_an_import_does_not_write_over_its_source_or_anything_else(official, tiny_target, tmp_path):
    with pytest.raises(BadInput, match="is or holds the draft to read; name another folder"):
        import_draft(official, tiny_target, official)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to mother.txt").write_text("dear")
    with pytest.raises(BadInput, match="holds something other than a former export"):
        import_draft(official, tiny_target, tmp_path / "letters")


def test_a_bias_that_vllm_would_drop_is_named_with_the_way_out(official, tiny_target, tmp_path):
    imported = import_draft(official, tiny_target, tmp_path / "imported")
    tree = TreeConfig(kind="chain", depth=3, nodes=4)
    with pytest.raises(DraftMismatch, match=r"no place for fc\.bias .*--fold-bias") as refused:
        export_draft(imported, tiny_target, "vllm", tmp_path / "vllm", tree, "org/target")
    assert "draft.family" not in str(refused.value)
    for engine in ("sglang", "eagle"):
        out = export_draft(imported, tiny_target, engine, tmp_path / engine, tree, "org/target")
        assert torch.equal(
            load_file(str(out / "model.safetensors"))["fc.bias"],
            load_file(str(imported / "model.safetensors"))["fc.bias"],
        )


def test_a_targets_folder_is_not_taken_for_a_draft_to_replace(official, tiny_target, tmp_path):
    kept = tmp_path / "target"
    kept.mkdir()
    save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, str(kept / "model.safetensors"))
    for write in (
        lambda: import_draft(official, tiny_target, kept),
        lambda: export_draft(official, tiny_target, "eagle", kept, TreeConfig(), "org/target"),
    ):
        with pytest.raises(BadInput, match="holds something other than a former export"):
            write()
    assert [path.name for path in kept.iterdir()] == ["model.safetensors"]


def test_a_draft_that_was_not_exported_is_never_replaced(official, tiny_target, tmp_path):
    """A trained draft, one of a store, another tool's, or a former export to which its owner added something."""
    shape = DraftArchitecture.from_target_config(tiny_target.model.config)
    trained = tmp_path / "trained"
    save_draft(trained, DraftModel(shape, tiny_target.embedding), DraftHead.from_target(tiny_target.head), {})
    before = sorted((path.name, path.read_bytes()) for path in trained.iterdir())
    tree = TreeConfig(kind="chain", depth=3, nodes=4)

    def refused(out, told):
        for write in (
            lambda: import_draft(official, tiny_target, out),
            lambda: export_draft(official, tiny_target, "eagle", out, tree, "org/target"),
        ):
            with pytest.raises(BadInput, match=told):
                write()

    refused(trained, "something other than a former export")
    (tmp_path / "link").symlink_to(trained)
    refused(tmp_path / "link", "something other than a former export")
    (trained / "manifest.json").write_text("{}")
    for out in (trained, trained / "vllm", tmp_path / "link"):
        refused(out, "a finished stage of a store, which never changes")
    (trained / "manifest.json").unlink()
    assert sorted((path.name, path.read_bytes()) for path in trained.iterdir()) == before
    out = export_draft(official, tiny_target, "eagle", tmp_path / "out", tree, "org/target")
    assert export_draft(trained, tiny_target, "vllm", out, tree, "org/target") == out  # a former export is
    (out / "notes.txt").write_text("mine")
    refused(out, r"holds notes\.txt beside a former export")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "official", "out", "trained"]


def test_an_import_leaves_nothing_of_the_draft_that_was_there(official, tiny_target, tmp_path):
    (official / "draft_vocab.json").write_text("[1, 2, 3]")
    out = import_draft(official, tiny_target, tmp_path / "imported")
    assert (out / "draft_vocab.json").is_file()
    (official / "draft_vocab.json").unlink()
    import_draft(official, tiny_target, out)
    assert not (out / "draft_vocab.json").exists()


def test_an_import_does_not_write_over_the_folder_its_source_is_in(official, tiny_target, tmp_path):
    out = import_draft(official, tiny_target, tmp_path / "imported")
    official.rename(out / "raw")
    with pytest.raises(BadInput, match="is or holds the draft to read"):
        import_draft(out / "raw", tiny_target, out)
    assert (out / "raw" / "pytorch_model.bin").is_file()
