"""Experts that don't fit: they stay in files or in host memory, and come when asked for.

    model = offload.load(folder, resident=2**30, policy="lru")    # its experts share 1 GiB
    generation.generate(model, prompt, 50); offload.pool_of(model).stats.hit_rate
    offload.simulate(trace, slots=24, policy="lfu").hit_rate      # of a telemetry.Trace

A few experts of a layer serve a token, so a decode step of one sequence reads little, and much of
it again in the next steps. Prefill and large batches touch nearly all experts of each layer: there
a small resident set can't help.
"""

from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import _described
from ..checkpoints.family import HEAD
from ..checkpoints.folder import survey
from ..checkpoints.reading import allocate, dtypes, matched, spellings
from ..checkpoints.run import own_tensors
from ..layer import MoELayer
from ..model import Transformer
from ..telemetry import Trace
from .fetching import Host, Reader, Shards
from .policy import POLICIES, Policy, Residents, Stats
from .store import Fetched, Pool, Store, early

__all__ = [
    "POLICIES",
    "Fetched",
    "Host",
    "Policy",
    "Pool",
    "Residents",
    "Stats",
    "Store",
    "early",
    "guess_early",
    "load",
    "pool_of",
    "simulate",
]


def load(
    folder: str | Path,
    *,
    resident: int,
    policy: str = "lru",
    prefetch: bool = False,
    hot: Trace | None = None,
    decay: float = 0.99,
    trace: Trace | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Transformer:
    """A model whose experts stay in the files of its checkpoint, for inference.

    All else is in memory. The experts are read without mapping the files, which stay open. The
    model computes what `checkpoints.load(folder)` computes, to the bit if that has backend "loop";
    without gradients.

    Args:
        folder, device, dtype: as in `checkpoints.load`.
        resident: bytes for experts, shared by all layers.
        policy: as in `Store`.
        prefetch: whether the experts that the next router would choose for this layer's hidden
            states are read in the background.
        hot, decay, trace: as in `Pool`.

    Raises:
        FileNotFoundError, ValueError: as `checkpoints.load` does; and if the model has no experts,
            its weights are quantised, or the budget is less than one expert.

    Example:
        >>> import tempfile
        >>> from moe_ref import checkpoints
        >>> config = TransformerConfig(50, 16, n_layers=2, n_heads=4, d_ff=12, n_experts=8)
        >>> model, tokens = Transformer(config).eval(), torch.tensor([[3, 1, 4]])
        >>> with tempfile.TemporaryDirectory() as name, torch.no_grad():
        ...     checkpoints.save(model, name)
        ...     offloaded = load(name, resident=10_000)
        ...     torch.allclose(offloaded(tokens).logits, model(tokens).logits, atol=1e-5)
        True
    """
    folder = Path(folder)
    layout, config, plan = _described(folder)
    if plan:
        raise ValueError(
            f"{folder} holds quantised weights: they are loaded whole, by checkpoints.load"
        )
    if not config.has_experts:
        raise ValueError(f"{folder} holds a model without experts: use checkpoints.load")
    found = survey(folder)
    with torch.device("meta"):
        model = Transformer(config)
    known = {HEAD, *(name for t, place in layout.items() for name in spellings(t, place))}
    sources = matched(layout, model.state_dict(keep_vars=True), found, folder, known)
    kinds = dtypes(sources) if dtype is None else defaultdict(lambda: dtype)
    layers: dict[str, Any] = {
        f"blocks.{i}.mlp.experts": block.mlp
        for i, block in enumerate(_blocks(model))
        if isinstance(block.mlp, MoELayer)
    }
    counts = {name: layer.experts.n_experts for name, layer in layers.items()}
    theirs = [source for source in sources if source.place.ours.rpartition(".")[0] in layers]
    reader = Reader(entry.path for source in sources for entry in source.entries)
    first = next(iter(layers))
    pool = Pool(
        Shards(reader, theirs, counts),
        layers[first].experts,
        total=sum(counts.values()),
        resident=resident,
        policy=policy,
        hot=hot,
        decay=decay,
        trace=trace,
        device=device,
        dtype=kinds[f"{first}.down"],
    )
    for i, layer in enumerate(layers.values()):
        layer.dispatch = store = Store(pool, layer=i)
        layer.experts = Fetched(layer.experts, store)
    allocate(model, kinds, device)
    tensors = own_tensors(model)
    for source in sources:
        if source.place.ours in tensors:
            reader.fill(source, source.place.of(tensors))
    if prefetch:
        guess_early(model)
    return model.eval().requires_grad_(False)


def guess_early(model: Transformer) -> None:
    """Let each MoE layer of an offloaded model read ahead what the next one will likely want.

    The next router gets this layer's tokens, with the scale of each feature that its own norm has
    learned in place of this one's.

    Args:
        model: from `load`; it is changed in place.
    """
    blocks = [block for block in _blocks(model) if isinstance(block.mlp, MoELayer)]
    for block, after in pairwise(blocks):
        factor = after.mlp_norm.weight.detach() / block.mlp_norm.weight.detach()
        block.mlp.dispatch.guess = early(after.mlp.router, factor.nan_to_num(0, 0, 0))


def pool_of(model: Transformer) -> Pool:
    """The slots that the layers of an offloaded model share; `load` has an example.

    Raises:
        ValueError: if the model's experts are all in memory.
    """
    for part in model.modules():
        if isinstance(part, MoELayer) and isinstance(part.dispatch, Store):
            return part.dispatch.pool
    raise ValueError("the model is not from offload.load: its experts are all in memory")


def simulate(
    trace: Trace,
    slots: int,
    policy: str = "lru",
    *,
    prefetch: bool = False,
    hot: Trace | None = None,
    decay: float = 0.99,
    read_bytes: int = 0,
) -> Stats:
    """What a trace would have hit and missed with these slots: exactly what a `Pool` would.

    Args:
        trace: what each layer asked for, and for `prefetch` what was guessed.
        slots: experts that fit.
        policy, hot, decay: as in `Store`.
        prefetch: whether what was guessed is read ahead.
        read_bytes: of an expert, if bytes are to be counted.

    Raises:
        ValueError: if an argument is impossible.

    Example:
        >>> trace = Trace()
        >>> for experts in ([1, 2], [2, 3], [2, 3]):
        ...     trace.touched(0, experts)
        >>> simulate(trace, slots=2), simulate(trace, slots=2, policy="none").hit_rate
        (Stats(hits=3, misses=3, prefetched=0, used=0, read_bytes=0), 0.0)
    """
    popular = () if hot is None else hot.popular()
    residents = Residents(slots, policy, hot=popular, decay=decay)
    residents.stats.read_bytes = read_bytes
    for layer, experts, is_guess in trace.events:
        if not is_guess:
            for _ in residents.visit(layer, experts):
                pass
        elif prefetch:
            residents.prefetch(layer, experts)
    return residents.stats


def _blocks(model: Transformer) -> list[Any]:
    return list(model.blocks)
