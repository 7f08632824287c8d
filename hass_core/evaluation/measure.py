"""Put questions to decoders, one question at a time to all of them, so that a machine's drift hits all alike.

For each turn of a question every method answers the same prompt, method after method, `repeats` times over. The
history of a later turn holds the plain decoder's answer: for all methods it is the target's own.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hass_core.config import EvaluationConfig, SamplingConfig
from hass_core.data.conversations import with_answers_due
from hass_core.data.dialogue import stable_hash
from hass_core.data.templates import Message, SkippedConversation, decode, encode_prompt
from hass_core.decoding.answers import CycleTrace, Generation, StopRule
from hass_core.decoding.decoder import Decoder
from hass_core.errors import BadInput, ContextTooLong, NonFinite
from hass_core.evaluation.benchmarks import Question
from hass_core.evaluation.journal import Journal
from hass_core.evaluation.metrics import Measurement
from hass_core.progress import Progress, no_progress
from hass_core.target_model.loader import Target

PLAIN = "plain"
WARM_UP_TOKENS = 32


@dataclass(frozen=True)
class Answered:
    """One method's answer to one turn, and its wall-clock seconds with prefill."""

    prompt_tokens: int
    generation: Generation
    seconds: float


class Examiner:
    """Measures a set of decoders, `plain` first among them, on questions."""

    def __init__(self, target: Target, decoders: Mapping[str, Decoder], config: EvaluationConfig):
        assert next(iter(decoders)) == PLAIN, list(decoders)
        self._target, self._decoders, self._config = target, decoders, config
        self._stop = StopRule.of(target)

    def warm_up(self, question: Question) -> None:
        """Let every decoder allocate, compile and fault in what it needs; nothing is recorded."""
        prompt = encode(self._target, question, question.messages[:1])
        tokens = min(WARM_UP_TOKENS, self._config.max_new_tokens)
        for decoder in self._decoders.values():
            for temperature in self._config.temperatures:
                decoder.generate([prompt], SamplingConfig(temperature=temperature), tokens, self._stop)

    def measure_all(
        self, questions: Sequence[Question], journal: Journal, progress: Progress = no_progress
    ) -> list[Measurement]:
        """Every question at every temperature by every method. Units found in the journal are not measured again."""
        work = [(question, t) for question in questions for t in self._config.temperatures]
        measured: list[Measurement] = []
        warm = False
        for done, (question, temperature) in enumerate(work):
            unit = f"{question.benchmark}/{question.id}@{temperature:g}"
            progress(done, len(work), f"question {question.id}")
            if unit not in journal:
                if not warm:
                    self.warm_up(question)
                    warm = True
                journal[unit] = [m.model_dump() for m in self.measure(question, temperature)]
            measured += [Measurement.model_validate(row) for row in journal[unit]]
        progress(len(work), len(work), "questions measured")
        return measured

    def measure(self, question: Question, temperature: float) -> list[Measurement]:
        """One measurement per method, over all turns of the question. Raises ContextTooLong or NonFinite naming it."""
        turns: dict[str, list[Answered]] = {name: [] for name in self._decoders}
        history: list[Message] = []
        for message, due in with_answers_due(question.messages):
            history.append(message)
            if not due:
                continue
            prompt = encode(self._target, question, history)
            if turns[PLAIN] and not self._fits(prompt):
                break  # the model's own answers filled the context: the conversation ends here
            for name, answered in self._answer(question, prompt, temperature).items():
                turns[name].append(answered)
            history.append({"role": "assistant", "content": self._text(turns[PLAIN][-1].generation)})
        return [measurement(question, temperature, name, answers) for name, answers in turns.items()]

    def _answer(self, question: Question, prompt: list[int], temperature: float) -> dict[str, Answered]:
        """The fastest of the repeats of each method."""
        best: dict[str, Answered] = {}
        sampling = SamplingConfig(temperature=temperature)
        seed = stable_hash(question.id, self._config.seed) % 2**31
        for _ in range(self._config.repeats):
            for name, decoder in self._decoders.items():
                started = time.perf_counter()
                try:
                    generation = decoder.generate([prompt], sampling, self._config.max_new_tokens, self._stop, seed)[0]
                except (ContextTooLong, NonFinite) as error:
                    raise type(error)(f"{name} on question {question.id} of {question.benchmark}: {error}") from error
                seconds = time.perf_counter() - started
                if name not in best or seconds < best[name].seconds:
                    best[name] = Answered(len(prompt), generation, seconds)
        return best

    def _fits(self, prompt: list[int]) -> bool:
        return len(prompt) + self._config.max_new_tokens <= self._target.context_tokens

    def _text(self, generation: Generation) -> str:
        ended = generation.finished == "eos"
        return decode(self._target.tokenizer, generation.token_ids[:-1] if ended else generation.token_ids)


def encode(target: Target, question: Question, messages: Sequence[Message]) -> list[int]:
    """Prompt ids of a question's conversation so far. Raises BadInput when the target's template refuses it."""
    try:
        return encode_prompt(target.tokenizer, messages)
    except SkippedConversation as problem:
        raise BadInput(
            f"question {question.id} of {question.benchmark} cannot be asked of {target.name}: {problem.reason}"
        ) from problem


def check_lengths(target: Target, questions: Iterable[Question], config: EvaluationConfig) -> None:
    """Raise ContextTooLong for the first question whose opening and answer exceed the target's context."""
    for question in questions:
        first = next(i for i, (_, due) in enumerate(with_answers_due(question.messages)) if due)
        tokens = len(encode(target, question, question.messages[: first + 1]))
        if tokens + config.max_new_tokens > target.context_tokens:
            raise ContextTooLong(
                f"question {question.id} of {question.benchmark} has {tokens} prompt tokens; with "
                f"evaluation.max_new_tokens = {config.max_new_tokens} that is more than the "
                f" {target.context_tokens} tokens of {target.name}'s context; shorten the question or the answers"
            )


def cycles_of(generation: Generation) -> list[CycleTrace]:
    """The trace of an answer; plain decoding leaves none, each token after the first is a cycle without drafts."""
    return generation.cycles or [CycleTrace(accepted=0, drafted_depth=0)] * (len(generation.token_ids) - 1)


def measurement(question: Question, temperature: float, method: str, turns: Sequence[Answered]) -> Measurement:
    """The turns of one question added up."""
    cycles = [cycle for turn in turns for cycle in cycles_of(turn.generation)]
    return Measurement(
        benchmark=question.benchmark,
        question=question.id,
        category=question.category,
        temperature=temperature,
        method=method,
        prompt_tokens=sum(turn.prompt_tokens for turn in turns),
        new_tokens=sum(len(turn.generation.token_ids) for turn in turns),
        seconds=sum(turn.seconds for turn in turns),
        decode_seconds=sum(turn.generation.decode_seconds for turn in turns),
        accepted=[cycle.accepted for cycle in cycles],
        drafted_depth=[cycle.drafted_depth for cycle in cycles],
        ranks=[rank for cycle in cycles for rank in cycle.ranks],
        offered=[number for cycle in cycles for number in cycle.offered],
        token_ids=[turn.generation.token_ids for turn in turns],
    )
