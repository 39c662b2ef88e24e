"""Whether the attributes of a model fit together."""

from typing import Any

from wf_vit.errors import UsageError
from wf_vit.models.block import MLPS, NORMS
from wf_vit.models.positions import POSITIONS

# What the values of an attribute may be.
CHOICES = {
    "pool": ("cls", "mean", "map", "cls_mean"),
    "pool_tokens": ("all", "patches"),
    "positions": POSITIONS,
    "mlp": MLPS,
    "norm_kind": NORMS,
    "normed_embedding": ("none", "patches", "tokens"),
}


def check(model: Any) -> None:
    """Checks a ``ViT``.

    Raises:
      UsageError: its attributes contradict one another; the message says which.
    """
    sides = zip(("height", "width"), model.image_size, model.patch_size, strict=True)
    for side, size, patch in sides:
        if size % patch or size < patch:
            below = max(size // patch, 1) * patch
            raise UsageError(
                f"Patches of {patch} pixels do not divide an image {side} of "
                f"{size}: set the image size to a multiple, such as {below} or "
                f"{below + patch}, or change the patch size."
            )
    for name, known in CHOICES.items():
        given = getattr(model, name)
        if given not in known:
            raise UsageError(f"{name} is {given!r}: choose one of {', '.join(known)}.")
    _check_widths(model)
    if model.pool in ("cls", "cls_mean") and not model.cls_token:
        raise UsageError(
            f"pool={model.pool!r} reads the CLS token: set cls_token=True."
        )
    if model.pool_before_norm and model.pool == "cls_mean":
        raise UsageError(
            "pool='cls_mean' is wider than the final norm: set pool_before_norm=False."
        )
    if model.pool_before_norm and not model.final_norm:
        raise UsageError(
            "pool_before_norm=True, but there is no final norm: set final_norm=True."
        )
    if model.distillation_token and not model.cls_token:
        raise UsageError("A distillation token needs a CLS token before it.")


def _check_widths(model: Any) -> None:
    heads = [("heads", model.num_heads)]
    if model.pool == "map" and model.pool_heads:
        heads.append(("heads of the pooling", model.pool_heads))
    for what, count in heads:
        if model.width % count:
            raise UsageError(
                f"{count} {what} do not divide a width of {model.width}: change one "
                "of them."
            )
    if model.positions.startswith("sincos") and model.width % 4:
        raise UsageError(
            f"sincos positions need a width divisible by 4, not {model.width}."
        )
    if model.rotary is not None and model.width // model.num_heads % 4:
        raise UsageError(
            "Rotary positions need heads of a width divisible by 4, not "
            f"{model.width // model.num_heads}: change the width or the heads."
        )
