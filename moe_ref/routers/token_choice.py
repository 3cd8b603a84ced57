"""Token choice: each token takes its own best experts. Top-k and its published variants."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .._validate import check_choice, check_sizes
from ..routing import NoisyRouting, Routing, decide, top_k
from .learned import LearnedRouter, router_logits


class TopKRouter(LearnedRouter):
    """Each token goes to the k experts with the largest score.

    s = softmax(x W^T), or sigmoid; the k largest are chosen; the weights are those s, divided by
    their sum if `renormalize`, times `scale`. With k = 1 set `renormalize` to False, as otherwise
    every weight is 1 and the router gets no gradient.

    Args:
        d_model: features of a token.
        n_experts: experts to choose from.
        k: experts per token.
        score: "softmax" or "sigmoid".
        renormalize: whether the weights of a token are divided by their sum.
        scale: factor on all weights.
        n_groups: groups of equal size into which the experts are divided.
        groups_kept: groups a token may use: those whose two best scores have the largest sum.
        selection_bias: whether to add a buffer `bias` [n_experts], float32 and without gradient, to
            the scores for the choice, but not for the weights; see `balance.update_bias`.
        logit_bias: whether to add a parameter `logit_bias` [n_experts], which starts at 0, to the
            logits, and so to choice and weights.

    Raises:
        ValueError: if a size is impossible or the score unknown.

    Example:
        >>> router = TopKRouter(d_model=4, n_experts=4, k=2)
        >>> router
        TopKRouter(d_model=4, n_experts=4, k=2, score=softmax)
        >>> router(torch.randn(3, 4)).weights.sum(dim=-1)
        tensor([1., 1., 1.], grad_fn=<SumBackward1>)

    Source: Shazeer et al. 2017 (1701.06538); Mixtral 2401.04088, renormalised; OLMoE 2409.02060,
    not; DeepSeek-V3 2412.19437, section 2.1.2: sigmoid, bias, groups and scale; gpt-oss 2508.10925:
    bias of the logits.
    """

    bias: Tensor | None
    logit_bias: Tensor | None

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
        logit_bias: bool = False,
    ) -> None:
        super().__init__(d_model, n_experts)
        self.k = check_k(k, n_experts)
        check_choice("score", score, ("softmax", "sigmoid"))
        check_groups(n_experts, k, n_groups, groups_kept)
        self.score = score
        self.renormalize = renormalize
        self.scale = scale
        self.n_groups = n_groups
        self.groups_kept = groups_kept
        self.register_buffer("bias", torch.zeros(n_experts) if selection_bias else None)
        offset = nn.Parameter(torch.zeros(n_experts)) if logit_bias else None
        self.register_parameter("logit_bias", offset)

    def _apply(self, fn: Callable, recurse: bool = True) -> "TopKRouter":
        """Move the bias with the router, but keep it float32: steps of 1e-3 would round away."""
        exact = self.bias
        super()._apply(fn, recurse)
        if exact is not None and self.bias is not None:
            self.bias = exact.to(self.bias.device)
        return self

    def choose(self, x: Tensor, mask: Tensor | None) -> Routing:
        logits = router_logits(x, self.weight, self.logit_bias)
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

    def extra_repr(self) -> str:
        said = f"{super().extra_repr()}, score={self.score}"
        usual = {"renormalize": True, "scale": 1.0, "n_groups": 1, "groups_kept": 1}
        for name, value in usual.items():
            if getattr(self, name) != value:
                said += f", {name}={getattr(self, name)}"
        for name, tensor in (("selection_bias", self.bias), ("logit_bias", self.logit_bias)):
            said += "" if tensor is None else f", {name}=True"
        return said


class NoisyTopKRouter(LearnedRouter):
    """Top-k of logits to which training adds noise of learned size.

    h~ = h + eps * softplus(x Wn), eps standard normal; the k largest h~ are chosen; the weights
    are the softmax over those k alone. Wn is `noise_weight` [n_experts, d_model], and starts at 0.
    Evaluation adds no noise.

    Args:
        d_model: features of a token.
        n_experts: experts to choose from.
        k: experts per token.

    Raises:
        ValueError: if a size is impossible.

    Example:
        >>> router = NoisyTopKRouter(d_model=4, n_experts=4, k=2)
        >>> x = torch.ones(1, 4)
        >>> router(x).weights.equal(router(x).weights)
        False
        >>> router.eval()(x).weights.equal(router(x).weights)
        True

    Source: Shazeer et al. 2017 (1701.06538), equations 3 to 5.
    """

    def __init__(self, d_model: int, n_experts: int, k: int) -> None:
        super().__init__(d_model, n_experts)
        self.k = check_k(k, n_experts)
        self.noise_weight = nn.Parameter(torch.zeros(n_experts, d_model))

    def reset_parameters(self) -> None:
        """Draw the weight; the noise of every expert begins with a size of softplus(0) = 0.69."""
        super().reset_parameters()
        if hasattr(self, "noise_weight"):  # not yet, while the parent is made
            nn.init.zeros_(self.noise_weight)

    def choose(self, x: Tensor, mask: Tensor | None) -> Routing:
        logits = router_logits(x, self.weight)
        sigma = F.softplus(router_logits(x, self.noise_weight))
        noisy = logits + torch.randn_like(logits) * sigma if self.training else logits
        experts = top_k(noisy, self.k)
        weights = noisy.gather(-1, experts).softmax(dim=-1)
        plain = decide(experts, weights, logits, logits.softmax(dim=-1), mask)
        return NoisyRouting(**vars(plain), noisy=noisy, sigma=sigma)


class SwitchRouter(LearnedRouter):
    """Each token goes to its best expert, with the raw softmax score as weight.

    The raw score gives the router a gradient; renormalised it would be 1 and give none.

    Args:
        d_model: features of a token.
        n_experts: experts to choose from.
        jitter: in training the input is multiplied by uniform noise from 1 - jitter to 1 + jitter.

    Raises:
        ValueError: if a size is below 1 or jitter is not from 0 to less than 1.

    Example:
        >>> SwitchRouter(d_model=4, n_experts=8)(torch.randn(3, 4)).experts.shape
        torch.Size([3, 1])

    Source: Fedus et al. 2021 (2101.03961), section 2.1 and equation 2.
    """

    def __init__(self, d_model: int, n_experts: int, *, jitter: float = 0.0) -> None:
        super().__init__(d_model, n_experts)
        self.k = 1
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter={jitter} is not between 0 and 1")
        self.jitter = jitter

    def choose(self, x: Tensor, mask: Tensor | None) -> Routing:
        if self.training and self.jitter:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = router_logits(x, self.weight)
        scores = logits.softmax(dim=-1)
        experts = top_k(scores, 1)
        return decide(experts, scores.gather(-1, experts), logits, scores, mask)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, jitter={self.jitter}"


class GShardRouter(LearnedRouter):
    """Top-2, renormalised; in training the second expert is kept only sometimes.

    With g1 >= g2 the two renormalised weights, the second is kept with probability 2 * g2, which
    is at most 1. The weight of the first is g1 either way. A second that is not kept does not count
    as demand. Evaluation keeps both: that is this library's choice, the paper does not say.

    Args:
        d_model: features of a token.
        n_experts: experts to choose from.
        second: "random", or "always" to keep the second in training, as evaluation does.

    Raises:
        ValueError: if a size is impossible or `second` unknown.

    Example:
        >>> GShardRouter(d_model=4, n_experts=8).eval()(torch.randn(3, 4)).counts.sum()
        tensor(6)

    Source: Lepikhin et al. 2020 (2006.16668), algorithm 1.
    """

    def __init__(self, d_model: int, n_experts: int, *, second: str = "random") -> None:
        super().__init__(d_model, n_experts)
        self.k = check_k(2, n_experts)
        check_choice("second", second, ("random", "always"))
        self.second = second

    def choose(self, x: Tensor, mask: Tensor | None) -> Routing:
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

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, second={self.second}"


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
    """The scores, those outside the best groups set to minus infinity.

    0 would not do: a biased score can be negative, and would lose to an expert that was ruled out.
    """
    grouped = ranked.unflatten(-1, (n_groups, -1))
    best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, top_k(best, groups_kept), True)
    return grouped.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
