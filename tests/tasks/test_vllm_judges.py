"""Two vLLM servers, one with a good draft and one with a spoilt one: the gate tells them apart, and so does the watch.

Both are started by `promotion.server_command`. See CONTRIBUTING.md for HASS_VLLM_PYTHON and HASS_ORACLE_DRAFT.
"""

import itertools
import operator
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hass_core.config import EvaluationConfig, PromotionConfig, SamplingConfig, TargetConfig, TreeConfig, WatchConfig
from hass_core.data.holdout import heldout_prompts
from hass_core.data.templates import encode_prompt
from hass_core.decoding.answers import StopRule
from hass_core.decoding.decoder import PlainDecoder, SpeculativeDecoder
from hass_core.draft_model.checkpoint import draft_info, load_draft, save_draft
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import DraftModel
from hass_core.evaluation.benchmarks import Question
from hass_core.evaluation.server import Server
from hass_core.evaluation.server_duel import contest
from hass_core.evaluation.server_process import serving
from hass_core.export.exporter import export_draft
from hass_core.store import Store
from hass_core.target_model.loader import Target, load_target
from hass_core.target_model.runner import make_runner
from tasks import tracking, watch
from tasks.gate import judge
from tasks.tracking import open_retraining
from tests.oracles.fitted import fitted_draft
from tests.tasks.conftest import crowned, make_draft, make_evaluation

PYTHON = os.environ.get("HASS_VLLM_PYTHON")
DRAFT = os.environ.get("HASS_ORACLE_DRAFT")
DEPTH, NEW_TOKENS = 3, 40
CHAIN = TreeConfig(kind="chain", depth=DEPTH, top_k=1, nodes=DEPTH + 1)
COMMAND = f"""VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 exec {PYTHON} -m vllm.entrypoints.openai.api_server \\
    --model "$HASS_TARGET" --host 127.0.0.1 --port "$HASS_PORT" \\
    --dtype float32 --enforce-eager --max-model-len 512 --max-num-seqs 1 --no-enable-prefix-caching \\
    --speculative-config '{{"method": "eagle", "model": "'"$HASS_DRAFT"'", "num_speculative_tokens": '$HASS_DEPTH'}}'"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not PYTHON, reason="HASS_VLLM_PYTHON names no python with vllm-cpu (CONTRIBUTING.md)"),
]
QUESTIONS = [
    Question(benchmark="heldout", id=str(n), category="any", messages=record.messages[:1])
    for n, record in enumerate(heldout_prompts()[:5])
]


@pytest.fixture(scope="module")
def target() -> Target:
    return load_target(TargetConfig(dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def drafts(target, tmp_path_factory) -> tuple[Path, Path]:
    """A draft that knows these questions, or a trained one, and the same with noise in its weights."""
    folder = tmp_path_factory.mktemp("judge")
    model = load_draft(Path(DRAFT), target).model.float() if DRAFT else fitted(target)
    save_draft(folder / "good", model, DraftHead.from_target(target.head), draft_info(target))
    torch.manual_seed(0)
    with torch.no_grad():
        model.fc.weight.add_(torch.randn_like(model.fc.weight) * 10 * model.fc.weight.std())
    save_draft(folder / "spoilt", model, DraftHead.from_target(target.head), draft_info(target))
    return folder / "good", folder / "spoilt"


@pytest.fixture(scope="module")
def servers(target, drafts) -> Iterator[tuple[Server, Server]]:
    """vLLM with the good draft, and with the spoilt one."""
    exported = [export_draft(d, target, "vllm", d.with_name(f"{d.name}-vllm"), CHAIN, target.name) for d in drafts]
    with (
        serving(COMMAND, target.folder, exported[0], DEPTH) as good,
        serving(COMMAND, target.folder, exported[1], DEPTH) as spoilt,
    ):
        yield Server(good), Server(spoilt)


def asked(target: Target) -> list[list[int]]:
    return [encode_prompt(target.tokenizer, list(question.messages)) for question in QUESTIONS]


def fitted(target: Target) -> DraftModel:
    decoder = PlainDecoder(make_runner(target))
    answers = decoder.generate(asked(target), SamplingConfig(), NEW_TOKENS + DEPTH + 1, StopRule())
    return fitted_draft(target, asked(target), [answer.token_ids for answer in answers], steps=60)


def n_alpha(target: Target, folder: Path) -> list[float]:
    """Of our own chain with this draft on these questions."""
    decoder = SpeculativeDecoder(make_runner(target), load_draft(folder, target), CHAIN)
    stop = StopRule.of(target)
    answers = [decoder.generate([prompt], SamplingConfig(), NEW_TOKENS, stop)[0] for prompt in asked(target)]
    reached = [sum(c.accepted >= depth for a in answers for c in a.cycles) for depth in range(DEPTH + 1)]
    return [after / max(before, 1) for before, after in itertools.pairwise(reached)]


def test_the_gate_and_the_watch_tell_a_good_draft_from_a_spoilt_one(
    servers,
    target,
    drafts,
    tiny_target,
    config,
    store: Store,
    prompts,
    monkeypatch,
):
    good, spoilt = servers
    settings = EvaluationConfig(max_new_tokens=NEW_TOKENS)
    found = contest(good, spoilt, QUESTIONS, (SamplingConfig(),), 2, settings)
    tau, bad = found.challenger.tau, found.champion.tau
    assert tau is not None
    assert bad is not None
    expected = n_alpha(target, drafts[0])
    assert tau == pytest.approx(1 + sum(itertools.accumulate(expected, operator.mul)), rel=0.1)
    assert bad < 1.1 < tau
    verdict = judge(found.bouts, True, PromotionConfig(), "the champion")
    assert verdict.gain is not None
    assert verdict.gain.value > 0, verdict.markdown()

    monkeypatch.setattr(watch, "create_markdown_artifact", lambda *given, **named: None)
    told: list[str] = []
    monkeypatch.setattr(watch, "emit", lambda event, *given: told.append(event))
    with open_retraining(config, prompts, {}) as run_id:
        tags = {"hass.digest.evaluation": make_evaluation(store, expected).digest}
        crowned(config, tracking.register(config, run_id, make_draft(store, tiny_target), store, tiny_target, tags))
    for server, alarms in ((good, []), (spoilt, [watch.ACCEPTANCE_FELL])):
        rules = WatchConfig(endpoints=(f"{server.url}/metrics",), readings=2, min_drafts=10)
        for _ in range(2):
            for question in QUESTIONS[:2]:
                server.answer(question.messages, SamplingConfig(), NEW_TOKENS, 0)
            watch.watch_champion.fn(config.model_copy(update={"watch": rules}))
        assert told == alarms
