"""Routers: hidden states in, a `Routing` out. One class for each published rule.

All compute in float32 whatever the model's dtype, give ties to the lower index, and draw random
numbers only in training, from torch's own generator.
"""

import math
from collections.abc import Callable
from fractions import Fraction

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .ffn import check_sizes
from .routing import NoisyRouting, Routing, count, top_k


class LearnedRouter(nn.Module):
    """What the learned routers share: `weight` [n_experts, d_model], and the care of padding.

    Args:
        d_model: features of a token.
        n_experts: experts to choose from.

    Raises:
        ValueError: if a size is below 1, or a rule chooses more experts than there are.
    """

    def __init__(self, d_model: int, n_experts: int) -> None:
        super().__init__()
        check_sizes(d_model=d_model, n_experts=n_experts)
        self.n_experts = n_experts
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        nn.init.uniform_(self.weight, -(d_model**-0.5), d_model**-0.5)

    def forward(
        self,
        x: Float[Tensor, "tokens d_model"],
        *,
        mask: Bool[Tensor, " tokens"] | None = None,
        token_ids: Int[Tensor, " tokens"] | None = None,
    ) -> Routing:
        """Route each token; `mask` is False at padding, and `token_ids` plays no part here."""
        if mask is not None:
            x = x.masked_fill(~mask[:, None], 0)  # padding may hold anything, even NaN
        return self.choose(x, real_mask(x, mask))

    def choose(self, x: Tensor, mask: Tensor) -> Routing:
        """The rule itself, for tokens whose padding has been cleared."""
        raise NotImplementedError


class TopKRouter(LearnedRouter):
    """Each token goes to the k experts with the largest score.

    s = softmax(x W^T), or sigmoid; the k largest are chosen; the weights are those s, divided by
    their sum if `renormalize`, times `scale`. With softmax, k = 1 and `renormalize` every weight
    is 1 and the router gets no gradient: leave it off there.

    Args:
        d_model, n_experts: as in `LearnedRouter`.
        k: experts per token.
        score: "softmax" or "sigmoid".
        renormalize: whether the weights of a token are divided by their sum.
        scale: factor on all weights.
        n_groups: the experts are cut into so many groups of equal size.
        groups_kept: groups a token may use: those whose two best scores have the largest sum.
        selection_bias: whether a buffer `bias` [n_experts], float32 and without gradient, is added
            to the scores for every choice, and for none of the weights; see `balance.update_bias`.

    Raises:
        ValueError: if a size is impossible or the score unknown.

    Source: Shazeer et al. 2017 (1701.06538); Mixtral 2401.04088, renormalised; OLMoE 2409.02060,
    not; DeepSeek-V3 2412.19437, section 2.1.2: sigmoid, bias, groups and scale.
    """

    bias: Tensor | None

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        k: int,
        *,
        score: str = "softmax",
        renormalize: bool = True,
        scale: float = 1.0,
        n_groups: int = 1,
        groups_kept: int = 1,
        selection_bias: bool = False,
    ) -> None:
        super().__init__(d_model, n_experts)
        self.k = check_k(k, n_experts)
        if score not in ("softmax", "sigmoid"):
            raise ValueError(f"score={score!r} is neither softmax nor sigmoid")
        check_groups(n_experts, k, n_groups, groups_kept)
        self.score = score
        self.renormalize = renormalize
        self.scale = scale
        self.n_groups = n_groups
        self.groups_kept = groups_kept
        self.register_buffer("bias", torch.zeros(n_experts) if selection_bias else None)

    def _apply(self, fn: Callable, recurse: bool = True) -> "TopKRouter":
        """Follow a move to another device, but stay float32: steps of 1e-3 would round away."""
        exact = self.bias
        super()._apply(fn, recurse)
        if exact is not None and self.bias is not None:
            self.bias = exact.to(self.bias.device)
        return self

    def choose(self, x: Tensor, mask: Tensor) -> Routing:
        logits = router_logits(x, self.weight)
        scores = logits.softmax(dim=-1) if self.score == "softmax" else logits.sigmoid()
        ranked = scores.detach()
        if self.bias is not None:
            ranked = ranked + self.bias
        if self.n_groups > 1:
            ranked = keep_groups(ranked, self.n_groups, self.groups_kept)
        experts = top_k(ranked, self.k)
        weights = scores.gather(-1, experts)
        if self.renormalize:
            # Sigmoids can all be 0 to float32; softmax scores can't.
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        return decide(experts, weights * self.scale, logits, scores, mask)


class NoisyTopKRouter(LearnedRouter):
    """Top-k of logits that carry noise of learned size in training; none in evaluation.

    h~ = h + eps * softplus(x Wn), eps standard normal; the k largest h~ are chosen; the weights
    are the softmax over those k alone. `noise_weight` [n_experts, d_model] starts at 0, as `Wn`.

    Source: Shazeer et al. 2017 (1701.06538), equations 3 to 5.
    """

    def __init__(self, d_model: int, n_experts: int, k: int) -> None:
        super().__init__(d_model, n_experts)
        self.k = check_k(k, n_experts)
        self.noise_weight = nn.Parameter(torch.zeros(n_experts, d_model))

    def choose(self, x: Tensor, mask: Tensor) -> Routing:
        logits = router_logits(x, self.weight)
        sigma = F.softplus(router_logits(x, self.noise_weight))
        noisy = logits + torch.randn_like(logits) * sigma if self.training else logits
        experts = top_k(noisy, self.k)
        weights = noisy.gather(-1, experts).softmax(dim=-1)
        plain = decide(experts, weights, logits, logits.softmax(dim=-1), mask)
        return NoisyRouting(**vars(plain), noisy=noisy, sigma=sigma)


class SwitchRouter(LearnedRouter):
    """Each token goes to its best expert, with the raw softmax score as weight.

    The raw score gives the router a gradient; renormalised it would be 1 and give none. `jitter`
    multiplies the router's input by uniform noise in 1 - jitter to 1 + jitter, in training.

    Source: Fedus et al. 2021 (2101.03961), section 2.1 and equation 2.
    """

    def __init__(self, d_model: int, n_experts: int, *, jitter: float = 0.0) -> None:
        super().__init__(d_model, n_experts)
        self.k = 1
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter={jitter} is not between 0 and 1")
        self.jitter = jitter

    def choose(self, x: Tensor, mask: Tensor) -> Routing:
        if self.training and self.jitter:
            x = x.float()
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = router_logits(x, self.weight)
        scores = logits.softmax(dim=-1)
        experts = top_k(scores, 1)
        return decide(experts, scores.gather(-1, experts), logits, scores, mask)


class GShardRouter(LearnedRouter):
    """Top-2, renormalised; in training the second expert is visited only sometimes.

    With g1 and g2 the two renormalised gates, the second is kept with probability min(1, 2 * g2)
    if `second` is "random", always if it is "always", and always in evaluation. The weight of the
    first stays g1 either way. A second that is not kept does not count as demand.

    Source: Lepikhin et al. 2020 (2006.16668), algorithm 1.
    """

    def __init__(self, d_model: int, n_experts: int, *, second: str = "random") -> None:
        super().__init__(d_model, n_experts)
        self.k = check_k(2, n_experts)
        if second not in ("random", "always"):
            raise ValueError(f"second={second!r} is neither random nor always")
        self.second = second

    def choose(self, x: Tensor, mask: Tensor) -> Routing:
        logits = router_logits(x, self.weight)
        scores = logits.softmax(dim=-1)
        experts = top_k(scores, 2)
        weights = scores.gather(-1, experts)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        if self.training and self.second == "random":
            skipped = torch.rand_like(weights[:, 1]) >= 2 * weights[:, 1].detach()
            skipped = torch.stack([torch.zeros_like(skipped), skipped], dim=-1)
            experts = experts.masked_fill(skipped, self.n_experts)
            weights = weights.masked_fill(skipped, 0)
        return decide(experts, weights, logits, scores, mask)


class HashRouter(nn.Module):
    """A fixed random table sends each token id to one expert, with weight 1; nothing is learned.

    The table is balanced: every expert gets the same number of ids, to within one. Logits are 0
    and the scores are 1 at the expert.

    Args:
        n_experts: experts to choose from.
        vocab_size: token ids, 0 to vocab_size - 1.
        seed: of the table.

    Source: Roller et al. 2021 (2106.04426), the balanced assignment of section 3.
    """

    table: Tensor

    def __init__(self, n_experts: int, vocab_size: int, *, seed: int = 0) -> None:
        super().__init__()
        check_sizes(n_experts=n_experts, vocab_size=vocab_size)
        self.n_experts = n_experts
        self.k = 1
        generator = torch.Generator("cpu").manual_seed(seed)
        order = torch.randperm(vocab_size, generator=generator, device="cpu")
        self.register_buffer("table", (order % n_experts).to(torch.get_default_device()))

    def forward(
        self,
        x: Float[Tensor, "tokens d_model"],
        *,
        mask: Bool[Tensor, " tokens"] | None = None,
        token_ids: Int[Tensor, " tokens"] | None = None,
    ) -> Routing:
        """Route each token by its id; ValueError without ids, or with one outside the table."""
        if token_ids is None:
            raise ValueError("token_ids=None: a HashRouter routes by the ids of the tokens")
        mask = real_mask(x, mask)
        ids = token_ids.masked_fill(~mask, 0)  # padding often has an id of its own, such as -1
        known = (ids >= 0) & (ids < len(self.table))
        if not known.all():
            wrong, last = int(ids[~known][0]), len(self.table) - 1
            raise ValueError(f"token id {wrong} is outside 0 to vocab_size - 1={last}")
        experts = self.table[ids][:, None]
        scores = F.one_hot(experts[:, 0], self.n_experts).float()
        weights = torch.ones_like(experts, dtype=torch.float32)
        return decide(experts, weights, torch.zeros_like(scores), scores, mask)


class ExpertChoiceRouter(LearnedRouter):
    """Each expert takes the tokens that score it highest; a token gets 0 to n_experts experts.

    p = softmax(x W^T) per token; each expert takes its top ceil(tokens * k / n_experts) tokens
    over p, ties to the earlier token; weight = p. Balanced by construction, and not causal: who
    else is in the batch, later tokens too, decides a token's fate.

    Args:
        d_model, n_experts: as in `LearnedRouter`.
        k: mean experts per token, which need not be whole.

    Source: Zhou et al. 2022 (2202.09368), section 3.2.
    """

    causal = False  # a decoder can't use it: generation refuses it

    def __init__(self, d_model: int, n_experts: int, k: float) -> None:
        super().__init__(d_model, n_experts)
        if not 0 < k <= n_experts:
            raise ValueError(f"k={k} is not more than 0 and at most n_experts={n_experts}")
        self.k = k

    def choose(self, x: Tensor, mask: Tensor) -> Routing:
        logits = router_logits(x, self.weight)
        scores = logits.softmax(dim=-1)
        tokens = int(mask.sum())
        # k as it is written: 1.1 * 100 / 10 is 11, not the 11.000000000000002 of floats.
        taken = min(tokens, math.ceil(Fraction(str(self.k)) * tokens / self.n_experts))
        ranked = scores.detach().masked_fill(~mask[:, None], -1)
        picks = ranked.sort(dim=0, descending=True, stable=True).indices[:taken]
        picked = torch.zeros_like(scores, dtype=torch.bool).scatter_(0, picks, True)
        # A token's slots are the experts that picked it, the best first, padded with nobody.
        slots = max(1, int(picked.sum(dim=1).max())) if len(x) else 1
        experts = top_k(ranked.masked_fill(~picked, -2), slots)
        nobody = ~picked.gather(-1, experts)
        weights = scores.gather(-1, experts).masked_fill(nobody, 0)
        return decide(experts.masked_fill(nobody, self.n_experts), weights, logits, scores, mask)


def real_mask(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mask given, or one without padding."""
    return torch.ones(len(x), dtype=torch.bool, device=x.device) if mask is None else mask


def check_k(k: int, n_experts: int) -> int:
    """k, or a ValueError if it is below 1 or more than the experts."""
    check_sizes(k=k)
    if k > n_experts:
        raise ValueError(f"k={k} is more than n_experts={n_experts}")
    return k


def check_groups(n_experts: int, k: int, n_groups: int, groups_kept: int) -> None:
    """Raise a ValueError if the groups can't be formed or don't leave k experts to choose from."""
    check_sizes(n_groups=n_groups, groups_kept=groups_kept)
    if n_experts % n_groups:
        raise ValueError(f"n_groups={n_groups} does not divide n_experts={n_experts}")
    if groups_kept > n_groups:
        raise ValueError(f"groups_kept={groups_kept} is more than n_groups={n_groups}")
    left = groups_kept * (n_experts // n_groups)
    if left < k:
        raise ValueError(f"groups_kept={groups_kept} leaves {left} experts, fewer than k={k}")


def keep_groups(
    ranked: Float[Tensor, "tokens n_experts"], n_groups: int, groups_kept: int
) -> Float[Tensor, "tokens n_experts"]:
    """The scores with those of all but the best groups at minus infinity.

    Not at 0: a biased score can be negative, and would lose to an expert that was ruled out.
    """
    grouped = ranked.unflatten(-1, (n_groups, -1))
    best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, top_k(best, groups_kept), True)
    return grouped.masked_fill(~kept[..., None], -torch.inf).flatten(-2)


def router_logits(
    x: Float[Tensor, "tokens d_model"], weight: Float[Tensor, "n_experts d_model"]
) -> Float[Tensor, "tokens n_experts"]:
    """x W^T in float32, whatever the dtype of the model, under autocast too.

    bfloat16 keeps 8 bits: close logits would tie, and a token would flip to another expert.
    """
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float())


def decide(
    experts: Int[Tensor, "tokens slots"],
    weights: Float[Tensor, "tokens slots"],
    logits: Float[Tensor, "tokens n_experts"],
    scores: Float[Tensor, "tokens n_experts"],
    mask: Bool[Tensor, " tokens"],
) -> Routing:
    """The `Routing` of these choices: padding is served by nobody and asks for nobody."""
    n_experts = logits.shape[-1]
    padding = ~mask[:, None]
    experts = experts.masked_fill(padding, n_experts)
    return Routing(
        experts=experts,
        weights=weights.masked_fill(padding, 0),
        logits=logits,
        scores=scores.masked_fill(padding, 0),
        demand=count(experts, n_experts),
        mask=mask,
    )
