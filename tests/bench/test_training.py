"""The benchmark of training counts what it says."""

import pytest
import torch

from hass_core.bench import training as bench


def test_micro_batches_share_a_step_and_the_twin_runs_beside_it():
    record = bench.bench_training(
        "tiny", bench.TrainingConfig(align_steps=2, packs_per_step=2, packs_per_micro_batch=1, tokens_per_pack=128),
        device="cpu", conversation_tokens=40, steps=2, twin=True,
    )  # fmt: skip
    assert (record["packs_per_step"], record["packs_per_micro_batch"]) == (2, 1)
    assert 128 < record["tokens_per_step"] <= 256  # pyright: ignore[reportOperatorIssue]
    assert record["twin_share_of_batch"] == 1
    assert 64 < record["twin_tokens_per_step"] <= 128  # pyright: ignore[reportOperatorIssue]
    assert record["times_twin"] > 0  # pyright: ignore[reportOperatorIssue]


def test_a_twin_that_does_not_fit_takes_half_as_much(monkeypatch):
    real, tried = bench._twin_step, []

    def small_memory(trainer, batch):
        tried.append(len(batch.token_ids))
        if len(batch.token_ids) > 4:
            raise torch.OutOfMemoryError
        real(trainer, batch)

    monkeypatch.setattr(bench, "_twin_step", small_memory)
    settings = {"tokens_per_pack": 128, "packs_per_step": 4, "align_steps": 1}
    config = bench.TrainingConfig.model_validate(settings)
    trainer = bench.make_trainer(bench.SHAPES["tiny"], config, bench.Accelerator(cpu=True))
    (talks,) = bench.make_talks(bench.SHAPES["tiny"], config, 40, packs_per_batch=4, count=1)
    record = bench.bench_twin(trainer, talks, steps=1)
    assert tried[0] == len(talks) > tried[-1] == record["twin_conversations"] <= 4
    assert record["twin_share_of_batch"] == 1 / 2 ** (len(set(tried)) - 1)

    monkeypatch.setattr(bench, "_twin_step", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        bench.bench_twin(trainer, talks, steps=1)
