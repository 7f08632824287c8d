"""The responses stage: every prompt is answered or accounted for, and nothing finished is done twice."""

import json

import pyarrow.parquet as pq
import pytest

from hass_core.config import ResponsesConfig, RunConfig, SamplingShare, parse_config
from hass_core.data import responses
from hass_core.data.conversations import Record
from hass_core.data.dialogue import Dialogue, choose_sampling
from hass_core.data.engines.base import Completion
from hass_core.data.prompts import collect_prompts
from hass_core.data.responses import generate_responses
from hass_core.data.templates import encode_conversation, supervised_runs, tokenize
from hass_core.errors import HassError
from hass_core.features.tokenise import encode_part
from hass_core.target_model.loader import freeze
from tests.conftest import byte_tokenizer
from tests.data.test_askable import CALLED, TOOL, WITH_TOOLS
from tests.data.test_templates import NEXT_ROLE_ENDS, with_template

TOPICS = ["rivers", "stars", "bread", "violins", "glass", "volcanoes", "chess", "honey", "trains", "ink", "sleep"]
END = 2


@pytest.fixture
def run(tmp_path) -> RunConfig:
    """Eleven prompts, the last with two turns and a system message."""
    rows = [{"id": topic, "prompt": f"Tell me something surprising about {topic} please."} for topic in TOPICS[:-1]]
    turns = [("system", "Be brief."), ("user", f"What is known about {TOPICS[-1]}?"), ("user", "And what is not?")]
    rows.append({"id": TOPICS[-1], "messages": [{"role": role, "content": text} for role, text in turns]})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parse_config(
        {
            "prompts": {"builtin": False, "files": [str(file)]},
            "responses": {
                "max_new_tokens": 24,
                "conversations_per_shard": 4,
                "max_sequences_per_batch": 3,
                "drop_repetitive": False,
                "sampling": [{"share": 0.5, "temperature": 0.0}, {"share": 0.5, "temperature": 1.0}],
            },
        }
    )


def rows_of(artifact) -> list[dict]:
    names = [f"part-{i:05d}.parquet" for i in range(3)]
    return [row for name in names for row in pq.read_table(f"{artifact.url}/{name}").to_pylist()]


class Script:
    """An engine that answers from a function of the request."""

    def __init__(self, answer):
        self.answer = answer

    def complete(self, queue):
        while requests := queue.take(2):
            for request in requests:
                token_ids = self.answer(request)
                error = token_ids if isinstance(token_ids, str) else None
                ids = [] if error else token_ids
                yield Completion(request.key, ids, finished=bool(ids) and ids[-1] == END, error=error)


def test_all_prompts_are_answered_in_order_with_the_exact_ids(run, store, tiny_target):
    artifact = generate_responses(run, collect_prompts(run, store, tiny_target), store, tiny_target)
    rows = rows_of(artifact)
    answered = [row["id"] for row in rows]
    assert artifact.summary["conversations"] + artifact.summary["skipped"] == len(TOPICS)
    assert answered == [f"rows/{t}" for t in TOPICS if f"rows/{t}" in answered]
    assert artifact.summary["response_tokens"] == sum(row["num_new_tokens"] for row in rows)
    for row in rows:
        encoded = encode_conversation(tiny_target.tokenizer, row["messages"], row["answer_token_ids"])
        assert supervised_runs(encoded) == row["answer_token_ids"]
        assert row["finished"] == all(ids[-1] == END for ids in row["answer_token_ids"])


def answer_with(text: str, tokenizer) -> list[int]:
    return [*tokenize(tokenizer, text), END]


def test_each_turn_sees_the_answers_before_it(run, store, tiny_target, monkeypatch):
    prompts = collect_prompts(run, store, tiny_target)
    seen = {}

    def answer(request):
        seen[len(request.messages), request.key] = request
        return answer_with(f"Answer {len(request.messages)}", tiny_target.tokenizer)

    monkeypatch.setattr(responses, "make_engine", lambda config, target: Script(answer))
    rows = rows_of(generate_responses(run, prompts, store, tiny_target))
    assert [message["content"] for message in rows[-1]["messages"]] == [
        "Be brief.",
        "What is known about sleep?",
        "Answer 2",
        "And what is not?",
        "Answer 4",
    ]
    second = seen[4, "rows/sleep"]
    assert second.messages[2] == {"role": "assistant", "content": "Answer 2"}
    first_ids = rows[-1]["answer_token_ids"][0]
    assert any(
        second.prompt_token_ids[i : i + len(first_ids)] == first_ids for i in range(len(second.prompt_token_ids))
    )


def test_bad_answers_are_skipped_with_reasons_and_the_counts_reconcile(run, store, tiny_target, monkeypatch):
    prompts = collect_prompts(run, store, tiny_target)
    run = run.model_copy(update={"responses": run.responses.model_copy(update={"drop_repetitive": True})})
    text = answer_with("A sound answer.", tiny_target.tokenizer)
    bad = {
        "rows/rivers": [END],
        "rows/stars": [50, 51, 52] * 30,
        "rows/bread": [50, 1, 51],
        "rows/glass": "server answered 500",
    }
    monkeypatch.setattr(responses, "make_engine", lambda config, target: Script(lambda r: bad.get(r.key, text)))
    artifact = generate_responses(run, prompts, store, tiny_target)
    assert {row["id"]: row["reason"] for row in pq.read_table(f"{artifact.url}/skipped.parquet").to_pylist()} == {
        "rows/rivers": "empty answer",
        "rows/stars": "repetitive answer",
        "rows/bread": "chat marker inside the answer",
        "rows/glass": "server answered 500",
    }
    assert artifact.summary["conversations"] == len(TOPICS) - 4
    assert artifact.summary["skipped/empty answer"] == 1


def test_when_nothing_is_answered_the_stage_fails_and_says_why(run, store, tiny_target, monkeypatch):
    prompts = collect_prompts(run, store, tiny_target)
    monkeypatch.setattr(responses, "make_engine", lambda config, target: Script(lambda request: [END]))
    with pytest.raises(HassError, match="no prompt was answered: 11 × empty answer; check the target"):
        generate_responses(run, prompts, store, tiny_target)


def test_an_engine_that_forgets_requests_is_noticed(run, store, tiny_target, monkeypatch):
    class Forgetful(Script):
        def complete(self, queue):
            queue.take(1)
            yield from super().complete(queue)

    prompts = collect_prompts(run, store, tiny_target)
    answer = answer_with("Fine.", tiny_target.tokenizer)
    monkeypatch.setattr(responses, "make_engine", lambda config, target: Forgetful(lambda request: answer))
    with pytest.raises(HassError, match="1 shards of answers were left open"):
        generate_responses(run, prompts, store, tiny_target)


def test_counts_that_do_not_reconcile_fail_the_stage(run, store, tiny_target, monkeypatch):
    prompts = collect_prompts(run, store, tiny_target)
    answer = answer_with("Fine.", tiny_target.tokenizer)
    monkeypatch.setattr(responses, "make_engine", lambda config, target: Script(lambda request: answer))
    monkeypatch.setattr(Dialogue, "row", lambda self: {"num_new_tokens": 1, "finished": True, "id": self.record.id})
    write = responses._Run._write

    def losing(self, name):
        self._shards[name].pop()
        write(self, name)

    monkeypatch.setattr(responses._Run, "_write", losing)
    with pytest.raises(HassError, match="11 prompts went in, but 8 answered \\+ 0 skipped came out; remove"):
        generate_responses(run, prompts, store, tiny_target)


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 5, 10])
def test_an_interrupted_run_continues_and_answers_nothing_twice(
    run, store, tiny_target, tmp_path, monkeypatch, stop_at
):
    prompts = collect_prompts(run, store, tiny_target)
    asked = []

    def answer(request):
        asked.append((request.key, len(request.messages)))
        return answer_with(f"Answer to {request.key}", tiny_target.tokenizer)

    monkeypatch.setattr(responses, "make_engine", lambda config, target: Script(answer))

    def stop(done: int, total: int, note: str) -> None:
        if done == stop_at:
            raise Stop

    with pytest.raises(Stop):
        generate_responses(run, prompts, store, tiny_target, stop)
    before = len(asked)
    artifact = generate_responses(run, prompts, store, tiny_target)
    assert len(rows_of(artifact)) == len(TOPICS)
    repeated = set(asked[:before]) & set(asked[before:])
    assert len(repeated) <= 2  # only what was in flight
    assert len(asked) == len(TOPICS) + 1 + len(repeated)


def test_a_finished_stage_is_returned_without_work(run, store, tiny_target, monkeypatch):
    prompts = collect_prompts(run, store, tiny_target)
    artifact = generate_responses(run, prompts, store, tiny_target)
    monkeypatch.setattr(responses, "make_engine", None)
    assert generate_responses(run, prompts, store, tiny_target) == artifact


def test_settings_of_speed_alone_do_not_change_the_artifact(run, store, tiny_target):
    prompts = collect_prompts(run, store, tiny_target)
    artifact = generate_responses(run, prompts, store, tiny_target)
    faster = run.model_copy(update={"responses": run.responses.model_copy(update={"max_sequences_per_batch": 7})})
    assert generate_responses(faster, prompts, store, tiny_target).digest == artifact.digest


def dialogue(run: RunConfig, *messages: tuple[str, str]) -> Dialogue:
    record = Record("x", "general", "test", tuple({"role": role, "content": text} for role, text in messages))
    return Dialogue(record, run.responses, seed=0)


OTHER_ENDS = {
    "<|im_end|>": "the answer ends with <|im_end|>, not with <|im_start|>",
    "": "the answer breaks off before <|im_start|>",
}


@pytest.mark.parametrize("end", OTHER_ENDS)
def test_where_the_next_role_ends_an_answer_every_kept_one_ends_with_its_token(end):
    tokenizer = with_template(NEXT_ROLE_ENDS)
    turns = tuple({"role": "user", "content": text} for text in ("Name a colour.", "And one more?"))
    record = Record("file/1", "general", "file", turns)
    sound = Completion("file/1", tokenize(tokenizer, "Red.<|im_start|>"), finished=True)
    other = Completion("file/1", tokenize(tokenizer, "Red." + end), finished=bool(end))
    alone, second = Dialogue(record, ResponsesConfig(), 0), Dialogue(record, ResponsesConfig(), 0)
    for dialogue, answers in ((alone, [other]), (second, [sound, other])):
        for answer in answers:
            assert dialogue.next_request(tokenizer, 512) is not None
            dialogue.accept(answer, tokenizer)
        assert dialogue.next_request(tokenizer, 512) is None
    assert alone.problem == OTHER_ENDS[end]
    assert second.problem is None
    row = second.row()
    assert [message["content"] for message in row["messages"]] == ["Name a colour.", "Red."]
    encoded = encode_conversation(tokenizer, row["messages"], row["answer_token_ids"])
    assert supervised_runs(encoded) == [sound.token_ids]


def test_an_answer_beyond_the_targets_context_is_a_reason_to_skip():
    record = Record("file/1", "general", "file", ({"role": "user", "content": "Name a colour."},))
    dialogue = Dialogue(record, ResponsesConfig(), 0)
    dialogue.next_request(byte_tokenizer(), 80)
    dialogue.accept(Completion("file/1", [*[50] * 80, END], finished=True), byte_tokenizer())
    assert dialogue.problem == "longer than the target's context"


def test_a_prompt_longer_than_the_context_is_skipped(run, tiny_target):
    talk = dialogue(run, ("user", "word " * 200))
    assert talk.next_request(tiny_target.tokenizer, context_tokens=512) is None
    assert talk.problem == "longer than the target's context"


def test_a_later_turn_that_does_not_fit_ends_the_conversation_there(run, tiny_target):
    tokenizer = tiny_target.tokenizer
    talk = dialogue(run, ("user", "Short?"), ("user", "word " * 200))
    request = talk.next_request(tokenizer, context_tokens=512)
    assert request is not None
    talk.accept(Completion("x", answer_with("Yes.", tokenizer), finished=True), tokenizer)
    assert talk.next_request(tokenizer, context_tokens=512) is None
    assert talk.problem is None
    assert [message["content"] for message in talk.row()["messages"]] == ["Short?", "Yes."]


def test_a_tool_call_of_the_prompt_is_kept_and_not_answered_anew(run, tiny_target):
    tokenizer = tiny_target.tokenizer
    talk = dialogue(run, ("user", "Q"), ("assistant", "call()"), ("tool", "4"))
    request = talk.next_request(tokenizer, context_tokens=512)
    assert request is not None
    assert [message["role"] for message in request.messages] == ["user", "assistant", "tool"]
    talk.accept(Completion("x", answer_with("four", tokenizer), finished=True), tokenizer)
    assert talk.next_request(tokenizer, context_tokens=512) is None
    assert talk.row()["answer_token_ids"][0] == []
    assert talk.row()["finished"]


def test_the_sampling_mix_keeps_its_shares_and_each_conversation_its_setting():
    mix = (SamplingShare(share=0.2, temperature=0.0), SamplingShare(share=0.8, temperature=1.0))
    chosen = [choose_sampling(f"id-{i}", mix).temperature for i in range(5000)]
    assert 0.18 < chosen.count(0.0) / 5000 < 0.22
    assert chosen[:50] == [choose_sampling(f"id-{i}", mix).temperature for i in range(50)]


def test_tools_and_calls_pass_through_the_stages_to_the_tokens(run, store, tiny_target, tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = WITH_TOOLS
    target = freeze(tiny_target.model, tokenizer, name="tiny")
    file = tmp_path / "calls.jsonl"
    file.write_text(json.dumps({"id": "c", "messages": CALLED, "tools": [TOOL]}) + "\n")
    run = run.model_copy(update={"prompts": run.prompts.model_copy(update={"files": (str(file),)})})
    asked = []

    def answer(request):
        asked.append(request)
        return answer_with("High.", tokenizer)

    monkeypatch.setattr(responses, "make_engine", lambda config, target: Script(answer))
    artifact = generate_responses(run, collect_prompts(run, store, target), store, target)
    part = encode_part("part", store.open(artifact).local_path("part-00000.parquet"), tokenizer, run.features)
    (encoded,) = part.conversations
    assert encoded.token_ids.tolist() == asked[0].prompt_token_ids + answer_with("High.", tokenizer)
    text = tokenizer.decode(encoded.token_ids)
    assert '"name": "tide"' in text
    assert '"arguments": {"port": "Brest"}' in text
    assert asked[0].tools == (TOOL,)


def test_when_nothing_is_answered_the_next_run_asks_again(run, store, tiny_target, monkeypatch):
    prompts = collect_prompts(run, store, tiny_target)
    monkeypatch.setattr(responses, "make_engine", lambda config, target: Script(lambda request: "server answered 500"))
    with pytest.raises(HassError, match="11 × server answered 500"):
        generate_responses(run, prompts, store, tiny_target)
    sound = answer_with("Fine.", tiny_target.tokenizer)
    monkeypatch.setattr(responses, "make_engine", lambda config, target: Script(lambda request: sound))
    assert generate_responses(run, prompts, store, tiny_target).summary["conversations"] == len(TOPICS)
