"""Text from a model, token by token: prefill the prompt, then decode with the key-value cache."""

import reprlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ._validate import check_sizes
from .kv_cache import ContiguousCache
from .model import Transformer, evaluating


def generate(
    model: Transformer,
    prompt: Int[Tensor, "batch seq"],
    length: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: int | None = None,
) -> Int[Tensor, "batch prompt_and_new"]:
    """Continue a prompt.

    Args:
        model, prompt, length, temperature, top_p, seed, stop: as in `stream`.

    Returns:
        The prompt and the new tokens, at most `length` for each sequence.

    Raises:
        ValueError: as `stream` does.

    Example:
        >>> model = Transformer(TransformerConfig(100, 32, n_layers=2, n_heads=4, d_ff=48))
        >>> generate(model, torch.tensor([[3, 1, 4]]), 5).shape
        torch.Size([1, 8])
    """
    new = stream(model, prompt, length, temperature=temperature, top_p=top_p, seed=seed, stop=stop)
    return torch.cat([prompt, *(column[:, None] for column in new)], dim=1)


def stream(
    model: Transformer,
    prompt: Int[Tensor, "batch seq"],
    length: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: int | None = None,
) -> Iterator[Int[Tensor, " batch"]]:
    """Continue a prompt, and hand out each new token as it is made.

    Args:
        model: computes as in evaluation, and is left in the mode it was in.
        prompt: token ids, at least one; all sequences are equally long, without padding.
        length: the most new tokens of each sequence.
        temperature: 0 takes the likeliest token; else logits are divided by it before sampling.
        top_p: sample from the fewest likeliest tokens whose probabilities add up to it.
        seed: of the sampling; the same seed draws the same text on the same machine.
        stop: the id that ends a sequence, which then repeats it; the stream ends when all have
            ended. None: none does.

    Returns:
        An iterator over the new tokens: one for each sequence, up to `length` times.

    Raises:
        ValueError: if an argument is impossible, or a router is not causal, like expert choice.

    Example:
        >>> model = Transformer(TransformerConfig(100, 32, n_layers=2, n_heads=4, d_ff=48))
        >>> len(list(stream(model, torch.tensor([[3, 1, 4]]), 5)))
        5
    """
    _check(model, prompt, length, temperature, top_p)
    generator = torch.Generator(model.embedding.weight.device).manual_seed(seed)
    choose = partial(sample, temperature=temperature, top_p=top_p, generator=generator)
    return _decode(model, prompt, length, choose, stop)


def _decode(
    model: Transformer,
    prompt: Int[Tensor, "batch seq"],
    length: int,
    choose: Callable[[Tensor], Tensor],
    stop: int | None,
) -> Iterator[Int[Tensor, " batch"]]:
    weight = model.embedding.weight
    batch, room = len(prompt), prompt.shape[1] + length
    cache = ContiguousCache(model.config, batch, room, device=weight.device, dtype=weight.dtype)
    tokens = prompt.to(weight.device)
    done = torch.zeros(batch, dtype=torch.bool, device=weight.device)
    for _ in range(length):
        with evaluating(model):  # for each token, as the caller may train between two of them
            chosen = choose(model(tokens, cache=cache).logits[:, -1])
        if stop is not None:
            chosen = chosen.masked_fill(done, stop)
            done |= chosen == stop
        yield chosen.to(prompt.device)
        if done.all():
            return
        tokens = chosen[:, None]


def sample(
    logits: Float[Tensor, "batch vocab"],
    temperature: float,
    top_p: float,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " batch"]:
    """The id of one token for each row.

    Args:
        logits: of the next token.
        temperature, top_p: as in `stream`.
        generator: of the random numbers; None: torch's own.

    Example:
        >>> sample(torch.tensor([[0.0, 2.0, 1.0]]), temperature=0.0, top_p=1.0)
        tensor([1])

    Source: top-p, or nucleus, sampling: Holtzman et al. 2019 (1904.09751), section 3.1.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    shares = (logits.float() / temperature).softmax(dim=-1)
    if top_p < 1:
        falling, order = shares.sort(dim=-1, descending=True, stable=True)
        # A token stays while those before it have not filled top_p; the first always stays.
        beyond = falling.cumsum(dim=-1) - falling >= top_p
        shares = shares.scatter(-1, order, falling.masked_fill(beyond, 0))
    return torch.multinomial(shares, 1, generator=generator)[:, 0]


def _check(
    model: Transformer, prompt: Tensor, length: int, temperature: float, top_p: float
) -> None:
    wanted = (
        "token ids are wanted, a tensor of integers [batch, seq]. Encode text with a tokenizer"
        " first; prompt[None] makes one sequence a batch"
    )
    if not isinstance(prompt, Tensor):
        kind = type(prompt).__name__
        raise ValueError(f"prompt={reprlib.repr(prompt)} is a {kind}: {wanted}")
    if prompt.ndim != 2 or prompt.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"prompt holds {prompt.dtype} with shape {list(prompt.shape)}: {wanted}")
    if 0 in prompt.shape:
        raise ValueError("the prompt is empty: give at least one token, such as the end-of-text")
    if not isinstance(length, int):
        raise ValueError(f"length={length!r} is a {type(length).__name__}: give an int, 1 or more")
    check_sizes(length=length)
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature} must be 0 or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is not more than 0 and at most 1")
    for module in model.modules():
        if not getattr(module, "causal", True):
            raise ValueError(
                f"{type(module).__name__} is not causal: which experts a token gets depends on"
                " tokens that come after it, and those do not exist yet during generation"
            )
