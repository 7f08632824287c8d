"""Recursive rejection sampling over candidates drawn without replacement (RSD; Jeon et al. arXiv 2402.14160).

At every node the drafter draws K tokens from q without replacement, with noise of its own. Verification goes through
them in the order drawn: a candidate c is accepted with probability min(1, p(c) / q(c)); rejected, p becomes
max(0, p − q) and q loses c, both renormalised. When none is accepted, the token is drawn from what p has become. Each
token's distribution is the target's own p, whatever q is, as long as the tree's shape does not depend on the tokens
drawn: a tree pruned by confidence would be biased, so the shape is fixed by rank.

Unlike the coupled decoders, coins beside the target's decide a token: sampled answers differ from plain decoding's.
"""

from dataclasses import replace

import torch
from torch import Tensor

from hass_core.config import SamplingConfig, TreeConfig
from hass_core.decoding.decoder import TreeDecoder
from hass_core.decoding.drafter import Drafter
from hass_core.decoding.sampler import NO_TOKEN, Proposal, Sampler
from hass_core.decoding.tree import Tree, TreeShape
from hass_core.draft_model.checkpoint import Draft
from hass_core.errors import ConfigError
from hass_core.sampling import probabilities
from hass_core.target_model.runner import Runner

SHARES = (0.564, 0.131, 0.055, 0.043, 0.018, 0.017, 0.016, 0.015)
"""How often the candidate of a rank is accepted at T = 1, further ones like the last: the shape of the tree."""
OWN_COINS = 0x52534400  # keeps the drafter's noise and the coins apart from the target's


class RecursiveRejectionDecoder(TreeDecoder):
    """See `hass_core.decoding.decoder.Decoder`."""

    def __init__(self, runner: Runner, draft: Draft, tree: TreeConfig):
        shape = replace(TreeShape.of(tree, draft.head.size), static=True)
        super().__init__(runner, RankedDrafter(draft, shape), name="rsd", sampler=RejectionSampler)


class RankedDrafter(Drafter):
    """Its tree's shape follows `SHARES`."""

    def __init__(self, draft: Draft, shape: TreeShape):
        super().__init__(draft, shape)
        shares = torch.tensor([SHARES[min(rank, len(SHARES) - 1)] for rank in range(shape.top_k)])
        self._by_rank = shares.log().to(draft.head.weight.device)
        self.capturable = False  # verification walks on the host


class RejectionSampler(Sampler):
    """Draws along the tree by recursive rejection. Raises ConfigError for a repetition penalty."""

    def __init__(self, sampling: SamplingConfig, rows: int, vocab_size: int, device: torch.device):
        if sampling.repetition_penalty != 1:
            raise ConfigError("recursive rejection (rsd) takes no repetition_penalty; use another method or 1.0")
        super().__init__(sampling, rows, vocab_size, device)
        self.wants_paths = True
        self._proposed: list[dict[tuple[int, ...], Tensor]] = [{} for _ in range(rows)]  # q [V] by path below the root
        self._coins = torch.Generator()

    def start(self, token_ids: Tensor, lengths: Tensor, seed: int) -> None:
        """See `Sampler`."""
        super().start(token_ids, lengths, seed ^ OWN_COINS)
        self._coins.manual_seed((seed ^ OWN_COINS) % 2**63)

    def guess(self, proposal: Proposal) -> tuple[Tensor, Tensor]:
        """See `Sampler`: the k largest of log q + noise are k draws without replacement."""
        q, token_ids, path = probabilities(proposal.logits, self._sampling), proposal.token_ids, proposal.path
        if token_ids is not None:
            q = q.new_zeros(*q.shape[:-1], self._vocab_size).index_copy_(-1, token_ids, q)
        for row, proposed in enumerate(self._proposed):
            for node, distribution in enumerate(q[row].cpu()):
                before = [] if path is None else path[row, node].tolist()
                proposed[tuple(token for token in before if token != NO_TOKEN)] = distribution
        return self._noise.largest(q.log(), proposal.positions[:, None], proposal.k, 1.0, 1.0, proposal.ahead)

    def draw(self, logits: Tensor, positions: Tensor, tree: Tree | None = None) -> tuple[Tensor, Tensor]:
        """See `Sampler`; right at the nodes of the accepted path only."""
        if tree is None or self._greedy:
            return super().draw(logits, positions, tree)
        p = probabilities(logits, self._sampling).cpu()
        drawn = torch.zeros_like(tree.token_ids)
        for row, proposed in enumerate(self._proposed):
            tokens, parents = tree.token_ids[row].tolist(), tree.parents[row].tolist()
            node, path = 0, ()
            while True:
                below = [child for child in range(1, len(parents)) if parents[child] == node]
                below.sort(key=tree.ranks[row].tolist().__getitem__)
                token = self._walk(p[row, node], proposed.get(path), [tokens[child] for child in below])
                drawn[row, node] = token
                accepted = [child for child in below if tokens[child] == token]
                if not accepted:
                    break
                node, path = accepted[0], (*path, token)
            proposed.clear()
        return drawn, logits.isfinite().all(-1)

    def _walk(self, p: Tensor, q: Tensor | None, candidates: list[int]) -> int:
        """A token drawn from p [V], one of `candidates` wherever rejection allows."""
        for candidate in candidates:
            assert q is not None
            if float(q.sum()) == 0 or q[candidate] == 0:  # q has run out: this one and the rest were not drawn from it
                break
            if float(torch.rand((), generator=self._coins)) * float(q[candidate]) < float(p[candidate]):
                return candidate
            p = (p - q).clamp(min=0)
            if float(p.sum()) == 0:  # p and q differ by rounding alone
                return candidate
            p = p / p.sum()
            q = q.index_fill(0, torch.tensor([candidate]), 0.0)
            q = q / q.sum().clamp(min=torch.finfo(q.dtype).tiny)  # all of q may have been on that one
        return int(torch.multinomial(p, 1, generator=self._coins))
