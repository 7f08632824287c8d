"""The model of cost: how long each stage of a run takes, and how much memory and disk.

Everything comes from the target's sizes, the settings, and the rates below. Each rate was measured on an H100 (`from`
says where it is recorded); other GPUs are scaled by their published matrix rate and bandwidth. What no measurement
stands behind is named in `assumed`. checked.py compares the model with what was measured.

    training    FLOPs that the method needs ÷ (matrix rate × share reached at this width), optimizer, validations
    answers     a step of all rows: layers' launches + weights and caches read + products
    features    one pass over the tokens, or the writing of them, whichever is slower
    prompts     a step as for answers, or the judging of each candidate, whichever is slower
    evaluation  questions × methods × tokens at a row's own speed
"""

import math
from dataclasses import dataclass

from hass_core.config import RunConfig, Stage, TrainingConfig
from hass_core.features.sizes import Encoding, bytes_per_token
from hass_core.forecast.shape import BYTES, Shape

GIB = 2**30
WHOLE_RUN = "docs/results.md, a whole run"


@dataclass(frozen=True)
class Gpu:
    """Published figures: dense bfloat16 products with float32 sums, memory, bandwidth."""

    title: str
    flops: float
    memory: float
    bandwidth: float


GPUS = {
    "h100": Gpu("H100", 989e12, 80e9, 3.35e12),
    "h200": Gpu("H200", 989e12, 141e9, 4.8e12),
    "a100": Gpu("A100", 312e12, 80e9, 2.04e12),
    "4090": Gpu("4090", 165e12, 24e9, 1.01e12),
}


@dataclass(frozen=True)
class Rate:
    """A measured rate behind the forecast."""

    what: str
    value: float
    where: str  # it is recorded, or which run showed it


MEASURED: list[Rate] = []


def _measured(value: float, what: str, where: str) -> float:
    MEASURED.append(Rate(what, value, where))
    return value


MATRIX = _measured(0.80, "share of the published matrix rate that a large product reaches", "h100.json, matmul_tflops")
NARROW = _measured(0.363, "share of that which training reaches at width 576", "h100.json, training, smollm2-135m")
WIDE = _measured(0.631, "and at width 4096", "h100.json, training, llama3-8b")
STEADY = _measured(0.9, "share of the benchmark's training rate over a whole stage", WHOLE_RUN)
TRAINING_START = _measured(100, "seconds before the first training step and behind the last", WHOLE_RUN)
VALIDATION = _measured(5, "seconds of a validation", WHOLE_RUN)
MUON = _measured(0.005, "seconds of a step of Muon beside its products", "h100.json, training, muon and adamw")
DOUBLING = _measured(1.96, "speed-up of training from doubling the GPUs", "h100.json, training, 2 processes")
BANDWIDTH = _measured(0.92, "share of the bandwidth that decoding reaches", "h100.json, decoding, llama3-8b, plain")
LAUNCHES = _measured(1.27e-4, "seconds of a layer's launches, many rows", "h100.json, generation, and whole_run")
LAUNCHES_ONE = _measured(1.2e-5, "seconds of a layer's launches, one row", "h100.json, decoding, smollm2-135m, plain")
START = _measured(28, "seconds of starting a stage", "curve-h100.json and h100.json, whole_run, answers")
WRITING = _measured(0.77e9, "bytes of features written a second", "h100.json, features_stage_packed")
JUDGED = _measured(510, "prompt candidates judged a second, one process", "curve-h100.json, and a whole run")
EVALUATION_START = _measured(55, "seconds of an evaluation's start, and again of each method's", WHOLE_RUN)
DRAFTED = _measured(0.7, "time of a speculative method over plain decoding's", WHOLE_RUN)
KEPT = _measured(0.927, "share of answers that are kept", "curve-h100.json, 71,015 of 76,612")
LONG_ANSWER = _measured(418, "tokens of an answer that may be as long as it likes", "curve-h100.json, 295 cut at 512")
FRAME = _measured(68, "tokens of a conversation beside its answer", "curve-h100.json")
PROMPT_TOKENS = _measured(45, "tokens of a self-written prompt", "curve-h100.json, 30 words")
CANDIDATES = _measured(1.14, "candidates for a self-written prompt that is kept", "curve-h100.json")
LOSS_CHUNK = _measured(2.3 * 2**30, "bytes of 2^30 logits and what is beside them", "training-h100.json, recompute")
BESIDE = _measured(8, "bytes stored for a token beside its feature", "curve-h100.json")
CPU_RUN = "docs/results.md, on two cores: make retrain"
CPU, CPU_TARGET = "2 CPU cores", "SmolLM2-135M-Instruct"
CPU_START = _measured(304, f"seconds beside the stages: Prefect, MLflow and the gate, {CPU}", CPU_RUN)
CPU_ANSWERS = _measured(135, f"answer tokens a second of many rows, {CPU}", CPU_RUN)
CPU_FEATURES = _measured(169, f"tokens a second that features are made of, {CPU}", CPU_RUN)
CPU_TRAINING = _measured(32e9, f"FLOP/s that training reaches, {CPU}", CPU_RUN)
CPU_PLAIN = _measured(16, f"tokens a second of one row, {CPU}", CPU_RUN)
CPU_EVALUATION = _measured(108, f"seconds of an evaluation beside its answers, {CPU}", CPU_RUN)
CPU_SHAPE = (576, 1536, 30, 49_152)  # hidden, inner, layers, vocabulary of that target
ASSUMED = (
    "that an answer is as long, and as many are kept, as with SmolLM2-135M-Instruct",
    "that the share of the matrix rate stays as it is above width 4096 and on other GPUs",
    "that answers and features of several GPUs take that much less time",
)
BUILTIN_PROMPTS, HELDOUT_QUESTIONS = 612, 80
CONTEXT_SHARE = 0.68  # tokens before an answer's token, over its conversation's, where lengths vary as ours do
SHARE_OF_MEMORY = 0.9  # what may be filled
HELD = 1.5e9  # bytes: context, kernels, workspaces


@dataclass(frozen=True)
class Work:
    """How much a run has to do."""

    conversations: int
    answer_tokens: int
    tokens: int  # with prompts
    self_written: int

    @property
    def length(self) -> float:
        """Mean tokens of a conversation."""
        return self.tokens / self.conversations


def work_of(config: RunConfig, conversations: int | None = None) -> Work:
    """The amounts, from the settings; `conversations`: of files and data sets, which are not read."""
    prompts, responses = config.prompts, config.responses
    given = (BUILTIN_PROMPTS if prompts.builtin else 0) + (conversations or 0)
    written = prompts.self_written or round(given * prompts.self_written_share / (1 - prompts.self_written_share))
    asked = max(1, min(given + written, prompts.max_prompts or 2**62, responses.max_conversations or 2**62))
    kept = max(1, round(KEPT * asked))
    answer = answer_tokens(responses.max_new_tokens)
    length = min(answer + FRAME, config.features.max_tokens_per_conversation)
    return Work(kept, round(kept * answer), round(kept * length), written)


def answer_tokens(most: int) -> float:
    """Mean tokens of an answer that is cut at `most`, where it ends with the same chance at every token."""
    return LONG_ANSWER * -math.expm1(-most / LONG_ANSWER)


def share_of_matrix_rate(hidden: int) -> float:
    """Of the device's matrix rate, by width: measured at 576 and 4096, by its logarithm between, constant beyond."""
    place = math.log(hidden / 576) / math.log(4096 / 576)
    return NARROW + (WIDE - NARROW) * min(1.0, max(0.0, place))


def matrix_rate(gpu: Gpu, hidden: int) -> float:
    """FLOP/s that passes of this width reach."""
    return gpu.flops * MATRIX * share_of_matrix_rate(hidden)


def training_flops(shape: Shape, vocabulary: int, align_steps: int, answer_share: float, length: float) -> float:
    """Per token, multiply-adds as two: what the method needs (bench/training.py, needed_flops), from averages."""
    keys = 2 * shape.groups * shape.head_dim * shape.hidden
    layer = shape.layer + shape.fusion
    seen = 2 * keys if shape.head_rows else shape.fusion + keys
    trunk = 6 * (align_steps * answer_share * layer + (1 - answer_share) * seen)
    scores = 12 * align_steps * answer_share * CONTEXT_SHARE * length * shape.heads * shape.head_dim
    head = 2 * vocabulary * shape.hidden * answer_share * (1 + (3 if shape.head_rows else 2) * align_steps)
    fused = 4 * shape.taps * shape.hidden**2  # of states that are not trained
    return trunk + scores + head + fused


def optimizer_seconds(shape: Shape, optimizer: str, rate: float) -> float:
    """Of a step beside what AdamW takes: five Newton-Schulz iterations of each matrix m × n, 4m²n + 2m³ each."""
    if optimizer == "adamw":
        return 0
    h, q, k = shape.hidden, shape.heads * shape.head_dim, shape.groups * shape.head_dim
    matrices = [(h, 2 * h), (q, h), (h, q), (k, h), (k, h), *[(shape.inner, h)] * 3]
    if shape.head_rows:  # the head is AdamW's
        matrices = [(q, 2 * h), (h, q), (k, 2 * h), (k, 2 * h), *[(shape.inner, h)] * 3, (h, shape.taps * h)]
    return MUON + 5 * sum(4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3 for s in matrices) / rate


def parallel(gpus: int) -> float:
    """How many times faster so many GPUs train than one."""
    return DOUBLING ** math.log2(gpus)


def training_rate(
    shape: Shape, training: TrainingConfig, gpu: Gpu, vocabulary: int, answer_share: float, length: float
) -> float:
    """Tokens a second of one GPU's steps."""
    rate = matrix_rate(gpu, shape.hidden)
    tokens = training.packs_per_step * training.tokens_per_pack
    flops = training_flops(shape, vocabulary, training.align_steps, answer_share, length)
    return tokens / (tokens * flops / rate + optimizer_seconds(shape, training.optimizer, rate))


def training_seconds(config: RunConfig, training: TrainingConfig, shape: Shape, work: Work, gpu: Gpu, n: int) -> float:
    """One training, from its start to the stored draft."""
    tokens = training.passes * work.tokens * (1 - config.features.validation_fraction)
    steps = tokens / (training.packs_per_step * training.tokens_per_pack)
    steps, tokens = (min(steps, training.max_steps or steps) * part for part in (1, tokens / steps))
    vocabulary = min(config.draft.vocab_size or shape.vocabulary, shape.vocabulary)
    rate = training_rate(shape, training, gpu, vocabulary, work.answer_tokens / work.tokens, work.length)
    seconds = (
        tokens / (STEADY * rate * parallel(n)) + TRAINING_START + VALIDATION * steps / training.validate_every_steps
    )
    made_again = tokens * pass_flops(shape) / matrix_rate(gpu, shape.hidden) / n
    return seconds + (made_again if config.features.encoding == "none" else 0)


def pass_flops(shape: Shape) -> float:
    """Of the target's pass over a token without its head."""
    return 2.0 * shape.layers * shape.layer


def rows_that_fit(shape: Shape, gpu: Gpu, per_copy: int, length: float, most: int) -> int:
    """Rows decoded at once by one copy of the target, their caches in what its weights leave; 0: they do not fit."""
    free = per_copy * (SHARE_OF_MEMORY * gpu.memory - HELD) - shape.weight_bytes
    return max(0, min(most, int(free / (length * shape.cache_bytes))))


def gpus_per_copy(shape: Shape, gpu: Gpu) -> int:
    """GPUs over which one target must be spread: a power of two that leaves a quarter of the memory for caches."""
    needed = 1.25 * shape.weight_bytes / (SHARE_OF_MEMORY * gpu.memory - HELD)
    return 2 ** max(0, math.ceil(math.log2(needed)))


def decoding_rate(shape: Shape, gpu: Gpu, rows: int, context: float, per_copy: int = 1) -> float:
    """Tokens a second of one copy."""
    read = shape.weight_bytes + rows * context * shape.cache_bytes
    products = rows * 2 * shape.target / matrix_rate(gpu, shape.hidden)
    return rows / (shape.layers * LAUNCHES + (read / (BANDWIDTH * gpu.bandwidth) + products) / per_copy)


def plain_seconds(shape: Shape, gpu: Gpu, per_copy: int = 1) -> float:
    """Of one token, one row."""
    read = BYTES * (shape.layers * shape.layer + shape.vocabulary * shape.hidden)
    return shape.layers * LAUNCHES_ONE + read / (BANDWIDTH * gpu.bandwidth) / per_copy


def stage_seconds(config: RunConfig, shape: Shape, work: Work, gpu: Gpu, n: int) -> dict[Stage, float]:
    """Seconds of each stage on `n` GPUs of one kind; those of which they do not hold what they need are left out."""
    per_copy = gpus_per_copy(shape, gpu)
    rows = rows_that_fit(shape, gpu, per_copy, work.length, config.responses.max_sequences_per_batch)
    draft = _draft_seconds(config, shape, work, gpu, n)
    if per_copy > n or rows == 0:
        return draft
    copies = n // per_copy
    decoded = copies * decoding_rate(shape, gpu, rows, work.length / 2 + FRAME / 2, per_copy)
    passed = matrix_rate(gpu, shape.hidden) * copies / pass_flops(shape)  # spread layers work one after the other
    written = WRITING / (bytes_per_token(config.features.encoding, shape.hidden, 1 + shape.taps) + BESIDE)
    return {
        "prompts": START + CANDIDATES * work.self_written * max(PROMPT_TOKENS / decoded, 1 / JUDGED),
        "responses": START + work.answer_tokens / decoded,  # kept ones: the rate was measured so
        "features": START + work.tokens / min(passed, written),
        **draft,
        "evaluation": _evaluation_seconds(config, shape, gpu, per_copy),
    }


def _draft_seconds(config: RunConfig, shape: Shape, work: Work, gpu: Gpu, n: int) -> dict[Stage, float]:
    if memory(config, shape)["training"] > SHARE_OF_MEMORY * gpu.memory:
        return {}
    trainings = (config.pretraining, config.training)
    return {"draft": sum(training_seconds(config, each, shape, work, gpu, n) for each in trainings if each)}


def _evaluation_seconds(config: RunConfig, shape: Shape, gpu: Gpu, per_copy: int) -> float:
    tokens, times_plain = _answers_evaluated(config)
    decoding = tokens * times_plain * plain_seconds(shape, gpu, per_copy)
    return EVALUATION_START * (1 + len(config.evaluation.methods)) + decoding


def _answers_evaluated(config: RunConfig) -> tuple[float, float]:
    """Tokens that each method of an evaluation answers, and how long all methods take over plain decoding alone."""
    evaluation = config.evaluation
    asked = min(evaluation.max_questions or HELDOUT_QUESTIONS, HELDOUT_QUESTIONS) * len(evaluation.benchmarks)
    answers = asked * len(evaluation.temperatures) * evaluation.repeats
    times_plain = sum(1 if method == "plain" else DRAFTED for method in evaluation.methods)
    return answers * 0.8 * evaluation.max_new_tokens, times_plain


def cpu_seconds(config: RunConfig, shape: Shape, work: Work) -> float | None:
    """A whole retraining on two CPU cores, for the one target that was measured there; None for any other."""
    if (shape.hidden, shape.inner, shape.layers, shape.vocabulary) != CPU_SHAPE or shape.head_rows:
        return None
    vocabulary = min(config.draft.vocab_size or shape.vocabulary, shape.vocabulary)
    trained = work.tokens * (1 - config.features.validation_fraction)
    flops = (
        each.passes
        * trained
        * training_flops(shape, vocabulary, each.align_steps, work.answer_tokens / work.tokens, work.length)
        for each in (config.pretraining, config.training)
        if each
    )
    answers, times_plain = _answers_evaluated(config)
    written = CANDIDATES * work.self_written * PROMPT_TOKENS
    return (
        CPU_START
        + (written + work.answer_tokens) / CPU_ANSWERS
        + work.tokens / CPU_FEATURES
        + sum(flops) / CPU_TRAINING
        + CPU_EVALUATION
        + answers * times_plain / CPU_PLAIN
    )


def training_memory(shape: Shape, training: TrainingConfig, vocabulary: int) -> float:
    """Bytes of tensors on one GPU at the peak: weights, gradients and moments in float32; embedding and head; a chunk
    of the loss's logits; and of each token of a micro-batch what its layer keeps for the backward pass of every step,
    in 16 bits: three numbers for each of its inner width and eight for each of its outer one, or, where they are made
    again, two for each of the outer one. A compiled step also adds up gradients beside the ones it has."""
    moments = 1 if training.optimizer == "muon" else 2
    ends = (
        BYTES * shape.hidden * (shape.vocabulary + (0 if shape.tied and vocabulary == shape.vocabulary else vocabulary))
    )
    packs = min(training.packs_per_micro_batch or 2**31, training.packs_per_step)
    kept = 2 * shape.hidden if training.recompute else 3 * shape.inner + 8 * shape.hidden
    activations = BYTES * training.align_steps * kept * packs * training.tokens_per_pack
    beside = 4 * shape.draft if training.compile and training.align_steps > 1 else 0
    return 4 * (2 + moments) * shape.draft + ends + LOSS_CHUNK + activations + beside


def memory(config: RunConfig, shape: Shape) -> dict[str, float]:
    """Bytes of GPU memory by stage: of answers and features what one copy of the target needs at the least, which may
    be spread over several GPUs."""
    vocabulary = min(config.draft.vocab_size or shape.vocabulary, shape.vocabulary)
    longest = min(
        config.features.max_tokens_per_conversation, config.responses.max_new_tokens + config.prompts.max_prompt_tokens
    )
    batch = config.features.max_tokens_per_batch * BYTES * (4 * shape.hidden + 2 * shape.inner)
    return {
        "answers, one row": shape.weight_bytes + longest * shape.cache_bytes + HELD,
        "features": shape.weight_bytes + batch + HELD,
        "training": training_memory(shape, config.training, vocabulary) + HELD,
    }


def feature_bytes(shape: Shape, work: Work, encoding: Encoding) -> float:
    """On disk."""
    return work.tokens * (bytes_per_token(encoding, shape.hidden, 1 + shape.taps) + BESIDE)


def disk(config: RunConfig, shape: Shape, work: Work) -> float:
    """Bytes that the store grows by: features, and checkpoints of the training's weights and moments."""
    checkpoints = (config.training.keep_checkpoints + 1) * 12 * shape.draft
    return feature_bytes(shape, work, config.features.encoding) + checkpoints
