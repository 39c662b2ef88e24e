"""The stream of batches: complete, deterministic, resumable, cheap to resume."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from tests.data.datasets import dataset_of
from wf_vit.data import pipeline
from wf_vit.errors import UsageError

TRAIN, TEST = 358, 364  # examples of the splits of digits that are used here


def _take(batches, count):
    return list(itertools.islice(batches, count))


def _examples(batches, limit=None):
    """Returns one hashable item per (unmasked) example, in order."""
    items = []
    for batch in batches:
        mask = batch.get("mask", np.ones(len(batch["label"]), bool))
        for image, label in zip(
            batch["image"][mask], batch["label"][mask], strict=True
        ):
            items.append((image.tobytes(), int(label)))
    return items[:limit]


def _epochs(config, count, **kwargs):
    """Returns the examples of the first epochs, from batches that straddle them."""
    batches = dataset_of(config).train_batches(batch_size=100, **kwargs)
    examples = _examples(_take(batches, -(-TRAIN * count // 100)))
    return [examples[i * TRAIN : (i + 1) * TRAIN] for i in range(count)]


def test_describe(digits):
    digits.eval = {"val": "train[90%:]", "test": "test"}
    digits.train = "train[:90%]"
    info = dataset_of(digits).info
    assert info.num_classes == 10
    assert info.class_names == tuple("0123456789")
    assert info.num_examples == {"train": 1290, "val": 143, "test": TEST}
    assert info.image_size == (8, 8)


def test_batches_have_the_stated_form(digits):
    with digits.ignore_type():
        digits.image_size = (12, 20)
    batch = next(dataset_of(digits).train_batches(batch_size=5, seed=0))
    assert batch.keys() == {"image", "label", "place"}
    assert batch["place"].dtype == np.int32
    assert batch["place"].tolist() == [0, 1, 2, 3, 4]
    assert (batch["image"].shape, batch["image"].dtype) == ((5, 12, 20, 3), np.uint8)
    assert (batch["label"].shape, batch["label"].dtype) == ((5,), np.int32)


def test_every_epoch_has_every_example_once_in_a_new_order(digits):
    first, second = _epochs(digits, 2, seed=0)
    digits.eval = {"stored": digits.train}
    stored = _examples(dataset_of(digits).eval_batches("stored", batch_size=100))
    assert len(stored) == TRAIN
    assert collections.Counter(first) == collections.Counter(stored)
    assert collections.Counter(second) == collections.Counter(stored)
    assert first != second
    assert first != stored
    (again,), (other,) = (_epochs(digits, 1, seed=seed) for seed in (0, 1))
    assert again == first
    assert other != first


@pytest.mark.parametrize("start", [1, 3, 4, 12])
def test_resume_gives_the_very_next_batches_bit_for_bit(digits, start):
    digits.crop = "resized"
    digits.shuffle_buffer = 60
    batches = dataset_of(digits).train_batches(batch_size=100, seed=3)
    expected = _take(batches, start + 2)[start:]
    resumed = dataset_of(digits).train_batches(
        batch_size=100, seed=3, start=100 * start
    )
    for ours, theirs in zip(_take(resumed, 2), expected, strict=True):
        np.testing.assert_array_equal(ours["image"], theirs["image"])
        np.testing.assert_array_equal(ours["label"], theirs["label"])


@pytest.mark.parametrize("start", [1, 250, TRAIN, TRAIN + 3])
def test_batches_of_another_size_go_on_at_the_next_example(digits, start):
    digits.crop = "resized"
    batches = dataset_of(digits).train_batches(batch_size=100, seed=3)
    expected = _examples(_take(batches, 5))
    resumed = dataset_of(digits).train_batches(batch_size=7, seed=3, start=start)
    assert _examples(_take(resumed, 5)) == expected[start : start + 35]


def test_resume_reads_one_epoch_and_decodes_nothing_it_skips(digits, monkeypatch):
    source = pipeline.open_source(digits.name, digits.data_dir)
    epochs, reads, decodes = [], [], []

    def note(value, log):
        return tf.py_function(lambda x: log.append(int(x)) or x, [value], value.dtype)

    def read(split, shuffle_seed):
        if shuffle_seed is None:
            return source.read(split, None)
        seed = note(shuffle_seed, epochs)
        return source.read(split, seed).map(
            lambda record: {**record, "number": note(record["number"], reads)}
        )

    def load(record):
        record = source.load(record)
        return {**record, "label": note(record["label"], decodes)}

    spy = dataclasses.replace(source, read=read, load=load)
    monkeypatch.setattr(pipeline, "open_source", lambda *_: spy)
    digits.shuffle_buffer = 50
    next(dataset_of(digits).train_batches(batch_size=7, seed=5, start=180 * 7))
    assert [epoch - (5 << 32) for epoch in epochs] == [3]
    skipped = 180 * 7 - 3 * TRAIN
    assert skipped + 7 <= len(reads) < TRAIN
    assert 7 <= len(decodes) < skipped  # the batch, and what is prefetched after it


def test_crops_change_with_epoch_and_seed(digits):
    digits.crop = "resized"
    first, second = map(set, _epochs(digits, 2, seed=0))
    (other,) = map(set, _epochs(digits, 1, seed=1))
    # A crop may be the whole image, which is the same in all epochs.
    assert len(first & second) < TRAIN / 4
    assert len(first & other) < TRAIN / 4


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("batch_size", [91, 100])
def test_evaluation_counts_every_example_once(digits, processes, batch_size):
    shares = [
        list(
            dataset_of(digits).eval_batches(
                "test",
                batch_size=batch_size,
                process_index=index,
                process_count=processes,
            )
        )
        for index in range(processes)
    ]
    assert len({len(share) for share in shares}) == 1
    for batch in itertools.chain(*shares):
        assert batch["image"].shape == (batch_size, 8, 8, 3)
        assert batch["label"].shape == batch["mask"].shape == (batch_size,)
        assert batch["mask"].dtype == bool
        assert not batch["image"][~batch["mask"]].any()
    examples = _examples(itertools.chain(*shares))
    loaded = tfds.builder_from_directory(f"{digits.data_dir}/digits/1.0.0")
    stored = [
        (np.repeat(record["image"], 3, axis=-1).tobytes(), int(record["label"]))
        for record in loaded.as_dataset(split="test").as_numpy_iterator()
    ]
    assert len(examples) == TEST
    assert collections.Counter(examples) == collections.Counter(stored)


def test_evaluation_with_more_processes_than_examples(digits):
    digits.eval = {"few": "test[:2]"}
    masks = [
        [
            batch["mask"].tolist()
            for batch in dataset_of(digits).eval_batches(
                "few", batch_size=2, process_index=index, process_count=3
            )
        ]
        for index in range(3)
    ]
    assert masks == [[[True, False]], [[True, False]], [[False, False]]]


def test_wrong_settings_are_refused_at_once(digits):
    with pytest.raises(UsageError, match=r"no split 'val'.*'test'"):
        dataset_of(digits).eval_batches("val", batch_size=4)
    digits.crop = "center"
    with pytest.raises(UsageError, match=r"'center'.*'resized'"):
        dataset_of(digits).train_batches(batch_size=4, seed=0)


def test_tfrecords_known_by_their_folder_only(cifar10):
    info = dataset_of(cifar10).info
    assert info.num_examples == {"train": 50_000, "test": 10_000}
    assert info.class_names[:2] == ("airplane", "automobile")
    cifar10.eval = {"some": "test[:64]"}
    (batch,) = dataset_of(cifar10).eval_batches("some", batch_size=64)
    builder = tfds.builder(cifar10.name, data_dir=cifar10.data_dir)
    stored = list(builder.as_dataset(split="test[:64]").as_numpy_iterator())
    images = np.stack([record["image"] for record in stored]).astype(int)
    # TFDS decodes with the faster of libjpeg's two transforms.
    assert np.abs(batch["image"] - images).mean() < 1
    np.testing.assert_array_equal(batch["label"], [r["label"] for r in stored])


@pytest.mark.parametrize("policy", ["AUTO", "USE_CODE"])
def test_mocked_imagenet(digits, policy):
    digits.name = "imagenet2012"
    digits.train = "train[:99%]"
    digits.eval = {"minival": "train[99%:]", "val": "validation"}
    digits.crop = "resized"
    policy = tfds.testing.MockPolicy[policy]
    with tfds.testing.mock_data(num_examples=10, policy=policy):
        info = dataset_of(digits).info
        assert info.num_classes == 1000
        assert info.num_examples == {"train": 10, "minival": 10, "val": 10}
        batches = dataset_of(digits).train_batches(
            batch_size=8, seed=0, start=16, process_count=2
        )
        assert [b["image"].shape for b in _take(batches, 3)] == [(4, 8, 8, 3)] * 3
        masks = [
            batch["mask"].sum()
            for batch in dataset_of(digits).eval_batches("minival", batch_size=8)
        ]
        assert masks == [8, 2]
