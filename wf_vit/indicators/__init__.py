"""How much each token matters to each other token, from recorded attention.

Every function maps arrays to arrays, is traceable, computes in float32 whatever
comes in, and takes any leading batch and layer axes; several layers lie in front:
``attention[L, B, H, i, j]``. The result keeps the interactions between patches,
``[..., P, P]``, or ``[..., H, P, P]`` with ``per_head``; ``num_prefix_tokens=0``
keeps all N tokens, CLS and registers included. Importing this package loads
neither Flax nor TensorFlow.

Shapes and options are always checked. Values are checked outside ``jax.jit`` only:
inside, NaN spreads along its row, and rows that do not sum to 1 are taken as if
divided by their sum where an interaction is cut, and as they are elsewhere.
"""

from wf_vit.indicators.attention import (
    HeadFusion,
    Method,
    attention_rollout,
    interaction_indicator,
    mean_attention_distance,
)
from wf_vit.indicators.groups import SetEffect, set_effect
from wf_vit.indicators.knockout import knockout_effect, knockout_impact
from wf_vit.indicators.propagated import PropagatedKnockout, propagated_knockout
from wf_vit.indicators.stretch import expected_stretch

__all__ = [
    "HeadFusion",
    "Method",
    "PropagatedKnockout",
    "SetEffect",
    "attention_rollout",
    "expected_stretch",
    "interaction_indicator",
    "knockout_effect",
    "knockout_impact",
    "mean_attention_distance",
    "propagated_knockout",
    "set_effect",
]
