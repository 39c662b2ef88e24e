"""What a model's patches do to one another in a photograph, and the file of it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from wf_vit import fields, measure
from wf_vit import indicators as matrices
from wf_vit.errors import UsageError
from wf_vit.fields import Field
from wf_vit.grid import Grid
from wf_vit.models.pretrained import Pretrained
from wf_vit.models.vit import ViT
from wf_vit.models.windowfree import WindowFreeViT
from wf_vit.shapes import Key
from wf_vit.workdir import replacing

# The folder of the results, in which every image has a folder of its own.
IMAGES = "images"
DATA = "data.npz"

# The arrays of data.npz; axis letters as in wf_vit.shapes.
ARRAYS = {
    "photograph": "[height, width, 3], 8 bits: the pixels that the model saw",
    "grid": "[2]: rows and columns of patches",
    "layers": "[L]: numbers of the layers, from 0",
    "indicator": "name of the indicator that the fields are made of",
    "impact/NAME": "[L, P, P], for each indicator: of patch j (column) on i (row)",
    "impact_heads/NAME": "[L, H, P, P]: the same for each head on its own",
    "field/extents": "[L, P, 4]: how far the responsive field extends to the left, "
    "top, right and bottom of the patch's centre, in patches",
    "field/area": "[L, P]: share of the grid that the field covers",
    "field/displacement": "[L, P, 2]: from the patch to its field's centroid",
    "field/covariance": "[L, P, 2, 2]: of positions in the field, in patches^2",
    "field/mask": "[L, P, P]: whether patch j belongs to the field of patch i",
    "field_heads/...": "the same five, [L, H, P, ...], for each head on its own",
    "discriminability": "[L, P]: how much the impact of a patch depends on who is "
    "asking (standard deviation over the queries)",
    "attention_distance": "[L, H]: mean attention distance, in patches",
    "relative_error": "[L]: standard error of the propagated impact, relative to it",
    "learned/extents": "[L, H, P, 4]: of a window-free transformer: how far its "
    "learned fields extend to the left, top, right and bottom",
    "learned/softness": "[]: width of the learned fields' border, in patches",
}


@dataclasses.dataclass(frozen=True)
class Learned:
    """The learned fields of a window-free transformer, in one image."""

    extents: Float[np.ndarray, "L H P 4"]
    softness: float


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What was measured in one image; ``ARRAYS`` says what the arrays are.

    ``impact_heads`` is empty and ``field_heads`` None where heads were not told
    apart.
    """

    photograph: UInt8[np.ndarray, "height width 3"]
    grid: Grid
    layers: Int[np.ndarray, " L"]
    indicator: str
    impact: Mapping[str, Float[np.ndarray, "L P P"]]
    impact_heads: Mapping[str, Float[np.ndarray, "L H P P"]]
    field: Field
    field_heads: Field | None
    discriminability: Float[np.ndarray, "L P"]
    attention_distance: Float[np.ndarray, "L H"]
    relative_error: Float[np.ndarray, " L"] | None
    learned: Learned | None

    def save(self, folder: Path) -> None:
        """Writes ``data.npz`` into a folder, all at once."""
        arrays = {
            "photograph": self.photograph,
            "grid": np.array(self.grid),
            "layers": self.layers,
            "indicator": np.array(self.indicator),
            "discriminability": self.discriminability,
            "attention_distance": self.attention_distance,
        }
        for part in ("impact", "impact_heads"):
            arrays |= {f"{part}/{k}": v for k, v in getattr(self, part).items()}
        arrays |= {f"field/{k}": v for k, v in self.field._asdict().items()}
        if self.field_heads is not None:
            by_head = self.field_heads._asdict()
            arrays |= {f"field_heads/{k}": v for k, v in by_head.items()}
        if self.relative_error is not None:
            arrays["relative_error"] = self.relative_error
        if self.learned is not None:
            learned = dataclasses.asdict(self.learned)
            arrays |= {f"learned/{k}": v for k, v in learned.items()}
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / DATA) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, folder: Path) -> "Explanation":
        """Reads what ``save`` wrote."""
        with np.load(folder / DATA) as file:
            arrays = dict(file)

        def group(name: str) -> dict[str, np.ndarray]:
            prefix = f"{name}/"
            return {
                key.removeprefix(prefix): array
                for key, array in arrays.items()
                if key.startswith(prefix)
            }

        by_head, learned = group("field_heads"), group("learned")
        return cls(
            photograph=arrays["photograph"],
            grid=tuple(arrays["grid"].tolist()),
            layers=arrays["layers"],
            indicator=arrays["indicator"].item(),
            impact=group("impact"),
            impact_heads=group("impact_heads"),
            field=Field(**group("field")),
            field_heads=Field(**by_head) if by_head else None,
            discriminability=arrays["discriminability"],
            attention_distance=arrays["attention_distance"],
            relative_error=arrays.get("relative_error"),
            learned=Learned(learned["extents"], learned["softness"].item())
            if learned
            else None,
        )


def check_indicators(names: Sequence[str], layers: Sequence[int] | None) -> None:
    """Raises UsageError unless the indicators exist and can be had in these layers."""
    known = measure.INDICATORS
    if not names or not set(names) <= set(known) or len(set(names)) < len(names):
        raise UsageError(
            f"config.indicators is {tuple(names)}: name some of "
            f"{', '.join(known)}, each once."
        )
    if "rollout" in names and layers is not None:
        raise UsageError(
            f"config.layers is {tuple(layers)}, but the rollout needs all layers: "
            "leave config.layers empty, or leave out the rollout."
        )


def explain_batch(
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

    All indicators share one forward pass, that of the propagated one if it is wanted.

    Args:
      loaded: the model.
      photographs: of the model's size, as ``loaded.preprocess.fit`` makes them.
      indicators: names of ``measure.INDICATORS``; the fields are those of the last.
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
    model, main = loaded.model, indicators[-1]
    heads = heads or isinstance(model, WindowFreeViT)
    images = jnp.asarray(loaded.preprocess.normalize(photographs))
    found, recording = {}, None
    for name in sorted(indicators, key=lambda name: name != "propagated"):
        found[name] = measure.impact(
            model,
            loaded.params,
            images,
            name,
            per_head=heads,
            layers=layers,
            target=target,
            num_probes=num_probes,
            key=key,
            recording=recording,
        )
        recording = found[name].recording
    impact = found[main]
    stacked = {
        "impact": {name: found[name].impact for name in indicators},
        "impact_heads": {name: found[name].heads for name in indicators if heads},
        "field": fields.responsive_field(impact.impact, model.grid, mass=mass),
        "field_heads": fields.responsive_field(impact.heads, model.grid, mass=mass)
        if heads
        else None,
        "discriminability": fields.discriminability(impact.impact),
        "attention_distance": matrices.mean_attention_distance(
            recording.attention,
            num_prefix_tokens=model.num_prefix_tokens,
            grid=model.grid,
        ),
        "relative_error": found["propagated"].relative_error
        if "propagated" in found
        else None,
        "extents": recording.extents if isinstance(model, WindowFreeViT) else None,
    }
    stacked = jax.device_get(stacked)
    return [
        _explanation(
            jax.tree.map(lambda x, b=b: x[:, b], stacked),
            model,
            photograph=photograph,
            layers=np.array(model.check_layers(layers)),
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
