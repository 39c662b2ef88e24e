"""What timm's config.json, or a timm module, says beyond the tensors."""

import re
from collections.abc import Mapping
from typing import Any

from wf_vit.errors import UsageError
from wf_vit.models.pretrained.hints import (
    Hints,
    choice,
    number,
    pair,
    said,
    shown,
    triple,
)
from wf_vit.models.pretrained.layouts import (
    DINOV3_ROPE,
    EVA02_ROPE,
    PE_ROPE,
    Rope,
    Rotary,
)
from wf_vit.models.pretrained.preprocess import INTERPOLATIONS

POOLINGS = {"token": "cls", "avg": "mean", "map": "map"}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "QuickGELU": "quick_gelu",
    # Of gated MLPs, which the tensors tell.
    "SiLU": None,
}

# Blocks with the names of a pre-norm ViT that compute something else.
_OTHER_BLOCKS = re.compile(r"_rpn_|eva02_enormous")

# Of these every architecture was compared with timm's; of others (somebody's own) what
# is assumed is said.
_FAMILIES = r"(vit|deit3?|eva|eva02|beit|beitv2|aimv2)_"


def _pe_rope(side: float, offset: float = 1.0) -> Rope:
    rotary = Rotary(10_000.0, span=(side, side), offset=offset)
    return Rope(rotary, columns_first=True)


# Patterns of architectures, and what they have in common; later ones have precedence.
ARCHITECTURES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    (r"^vit_.*(clip|dinov3|_pe_|lingbot)|^aimv2", {"norm_epsilon": 1e-5}),
    (r"quickgelu", {"mlp": "quick_gelu"}),
    (
        r"(patch32|giantopt).*siglip|large_patch16_siglip(_gap)?_512"
        r"|so400m_patch16_siglip",
        {"mlp": "gelu_tanh"},
    ),
    (r"dinov3|lingbot", {"rotary": DINOV3_ROPE}),
    (r"^eva02_|^vit_.*_rope_reg", {"rotary": EVA02_ROPE}),
    # RoPE-ViT of Naver, without a reference grid.
    (
        r"^vit_.*_rope(_ape)?_\d+$",
        {"rotary": Rope(Rotary(100.0), columns_first=True)},
    ),
    (r"_pe_", {"rotary": PE_ROPE, "pool_heads": 8}),
    (r"_pe_core_base", {"rotary": _pe_rope(14.0)}),
    (r"_pe_core_(tiny|small|large)", {"rotary": _pe_rope(24.0)}),
    (r"_pe_(lang|spatial)", {"rotary": _pe_rope(32.0)}),
    (r"_pe_\w+_gigantic", {"rotary": _pe_rope(32.0, offset=0.0), "num_heads": 16}),
    (r"_pe_(lang|spatial)|_radio_|_intern300m", {"final_norm": False}),
    (r"giantopt_.*siglip|^vit_base_patch16_gap", {"num_heads": 16}),
    (r"huge_plus_.*dinov3", {"num_heads": 20}),
    (r"vit_7b_.*dinov3", {"num_heads": 32}),
)

# Arguments of timm's models that change what tensors cannot tell, and are supported
# only as they are by default.
_REFUSED_ARGUMENTS = (
    *("block_fn", "attn_layer", "mlp_layer", "embed_layer", "norm_layer", "qk_norm"),
    *("embed_norm_layer", "use_post_norm", "scale_attn_inner", "scale_attn_norm"),
    *("gated_attn", "attn_head_dim", "num_kv_heads", "rope_mrope_section"),
    *("rope_type", "rope_temperature", "rope_grid_offset", "rope_grid_indexing"),
    *("rope_rotate_half", "ref_feat_shape"),
)


def timm_hints(config: Mapping[str, Any]) -> Hints:
    """Understands timm's ``config.json``.

    Raises:
      UsageError: the model is of a kind that is not supported, or a value is none.
    """
    architecture = str(config["architecture"]).partition(".")[0]
    if _OTHER_BLOCKS.search(architecture):
        raise UsageError(
            f"config.json says architecture={architecture!r}: its blocks have the "
            "names of a ViT's, but normalise after the attention and the MLP. That is "
            "not supported."
        )
    images = _object(config, "pretrained_cfg")
    arguments = _object(config, "model_args")
    refused = {k: arguments[k] for k in _REFUSED_ARGUMENTS if arguments.get(k)}
    if refused:
        raise UsageError(
            f"config.json says model_args={refused}: a model that was built so is not "
            "supported."
        )
    activation = choice(arguments, "act_layer", ACTIVATIONS)
    size = pair(arguments, "img_size")
    shape = images.get("input_size")
    if size is None and shape:
        # Channels, height and width.
        shape = shape[1:] if isinstance(shape, list | tuple) else [shape]
        size = pair({"input_size": shape}, "input_size")
    model = {}
    for pattern, attributes in ARCHITECTURES:
        if re.search(pattern, architecture):
            model |= attributes
    pool = choice(config, "global_pool", (*POOLINGS, ""))
    all_tokens = arguments.get("pool_include_prefix")
    model |= said(
        {
            "num_heads": number(arguments, "num_heads", whole=True),
            "depth": number(arguments, "depth", whole=True, most=1000),
            "pool_heads": number(arguments, "attn_pool_num_heads", whole=True),
            "pool": POOLINGS.get(pool),
            "pool_tokens": "all" if all_tokens else None,
            "image_size": size,
            "mlp": ACTIVATIONS.get(activation),
        }
    )
    names = config.get("label_names") or ()
    if not isinstance(names, list | tuple):
        raise UsageError(
            f"config.json says label_names={shown(names)}, expected a list of names."
        )
    known = re.match(_FAMILIES, architecture) is not None
    return Hints(model, _images(images), tuple(map(str, names)), known=known)


def _object(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise UsageError(f"config.json says {key}={value!r}, expected a JSON object.")
    return value


def _images(images: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how images are prepared, from timm's ``pretrained_cfg``."""
    hints = said({key: triple(images, key) for key in ("mean", "std")})
    interpolation = choice(images, "interpolation", INTERPOLATIONS)
    if interpolation is not None:
        hints["interpolation"] = interpolation
    mode = choice(images, "crop_mode", ("center", "squash", "")) or "center"
    share = number(images, "crop_pct", most=1)
    if mode == "squash":
        hints |= {"crop": share and float(share), "squash": True}
    elif share is not None:
        hints["crop"] = float(share)
    return hints


def module_hints(module: Any) -> Hints:
    """Looks at a timm module: its config, and what its parts say of themselves.

    Raises:
      UsageError: its blocks or its positions are of a kind that is not supported.
    """
    images = module.pretrained_cfg
    blocks = list(getattr(module, "blocks", ()))
    kinds = {type(block).__name__ for block in blocks}
    if not kinds <= {"Block", "EvaBlock"}:
        raise UsageError(
            f"The blocks of the module are {', '.join(sorted(kinds))}, expected Block "
            "or EvaBlock, which normalise before the attention and the MLP."
        )
    config = {
        "architecture": images.get("architecture") or "",
        "pretrained_cfg": images,
        "global_pool": getattr(module, "global_pool", None),
    }
    size = getattr(getattr(module, "patch_embed", None), "img_size", None)
    model = {"image_size": size and tuple(size), "rotary": _rope(module)}
    for block in blocks[:1]:
        activation = type(getattr(getattr(block, "mlp", None), "act", None)).__name__
        if activation not in ACTIVATIONS:
            raise UsageError(
                f"The MLPs of the module have the activation {activation}, expected "
                f"one of {', '.join(ACTIVATIONS)}."
            )
        model["mlp"] = ACTIVATIONS[activation]
        model["norm_epsilon"] = getattr(getattr(block, "norm1", None), "eps", None)
        model["num_heads"] = getattr(getattr(block, "attn", None), "num_heads", None)
    norms = {type(getattr(module, n, None)).__name__ for n in ("norm", "fc_norm")}
    if norms == {"Identity"}:
        model["final_norm"] = False
    pooling = getattr(module, "attn_pool", None)
    model["pool_heads"] = getattr(pooling, "num_heads", None)
    if getattr(module, "pool_include_prefix", False):
        model["pool_tokens"] = "all"
    hints = timm_hints(config)
    found = {name: value for name, value in model.items() if name != "rotary"}
    model = dict(hints.model) | said(found) | {"rotary": model["rotary"]}
    return Hints(model, hints.image_format, hints.class_names, known=True)


def _rope(module: Any) -> Rope | None:
    """Returns the rotary positions of a timm module, or None if it has none."""
    rope = getattr(module, "rope", None)
    if rope is None:
        return None
    kind = type(rope).__name__
    swapped = rope.grid_indexing == "xy" if hasattr(rope, "grid_indexing") else False
    plain = getattr(rope, "normalize_coords", "separate") == "separate"
    if kind == "RotaryEmbeddingDinoV3" and plain and rope.temperature:
        rotary = Rotary(
            float(rope.temperature), DINOV3_ROPE.rotary.span, DINOV3_ROPE.rotary.offset
        )
        if not getattr(rope, "grid_offset", 0.0):
            return Rope(rotary, not rope.rotate_half, columns_first=swapped)
    if kind == "RotaryEmbeddingCat" and not rope.in_pixels:
        reference = rope.ref_feat_shape
        span = reference and tuple(float(side) for side in reference)
        rotary = Rotary(float(rope.temperature), span or None, float(rope.grid_offset))
        return Rope(rotary, not getattr(rope, "rotate_half", False), swapped)
    raise UsageError(
        f"The rotary positions of the module are {kind}, with settings that are not "
        "supported: expected RotaryEmbeddingCat in patches, or RotaryEmbeddingDinoV3."
    )
