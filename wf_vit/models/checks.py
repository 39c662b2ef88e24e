"""Whether the attributes of a model fit together."""

from typing import Any

from wf_vit import settings
from wf_vit.errors import UsageError
from wf_vit.models.block import MLPS, NORMS
from wf_vit.models.positions import POSITIONS
from wf_vit.settings import Setting

# More patches, 256 x 256, no attention holds.
MOST_PATCHES = 2**16
MOST_PIXELS = 8192

# What the attributes of a ``ViT`` may be.
ATTRIBUTES = {
    "num_classes": Setting(0, "classes", low=0, high=10**6),
    "image_size": Setting(
        (224, 224), "pixels", items=int, length=2, low=1, high=MOST_PIXELS
    ),
    "patch_size": Setting(
        (16, 16), "pixels", items=int, length=2, low=1, high=MOST_PIXELS
    ),
    "width": Setting(384, "channels of a token", low=1, high=2**16),
    "depth": Setting(12, "blocks", low=1, high=1000),
    "mlp_dim": Setting(
        1536, "channels of the hidden layer of an MLP", low=1, high=2**20
    ),
    "num_heads": Setting(6, "heads of a block", low=1, high=2**16),
    "pool": Setting(
        "cls", "what the head reads", choices=("cls", "mean", "map", "cls_mean")
    ),
    "pool_tokens": Setting(
        "all", "what attention pooling looks at", choices=("all", "patches")
    ),
    "pool_heads": Setting(
        None, "heads of attention pooling", kind=int, low=1, high=2**16
    ),
    "pool_mlp_dim": Setting(
        None, "channels of the MLP of the pooling", kind=int, low=0, high=2**20
    ),
    "cls_token": Setting(True, "whether there is a CLS token"),
    "distillation_token": Setting(False, "whether there is DeiT's token"),
    "num_registers": Setting(0, "register tokens", low=0, high=10**4),
    "positions": Setting("learned", "added to the patches", choices=POSITIONS),
    "relative_positions": Setting(False, "a learned bias of displacements"),
    "normed_embedding": Setting(
        "none",
        "what is normalised before the first block",
        choices=("none", "patches", "tokens"),
    ),
    "mlp": Setting("gelu_tanh", "activation of the MLPs", choices=MLPS),
    "mlp_inner_norm": Setting(False, "a norm of the hidden layer of each MLP"),
    "layer_scale": Setting(
        None, "LayerScale at first", kind=float, low=-1000, high=1000
    ),
    "drop_path": Setting(0.0, "rate of stochastic depth", low=0, below=1),
    "qkv_bias": Setting(True, "a bias of queries, keys and values"),
    "norm_kind": Setting("layer", "kind of the norms", choices=NORMS),
    "norm_epsilon": Setting(1e-6, "epsilon of the norms", above=0, high=1),
    "final_norm": Setting(True, "a norm after the last block"),
    "pool_before_norm": Setting(False, "whether the final norm follows the pooling"),
    "representation_size": Setting(
        None, "channels between pooling and head", kind=int, low=1, high=2**20
    ),
    "representation_tanh": Setting(True, "a tanh between pooling and head"),
    "remat": Setting(False, "whether activations are computed again"),
    # Of models with learned fields.
    "trained_patches": Setting(
        None, "patches in training", kind=int, low=1, high=MOST_PATCHES
    ),
}


def check(model: Any) -> None:
    """Checks a ``ViT``.

    Raises:
      UsageError: an attribute is out of its range, or they contradict one another;
        the message says which.
    """
    attributes = {n: getattr(model, n, s.default) for n, s in ATTRIBUTES.items()}
    settings.check(ATTRIBUTES, attributes, "model")
    sides = zip(("height", "width"), model.image_size, model.patch_size, strict=True)
    count = 1
    for side, size, patch in sides:
        if size % patch or size < patch:
            below = max(size // patch, 1) * patch
            raise UsageError(
                f"Patches of {patch} pixels do not divide an image {side} of "
                f"{size}: set the image size to a multiple, such as {below} or "
                f"{below + patch}, or change the patch size."
            )
        count *= size // patch
    if count > MOST_PATCHES:
        raise UsageError(
            f"Images of {model.image_size[0]} x {model.image_size[1]} pixels have "
            f"{count:,} patches, expected at most {MOST_PATCHES:,}: take smaller "
            "images, or larger patches."
        )
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
    if model.positions.startswith("sincos") and (model.width % 4 or model.width < 8):
        raise UsageError(
            "sincos positions need a width that 4 divides, of at least 8, not "
            f"{model.width}."
        )
    if model.rotary is not None and model.width // model.num_heads % 4:
        raise UsageError(
            "Rotary positions need heads of a width divisible by 4, not "
            f"{model.width // model.num_heads}: change the width or the heads."
        )
