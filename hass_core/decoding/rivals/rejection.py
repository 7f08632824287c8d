"""A sampler that verifies candidates drawn from q by rejection, with coins of its own beside the target's.

At every node the drafter draws K tokens from q without replacement. Verification goes through them in the order drawn:
a candidate c is accepted with probability min(1, p(c) / q(c)); rejected, p becomes max(0, p − q) and q loses c, both
renormalised. When none is accepted, the token is drawn from what p has become (recursive rejection, Jeon et al. arXiv
2402.14160; with K = 1 speculative sampling, Leviathan et al. arXiv 2211.17192). Each token's distribution is the
target's own p, whatever q is, as long as the tree's shape does not depend on the tokens drawn: a tree pruned by
confidence would be biased. Sampled answers differ from plain decoding's with the same seed.
"""

import torch
from torch import Tensor

from hass_core.config import SamplingConfig
from hass_core.decoding.sampler import NO_TOKEN, Proposal, Sampler
from hass_core.decoding.tree import Tree
from hass_core.errors import ConfigError
from hass_core.sampling import probabilities

OWN_COINS = 0x52534400  # keeps the coins apart from the target's noise


class RejectionSampler(Sampler):
    """Draws along the tree by rejection. Raises ConfigError for a repetition penalty."""

    def __init__(self, sampling: SamplingConfig, rows: int, vocab_size: int, device: torch.device):
        if sampling.repetition_penalty != 1:
            raise ConfigError("rejection (sps, rsd) takes no repetition_penalty; use another method or 1.0")
        super().__init__(sampling, rows, vocab_size, device)
        self.wants_paths = True
        self.capturable = False  # verification walks on the host
        self._proposed: list[dict[tuple[int, ...], Tensor]] = [{} for _ in range(rows)]  # q [V] by path below the root
        self._coins = torch.Generator(device)

    def start(self, token_ids: Tensor, lengths: Tensor, seed: int) -> None:
        """See `Sampler`."""
        super().start(token_ids, lengths, seed ^ OWN_COINS)
        self._coins.manual_seed((seed ^ OWN_COINS) % 2**63)

    def guess(self, proposal: Proposal) -> tuple[Tensor, Tensor]:
        """See `Sampler`: k draws from q without replacement, in the order drawn, are the first k of a race."""
        if self._greedy:
            return super().guess(proposal)
        q, token_ids, path = probabilities(proposal.logits, self._sampling), proposal.token_ids, proposal.path
        if token_ids is not None:
            q = q.new_zeros(*q.shape[:-1], self._vocab_size).index_copy_(-1, token_ids, q)
        for row, proposed in enumerate(self._proposed):
            for node, distribution in enumerate(q[row]):
                before = [] if path is None else path[row, node].tolist()
                proposed[tuple(token for token in before if token != NO_TOKEN)] = distribution
        arrivals = torch.empty_like(q).exponential_(generator=self._coins)
        speeds, drawn = (q / arrivals).topk(proposal.k, dim=-1)
        return speeds.log(), drawn

    def draw(self, logits: Tensor, positions: Tensor, tree: Tree | None = None) -> tuple[Tensor, Tensor]:
        """See `Sampler`; right at the nodes of the accepted path only."""
        if tree is None or self._greedy:
            return super().draw(logits, positions, tree)
        p, sound = probabilities(logits, self._sampling), logits.isfinite().all(-1)
        drawn = torch.zeros_like(tree.token_ids)
        for row, proposed in enumerate(self._proposed):
            tokens, parents, ranks = (part[row].tolist() for part in (tree.token_ids, tree.parents, tree.ranks))
            node, path = 0, ()
            while bool(sound[row, node]):
                below = sorted((n for n in range(1, len(parents)) if parents[n] == node), key=ranks.__getitem__)
                token = self._walk(p[row, node], proposed.get(path), [tokens[child] for child in below])
                drawn[row, node] = token
                accepted = [child for child in below if tokens[child] == token]
                if not accepted:
                    break
                node, path = accepted[0], (*path, token)
            proposed.clear()
        return drawn, sound

    def _walk(self, p: Tensor, q: Tensor | None, candidates: list[int]) -> int:
        """A token drawn from p [V], one of `candidates` wherever rejection allows."""
        for candidate in candidates:
            assert q is not None
            if float(q.sum()) == 0 or q[candidate] == 0:  # q has run out: this one and the rest were not drawn from it
                break
            if float(torch.rand((), generator=self._coins, device=p.device) * q[candidate]) < float(p[candidate]):
                return candidate
            p = (p - q).clamp(min=0)
            if float(p.sum()) == 0:  # p and q differ by rounding alone
                return candidate
            p = p / p.sum()
            q = q.index_fill(0, torch.tensor([candidate], device=q.device), 0.0)
            q = q / q.sum().clamp(min=torch.finfo(q.dtype).tiny)  # all of q may have been on that one
        return int(torch.multinomial(p, 1, generator=self._coins))
