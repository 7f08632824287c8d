"""One evaluation's measuring, step by step; each finished step is written down, and not repeated after a crash.

plan ─► questions, all methods ─► chain drafting (n-α) ─► outputs compared ─► transformers' generate
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hass_core.config import EvaluationConfig, SamplingConfig, TreeConfig
from hass_core.data.holdout import TRAINING_FILE, packaged_prompts
from hass_core.data.templates import encode_prompt
from hass_core.decoding.answers import StopRule
from hass_core.decoding.planner import LARGEST, Plan, make_plan
from hass_core.draft_model.checkpoint import load_draft
from hass_core.draft_model.files import read_config
from hass_core.evaluation.benchmarks import Question
from hass_core.evaluation.lossless import Certificate, Prompt, certify, dtype_name, in_float32
from hass_core.evaluation.measure import Examiner, check_lengths, device_name, encode, opening
from hass_core.evaluation.method_names import EAGLE, EAGLE2, HASS, PLAIN, check_methods, draft_folder
from hass_core.evaluation.methods import build_decoders
from hass_core.evaluation.metrics import Measurement
from hass_core.evaluation.report import Estimator, Report
from hass_core.memory import release_unused
from hass_core.progress import Progress
from hass_core.sampling import DRAWS_VERSION
from hass_core.store.journal import Journal
from hass_core.store.provenance import provenance
from hass_core.target_model.loader import Target
from hass_core.target_model.runner import make_runner

DRAFTED = (HASS, EAGLE2, EAGLE)  # methods with a draft model, the first one present is compared and chained
CHAIN_DEPTH = 5
PLANNING_PROMPTS, PLANNING_TOKENS = 6, 64


@dataclass(frozen=True)
class Evaluation:
    """Everything that is measured and told in one evaluation. Finished steps are kept in `scratch`."""

    target: Target
    questions: Sequence[Question]
    drafts: Mapping[str, Path]  # by method
    config: EvaluationConfig
    tree: TreeConfig
    training_prompts_known: bool
    scratch: Path

    def run(self, progress: Progress) -> tuple[Report, list[Measurement]]:
        """Check, measure, and put the report together. Raises ConfigError, BadInput or ContextTooLong before that."""
        check_methods(self.config.methods, self.drafts)
        check_lengths(self.target, self.questions, self.config)
        plan, tree = self._plan(progress)
        decoders = build_decoders(self.target, self.config.methods, self.drafts, tree)
        measured = Examiner(self.target, decoders, self.config).measure_all(self.questions, self._journal, progress)
        del decoders  # each holds the target's weights once more
        estimator = Estimator(measured, self.config.bootstrap_resamples, self.config.seed)
        exact, same = self._certificates(tree, progress)
        asked = [question.benchmark for question in self.questions]
        report = Report(
            target=self.target.name,
            target_fingerprint=self.target.fingerprint,
            draft=read_config(self.drafts[HASS]).get("hass") or {} if HASS in self.drafts else {},
            device=device_name(self.target.device),
            dtype=dtype_name(self.target),
            tree=tree,
            plan=plan,
            max_new_tokens=self.config.max_new_tokens,
            repeats=self.config.repeats,
            benchmarks={name: asked.count(name) for name in dict.fromkeys(asked)},
            scores=estimator.scores(),
            comparisons=estimator.comparisons(self._main) if self._main else [],
            n_alpha=estimator.n_alpha(self._chain(progress)) if self._main else [],
            tree_use=estimator.tree_use(self._main) if self._main else [],
            lossless=exact,
            same_precision=same,
            generate_tokens_per_second=self._step("generate", self._generate),
            compilations=sum(m.compilations for m in measured),
            leak_checked=self.training_prompts_known,
            provenance=provenance(),
            draws=DRAWS_VERSION,
        )
        return report, measured

    @cached_property
    def _journal(self) -> Journal:
        return Journal(self.scratch / "measured.jsonl", synced=True)

    @property
    def _main(self) -> str | None:
        """The method that is compared and chained; None where only rivals without a draft are measured."""
        return next((method for method in DRAFTED if method in self.config.methods), None)

    @property
    def _few(self) -> Sequence[Question]:
        return self.questions[: self.config.lossless_questions]

    def _step(self, name: str, work: Callable[[], Any]) -> Any:
        """The JSON-able result of one step, from the journal when it was finished before."""
        if name not in self._journal:
            self._journal[name] = work()
            release_unused()
        return self._journal[name]

    def _plan(self, progress: Progress) -> tuple[Plan | None, TreeConfig]:
        """The tree to decode with: as set, or chosen by measuring this machine and draft on training prompts."""
        if not self.tree.plan or self._main is None:
            return None, self.tree
        folder = draft_folder(self._main, self.drafts)

        def work() -> dict[str, Any]:
            progress(0, 1, "choosing the tree")
            prompts = planning_prompts(self.target)
            draft = load_draft(folder, self.target).set_by(self.tree)
            runner, stop = make_runner(self.target), StopRule.of(self.target)
            return make_plan(runner, draft, prompts, stop, max_new_tokens=PLANNING_TOKENS).model_dump()

        plan = Plan.model_validate(self._step("plan", work))
        return plan, plan.tree()

    def _chain(self, progress: Progress) -> list[Measurement]:
        """The main draft as a chain on a few questions, greedily: what n-α is computed from."""
        config = self.config.model_copy(update={"temperatures": (0.0,), "repeats": 1, "methods": (self._main,)})
        tree = TreeConfig(kind="chain", depth=CHAIN_DEPTH, top_k=1, nodes=CHAIN_DEPTH + 1)

        def work() -> list[dict[str, Any]]:
            decoders = build_decoders(self.target, config.methods, self.drafts, tree)
            examiner = Examiner(self.target, decoders, config)
            measured = []
            for done, question in enumerate(self._few):
                progress(done, len(self._few), "chain drafting")
                measured += [
                    m.model_dump() for m in examiner.measure(question, SamplingConfig()) if m.method == self._main
                ]
            return measured

        return [Measurement.model_validate(row) for row in self._step("chain", work)]

    def _certificates(self, tree: TreeConfig, progress: Progress) -> tuple[Certificate | None, Certificate | None]:
        """Outputs compared in float32, and in the precision measured when that is another."""
        if self._main is None:
            return None, None

        def work() -> list[dict[str, Any]]:
            exact = in_float32(self.target)
            return [
                self._certificate(target, exact, tree, progress).model_dump()
                for target in ([exact] if exact is self.target else [exact, self.target])
            ]

        found = [Certificate.model_validate(row) for row in self._step("lossless", work)]
        return found[0], found[1] if len(found) > 1 else None

    def _certificate(self, target: Target, exact: Target, tree: TreeConfig, progress: Progress) -> Certificate:
        assert self._main is not None
        decoders = build_decoders(target, [self._main], self.drafts, tree)
        prompts = [self._opening(question) for question in self._few]
        return certify(
            target,
            exact,
            decoders[PLAIN],
            decoders[self._main],
            prompts,
            self.config.max_new_tokens,
            tuple(dict.fromkeys((0.0, *self.config.temperatures))),
            progress,
        )

    def _opening(self, question: Question) -> Prompt:
        """A question's first turn."""
        return question.id, encode(self.target, question, opening(question))

    def _generate(self) -> float:
        """Tokens per second of transformers' own greedy `generate` on the first question: a reference, no baseline."""
        prompt = torch.tensor([self._opening(self.questions[0])[1]], device=self.target.device)
        options: dict[str, Any] = {"do_sample": False, "attention_mask": torch.ones_like(prompt)}
        limit = self.config.max_new_tokens
        self.target.model.generate(prompt, max_new_tokens=2, **options)  # pyright: ignore[reportCallIssue]
        started = time.perf_counter()
        answer = self.target.model.generate(prompt, max_new_tokens=limit, **options)  # pyright: ignore[reportCallIssue]
        return (answer.shape[1] - prompt.shape[1]) / (time.perf_counter() - started)


def planning_prompts(target: Target) -> list[list[int]]:
    """A few of the packaged training prompts, of different kinds: the tree must not be fitted to the questions."""
    records = packaged_prompts(TRAINING_FILE)
    room = target.context_tokens - PLANNING_TOKENS - LARGEST.nodes
    encoded = (encode_prompt(target.tokenizer, r.messages[:1]) for r in records if r.messages[0]["role"] == "user")
    fitting = [prompt for prompt in encoded if len(prompt) <= room]
    return fitting[:: max(1, len(fitting) // PLANNING_PROMPTS)][:PLANNING_PROMPTS]
