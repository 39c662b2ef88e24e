"""Configs beside the weights: obeyed to the key, or refused by name."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from tests.models.make_processors import FILE, SIDE, configs, pictures
from tests.models.pretrained.checkpoints import FIXTURES, copy_with
from wf_vit.errors import UsageError
from wf_vit.models import pretrained
from wf_vit.models.pretrained.hints import image_hints
from wf_vit.models.pretrained.preprocess import HALF, IMAGENET, ImageFormat, Preprocess
from wf_vit.models.pretrained.timm_config import timm_hints

# What stands with a layout, where a config does not say it.
LAYOUT = ImageFormat(*HALF, "bicubic", None)


def ours(config, image):
    form = dataclasses.replace(LAYOUT, **image_hints(config))
    return Preprocess((SIDE, SIDE), form)([image])[0]


def stored():
    with np.load(FILE) as file:
        cases = json.loads(str(file["configs"]))
        return [(c, [file[f"{n}/{k}"] for k in range(2)]) for n, c in enumerate(cases)]


@pytest.mark.parametrize(("config", "expected"), stored())
def test_images_are_prepared_as_transformers_does(config, expected):
    for image, pixels in zip(pictures(), expected, strict=True):
        np.testing.assert_allclose(ours(config, image), pixels, atol=2e-5, rtol=2e-5)


@pytest.mark.slow
def test_images_are_prepared_as_transformers_does_over_many_configs():
    transformers = pytest.importorskip("transformers")
    from tests.models.make_processors import processed

    assert transformers
    for config, _ in zip(configs(seed=1), range(300), strict=False):
        for image in pictures():
            np.testing.assert_allclose(
                ours(config, image),
                processed(config, image),
                atol=2e-5,
                rtol=2e-5,
                err_msg=str(config),
            )


@pytest.mark.slow
def test_dinov3_rescales_before_it_resizes():
    transformers = pytest.importorskip("transformers")
    processor = transformers.DINOv3ViTImageProcessor(size={"height": 12, "width": 12})
    config = json.loads(processor.to_json_string())
    for image in pictures():
        expected = processor(image, return_tensors="np")["pixel_values"][0]
        # Pillow rounds to 8 bits after each of its two passes.
        level = 1 / 255 / min(IMAGENET[1])
        got = ours(config, image).transpose(2, 0, 1)
        np.testing.assert_allclose(got, expected, atol=level)


WHOLE = {
    "size": {"height": 14, "width": 14},
    "crop_size": 12,
    "do_center_crop": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_flip_channel_order": True}, "do_flip_channel_order"),
        ({"do_pad": True, "pad_size": 24}, "do_pad.*pad_size"),
        ({"crop_pct": 0.9}, "crop_pct"),
        ({"do_resize": False}, "do_resize=false"),
        ({"size": {"longest_edge": 14}}, "longest_edge"),
        ({"size": {"height": 14}}, "expected shortest_edge"),
        ({"size": "large"}, "size='large'"),
        ({"crop_size": 15}, "no larger than"),
        ({"crop_size": {"height": 7, "width": 12}}, "the same share"),
        ({"resample": 9}, "resample=9"),
        ({"resample": "cubic"}, "resample='cubic'"),
        ({"rescale_factor": -1}, "rescale_factor=-1"),
        ({"image_std": [0.5, 0.0, 0.5]}, r"images\.std is .* three numbers from 1e-06"),
        ({"image_std": [0.5, 0.5]}, "three numbers"),
        ({"image_mean": ["a", 0, 0]}, "image_mean"),
        ({"image_mean": [float("nan"), 0, 0]}, "three numbers"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(change, message):
    assert ours(WHOLE, pictures()[0]).shape == (SIDE, SIDE, 3)
    with pytest.raises(UsageError, match=message):
        ours(WHOLE | change, pictures()[0])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("hf_vit", {"hidden_act": "relu"}, "hidden_act='relu'"),
        ("hf_vit", {"model_type": "mlcd_vision_model"}, "model_type='mlcd_vision"),
        ("hf_vit", {"num_attention_heads": 0}, "num_attention_heads=0"),
        ("hf_vit", {"num_attention_heads": "two"}, "num_attention_heads='two'"),
        ("hf_vit", {"layer_norm_eps": -1e-6}, "layer_norm_eps=-1e-06"),
        ("hf_vit", {"layer_norm_eps": True}, "layer_norm_eps=True"),
        ("hf_vit", {"image_size": [16, 16, 3]}, "expected one whole number or two"),
        ("hf_vit", {"image_size": 16.5}, "image_size=16.5"),
        ("hf_vit", {"id2label": {"a": "cat"}}, "id2label"),
        ("hf_vit", {"id2label": ["cat"]}, "id2label"),
        ("hf_siglip", {"vision_config": [3]}, "vision_config=.3."),
        ("hf_dinov3_gated", {"hidden_act": "gelu"}, "hidden_act='gelu' of a gated"),
        ("hf_dinov3_gated", {"rope_theta": 0}, "rope_theta=0"),
        ("timm_vit", {"architecture": "vit_base_patch16_rpn_224"}, "normalise after"),
        ("timm_vit", {"architecture": "eva02_enormous_patch14_clip_224"}, "after"),
        ("timm_vit", {"global_pool": "avgmax"}, "global_pool='avgmax'"),
        ("timm_vit", {"model_args": {"qk_norm": True}}, "'qk_norm': True"),
        ("timm_vit", {"model_args": {"act_layer": "relu"}}, "act_layer='relu'"),
        ("timm_vit", {"model_args": [1]}, "model_args="),
        ("timm_vit", {"pretrained_cfg": {"interpolation": "random"}}, "'random'"),
        ("timm_vit", {"pretrained_cfg": {"crop_mode": "border"}}, "'border'"),
        ("timm_vit", {"pretrained_cfg": {"crop_pct": 0}}, "crop_pct=0"),
    ],
)
def test_odd_values_of_a_config_are_refused_by_name(tmp_path, name, change, message):
    folder = copy_with(name, tmp_path, lambda arrays: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UsageError, match=message):
        pretrained.load(folder)


@pytest.mark.parametrize("content", ["{", "[]", "\0\0", '"text"'])
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_a_broken_config_is_named(tmp_path, file, content):
    folder = copy_with("hf_vit", tmp_path, lambda arrays: None)
    (folder / file).write_text(content)
    with pytest.raises(UsageError, match=file):
        pretrained.load(folder)


def test_a_config_of_another_program_is_not_looked_at(tmp_path, caplog):
    folder = copy_with("hf_vit", tmp_path, lambda arrays: None)
    (folder / "config.json").write_text('{"learning_rate": 0.1, "data": "cats"}')
    loaded = pretrained.load(folder, num_heads=2)
    assert "neither Hugging Face's nor timm's" in caplog.text
    assert loaded.model.norm_epsilon == 1e-12


def test_recipes_come_from_the_files_beside_the_weights(tmp_path):
    timm = pretrained.load(FIXTURES / "timm_vit").preprocess.image_format
    assert timm == ImageFormat((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear", 0.9)
    folder = copy_with("hf_vit", tmp_path, lambda arrays: None)
    assert pretrained.load(folder).preprocess.image_format == ImageFormat(
        *HALF, "bilinear", None
    )
    (folder / "preprocessor_config.json").write_text(json.dumps(WHOLE))
    assert pretrained.load(folder).preprocess.image_format == ImageFormat(
        *HALF, "bilinear", 12 / 14, squash=True, floor=True
    )


def test_what_is_assumed_is_said_with_what_to_pass(tmp_path, caplog):
    folder = copy_with("timm_vit", tmp_path, lambda arrays: None)
    pretrained.load(folder)
    assert "assume" not in caplog.text
    assert "convention" not in caplog.text
    (folder / "config.json").unlink()
    assert pretrained.load(folder).model.num_heads == 1
    assert "num_heads=1 (pass num_heads)" in caplog.text
    assert "mlp=gelu, norm_epsilon=1e-06" in caplog.text
    caplog.clear()
    pretrained.load(folder, num_heads=2)
    assert "num_heads" not in caplog.text


def test_pixels_that_no_patch_covers_are_resized_and_cut_off(tmp_path):
    """SigLIP at 384 pixels has 27 patches of 14: its library resizes to 384."""
    folder = copy_with("hf_siglip", tmp_path, lambda arrays: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_size": 19}))
    loaded = pretrained.load(folder)
    assert loaded.model.image_size == (16, 16)
    image = pictures()[0]
    wide = Preprocess((19, 19), loaded.preprocess.image_format)
    np.testing.assert_array_equal(
        loaded.preprocess.fit(image), wide.fit(image)[:16, :16]
    )
    other = pretrained.load(folder, image_size=24)
    assert other.preprocess.leftover == (0, 0)


@pytest.mark.slow
def test_images_are_prepared_as_timm_does():
    timm = pytest.importorskip("timm")
    from timm.data import create_transform, resolve_data_config

    assert timm
    generator = np.random.default_rng(0)

    def pick(*choices):
        return choices[generator.integers(len(choices))]

    for _ in range(60):
        images = {
            "input_size": (3, SIDE, SIDE),
            "mean": pick((0.5, 0.5, 0.5), (0.48, 0.45, 0.4)),
            "std": pick((0.5, 0.5, 0.5), (0.26, 0.27, 0.25)),
            "interpolation": pick("bicubic", "bilinear", "nearest", "lanczos"),
            "crop_pct": pick(0.7, 0.875, 0.9, 0.95, 1.0),
            "crop_mode": pick("center", "squash"),
        }
        hints = timm_hints(
            {"architecture": "vit_base_patch16_224", "pretrained_cfg": images}
        )
        form = dataclasses.replace(LAYOUT, **hints.image_format)
        transform = create_transform(**resolve_data_config(pretrained_cfg=images))
        for picture in pictures():
            expected = transform(Image.fromarray(picture)).numpy().transpose(1, 2, 0)
            got = Preprocess((SIDE, SIDE), form)([picture])[0]
            np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=str(images))
