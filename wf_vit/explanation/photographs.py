"""A model and photographs to what the model's patches do to one another."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from wf_vit import fields
from wf_vit import indicators as matrices
from wf_vit.errors import UsageError
from wf_vit.explanation.explanation import Explanation, Learned
from wf_vit import measure
from wf_vit.models.pretrained import Pretrained
from wf_vit.models.vit import ViT
from wf_vit.models.windowfree import WindowFreeViT
from wf_vit.shapes import Images, Key, Params

# The indicators, and what they are called in a figure or a page.
INDICATORS = {
    "mean": "mean attention",
    "max": "largest attention of a head",
    "std": "spread of attention over heads",
    "odds": "attention odds",
    "rollout": "attention rollout",
    "knockout": "knockout, effect in its layer",
    "propagated": "knockout, effect on the output",
}


def check_indicators(names: Sequence[str], layers: Sequence[int] | None) -> None:
    """Raises UsageError unless the indicators exist and can be had in these layers."""
    if not names or not set(names) <= set(INDICATORS) or len(set(names)) < len(names):
        raise UsageError(
            f"config.indicators is {tuple(names)}: name some of "
            f"{', '.join(INDICATORS)}, each once."
        )
    if "rollout" in names and layers is not None:
        raise UsageError(
            f"config.layers is {tuple(layers)}, but the rollout needs all layers: "
            "leave config.layers empty, or leave out the rollout."
        )


def measure(
    loaded: Pretrained,
    photographs: UInt8[np.ndarray, "B height width 3"],
    *,
    indicators: Sequence[str],
    target: str,
    num_probes: int,
    layers: Sequence[int] | None,
    heads: bool,
    mass: float,
    key: Key,
) -> list[Explanation]:
    """Measures the interactions and fields of a batch of photographs.

    Args:
      loaded: the model.
      photographs: of the model's size, as ``loaded.preprocess.fit`` makes them.
      indicators: names of ``INDICATORS``; the fields are those of the last one.
      target: the output that "propagated" looks at, one of ``measure.OUTPUTS``.
      num_probes: of "propagated".
      layers: indices; None for all.
      heads: whether to measure every head on its own too. The heads of a window-free
        transformer, which have fields of their own, always are.
      mass: share of its impact that a patch's field holds.
      key: randomness of the probes. An image's numbers depend on it and on the place
        in the batch, but not on the other images.

    Returns:
      An explanation of each photograph.

    Raises:
      UsageError: an indicator, a layer or a target is unknown, or does not go with
        the others.
    """
    check_indicators(indicators, layers)
    model = loaded.model
    learns = isinstance(model, WindowFreeViT)
    heads = heads or learns
    images = jnp.asarray(loaded.preprocess.normalize(photographs))
    (recorded,) = measure.record(
        model, loaded.params, images, layers=layers, batch_size=len(images)
    )
    impact_of = functools.partial(
        _impact,
        loaded=loaded,
        images=images,
        recorded=recorded,
        layers=layers,
        target=target,
        num_probes=num_probes,
        key=key,
    )
    impact, errors = {}, {}
    for name in indicators:
        impact[name], errors[name] = impact_of(name, per_head=False)
    by_head = {name: impact_of(name, per_head=True)[0] for name in indicators if heads}
    main = indicators[-1]
    field_of = functools.partial(fields.responsive_field, grid=model.grid, mass=mass)
    chosen = tuple(range(model.depth)) if layers is None else tuple(layers)
    stacked = {
        "impact": impact,
        "impact_heads": by_head,
        "field": field_of(impact[main]),
        "field_heads": field_of(by_head[main]) if heads else None,
        "discriminability": fields.discriminability(impact[main]),
        "attention_distance": matrices.mean_attention_distance(
            recorded.attention,
            num_prefix_tokens=model.num_prefix_tokens,
            grid=model.grid,
        ),
        "relative_error": errors.get("propagated"),
        "extents": _extents(loaded.params, images, model, chosen) if learns else None,
    }
    stacked = jax.device_get(stacked)
    return [
        _explanation(
            jax.tree.map(lambda x, b=b: x[:, b], stacked),
            model,
            photograph=photograph,
            layers=np.array(chosen),
            indicator=main,
        )
        for b, photograph in enumerate(photographs)
    ]


def _explanation(arrays: dict[str, Any], model: ViT, **others: Any) -> Explanation:
    """Returns one photograph's explanation, from its arrays ``[L ...]``."""
    extents = arrays.pop("extents")
    return Explanation(
        grid=model.grid,
        learned=None if extents is None else Learned(extents, model.fields.softness),
        **arrays,
        **others,
    )


@functools.partial(jax.jit, static_argnames=("model", "layers"))
def _extents(
    params: Params, images: Images, model: ViT, layers: tuple[int, ...]
) -> Float[Array, "L B H P 4"]:
    """Returns how far the learned fields of some layers reach."""
    _, out = model.apply({"params": params}, images)
    return jnp.stack([out["fields"][layer].extents for layer in layers])


def _impact(
    name: str,
    *,
    per_head: bool,
    loaded: Pretrained,
    images: Images,
    recorded: measure.Recording,
    layers: Sequence[int] | None,
    target: str,
    num_probes: int,
    key: Key,
) -> tuple[Float[Array, "L B ..."], Float[Array, "L B ..."] | None]:
    """Returns an indicator, and its relative error if it has one."""
    model, params, attention = loaded.model, loaded.params, recorded.attention
    options = {"per_head": per_head, "num_prefix_tokens": model.num_prefix_tokens}
    match name:
        case "propagated":
            (result,) = measure.propagate(
                model,
                params,
                images,
                target=target,
                key=key,
                num_probes=num_probes,
                layers=layers,
                per_head=per_head,
                batch_size=len(images),
            )
            return result.impact, result.relative_error
        case "knockout":
            projection = parameters.output_projection(model, params, layers)
            impact = matrices.knockout_impact(
                attention, recorded.values, *projection, **options
            )
        case "rollout":
            impact = matrices.attention_rollout(attention, **options)
        case _:
            impact = matrices.interaction_indicator(attention, method=name, **options)
    return impact, None
