"""The planner's arithmetic, and a plan made by really measuring a tiny model."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from hass_core.bench import decoding as bench
from hass_core.bench.decoding import bench_decode
from hass_core.cli.app import app
from hass_core.config import SamplingConfig, TreeConfig
from hass_core.decoding import planner
from hass_core.decoding.answers import StopRule
from hass_core.decoding.decoder import PlainDecoder, SpeculativeDecoder
from hass_core.decoding.drafter import Drafter
from hass_core.decoding.planner import (
    LARGEST,
    Choice,
    Costs,
    FixedTree,
    Plan,
    PlannedDecoder,
    Record,
    choose_decoder,
    cycle_seconds,
    make_plan,
    observe,
)
from hass_core.draft_model.checkpoint import draft_info, save_draft
from hass_core.errors import BadInput
from hass_core.target_model.runner import make_runner
from tests.decoding.conftest import ENDLESS, random_draft


def test_a_smaller_tree_gains_the_accepted_nodes_it_would_have_held():
    # by score: child rank 0, its child rank 0, child rank 1, grandchild rank 2 of the first
    record = Record(nodes=[(1, 0, 7), (2, 0, 9), (1, 1, 3), (2, 2, 40)], accepted=[0, 3])
    assert record.gained(depth=2, top_k=3, nodes=5) == 3
    assert record.gained(depth=2, top_k=3, nodes=4) == 2  # the grandchild stands fourth
    assert record.gained(depth=1, top_k=3, nodes=5) == 2
    assert record.gained(depth=2, top_k=2, nodes=5) == 2
    assert record.gained(depth=2, top_k=3, nodes=2) == 2
    assert record.gained(depth=2, top_k=3, nodes=5, vocabulary=41) == 3
    assert record.gained(depth=2, top_k=3, nodes=5, vocabulary=40) == 2  # the grandchild's token is too rare
    assert record.gained(depth=2, top_k=3, nodes=4, vocabulary=9) == 2
    assert record.gained(depth=2, top_k=3, nodes=5, vocabulary=7) == 1


def test_costs_between_measured_sizes_are_interpolated():
    costs = Costs(plain=1.0, verify={2: 1.0, 4: 2.0}, draft={1: (0.1, 0.2), 4: (0.3, 0.4)})
    assert costs.cycle(depth=3, top_k=1, nodes=3) == 1.5 + 0.1 + 2 * 0.2
    assert costs.cycle(depth=1, top_k=6, nodes=9) == 2.0 + 0.3


def test_a_smaller_vocabulary_saves_at_every_level_and_never_more_than_the_level_costs():
    costs = Costs(plain=1.0, verify={2: 1.0}, draft={1: (0.5, 0.25)}, saved={64: 0.25, 32: 0.375})
    assert costs.cycle(depth=3, top_k=1, nodes=2, vocabulary=64) == 1.0 + 0.25
    assert costs.cycle(depth=3, top_k=1, nodes=2, vocabulary=32) == 1.0 + 0.125


def test_observed_cycles_account_for_the_decoders_own_acceptance(tiny_target, prompts):
    runner, draft = make_runner(tiny_target), random_draft(tiny_target)
    records = observe(runner, draft, prompts[:2], ENDLESS, 40)
    decoder = SpeculativeDecoder(runner, draft, LARGEST)
    own = [c for p in prompts[:2] for c in decoder.generate([p], SamplingConfig(), 40, ENDLESS)[0].cycles]
    assert [r.gained(LARGEST.depth, LARGEST.top_k, LARGEST.nodes) for r in records] == [1 + c.accepted for c in own]
    assert any(c.accepted for c in own)


def test_a_plan_is_measured_serialises_and_gives_a_tree_to_decode_with(tiny_target, prompts):
    runner, draft = make_runner(tiny_target), random_draft(tiny_target)
    plan = make_plan(runner, draft, prompts[:1], ENDLESS, max_new_tokens=16)
    assert Plan.model_validate(json.loads(plan.model_dump_json())) == plan
    assert plan.best.tokens_per_second == max(choice.tokens_per_second for choice in plan.curve)
    assert plan.pays == (plan.best.tokens_per_second > plan.plain_tokens_per_second)
    SpeculativeDecoder(runner, draft, plan.tree()).generate(prompts[:1], SamplingConfig(), 8, ENDLESS)


def made_up_seconds(runner, drafter, rows, **options):
    """A cycle in which a level takes 2 ms: a tiny model's is lost among what else the machine does."""
    levels = drafter.shape.depth if isinstance(drafter, Drafter) else 0
    return 0.001 + 0.00001 * drafter.shape.nodes + 0.002 * levels


def test_a_plan_may_confine_the_draft_to_frequent_tokens(tiny_target, prompts, monkeypatch):
    monkeypatch.setattr(planner, "VOCABULARIES", (64, 32))
    seconds = {64: 0.0, 32: 0.001}
    monkeypatch.setattr(planner, "_saved", lambda draft, drafted: seconds)
    monkeypatch.setattr(planner, "cycle_seconds", made_up_seconds)
    runner = make_runner(tiny_target)
    answer = PlainDecoder(runner).generate(prompts[:1], SamplingConfig(), 24, ENDLESS)[0].token_ids
    frequent = torch.tensor(list(dict.fromkeys(answer + list(range(runner.vocab_size)))))
    draft = replace(random_draft(tiny_target), ranks=frequent)
    plan = make_plan(runner, draft, prompts[:1], ENDLESS, max_new_tokens=16)
    assert plan.best.vocabulary == 32  # it holds every token of the answer, and saves most
    narrow = SpeculativeDecoder(runner, draft, plan.tree())
    assert narrow.generate(prompts[:1], SamplingConfig(), 24, ENDLESS)[0].token_ids == answer


def test_a_plan_for_a_draft_in_eight_bits_decodes_with_it(tiny_target, prompts):
    runner, draft = make_runner(tiny_target), random_draft(tiny_target)
    plan = make_plan(runner, replace(draft, eight_bits=True), prompts[:1], ENDLESS, max_new_tokens=8)
    assert plan.tree().eight_bits
    assert not make_plan(runner, draft, prompts[:1], ENDLESS, max_new_tokens=8).tree().eight_bits


def test_a_plan_that_does_not_pay_decodes_plainly(tiny_target, prompts):
    runner, draft = make_runner(tiny_target), random_draft(tiny_target)
    decoder, plans = choose_decoder(runner, draft, prompts[:1], ENDLESS)
    assert [plan.temperature for plan in plans] == [0.0, 1.0]
    assert [decoder.at(t).name for t in (0.0, 0.7, 1.0)] == ["hass" if plans[i].pays else "plain" for i in (0, 1, 1)]
    assert decoder.at(1.5).name == "plain"
    sampling = SamplingConfig(temperature=0.7, seed=3)
    (planned,) = decoder.generate(prompts[:1], sampling, 12, ENDLESS)
    assert planned.token_ids == PlainDecoder(runner).generate(prompts[:1], sampling, 12, ENDLESS)[0].token_ids
    never, always = (plans[0].model_copy(update={"plain_tokens_per_second": speed}) for speed in (1e9, 1e-9))
    chosen = [PlannedDecoder(runner, draft, [p]).at(0.0) for p in (never, always)]
    assert [type(d) for d in chosen] == [PlainDecoder, SpeculativeDecoder]
    plain, speculative = (d.generate(prompts[:2], SamplingConfig(), 12, ENDLESS) for d in chosen)
    assert [g.token_ids for g in plain] == [g.token_ids for g in speculative]


def test_the_cost_of_verifying_can_be_measured_where_the_target_repeats_itself(tiny_target):
    with torch.no_grad():
        kept = tiny_target.head.clone()
        tiny_target.head.zero_()  # every draw is token 0, the root token of the next cycle
    try:
        assert cycle_seconds(make_runner(tiny_target), FixedTree(24), cycles=2, context=16) > 0
    finally:
        with torch.no_grad():
            tiny_target.head.copy_(kept)


def test_the_benchmark_counts_what_was_decoded(tiny_target, prompts):
    draft, tree = random_draft(tiny_target), TreeConfig(depth=2, nodes=8)
    record = bench_decode(tiny_target, prompts[:2], draft, tree, 12)
    assert record.same_tokens
    decoder = SpeculativeDecoder(make_runner(tiny_target), draft, tree)
    answers = [decoder.generate([prompt], SamplingConfig(), 12, ENDLESS)[0] for prompt in prompts[:2]]
    accepted = [cycle.accepted for answer in answers for cycle in answer.cycles]
    assert record.tau == pytest.approx(1 + sum(accepted) / len(accepted), abs=1e-4)
    assert record.share_of_limit > 0
    assert record.cycle_ms is not None
    assert record.draft_ms is not None
    assert record.draft_ms > 0  # a mean beside a median: one slow cycle makes it the larger
    assert record.overhead_ms is not None
    assert record.overhead_ms >= 0


@pytest.mark.parametrize("count", [8, 16, 64, 72])
def test_the_benchmark_measures_as_many_prompts_as_rows_and_plans_on_others(tiny_target, count):
    measured, planned = bench._prompts(tiny_target, count)
    assert len(measured) == count
    assert len(planned) == bench.PLANNED_ON
    assert not {tuple(prompt) for prompt in measured} & {tuple(prompt) for prompt in planned}


def test_more_rows_than_prompts_are_refused(tiny_target):
    with pytest.raises(BadInput, match="asks for 73 prompts, and 72 are packaged"):
        bench._prompts(tiny_target, 73)


@pytest.mark.parametrize("pays", [True, False])
def test_the_benchmark_decodes_plainly_where_no_tree_wins(monkeypatch, capsys, tmp_path, tiny_target, pays):
    draft = random_draft(tiny_target)
    save_draft(tmp_path, draft.model, draft.head, draft_info(tiny_target))
    choice = Choice(depth=2, top_k=2, nodes=4, tau=1.5, cycle_ms=1.0, tokens_per_second=100.0)
    plain = 99.0 if pays else 101.0
    plan = Plan(device="cpu", dtype="float32", rows=1, plain_tokens_per_second=plain, best=choice, curve=[choice])
    monkeypatch.setattr(bench, "load_target", lambda config: tiny_target)
    monkeypatch.setattr(bench, "make_plan", lambda *arguments: plan)
    options = f"bench decode {tmp_path} --target tiny --plan --questions 2 --max-new-tokens 4"
    app(options.split(), standalone_mode=False)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["plain_tokens_per_second"] > 0
    assert (record["tree"] and record["tree"]["nodes"]) == (4 if pays else None)
    assert (record["speculative_tokens_per_second"] is not None) == pays


def test_hass_plan_prints_the_curve_and_writes_it(monkeypatch, tmp_path, tiny_target):
    draft = random_draft(tiny_target)
    save_draft(tmp_path / "draft", draft.model, draft.head, draft_info(tiny_target))
    monkeypatch.setattr("hass_core.target_model.loader.load_target", lambda config: tiny_target)
    monkeypatch.setattr("hass_core.evaluation.steps.planning_prompts", lambda target: [[5, 6, 7]])
    result = CliRunner().invoke(
        app, ["plan", str(tmp_path / "draft"), "--target", "tiny", "-o", str(tmp_path / "plan.json")]
    )
    assert result.exit_code == 0, result.output
    plan = Plan.model_validate_json((tmp_path / "plan.json").read_text())
    assert f"best {plan.best.tokens_per_second:.1f}" in result.output


def test_a_plan_counts_no_cycle_after_the_end_of_an_answer(tiny_target, prompts):
    runner, draft = make_runner(tiny_target), random_draft(tiny_target)
    (answer,) = PlainDecoder(runner).generate(prompts[:1], SamplingConfig(), 40, ENDLESS)
    end = next(token for token in answer.token_ids[3:] if token not in answer.token_ids[:3])
    stop = StopRule(frozenset({end}))
    ended = observe(runner, draft, prompts[:1], stop, 40)
    emitted = 1 + sum(r.gained(LARGEST.depth, LARGEST.top_k, LARGEST.nodes) for r in ended)
    at_end = answer.token_ids.index(end) + 1
    assert at_end <= emitted <= at_end + LARGEST.depth  # the last cycle may have seen further
    assert len(ended) < len(observe(runner, draft, prompts[:1], ENDLESS, 40))


def test_a_plan_over_answers_that_end_at_once_decodes_plainly(tiny_target, prompts, monkeypatch):
    monkeypatch.setattr(planner, "cycle_seconds", made_up_seconds)
    runner, draft = make_runner(tiny_target), random_draft(tiny_target)
    plan = make_plan(runner, draft, prompts[:1], StopRule(frozenset(range(runner.vocab_size))))
    assert plan.best.tau == 1
    assert not plan.pays
