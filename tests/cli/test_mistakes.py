"""A user's mistake is one sentence on stderr and exit status 2, told before torch loads where none is needed."""

from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hass_core.config import RunConfig, load_config, parse_config
from hass_core.errors import ConfigError
from tests.cli.conftest import command

BEFORE_TORCH = """
hass nonsense                                                | No such command 'nonsense'
hass --nonsense                                              | No such option: --nonsense
hass doctor                                                  | Missing command
hass run nothing                                             | 'nothing' is not one of 'prompts', 'responses'
hass run draft -c smollm3                                    | no preset named 'smollm3'
hass run draft -c SmolLM2-CPU                                | did you mean smollm2-cpu?
hass run draft -c missing.toml                               | missing.toml does not exist
hass run draft -c broken.toml                                | broken.toml: not valid TOML
hass run draft -c latin.toml                                 | latin.toml: not valid TOML
hass run draft -c deep.toml                                  | deep.toml: not valid TOML
hass run draft -c folder.toml                                | folder.toml cannot be read
hass run draft -s training=5                                 | this is a section; name a setting in it
hass run draft -s training=5 -s training.passes=2            | training is 5, not a section
hass run draft -s training.passes                            | not of the form section.key=value
hass run draft -s training.pases=2                           | command line: training.pases: no such setting; did
hass run draft -s align_steps=2                              | did you mean training.align_steps?
hass run draft -s tree.passes=2                              | tree.passes: no such setting; did you mean training.pas
hass run draft -c none.toml                                  | a file has no word for none; leave the line out
hass run draft -s training.passes=none                       | training.passes = None: input should be a valid number
hass store ls -s store=file                                  | there is no store at
hass store size -s store=nowhere                             | there is no store at
hass run draft -s training.passes=many                       | training.passes = 'many'
hass run draft -s training.passes=nan                        | training.passes = nan
hass run draft -s training.passes=0                          | greater than 0
hass run draft -s training.betas=[2,2]                       | training.betas.0 = 2
hass run draft -s target.device=gpu                          | target.device = 'gpu': not one of auto, cpu, cuda
hass run draft -s target.source=/missing                     | the target '/missing' does not exist
hass run draft -s target.source=file                         | the target file is a file
hass run draft -s target.source=half                         | half/config.json is not valid JSON
hass run draft -s target.source=empty                        | empty/config.json is missing
hass run draft -s target.source=missing.gguf                 | GGUF file missing.gguf does not exist
hass run draft -s target.source=package:no-such-thing        | the package no-such-thing is not installed
hass run draft -s store=                                     | store = ''
hass run prompts -s prompts.files=[""]                       | prompts.files.0 = ''
hass run prompts -s prompts.datasets=[""]                    | prompts.datasets.0 = ''
hass run prompts -s seed=99999999999999999999                | seed = 99999999999999999999
hass run prompts -s store=nowhere://x                        | the store nowhere://x cannot be used
hass run prompts -s store=s3://                              | names no place; give it as s3://BUCKET/PREFIX
hass run responses -s responses.server_url=localhost:8000    | no address; give it as http://HOST:PORT
hass run responses -s responses.server_url=http://me@h/v1    | holds the name of a user
hass run draft -s store=file/below                           | cannot write to the store
hass run draft -s draft.warm_start=missing                   | the draft missing is missing
hass run draft -s evaluation.temperatures=[1e-300]           | cannot be computed with
hass run draft -s evaluation.benchmarks=[]                   | evaluation.benchmarks
hass run draft -s evaluation.benchmarks=["missing.jsonl"]    | no benchmark 'missing.jsonl': neither a file
hass run prompts -s prompts.files=["missing.jsonl"]          | missing.jsonl: no such file; check prompts.files
hass run prompts -s prompts.files=["logs-*/2026.jsonl"]      | no such file; check prompts.files
hass run prompts -s prompts.files=["empty"]                  | empty: no file of conversations there
hass evaluate draft                                          | Missing option '--out'
hass evaluate missing -o out                                 | the draft missing is missing
hass evaluate file -o out                                    | the draft file is a file
hass evaluate empty -o out                                   | empty/config.json is missing
hass evaluate list -o out                                    | list/config.json holds no JSON object
hass evaluate draft -o file                                  | file is a file; name a folder
hass evaluate draft -o out --methods plain,medusa            | 'medusa'
hass evaluate draft -o out --methods eagle2                  | the method eagle2 needs a draft of its own
hass evaluate sps=draft -o out                               | the method hass needs a draft
hass evaluate pld=draft -o out                               | no method 'pld' takes a draft
hass evaluate draft draft -o out                             | two drafts for the method hass
hass evaluate draft -o out --temperatures hot                | evaluation.temperatures
hass evaluate draft -o out --temperatures -1                 | greater than or equal to 0
hass evaluate draft -o out -s training=5                     | this is a section
hass evaluate draft -o out --benchmarks x=missing            | no benchmark 'x=missing': neither a file
hass evaluate draft -o out --rows 1,0                        | --rows takes whole numbers from 1 to 1024
hass evaluate draft -o out --engine vllm --engine-python sh --chains x | --chains takes whole numbers from 1 to 16
hass evaluate draft -o out --engine sglang                   | --engine starts vllm only, not sglang
hass evaluate draft -o out --engine vllm --engine-python no/python | no environment with vllm was found
hass evaluate draft -o out --plain-server http://host:8000   | --plain-server goes with --server
hass evaluate draft -o out --server x --engine vllm          | give one of them
hass chat missing                                            | the draft missing is missing
hass chat --depth 17                                         | depth = 17
hass chat --nodes 1                                          | nodes = 1
hass chat --temperature nan                                  | temperature = nan
hass chat --max-new-tokens 0                                 | '--max-new-tokens'
hass serve --port 99999                                      | '--port'
hass serve --host 0.0.0.0                                    | 0.0.0.0 is reachable by others
hass serve --api-key-file missing                            | missing is missing, empty or not a text
hass serve --api-key-file key                                | cannot be sent in a header
hass serve file                                              | the draft file is a file
hass plan missing                                            | the draft missing is missing
hass plan draft --rows 99999999999999                        | '--rows'
hass plan draft --rows 0                                     | '--rows'
hass plan draft -o missing/plan.json                         | there is no folder missing
hass export draft --engine tensorrt -o out                   | 'tensorrt' is not one of 'vllm', 'sglang', 'eagle'
hass export draft --engine vllm -o out --steps 17            | depth = 17
hass export draft --engine vllm -o file                      | file is a file
hass export draft --engine vllm -o target                    | holds something other than a former export
hass export draft --engine vllm -o draft/vllm/../..          | is or holds the draft to read
hass import draft -o target                                  | holds something other than a former export
hass import half -o out                                      | half/config.json is not valid JSON
hass import draft -o out -t /missing                         | the target '/missing' does not exist
hass doctor draft draft --engine foo                         | 'foo' is not one of
hass doctor data nowhere                                     | give one of the form STORE/features/DIGEST
hass doctor data store/features/0123                         | has no manifest.json
hass doctor acceptance draft --temperature -1                | temperature = -1
hass doctor acceptance draft --questions missing             | no benchmark 'missing': neither a file
hass doctor acceptance draft --trained-template latin.toml   | latin.toml is no text of UTF-8
hass doctor acceptance draft --trained-tokens 0              | '--trained-tokens'
hass doctor acceptance draft --trained-template missing      | '--trained-template'
hass bench decode --rows 0                                   | '--rows'
hass bench decode --depth 17                                 | tree.depth = 17
hass bench decode missing                                    | the draft missing is missing
hass bench decode -s tree=5                                  | this is a section
hass bench train --shape big                                 | 'big' is not one of
hass bench train --optimizer sgd                             | training.optimizer = 'sgd'
hass bench train --device gpu                                | target.device = 'gpu'
hass bench train -c missing.toml                             | missing.toml does not exist
hass bench features --encoding none                          | stores nothing
hass bench features --folder missing                         | there is no folder missing
flows.retrain smollm2-cpu training=5                         | this is a section
flows.retrain -c smollm3                                     | no preset named 'smollm3'
flows.retrain smollm2-cpu -c smollm2-gpu                     | two presets
flows.retrain smollm2-cpu -s target.device=gpu               | target.device = 'gpu'
flows.retrain --nonsense                                     | unrecognized arguments: --nonsense
flows.generate_data prompts.max_prompts=0                    | prompts.max_prompts = 0
flows.extract_features broken.toml                           | not valid TOML
flows.train_draft training.passes=many                       | the command line: training.passes = 'many'
flows.evaluate_draft evaluation.methods=["medusa"]           | 'medusa'
flows.export_draft engine=tensorrt                           | engine = 'tensorrt'
flows.export_draft folder=../escape                          | folder = '../escape'
flows.promote_draft version=abc                              | version = 'abc'
flows.promote_draft -p version=0                             | version = '0'
flows.rollback_draft seed=-1                                 | seed = -1
flows.relay                                                  | flows.relay is no command of a terminal; these are:
"""
WITH_TORCH = """
hass chat -t target draft                                    | model.safetensors is not a readable
hass chat -t target noweights                                | noweights/model.safetensors is missing
hass chat -t target target                                   | target holds no draft
hass run prompts -s target.source=notokens -s store=s        | the target 'notokens' has no tokenizer; put
hass init target -o new.toml -p missing.jsonl                | missing.jsonl: no such file
hass init notokens -o new.toml                               | the target 'notokens' has no tokenizer; put
hass init noweights -o new.toml                              | cannot load the target 'noweights'
hass init qwen/qwen3-8 -o new.toml                           | did you mean Qwen/Qwen3-8B?
hass init qwen3-8b -o new.toml                               | did you mean Qwen/Qwen3-8B?
hass plan draft -t target                                    | model.safetensors is not a readable
hass evaluate draft -o out -s target.source=target --benchmarks asked.jsonl | not a readable
hass export draft --engine vllm -t target -o out             | draft
hass import noweights -t target -o imported                  | noweights
hass run prompts -s target.source=garbage.gguf -s store=s    | garbage.gguf
"""


def lines(text: str) -> list[tuple[str, str]]:
    return [(line.split("|")[0].strip(), line.split("|")[1].strip()) for line in text.strip().splitlines()]


def assert_one_sentence(told, says: str) -> None:
    assert told.status == 2, told.error
    assert "Traceback" not in told.error
    assert told.out == ""
    (sentence,) = told.error.strip().splitlines()
    assert sentence.startswith("error: ")
    assert says in sentence


@pytest.mark.parametrize(("line", "says"), lines(BEFORE_TORCH))
def test_a_bad_command_line_is_told_before_torch_loads(bad, line, says):
    told = command(bad, line)
    assert_one_sentence(told, says)
    assert not told.loaded_torch


@pytest.mark.slow
@pytest.mark.parametrize(("line", "says"), lines(WITH_TORCH))
def test_a_file_that_is_not_what_it_should_be_is_told_in_one_sentence(bad, line, says):
    assert_one_sentence(command(bad, line, with_torch=True), says)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_a_gpu_that_is_not_there_is_told(bad):
    line = "hass run prompts -s target.source=target -s target.device=cuda -s store=s"
    assert_one_sentence(command(bad, line, with_torch=True), "no GPU")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)
SECTIONS = st.sampled_from(sorted(RunConfig.model_fields))
NAMES = SECTIONS | st.sampled_from(
    [f"{section}.{name}" for section, field in RunConfig.model_fields.items()
     for name in getattr(field.annotation, "model_fields", ())]
) | st.text(max_size=8)  # fmt: skip


@given(st.dictionaries(SECTIONS | st.text(max_size=8), VALUES, max_size=4))
def test_any_settings_are_taken_or_refused(values):
    with suppress(ConfigError):
        assert parse_config(values)


@given(st.lists(st.builds("{}={}".format, NAMES, st.text(max_size=12) | VALUES.map(str)) | st.text(), max_size=3))
def test_any_overrides_are_taken_or_refused(overrides):
    with suppress(ConfigError):
        assert load_config("smollm2-cpu", overrides)


@given(st.binary(max_size=60))
def test_any_bytes_as_a_settings_file_are_taken_or_refused(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_bytes(content)
    with suppress(ConfigError):
        assert load_config(file)
