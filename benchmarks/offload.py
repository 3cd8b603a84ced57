"""How often the expert that a layer asks for is in memory, by policy, share that fits and batch.

    python benchmarks/offload.py [--model FOLDER] [--tokens N]

Held-out text is read by prefill, and token by token in batches of 1, 4 and 16 sequences. What each
layer asks for is recorded once, with the guess of it that the router makes a layer early, and then
replayed for each policy and share: `offload.simulate` counts what the store would count, exactly.
"pinned" keeps what was popular in the training part of the same domains.

"touched" is the share of its experts that a layer asks for in one forward: no cache that is much
smaller can help. "once" is the rate of a store that holds everything, in which an expert misses
only when it is first asked for.
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from moe_ref import Transformer, offload
from moe_ref.course import corpora
from moe_ref.kv_cache import ContiguousCache
from moe_ref.telemetry import Trace

SHARES = (0.125, 0.25, 0.5, 0.75)
LENGTH = 128  # tokens of a sequence


def sequences(part: str, batch: int, tokens: int) -> Iterator[Tensor]:
    """Batches of windows of all domains, until they hold so many tokens."""
    drawn = corpora.batches(corpora.DOMAINS, batch=batch, seq=LENGTH, part=part)
    for _ in range(max(1, tokens // (batch * LENGTH))):
        yield next(drawn).inputs


@torch.no_grad()
def decode(model: Transformer, batch: int, tokens: int) -> None:
    """Read text token by token, as if the model had written it."""
    weight = model.embedding.weight
    for text in sequences("held_out", batch, tokens):
        cache = ContiguousCache(model.config, batch, LENGTH, dtype=weight.dtype)
        for t in range(LENGTH):
            model(text[:, t : t + 1], cache=cache)


@torch.no_grad()
def prefill(model: Transformer, part: str, batch: int, tokens: int) -> None:
    """Read whole sequences, so many at a time."""
    for text in sequences(part, batch, tokens):
        model(text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(corpora.data_file("tiny-moe")))
    parser.add_argument("--tokens", type=int, default=1024, help="to read in each case")
    options = parser.parse_args(arguments)
    hot = Trace()
    model = offload.load(options.model, resident=2**40, prefetch=True, trace=hot)
    pool, config = offload.pool_of(model), model.config
    prefill(model, "train", 1, 4 * options.tokens)
    total = sum(config.experts_of(i) for i in range(config.n_layers))
    cases = {f"decode, batch {batch}": batch for batch in (1, 4, 16)} | {"prefill, 128 tokens": 0}
    print(f"{'':20} {'policy':14}" + "".join(f"{share:8.1%}" for share in SHARES))
    for name, batch in cases.items():
        pool.trace = trace = Trace()
        if batch:
            decode(model, batch, options.tokens)
        else:
            prefill(model, "held_out", 1, options.tokens)
        report(name, trace, hot, total)


def report(name: str, trace: Trace, hot: Trace, total: int) -> None:
    """The rows of one case, and in a line of its own what they should be seen against."""
    for policy in offload.POLICIES:
        for prefetch in (False, True):
            counts = [
                offload.simulate(trace, round(total * share), policy, hot=hot, prefetch=prefetch)
                for share in SHARES
            ]
            rates = "".join(f"{stats.hit_rate:8.1%}" for stats in counts)
            print(f"{name:20} {policy + ' + guess' * prefetch:14}{rates}")
            if prefetch:
                asked = counts[0].hits + counts[0].misses
                reads = "".join(f"{(c.misses + c.prefetched) / asked:8.1%}" for c in counts)
                print(f"{name:20} {'  read/asked':14}{reads}")
    asked = [(layer, experts) for layer, experts, guess in trace.events if not guess]
    layers = 1 + max(layer for layer, _ in asked)
    touched = sum(len(experts) for _, experts in asked) / len(asked) / (total / layers)
    once = offload.simulate(trace, total).hit_rate
    print(
        f"{name:20} touched {touched:.1%}, once {once:.1%}, guessed right"
        f" {trace.guessed_right:.1%} of those asked for\n"
    )


if __name__ == "__main__":
    main()
