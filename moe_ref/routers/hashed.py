"""Hash routing: a fixed table instead of anything learned."""

import heapq
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .._validate import check_sizes
from ..routing import Routing, decide


class HashRouter(nn.Module):
    """A fixed table sends each token id to one expert, with weight 1; nothing is learned.

    The table is one of two:

    - dealt at random: every expert gets the same number of ids, to within one. The load of a text
      is uneven, because some ids are far more frequent than others;
    - balanced, if `frequencies` are given: the most frequent id first, each to the expert with the
      least load so far. The busiest expert then has at most the mean load and one id more. Ids of
      frequency 0 are dealt at random.

    Logits are 0, and the score of the chosen expert is 1.

    Args:
        n_experts: experts to choose from.
        vocab_size: token ids are 0 to vocab_size - 1.
        seed: of the dealing, and of the order of ids that are equally frequent.
        frequencies: how often each id occurs in the training text, as counts or shares.

    Raises:
        ValueError: if a size is below 1, or `frequencies` are not one finite number, at least 0,
            for each id; in the call, without ids or with one outside the table.

    Example:
        >>> x, text = torch.zeros(9, 4), torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 3])
        >>> HashRouter(n_experts=2, vocab_size=6)(x, token_ids=text).counts
        tensor([6, 3])
        >>> router = HashRouter(n_experts=2, vocab_size=6, frequencies=[5, 2, 1, 1, 0, 0])
        >>> router(x, token_ids=text).counts
        tensor([5, 4])

    Source: Roller et al. 2021 (2106.04426), section 3: random hashing, which draws each id's expert
    by itself rather than dealing them out, and balanced assignment.
    """

    causal = True
    k = 1
    table: Tensor

    def __init__(
        self,
        n_experts: int,
        vocab_size: int,
        *,
        seed: int = 0,
        frequencies: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__()
        check_sizes(n_experts=n_experts, vocab_size=vocab_size)
        self.n_experts, self.vocab_size, self.seed = n_experts, vocab_size, seed
        self.balanced = frequencies is not None
        generator = torch.Generator("cpu").manual_seed(seed)
        place = torch.randperm(vocab_size, generator=generator, device="cpu")
        table = place % n_experts
        if frequencies is not None:
            known, order = _check(frequencies, vocab_size), place.argsort()
            balanced = _balance(table.tolist(), known, order.tolist(), n_experts)
            table = torch.tensor(balanced, device="cpu")
        self.register_buffer("table", table.to(torch.get_default_device()))

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
        return f"{sizes}, k={self.k}, seed={self.seed}" + ", balanced" * self.balanced


def _check(frequencies: Sequence[float] | Tensor, vocab_size: int) -> list[float]:
    """`frequencies` as a list, or a ValueError if they can't be frequencies."""
    numbers = torch.as_tensor(frequencies, dtype=torch.float64, device="cpu")
    if numbers.shape != (vocab_size,):
        shape = list(numbers.shape)
        raise ValueError(f"frequencies of shape {shape} are not one for each of {vocab_size=} ids")
    wrong = ~((numbers >= 0) & numbers.isfinite())
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(f"frequencies[{at}]={numbers[at]:g} is not a finite number from 0")
    return numbers.tolist()


def _balance(
    dealt: list[int], frequencies: list[float], order: list[int], n_experts: int
) -> list[int]:
    """The table with the experts of all ids that occur; equally frequent ids stay in `order`."""
    table = dealt.copy()
    seen = [token_id for token_id in order if frequencies[token_id]]
    loads = [(0.0, expert) for expert in range(n_experts)]  # sorted, and therefore a heap
    for token_id in sorted(seen, key=frequencies.__getitem__, reverse=True):
        load, expert = loads[0]
        table[token_id] = expert
        heapq.heapreplace(loads, (load + frequencies[token_id], expert))
    return table
