"""Text from a model, token by token: prefill the prompt, then decode with the key-value cache."""

import operator
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict, Unpack, overload

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from ._validate import check_sizes
from .kv_cache import ContiguousCache, KVCache, check_cache
from .model import Transformer, evaluating
from .prompts import padded
from .sampling import Sampling, sample

Ids = Sequence[int] | Int[Tensor, " _seq"]


class _Options(TypedDict, total=False):
    mask: Tensor | None
    cache: KVCache | None
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | Sequence[int]
    stop: int | Sequence[int] | None


@overload
def generate(
    model: Transformer, prompt: Tensor, length: int, **options: Unpack[_Options]
) -> Tensor: ...
@overload
def generate(
    model: Transformer, prompt: Sequence[Ids], length: int, **options: Unpack[_Options]
) -> list[Tensor]: ...
def generate(
    model: Transformer,
    prompt: Int[Tensor, "batch seq"] | Sequence[Ids],
    length: int,
    *,
    mask: Bool[Tensor, "batch seq"] | None = None,
    cache: KVCache | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] = 0,
    stop: int | Sequence[int] | None = None,
) -> Int[Tensor, "batch prompt_and_new"] | list[Tensor]:
    """Continue a prompt.

    Args:
        model, prompt, length: as in `stream`, and so are all options.

    Returns:
        The prompt and the new tokens, at most `length` for each sequence. Of a tensor, a tensor:
        the prompt as it was given, then the new tokens. Of a list, a list: each sequence with its
        new tokens, up to and with its own stop.

    Raises:
        ValueError: as `stream` does.

    Example:
        >>> model = Transformer(TransformerConfig(100, 32, n_layers=2, n_heads=4, d_ff=48))
        >>> generate(model, torch.tensor([[3, 1, 4]]), 5).shape
        torch.Size([1, 8])
        >>> [len(text) for text in generate(model, [[3, 1, 4], [1]], 5)]
        [8, 6]
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    steps = _start(model, prompt, length, sampling, mask, cache, seed, stop)
    with evaluating(model):
        new = torch.stack([step.tokens for step in steps], dim=1)
    if isinstance(prompt, Tensor):
        return torch.cat([prompt, new.to(prompt.device)], dim=1)
    rows = map(torch.as_tensor, prompt)
    return [
        torch.cat([row, tokens.to(row.device)])
        for row, tokens in zip(rows, _up_to_stop(new, new, stop), strict=True)
    ]


def stream(
    model: Transformer,
    prompt: Int[Tensor, "batch seq"] | Sequence[Ids],
    length: int,
    *,
    mask: Bool[Tensor, "batch seq"] | None = None,
    cache: KVCache | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] = 0,
    stop: int | Sequence[int] | None = None,
) -> Iterator[Int[Tensor, " batch"]]:
    """Continue a prompt, and hand out each new token as it is made.

    A sequence gets the tokens that it would get alone, but for rounding: a product of more rows may
    add its terms up in another order.

    Args:
        model: computes as in evaluation, and is left in the mode it was in. One of `torch.compile`
            works too; on a CPU, `data/tiny-moe` took two minutes to compile and was no faster.
        prompt: token ids, a tensor; or a list with the ids of each sequence, of any length.
        length: the most new tokens of each sequence.
        mask: False at padding in a tensor, before or after the tokens of a sequence; what stands
            there is not read. None: there is none.
        cache: for these sequences; it may hold tokens that come before the prompt, which the
            penalty does not see. Afterwards it holds all but the last new token. None: one is made.
        temperature, top_k, top_p, min_p, repetition_penalty: as in `sampling.Sampling`.
        seed: of the draws, one for all sequences or one for each; what a sequence draws depends on
            its seed and the token's position alone. So equal prompts with one seed are continued
            alike; `seed=range(8)` continues them in eight ways.
        stop: the id that ends a sequence, or several such ids. The sequence then repeats it, and
            the stream ends when all have ended. None: none does.

    Returns:
        An iterator over the new tokens: one for each sequence, up to `length` times.

    Raises:
        ValueError: if an argument is impossible, or a router is not causal, like expert choice;
            later, if a cache of a kind of its own has no more room.

    Example:
        >>> model = Transformer(TransformerConfig(100, 32, n_layers=2, n_heads=4, d_ff=48))
        >>> len(list(stream(model, torch.tensor([[3, 1, 4]]), 5)))
        5
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    steps = _start(model, prompt, length, sampling, mask, cache, seed, stop)
    device = prompt.device if isinstance(prompt, Tensor) else torch.device("cpu")
    return _one_by_one(model, steps, device)


@dataclass(frozen=True, eq=False)
class Generated:
    """New tokens, and how likely the model held each of them.

    Attributes:
        tokens: of each sequence, without the prompt, up to and with its stop.
        log_probs: of these tokens, by the model's own logits: natural logarithms, before any
            penalty, temperature or filter, so that they mean the same however tokens were chosen.

    Example:
        >>> Generated([torch.tensor([5, 2])], [torch.tensor([-0.1, -2.3])])
        Generated(sequences=1, tokens=2)
    """

    tokens: list[Int[Tensor, " _new"]]
    log_probs: list[Float[Tensor, " _new"]]

    def __repr__(self) -> str:
        return f"Generated(sequences={len(self.tokens)}, tokens={sum(map(len, self.tokens))})"


def scored(
    model: Transformer,
    prompt: Int[Tensor, "batch seq"] | Sequence[Ids],
    length: int,
    *,
    seed: int | Sequence[int] = 0,
    stop: int | Sequence[int] | None = None,
    mask: Bool[Tensor, "batch seq"] | None = None,
    cache: KVCache | None = None,
    **sampling: Any,
) -> Generated:
    """Continue a prompt, and say how likely each new token was.

    Args:
        model, prompt, length, seed, stop, mask, cache: as in `stream`.
        sampling: keyword arguments of `sampling.Sampling`.

    Raises:
        ValueError: as `stream` does.

    Example:
        >>> model = Transformer(TransformerConfig(100, 32, n_layers=2, n_heads=4, d_ff=48))
        >>> scored(model, [[3, 1, 4], [1]], 5, temperature=1.0)
        Generated(sequences=2, tokens=10)
    """
    steps = _start(model, prompt, length, Sampling(**sampling), mask, cache, seed, stop)
    tokens, log_probs = [], []
    with evaluating(model):
        for step in steps:
            tokens.append(step.tokens)
            wide = step.logits.to(torch.promote_types(step.logits.dtype, torch.float32))
            log_probs.append(wide.log_softmax(dim=-1).gather(1, step.tokens[:, None])[:, 0])
    new, scores = torch.stack(tokens, dim=1), torch.stack(log_probs, dim=1)
    return Generated(_up_to_stop(new, new, stop), _up_to_stop(scores, new, stop))


class _Step(NamedTuple):
    tokens: Int[Tensor, " batch"]
    logits: Float[Tensor, "batch vocab"]


def _start(
    model: Transformer,
    prompt: Any,
    length: int,
    sampling: Sampling,
    mask: Tensor | None,
    cache: KVCache | None,
    seed: int | Sequence[int],
    stop: int | Sequence[int] | None,
) -> Iterator[_Step]:
    """Check everything, and only then begin; the steps are computed as they are asked for."""
    tokens, mask = padded(prompt, mask)
    _check(model, tokens, length)
    seeds = _whole("seed", seed)
    seeds = seeds * len(tokens) if len(seeds) == 1 else seeds
    if len(seeds) != len(tokens):
        raise ValueError(f"seed: {len(seeds)} for {len(tokens)} sequences; give one, or one each")
    stops = [] if stop is None else _whole("stop", stop)
    if wrong := [i for i in stops if not 0 <= i < model.config.vocab_size]:
        raise ValueError(f"stop={wrong[0]} is not one of vocab_size={model.config.vocab_size}")
    weight = model.embedding.weight
    read = torch.full((len(tokens),), tokens.shape[1]) if mask is None else mask.sum(dim=1).cpu()
    if cache is None:
        room = int(read.max()) + length - 1  # the last token is not read any more
        with torch.inference_mode(False):  # else it could be written in that mode alone
            cache = ContiguousCache(
                model.config, len(tokens), room, device=weight.device, dtype=weight.dtype
            )
    check_cache(cache, model.config, weight.new_empty(len(tokens), 1, 1))
    read = read + cache.lengths
    if isinstance(cache, ContiguousCache) and (most := int(read.max()) + length - 1) > cache.length:
        raise ValueError(
            f"the cache has room for length={cache.length} tokens, not {most}: {int(read.max())} up"
            f" to the end of the prompt, and length={length} new ones but the last"
        )
    return _decode(model, tokens, mask, length, sampling, cache, seeds, read.tolist(), stops)


def _decode(
    model: Transformer,
    tokens: Int[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"] | None,
    length: int,
    sampling: Sampling,
    cache: KVCache,
    seeds: list[int],
    read: list[int],
    stops: list[int],
) -> Iterator[_Step]:
    """One step for each new token; whoever asks for it has the model evaluating."""
    device = model.embedding.weight.device
    tokens, mask = tokens.to(device), None if mask is None else mask.to(device)
    stopping, ended = torch.tensor(stops, dtype=torch.long, device=device), None
    seen = None
    if sampling.repetition_penalty != 1:
        with torch.inference_mode(False):
            size = len(tokens), model.config.vocab_size
            seen = torch.zeros(size, dtype=torch.bool, device=device)
    for step in range(length):
        if seen is not None:
            seen.scatter_(1, tokens, True)
        logits = model(tokens, mask=mask, cache=cache).logits[:, -1]
        positions = [position + step for position in read]
        chosen = sample(logits, sampling, seeds=seeds, positions=positions, seen=seen)
        if ended is not None:
            chosen = torch.where(ended, tokens[:, -1], chosen)
        yield _Step(chosen, logits)
        if stops:
            ended = torch.isin(chosen, stopping)  # and stays so: it is repeated
            if ended.all():
                return
        tokens, mask = chosen[:, None], None


def _one_by_one(
    model: Transformer, steps: Iterator[_Step], device: torch.device
) -> Iterator[Int[Tensor, " batch"]]:
    while True:
        with evaluating(model):  # for each token, as the caller may train between two of them
            step = next(steps, None)
        if step is None:
            return
        yield step.tokens.to(device)


def _up_to_stop(
    values: Num[Tensor, "batch new"],
    new: Int[Tensor, "batch new"],
    stop: int | Sequence[int] | None,
) -> list[Num[Tensor, " _row"]]:
    """Each row of `values` up to and with the place where `new` has its first stop."""
    if stop is None:
        return list(values)
    stopping = torch.tensor(_whole("stop", stop), dtype=torch.long, device=new.device)
    stopped = torch.isin(new, stopping)
    before = stopped.cumsum(dim=1) - stopped.long()
    return [row[:n] for row, n in zip(values, (before == 0).sum(dim=1).tolist(), strict=True)]


def _whole(name: str, given: Any) -> list[int]:
    """One whole number, or several, as a list."""
    with suppress(TypeError):
        return [operator.index(given)]
    try:
        return [operator.index(x) for x in given]
    except TypeError:
        raise ValueError(f"{name}={given!r} must be a whole number, or a list of them") from None


def _check(model: Transformer, tokens: Int[Tensor, "batch seq"], length: int) -> None:
    low, high, size = int(tokens.min()), int(tokens.max()), model.config.vocab_size
    if low < 0 or high >= size:
        raise ValueError(
            f"prompt: token {low if low < 0 else high} is not one of vocab_size={size}"
        )
    if not isinstance(length, int):
        raise ValueError(f"length={length!r} is a {type(length).__name__}: give an int, 1 or more")
    check_sizes(length=length)
    for module in model.modules():
        if not getattr(module, "causal", True):
            raise ValueError(
                f"{type(module).__name__} is not causal: which experts a token gets depends on"
                " tokens that come after it, and those do not exist yet during generation"
            )
