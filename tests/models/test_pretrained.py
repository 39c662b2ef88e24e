import json
import logging
import re
import shutil
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from scipy import ndimage

from wf_vit.errors import UsageError
from wf_vit.models import pretrained, registry
from wf_vit.models.pretrained import positions, readers
from wf_vit.models.pretrained.preprocess import HALF, IMAGENET, Preprocess, Recipe
from wf_vit.models.vit import sincos_positions

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(folder.name for folder in FIXTURES.iterdir() if folder.is_dir())


def source_of(name: str) -> Path:
    weights = FIXTURES / name / "weights.npz"
    return weights if weights.exists() else FIXTURES / name


def run(loaded: pretrained.Pretrained, images: np.ndarray):
    forward = jax.jit(loaded.model.apply)
    logits, out = forward({"params": loaded.params}, images)
    return {"logits": logits, **out}


def expected_of(name: str) -> dict[str, dict[str, np.ndarray]]:
    outputs = {}
    with np.load(FIXTURES / name / "expected.npz") as file:
        for key in file.files:
            size, _, kind = key.partition("/")
            outputs.setdefault(size, {})[kind] = file[key]
    return outputs


def copy_with(name: str, folder: Path, change) -> Path:
    """Copies a fixture of safetensors, with changed arrays."""
    shutil.copytree(FIXTURES / name, folder, dirs_exist_ok=True)
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    arrays = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
    save_file(arrays, folder / "model.safetensors")
    return folder


# Parity with the libraries.


@pytest.mark.parametrize("name", NAMES)
def test_computes_what_the_source_library_does(name):
    outputs = expected_of(name)
    assert "16x16" in outputs
    for size, expected in outputs.items():
        images = expected.pop("images")
        loaded = pretrained.load(source_of(name), image_size=images.shape[1:3])
        assert loaded.model.image_size == loaded.preprocess.image_size
        got = run(loaded, images)
        assert expected
        for kind, array in expected.items():
            np.testing.assert_allclose(
                got[kind], array, atol=1e-5, err_msg=f"{kind} at {size}"
            )


def test_the_real_dinov2_within_the_stated_bounds(shared):
    loaded = pretrained.load(shared / "weights/dinov2_s14.safetensors", image_size=224)
    with np.load(shared / "reference/dinov2_s14_reference.npz") as file:
        reference = dict(file)
    images = loaded.preprocess.normalize(reference["images"])
    forward = jax.jit(
        lambda params, x: loaded.model.apply({"params": params}, x, record=(0, 11))[1]
    )
    out = forward(loaded.params, images)
    np.testing.assert_allclose(
        out["tokens"], reference["last_hidden_state"], atol=2e-4, rtol=0
    )
    for layer in (0, 11):
        np.testing.assert_allclose(
            out["records"][layer]["attention"][:, :, :8],
            reference[f"attention_layer{layer}"],
            atol=1e-5,
            rtol=0,
        )


@pytest.mark.parametrize(
    ("rule", "resampling"),
    [
        ("plain", positions.TORCH_CUBIC),
        ("antialias", positions.TORCH_CUBIC_ANTIALIAS),
        ("offset", positions.META_CUBIC),
    ],
)
def test_tables_are_resized_as_pytorch_does(rule, resampling):
    with np.load(FIXTURES / "resize.npz") as file:
        table = file["table"]
        for key in [k for k in file.files if k.startswith(rule)]:
            grid = tuple(map(int, key.split("/")[1].split("x")))
            got = positions.resize_table(table, grid, resampling)
            # PyTorch computes coordinates in float32.
            np.testing.assert_allclose(got, file[key], atol=5e-6, err_msg=key)


@pytest.mark.parametrize("grid", [(3, 3), (5, 12), (7, 4), (1, 9)])
def test_tables_are_resized_as_google_does(grid):
    table = np.random.default_rng(0).normal(size=(7, 7, 3)).astype(np.float32)
    zoom = (grid[0] / 7, grid[1] / 7, 1)
    got = positions.resize_table(table, grid, positions.SCIPY_LINEAR)
    np.testing.assert_allclose(got, ndimage.zoom(table, zoom, order=1), atol=1e-6)


def test_google_checkpoints_are_resized_by_googles_rule():
    own, other = (
        pretrained.load(source_of("google_augreg"), image_size=size).params
        for size in (None, (12, 32))
    )
    np.testing.assert_allclose(
        other["position_table"],
        positions.resize_table(
            np.asarray(own["position_table"]), (3, 8), positions.SCIPY_LINEAR
        ),
    )
    np.testing.assert_array_equal(own["prefix"], other["prefix"])


def test_fixed_positions_need_no_table(tmp_path):
    with np.load(source_of("big_vision_mean")) as file:
        arrays = dict(file)
    table = sincos_positions((4, 4), 16)
    arrays["params/pos_embedding"] = table[None]
    np.savez(tmp_path / "learned.npz", **arrays)
    del arrays["params/pos_embedding"]
    np.savez(tmp_path / "fixed.npz", **arrays)
    with pytest.raises(UsageError, match="image_size"):
        pretrained.load(tmp_path / "fixed.npz")
    fixed = pretrained.load(tmp_path / "fixed.npz", image_size=16)
    learned = pretrained.load(tmp_path / "learned.npz")
    assert fixed.model.positions == "sincos"
    images = expected_of("big_vision_mean")["16x16"]["images"]
    np.testing.assert_allclose(
        run(fixed, images)["logits"], run(learned, images)["logits"], atol=1e-6
    )


# Names.


@pytest.mark.parametrize("prefix", ["", "module.backbone.", "backbone."])
def test_metas_own_names(tmp_path, prefix):
    def to_meta(arrays):
        for name in list(arrays):
            own = name.replace("reg_token", "register_tokens")
            own = re.sub(r"^blocks\.(\d)\.", r"blocks.0.\1.", own)
            own = re.sub(r"mlp\.fc1", "mlp.w12", re.sub(r"mlp\.fc2", "mlp.w3", own))
            arrays[prefix + own] = arrays.pop(name)
        del arrays[prefix + "head.weight"], arrays[prefix + "head.bias"]
        arrays[prefix + "mask_token"] = np.ones((1, 16), np.float32)
        arrays["dino_head.mlp.0.weight"] = np.ones((3, 16), np.float32)

    name = "timm_dinov2_registers_swiglu"
    loaded = pretrained.load(copy_with(name, tmp_path, to_meta), num_heads=2)
    expected = expected_of(name)["16x16"]
    got = run(loaded, expected["images"])
    np.testing.assert_allclose(got["tokens"], expected["tokens"], atol=1e-5)


def test_metas_models_without_registers_resize_with_their_offset(tmp_path):
    def to_meta(arrays):
        arrays["mask_token"] = np.ones((1, 16), np.float32)

    folder = copy_with("timm_vit", tmp_path, to_meta)
    own = pretrained.load(folder).params["position_table"]
    other = pretrained.load(folder, image_size=(24, 20)).params["position_table"]
    np.testing.assert_allclose(
        other, positions.resize_table(np.asarray(own), (6, 5), positions.META_CUBIC)
    )


def test_training_checkpoints_are_unwrapped():
    state = {"blocks": 1}
    assert readers.unwrap(state) == state
    assert readers.unwrap({"model": state, "epoch": 3}) == state
    both = {"student": {}, "teacher": {"state_dict": state}, "model": {}}
    assert readers.unwrap(both) == state


@pytest.mark.parametrize(
    ("entries", "prefix_tokens", "grid", "with_position"),
    [
        (196, 1, (14, 14), 0),  # a CLS token without a position
        (197, 1, (14, 14), 1),
        (198, 2, (14, 14), 2),
        (1370, 5, (37, 37), 1),  # registers without positions
        (201, 5, (14, 14), 5),
        (256, 0, (16, 16), 0),
    ],
)
def test_positions_of_prefix_tokens_are_counted(
    entries, prefix_tokens, grid, with_position
):
    table = np.random.default_rng(0).normal(size=(entries, 4))
    first, patches = positions.split_positions(
        table, num_prefix_tokens=prefix_tokens, grid=None
    )
    assert patches.shape[:2] == grid
    np.testing.assert_array_equal(first, table[:with_position])
    np.testing.assert_array_equal(patches[0, 1], table[with_position + 1])


def test_a_table_without_patches_is_refused():
    with pytest.raises(UsageError, match="2 entries: with 0 to 0"):
        positions.split_positions(np.zeros((2, 4)), num_prefix_tokens=0, grid=(2, 2))


def test_a_grid_that_is_not_square_comes_from_the_config(tmp_path):
    def three_by_four(arrays):
        arrays["pos_embed"] = arrays["pos_embed"][:, :13]

    folder = copy_with("timm_vit", tmp_path, three_by_four)
    with pytest.raises(UsageError, match=r"13 entries.*4x4.*config\.json"):
        pretrained.load(folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["img_size"] = [12, 16]
    (folder / "config.json").write_text(json.dumps(config))
    assert pretrained.load(folder).model.grid == (3, 4)


def test_a_size_in_the_config_does_not_outvote_the_table(tmp_path):
    folder = copy_with("hf_vit", tmp_path, lambda arrays: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "image_size": 224}))
    assert pretrained.load(folder).model.image_size == (16, 16)


def test_every_mismatch_is_listed_by_name(tmp_path):
    def damage(arrays):
        del arrays["blocks.0.mlp.fc2.bias"]
        arrays["blocks.1.mlp.fc1.weight"] = np.zeros((25, 16), np.float32)
        arrays["blocks.0.attn.qkv.weight"] = np.zeros((47, 16), np.float32)
        arrays["blocks.0.attn.q_norm.weight"] = np.zeros(8, np.float32)
        arrays["norm_pre.weight"] = np.zeros(16, np.float32)

    with pytest.raises(UsageError) as error:
        pretrained.load(copy_with("timm_vit", tmp_path, damage))
    listing = str(error.value).splitlines()[1:]
    assert sorted(line.strip() for line in listing) == sorted(
        [
            "missing: blocks_0/mlp/down/bias",
            "missing: blocks_0/attention/query/kernel",
            "missing: blocks_0/attention/key/kernel",
            "missing: blocks_0/attention/value/kernel",
            "unknown: blocks.0.attn.qkv.weight (here blocks_0/attention/qkv/kernel)",
            "unknown: blocks.0.attn.q_norm.weight (here blocks_0/attn.q_norm/scale)",
            "unknown: norm_pre.weight (here norm_pre/scale)",
            "misshapen: blocks.1.mlp.fc1.weight (here blocks_1/mlp/up/kernel) is "
            "(16, 25), expected (16, 24)",
        ]
    )


def test_a_missing_block_is_noticed(tmp_path):
    def remove(arrays):
        for name in [n for n in arrays if n.startswith("blocks.0.")]:
            del arrays[name]

    with pytest.raises(UsageError, match="missing: blocks_0/attention/query/kernel"):
        pretrained.load(copy_with("timm_vit", tmp_path, remove))


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("fc_norm.weight", np.ones(16), r"fc_norm\.weight and norm\.weight"),
        ("pos_embed", np.ones((1, 17, 15)), "positions have the shape"),
        ("patch_embed.proj.weight", np.ones((16, 48)), "of a convolution"),
    ],
)
def test_contradictions_are_named(tmp_path, name, array, message):
    def change(arrays):
        arrays[name] = array.astype(np.float32)

    with pytest.raises(UsageError, match=message):
        pretrained.load(copy_with("timm_vit", tmp_path, change))


def test_num_heads_is_the_configs_the_callers_or_conventional(tmp_path):
    assert pretrained.load(FIXTURES / "timm_vit").model.num_heads == 2
    assert pretrained.load(FIXTURES / "timm_vit", num_heads=4).model.num_heads == 4
    with pytest.raises(UsageError, match="3 heads do not divide"):
        pretrained.load(FIXTURES / "timm_vit", num_heads=3)

    def widen(arrays):
        for name, array in arrays.items():
            arrays[name] = np.kron(
                array, np.ones([8 if n in (16, 48) else 1 for n in array.shape])
            ).astype(np.float32)

    folder = copy_with("timm_vit", tmp_path, widen)
    (folder / "config.json").unlink()
    assert pretrained.load(folder).model.num_heads == 2  # 128 / 64


# The head.


def test_the_head_is_kept_replaced_or_removed(caplog):
    source = FIXTURES / "timm_deit_distilled"
    kept = pretrained.load(source)
    same = pretrained.load(source, num_classes=5)
    assert kept.model.num_classes == same.model.num_classes == 5
    jax.tree.map(np.testing.assert_array_equal, kept.params, same.params)
    with caplog.at_level(logging.INFO):
        new = pretrained.load(source, num_classes=7)
    assert "for 5 classes, makes way for a new one for 7" in caplog.text
    for head in ("head", "head_distillation"):
        assert new.params[head]["kernel"].shape == (16, 7)
        assert not new.params[head]["kernel"].any()
    none = pretrained.load(source, num_classes=0)
    assert not {"head", "head_distillation"} & none.params.keys()
    images = expected_of("timm_deit_distilled")["16x16"]["images"]
    np.testing.assert_array_equal(
        run(none, images)["tokens"], run(kept, images)["tokens"]
    )


def test_pre_logits_come_before_the_head_and_go_with_it(tmp_path):
    with np.load(source_of("google_augreg")) as file:
        arrays = dict(file)
    generator = np.random.default_rng(0)
    weight, bias = generator.normal(size=(16, 12)), generator.normal(size=12)
    arrays["pre_logits/kernel"], arrays["pre_logits/bias"] = weight, bias
    arrays["head/kernel"] = generator.normal(size=(12, 5))
    np.savez(tmp_path / "weights.npz", **arrays)
    images = expected_of("google_augreg")["16x16"]["images"]
    got = run(pretrained.load(tmp_path / "weights.npz"), images)
    pooled = np.tanh(np.asarray(got["tokens"][:, 0]) @ weight + bias)
    logits = pooled @ arrays["head/kernel"] + arrays["head/bias"]
    np.testing.assert_allclose(got["logits"], logits, atol=1e-5)
    new = pretrained.load(tmp_path / "weights.npz", num_classes=3)
    assert new.model.representation_size is None
    assert new.params["head"]["kernel"].shape == (16, 3)


# Files.


def test_half_precision_files(tmp_path):
    expected = pretrained.load(source_of("google_augreg")).params
    with np.load(source_of("google_augreg")) as file:
        arrays = {k: v.astype(ml_dtypes.bfloat16) for k, v in file.items()}
    np.savez(tmp_path / "weights.npz", **arrays)  # NumPy forgets the type
    got = pretrained.load(tmp_path / "weights.npz").params
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=0.01), got, expected
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}


def test_shards_are_joined(tmp_path):
    arrays = load_file(FIXTURES / "hf_vit/model.safetensors")
    names = sorted(arrays)
    files = {n: f"model-{i % 2}.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        save_file({n: arrays[n] for n in names if files[n] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    shutil.copy(FIXTURES / "hf_vit/config.json", tmp_path)
    jax.tree.map(
        np.testing.assert_array_equal,
        pretrained.load(tmp_path).params,
        pretrained.load(FIXTURES / "hf_vit").params,
    )
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(UsageError, match=r"model-1\.safetensors"):
        pretrained.load(tmp_path)


def test_what_cannot_be_read_is_explained(tmp_path):
    with pytest.raises(UsageError, match="There is no checkpoint at"):
        pretrained.load(tmp_path / "nowhere.npz")
    with pytest.raises(UsageError, match=r"not one checkpoint but 0 \(none\)"):
        pretrained.load(tmp_path)
    for name in ("a.npz", "b.npz"):
        np.savez(tmp_path / name, conv_root=np.zeros(1))
    with pytest.raises(UsageError, match=r"2 \(a\.npz, b\.npz\): name the file"):
        pretrained.load(tmp_path)
    with pytest.raises(UsageError, match="first names are: conv_root"):
        pretrained.load(tmp_path / "a.npz")
    (tmp_path / "a.ckpt").touch()
    with pytest.raises(UsageError, match="convert it first"):
        pretrained.load(tmp_path / "a.ckpt")


def test_a_pth_without_torch_is_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pth").touch()
    with pytest.raises(UsageError, match="pip install torch"):
        pretrained.load(tmp_path / "a.pth")


def test_the_hub(monkeypatch):
    def download(repository, revision, allow_patterns):
        assert (repository, revision) == ("owner/hf_vit", "v1")
        assert "config.json" in allow_patterns
        return str(FIXTURES / repository.partition("/")[2])

    hub = types.SimpleNamespace(snapshot_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert pretrained.load("hf://owner/hf_vit@v1").model.num_classes == 5

    def fail(*args, **kwargs):
        raise OSError("no route to host")

    hub.snapshot_download = fail
    with pytest.raises(UsageError, match=r"owner/hf_vit .*no route to host"):
        pretrained.load("hf://owner/hf_vit")
    with pytest.raises(UsageError, match="not of the form"):
        pretrained.load("hf://hf_vit")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"wf-vit\[hub\]"):
        pretrained.load("hf://owner/hf_vit")


def test_unknown_activations_are_refused(tmp_path):
    folder = copy_with("hf_vit", tmp_path, lambda arrays: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(UsageError, match="hidden_act='relu'"):
        pretrained.load(folder)


# Runs of our own.


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of two checkpoints, the second with a moving average."""
    folder = tmp_path_factory.mktemp("run")
    config = registry.default_config("windowfree", "mu/4")
    config.positions, config.dtype = "learned", "float32"
    model = registry.create_model(config, num_classes=5, image_size=16)
    images = jnp.zeros((1, 16, 16, 3))
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    average = jax.tree.map(lambda x: x + 1, params)
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        for step, ema_params in ((1, None), (12, average)):
            state = {
                "step": jnp.int32(step),
                "params": params,
                "opt_state": optax.adamw(1e-3).init(params),
                "ema_params": ema_params,
            }
            meta = {"model": registry.to_json(model)}
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
                ),
                metrics={"top1": 1 / step},
            )
    data = {
        "augment": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
        "resize_method": "bicubic",
        "eval_resize": 0.875,
    }
    (folder / "config.json").write_text(json.dumps({"data": data}))
    return folder, model, params


def test_a_run_gives_what_it_would_be_evaluated_with(run_folder):
    folder, model, params = run_folder
    last = pretrained.load(folder)
    assert last.model == model
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b + 1), last.params, params
    )
    first = pretrained.load(str(folder / "checkpoints/1"))
    jax.tree.map(np.testing.assert_array_equal, first.params, params)
    recipe = Recipe((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic", 0.875)
    assert last.preprocess == Preprocess((16, 16), recipe)


def test_a_run_can_be_resized_and_get_a_new_head(run_folder):
    folder, _, _ = run_folder
    loaded = pretrained.load(folder, image_size=(8, 24), num_classes=3)
    assert loaded.params["position_table"].shape == (2, 6, 32)
    logits = run(loaded, np.zeros((1, 8, 24, 3), np.float32))["logits"]
    assert logits.shape == (1, 3)


def test_a_run_without_checkpoints_or_config_is_explained(tmp_path, run_folder):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UsageError, match="train first"):
        pretrained.load(tmp_path)
    shutil.copytree(run_folder[0] / "checkpoints", tmp_path / "b/checkpoints")
    with pytest.raises(UsageError, match=r"config\.json is missing"):
        pretrained.load(tmp_path / "b")


# Preprocessing.


def test_recipes_come_from_the_files_beside_the_weights(tmp_path):
    timm = pretrained.load(FIXTURES / "timm_vit").preprocess.recipe
    assert timm == Recipe((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear", 0.9)
    folder = copy_with("hf_vit", tmp_path, lambda arrays: None)
    assert pretrained.load(folder).preprocess.recipe == Recipe(*HALF, "bilinear", None)
    dinov2 = {
        "image_mean": IMAGENET[0],
        "image_std": IMAGENET[1],
        "size": {"shortest_edge": 256},
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(dinov2))
    recipe = pretrained.load(folder).preprocess.recipe
    assert recipe == Recipe(*IMAGENET, "bicubic", 0.875)
    for size, crop in (({"height": 224, "width": 224}, None), (224, None)):
        preprocessor = {**dinov2, "size": size, "do_center_crop": False}
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        assert pretrained.load(folder).preprocess.recipe.crop == crop


def test_preprocessing_crops_the_centre_or_squashes():
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (300, 500, 3)).astype(np.uint8)
    mean, std = (255 * np.asarray(x, np.float32) for x in IMAGENET)
    cropping = Preprocess((224, 224), Recipe(*IMAGENET, "bicubic", 0.875))
    # Height to 256, width to 256 * 500 / 300 = 426, then the central 224.
    resized = Image.fromarray(image).resize((426, 256), Image.Resampling.BICUBIC)
    expected = np.asarray(resized)[16:240, 101:325]
    np.testing.assert_allclose(cropping([image])[0], (expected - mean) / std)
    squashing = Preprocess((32, 64), Recipe(*IMAGENET, "bilinear", None))
    resized = Image.fromarray(image).resize((64, 32), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(
        squashing([image, image])[1], (np.asarray(resized) - mean) / std
    )


@pytest.mark.parametrize("crop", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(10, 301), (301, 10), (7, 7), (1000, 999)])
def test_preprocessing_always_fills_the_models_size(crop, shape):
    preprocess = Preprocess((28, 42), Recipe(*HALF, "bilinear", crop))
    images = np.full((1, *shape, 3), 255, np.uint8)
    np.testing.assert_allclose(preprocess(images), np.ones((1, 28, 42, 3)), rtol=1e-6)


def test_images_of_the_wrong_kind_are_refused():
    preprocess = Preprocess((4, 4), Recipe(*HALF, "bilinear", None))
    with pytest.raises(UsageError, match="expected uint8"):
        preprocess.normalize(np.zeros((1, 4, 5, 3), np.uint8))
    with pytest.raises(UsageError, match="interpolation is 'area'"):
        Recipe(*HALF, "area", None)


# The libraries themselves, at real sizes (the extra `peers`).


def assert_close(loaded: pretrained.Pretrained, images: np.ndarray, **expected):
    """Compares within 1e-4 of each output's largest entry."""
    got = run(loaded, images)
    for kind, tensor in expected.items():
        array = tensor.detach().numpy()
        error = np.abs(got[kind] - array).max() / np.abs(array).max()
        assert error < 1e-4, f"{kind}: {error}"


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, (160, 256)])
@pytest.mark.parametrize(
    ("architecture", "suffix"),
    [
        ("vit_tiny_patch16_224", ".safetensors"),
        ("vit_small_patch16_224", ".safetensors"),
        ("vit_base_patch16_224", ".pth"),
        ("deit_small_distilled_patch16_224", ".pth"),
        ("vit_small_patch14_reg4_dinov2", ".safetensors"),
    ],
)
def test_timm_at_real_sizes(tmp_path, architecture, suffix, size):
    torch = pytest.importorskip("torch")
    timm = pytest.importorskip("timm")
    if "patch14" in architecture:
        size = size and (154, 266)
    torch.manual_seed(0)
    model = timm.create_model(architecture).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and not name.endswith("norm.weight"):
                parameter.normal_(0, 0.1)
            if "gamma" in name:
                parameter.normal_(1, 0.1)
    path = tmp_path / f"model{suffix}"
    if suffix == ".pth":
        torch.save({"model": model.state_dict(), "epoch": 1}, path)
    else:
        arrays = {k: v.numpy() for k, v in model.state_dict().items()}
        save_file(arrays, path)
    loaded = pretrained.load(path, image_size=size)
    if size:
        model.set_input_size(img_size=size)
    images = torch.randn((2, 3, *loaded.model.image_size))
    with torch.no_grad():
        tokens = model.forward_features(images)
        logits = model.forward_head(tokens)
    images = images.permute(0, 2, 3, 1).numpy()
    assert_close(loaded, images, tokens=tokens, logits=logits)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(224, 224), (140, 322), (518, 518)])
def test_the_real_dinov2_against_transformers(shared, tmp_path, size):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    weights = shared / "weights/dinov2_s14.safetensors"
    config = transformers.Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14
    )
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").symlink_to(weights)
    model = transformers.Dinov2Model.from_pretrained(
        tmp_path, attn_implementation="eager"
    ).eval()
    with np.load(shared / "reference/dinov2_s14_reference.npz") as file:
        photographs = file["images"][:2]
    loaded = pretrained.load(weights, image_size=size)
    images = loaded.preprocess(photographs)
    with torch.no_grad():
        output = model(
            torch.from_numpy(images).permute(0, 3, 1, 2), output_attentions=True
        )
    forward = jax.jit(
        lambda params, x: loaded.model.apply({"params": params}, x, record=(0, 11))[1]
    )
    got = forward(loaded.params, images)
    np.testing.assert_allclose(
        got["tokens"], output.last_hidden_state.numpy(), atol=2e-4, rtol=0
    )
    for layer in (0, 11):
        np.testing.assert_allclose(
            got["records"][layer]["attention"],
            output.attentions[layer].numpy(),
            atol=1e-5,
            rtol=0,
        )
