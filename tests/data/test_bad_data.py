"""Bad data are named, or masked in their place: examples, files, links and settings."""

import itertools
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from tests.cases import slow
from tests.data.datasets import dataset_of
from tests.data.test_files import write
from wf_vit.data import pipeline
from wf_vit.data.config import default_config
from wf_vit.data.digits import Digits
from wf_vit.data.folder_source import open_folder
from wf_vit.errors import UsageError

TRAIN, TEST = 1433, 364
BAD = 7  # the record of the second shard that the tests spoil


@pytest.fixture(scope="session")
def sharded(tmp_path_factory):
    """Digits in four files a split."""
    folder = tmp_path_factory.mktemp("sharded")
    config = tfds.download.DownloadConfig(try_download_gcs=False, num_shards=4)
    Digits(data_dir=str(folder)).download_and_prepare(download_config=config)
    return folder


@pytest.fixture
def config(sharded, tmp_path):
    """Of a copy that may be spoiled."""
    config = default_config()
    config.data_dir = str(tmp_path / "data")
    config.image_size = 8
    shutil.copytree(sharded, config.data_dir)
    return config


def shard(config, split="train", index=1):
    name = f"digits-{split}.tfrecord-{index:05d}-of-00004"
    return f"{config.data_dir}/digits/1.0.0/{name}"


def rewrite(path, change):
    """Writes a file again, record ``BAD`` changed."""
    records = [record.numpy() for record in tf.data.TFRecordDataset(path)]
    example = tf.train.Example.FromString(records[BAD])
    change(example.features.feature)
    records[BAD] = example.SerializeToString()
    with tf.io.TFRecordWriter(path) as writer:
        for record in records:
            writer.write(record)


def bad_label(features):
    features["label"].int64_list.value[0] = 12


def bad_image(features):
    data = features["image"].bytes_list.value
    data[0] = b"x" * len(data[0])


def flip_bit(path, record=BAD):
    """Flips a bit in the pixels of a record."""
    lengths = [len(r.numpy()) for r in tf.data.TFRecordDataset(path).take(record + 1)]
    position = sum(lengths) + 16 * len(lengths) - 20
    with open(path, "r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def exhaust(batches, count):
    for _ in itertools.islice(batches, count):
        pass


def train(config, **kwargs):
    """Takes an epoch of training batches."""
    batches = dataset_of(config).train_batches(batch_size=100, seed=0, **kwargs)
    exhaust(batches, 15)


def evaluate(config):
    exhaust(dataset_of(config).eval_batches("test", batch_size=100), 4)


# --- What is known when the data are opened


def remove(path):
    os.remove(path)


def empty(path):
    os.truncate(path, 0)


def cut(path):
    os.truncate(path, os.path.getsize(path) // 2)


def lengthen(path):
    (record,) = tf.data.TFRecordDataset(path).take(1)
    with open(path, "ab") as file:
        with tf.io.TFRecordWriter(f"{path}.one") as writer:
            writer.write(record.numpy())
        with open(f"{path}.one", "rb") as one:
            file.write(one.read())
    os.remove(f"{path}.one")


def add_shard(path):
    shutil.copy(path, path.replace("-00001-of-00004", "-00004-of-00005"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove, r"{name} is missing"),
        (empty, r"{name} is empty"),
        (cut, r"{name} has \d+ whole records where \d+ belong"),
        (lengthen, r"{name} has \d+ whole records where \d+ belong"),
        (add_shard, r"-00004-of-00005 is one too many"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_missing_cut_and_surplus_shards_are_named_at_open(
    config, split, spoil, message
):
    spoil(shard(config, split))
    name = os.path.basename(shard(config, split))
    with pytest.raises(UsageError, match=message.format(name=name)):
        dataset_of(config)


def test_other_splits_may_be_missing(config):
    remove(shard(config, "test"))
    config.eval = {"test": "train[90%:]"}
    config.train = "train[:90%]"
    assert dataset_of(config).info.num_examples["train"] == 1290


# --- What is known when it is read, and stops


@pytest.mark.parametrize(
    ("split", "use"), [("train", train), ("test", evaluate)], ids=["train", "test"]
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (bad_label, "has the label 12, but there are 10 classes, 0 to 9: repair it"),
        (bad_image, "cannot be decoded: repair it"),
    ],
)
def test_a_bad_example_is_named(config, split, use, change, message):
    rewrite(shard(config, split), change)
    name = f"{os.path.basename(shard(config, split))}__{BAD}"
    with pytest.raises(UsageError, match=f"{name} {message}"):
        use(config)


@pytest.mark.parametrize("start", [0, TRAIN + 900])
def test_a_bad_example_is_named_by_the_process_that_takes_it(config, start):
    """Of several groups, and after a resume in the second epoch."""
    rewrite(shard(config), bad_label)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "count_groups", lambda _: 4)
        messages = []
        for index in range(2):
            try:
                train(config, start=start, process_index=index, process_count=2)
            except UsageError as error:
                messages.append(str(error))
    assert messages
    for message in messages:
        assert f"00001-of-00004__{BAD} has the label 12" in message


@pytest.mark.parametrize(
    ("split", "use"), [("train", train), ("test", evaluate)], ids=["train", "test"]
)
def test_a_flipped_bit_is_named_by_its_file(config, split, use):
    flip_bit(shard(config, split))
    name = os.path.basename(shard(config, split))
    with pytest.raises(UsageError, match=f"{name}, after {BAD} records: "):
        use(config)


@pytest.mark.parametrize("spoil", [remove, cut])
def test_files_that_change_meanwhile_are_named(config, spoil):
    data = dataset_of(config)
    spoil(shard(config))
    name = os.path.basename(shard(config))
    with pytest.raises(UsageError, match=f"is damaged: .*{name}"):
        exhaust(data.train_batches(batch_size=100, seed=0), 15)


# --- What is skipped


def epoch(config, index=0, count=1, groups=1):
    """Returns (image, label, mask) at every position of the first batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "count_groups", lambda _: groups)
        batches = dataset_of(config).train_batches(
            batch_size=200, seed=0, process_index=index, process_count=count
        )
        taken = list(itertools.islice(batches, 8))
    return [np.concatenate([b[name] for b in taken]) for name in ("image", "label")] + [
        np.concatenate([b.get("mask", b["place"] >= 0) for b in taken])
    ]


@pytest.mark.parametrize(
    ("change", "groups"),
    [(bad_label, 4), (bad_image, 1), slow(bad_label, 1), slow(bad_image, 4)],
)
def test_a_skipped_example_is_masked_in_its_place(config, change, groups):
    whole = epoch(config, groups=groups)
    rewrite(shard(config), change)
    config.on_error = "skip"
    images, labels, mask = epoch(config, groups=groups)
    assert 1 <= (~mask).sum() <= 2  # 1600 examples are more than an epoch
    assert not images[~mask].any()
    assert not labels[~mask].any()
    np.testing.assert_array_equal(images[mask], whole[0][mask])
    np.testing.assert_array_equal(labels[mask], whole[1][mask])
    halves = [epoch(config, index, 2, groups)[2] for index in range(2)]
    assert sum((~half).sum() for half in halves) == (~mask).sum()


@pytest.mark.parametrize(
    ("spoil", "groups"),
    [
        (remove, 1),
        (flip_bit, 4),
        *(slow(spoil, 1) for spoil in (empty, cut, flip_bit)),
        *(slow(spoil, 4) for spoil in (remove, empty, cut)),
    ],
)
def test_what_a_lost_file_held_is_masked_in_its_place(config, spoil, groups):
    whole = epoch(config, groups=groups)
    spoil(shard(config))
    config.on_error = "skip"
    images, labels, mask = epoch(config, groups=groups)
    in_epoch = mask[:TRAIN]
    lost = TRAIN // 4 * {cut: 0.5}.get(spoil, 1)
    assert (~in_epoch).sum() == pytest.approx(lost, abs=12)
    np.testing.assert_array_equal(images[mask], whole[0][mask])
    np.testing.assert_array_equal(labels[mask], whole[1][mask])


def test_evaluation_leaves_out_what_is_skipped(config):
    rewrite(shard(config, "test"), bad_image)
    rewrite(shard(config, "test", 2), bad_label)
    config.on_error = "skip"
    batches = list(dataset_of(config).eval_batches("test", batch_size=100))
    assert sum(batch["mask"].sum() for batch in batches) == TEST - 2
    assert [batch["mask"].shape for batch in batches] == [(100,)] * 4


def test_a_split_of_which_nothing_is_left_is_no_case_for_skip(config):
    for index in range(4):
        remove(shard(config, "test", index))
    config.on_error = "skip"
    with pytest.raises(UsageError, match=r"4 files with 364 examples, but .*missing"):
        dataset_of(config)


# --- Folders


@pytest.fixture
def folder(tmp_path):
    for name in ("cat/1", "cat/2", "dog/1", "dog/2"):
        write(tmp_path / "root" / f"{name}.jpg")
    return tmp_path / "root"


def ids(source):
    records = source.read("train", None).map(source.load).as_numpy_iterator()
    return sorted(record["id"] for record in records)


@pytest.mark.parametrize("link", ["cat/gone.jpg", "cat/sub/gone.png", "bird"])
@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_links_that_lead_nowhere_are_named_or_counted(folder, link, target, caplog):
    path = folder / link
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(path if target == "itself" else folder / "nowhere")
    with pytest.raises(
        UsageError, match=f"1 links .* nowhere, such as {link}: restore"
    ):
        open_folder(str(folder))
    with caplog.at_level("INFO"):
        assert len(ids(open_folder(str(folder), "skip"))) == 4
    assert "left out: 1 (1 link that leads nowhere)" in caplog.text


def test_a_folder_named_like_an_image_is_a_folder(folder):
    write(folder / "cat" / "x.jpg" / "3.jpg")
    (folder / "dog" / "empty.jpg").mkdir()
    write(folder / "bird.jpg" / "1.jpg")
    source = open_folder(str(folder))
    assert source.class_names == ("bird.jpg", "cat", "dog")
    assert b"cat/x.jpg/3.jpg" in ids(source)
    assert source.count("train") == 6


def test_names_that_are_no_text_can_be_read_and_printed(folder, tmp_path):
    root = tmp_path / os.fsdecode(b"caf\xe9")
    folder.rename(root)
    write(root / os.fsdecode(b"\xe9t\xe9") / os.fsdecode(b"\xff.jpg"))
    config = default_config()
    config.update(name="folder", data_dir=str(root), eval={"test": "train"})
    data = dataset_of(config)
    assert data.info.num_classes == 3
    (batch,) = data.eval_batches("test", batch_size=5)
    assert batch["mask"].all()
    (root / os.fsdecode(b"\xe9t\xe9") / os.fsdecode(b"\xff.jpg")).write_bytes(b"no")
    with pytest.raises(UsageError, match=r"\\xe9t\\xe9/\\xff.jpg cannot be") as error:
        evaluate(config)
    str(error.value).encode()
    (root / "bird").mkdir()
    with pytest.raises(UsageError, match=r"caf\\xe9 \(split 'train'\)") as error:
        open_folder(str(root))
    str(error.value).encode()


# --- Settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_area": 0.0}, "config.data.min_area is 0.0: expected a number above 0"),
        ({"min_area": float("nan")}, "config.data.min_area is nan"),
        ({"crop": "center"}, "config.data.crop is 'center': expected one of"),
        ({"pad": -1}, "config.data.pad is -1: expected a whole number"),
        (
            {"crop": "pad", "pad": 32},
            "config.data.pad is 32.* at most 31 can be",
        ),
        ({"pad_mode": "wrap"}, "config.data.pad_mode is 'wrap'"),
        ({"eval_resize": 0.0}, "config.data.eval_resize is 0.0"),
        ({"resize_method": "best"}, "config.data.resize_method is 'best'"),
        ({"image_size": 0}, r"config.data.image_size is \(0, 0\)"),
        ({"on_error": "ignore"}, "config.data.on_error is 'ignore'.*'stop', 'skip'"),
    ],
)
def test_settings_are_checked_before_data_are_opened(change, message):
    config = default_config()
    config.update(name="folder", data_dir="nowhere", **change)
    with pytest.raises(UsageError, match=message):
        dataset_of(config)
