"""The benchmark of segmentation: shares, probe and scores whose values are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks import resolution, segmentation
from tests.networks import random_params
from tests.runs import small_winft, write_run
from wf_vit.errors import UsageError

COUNT = len(segmentation.CLASSES)
SKY, BUILDING, POLE, VOID = 0, 1, 2, COUNT


def test_a_patch_counts_pixels_by_overlap():
    expected = [[0.4, 0.4, 0.2, 0, 0], [0, 0, 0.2, 0.4, 0.4]]
    np.testing.assert_allclose(segmentation.overlaps(5, 2), expected, atol=1e-6)


def test_shares_of_classes_in_patches_leave_out_void():
    labels = np.array([[[SKY, SKY, VOID], [BUILDING, SKY, VOID]]], np.uint8)
    shares = segmentation.class_shares(labels, (1, 2))
    # Each patch is one and a half pixels wide.
    expected = np.zeros((1, 2, COUNT))
    expected[0, 0, [SKY, BUILDING]] = 2 / 3, 1 / 3
    expected[0, 1, SKY] = 1 / 3
    np.testing.assert_allclose(shares, expected, atol=1e-6)


def test_the_probe_reaches_the_shares_of_each_kind_of_token():
    kinds = np.array([0, 0, 1, 1, 1, 2])
    shares = np.zeros((6, COUNT), np.float32)
    shares[[0, 1, 2, 3, 4, 5], [SKY, POLE, SKY, SKY, BUILDING, BUILDING]] = 1
    tokens = np.eye(3, dtype=np.float32)
    probe = segmentation.fit(jnp.asarray(tokens[kinds]), jnp.asarray(shares))
    found = jax.nn.softmax(probe.logits(jnp.asarray(tokens)))
    expected = [[1 / 2, 0, 1 / 2], [2 / 3, 1 / 3, 0], [0, 1, 0]]
    np.testing.assert_allclose(found[:, :3], expected, atol=0.02)


def test_pixels_are_counted_under_enlarged_logits():
    labels = np.array([[[SKY, SKY, BUILDING, VOID], [SKY, POLE, BUILDING, VOID]]])
    logits = 9 * jax.nn.one_hot(jnp.asarray([[SKY, BUILDING]]), COUNT)
    table = segmentation.confusion(logits, labels.astype(np.uint8), (1, 2))
    expected = np.zeros((COUNT, COUNT), int)
    expected[SKY, SKY], expected[BUILDING, BUILDING], expected[POLE, SKY] = 3, 2, 1
    np.testing.assert_array_equal(table, expected)
    score = segmentation.score(table)
    assert score.iou == {"sky": 3 / 4, "building": 1.0, "pole": 0.0}
    assert score.mean_iou == pytest.approx((3 / 4 + 1) / 3)
    assert score.accuracy == pytest.approx(5 / 6)


def _write(folder, part, count, rng):
    """Writes photographs of a bright and a dark half, which are the classes."""
    images, labels = folder / part, folder / f"{part}annot"
    images.mkdir(parents=True)
    labels.mkdir()
    for index in range(count):
        label = np.full((24, 32), SKY, np.uint8)
        label[:, rng.integers(8, 24) :] = BUILDING
        image = np.where(label == SKY, 230, 20) + rng.integers(-9, 9, label.shape)
        image = np.repeat(image[..., None], 3, -1).astype(np.uint8)
        Image.fromarray(image).save(images / f"{index}.png")
        Image.fromarray(label).save(labels / f"{index}.png")


def test_runs_are_probed_with_both_kinds_of_fields(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 3)):
        _write(tmp_path, part, count, rng)
    model = small_winft(num_classes=3, image_size=16)
    write_run(tmp_path / "winft", model, random_params(model))
    train, test = (segmentation.read(tmp_path, part) for part in ("train", "test"))
    assert train.images.shape == (6, 24, 32, 3)
    assert test.labels.shape == (3, 24, 32)
    runs = [str(tmp_path / "winft")]
    rows = segmentation.evaluate(runs, [(6, 8), (3, 4)], train, test)
    assert [(row["fields"], row["grid"]) for row in rows] == [
        (resolution.SCALED, "6 x 8"),
        (resolution.LEFT, "6 x 8"),
        (resolution.SCALED, "3 x 4"),
        (resolution.LEFT, "3 x 4"),
    ]
    for row in rows[:2]:
        assert row["mean_iou"] > 0.8
    text = segmentation.table(rows)
    assert len(text.splitlines()) == 4
    assert "| 6 x 8 | 3 x 4 |" in text


def test_photographs_without_labels_are_named(tmp_path):
    with pytest.raises(UsageError, match="train has 0 PNGs"):
        segmentation.read(tmp_path, "train")
    _write(tmp_path, "train", 2, np.random.default_rng(0))
    (tmp_path / "trainannot" / "1.png").unlink()
    with pytest.raises(UsageError, match="2 PNGs, of which 1 have no labels"):
        segmentation.read(tmp_path, "train")


def test_a_grid_is_rows_by_columns():
    assert segmentation.parse_grid("24x32") == (24, 32)
    with pytest.raises(UsageError, match="'24': name ROWSxCOLUMNS"):
        segmentation.parse_grid("24")
