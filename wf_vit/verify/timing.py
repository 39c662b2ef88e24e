"""How long a model takes when patches are removed from a layer on."""

import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from wf_vit.models.vit import ViT
from wf_vit.shapes import Params
from wf_vit.verify import network
from wf_vit.verify.removal import num_kept

BATCH_SIZES = (1, 64)


def time_removal(
    params: Params,
    *,
    layer: int,
    shares: Sequence[float],
    turns: int,
    model: ViT,
) -> dict[str, dict[str, float]]:
    """Times whole forward passes, from images to logits, turn by turn.

    Which patches go is given: what it takes to find out is not in the time, nor is the
    compilation. What else the machine does is spread evenly over all conditions.

    Args:
      params: the model's.
      layer: before which patches are gathered out.
      shares: of the patches that are gathered out.
      turns: of which the median counts.
      model: the model.

    Returns:
      Milliseconds an image, by batch size and share; the share 0 is the whole model.
    """
    patches = model.num_tokens - model.num_prefix_tokens
    times = {}
    for batch_size in BATCH_SIZES:
        key = jax.random.key(0)
        images = jax.random.normal(key, (batch_size, *model.image_size, 3))
        forward = {0: lambda x=images: network.classify(params, x, model=model)}
        for share in shares:
            kept = _some_patches(batch_size, num_kept(share, patches), patches)
            forward[share] = lambda x=images, kept=kept: network.shortened(
                params, x, kept, layer=layer, model=model
            )
        times[str(batch_size)] = {
            str(share): milliseconds / batch_size
            for share, milliseconds in _take_turns(forward, turns).items()
        }
    return times


def _some_patches(batch_size: int, count: int, num_patches: int) -> Int[Array, "B P"]:
    order = jax.random.permutation(jax.random.key(1), num_patches)
    return jnp.broadcast_to(jnp.sort(order[:count]), (batch_size, count))


def _take_turns(functions, turns):
    """Returns the median time of each function, in milliseconds."""
    for function in functions.values():
        jax.block_until_ready(function())
    taken = {name: [] for name in functions}
    for _ in range(turns):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            taken[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in taken.items()}
