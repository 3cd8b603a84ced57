"""Reading into place: dtypes, orders, coded tensors, parts of a model, and memory."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_ref import MoELayer, Transformer, TransformerConfig, checkpoints
from moe_ref.checkpoints import reading
from moe_ref.checkpoints.family import Coded, Place

from .common import MOE, assert_same, build, change

TOKENS = torch.arange(12).view(2, 6)
# Dense, MoE with 4 experts, dense, MoE with 4; windows of 3 and 2 tokens, and none.
DEEP = TransformerConfig(50, 16, 4, 4, 12, n_experts=4, every=2, d_dense=20, windows=(3, 2, None))


@pytest.fixture(autouse=True)
def few_bytes_at_a_time(monkeypatch):
    """So that even small tensors are read in several pieces, and files opened several times."""
    monkeypatch.setattr(reading, "CHUNK", 100)
    monkeypatch.setattr(reading, "MAPPED", 300)


# ------------------------------------------------------------------------------------------ dtypes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_model_has_the_dtype_of_its_file(dtype, tmp_path):
    model = build().to(dtype)
    checkpoints.save(model, tmp_path)
    assert_same(checkpoints.load(tmp_path), model)


def test_of_several_dtypes_a_router_keeps_its_own_and_all_else_has_that_of_most(tmp_path):
    model = build().bfloat16()
    checkpoints.save(model, tmp_path)

    def widen(tensors):
        for name in tensors:
            if name.endswith(("block_sparse_moe.gate.weight", "norm.weight")):
                tensors[name] = tensors[name].float() * 1.001

    change(tmp_path, widen)
    loaded = checkpoints.load(tmp_path)
    for name, parameter in loaded.named_parameters():
        kind = torch.float32 if "router" in name else torch.bfloat16
        assert parameter.dtype == kind, name
    router = loaded.blocks[1].mlp.router.weight
    assert torch.equal(router, model.blocks[1].mlp.router.weight.float() * 1.001)
    assert loaded(TOKENS).logits.dtype == torch.bfloat16
    assert {p.dtype for p in checkpoints.load(tmp_path, dtype=torch.float32).parameters()} == {
        torch.float32
    }


def test_a_tied_head_stays_tied_and_every_parameter_can_be_trained(tmp_path):
    checkpoints.save(build(dataclasses.replace(MOE, tied=True)), tmp_path)
    loaded = checkpoints.load(tmp_path)
    assert loaded.head.weight is loaded.embedding.weight
    loaded(TOKENS).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


# ----------------------------------------------------------------------------------------- formats


def patched(monkeypatch, places):
    """Mixtral's format, but for some places."""
    original = checkpoints.mixtral.layout

    def layout(config):
        found = original(config)
        return places(found, config)

    monkeypatch.setattr(checkpoints.mixtral, "layout", layout)


def interleaved(found, config):
    """Experts in one tensor: inputs before outputs, and rows of gate and up in turns."""
    found = {name: place for name, place in found.items() if ".experts." not in name}
    n, d_model, d_ff = config.n_experts, config.d_model, config.d_ff
    for i in range(config.n_layers):
        found[f"{i}.gate_up"] = Place(
            f"blocks.{i}.mlp.experts.gate_up",
            view=lambda w: w.view(n, 2, d_ff, d_model).permute(0, 3, 2, 1),
            shape=(n, d_model, 2 * d_ff),
        )
        found[f"{i}.down"] = Place(f"blocks.{i}.mlp.experts.down", view=lambda w: w.mT)
    return found


def test_a_place_can_have_another_order_than_the_file(tmp_path, monkeypatch):
    patched(monkeypatch, interleaved)
    model = build()
    checkpoints.save(model, tmp_path)
    stored, experts = load_file(tmp_path / "model.safetensors"), model.blocks[1].mlp.experts
    gate, up = experts.gate_up.detach().split(12, dim=1)
    assert torch.equal(stored["1.gate_up"][..., 0::2], gate.mT)
    assert torch.equal(stored["1.gate_up"][..., 1::2], up.mT)
    assert torch.equal(stored["1.down"], experts.down.mT)
    assert_same(checkpoints.load(tmp_path), model)
    change(tmp_path, lambda tensors: tensors.update({"0.gate_up": torch.zeros(4, 24, 16)}))
    with pytest.raises(ValueError, match=r"0.gate_up is \[4, 24, 16\], not \[4, 16, 24\]"):
        checkpoints.load(tmp_path)


def decode(codes, scales):
    return (codes.to(torch.int16) - 128) * scales[..., None]


def coded(found, config):
    found["lm_head.weight"] = Place("head.weight", coded=Coded(("_codes", "_scales"), decode))
    return found


@pytest.fixture
def coded_folder(tmp_path, monkeypatch):
    patched(monkeypatch, coded)
    model = build()
    checkpoints.save(model, tmp_path)
    codes, scales = torch.randint(256, (50, 16)).to(torch.uint8), torch.rand(50)

    def encode(tensors):
        del tensors["lm_head.weight"]
        tensors |= {"lm_head.weight_codes": codes, "lm_head.weight_scales": scales}

    change(tmp_path, encode)
    return tmp_path, model, (codes.float() - 128) * scales[:, None]


def test_a_coded_tensor_is_decoded_row_by_row(coded_folder):
    folder, model, head = coded_folder
    with torch.no_grad():
        model.head.weight.copy_(head)
    loaded = checkpoints.load(folder)
    assert_same(loaded, model)
    checkpoints.save(loaded, folder)  # and saved in full
    assert_same(checkpoints.load(folder), model)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("lm_head.weight_scales"), "lm_head.weight_scales is missing"),
        (
            lambda t: [t.pop(f"lm_head.weight_{end}") for end in ("codes", "scales")],
            "lm_head.weight is missing",
        ),
        (
            lambda t: t.update({"lm_head.weight_codes": torch.zeros(50, 15, dtype=torch.uint8)}),
            r"lm_head.weight is \[50, 15\], not \[50, 16\]",
        ),
        (
            lambda t: t.update({"lm_head.weight_scales": torch.zeros(49)}),
            r"lm_head.weight is coded in parts of 50 and \[49\] rows",
        ),
    ],
)
def test_coded_parts_that_do_not_fit_are_named(edit, message, coded_folder):
    change(coded_folder[0], edit)
    with pytest.raises(ValueError, match=message):
        checkpoints.load(coded_folder[0])


def test_a_parameter_that_no_tensor_fills_is_named_and_not_left_at_random(tmp_path, monkeypatch):
    checkpoints.save(build(), tmp_path)

    def without_norm(found, config):
        return {name: place for name, place in found.items() if name != "model.norm.weight"}

    patched(monkeypatch, without_norm)
    with pytest.raises(ValueError, match=r"norm.weight is not in this format"):
        checkpoints.load(tmp_path)


# ------------------------------------------------------------------------------- parts of a model


@pytest.fixture
def deep(tmp_path, monkeypatch):
    """A model of four blocks of different kinds, in a folder of several files."""
    monkeypatch.setitem(checkpoints.FAMILIES, "mixtral", Deep)
    model = build(DEEP).eval()
    checkpoints.save(model, tmp_path, shard_size=3000)
    return model, tmp_path


class Deep:
    """A format that holds `DEEP`."""

    layout = staticmethod(checkpoints.mixtral.layout)
    write_config = staticmethod(checkpoints.mixtral.write_config)
    read_config = staticmethod(lambda settings: DEEP)


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [
        (slice(None), [0, 1, 2, 3]),
        (slice(1, 3), [1, 2]),
        (slice(3, None), [3]),
        (slice(0, 1), [0]),
        (slice(None, None, 2), [0, 2]),
        (slice(None, None, -2), [3, 1]),
    ],
)
def test_some_layers_are_a_model_of_these_blocks_alone(layers, numbers, deep):
    model, folder = deep
    part = checkpoints.load(folder, layers=layers)
    assert part.config.n_layers == len(part.blocks) == len(numbers)
    expected = Transformer(dataclasses.replace(DEEP, n_layers=1, every=1))
    expected.embedding, expected.norm, expected.head = model.embedding, model.norm, model.head
    for block, number in zip(part.blocks, numbers, strict=True):
        assert str(block) == str(model.blocks[number])
        assert_same(block, model.blocks[number])
    assert [part.config.window_of(i) for i in range(len(numbers))] == [
        DEEP.window_of(number) for number in numbers
    ]


def test_one_layer_computes_in_its_place_what_the_whole_model_does(deep):
    model, folder = deep
    inputs, outputs = [], []
    model.blocks[1].register_forward_pre_hook(lambda block, args: inputs.append(args[0]))
    model.blocks[2].register_forward_hook(lambda block, args, y: outputs.append(y[0]))
    part = checkpoints.load(folder, layers=slice(1, 3))
    part.embedding.register_forward_hook(lambda embedding, args, x: inputs[0])
    part.norm = part.head = torch.nn.Identity()
    with torch.no_grad():
        model(TOKENS)
        torch.testing.assert_close(part(TOKENS).logits, outputs[0])


@pytest.mark.parametrize("layers", [slice(4, 9), slice(2, 2)])
def test_layers_that_are_none_are_refused(layers, deep):
    with pytest.raises(ValueError, match=r"layers=slice\(.*\) is none of the 4 blocks"):
        checkpoints.load(deep[1], layers=layers)


@pytest.mark.parametrize("with_index", [True, False])
def test_an_moe_layer_is_read_from_the_files_that_hold_it_alone(with_index, deep):
    model, folder = deep
    kept = {
        path
        for path in folder.glob("model-*.safetensors")
        if any("layers.3.block_sparse_moe" in name for name in load_file(path))
    }
    others = set(folder.glob("model-*.safetensors")) - kept
    assert others
    for path in others:
        path.unlink()
    if not with_index:
        (folder / "model.safetensors.index.json").unlink()
    layer = checkpoints.layer(folder, 3)
    assert isinstance(layer, MoELayer) and not layer.training
    assert_same(layer, model.blocks[3].mlp)
    assert {p.dtype for p in checkpoints.layer(folder, 3, dtype=torch.float16).parameters()} == {
        torch.float16
    }
    with pytest.raises((FileNotFoundError, ValueError), match="not exist|is missing"):
        checkpoints.layer(folder, 1)


@pytest.mark.parametrize("number", [0, 2, 4, -1, "1"])
def test_a_block_without_experts_is_refused_with_those_that_have_some(number, deep):
    with pytest.raises(ValueError, match=r"is no block with experts; these are: \[1, 3\]"):
        checkpoints.layer(deep[1], number)


def test_a_part_is_checked_as_the_whole_is(deep):
    folder = deep[1]
    path = next(p for p in folder.glob("model-*") if "model.norm.weight" in load_file(p))
    save_file(load_file(path) | {"model.norm.weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"model.norm.weight is \[3\], not \[16\]"):
        checkpoints.load(folder, layers=slice(1, 2))


# ------------------------------------------------------------------------------ memory and progress

LOAD = """
import resource, sys
import torch
from moe_ref import checkpoints
def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
checkpoints.load(sys.argv[1])
before = peak()
model = checkpoints.load(sys.argv[2])
print(peak() - before, sum(parameter.nbytes for parameter in model.parameters()))
"""


@pytest.mark.parametrize("shard_size", [None, 60_000_000])
def test_a_large_model_is_in_memory_once_while_it_is_loaded(shard_size, tmp_path):
    checkpoints.save(build(), tmp_path / "small")
    with torch.device("meta"):
        model = Transformer(TransformerConfig(60_000, 1024, 1, 4, 4096))
    model = model.bfloat16().to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.detach().fill_(1)
    checkpoints.save(model, tmp_path / "large", shard_size=shard_size)
    run = [sys.executable, "-c", LOAD, str(tmp_path / "small"), str(tmp_path / "large")]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    most, size = map(int, said.split())
    assert size > 250e6
    assert most < size + 60e6  # what is read at a time, and mapped until files are opened anew


def test_progress_counts_every_number_once(tmp_path, monkeypatch):
    read = []

    @reading.contextmanager
    def count(sources, title):
        yield read.append

    monkeypatch.setattr(reading, "progress", count)
    model = build()
    checkpoints.save(model, tmp_path)
    checkpoints.load(tmp_path)
    assert sum(read) == sum(parameter.numel() for parameter in model.parameters())
    assert max(read) <= 64  # 100 bytes at a time, but a row at least


def test_a_load_of_less_than_some_seconds_shows_no_bar(tmp_path, capfd):
    checkpoints.save(build(), tmp_path)
    checkpoints.load(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_without_tqdm_a_model_is_loaded_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    checkpoints.save(build(), tmp_path)
    assert_same(checkpoints.load(tmp_path), build())
