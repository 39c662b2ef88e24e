"""The records of a whole training run, in their order, as one process takes them."""

import math

from wf_vit.data.order import TURN, Order, Share
from wf_vit.data.source import Source
from wf_vit.data.tensorflow import tf

# Of a run. They are the low bits of seeds, and the number of the group lies above.
_EPOCH_BITS = 24

# A stamp is a number within an epoch; the epoch lies above these bits. To repeat the
# seed of the epoch would take longer than to read the record.
_STAMP_BITS = 38


def epoch_seed(seed: int, epoch: int | tf.Tensor) -> int | tf.Tensor:
    """Returns the seed of an epoch: int64, made of both."""
    return ((seed % 2**31) << 32) + epoch


def epoch_of(stamp: tf.Tensor) -> tf.Tensor:
    """Returns the epoch of a stamp."""
    return stamp // 2**_STAMP_BITS


def shuffled_for_ever(
    source: Source, split: str, order: Order, share: Share, *, seed: int, buffer: int
) -> tf.data.Dataset:
    """Returns the pairs (record, stamp) that a process takes, of all epochs.

    ``epoch_of(stamp)`` is the epoch.

    Args:
      source: of the records.
      split: to read.
      order: of its examples.
      share: which of them the process takes.
      seed: of the order.
      buffer: records to shuffle from, over all groups.
    """
    buffer = math.ceil(buffer / order.num_groups)
    whole = share.reads_all_of(order)

    def one_group(
        epoch: tf.Tensor, group: int | tf.Tensor, half: int | tf.Tensor
    ) -> tf.data.Dataset:
        """Reads a group, its records with their positions if not all are taken.

        It begins with ``half`` records too many, 0 or 1, which fill its first turn.
        """
        group_seed = epoch_seed(seed, group * 2**_EPOCH_BITS + epoch)
        if order.num_groups == 1:
            records = source.read(split, group_seed)
        else:
            end = tf.gather(order.ends, group)
            size = tf.gather(order.sizes, group)
            records = source.read_range(
                split, end - size, end, group_seed, groups=order.num_groups
            )
        records = records.shuffle(
            buffer, seed=group_seed, reshuffle_each_iteration=False
        )
        if order.num_groups > 1 and order.num_examples % TURN:
            records = records.take(half).concatenate(records)
        if whole:
            return records
        ranks = tf.data.Dataset.range(-tf.cast(half, tf.int64), order.num_examples)
        positions = ranks.map(lambda rank: order.position(epoch, group, rank))
        return tf.data.Dataset.zip(records, positions)

    def all_groups(epoch: tf.Tensor) -> tf.data.Dataset:
        """Reads in turns what groups the process needs."""

        def reads(turn: int | tf.Tensor) -> tf.Tensor:
            return share.reads(order, epoch, order.group_of_turn(epoch, turn))

        half = order.half_turn(epoch)
        turns = tf.data.Dataset.range(order.num_groups)
        records = turns.filter(reads).interleave(
            lambda turn: one_group(
                epoch,
                order.group_of_turn(epoch, turn),
                tf.where(turn == 0, half, 0),
            ),
            cycle_length=order.num_groups,
            block_length=TURN,
        )
        return records.skip(tf.where(reads(tf.zeros((), tf.int64)), half, 0))

    # TensorFlow would try to rewrite TFDS's own code as a graph, and warn.
    @tf.autograph.experimental.do_not_convert
    def one_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
        alone = order.num_groups == 1
        records = one_group(epoch, 0, 0) if alone else all_groups(epoch)
        if not whole:
            records = records.filter(lambda _, position: share.owns(position))
            records = records.map(lambda record, _: record)
        first = epoch * 2**_STAMP_BITS
        stamps = tf.data.Dataset.range(first, first + 2**_STAMP_BITS)
        return tf.data.Dataset.zip(records, stamps)

    first_epoch = share.start // order.num_examples
    epochs = tf.data.Dataset.range(first_epoch, 2**_EPOCH_BITS)
    return epochs.flat_map(one_epoch).skip(share.taken(order))
