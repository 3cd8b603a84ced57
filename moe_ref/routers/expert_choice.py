"""Expert choice: each expert takes its own best tokens."""

import math
from fractions import Fraction

import torch
from torch import Tensor

from ..routing import Routing, decide, top_k
from .learned import LearnedRouter, router_logits


class ExpertChoiceRouter(LearnedRouter):
    """Each expert takes the tokens that score it highest; a token gets 0 to n_experts experts.

    p = softmax(x W^T) per token; each expert takes its top ceil(tokens * k / n_experts) tokens
    over p, ties to the earlier token; weight = p. It is balanced by construction, and not causal:
    a token's experts depend on the other tokens of the batch, later ones too.

    Args:
        d_model: features of a token.
        n_experts: experts to choose from.
        k: mean experts per token, which need not be whole.

    Raises:
        ValueError: if a size is below 1, or k is not more than 0 and at most n_experts.

    Example:
        >>> router = ExpertChoiceRouter(d_model=4, n_experts=2, k=1)
        >>> router(torch.randn(6, 4)).counts
        tensor([3, 3])

    Source: Zhou et al. 2022 (2202.09368), section 3.2.
    """

    causal = False

    def __init__(self, d_model: int, n_experts: int, k: float) -> None:
        super().__init__(d_model, n_experts)
        if not 0 < k <= n_experts:
            raise ValueError(f"k={k} is not more than 0 and at most n_experts={n_experts}")
        self.k = k

    def choose(self, x: Tensor, mask: Tensor | None) -> Routing:
        logits = router_logits(x, self.weight)
        scores = logits.softmax(dim=-1)
        tokens = len(x) if mask is None else int(mask.sum())
        # Exact, with k as written: in floats 1.1 * 100 / 10 is 11.000000000000002.
        taken = min(tokens, math.ceil(Fraction(str(self.k)) * tokens / self.n_experts))
        ranked = scores.detach()
        if mask is not None:
            ranked = ranked.masked_fill(~mask[:, None], -1)
        picks = ranked.sort(dim=0, descending=True, stable=True).indices[:taken]
        picked = torch.zeros_like(scores, dtype=torch.bool).scatter_(0, picks, True)
        # A token's slots are the experts that picked it, the best first, padded with nobody.
        slots = max(1, int(picked.sum(dim=1).max())) if len(x) else 1
        experts = top_k(ranked.masked_fill(~picked, -2), slots)
        nobody = ~picked.gather(-1, experts)
        weights = scores.gather(-1, experts).masked_fill(nobody, 0)
        return decide(experts.masked_fill(nobody, self.n_experts), weights, logits, scores, mask)
