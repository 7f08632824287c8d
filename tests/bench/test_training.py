"""The benchmark of training counts what it says."""

import pytest
import torch

from hass_core.bench import training as bench


def test_micro_batches_share_a_step_and_the_twin_runs_beside_it():
    record = bench.bench_training(
        "tiny", bench.TrainingConfig(align_steps=2, accumulation_steps=2, tokens_per_pack=128),
        device="cpu", conversation_tokens=40, steps=2, twin=True,
    )  # fmt: skip
    assert record["accumulation_steps"] == 2
    assert 128 < record["tokens_per_step"] <= 256  # pyright: ignore[reportOperatorIssue]
    assert record["twin_packs_per_batch"] == 1
    assert 64 < record["twin_tokens_per_step"] <= 128  # pyright: ignore[reportOperatorIssue]
    assert record["times_twin"] > 0  # pyright: ignore[reportOperatorIssue]


def test_a_twin_that_does_not_fit_takes_half_as_much(monkeypatch):
    real, tried = bench._twin_step, []

    def small_memory(run, batch):
        tried.append(len(batch.token_ids))
        if len(batch.token_ids) > 4:
            raise torch.OutOfMemoryError
        real(run, batch)

    monkeypatch.setattr(bench, "_twin_step", small_memory)
    settings = {"tokens_per_pack": 128, "packs_per_batch": 4, "align_steps": 1}
    config = bench.TrainingConfig.model_validate(settings)
    run = bench._make_run(bench.SHAPES["tiny"], config, bench.Accelerator(cpu=True), None)
    (talks,) = bench._talks(bench.SHAPES["tiny"], config, 40, count=1)
    record = bench.bench_twin(run, talks, steps=1)
    assert tried[0] == len(talks) > tried[-1] == record["twin_conversations"] <= 4
    assert record["twin_packs_per_batch"] == 4 / 2 ** (len(set(tried)) - 1)

    monkeypatch.setattr(bench, "_twin_step", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        bench.bench_twin(run, talks, steps=1)
