"""Causes weighed by taking them away: the same questions answered again with one thing mended.

Each function returns None where its cause is not there.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hass_core.data.templates import encode_prompt
from hass_core.diagnosis.causes import Cause, from_variant
from hass_core.diagnosis.chain import Asked, Cycle, chain_cycles, tau
from hass_core.draft_model.architecture import rope_parameters
from hass_core.draft_model.checkpoint import Draft, load_draft
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import build_draft
from hass_core.errors import BadInput
from hass_core.evaluation.benchmarks import Question
from hass_core.evaluation.lossless import in_float32
from hass_core.target_model.identity import recorded_template, template_digest
from hass_core.target_model.loader import Target


@dataclass(frozen=True)
class Settings:
    """How the draft is served, and what is known of its training."""

    temperature: float = 0.0
    max_new_tokens: int = 64
    trained_tokens: int | None = None  # longest conversation trained on
    trained_template: str | None = None  # the chat template's text


@dataclass(frozen=True)
class Case:
    """A draft as it is served, and the cycles measured so. `done` hears of each measurement's answered questions."""

    folder: Path
    target: Target
    draft: Draft
    questions: Sequence[Question]
    settings: Settings
    base: list[Cycle]
    done: Callable[[int], None]

    def measure(
        self,
        draft: Draft | None = None,
        target: Target | None = None,
        asked: list[Asked] | None = None,
        temperature: float | None = None,
    ) -> list[Cycle]:
        """The cycles with something changed."""
        return chain_cycles(
            target or self.target,
            draft or self.draft,
            asked or as_asked(self.target.tokenizer, self.questions),
            self.settings.temperature if temperature is None else temperature,
            self.settings.max_new_tokens,
            self.done,
        )


def as_asked(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[Asked]:
    """The first turn of each question."""
    return [Asked(q.category, encode_prompt(tokenizer, q.messages[:1])) for q in questions]


def rope_cause(case: Case) -> Cause | None:
    """Other rotary settings than the target's."""
    ours = case.draft.model.architecture
    here, there = ours.rope_parameters, rope_parameters(case.target.model.config.get_text_config().to_dict())
    if here == there:
        return None
    mended = build_draft(ours.model_copy(update={"rope_parameters": there}), case.draft.model.embedding)
    mended.load_state_dict(case.draft.model.state_dict())
    mended.to(case.target.device, case.target.dtype).eval().requires_grad_(False)
    cycles = case.measure(replace(case.draft, model=mended))
    what = f"the draft's rotary settings are {here}, the target has {there}"
    mend = "see that its config.json tells the rotary settings it was trained with; where it does, nothing is wrong"
    return from_variant("rope", what, mend, case.base, cycles)


def vocabulary_cause(case: Case) -> Cause | None:
    """A trimmed draft vocabulary, against the whole head."""
    if case.draft.head.token_ids is None:
        return None
    what = f"the draft knows {case.draft.head.size} of {case.target.head.shape[0]} tokens"
    mend = "raise draft.vocab_size and weigh the gain against the slower head, or choose the tokens from text like this"
    if case.draft.model.architecture.own_head:  # it has no rows for the others
        return Cause(
            "vocabulary", None, f"{what} by a head of its own; what that costs only another training tells", mend
        )
    cycles = case.measure(replace(case.draft, head=DraftHead.from_target(case.target.head)))
    return from_variant("vocabulary", what, mend, case.base, cycles)


def dtype_cause(case: Case) -> Cause | None:
    """Lower precision, against float32."""
    exact = in_float32(case.target)
    if exact is case.target:
        return None
    cycles = case.measure(load_draft(case.folder, exact, check=False), target=exact)
    name = str(case.target.dtype).removeprefix("torch.")
    mend = "serve in float32, or take the features of training in the precision that serves"
    return from_variant("dtype", f"target and draft compute in {name}, not float32", mend, case.base, cycles)


def sampling_cause(case: Case) -> Cause:
    """Sampling, against greedy answers; what it would cost where the draft is served greedily."""
    other = 0.0 if case.settings.temperature else 1.0
    cycles = case.measure(temperature=other)
    mend = "add answers sampled at the serving temperature to training (responses.sampling), or serve greedily"
    if case.settings.temperature:
        what = f"answers are sampled at T = {case.settings.temperature:g}"
        return from_variant("sampling", what, mend, case.base, cycles)
    what = f"served greedily, so it costs nothing now; τ at T = 0 is {tau(case.base):.2f}, at T = 1 {tau(cycles):.2f}"
    return Cause("sampling", 0.0, what, mend)


def template_cause(case: Case) -> Cause | None:
    """Another chat template than in training. Raises BadInput when the template given is not the recorded one."""
    trained, ours = recorded_template(case.draft.info), case.target.identity.template
    if trained in (None, ours):
        return None
    what = f"the draft was trained under the chat template {trained}, the target has {ours}"
    mend = "serve with the template of training, or train again with this one"
    if case.settings.trained_template is None:
        return Cause("template", None, f"{what}; its cost is unknown without that template (--trained-template)", mend)
    given = template_digest(case.settings.trained_template)
    if given != trained:
        raise BadInput(
            f"--trained-template has the hash {given}, the draft's record says {trained}; give that template"
        )
    tokenizer = copy.deepcopy(case.target.tokenizer)
    tokenizer.chat_template = case.settings.trained_template
    cycles = case.measure(asked=as_asked(tokenizer, case.questions))
    return from_variant("template", what, mend, case.base, cycles)


def target_cause(case: Case) -> Cause | None:
    """Another target's weights; that cannot be weighed without that target."""
    differing = [part for part in case.target.differing(case.draft.info) if part != "template"]  # that is weighed
    if not differing:
        return None
    name = case.draft.info.get("target", "another target")
    what = f"the draft was trained for {name}, which differs from {case.target.name} in its {' and '.join(differing)}"
    return Cause("target", None, what, "use the target it was trained for, or train a draft for this one")
