"""The benchmark of the input measures what it says, on files of the right kind."""

import math

import numpy as np
import pytest
from PIL import Image

from benchmarks import input_speed
from benchmarks.input_speed import Files
from wf_vit.errors import UsageError
from wf_vit.train.config import default_config


def tiny_config(crop="resized"):
    config = default_config("vit", "mu/16")
    config.data.update(image_size=16, crop=crop)
    config.batch_size = 4
    return config


def test_files_are_width_by_height_and_quality():
    kinds = input_speed.files_of(["500x375", "16x9@100"])
    assert kinds == [Files(500, 375, 90), Files(16, 9, 100)]


@pytest.mark.parametrize(
    "value", ["500", "0x4", "axb", "4x-3", "4x3x2", "4x3@0", "4x3@101", "4x3@"]
)
def test_other_files_are_refused(value):
    with pytest.raises(UsageError, match="WIDTHxHEIGHT"):
        input_speed.files_of([value])


def test_photographs_are_real_ones_and_those_of_a_folder(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "own.png")
    assert {"china.jpg", "flower.jpg"} < set(input_speed.photographs(str(tmp_path)))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match=r"no \.jpg"):
        input_speed.photographs(str(empty))


def test_both_settings_and_no_antialiasing_are_reported():
    result = input_speed.measure(
        tiny_config(), [Files(60, 45, 50)], "", turns=2, count=1, num_files=8
    )
    row = result["files"]["60x45, quality 50"]
    assert row["mean_file_bytes"] > 300
    assert all(len(seconds) == 2 for seconds in row["cpu_seconds_per_image"].values())
    assert list(row["pixels"]) == ["fast_resize", input_speed.NONE]
    assert all(math.isfinite(pixels["psnr"]) for pixels in row["pixels"].values())
    assert input_speed.table(result).count("\n| ") == 3


def test_files_have_the_size_and_differ(tmp_path):
    photograph = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    )
    input_speed.write_files([photograph], tmp_path / "files", Files(40, 30), 3)
    images = [Image.open(path) for path in sorted((tmp_path / "files").iterdir())]
    assert [image.size for image in images] == [(40, 30)] * 3
    assert len({image.tobytes() for image in images}) == 3


def test_another_crop_is_refused():
    with pytest.raises(UsageError, match=r"data\.crop"):
        input_speed.measure(tiny_config("none"), [Files(40, 30)], "", turns=1, count=1)
