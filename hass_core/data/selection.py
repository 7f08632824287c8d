"""Which prompts are kept: every candidate is judged once, and nothing disappears without a reason."""

from collections import Counter

from transformers import PreTrainedTokenizerBase

from hass_core.config import PromptsConfig
from hass_core.data.conversations import Record, user_text
from hass_core.data.dedupe import NearDuplicates
from hass_core.data.examine import Candidate, Examined, Examiner
from hass_core.data.holdout import Forbidden
from hass_core.data.messages import Unusable
from hass_core.data.sources import Skipped


class Selection:
    """Collects prompts in order; equal settings and candidates give an equal selection."""

    def __init__(self, config: PromptsConfig, tokenizer: PreTrainedTokenizerBase, forbidden: Forbidden):
        self.kept: list[Record] = []
        self.skipped: list[Skipped] = []
        self.seen = 0
        self._max_prompts = config.max_prompts
        self._examiner = Examiner(tokenizer, config, forbidden)
        self._ids: set[str] = set()
        self._hashes: set[str] = set()
        self._similar = NearDuplicates(config.near_duplicate_similarity)

    @property
    def full(self) -> bool:
        """True when prompts.max_prompts is reached."""
        return self._max_prompts is not None and len(self.kept) >= self._max_prompts

    def consider(self, candidate: Candidate, examined: Examined | None = None) -> bool:
        """Keep the candidate, or note why not; `examined`: what was told of it by itself."""
        self.seen += 1
        try:
            self.kept.append(self._judge(examined or (self._examiner.look(candidate), None)))
        except Unusable as problem:
            self.skipped.append(Skipped(candidate.id, candidate.source, str(problem)))
            return False
        return True

    def reasons(self) -> Counter[str]:
        """How often each reason was given."""
        return Counter(item.reason for item in self.skipped)

    def _judge(self, examined: Examined) -> Record:
        """The prompt. Raises Unusable with the reason; the cheap checks come first."""
        look, closer = examined
        prompt = look.prompt
        if prompt is None:
            raise Unusable(look.problem)
        if prompt.id in self._ids:
            raise Unusable("id used twice")
        if look.marked:
            raise Unusable("contains a chat marker of the target")
        if look.digest in self._hashes:
            raise Unusable("duplicate")
        closer = closer or self._examiner.look_closer(prompt)
        if closer.problem is not None:
            raise Unusable(closer.problem)
        assert closer.signature
        if self._similar.add_signed(user_text(prompt.messages), closer.signature) is not None:
            raise Unusable("near-duplicate")
        self._ids.add(prompt.id)
        self._hashes.add(look.digest)
        return prompt
