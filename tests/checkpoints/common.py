"""Small models, and what the tests of this folder do to their files."""

import json

import torch
from safetensors.torch import load_file, save_file

from moe_ref import Transformer, TransformerConfig

MOE = TransformerConfig(50, 16, 2, 4, 12, n_kv_heads=2, n_experts=4, k=2)
DENSE = TransformerConfig(50, 16, 2, 4, 12, tied=True)


def build(config=MOE, seed=0):
    torch.manual_seed(seed)
    return Transformer(config)


def change(folder, edit):
    """Rewrite the tensors of a checkpoint."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def shard(folder, index=None):
    """Split a checkpoint's weights in two files with an index, or with the one given."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file)
    text = json.dumps({"weight_map": files}) if index is None else index
    (folder / "model.safetensors.index.json").write_text(text)


def assert_same(loaded, model):
    """The same tensors, to the bit."""
    theirs = loaded.state_dict()
    assert theirs.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(theirs[name], tensor), name
