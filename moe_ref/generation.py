"""Text from a model, token by token: prefill the prompt, then decode with the key-value cache."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .model import Cache, Transformer


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
    """The prompt and what `stream` adds to it."""
    new = list(
        stream(model, prompt, length, temperature=temperature, top_p=top_p, seed=seed, stop=stop)
    )
    return torch.cat([prompt, *(column[:, None] for column in new)], dim=1)


@torch.no_grad()
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
    """Yield one new token for each sequence, up to `length` times, as they are made.

    Args:
        model: computes as in evaluation, and is left in the mode it was in.
        prompt: ids of at least one token; all sequences equally long, without padding.
        length: new tokens at most.
        temperature: 0 takes the likeliest token; else logits are divided by it before sampling.
        top_p: sample from the likeliest tokens whose probabilities add up to it.
        seed: of the sampling; the same seed draws the same text on the same machine.
        stop: a sequence that made this id repeats it, and the stream ends when all have.

    Raises:
        ValueError: if an argument is impossible, or a router is not causal, as expert choice.
    """
    _check(model, prompt, length, temperature, top_p)
    parameter = next(model.parameters())
    cache = Cache(
        model.config,
        len(prompt),
        prompt.shape[1] + length,
        device=parameter.device,
        dtype=parameter.dtype,
    )
    generator = torch.Generator(parameter.device).manual_seed(seed)
    tokens = prompt.to(parameter.device)
    done = torch.zeros(len(prompt), dtype=torch.bool, device=parameter.device)
    for _ in range(length):
        mode = model.training
        logits = model.eval()(tokens, cache=cache).logits[:, -1]
        model.train(mode)
        chosen = sample(logits, temperature, top_p, generator)
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
    """One token for each row. Top-p ("nucleus") sampling: Holtzman et al. 2019 (1904.09751)."""
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
    if prompt.shape[1] == 0:
        raise ValueError("the prompt is empty: give at least one token, such as the end-of-text")
    if length < 1:
        raise ValueError(f"length={length} must be at least 1")
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
