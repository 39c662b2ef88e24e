"""From a model, or from attention, and photographs to explanations."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from wf_vit import fields, figures, measure
from wf_vit import indicators as matrices
from wf_vit.arrays import takes_arrays
from wf_vit.errors import UsageError
from wf_vit.explanation.explanation import (
    REMOVED,
    ClassEffect,
    Explanation,
    Removal,
)
from wf_vit.grid import Grid, infer_grid
from wf_vit.interventions import keep_patches, num_kept
from wf_vit.models.pretrained import Pretrained
from wf_vit.models.vit import ViT
from wf_vit.models.windowfree import WindowFreeViT
from wf_vit.selection import (
    first_of_quarters,
    run_to,
    run_without,
    select_patches,
)
from wf_vit.shapes import Images, Keys

CLASS = "class"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      indicators: names of ``measure.INDICATORS``; the fields are those of the last.
      target: what "propagated" looks at: one of ``measure.OUTPUTS``, "class" for the
        class that the model predicts, or "class:NAME" with a name or an index. Of a
        class it is the size of the effect on its logit, which needs no probes.
      num_probes: of "propagated".
      layers: indices; None for all.
      heads: whether to measure every head on its own too. The heads of a window-free
        transformer, which have fields of their own, always are.
      mass: share of its impact that a patch's field holds.
      removal: whether to find out which patches the model can do without.

    Raises:
      UsageError: there is no such indicator, or it cannot be had in these layers.
    """

    indicators: tuple[str, ...] = ("mean", "knockout", "propagated")
    target: str = "tokens"
    num_probes: int = 16
    layers: tuple[int, ...] | None = None
    heads: bool = False
    mass: float = 0.5
    removal: bool = False

    def __post_init__(self):
        if self.target not in measure.OUTPUTS and not self.of_class:
            raise UsageError(
                f"The target is {self.target!r}: choose one of "
                f"{', '.join(measure.OUTPUTS)}, class or class:NAME_OR_INDEX."
            )
        known, names = measure.INDICATORS, self.indicators
        if not names or not set(names) <= set(known) or len(set(names)) < len(names):
            raise UsageError(
                f"indicators is {names}: name some of {', '.join(known)}, each once."
            )
        if "rollout" in names and self.layers is not None:
            raise UsageError(
                f"layers is {self.layers}, but the rollout needs all layers: leave "
                "layers empty, or leave out the rollout."
            )
        if not 0 < self.mass < 1:
            raise UsageError(
                f"mass is {self.mass}, expected a share between 0 and 1: 0.5 holds "
                "half of what a patch listens to."
            )

    @property
    def of_class(self) -> bool:
        """Whether the target is a class."""
        return self.target.partition(":")[0] == CLASS


def explain_batch(
    loaded: Pretrained,
    photographs: UInt8[np.ndarray, "B height width 3"],
    settings: Settings,
    keys: Keys,
) -> list[Explanation]:
    """Measures the interactions and fields of a batch of photographs.

    All indicators share one forward pass, that of the propagated one if it is wanted.

    Args:
      loaded: the model.
      photographs: of the model's size: the pixels that it is to see.
      settings: what is measured.
      keys: randomness of the probes, one for each photograph. Its numbers depend on
        its own key only.

    Returns:
      An explanation of each photograph.

    Raises:
      UsageError: a layer, a target or a class is unknown.
    """
    model, main = loaded.model, settings.indicators[-1]
    heads = settings.heads or isinstance(model, WindowFreeViT)
    images = jnp.asarray(loaded.preprocess.normalize(photographs))
    found, recording, effect = {}, None, None
    if settings.of_class:
        recording = measure.record(model, loaded.params, images, layers=settings.layers)
        classes = _classes(settings.target, loaded, recording.logits)
        effect = _class_effects(loaded, images, classes, settings.layers, heads)
    for name in sorted(settings.indicators, key=lambda name: name != "propagated"):
        if name == "propagated" and settings.of_class:
            found[name] = effect
            continue
        found[name] = measure.impact(
            model,
            loaded.params,
            images,
            name,
            per_head=heads,
            layers=settings.layers,
            target=settings.target,
            num_probes=settings.num_probes,
            key=keys,
            prefix_tokens=True,
            recording=recording,
        )
        recording = found[name].recording
    if recording is None:
        recording = measure.record(model, loaded.params, images, layers=settings.layers)
    error = None
    if "propagated" in found and not settings.of_class:
        error = found["propagated"].relative_error
    stacked = _derived(
        {name: found[name].impact for name in settings.indicators},
        {name: found[name].heads for name in settings.indicators if heads},
        recording.attention,
        main=main,
        mass=settings.mass,
        num_prefix_tokens=model.num_prefix_tokens,
        grid=model.grid,
    )
    stacked["relative_error"] = error
    if isinstance(model, WindowFreeViT):
        stacked["learned"] = recording.gaussians
    stacked["effect"] = None if effect is None else effect.signed
    stacked, tokens, logits = jax.device_get(
        (stacked, recording.tokens, recording.logits)
    )
    removals = [None] * len(images)
    if settings.removal:
        removals = _removals(loaded, images, settings, keys, recording.pooled)
    explanations = []
    for b, photograph in enumerate(photographs):
        arrays = jax.tree.map(lambda x, b=b: x[:, b], stacked)
        signed = arrays.pop("effect")
        for part in ("impact", "impact_heads"):  # JAX sorted them by name.
            named = arrays[part]
            arrays[part] = {n: named[n] for n in settings.indicators if n in named}
        explanations.append(
            Explanation(
                photograph=photograph,
                grid=model.grid,
                layers=np.array(model.check_layers(settings.layers)),
                prefix=prefix_names(model),
                indicator=main,
                components=figures.components_of(tokens[b, model.num_prefix_tokens :]),
                class_effect=None
                if signed is None
                else _class_effect(int(classes[b]), signed, logits[b], loaded),
                removal=removals[b],
                mass=settings.mass,
                **arrays,
            )
        )
    return explanations


def _removals(
    loaded: Pretrained,
    images: Images,
    settings: Settings,
    keys: Keys,
    pooled: Float[Array, "B R"],
) -> list[Removal]:
    """Returns how well the model does without patches, for each image."""
    model, params = loaded.model, loaded.params
    layers = first_of_quarters(model.depth)
    order, cosine = [], []
    for layer in layers:
        scores = select_patches(
            model,
            params,
            images,
            layer,
            key=keys,
            removed=max(REMOVED),
            target="pooled" if settings.of_class else settings.target,
        )
        tokens = run_to(params, images, model=model, layer=layer)
        order.append(scores)
        for share in REMOVED:
            patches = keep_patches(scores, num_kept(share, scores.shape[1]))
            _, out = run_without(params, tokens, patches, model=model, layer=layer)
            cosine.append(_cosine(np.asarray(out["pooled"]), np.asarray(pooled)))
    order, cosine = np.stack(order, 1), np.stack(cosine, 1)
    cosine = cosine.reshape(len(images), len(layers), len(REMOVED))
    return [
        Removal(np.array(layers), order[b].astype(np.int32), cosine[b])
        for b in range(len(images))
    ]


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / lengths


@takes_arrays("attention")
def explain_attention(
    attention: Float[Array, "L H N N"],
    photograph: UInt8[np.ndarray, "height width 3"],
    *,
    num_prefix_tokens: int,
    grid: Grid | None,
    mass: float,
) -> Explanation:
    """Explains one photograph by attention from anywhere, without its model.

    Args:
      attention: weights after the softmax of all layers, from anywhere
        (`wf_vit.arrays`).
      photograph: what the model saw.
      num_prefix_tokens: tokens before the patches.
      grid: ``(GH, GW)``; needed unless square.
      mass: share of its impact that a patch's field holds.

    Returns:
      The explanation by mean attention, with all heads.

    Raises:
      UsageError: the attention does not fit the grid, or its rows are no
        distributions.
    """
    grid = infer_grid(
        attention.shape[-1], num_prefix_tokens=num_prefix_tokens, grid=grid
    )
    attention = attention.astype(jnp.float32)
    fused = matrices.interaction_indicator(attention, num_prefix_tokens=0)
    arrays = _derived(
        {"mean": fused},
        {"mean": attention},
        attention,
        main="mean",
        mass=mass,
        num_prefix_tokens=num_prefix_tokens,
        grid=grid,
    )
    return Explanation(
        photograph=photograph,
        grid=grid,
        layers=np.arange(len(attention)),
        prefix=tuple(f"prefix {n}" for n in range(num_prefix_tokens)),
        indicator="mean",
        mass=mass,
        **jax.device_get(arrays),
    )


def prefix_names(model: ViT) -> tuple[str, ...]:
    """Returns what the prefix tokens of a model are called, in their order."""
    names = ["CLS"] if model.cls_token else []
    names += ["distillation"] if model.distillation_token else []
    count = model.num_registers
    return (*names, *(f"register {n + 1}" for n in range(count)))


def _derived(
    impact: dict[str, Array],
    impact_heads: dict[str, Array],
    attention: Array,
    *,
    main: str,
    mass: float,
    num_prefix_tokens: int,
    grid: Grid,
) -> dict[str, Any]:
    """Returns what follows from impacts and attention, by the explanation's names."""
    t = num_prefix_tokens

    def field(matrices):
        return fields.responsive_field(matrices[..., t:, t:], grid, mass=mass)

    return {
        "impact": impact,
        "impact_heads": impact_heads,
        "field": field(impact[main]),
        "field_heads": field(impact_heads[main]) if impact_heads else None,
        "discriminability": fields.discriminability(impact[main][..., t:, t:]),
        "prefix_attention": attention[..., :t, t:],
        "attention_distance": matrices.mean_attention_distance(
            attention, num_prefix_tokens=t, grid=grid
        ),
    }


def _classes(
    target: str, loaded: Pretrained, logits: Float[Array, "B C"]
) -> Int[np.ndarray, " B"]:
    """Returns the class that is explained in each image.

    Raises:
      UsageError: the model has no head, or no such class.
    """
    count, names = loaded.model.num_classes, loaded.class_names
    if not count:
        raise UsageError(
            f"The target is {target!r}, but the model has no classification head: "
            f"choose one of {', '.join(measure.OUTPUTS)}, or a model with a head."
        )
    wanted = target.partition(":")[2].strip()
    if not wanted:
        return np.asarray(logits.argmax(-1))
    if wanted in names:
        index = names.index(wanted)
    elif wanted.isdecimal() and int(wanted) < count:
        index = int(wanted)
    else:
        known = ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")
        raise UsageError(
            f"The target is {target!r}, but the model has no class {wanted!r}: name "
            f"one of its {count} classes by index, 0 to {count - 1}"
            + (f", or by name: {known}." if names else ". The names are not known.")
        )
    return np.full(len(logits), index)


@dataclasses.dataclass(frozen=True)
class _Effects:
    """Signed effects ``[L, B, N, N]`` on a logit, and their sizes as an impact."""

    signed: Array
    impact: Array
    heads: Array | None


def _class_effects(
    loaded: Pretrained,
    images: Images,
    classes: Int[np.ndarray, " B"],
    layers: tuple[int, ...] | None,
    per_head: bool,
) -> _Effects:
    effect = measure.propagate_logit(
        loaded.model,
        loaded.params,
        images,
        classes=classes,
        layers=layers,
        per_head=per_head,
        prefix_tokens=True,
    )
    signed = effect.sum(-3) if per_head else effect
    return _Effects(signed, jnp.abs(signed), jnp.abs(effect) if per_head else None)


def _class_effect(
    index: int,
    effect: Float[np.ndarray, "L N N"],
    logits: Float[np.ndarray, " C"],
    loaded: Pretrained,
) -> ClassEffect:
    names = loaded.class_names
    shifted = np.exp(logits.astype(np.float64) - logits.max())
    return ClassEffect(
        index=index,
        name=names[index] if names else f"class {index}",
        probability=float(shifted[index] / shifted.sum()),
        effect=effect,
        by_layer=np.asarray(fields.heard(effect, loaded.model.num_prefix_tokens)),
    )
