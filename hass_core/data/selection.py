"""Which prompts are kept: every candidate is judged once, and nothing disappears without a reason."""

import json
from collections import Counter

from transformers import PreTrainedTokenizerBase

from hass_core.config import PromptsConfig
from hass_core.data.askable import check_askable
from hass_core.data.conversations import Record, as_prompt, user_text, with_placeholders
from hass_core.data.dedupe import NearDuplicates
from hass_core.data.holdout import Forbidden, normalized_hash, user_turns
from hass_core.data.messages import Unusable
from hass_core.data.rendering import SkippedConversation, special_tokens
from hass_core.data.sources import Skipped
from hass_core.data.templates import is_prompt_longer


class Selection:
    """Collects prompts in order; equal settings and candidates give an equal selection."""

    def __init__(self, config: PromptsConfig, tokenizer: PreTrainedTokenizerBase, forbidden: Forbidden):
        self.kept: list[Record] = []
        self.skipped: list[Skipped] = []
        self.seen = 0
        self._config, self._tokenizer, self._forbidden = config, tokenizer, forbidden
        self._ids: set[str] = set()
        self._hashes: set[str] = set()
        self._similar = NearDuplicates(config.near_duplicate_similarity)
        self._markers = tuple(special_tokens(tokenizer))

    @property
    def full(self) -> bool:
        """True when prompts.max_prompts is reached."""
        return self._config.max_prompts is not None and len(self.kept) >= self._config.max_prompts

    def consider(self, candidate: Record | Skipped) -> bool:
        """Keep the candidate, or note why not."""
        self.seen += 1
        if isinstance(candidate, Skipped):
            self.skipped.append(candidate)
            return False
        try:
            prompt = as_prompt(candidate)
            self._judge(prompt)
        except (Unusable, SkippedConversation) as problem:
            self.skipped.append(Skipped(candidate.id, candidate.source, str(problem)))
            return False
        self.kept.append(prompt)
        return True

    def reasons(self) -> Counter[str]:
        """How often each reason was given."""
        return Counter(item.reason for item in self.skipped)

    def _judge(self, prompt: Record) -> None:
        """Raise Unusable or SkippedConversation with the reason; the cheap checks come first."""
        text = user_text(prompt.messages)
        if prompt.id in self._ids:
            raise Unusable("id used twice")
        if any(marker in part for part in _texts(prompt) for marker in self._markers):
            raise Unusable("contains a chat marker of the target")
        if (digest := normalized_hash(text)) in self._hashes:
            raise Unusable("duplicate")
        for part in user_turns(prompt):
            if leak := self._forbidden.leak(part):
                raise Unusable(leak)
        check_askable(self._tokenizer, prompt)
        asked = with_placeholders(prompt.messages)
        if is_prompt_longer(self._tokenizer, asked, self._config.max_prompt_tokens, prompt.tools):
            raise Unusable("longer than prompts.max_prompt_tokens")
        if self._similar.add(text) is not None:
            raise Unusable("near-duplicate")
        self._ids.add(prompt.id)
        self._hashes.add(digest)


def _texts(prompt: Record) -> list[str]:
    """All that the template would write of a prompt."""
    found = [message["content"] for message in prompt.messages]
    rest = [[value for key, value in m.items() if key not in ("role", "content")] for m in prompt.messages]
    return (
        [*found, json.dumps([rest, prompt.tools], ensure_ascii=False, default=str)]
        if any(rest) or prompt.tools
        else found
    )
