"""Put questions to decoders, one question at a time to all of them, so that a machine's drift hits all alike.

For each turn of a question every method answers the same prompt, method after method, `repeats` times over. The
history of a later turn holds the first method's answer: for all methods it is the target's own.

Nothing is compiled or captured while the clock runs: every method first answers prompts of all lengths, and an answer
during which something was compiled all the same is asked for again.
"""

import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hass_core.compilations import compilations
from hass_core.config import EvaluationConfig, SamplingConfig
from hass_core.data.conversations import with_answers_due
from hass_core.data.dialogue import stable_hash
from hass_core.data.templates import Message, SkippedConversation, decode, encode_prompt
from hass_core.decoding.answers import CycleTrace, Generation, StopRule
from hass_core.decoding.decoder import Decoder
from hass_core.errors import BadInput, ContextTooLong, NonFinite
from hass_core.evaluation.benchmarks import Question
from hass_core.evaluation.metrics import Measurement
from hass_core.progress import Progress, no_progress
from hass_core.store.journal import Journal
from hass_core.target_model.loader import Target

WARM_UP_TOKENS = 32
WARM_UP_STRIDE = 256  # tokens; no CUDA graph of a cycle is wider than another by less
CHAT_MARKS = 16  # tokens that a template may put around a turn
ATTEMPTS = 5  # to answer without compiling


@dataclass(frozen=True)
class Answered:
    """One method's answer to one turn, its wall-clock seconds with prefill, and what was compiled meanwhile."""

    prompt_tokens: int
    generation: Generation
    seconds: float
    compilations: int = 0


class Examiner:
    """Measures a set of decoders on questions; the first one's answers are the history of later turns."""

    def __init__(self, target: Target, decoders: Mapping[str, Decoder], config: EvaluationConfig):
        self._target, self._decoders, self._config = target, decoders, config
        self._stop = StopRule.of(target)

    def warm_up(self, questions: Sequence[Question], sampling: SamplingConfig) -> None:
        """Let every decoder allocate, compile and capture what these questions need; nothing is recorded.

        The longest prompt comes first, so that the decoders' memory is made once.
        """
        tokens = min(WARM_UP_TOKENS, self._config.max_new_tokens)
        for prompt in self._warming_prompts(questions, tokens):
            for decoder in self._decoders.values():
                decoder.generate([prompt], sampling, tokens, StopRule())

    def measure_all(
        self, questions: Sequence[Question], journal: Journal, progress: Progress = no_progress
    ) -> list[Measurement]:
        """Every question at every temperature by every method. Units found in the journal are not measured again."""
        work = [(question, t) for t in self._config.temperatures for question in questions]
        measured: list[Measurement] = []
        warm: float | None = None
        for done, (question, temperature) in enumerate(work):
            unit = f"{question.benchmark}/{question.id}@{temperature:g}"
            progress(done, len(work), f"question {question.id}")
            if unit not in journal:
                sampling = SamplingConfig(temperature=temperature)
                if warm != temperature:
                    self.warm_up(questions, sampling)
                    warm = temperature
                journal[unit] = [m.model_dump() for m in self.measure(question, sampling)]
            measured += [Measurement.model_validate(row) for row in journal[unit]]
        progress(len(work), len(work), "questions measured")
        return measured

    def measure(self, question: Question, sampling: SamplingConfig, lap: int = 0) -> list[Measurement]:
        """One measurement per method, over all turns of the question. Raises ContextTooLong or NonFinite naming it.

        Another `lap` draws other tokens, where tokens are drawn. Which method begins differs from question to question.
        """
        turns: dict[str, list[Answered]] = {name: [] for name in self._decoders}
        spokesman = next(iter(self._decoders))
        history: list[Message] = []
        for message, due in with_answers_due(question.messages):
            history.append(message)
            if not due:
                continue
            prompt = encode(self._target, question, history)
            if turns[spokesman] and not self._fits(prompt):
                break  # the model's own answers filled the context: the conversation ends here
            for name, answered in self._answer(question, prompt, sampling, lap).items():
                turns[name].append(answered)
            history.append({"role": "assistant", "content": self._text(turns[spokesman][-1].generation)})
        return [measurement(question, sampling.temperature, name, answers) for name, answers in turns.items()]

    def _answer(self, question: Question, prompt: list[int], sampling: SamplingConfig, lap: int) -> dict[str, Answered]:
        """The fastest of the repeats of each method."""
        best: dict[str, Answered] = {}
        seed = stable_hash(question.id, self._config.seed + lap) % 2**31
        begin = stable_hash(question.id, self._config.seed) + lap
        names = list(self._decoders)
        for repeat in range(self._config.repeats):
            first = (begin + repeat) % len(names)
            for name in names[first:] + names[:first]:
                try:
                    answered = self._timed(self._decoders[name], prompt, sampling, seed)
                except (ContextTooLong, NonFinite) as error:
                    raise type(error)(f"{name} on question {question.id} of {question.benchmark}: {error}") from error
                if name not in best or answered.seconds < best[name].seconds:
                    best[name] = answered
        return best

    def _timed(self, decoder: Decoder, prompt: list[int], sampling: SamplingConfig, seed: int) -> Answered:
        """The answer, asked for again while answering it compiles or captures something."""
        for _ in range(ATTEMPTS):
            before, started = compilations(), time.perf_counter()
            (generation,) = decoder.generate([prompt], sampling, self._config.max_new_tokens, self._stop, seed)
            seconds = time.perf_counter() - started
            answered = Answered(len(prompt), generation, seconds, compilations() - before)
            if not answered.compilations:
                break
        return answered

    def _warming_prompts(self, questions: Sequence[Question], new_tokens: int) -> list[list[int]]:
        """Prompts as long as the longest conversation becomes, and on a GPU of each shorter width down to one."""
        openings = [encode(self._target, question, opening(question)) for question in questions]
        longest = max(map(self._most_tokens, questions, openings)) - new_tokens
        stride = WARM_UP_STRIDE if self._target.device.type == "cuda" else longest
        text = max(openings, key=len)
        repeated = text * -(-longest // len(text))
        return [repeated[:length] for length in range(longest, 0, -stride)]

    def _most_tokens(self, question: Question, first: Sequence[int]) -> int:
        """Tokens of a conversation, answers included, that it does not exceed."""
        later = question.messages[len(opening(question)) :]
        texts = [len(self._target.tokenizer.encode(m["content"])) + CHAT_MARKS for m in later]
        answers = sum(due for _, due in with_answers_due(question.messages))
        tokens = len(first) + sum(texts) + answers * self._config.max_new_tokens
        return min(tokens, self._target.context_tokens)

    def _fits(self, prompt: list[int]) -> bool:
        return len(prompt) + self._config.max_new_tokens <= self._target.context_tokens

    def _text(self, generation: Generation) -> str:
        ended = generation.finished == "eos"
        return decode(self._target.tokenizer, generation.token_ids[:-1] if ended else generation.token_ids)


def opening(question: Question) -> tuple[Message, ...]:
    """The messages before the first answer."""
    first = next(i for i, (_, due) in enumerate(with_answers_due(question.messages)) if due)
    return question.messages[: first + 1]


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
        tokens = len(encode(target, question, opening(question)))
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
        compilations=sum(turn.compilations for turn in turns),
        accepted=[cycle.accepted for cycle in cycles],
        drafted_depth=[cycle.drafted_depth for cycle in cycles],
        ranks=[rank for cycle in cycles for rank in cycle.ranks],
        offered=[number for cycle in cycles for number in cycle.offered],
        token_ids=[turn.generation.token_ids for turn in turns],
    )


def device_name(device: torch.device) -> str:
    """The hardware, as far as it decides speed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
