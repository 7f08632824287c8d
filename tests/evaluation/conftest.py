"""A random draft for the tiny target, questions in a file, and small settings."""

import json

import pytest
import torch

from hass_core.config import EvaluationConfig, TreeConfig
from hass_core.draft_model.architecture import DraftArchitecture
from hass_core.draft_model.checkpoint import draft_info, save_draft
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import DraftModel

TREE = TreeConfig(depth=3, top_k=3, nodes=8)


def random_draft(of, folder, seed=0, **info):
    """A folder with an untrained draft of the target `of`."""
    torch.manual_seed(seed)
    architecture = DraftArchitecture.from_target_config(of.model.config)
    model = DraftModel(architecture, of.embedding)
    save_draft(folder, model, DraftHead.from_target(of.head), draft_info(of, info))
    return folder


@pytest.fixture
def draft_dir(tiny_target, tmp_path):
    return random_draft(tiny_target, tmp_path / "draft")


@pytest.fixture
def questions_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [
        {"question_id": 1, "category": "writing", "turns": ["Tell me about tides.", "Now shorter."]},
        {"question_id": 2, "category": "math", "turns": ["What is 2 + 3?"]},
        {"question_id": 3, "category": "writing", "turns": ["Name a colour."]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def settings(questions_file):
    return EvaluationConfig(
        benchmarks=(f"mine={questions_file}",), max_new_tokens=12, bootstrap_resamples=200, lossless_questions=2
    )
