"""Opening data sets, and every error a user can meet on the way."""

import collections
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tests.data.datasets import dataset_of
from wf_vit.data import digits as digits_module
from wf_vit.data import folder_source
from wf_vit.data.config import default_config
from wf_vit.data.folder_source import open_folder
from wf_vit.data.tfds_source import open_tfds
from wf_vit.errors import UsageError


def _ids(source, split):
    records = source.read(split, None).map(source.load)
    return [
        (record["id"].decode(), int(record["label"]))
        for record in records.as_numpy_iterator()
    ]


def _write(path, seed=0, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(path, **kwargs)


@pytest.fixture
def classes(tmp_path):
    """Two classes: 20 cats and 10 dogs."""
    for index in range(30):
        name = f"cat/{index}.jpg" if index < 20 else f"dog/{index}.PNG"
        _write(tmp_path / name, seed=index)
    return tmp_path


def _folder_config(root):
    config = default_config()
    config.name = "folder"
    config.data_dir = str(root)
    config.train = "train[:80%]"
    config.eval = {"test": "train[80%:]"}
    return config


# --- TFDS


def test_missing_imagenet_gets_three_steps(tmp_path):
    source = open_tfds("imagenet2012", str(tmp_path))
    with pytest.raises(UsageError) as error:
        source.count("train[:99%]")
    message = str(error.value)
    assert "ILSVRC2012_img_train.tar" in message
    assert f"The folder is {tmp_path}/downloads/manual" in message
    assert "repeat this command with --config.task=prepare" in message
    assert (
        f"3. Run this command again with --config.data.data_dir={tmp_path}" in message
    )


@pytest.mark.parametrize(
    "name",
    ["cifar10", "caltech_birds2011", "stanford_dogs", "cars196", "oxford_flowers102"],
)
def test_missing_sets_are_never_downloaded(tmp_path, name):
    source = open_tfds(name, str(tmp_path))
    with pytest.raises(UsageError, match=f"{name}.*not prepared"):
        source.count("train")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["caltech_birds2011", "oxford_iiit_pet"])
def test_features_beside_image_and_label_are_not_even_parsed(name):
    with tfds.testing.mock_data(num_examples=1):
        (record,) = open_tfds(name, "").read("train", None).as_numpy_iterator()
    assert record.keys() == {"image", "label", "tfds_id"}
    assert isinstance(record["image"], bytes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imagnet2012", "Close to it: .*imagenet2012"),
        ("../imagenet", "cannot open the data set '../imagenet'"),
        ("imagenet2012:1.2.3", "only: 5.1.0"),
        ("ag_news_subset", "expected an image and one class label"),
    ],
)
def test_wrong_names_are_explained(tmp_path, name, message):
    with pytest.raises(UsageError, match=message):
        open_tfds(name, str(tmp_path))


@pytest.mark.parametrize("split", ["trian", "train[99", "train[:0%]"])
def test_wrong_splits_are_explained(digits, split):
    digits.train = split
    with pytest.raises(UsageError, match=r"'train' \(1433 examples\)"):
        dataset_of(digits)


# --- Digits


def test_digits_are_all_there_and_lossless(digits):
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    bunch = sklearn_datasets.load_digits()
    expected = sorted(
        (int(label), tuple(image.ravel() / 16))
        for image, label in zip(bunch.images, bunch.target, strict=True)
    )
    builder = digits_module.prepared_builder(digits.data_dir)
    records = list(builder.as_dataset(split="train+test").as_numpy_iterator())
    stored = sorted(
        (int(r["label"]), tuple(np.rint(r["image"].ravel() * (16 / 255)) / 16))
        for r in records
    )
    assert stored == expected
    assert max(record["image"].max() for record in records) == 255


def test_digits_splits_are_stratified(digits):
    builder = digits_module.prepared_builder(digits.data_dir)
    counts = {
        split: np.bincount(
            [int(r["label"]) for r in builder.as_dataset(split=split)], minlength=10
        )
        for split in ("train", "test")
    }
    share = counts["test"] / (counts["train"] + counts["test"])
    assert np.abs(share - 0.2).max() < 0.005


def test_digits_go_to_a_temporary_folder_if_need_be(tmp_path, monkeypatch):
    monkeypatch.setattr(digits_module.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "file").touch()
    builder = digits_module.prepared_builder(str(tmp_path / "file" / "below"))
    assert builder.data_path.is_relative_to(tmp_path)
    assert builder.info.splits["test"].num_examples == 364


def test_digits_prepared_by_another_process_meanwhile(tmp_path, monkeypatch):
    prepare = digits_module.Digits.download_and_prepare

    def overtaken(self, **kwargs):
        prepare(digits_module.Digits(data_dir=str(tmp_path)), **kwargs)
        raise OSError("Directory not empty")

    monkeypatch.setattr(digits_module.Digits, "download_and_prepare", overtaken)
    builder = digits_module.prepared_builder(str(tmp_path))
    assert builder.data_path.is_relative_to(tmp_path)
    assert builder.info.splits["test"].num_examples == 364


def test_digits_without_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'wf-vit\[demo\]'"):
        digits_module.prepared_builder(str(tmp_path))


# --- Folder


def test_folder_slices_hold_every_class_evenly(classes):
    source = open_folder(str(classes))
    assert source.class_names == ("cat", "dog")
    everything = _ids(source, "train")
    assert len(everything) == 30
    assert all(name.startswith(["cat", "dog"][label]) for name, label in everything)
    first, rest = _ids(source, "train[:80%]"), _ids(source, "train[80%:]")
    assert first + rest == everything
    assert [label for _, label in first].count(1) == 8
    assert [label for _, label in rest].count(1) == 2


def test_folder_with_splits(tmp_path):
    for split, count in {"train": 6, "val": 2}.items():
        for label in ("b", "a"):
            for index in range(count):
                _write(tmp_path / split / label / f"{index}.jpg")
    source = open_folder(f"{tmp_path}/")
    assert source.class_names == ("a", "b")
    assert source.count("train") == 12
    assert source.count("train[50%:]+val") == 10
    assert {name.split("/")[0] for name, _ in _ids(source, "val")} == {"val"}


def test_folder_feeds_the_pipeline(classes):
    config = _folder_config(classes)
    config.image_size = 16
    config.crop = "resized"
    info = dataset_of(config).info
    assert info.num_examples == {"train": 24, "test": 6}
    batches = dataset_of(config).train_batches(batch_size=24, seed=0)
    epochs = [next(batches)["image"] for _ in range(2)]
    resumed = dataset_of(config).train_batches(batch_size=8, seed=0, start=32)
    np.testing.assert_array_equal(next(resumed)["image"], epochs[1][8:16])
    (batch,) = dataset_of(config).eval_batches("test", batch_size=8)
    assert batch["mask"].sum() == 6


def test_hidden_files_and_other_files_are_no_images(classes):
    (classes / "cat" / ".hidden.jpg").touch()
    (classes / "cat" / "notes.txt").touch()
    (classes / ".cache").mkdir()
    (classes / "README.md").touch()
    assert open_folder(str(classes)).count("train") == 30


@pytest.mark.parametrize("evaluate", [False, True])
def test_a_broken_image_is_named(classes, evaluate):
    split = "train[80%:]" if evaluate else "train[:80%]"
    names = [name for name, _ in _ids(open_folder(str(classes)), split)]
    broken = [name for name in names if name.startswith("cat")][-1]
    data = (classes / broken).read_bytes()
    (classes / broken).write_bytes(data[: len(data) // 3])
    config = _folder_config(classes)
    if evaluate:
        batches = dataset_of(config).eval_batches("test", batch_size=2)
    else:
        batches = dataset_of(config).train_batches(batch_size=2, seed=0)
    with pytest.raises(UsageError, match=f"{broken} cannot be decoded"):
        collections.deque(batches)


def _no_folder(root):
    root.rmdir()


def _empty_class(root):
    _write(root / "cat" / "0.jpg")
    (root / "dog").mkdir()


def _wrong_format(root):
    _write(root / "cat" / "0.jpg")
    (root / "cat" / "more").mkdir()
    (root / "cat" / "more" / "1.HEIC").touch()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_folder, "does not exist"),
        (lambda root: None, "no class with images"),
        (_empty_class, "such as 'dog'"),
        (_wrong_format, r"cat has 1 images that cannot be decoded \(.heic\): convert"),
    ],
)
def test_wrong_folders_are_explained(tmp_path, spoil, message):
    root = tmp_path / "root"
    root.mkdir()
    spoil(root)
    with pytest.raises(UsageError, match=message):
        open_folder(str(root))


@pytest.mark.parametrize("split", ["test", "train[", "train[:0%]", "all[:80%]"])
def test_wrong_splits_of_a_folder_are_explained(classes, split):
    source = folder_source.open_folder(str(classes))
    with pytest.raises(UsageError, match="split"):
        source.count(split)
