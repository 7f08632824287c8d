"""Features from servers: those of the target's own pass, or refused. The servers here speak as vLLM does, over HTTP."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hass_core.config import RunConfig, parse_config
from hass_core.data.engines import openai
from hass_core.errors import ConfigError, NonFinite, TargetError
from hass_core.features.extract import extract_features
from hass_core.features.reader import FeatureDataset
from hass_core.target_model.loader import freeze
from tests.conftest import byte_tokenizer, tiny_llama
from tests.features.conftest import responses_artifact

Change = Callable[[dict[str, Any]], dict[str, Any] | bytes | int]
"""What is sent and written for a request → the same, other bytes to send, or a status."""


class StatesServer(ThreadingHTTPServer):
    """As vLLM with extract_hidden_states: answers token ids by one token and a file with the states after
    the layers `taps` and behind `layer`."""

    daemon_threads = True

    def __init__(
        self, model: Any, folder: Path, change: Change = lambda made: made, layer: int = -1,
        taps: tuple[int, ...] = ()
    ):  # fmt: skip
        super().__init__(("127.0.0.1", 0), Asked)
        self.model = deepcopy(model)  # the test's process uses its own meanwhile
        self.folder, self.change, self.requests = folder, change, 0
        self.layers = [*(tap - 1 for tap in taps), layer]
        self.lock = threading.Lock()
        self.told = folder  # where it says that its files are

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Asked(BaseHTTPRequestHandler):
    server: StatesServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self.reply(200, json.dumps({"data": [{"id": "tiny"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("tiny", 1, 0)
        with self.server.lock:
            self.server.requests += 1
            made = self.server.change(self.made(body["prompt"]))
            reply = self.written(made) if isinstance(made, dict) else made
        if isinstance(reply, int):
            self.reply(reply, b'{"error": {"message": "too long"}}')
        else:
            self.reply(200, reply)

    def written(self, made: dict[str, Any]) -> bytes:
        file = f"cmpl-{self.server.server_port}-{self.server.requests}.safetensors"
        (self.server.folder / f"{file}.lock").touch()
        save_file({key: made[key] for key in ("hidden_states", "token_ids")}, self.server.folder / file)
        told = {"hidden_states_path": str(self.server.told / file)}
        return json.dumps({"choices": [{"token_ids": [made["token"]]}], "kv_transfer_params": told}).encode()

    @torch.no_grad()
    def made(self, ids: list[int]) -> dict[str, Any]:
        decoder, found = self.server.model.model, []
        layers = [decoder.layers[number] for number in self.server.layers]
        hooks = [layer.register_forward_hook(lambda m, i, out: found.append(out)) for layer in layers]
        last = decoder(torch.tensor([ids])).last_hidden_state[0, -1]
        for hook in hooks:
            hook.remove()
        states = torch.stack([(out[0] if isinstance(out, tuple) else out)[0] for out in found], 1)
        token = int(self.server.model.lm_head(last).argmax())
        return {"hidden_states": states, "token_ids": torch.tensor(ids), "token": token}

    def reply(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serving(*servers: StatesServer) -> Iterator[None]:
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "states").mkdir()
    return tmp_path / "states"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch) -> None:
    monkeypatch.setattr(openai, "FIRST_PAUSE_SECONDS", 0.01)


def settings(folder: Path, *urls: str, **more: Any) -> RunConfig:
    features = {"engine": "vllm", "server_urls": urls, "server_folder": str(folder), "server_concurrency": 1} | more
    return parse_config({"features": {"validation_fraction": 0.2} | features})


def rows_of(store, artifact) -> dict[str, Any]:
    dataset = FeatureDataset(store, artifact)
    return {dataset[i].id: dataset[i] for i in range(len(dataset))}


def test_they_are_those_of_the_targets_own_pass_and_leave_no_file_behind(tiny_target, store, config, rows, folder):
    responses = responses_artifact(store, rows, parts=2)
    one, other = StatesServer(tiny_target.model, folder), StatesServer(tiny_target.model, folder)
    one.told = other.told = Path("/on/the/servers/machine")
    with serving(one, other):
        served = extract_features(settings(folder, one.url, other.url), responses, store, tiny_target)
    own = extract_features(config, responses, store, tiny_target)
    assert served.digest != own.digest
    theirs, ours = rows_of(store, served), rows_of(store, own)
    assert theirs.keys() == ours.keys()
    for name, row in ours.items():
        assert theirs[name].token_ids.tolist() == row.token_ids.tolist()
        torch.testing.assert_close(theirs[name].features, row.features, rtol=0.02, atol=0.02)
    assert min(one.requests, other.requests) > 0
    assert list(folder.iterdir()) == []


def test_states_that_a_draft_fuses_come_with_the_last_one(store, rows, folder):
    target = freeze(tiny_llama(num_hidden_layers=5), byte_tokenizer(), name="tiny")
    responses, draft = responses_artifact(store, rows), {"architecture": "eagle3", "taps": [1, 3]}
    right = StatesServer(target.model, folder, taps=(1, 3))
    with serving(right):
        config = settings(folder, right.url)
        config = config.model_copy(update={"draft": parse_config({"draft": draft}).draft})
        served = rows_of(store, extract_features(config, responses, store, target))
    own = parse_config({"features": {"validation_fraction": 0.2}, "draft": draft})
    for name, row in rows_of(store, extract_features(own, responses, store, target)).items():
        torch.testing.assert_close(served[name].features, row.features, rtol=0.02, atol=0.02)
        torch.testing.assert_close(served[name].taps, row.taps, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("taps", "says"),
    [
        ((2, 3), "as the states after layer 1 is nearer to those after layer 2"),
        ((), '"eagle_aux_hidden_state_layer_ids": [1, 3, 5]'),
    ],
)
def test_other_states_than_the_draft_fuses_are_refused(store, rows, folder, taps, says):
    target = freeze(tiny_llama(num_hidden_layers=5), byte_tokenizer(), name="tiny")
    wrong, draft = StatesServer(target.model, folder, taps=taps), {"architecture": "eagle3", "taps": [1, 3]}
    config = settings(folder, wrong.url).model_copy(update={"draft": parse_config({"draft": draft}).draft})
    with serving(wrong), pytest.raises(TargetError, match=re.escape(says)):
        extract_features(config, responses_artifact(store, rows), store, target)


def test_states_of_the_next_layer_are_refused_where_a_layer_changes_little(store, rows, folder):
    model = tiny_llama(num_hidden_layers=5)
    for layer in model.model.layers:  # as deep in a large target: within what rounding may do
        layer.self_attn.o_proj.weight.data *= 0.02
        layer.mlp.down_proj.weight.data *= 0.02
    target, wrong = freeze(model, byte_tokenizer(), name="tiny"), StatesServer(model, folder, taps=(2, 4))
    config = settings(folder, wrong.url).model_copy(
        update={"draft": parse_config({"draft": {"architecture": "eagle3", "taps": [1, 3]}}).draft}
    )
    with serving(wrong), pytest.raises(TargetError, match="after layer 1 is nearer to those after layer 2"):
        extract_features(config, responses_artifact(store, rows), store, target)


def test_a_lost_server_costs_no_row(tiny_target, store, rows, folder):
    living = StatesServer(tiny_target.model, folder)
    dying = StatesServer(tiny_target.model, folder, lambda made: made if dying.requests < 4 else 503)
    with serving(living, dying):
        artifact = extract_features(
            settings(folder, dying.url, living.url), responses_artifact(store, rows), store, tiny_target
        )
    assert artifact.summary["conversations"] == len(rows)


def test_finished_parts_are_kept_when_a_server_dies(tiny_target, store, rows, folder):
    responses = responses_artifact(store, rows, parts=3)
    server = StatesServer(tiny_target.model, folder, lambda made: made if server.requests < 17 else 500)
    with serving(server):
        with pytest.raises(TargetError, match=r"answered 500.*finished parts are kept"):
            extract_features(settings(folder, server.url), responses, store, tiny_target)
        asked, server.change = server.requests, lambda made: made
        extract_features(settings(folder, server.url), responses, store, tiny_target)
    # the forecast asks twice for one row; then come each part's rows
    assert asked > 2 + 10
    assert server.requests - asked == 2 + 2 * 10


def scaled(made: dict[str, Any]) -> dict[str, Any]:
    """The right direction of the last state, which alone decides the token; other rows are anything."""
    states = made["hidden_states"].clone()
    states[:-1] = torch.randn_like(states[:-1])
    return made | {"hidden_states": states}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda made: b"<html>sign in", TargetError, r"gives no hidden states, it said 'sign in'"),
        (lambda made: b'{"choices": [{"token_ids": [5]}]}', TargetError, r"extract_hidden_states"),
        (lambda made: 400, TargetError, r"conversation \d+ of the sample, \d+ tokens.*answered 400.*too long"),
        (scaled, TargetError, r"are not those of .* apart"),
        (
            lambda made: made | {"token_ids": made["token_ids"] + 1},
            TargetError,
            r"states of other tokens than it was asked for",
        ),
        (
            lambda made: made | {"hidden_states": made["hidden_states"].repeat(1, 3, 1)},
            TargetError,
            r"wrote \[\d+, 3, 48\] for \[\d+, 1, 48\].*layer_ids\": \[2\]",
        ),
        (
            lambda made: made | {"hidden_states": made["hidden_states"] * torch.nan},
            NonFinite,
            r"conversation .*NaN or infinite",
        ),
    ],
)  # fmt: skip
def test_what_is_no_hidden_state_of_the_target_is_refused(tiny_target, store, rows, folder, change, error, match):
    server = StatesServer(tiny_target.model, folder, change)
    with serving(server), pytest.raises(error, match=match):
        extract_features(settings(folder, server.url), responses_artifact(store, rows), store, tiny_target)


def test_a_server_that_is_right_only_until_its_cache_is_warm_is_refused(tiny_target, store, rows, folder):
    """What each row ends with fits all the time, and the first requests, the forecast's among them, are right."""
    server = StatesServer(tiny_target.model, folder, lambda made: made if server.requests <= 3 else scaled(made))
    with serving(server), pytest.raises(TargetError, match=r"conversation c\d+: .* are not those of"):
        extract_features(settings(folder, server.url), responses_artifact(store, rows), store, tiny_target)


@pytest.mark.parametrize(("seed", "layer"), [(0, 0), (1, -1)])
def test_another_layer_or_another_model_is_refused(tiny_target, store, rows, folder, seed, layer):
    server = StatesServer(tiny_llama(seed=seed), folder, layer=layer)
    with serving(server), pytest.raises(TargetError, match=r"must run .* layer 2|are not those of"):
        extract_features(settings(folder, server.url), responses_artifact(store, rows), store, tiny_target)


def test_a_file_outside_the_folder_is_neither_read_nor_removed(tiny_target, store, rows, folder, tmp_path):
    server = StatesServer(tiny_target.model, folder)
    server.folder = server.told = tmp_path  # it says so, and the file is there
    with serving(server), pytest.raises(TargetError, match=r"cannot be read.*shared_storage_path"):
        extract_features(settings(folder, server.url), responses_artifact(store, rows), store, tiny_target)
    assert list(tmp_path.glob("*.safetensors"))


def test_what_is_not_there_is_told_before_any_request(tiny_target, store, rows, folder):
    responses = responses_artifact(store, rows)
    with pytest.raises(TargetError, match=r"no folder of this machine"):
        extract_features(settings(folder / "no", "http://127.0.0.1:1/v1"), responses, store, tiny_target)
    with pytest.raises(TargetError, match=r"127.0.0.1:1.*features.server_model"):
        extract_features(settings(folder, "http://127.0.0.1:1/v1"), responses, store, tiny_target)
    with pytest.raises(ConfigError, match=r"needs features.server_urls and features.server_folder"):
        parse_config({"features": {"engine": "vllm"}})
    with pytest.raises(ConfigError, match=r"servers make them before"):
        settings(folder, "http://127.0.0.1:1/v1", encoding="none")


def test_a_target_whose_norm_is_elsewhere_is_refused(tiny_target, store, rows, folder):
    model = tiny_llama()
    del model.model.norm
    target = replace(tiny_target, model=model)
    with pytest.raises(TargetError, match=r"no final norm"):
        extract_features(settings(folder, "http://127.0.0.1:1/v1"), responses_artifact(store, rows), store, target)
