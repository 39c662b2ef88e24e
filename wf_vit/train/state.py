"""Everything a training run has to remember."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from wf_vit.shapes import Params


@struct.dataclass
class TrainState:
    """The state of a run; with the seed, it determines all that follows.

    The leaves are untyped, since JAX also fills the tree with shapes and specs.

    Attributes:
      step: number of updates done, int32.
      params: parameters, float32.
      opt_state: of the optimizer.
      ema_params: moving average of the parameters, or None.
    """

    step: Any
    params: Any
    opt_state: Any
    ema_params: Any

    @property
    def eval_params(self) -> Params:
        """The parameters to evaluate and to export."""
        return self.params if self.ema_params is None else self.ema_params


def init_state(
    params: Params, optimizer: optax.GradientTransformation, *, ema: bool
) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=jax.jit(optimizer.init)(params),
        ema_params=jax.tree.map(jnp.copy, params) if ema else None,
    )
