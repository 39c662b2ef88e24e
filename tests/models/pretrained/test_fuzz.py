"""Checkpoints and configs changed at random open as before, or say what is wrong."""

import json
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import strategies as st
from safetensors.numpy import load_file

from tests.fuzz import AMOUNTS, fuzz
from tests.models.pretrained.checkpoints import FIXTURES
from wf_vit.errors import UsageError
from wf_vit.models import pretrained

NAMES = ("timm_vit", "hf_vit")


def flat(loaded):
    params = jax.tree.map(np.asarray, loaded.params)
    return traverse_util.flatten_dict(params, sep="/")


@AMOUNTS
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("no_type_checks")
def test_renamed_and_dropped_arrays(name, examples):
    arrays = load_file(FIXTURES / name / "model.safetensors")
    options = {"num_heads": 2, "image_size": 16}
    expected = flat(pretrained.load(arrays, **options))

    def check(key, change):
        changed = dict(arrays)
        array = changed.pop(key)
        if change == "again":
            changed[f"copy.{key}"] = changed[key] = array
        elif change == "transposed":
            changed[key] = array[..., None]
        elif change != "dropped":
            changed[change.format(key)] = array
        try:
            got = flat(pretrained.load(changed, **options))
        except UsageError:
            return
        # Biases that a family does without are 0, and a head may be missing.
        for parameter, values in got.items():
            same = np.array_equal(values, expected[parameter])
            assert same or not values.any(), parameter
        lost = expected.keys() - got.keys()
        assert all("bias" in key or "norm" in key or "head" in n for n in lost), lost

    changes = [
        "dropped",
        "again",
        "transposed",
        "{}x",
        "x{}",
        "x.{}",
        "{0}.{0}",
        "0.{}",
    ]
    changes += ["blocks.5.{}", "encoder.layer.7.{}", "head.{}", "", "\n{}", "[({}"]
    fuzz(
        check,
        examples,
        key=st.sampled_from(sorted(arrays)),
        change=st.sampled_from(changes) | st.text("ab./0{}", max_size=5).map(
            lambda text: text.replace("{", "(").replace("}", ")")
        ),
    )  # fmt: skip


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["gelu", "bicubic", "token", "vit", "cls"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["height", "width", "shortest_edge", "0", "1"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=4,
)
KEYS = {
    "config.json": (
        *("hidden_act", "model_type", "vision_config", "image_size", "layer_norm_eps"),
        *("num_attention_heads", "num_hidden_layers", "id2label", "rope_theta"),
        *("architecture", "pretrained_cfg", "model_args", "global_pool", "label_names"),
        *("use_gated_mlp", "wf_vit"),
    ),
    "preprocessor_config.json": (
        *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale"),
        *("rescale_factor", "do_normalize", "image_mean", "image_std", "do_pad"),
        *("image_processor_type", "default_to_square"),
    ),
}


@AMOUNTS
@pytest.mark.parametrize("file", KEYS)
@pytest.mark.usefixtures("no_type_checks")
def test_random_configs(file, examples):
    """What opens prepares images; nothing else than a usage error comes of the rest."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        shutil.copytree(FIXTURES / "hf_vit", folder)
        path = folder / file
        known = json.loads(path.read_text()) if path.exists() else {}
        photograph = np.zeros((20, 30, 3), np.uint8)

        def check(changes):
            path.write_text(json.dumps(known | changes))
            try:
                loaded = pretrained.load(folder)
            except UsageError:
                return
            images = loaded.preprocess([photograph])
            assert np.isfinite(images).all()

        strategy = st.dictionaries(
            st.sampled_from(KEYS[file]), JSON, min_size=1, max_size=3
        )
        fuzz(check, examples, changes=strategy)


@pytest.mark.parametrize("key", ["blocks.1.norm2.bias", "blocks.0.attn.qkv.weight"])
def test_a_renamed_array_is_named_with_what_is_missing(key):
    arrays = load_file(FIXTURES / "timm_vit/model.safetensors")
    arrays[f"{key}_old"] = arrays.pop(key)
    with pytest.raises(UsageError) as error:
        pretrained.load(arrays, num_heads=2)
    assert "missing: " in str(error.value)
    assert "_old" in str(error.value)


def test_a_head_of_three_axes_is_named():
    arrays = load_file(FIXTURES / "timm_vit/model.safetensors")
    arrays["head.weight"] = arrays["head.weight"][..., None]
    with pytest.raises(UsageError, match=r"head\.weight, has the shape"):
        pretrained.load(arrays, num_heads=2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("axes", [-1, 1])
def test_an_array_of_another_rank_is_refused(name, axes):
    arrays = load_file(FIXTURES / name / "model.safetensors")
    for key, array in arrays.items():
        changed = array[..., None] if axes == 1 else array.reshape(-1)
        if changed.shape == array.shape or "token" in key or "pos" in key:
            continue
        with pytest.raises(UsageError):
            pretrained.load(arrays | {key: changed}, num_heads=2, image_size=16)
