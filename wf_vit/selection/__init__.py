"""What a model can do without: interactions or patches that are chosen together.

An indicator says what a single cut does. When most is cut, single effects do not add
up: the softmax renormalises over what is left, and keys with like values stand in for
one another. So sets are chosen (ours), by how far they move the model's output. That is
measured in one metric for each head, ``G``: the mean of ``t t^T`` over queries and
random probes of the output, with ``t_i = W_O^T u_i`` and u_i the gradient at query i,
as in `wf_vit.indicators.propagated_knockout`. The mean over all queries has full rank
after a few probes, so that nothing is fitted to their noise.

Both choices are greedy. Both look at the model as it is after earlier cuts, so that
later ones make up for them. docs/selection.md derives them.
"""

from wf_vit.selection.interactions import select_interactions
from wf_vit.selection.patches import (
    first_of_quarters,
    run_without,
    select_patches,
)
from wf_vit.selection.yardstick import run_to

__all__ = [
    "first_of_quarters",
    "run_to",
    "run_without",
    "select_interactions",
    "select_patches",
]
