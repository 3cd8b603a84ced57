"""How often the expert that a layer asks for is in memory, by policy, share that fits and batch.

    python benchmarks/offload.py [--model FOLDER] [--tokens N] [--length N]

Held-out text is read by prefill, and token by token in batches of 1, 4 and 16 sequences. What each
layer asks for is recorded once, with the guess of it that the router makes a layer early, and then
replayed for each policy and share: `offload.simulate` counts what the store would count, exactly.
"pinned" keeps what was popular in the training part of the same domains.

A cell is the hit rate; with guesses also the experts read, of those asked for, wrong guesses among
them. "touched" is the share of its experts that a layer asks for in one forward. "once" is the rate
of a store that holds everything, in which an expert misses only when it is first asked for.
"guessed right" is the share of those asked for that had been guessed, from the second layer on.
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


def sequences(part: str, batch: int, seq: int, tokens: int) -> Iterator[Tensor]:
    """Batches of windows of all domains, until they hold so many tokens."""
    drawn = corpora.batches(corpora.DOMAINS, batch=batch, seq=seq, part=part)
    for _ in range(max(1, tokens // (batch * seq))):
        yield next(drawn).inputs


@torch.no_grad()
def decode(model: Transformer, batch: int, seq: int, tokens: int) -> None:
    """Read text token by token, as if the model had written it."""
    weight = model.embedding.weight
    for text in sequences("held_out", batch, seq, tokens):
        cache = ContiguousCache(model.config, batch, seq, dtype=weight.dtype)
        for t in range(seq):
            model(text[:, t : t + 1], cache=cache)


@torch.no_grad()
def prefill(model: Transformer, part: str, seq: int, tokens: int) -> None:
    """Read whole sequences, one at a time."""
    for text in sequences(part, 1, seq, tokens):
        model(text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(corpora.data_file("tiny-moe")))
    parser.add_argument("--tokens", type=int, default=1024, help="to read in each case")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    options = parser.parse_args(arguments)
    seq = options.length
    hot = Trace()
    model = offload.load(options.model, resident=2**40, prefetch=True, trace=hot)
    pool, config = offload.pool_of(model), model.config
    prefill(model, "train", seq, 4 * options.tokens)
    total = sum(config.experts_of(i) for i in range(config.n_layers))
    cases = {f"decode, batch {batch}": batch for batch in (1, 4, 16)} | {
        f"prefill, {seq} tokens": 0
    }
    print("| text | policy |" + "".join(f" {share:.1%} fit |" for share in SHARES))
    print("|---|---|" + "--:|" * len(SHARES))
    notes = []
    for name, batch in cases.items():
        pool.trace = trace = Trace()
        if batch:
            decode(model, batch, seq, options.tokens)
        else:
            prefill(model, "held_out", seq, options.tokens)
        report(name, trace, hot, total)
        notes.append(note(name, trace, total))
    print("", *notes, sep="\n")


def report(name: str, trace: Trace, hot: Trace, total: int) -> None:
    """The rows of one case."""
    for policy in offload.POLICIES:
        for prefetch in (False, True):
            cells = []
            for share in SHARES:
                slots = round(total * share)
                counts = offload.simulate(trace, slots, policy, hot=hot, prefetch=prefetch)
                reads = (counts.misses + counts.prefetched) / (counts.hits + counts.misses)
                cells.append(f"{counts.hit_rate:.1%}" + f", {reads:.2f} reads" * prefetch)
            print(f"| {name} | {policy}{', guessed' * prefetch} | {' | '.join(cells)} |")


def note(name: str, trace: Trace, total: int) -> str:
    """What the rows of one case should be seen against."""
    asked = [(layer, experts) for layer, experts, guess in trace.events if not guess]
    layers = 1 + max(layer for layer, _ in asked)
    touched = sum(len(experts) for _, experts in asked) / len(asked) / (total / layers)
    once = offload.simulate(trace, total).hit_rate
    right = [guessed_right(trace, layer) for layer in range(1, layers)]
    return (
        f"{name}: touched {touched:.1%}, once {once:.1%}, guessed right {trace.guessed_right:.1%}"
        f" (by layer: {', '.join(f'{share:.1%}' for share in right)})"
    )


def guessed_right(trace: Trace, layer: int) -> float:
    """The same share of one layer."""
    part = Trace()
    part.events = [event for event in trace.events if event[0] == layer]
    return part.guessed_right


if __name__ == "__main__":
    main()
