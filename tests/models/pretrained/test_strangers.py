"""Files that somebody made to do harm, or that are damaged: a message, and at once."""

import io
import json
import os
import shutil
import socket
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.models.pretrained.checkpoints import FIXTURES, copy_with
from wf_vit.errors import UsageError
from wf_vit.models import pretrained
from wf_vit.models.pretrained import files, guards
from wf_vit.models.pretrained.containers import arrays_in, bytes_in

INDEX = "model.safetensors.index.json"


@pytest.fixture
def arrays():
    return load_file(FIXTURES / "timm_vit/model.safetensors")


def opened(source, **options):
    return pretrained.load(source, num_heads=2, **options)


# What is no file.


@pytest.mark.parametrize("name", ["a.npz", "model.safetensors", "a.pth", INDEX])
def test_what_is_no_file_is_named_and_nobody_waits_for_it(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UsageError, match=f"{name} is a pipe, expected a file"):
        opened(tmp_path / name)
    (tmp_path / name).unlink()
    os.symlink("/dev/zero", tmp_path / name)
    with pytest.raises(UsageError, match=f"{name} is a device"):
        opened(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match=f"{name} (is a folder|holds no model)"):
        opened(tmp_path / name)


def test_a_socket_and_a_pipe_as_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # The names of sockets are short.
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("a.npz")
    with pytest.raises(UsageError, match=r"a\.npz is a socket"):
        opened("a.npz")
    shutil.copytree(FIXTURES / "timm_vit", "model")
    os.remove("model/config.json")
    os.mkfifo("model/config.json")
    with pytest.raises(UsageError, match=r"config\.json is a pipe"):
        opened("model")


def test_a_name_that_the_system_refuses(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        opened(tmp_path / ("a" * 5000 + ".npz"))


# Shards.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight_map": {"a": "../a.safetensors"}}, "outside of its folder"),
        ({"weight_map": {"a": "/tmp/a.safetensors"}}, "outside of its folder"),
        ({"weight_map": {"a": "sub/a.safetensors"}}, "outside of its folder"),
        ({"weight_map": {"a": ".."}}, "outside of its folder"),
        ({"weight_map": {"a": "a.pth"}}, r"no \.safetensors"),
        ({"weight_map": {"a": "nowhere.safetensors"}}, "not there"),
        ({"weight_map": {"a": "link.safetensors"}}, "links to outside"),
        ({"weight_map": {"a": 3}}, "expected texts"),
        ({"weight_map": {"a": ["b"]}}, "expected texts"),
        ({"weight_map": {"a": None}}, "expected texts"),
        ({"weight_map": {"a" * 2000: "b"}}, "at most 1000 letters"),
        ({"weight_map": ["a"]}, "no weight_map"),
        ([], "expected a JSON object"),
        ({"weight_map": {str(n): "a.safetensors" for n in range(60_000)}}, "60,001 en"),
    ],
)
def test_an_index_stays_in_its_folder(tmp_path, arrays, content, message):
    for folder in ("inside", "outside"):
        (tmp_path / folder).mkdir()
    save_file(arrays, tmp_path / "outside/a.safetensors")
    save_file(arrays, tmp_path / "a.safetensors")
    os.symlink(tmp_path / "outside/a.safetensors", tmp_path / "inside/link.safetensors")
    (tmp_path / "inside" / INDEX).write_text(json.dumps(content))
    with pytest.raises(UsageError, match=message):
        opened(tmp_path / "inside")


def test_a_million_entries_are_too_long_a_text(tmp_path):
    entries = ",".join(f'"{n}":"a.safetensors"' for n in range(10**6))
    (tmp_path / INDEX).write_text(f'{{"weight_map":{{{entries}}}}}')
    with pytest.raises(UsageError, match="expected at most 16,777,216"):
        opened(tmp_path)


def test_shards_in_the_cache_of_the_hub_are_links(tmp_path, arrays):
    """Its snapshots are links to the blobs beside them."""
    snapshot, blobs = tmp_path / "snapshots/abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(arrays, blobs / "123")
    os.symlink("../../blobs/123", snapshot / "a.safetensors")
    index = {"weight_map": dict.fromkeys(arrays, "a.safetensors")}
    (snapshot / INDEX).write_text(json.dumps(index))
    assert opened(snapshot).model.depth == 2


# Headers of safetensors.


def with_header(path, header, data=b"\0" * 64):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [10**13], "data_offsets": [0, 4 * 10**13]}},
        {"a": {"dtype": "F32", "shape": [10**13], "data_offsets": [0, 64]}},
        {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 64]}},
        {"a": {"dtype": "F32", "shape": [-16], "data_offsets": [0, 64]}},
        {
            "a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]},
            "b": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]},
        },
        {"a": {"dtype": "F32", "shape": [16]}},
        {"a": {"dtype": "OBJECT", "shape": [16], "data_offsets": [0, 64]}},
        {"a": 3},
        [],
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff" * 20,
    ],
)
def test_what_a_header_declares_must_be_there(tmp_path, header):
    with_header(tmp_path / "a.safetensors", header)
    with pytest.raises(UsageError, match=r"a\.safetensors"):
        opened(tmp_path / "a.safetensors")


def test_a_header_is_bounded(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(UsageError, match="header of 9,223,372,036,854,775,808 bytes"):
        opened(path)
    with_header(path, b" " * (17 * 2**20) + b"{}")
    with pytest.raises(UsageError, match=r"header of .* at most 16,777,216"):
        opened(path)


# .npz


def zipped(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


def npy(array, **changes):
    """The bytes of a .npy file, with changes of its header."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        content, np.lib.format.header_data_from_array_1_0(array) | changes
    )
    return content.getvalue() + array.tobytes()


def test_a_bomb_is_refused_before_it_is_opened(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in "ab":
            with file.open(name, "w") as member:
                for _ in range(50):
                    member.write(bytes(2**20))
    assert path.stat().st_size < 200_000
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("opened"))
    with pytest.raises(UsageError, match="104,857,600; expected are at most 67,108,"):
        opened(path)


def test_a_size_that_the_directory_declares_is_not_believed(tmp_path):
    """A member that inflates to more than it says is read no further than that."""
    array = np.zeros(10**6, np.float32)
    path = zipped(tmp_path / "a.npz", [("a.npy", npy(array))])
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\1\2")
    content[entry + 24 : entry + 28] = (1128).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"a\.npz .*(Bad CRC|has 1,000)"):
        opened(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(np.ones(4, np.float32), shape=(3,)), "has 16 bytes"),
        (npy(np.ones(4, np.float32), shape=(10**13,)), "has 16 bytes"),
        (npy(np.ones(4, np.float32), shape=(-4, -1)), "has 16 bytes"),
        (npy(np.ones(4, np.float32), descr="|O"), "never unpickled"),
        (npy(np.ones(4, np.float32), descr="<f8"), "has 16 bytes"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b"[" * 100, "cannot be read"),
        (b"\x93NUMPY\x01\x00\x00\x27" + b"[" * 9984, "cannot be read"),
        (b"\x93NUMPY\x03\x00" + b" " * 100, "no array of numbers"),
        (b"", "cannot be read"),
        (b"PK", "cannot be read"),
    ],
)
def test_a_header_of_an_array_must_fit_its_bytes(tmp_path, content, message):
    path = zipped(tmp_path / "a.npz", [("a.npy", content)])
    with pytest.raises(UsageError, match=rf"a\.npz .*{message}"):
        opened(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_arrays_of_one_name(tmp_path):
    array = npy(np.ones(4, np.float32))
    for second in ("a.npy", "a"):
        path = zipped(tmp_path / "a.npz", [("a.npy", array), (second, array)])
        with pytest.raises(UsageError, match="two"):
            opened(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_every_flipped_bit_is_found_or_does_nothing(tmp_path, compressed):
    path = tmp_path / "a.npz"
    generator = np.random.default_rng(0)
    saved = {
        "a": generator.normal(size=(7, 9)).astype(np.float32),
        "b": np.asfortranarray(generator.normal(size=(5, 6))),
        "c": generator.normal(size=30).astype(ml_dtypes.bfloat16),
        "d": np.float32(3),
        "e": np.zeros((0, 3), np.float32),
    }
    (np.savez_compressed if compressed else np.savez)(path, **saved)
    whole = path.read_bytes()
    read = files.read_npz(path)
    for name, array in saved.items():
        np.testing.assert_array_equal(read[name], array, strict=True)
    found = 0
    for place in range(0, len(whole), 3):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            with guards.explained(path, ""):
                got = files.read_npz(path)
        except UsageError:
            found += 1
            continue
        # Dates, versions and the like do nothing; a name is looked up later.
        values = {array.tobytes() for array in got.values()}
        assert values == {array.tobytes() for array in saved.values()}, place
    assert found > len(whole) / 6


# PyTorch's files.


def test_a_bomb_of_pytorch_is_refused_before_it_is_loaded(tmp_path):
    pytest.importorskip("torch")
    path = zipped(tmp_path / "a.pth", [("a/data.pkl", bytes(100 * 2**20))])
    with pytest.raises(UsageError, match="but says that it holds"):
        opened(path)


def test_a_tensor_that_repeats_one_number_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    tensor = torch.as_strided(torch.zeros(1), (10**13,), (0,))
    torch.save({"a": tensor}, tmp_path / "a.pth")
    with pytest.raises(UsageError, match="says that it holds 40,000,000,000,000"):
        opened(tmp_path / "a.pth")


# What a state dict nests.


def test_deep_and_repeated_nesting(arrays):
    deep = arrays
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(UsageError, match="nests more than 32 levels"):
        opened(deep)
    with pytest.raises(UsageError, match="nests more than 32 levels"):
        opened({"args": deep, "model": arrays})
    with pytest.raises(UsageError, match="nests more than 32 levels"):
        bytes_in(deep)
    laughs = {"a": 1}
    for _ in range(30):
        laughs = {str(n): laughs for n in range(10)}
    with pytest.raises(UsageError, match="no array by name"):
        arrays_in(laughs, which=None)
    with pytest.raises(UsageError, match="but the checkpoint has"):
        arrays_in({"x": laughs, "y": arrays}, which="nothing")
    assert opened({"x": laughs, "model": arrays}).model.depth == 2


@pytest.mark.parametrize("number", ["2", "3", "200000", "99999999", "9" * 900])
def test_a_block_of_a_wild_number_is_named(arrays, number):
    arrays[f"blocks.{number}.norm1.weight"] = np.ones(16, np.float32)
    arrays |= {
        name.replace("blocks.1.", f"blocks.{number}."): array
        for name, array in arrays.items()
        if number != "2" and name.startswith("blocks.1.")
    }
    match = "blocks_2" if number == "2" else f"blocks_{number}, but none of blocks_2"
    with pytest.raises(UsageError, match=match):
        opened(arrays)


def test_too_many_arrays(arrays):
    many = {f"blocks.{n}.x": np.ones(1, np.float32) for n in range(60_000)}
    with pytest.raises(UsageError, match=r"60,0.. entries, expected at most 50,000"):
        opened(arrays | many)


# Weights.


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.float32("nan"), "has NaN or infinity"),
        (np.float32("-inf"), "has NaN or infinity"),
        (np.float16("inf"), "has NaN or infinity"),
        (ml_dtypes.bfloat16("nan"), "has NaN or infinity"),
        (np.float64("inf"), "has NaN or infinity"),
        (np.float64(1e39), "has NaN or infinity"),
        (np.complex64(1j), "is complex64"),
        (np.int64(1), "is int64"),
        (np.bool_(True), "is bool"),
        (np.int8(1), "is int8, quantised"),
        (np.uint8(1), "is uint8, quantised"),
        (ml_dtypes.float8_e4m3fn(1), "is float8_e4m3fn, quantised"),
        (np.str_("a"), "is <U1"),
    ],
)
def test_weights_are_finite_floats(arrays, value, message):
    array = np.ones(48, np.asarray(value).dtype)
    array[-1] = value
    arrays["blocks.1.attn.qkv.bias"] = array
    with pytest.raises(UsageError, match=rf"blocks\.1\.attn\.qkv\.bias {message}"):
        opened(arrays)


def test_empty_weights_and_masses_of_wrong_ones(arrays):
    kernel = "patch_embed.proj.weight"
    with pytest.raises(UsageError, match=f"{kernel} has no elements"):
        opened(arrays | {kernel: np.zeros((10**9, 0, 4, 4), np.float32)})
    none = {"reg_token": np.zeros((1, 0, 16), np.float32)}
    assert opened(arrays | none).model.num_registers == 0
    with pytest.raises(UsageError, match=r"(?s)blocks\.0.*and \d+ more"):
        opened({name: array.astype(int) for name, array in arrays.items()})


@pytest.mark.parametrize(
    "kind", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
)
def test_floats_of_all_sizes_and_orders_are_fine(arrays, kind):
    changed = {
        name: np.asfortranarray(array.astype(kind)) for name, array in arrays.items()
    }
    changed["mask_token"] = np.full(16, np.nan, np.float32)  # No part of the model.
    changed["x.relative_position_index"] = np.arange(4)
    assert opened(changed).model.depth == 2


# Configs beside the weights.


def tampered(folder, fixture, file, key, value):
    if fixture:
        shutil.copytree(FIXTURES / fixture, folder, dirs_exist_ok=True)
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    *scopes, last = key.split("/")
    place = content
    for scope in scopes:
        place = place.setdefault(scope, {})
    place[last] = value
    path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("value", [-1, 0, 1e400, float("nan"), "1", [], {}, True, 1e9])
@pytest.mark.parametrize(
    "key",
    [
        "layer_norm_eps",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
    ],
)
def test_numbers_of_a_config(tmp_path, key, value):
    value = 10**9 if value == 1e9 else value
    with pytest.raises(UsageError, match=key):
        pretrained.load(tampered(tmp_path, "hf_vit", "config.json", key, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", ["gelu"]),
        ("hidden_act", {}),
        ("model_type", ["vit"]),
        ("vision_config", 3),
        ("id2label", [1]),
        ("id2label", "abc"),
        ("id2label", {"a": "b"}),
        ("id2label", {"1" * 5000: "b"}),
        ("num_hidden_layers", 3),
    ],
)
def test_values_of_a_config(tmp_path, key, value):
    with pytest.raises(UsageError, match=key if key != "num_hidden_layers" else "3 la"):
        pretrained.load(tampered(tmp_path, "hf_vit", "config.json", key, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_std", [0, 0.5, 0.5]),
        ("image_std", 0),
        ("image_std", [1e-300] * 3),
        ("image_std", [True] * 3),
        ("image_mean", [float("nan")] * 3),
        ("image_mean", [10**400] * 3),
        ("image_mean", "0.5"),
        ("rescale_factor", 0),
        ("rescale_factor", 1e-300),
        ("resample", [3]),
        ("resample", True),
        ("size", 10**9),
        ("size", {"height": 10**9, "width": 4}),
        ("size", {"height": 4, "width": None, "shortest_edge": 3}),
        ("size", [None, 4]),
        ("size", {"shortest_edge": []}),
    ],
)
def test_values_of_a_preprocessor(tmp_path, key, value):
    whole = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 16}
    folder = tampered(tmp_path, "hf_vit", "preprocessor_config.json", "do_resize", True)
    content = json.dumps(whole | {key: value})
    (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(UsageError, match=r"image|size|resample|rescale|config"):
        pretrained.load(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_args/num_heads", 10**9),
        ("model_args/num_heads", -2),
        ("model_args/depth", 10**9),
        ("model_args/depth", 3),
        ("model_args/img_size", 10**9),
        ("model_args/act_layer", ["gelu"]),
        ("global_pool", ["avg"]),
        ("pretrained_cfg/std", [0, 0, 0]),
        ("pretrained_cfg/interpolation", ["bicubic"]),
        ("pretrained_cfg/crop_pct", 1e-9),
        ("pretrained_cfg/crop_mode", 3),
        ("pretrained_cfg", 3),
        ("model_args", "x"),
        ("label_names", 3),
    ],
)
def test_values_of_a_config_of_timm(tmp_path, key, value):
    shutil.copytree(FIXTURES / "timm_vit", tmp_path, dirs_exist_ok=True)
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 2}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert pretrained.load(tmp_path).model.depth == 2
    tampered(tmp_path, None, "config.json", key, value)
    with pytest.raises(UsageError, match=r"says|images\."):
        pretrained.load(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", INDEX])
@pytest.mark.parametrize(
    "content",
    [
        b'{"a":' * 100_000,
        b"[" * 100_000,
        b"{",
        b"",
        b"\0" * 100,
        b"\xff\xfe",
        b"[]",
        b'{"a": ' + b"1" * 10_000 + b"}",
        b'"' + b"a" * 17 * 2**20 + b'"',
    ],
    ids=range(9),
)
def test_what_is_no_json_object(tmp_path, file, content):
    shutil.copytree(FIXTURES / "hf_vit", tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_bytes(content)
    if file == INDEX:
        (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=rf"{file}.*Repair|{file} (holds|has)"):
        pretrained.load(tmp_path)


# Our own layout.


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", None),
        ("model", {}),
        ("model/depth", 10**9),
        ("model/depth", 1000),
        ("model/depth", 0),
        ("model/depth", -1),
        ("model/depth", "2"),
        ("model/width", 10**9),
        ("model/width", 0),
        ("model/num_heads", 0),
        ("model/num_registers", -1),
        ("model/image_size", 3),
        ("model/image_size", [10**9, 10**9]),
        ("model/patch_size", [0, 0]),
        ("model/norm_epsilon", -1e-6),
        ("model/norm_epsilon", float("nan")),
        ("model/dtype", ["float32"]),
        ("model/name", None),
        ("model/rotary", {"temperature": float("nan"), "span": None, "offset": 0}),
        ("model/rotary", 3),
        ("model/unknown", 3),
        ("class_names", 3),
        ("class_names", "abcde"),
        ("class_names", [1, 2]),
        ("leftover", [-1, 10**9]),
        ("leftover", None),
        ("resampling", {"kernel": "cubist"}),
        ("resampling", {"offset": float("nan")}),
        ("images/std", [0.0, 0.0, 0.0]),
        ("images/mean", [1, 2]),
        ("images/crop", 1e-9),
        ("wf_vit", 10**9),
        ("wf_vit", [1]),
    ],
)
def test_a_tampered_folder_of_ours(tmp_path, key, value):
    pretrained.load(FIXTURES / "timm_vit", num_heads=2).save(tmp_path / "own")
    changed = tampered(tmp_path / "own", None, "config.json", key, value)
    with pytest.raises(UsageError, match=r"own|model|checkpoint|images|config"):
        pretrained.load(changed)


def test_weights_of_ours_are_checked_too(tmp_path):
    pretrained.load(FIXTURES / "timm_vit", num_heads=2).save(tmp_path / "own")
    path = tmp_path / "own/model.safetensors"
    saved = load_file(path)
    save_file(saved | {"norm/bias": np.full(16, np.nan, np.float32)}, path)
    with pytest.raises(UsageError, match="norm/bias has NaN"):
        pretrained.load(tmp_path / "own")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"model\.safetensors .*Download it again"):
        pretrained.load(tmp_path / "own")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UsageError, match="is a pipe"):
        pretrained.load(tmp_path / "own")


def test_copies_of_a_fixture_are_read_as_before(tmp_path):
    folder = copy_with("timm_vit", tmp_path, lambda arrays: None)
    assert opened(folder).model == opened(FIXTURES / "timm_vit").model
