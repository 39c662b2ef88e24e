"""What a model's patches do to one another in a photograph, and the file of it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from wf_vit import fields
from wf_vit.errors import UsageError
from wf_vit.fields import Field
from wf_vit.grid import Grid
from wf_vit.page import coding
from wf_vit.workdir import opened_arrays, replacing

# The folder of the results, in which every image has a folder of its own.
IMAGES = "images"
DATA = "data.npz"
# Of what the file holds; it changes when older files cannot be read any more.
FORMAT = 3

# Interactions are stored in so many steps: few tokens in fine ones, many in coarse
# ones, as their number grows with the fourth power of the image's side.
_FINE, _COARSE, _FEW_TOKENS = 255, 31, 600

# The arrays of data.npz; axis letters as in wf_vit.shapes.
ARRAYS = {
    "format": "version of this list",
    "source": "digest (sha256) of the image file",
    "photograph": "[height, width, 3], 8 bits: the pixels that the model saw",
    "grid": "[2]: rows and columns of patches",
    "layers": "[L]: numbers of the layers, from 0",
    "prefix": "names of the prefix tokens (CLS, registers): the first of the N tokens",
    "indicator": "name of the indicator that the fields are made of",
    "impact/NAME/...": "for each indicator: of token j (column) on token i (row), as "
    "codes: share = (codes / levels)^2 * (scales / 65535)^2 of the row, impact = share "
    "* total. wf_vit.explanation.Explanation.load decodes them",
    "impact/NAME/codes": "[L, N, N], 8 bits",
    "impact/NAME/scales": "[L, N], 16 bits: root of the row's largest share",
    "impact/NAME/total": "[L, N]: sum of the row",
    "impact/NAME/levels": "[]: a share is at most 1 / levels + 1 / (4 levels^2) of the "
    "row's largest away from what was measured",
    "impact_heads/NAME/...": "the same four, [L, H, ...], for each head on its own",
    "field/extents": "[L, P, 4]: how far the responsive field extends to the left, "
    "top, right and bottom of the patch's centre, in patches",
    "field/area": "[L, P]: share of the grid that the field covers",
    "field/displacement": "[L, P, 2]: from the patch to its field's centroid",
    "field/excess": "[L, P, 2]: the part of it that geometry does not explain: where "
    "the field tends to for the image's sake",
    "field/covariance": "[L, P, 2, 2]: of positions in the field, in patches^2",
    "field/mask": "[L, P, P / 8]: whether patch j belongs to the field of patch i, a "
    "bit each (numpy.unpackbits)",
    "field_heads/...": "the same six, [L, H, P, ...], for each head on its own",
    "discriminability": "[L, P]: how much the impact of a patch depends on who is "
    "asking (standard deviation over the queries)",
    "prefix_attention": "[L, H, T, P]: attention of the T prefix tokens to patches",
    "attention_distance": "[L, H]: mean attention distance, in patches",
    "components": "[P, 3]: first principal components of the final patch tokens, as "
    "colours",
    "relative_error": "[L]: standard error of the propagated impact, relative to it",
    "removal/...": "if it was asked for, for the first layer of each quarter of the "
    "model: layers, their numbers; order, [S, P], how late each patch is removed "
    "before that layer, from 1, and P + 1 for those that stay; cosine, [S, 3], of what "
    "the head reads then and in the full model, without 25, 50 and 75 % of the patches",
    "class/...": "if a class was asked for: its index, name and probability, and "
    "effect/..., [L, N, N]: what each interaction adds to its logit, coded like an "
    "impact, with a bit for each negative one in effect/negative; by_layer, [L, P]: "
    "what each patch adds in each layer, exactly",
    "mass": "[]: share of its impact that a field holds",
    "model": "what the model is called",
    "learned": "[L, H, P, 4]: the learned fields of a window-free transformer, in "
    "patches: centre (x, y) relative to the patch, and widths (standard deviations) in "
    "x and y",
}


# The shares of the patches that a `Removal` is measured at.
REMOVED = (0.25, 0.5, 0.75)


class Removal(NamedTuple):
    """How well a model does without patches (`wf_vit.selection.select_patches`).

    Attributes:
      layers: before which they are removed.
      order: how late each patch is removed, from 1; P + 1 for those that stay.
      cosine: of what the head reads without the shares `REMOVED` of the patches, and
        in the full model.
    """

    layers: Int[np.ndarray, " S"]
    order: Int[np.ndarray, "S P"]
    cosine: Float[np.ndarray, "S shares"]


@dataclasses.dataclass(frozen=True)
class ClassEffect:
    """What the interactions in one image add to the logit of a class.

    Attributes:
      index: of the class.
      name: of the class, or "class INDEX".
      probability: that the model gives it.
      effect: of interaction i<-j on the logit, to first order, signed; the prefix
        tokens come first.
      by_layer: what each patch adds by what others hear of it, layer by layer.
    """

    index: int
    name: str
    probability: float
    effect: Float[np.ndarray, "L N N"]
    by_layer: Float[np.ndarray, "L P"]

    @property
    def class_map(self) -> Float[np.ndarray, " P"]:
        """The same in all layers together."""
        return self.by_layer.sum(0)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What was measured in one image; ``ARRAYS`` says what the arrays are.

    Impacts have N tokens, the prefix tokens first; fields are those of the patches.
    ``impact_heads`` is empty and ``field_heads`` None where heads were not told apart.
    ``mass`` is the share of its impact that a patch's field holds, ``model`` what the
    model is called.
    """

    photograph: UInt8[np.ndarray, "height width 3"]
    grid: Grid
    layers: Int[np.ndarray, " L"]
    prefix: tuple[str, ...]
    indicator: str
    impact: Mapping[str, Float[np.ndarray, "L N N"]]
    impact_heads: Mapping[str, Float[np.ndarray, "L H N N"]]
    field: Field
    field_heads: Field | None
    discriminability: Float[np.ndarray, "L P"]
    prefix_attention: Float[np.ndarray, "L H T P"]
    attention_distance: Float[np.ndarray, "L H"]
    components: Float[np.ndarray, "P 3"] | None = None
    relative_error: Float[np.ndarray, " L"] | None = None
    class_effect: ClassEffect | None = None
    learned: Float[np.ndarray, "L H P 4"] | None = None
    removal: Removal | None = None
    mass: float = 0.5
    model: str = ""

    def patch_impact(self) -> Float[np.ndarray, "L P P"]:
        """Returns the main indicator's impact of patches on patches."""
        return self.of_patches(self.impact[self.indicator])

    def of_patches(
        self, matrices: Float[np.ndarray, "*batch N N"]
    ) -> Float[np.ndarray, "*batch P P"]:
        """Returns interactions without those of the prefix tokens."""
        return matrices[..., len(self.prefix) :, len(self.prefix) :]

    def save_data(self, folder: Path, *, source: str = "") -> None:
        """Writes ``data.npz`` into a folder, all at once.

        Args:
          folder: is made if needed.
          source: digest of the image file.
        """
        arrays: dict[str, Any] = {
            "format": np.array(FORMAT),
            "source": np.array(source),
            "photograph": self.photograph,
            "grid": np.array(self.grid),
            "layers": self.layers,
            "prefix": np.array(self.prefix, dtype=str),
            "indicator": np.array(self.indicator),
            "mass": np.array(self.mass),
            "model": np.array(self.model),
            "discriminability": self.discriminability,
            "prefix_attention": self.prefix_attention,
            "attention_distance": self.attention_distance,
        }
        for part in ("impact", "impact_heads"):
            for name, impact in getattr(self, part).items():
                arrays |= _coded(f"{part}/{name}", impact)
        for part in ("field", "field_heads"):
            field = getattr(self, part)
            if field is not None:
                members = field._asdict() | {"mask": np.packbits(field.mask, axis=-1)}
                arrays |= {f"{part}/{k}": v for k, v in members.items()}
        for part in ("components", "relative_error", "learned"):
            if getattr(self, part) is not None:
                arrays[part] = getattr(self, part)
        if self.removal is not None:
            arrays |= {f"removal/{k}": v for k, v in self.removal._asdict().items()}
        if self.class_effect is not None:
            c = self.class_effect
            for part in ("index", "name", "probability"):
                arrays[f"class/{part}"] = np.array(getattr(c, part))
            arrays |= _coded("class/effect", np.abs(c.effect))
            arrays["class/effect/negative"] = np.packbits(c.effect < 0, axis=-1)
            arrays["class/by_layer"] = c.by_layer
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / DATA) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, folder: str | Path) -> "Explanation":
        """Reads what ``save_data`` wrote; impacts have the rounding that it says.

        Args:
          folder: that holds ``data.npz``, or the file itself.

        Raises:
          UsageError: an earlier version of this package wrote it.
        """
        folder = Path(folder)
        folder = folder.parent if folder.name == DATA else folder
        arrays = _read(folder)
        # Files of earlier versions do not name these.
        named = {k: arrays[k].item() for k in ("mass", "model") if k in arrays}

        def group(name: str) -> dict[str, np.ndarray]:
            prefix = f"{name}/"
            return {
                key.removeprefix(prefix): array
                for key, array in arrays.items()
                if key.startswith(prefix)
            }

        def impacts(name: str) -> dict[str, np.ndarray]:
            names = dict.fromkeys(key.partition("/")[0] for key in group(name))
            return {n: _decoded(group(f"{name}/{n}")) for n in names}

        def field(name: str) -> Field | None:
            members = group(name)
            if not members:
                return None
            count = members["area"].shape[-1]
            members["mask"] = np.unpackbits(members["mask"], axis=-1, count=count) > 0
            return Field(**members)

        removal = group("removal")
        prefix = tuple(arrays["prefix"].tolist())
        return cls(
            photograph=arrays["photograph"],
            grid=tuple(arrays["grid"].tolist()),
            layers=arrays["layers"],
            prefix=prefix,
            indicator=arrays["indicator"].item(),
            impact=impacts("impact"),
            impact_heads=impacts("impact_heads"),
            field=field("field"),
            field_heads=field("field_heads"),
            discriminability=arrays["discriminability"],
            prefix_attention=arrays["prefix_attention"],
            attention_distance=arrays["attention_distance"],
            components=arrays.get("components"),
            relative_error=arrays.get("relative_error"),
            class_effect=_class_effect(group("class"), len(prefix)),
            learned=arrays.get("learned"),
            removal=Removal(**removal) if removal else None,
            **named,
        )


def source_of(folder: Path) -> str:
    """Returns the digest of the image that ``data.npz`` in a folder explains."""
    with opened_arrays(folder / DATA) as file:
        return file["source"].item() if "source" in file else ""


def grid_of(folder: Path) -> Grid:
    """Returns the rows and columns of patches of the image in a folder."""
    with opened_arrays(folder / DATA) as file:
        return tuple(file["grid"].tolist())


def _read(folder: Path) -> dict[str, np.ndarray]:
    with opened_arrays(folder / DATA) as file:
        found = int(file["format"]) if "format" in file else 1
        if found != FORMAT:
            raise UsageError(
                f"{folder / DATA} has the format {found}, expected {FORMAT}: another "
                "version of wf_vit wrote it. Explain the image again, in a new "
                "--workdir."
            )
        return dict(file)


def _coded(name: str, impact: Float[np.ndarray, "*rows N"]) -> dict[str, np.ndarray]:
    """Returns the arrays that stand for an impact in the file."""
    levels = _FINE if impact.shape[-1] <= _FEW_TOKENS else _COARSE
    coded = coding.encode(coding.row_shares(impact), levels)
    return {
        f"{name}/codes": coded.codes,
        f"{name}/scales": coded.scales,
        # Of large numbers the sum is out of float32's range.
        f"{name}/total": impact.sum(-1, dtype=np.float64),
        f"{name}/levels": np.array(levels),
    }


def _decoded(parts: Mapping[str, np.ndarray]) -> Float[np.ndarray, "*rows N"]:
    levels = int(parts["levels"])
    coded = coding.Coded(parts["codes"], parts["scales"], levels)
    return coded.decode(parts["total"])


def _class_effect(parts: Mapping[str, Any], num_prefix: int) -> ClassEffect | None:
    if not parts:
        return None
    effect = {k.removeprefix("effect/"): v for k, v in parts.items() if "/" in k}
    size = _decoded(effect)
    negative = np.unpackbits(effect["negative"], axis=-1, count=size.shape[-1]) > 0
    signed = np.where(negative, -size, size)
    # Files of earlier versions do not have it.
    by_layer = parts.get("by_layer")
    if by_layer is None:
        by_layer = np.asarray(fields.heard(signed, num_prefix))
    return ClassEffect(
        index=parts["index"].item(),
        name=parts["name"].item(),
        probability=parts["probability"].item(),
        effect=signed,
        by_layer=by_layer,
    )
