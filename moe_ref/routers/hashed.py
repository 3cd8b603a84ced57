"""Hash routing: a fixed table instead of anything learned."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .._validate import check_sizes
from ..routing import Routing, decide


class HashRouter(nn.Module):
    """A fixed random table sends each token id to one expert, with weight 1; nothing is learned.

    The table is balanced: every expert gets the same number of ids, to within one. Logits are 0,
    and the score of the chosen expert is 1.

    Args:
        n_experts: experts to choose from.
        vocab_size: token ids are 0 to vocab_size - 1.
        seed: of the table.

    Raises:
        ValueError: if a size is below 1; in the call, without ids or with one outside the table.

    Example:
        >>> router = HashRouter(n_experts=2, vocab_size=6)
        >>> router(torch.zeros(6, 4), token_ids=torch.arange(6)).counts
        tensor([3, 3])

    Source: Roller et al. 2021 (2106.04426), the balanced assignment of section 3.
    """

    causal = True
    k = 1
    table: Tensor

    def __init__(self, n_experts: int, vocab_size: int, *, seed: int = 0) -> None:
        super().__init__()
        check_sizes(n_experts=n_experts, vocab_size=vocab_size)
        self.n_experts, self.vocab_size, self.seed = n_experts, vocab_size, seed
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
        """Route each token by its id; `mask` is False at padding."""
        if token_ids is None:
            raise ValueError("token_ids=None: a HashRouter routes by the ids of the tokens")
        # Padding often has an id of its own, such as -1.
        ids = token_ids if mask is None else token_ids.masked_fill(~mask, 0)
        known = (ids >= 0) & (ids < len(self.table))
        if not known.all():
            wrong, last = int(ids[~known][0]), len(self.table) - 1
            raise ValueError(f"token id {wrong} is outside 0 to vocab_size - 1={last}")
        experts = self.table[ids][:, None]
        dtype = torch.promote_types(x.dtype, torch.float32)
        scores = F.one_hot(experts[:, 0], self.n_experts).to(dtype)
        weights = torch.ones_like(experts, dtype=dtype)
        return decide(experts, weights, torch.zeros_like(scores), scores, mask)

    def extra_repr(self) -> str:
        sizes = f"n_experts={self.n_experts}, vocab_size={self.vocab_size}"
        return f"{sizes}, k={self.k}, seed={self.seed}"
