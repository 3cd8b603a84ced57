"""Files that are missing, damaged or somewhere else, and their index."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moe_ref import checkpoints

from .common import assert_same, build, shard


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist"):
        checkpoints.load(tmp_path)
    checkpoints.save(build(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors does not exist"):
        checkpoints.load(tmp_path)


def test_a_truncated_file_is_called_damaged(tmp_path):
    checkpoints.save(build(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        checkpoints.load(tmp_path)


def test_weights_in_several_files_are_read_by_their_index(tmp_path):
    model = build()
    checkpoints.save(model, tmp_path)
    shard(tmp_path)
    loaded = checkpoints.load(tmp_path)
    assert_same(loaded, model)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-1.safetensors does not exist"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": ', r"index.json is not JSON: .*line 1 column 16"),
        ("[]", "index.json must hold an object"),
        ("{}", "index.json: weight_map must be an object"),
        ('{"weight_map": ["model-0.safetensors"]}', "index.json: weight_map must be an object"),
        ('{"weight_map": {"model.norm.weight": 0}}', "index.json: weight_map must be an object"),
    ],
)
def test_a_broken_index_is_named(index, message, tmp_path):
    checkpoints.save(build(), tmp_path)
    shard(tmp_path, index)
    with pytest.raises(ValueError, match=message):
        checkpoints.load(tmp_path)


INDEX = "model.safetensors.index.json"


def sharded(folder, edit):
    """A checkpoint of two files whose index was edited."""
    checkpoints.save(build(), folder)
    shard(folder)
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "name",
    [
        "../elsewhere/model.safetensors",
        "/etc/model.safetensors",
        "inside/model.safetensors",
        "..",
        ".",
        "",
        "C:\\model.safetensors",
        "C:model.safetensors",
        "..\\model.safetensors",
        "model.safetensors\0",
        "pytorch_model.bin",
        "config.json",
    ],
)
def test_an_index_can_name_only_safetensors_files_of_its_own_folder(name, tmp_path):
    checkpoints.save(build(), tmp_path / "elsewhere")
    folder = tmp_path / "model"
    sharded(folder, lambda files: files.update({NORM: name}))
    with pytest.raises(ValueError, match="index.json: weight_map names .*not the name of a safe"):
        checkpoints.load(folder)


def test_files_may_be_links_as_in_the_cache_of_hugging_face(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    checkpoints.save(build(), blobs, shard_size=4000)
    for number, path in enumerate(sorted(blobs.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert_same(checkpoints.load(snapshot), build())


def test_a_tensor_in_another_file_than_the_index_says_is_named(tmp_path):
    def swap(files):
        files[NORM] = {"model-0": "model-1", "model-1": "model-0"}[files[NORM][:7]] + ".safetensors"

    sharded(tmp_path, swap)
    with pytest.raises(
        ValueError, match=rf"{NORM} is in model-\d.safetensors, but {INDEX} names mod"
    ):
        checkpoints.load(tmp_path)
    sharded(tmp_path, lambda files: files.pop(NORM))
    with pytest.raises(
        ValueError, match=rf"{NORM} is in model-\d.safetensors, but {INDEX} names no"
    ):
        checkpoints.load(tmp_path)


def test_all_files_that_are_missing_are_named(tmp_path):
    sharded(tmp_path, lambda files: files.update({NORM: "model-2.safetensors"}))
    (tmp_path / "model-0.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-0.safetensors, model-2.safetensors do not"):
        checkpoints.load(tmp_path)


def test_what_is_wrong_in_several_files_is_said_at_once(tmp_path):
    sharded(tmp_path, lambda files: None)
    first, second = tmp_path / "model-0.safetensors", tmp_path / "model-1.safetensors"
    tensors = load_file(second)
    lost, wrong, *_ = tensors
    del tensors[lost]
    tensors[wrong] = torch.zeros(2)
    save_file(tensors | {"extra": torch.zeros(1)}, second)
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.raises(ValueError) as caught:
        checkpoints.load(tmp_path)
    said = str(caught.value)
    assert f"{first} is damaged" in said
    assert f"{lost} is missing" in said and said.count("is missing") == 1
    assert f"{wrong} is [2], not [" in said
    assert f"extra is in model-1.safetensors, but {INDEX} names no file for it" in said


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_pickle_is_never_read(name, tmp_path):
    checkpoints.save(build(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch broken'\ntR.")
    with pytest.raises(FileNotFoundError, match=f"{name} is not read: it is a pickle"):
        checkpoints.load(tmp_path)


# ------------------------------------------------------------------------------------ damaged files

ROW = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        {NORM: ROW | {"data_offsets": [0, 60]}},
        {NORM: ROW | {"data_offsets": [0, 2**62]}},
        {NORM: ROW | {"data_offsets": [-64, 0]}},
        {NORM: ROW | {"shape": [17]}},
        {NORM: ROW | {"shape": [2**32, 2**32, 2**32]}},
        {NORM: ROW | {"dtype": "F64"}},
        {NORM: ROW | {"dtype": "F99"}},
        {NORM: ROW, "lm_head.weight": ROW},
        {NORM: ROW | {"data_offsets": [4, 68]}},
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(content, tmp_path):
    checkpoints.save(build(), tmp_path)
    if isinstance(content, dict):
        header = json.dumps(content).encode()
        content = struct.pack("<Q", len(header)) + header + bytes(64)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: "):
        checkpoints.load(tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_checkpoint_is_refused_or_has_other_numbers_but_never_breaks(
    tmp_path_factory, data
):
    """Any file of it: bits flipped, cut off, or longer than it was."""
    folder = tmp_path_factory.mktemp("damaged")
    checkpoints.save(build(), folder, shard_size=6000)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "add"]))
    if kind == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    elif kind == "add":
        content += data.draw(st.binary(min_size=1, max_size=9))
    else:
        for at in data.draw(st.lists(st.integers(0, min(len(content) - 1, 900)), min_size=1)):
            content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        loaded = checkpoints.load(folder)
    except (ValueError, FileNotFoundError) as error:
        assert str(folder) in str(error)
        return
    assert kind == "flip" or path.suffix == ".json"
    assert {n: t.shape for n, t in loaded.state_dict().items()} == {
        n: t.shape for n, t in build(loaded.config).state_dict().items()
    }
