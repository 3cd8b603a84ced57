"""What 8 and 4 bits cost and gain: bytes, errors and held-out loss of tiny-moe, speed of decode.

    python benchmarks/quantise.py [loss] [errors] [products] [tiles]
        [decode] [--windows N] [--seconds S]

loss: tiny-moe in bfloat16, then quantised; its loss in float32 arithmetic, so that all of a change
is the weights'. In a mixed row half of each layer's experts have 8 bits and half have 4: those that
training text asks for most ("hot"), those it asks for least ("cold"), or any. errors: of each
expert. products: numbers of a weight that one product gets through, GB/s of bfloat16 being twice
that. tiles: the same by the two constants of the product. decode: steps of a model whose weights
exceed the caches, against bfloat16.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ref import Transformer, TransformerConfig, checkpoints, generation
from moe_ref.course import corpora, lesson
from moe_ref.kernels import cpu
from moe_ref.kernels import quantised as kernel
from moe_ref.kernels.quantised import QuantisedWeight, product
from moe_ref.quantise import errors, nbytes, quantise_model

# Outputs and inputs of the first projection of OLMoE's experts, then of a quarter of Mixtral's.
SHAPES = [(2048, 2048), (7168, 1024)]
DECODED = TransformerConfig(
    2048, 1024, n_layers=4, n_heads=16, d_ff=2048, n_kv_heads=4, n_experts=8
)
STEPS = 16
TILES = (16, 18, 19, 20, 21)


def popularity(model: Transformer, batches: int = 16) -> Tensor:
    """How often training text asks for each expert: [layers, n_experts]."""
    demand = 0
    for batch in islice(corpora.batches(corpora.DOMAINS, batch=16, seq=128), batches):
        with torch.no_grad():
            routings = model(batch.inputs).routings
        demand = demand + torch.stack([routing.demand for routing in routings])
    return demand


def mixed(demand: Tensor, order: str) -> list[list[int]]:
    """8 bits for half of each layer's experts, 4 for the others."""
    ranks = demand.argsort(dim=1, descending=order == "hot").argsort(dim=1)
    if order == "any":
        torch.manual_seed(0)
        ranks = torch.stack([torch.randperm(demand.shape[1]) for _ in demand])
    return torch.where(ranks < demand.shape[1] // 2, 8, 4).tolist()


def losses(model: Transformer, windows: int) -> dict[str, float]:
    found = corpora.held_out_losses(model.float(), corpora.DOMAINS, limit=windows)
    return found | {"all": corpora.mean_loss(found)}


def loss_table(options: argparse.Namespace) -> None:
    model = checkpoints.load(corpora.data_file("tiny-moe"))
    demand = popularity(checkpoints.load(corpora.data_file("tiny-moe"), dtype=torch.float32))
    hot = torch.tensor(mixed(demand, "hot")) == 8
    print(
        f"The hot half of the experts gets {(demand * hot).sum() / demand.sum():.0%} of the slots"
    )
    before = losses(checkpoints.load(corpora.data_file("tiny-moe")), options.windows)
    print("| weights | bits a number of an expert | MB | " + " | ".join(before) + " |")
    print("|---|--:|--:|" + "--:|" * len(before))
    cells = " | ".join(f"{loss:.4f}" for loss in before.values())
    print(f"| bfloat16 | 16 | {nbytes(model) / 1e6:.2f} | {cells} |")
    rows: dict[str, dict] = {"int8, groups of 32": {"bits": 8}, "int4, groups of 32": {"bits": 4}}
    rows |= {f"int4, groups of {g}": {"bits": 4, "group": g} for g in (8, 16, 64, 128)}
    rows |= {f"int{b}, a scale a row": {"bits": b, "group": 2**20} for b in (8, 4)}
    rows |= {f"int{b}, all matrices": {"bits": b, "which": "all"} for b in (8, 4)}
    rows |= {f"8 and 4, {name} 8": {"bits": mixed(demand, name)} for name in ("hot", "cold", "any")}
    numbers = sum(part.numel() for name, part in model.named_parameters() if "experts" in name)
    for name, arguments in rows.items():
        small = quantise_model(model, **arguments)
        held = sum(nbytes(block.mlp.experts) for block in small.blocks)
        said = f"| {name} | {8 * held / numbers:.2f} | {nbytes(small) / 1e6:.2f} | "
        after = losses(small, options.windows)
        print(said + " | ".join(f"{after[n] - before[n]:+.4f}" for n in before) + " |", flush=True)


def error_table(options: argparse.Namespace) -> None:
    model = checkpoints.load(corpora.data_file("tiny-moe"))
    n_experts = model.config.experts_of(0)
    print("Error of each expert, %: norm of what its weights lost, over their own")
    print("| layer | bits | " + " | ".join(map(str, range(n_experts))) + " |")
    print("|--:|--:|" + "--:|" * n_experts)
    for bits in (8, 4):
        small = quantise_model(model, bits)
        for i, (block, held) in enumerate(zip(model.blocks, small.blocks, strict=True)):
            found = errors(block.mlp.experts, held.mlp.experts)
            print(f"| {i} | {bits} | " + " | ".join(f"{100 * x:.2f}" for x in found) + " |")


def each(way: Callable[[Tensor, object], Tensor], rows: Tensor, weights: list) -> None:
    for weight in weights:
        way(rows, weight)


def product_table(options: argparse.Namespace) -> None:
    """How many numbers of a weight each way gets through, billions a second."""
    rows_of = (1, 8, 64)
    print(
        "| outputs, inputs | way | " + " | ".join(f"{n} row{'s' * (n > 1)}" for n in rows_of) + " |"
    )
    print("|---|---|" + "--:|" * len(rows_of))
    for outputs, inputs in SHAPES:
        many = 2**26 // (outputs * inputs)  # they take turns, so that none is in a cache
        weights = [torch.randn(outputs, inputs) for _ in range(many)]
        scale = torch.rand(outputs).bfloat16()
        held = {b: [QuantisedWeight(w[None].bfloat16(), b) for w in weights] for b in (8, 4)}
        codes = [part.codes.view(outputs, inputs) for part in held[8]]
        narrow = [w.bfloat16() for w in weights]

        def by_codes(rows: Tensor, weight: QuantisedWeight) -> Tensor:
            return product(rows, [len(rows)], weight, None)

        def packed(rows: Tensor, weight: Tensor, scale: Tensor = scale) -> Tensor:
            return torch._weight_int8pack_mm(rows, weight, scale)

        ways = {"float32": (cpu.linear, torch.float32, weights)}
        ways["bfloat16"] = (F.linear, torch.bfloat16, narrow)
        ways |= {f"int{b}, bfloat16 rows": (by_codes, torch.bfloat16, held[b]) for b in held}
        ways |= {f"int{b}, float32 rows": (by_codes, torch.float32, held[b]) for b in held}
        # One scale a row, and not public: what a kernel for this could reach.
        ways["torch's int8 kernel"] = (packed, torch.bfloat16, codes)
        cells: dict[str, list[str]] = {name: [] for name in ways}
        for n in rows_of:
            rows = torch.randn(n, inputs)
            runners = {
                name: partial(each, partial(way, bias=None) if way is cpu.linear else way, x, own)
                for name, (way, dtype, own) in ways.items()
                for x in [rows.to(dtype)]
            }
            for name, seconds in lesson.race(runners, seconds=options.seconds).items():
                cells[name].append(f"{many * outputs * inputs / seconds / 1e9:.2f}")
        for name, speeds in cells.items():
            print(f"| {outputs}, {inputs} | {name} | " + " | ".join(speeds) + " |", flush=True)


def tile_table(options: argparse.Namespace) -> None:
    """The two constants of the product: numbers that it decodes at a time, rows that are few."""
    print("| bits | rows | rows that are few | " + " | ".join(f"2^{n}" for n in TILES) + " |")
    print("|--:|--:|--:|" + "--:|" * len(TILES))
    outputs, inputs = SHAPES[1]

    def by_tiles(tile: int, few: int, rows: Tensor, held: list[QuantisedWeight]) -> None:
        kernel.TILE, kernel.FEW_ROWS = 2**tile, few
        for weight in held:
            product(rows, [len(rows)], weight, None)

    before = kernel.TILE, kernel.FEW_ROWS
    for bits in (8, 4):
        weight = torch.randn(1, outputs, inputs).bfloat16()
        held = [QuantisedWeight(weight, bits) for _ in range(2**26 // weight.numel())]
        for n in (1, 2, 8):
            rows = torch.randn(n, inputs).bfloat16()
            runners = {
                (tile, few): partial(by_tiles, tile, few, rows, held)
                for tile in TILES
                for few in (0, n)
            }
            times = lesson.race(runners, seconds=options.seconds)
            for few in (0, n):
                cells = [f"{len(held) * weight.numel() / times[t, few] / 1e9:.2f}" for t in TILES]
                print(f"| {bits} | {n} | {few} | " + " | ".join(cells) + " |", flush=True)
    kernel.TILE, kernel.FEW_ROWS = before


def decode_table(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    wide = Transformer(DECODED).eval()
    models = {"bfloat16": Transformer(DECODED).bfloat16().eval(), "float32": wide}
    models["bfloat16"].load_state_dict(wide.state_dict())
    for bits in (8, 4):
        models[f"int{bits}, bfloat16 rows"] = quantise_model(models["bfloat16"], bits)
        models[f"int{bits}, float32 rows"] = quantise_model(models["float32"], bits)
    millions = sum(parameter.numel() for parameter in wide.parameters()) / 1e6
    print(f"{DECODED.n_experts} experts of {DECODED.d_model} x {DECODED.d_ff}, {millions:.0f}M")
    print("| weights | MB | batch | ms a step | speed / bfloat16 |")
    print("|---|--:|--:|--:|--:|")
    for batch in (1, 4, 16):
        prompt = torch.randint(2048, (batch, 1))
        runners = {
            name: partial(generation.generate, model, prompt, STEPS)
            for name, model in models.items()
        }
        times = lesson.race(runners, seconds=options.seconds)
        for name, seconds in times.items():
            ratio = times["bfloat16"] / seconds
            size = nbytes(models[name]) / 1e6
            print(f"| {name} | {size:.0f} | {batch} | {1000 * seconds / STEPS:.2f} | {ratio:.2f} |")


TABLES = {
    "loss": loss_table,
    "errors": error_table,
    "products": product_table,
    "tiles": tile_table,
    "decode": decode_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", default=list(TABLES), help=", ".join(TABLES))
    parser.add_argument("--windows", type=int, default=None, help="of each domain; default: all")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each timing")
    options = parser.parse_args()
    if unknown := set(options.tables) - set(TABLES):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(TABLES)}")
    for name in options.tables:
        TABLES[name](options)
        print()


if __name__ == "__main__":
    main()
