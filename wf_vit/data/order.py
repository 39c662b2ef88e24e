"""The order of the training examples: the same for any processes and batch sizes.

Every example that a run takes has a position, counted from 0 over all its epochs. A
batch is a range of positions, and each process takes a part of every batch.

To read in parallel, the split is cut into groups of consecutive examples, each of
which is shuffled on its own. They take turns: two positions for each group, in the
order of the groups. Their number and sizes depend on the number of examples only.

With an odd number of examples, every other epoch begins at an odd position. There the
groups take turns backwards, so that 2k and 2k + 1 are of one group all the same and
every group is exhausted by the end of the epoch.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Int

# 64 processes read each group once, and 64 files are open in one.
# Below 8192 examples a group, one has all the shuffling that it needs.
_MOST_GROUPS = 64
_EXAMPLES_PER_GROUP = 8192

# Positions of one turn: neighbours, as mixup and CutMix mix them.
TURN = 2

# A number, an array of them or a tensor: int64.
_Numbers = Any


def count_groups(num_examples: int) -> int:
    """Returns into how many groups a split is cut: a power of two."""
    most = max(num_examples // _EXAMPLES_PER_GROUP, 1)
    return min(2 ** (most.bit_length() - 1), _MOST_GROUPS)


@dataclasses.dataclass(frozen=True)
class Order:
    """Which group each position takes its example from.

    The methods take numbers, NumPy arrays and TensorFlow's tensors of int64.

    Attributes:
      num_examples: N, of the split.
      num_groups: G.
    """

    num_examples: int
    num_groups: int

    @property
    def sizes(self) -> Int[np.ndarray, " G"]:
        """How many examples each group has."""
        turns = np.arange(self._turns)
        sizes = TURN * np.bincount(turns % self.num_groups, minlength=self.num_groups)
        sizes[(self._turns - 1) % self.num_groups] -= self.num_examples % TURN
        return sizes

    @property
    def ends(self) -> Int[np.ndarray, " G"]:
        """The example of the split after the last one of each group."""
        return np.cumsum(self.sizes)

    def group_of_turn(self, epoch: _Numbers, turn: _Numbers) -> _Numbers:
        """Returns the group that has a turn of an epoch, counted from 0."""
        return self._mirrored(turn, self.half_turn(epoch)) % self.num_groups

    def half_turn(self, epoch: _Numbers) -> _Numbers:
        """Returns how many positions of an epoch's first turn lie before it: 0 or 1."""
        return epoch * self.num_examples % TURN

    def group(self, position: _Numbers) -> _Numbers:
        """Returns the group of a position."""
        epoch, within = position // self.num_examples, position % self.num_examples
        turn = (within + self.half_turn(epoch)) // TURN
        return self.group_of_turn(epoch, turn)

    def position(self, epoch: _Numbers, group: _Numbers, rank: _Numbers) -> _Numbers:
        """Returns the position of an example of a group.

        Args:
          epoch: from 0.
          group: from 0.
          rank: how many examples of the group come before it in this epoch.
        """
        half = self.half_turn(epoch)
        turn = self._mirrored(group, half) % self.num_groups
        is_first = (self.num_groups - turn) // self.num_groups
        rank = rank + half * is_first
        turn = turn + rank // TURN * self.num_groups
        return epoch * self.num_examples + TURN * turn + rank % TURN - half

    @property
    def _turns(self) -> int:
        """Turns of an epoch, the last or the first of which may be half of one."""
        return math.ceil(self.num_examples / TURN)

    def _mirrored(self, turn: _Numbers, backwards: _Numbers) -> _Numbers:
        """Returns the turn, counted from the end if ``backwards`` is 1."""
        return turn + backwards * (self._turns - 1 - 2 * turn)


@dataclasses.dataclass(frozen=True)
class Share:
    """What one process takes of every batch, and so of every group.

    Neighbours (2m, 2m + 1) of a batch stay on one process wherever the batch can be
    shared so.

    Attributes:
      batch_size: B, of all processes, which share it evenly.
      start: position of the first example of the first batch.
      index: of this process.
      count: of processes.
    """

    batch_size: int
    start: int
    index: int
    count: int

    @property
    def places(self) -> Int[np.ndarray, " b"]:
        """The places within the batch that this process takes, ascending."""
        places = np.arange(self.batch_size)
        return places[places // self._unit % self.count == self.index]

    def owns(self, position: _Numbers) -> _Numbers:
        """Says whether this process takes a position, of before ``start`` too."""
        place = (position - self.start) % self.batch_size
        return place // self._unit % self.count == self.index

    def reads(self, order: Order, epoch: _Numbers, group: _Numbers) -> _Numbers:
        """Says whether this process may take anything of a group in an epoch."""
        sharers = self._sharers(order)
        first = order.position(epoch, group, 0)
        unit = (first - self.start) // TURN
        return unit % sharers == self.index % sharers

    def reads_all_of(self, order: Order) -> bool:
        """Says whether this process takes all of every group that it reads."""
        return self._sharers(order) == self.count

    def taken(self, order: Order) -> int:
        """Returns how many examples it has taken in the epoch of ``start``."""
        begin = self.start - self.start % order.num_examples
        return int(np.sum(self.owns(np.arange(begin, self.start))))

    @property
    def _unit(self) -> int:
        return TURN if self.batch_size % (TURN * self.count) == 0 else 1

    def _sharers(self, order: Order) -> int:
        """Returns among how many the groups of an epoch are dealt out.

        A turn of a group is a unit of a batch if batches begin at even positions. So
        of G groups and P processes, every gcd(G, P)-th is of the same process.
        """
        if self._unit != TURN or self.start % TURN:
            return 1
        return math.gcd(order.num_groups, self.count)
