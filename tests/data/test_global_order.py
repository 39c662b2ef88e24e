"""One order of all examples, for any number of processes and any batch size."""

import collections
import itertools

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from tests.cases import slow
from tests.data.datasets import dataset_of
from wf_vit.data import pipeline
from wf_vit.data.digits import prepared_builder
from wf_vit.data.order import Order, Share, count_groups
from wf_vit.data.tfds_source import builder_source
from wf_vit.errors import UsageError

TRAIN = 358  # examples of the split of digits that is used here


@pytest.fixture
def grouped(digits, monkeypatch):
    """Makes configs of digits whose train split is read in so many groups."""

    def make(groups, train=digits.train):
        monkeypatch.setattr(pipeline, "count_groups", lambda _: groups)
        digits.train = train
        digits.crop = "resized"
        digits.shuffle_buffer = 100
        return digits

    return make


def shares(config, count, batches, *, batch_size, start=0, seed=3):
    """Returns what each of ``count`` processes gets of the first batches."""
    data = dataset_of(config)
    return [
        list(
            itertools.islice(
                data.train_batches(
                    batch_size=batch_size,
                    seed=seed,
                    start=start,
                    process_index=index,
                    process_count=count,
                ),
                batches,
            )
        )
        for index in range(count)
    ]


def examples(config, count, total, *, batch_size, start=0):
    """Returns (image, label) at every position from ``start`` on, put together."""
    parts = shares(
        config, count, -(-total // batch_size), batch_size=batch_size, start=start
    )
    found = []
    for batches in zip(*parts, strict=True):
        places = np.concatenate([batch["place"] for batch in batches])
        assert sorted(places) == list(range(batch_size))
        images = np.concatenate([batch["image"] for batch in batches])
        labels = np.concatenate([batch["label"] for batch in batches])
        order = np.argsort(places)
        found += [(images[i].tobytes(), int(labels[i])) for i in order]
    return found[:total]


# --- Arithmetic


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("num_examples", [16, 40, 41, 42, 43, 57])
def test_every_epoch_exhausts_every_group(num_examples, groups):
    order = Order(num_examples, groups)
    assert order.sizes.sum() == num_examples
    assert order.sizes.max() - order.sizes.min() <= 3
    for epoch in range(4):
        positions = np.arange(epoch * num_examples, (epoch + 1) * num_examples)
        found = order.group(positions)
        np.testing.assert_array_equal(np.bincount(found, minlength=groups), order.sizes)
        for group in range(groups):
            expected = positions[found == group]
            ranks = np.arange(len(expected))
            np.testing.assert_array_equal(order.position(epoch, group, ranks), expected)
        as_tensors = order.group(tf.constant(positions))
        np.testing.assert_array_equal(as_tensors, found)


@pytest.mark.parametrize("groups", [2, 8])
@pytest.mark.parametrize("num_examples", [57, 58, 59])
def test_neighbours_are_of_one_group(num_examples, groups):
    pairs = np.arange(4 * num_examples // 2 * 2).reshape(-1, 2)
    within = pairs[pairs[:, 0] // num_examples == pairs[:, 1] // num_examples]
    found = Order(num_examples, groups).group(within)
    np.testing.assert_array_equal(found[:, 0], found[:, 1])


@pytest.mark.parametrize(
    ("processes", "batch_size", "start", "whole"),
    [
        (2, 8, 0, True),
        (4, 16, 6, True),
        (8, 32, 2, True),
        (2, 8, 3, False),
        (3, 12, 0, False),
        (6, 24, 4, False),
        (16, 64, 0, False),
        (4, 12, 0, False),
    ],
)
def test_a_process_reads_the_groups_that_it_needs_and_no_others(
    processes, batch_size, start, whole
):
    order = Order(num_examples=203, num_groups=8)
    for epoch, index in itertools.product(range(start // 203, 4), range(processes)):
        share = Share(batch_size, start, index, processes)
        positions = np.arange(epoch * 203, (epoch + 1) * 203)
        groups = order.group(positions)
        own = share.owns(positions)
        reads = np.array([share.reads(order, epoch, group) for group in range(8)])
        assert set(groups[own]) <= set(np.flatnonzero(reads))
        assert share.reads_all_of(order) == whole
        if whole:
            np.testing.assert_array_equal(own, reads[groups])
            assert reads.sum() == 8 // processes


def test_pairs_stay_together_where_the_batch_can_be_shared_so():
    for count in (1, 2, 3, 4):
        parts = [Share(24, 0, index, count).places for index in range(count)]
        assert sorted(np.concatenate(parts)) == list(range(24))
        for places in parts:
            np.testing.assert_array_equal(places[::2] + 1, places[1::2])
    assert Share(6, 0, 1, 2).places.tolist() == [1, 3, 5]


@pytest.mark.parametrize(
    ("num_examples", "groups"),
    [(1, 1), (1433, 1), (16_383, 1), (16_384, 2), (50_000, 4), (1_281_167, 64)],
)
def test_the_number_of_groups(num_examples, groups):
    assert count_groups(num_examples) == groups


@pytest.mark.parametrize(("begin", "end"), [(10, 30), (22, 45), (0, 45), (7, 7)])
def test_a_range_is_what_tfds_would_read(digits, begin, end):
    builder = prepared_builder(digits.data_dir)
    source = builder_source(builder)
    split = "train[:20]+test[5:30]"
    config = tfds.ReadConfig(add_tfds_id=True, interleave_cycle_length=1)
    stored = list(builder.as_dataset(split=split, read_config=config))
    records = source.read_range(split, begin, end, None, groups=16)
    found = list(records.map(source.load).as_numpy_iterator())
    for ours, theirs in zip(found, stored[begin:end], strict=True):
        assert ours["id"] == theirs["tfds_id"]
        assert ours["label"] == theirs["label"]


# --- The stream


@pytest.mark.parametrize("groups", [1, 4])
def test_batches_do_not_depend_on_the_number_of_processes(grouped, groups):
    """Over an epoch and a half; 358 is a multiple of neither 24 nor 3 nor 4."""
    config = grouped(groups)
    total = TRAIN * 3 // 2 // 24 * 24
    expected = examples(config, 1, total, batch_size=24)
    for count in (2, 3, 4) if groups > 1 else (3,):
        assert examples(config, count, total, batch_size=24) == expected


@pytest.mark.parametrize("train", ["train[:357]", "train[:358]"])
def test_every_epoch_has_every_example_once(grouped, train):
    config = grouped(4, train)
    config.crop = "none"
    config.eval = {"stored": train}
    (stored,) = dataset_of(config).eval_batches("stored", batch_size=TRAIN)
    own = stored["mask"]
    expected = collections.Counter(
        (image.tobytes(), int(label))
        for image, label in zip(stored["image"][own], stored["label"][own], strict=True)
    )
    size = expected.total()
    found = examples(config, 2, 3 * size, batch_size=100)
    epochs = [found[i * size : (i + 1) * size] for i in range(3)]
    assert [collections.Counter(epoch) for epoch in epochs] == [expected] * 3
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(
    ("train", "start", "batch_size", "count"),
    [
        ("train[:358]", 1, 7, 1),
        ("train[:357]", 500, 16, 4),
        slow("train[:357]", 36, 8, 2),
        slow("train[:358]", 359, 9, 3),
        ("train[:357]", 723, 6, 2),
    ],
)
def test_a_resume_goes_on_at_the_next_example(grouped, train, start, batch_size, count):
    """With another batch size, and another number of processes."""
    config = grouped(4, train)
    expected = examples(config, 1, 800, batch_size=100)
    total = 5 * batch_size
    found = examples(config, count, total, batch_size=batch_size, start=start)
    assert found == expected[start : start + total]


def test_a_batch_that_processes_cannot_share_is_refused(digits):
    with pytest.raises(UsageError, match=r"is 16, which 3 processes.*multiple of 3"):
        dataset_of(digits).train_batches(batch_size=16, seed=0, process_count=3)
