"""How published checkpoints name, shape and use their parameters.

A layout turns a flat dict of arrays into one with this package's names. What the
libraries do beyond the tensors (activation, epsilon, how position tables are resized,
how images are prepared) is a convention that stands with the layout.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from wf_vit.errors import UsageError
from wf_vit.models.pretrained.positions import (
    META_CUBIC,
    SCIPY_LINEAR,
    TORCH_CUBIC,
    TORCH_CUBIC_ANTIALIAS,
    Resampling,
)
from wf_vit.models.pretrained.preprocess import HALF, IMAGENET, ImageFormat

Arrays = Mapping[str, np.ndarray]
Renames = tuple[tuple[str, str], ...]

# Names that a checkpoint may have and a ViT has no use for: the tokens and heads of
# masked and self-distilled pretraining, and the text half of an image-text model.
IGNORED = re.compile(
    r"(.*\.)?mask_token"
    r"|(module\.)?(head\.(mlp|last_layer)|dino_head|ibot_head)\..*"
    r"|(params/)?(txt/.*|t|b)"
)

# Rows of one matrix that hold several projections, in their order.
FUSED = {
    "qkv": ("query", "key", "value"),
    "kv": ("key", "value"),
    "gate_up": ("gate", "up"),
}

TIMM_NAMES: Renames = (
    (r"^cls_token$", "cls"),
    (r"^dist_token$", "distillation"),
    (r"^(?:reg_token|register_tokens)$", "registers"),
    (r"^pos_embed$", "positions"),
    (r"^patch_embed\.proj\.", "patches."),
    # Meta stores the blocks of its largest models in chunks.
    (r"^blocks\.(?:\d+\.)?(\d+)\.", r"blocks_\1/"),
    (r"/norm1\.", "/attention_norm."),
    (r"/norm2\.", "/mlp_norm."),
    (r"/attn\.qkv\.", "/attention/qkv."),
    (r"/attn\.proj\.", "/attention/out."),
    (r"/ls1\.gamma$", "/attention_scale"),
    (r"/ls2\.gamma$", "/mlp_scale"),
    (r"^fc_norm\.", "norm."),
    (r"^head_dist\.", "head_distillation."),
    (r"^attn_pool\.latent$", "attention_pool/probe"),
    (r"^attn_pool\.norm\.", "attention_pool/norm."),
    (r"^attn_pool\.mlp\.", "attention_pool/mlp."),
    (r"^attn_pool\.q\.", "attention_pool/attention/query."),
    (r"^attn_pool\.kv\.", "attention_pool/attention/kv."),
    (r"^attn_pool\.proj\.", "attention_pool/attention/out."),
    (r"/mlp\.w12\.", "/mlp/gate_up."),
    (r"/mlp\.fc1\.", "/mlp/up."),
    (r"/mlp\.(?:fc2|w3)\.", "/mlp/down."),
)

# Both the names in the files, and those of transformers 5 in memory.
HUGGING_FACE_NAMES: Renames = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patches."),
    (r"^embeddings\.cls_token$", "cls"),
    (r"^embeddings\.distillation_token$", "distillation"),
    (r"^embeddings\.register_tokens$", "registers"),
    (r"^embeddings\.position_embeddings$", "positions"),
    (r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks_\1/"),
    (r"/(?:layernorm_before|norm1)\.", "/attention_norm."),
    (r"/(?:layernorm_after|norm2)\.", "/mlp_norm."),
    (r"/attention\.attention\.(query|key|value)\.", r"/attention/\1."),
    (r"/attention\.q_proj\.", "/attention/query."),
    (r"/attention\.k_proj\.", "/attention/key."),
    (r"/attention\.v_proj\.", "/attention/value."),
    (r"/attention\.(?:output\.dense|o_proj)\.", "/attention/out."),
    (r"/(?:intermediate\.dense|mlp\.fc1|mlp\.up_proj)\.", "/mlp/up."),
    (r"/mlp\.gate_proj\.", "/mlp/gate."),
    (r"/mlp\.weights_in\.", "/mlp/gate_up."),
    (r"/(?:output\.dense|mlp\.(?:fc2|weights_out|down_proj))\.", "/mlp/down."),
    (r"/layer_scale1\.lambda1$", "/attention_scale"),
    (r"/layer_scale2\.lambda1$", "/mlp_scale"),
    (r"^layernorm\.", "norm."),
    (r"^pooler\.dense\.", "representation."),
    (r"^(?:cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_distillation."),
)

GOOGLE_NAMES: Renames = (
    (r"^embedding/", "patches/"),
    (r"^(?:Transformer/posembed_input/)?pos_embedding$", "positions"),
    (r"^Transformer/encoder_norm/", "norm/"),
    (r"^MAPHead_0/LayerNorm_0/", "attention_pool/norm/"),
    (r"^MAPHead_0/", "attention_pool/"),
    (r"^Transformer/encoderblock_(\d+)/", r"blocks_\1/"),
    (r"/LayerNorm_0/", "/attention_norm/"),
    (r"/LayerNorm_[12]/", "/mlp_norm/"),
    (r"/MultiHeadDotProductAttention_\d/", "/attention/"),
    (r"/MlpBlock_\d/Dense_0/", "/mlp/up/"),
    (r"/MlpBlock_\d/Dense_1/", "/mlp/down/"),
    (r"^pre_logits/", "representation/"),
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """One family of checkpoints.

    Attributes:
      name: for messages.
      anchor: the name of the patch embedding's kernel. What stands before it in a
        checkpoint ("vit.", "module.backbone.", "params/img/") is not part of names.
      marker: a pattern that some name of such a checkpoint matches.
      renames: patterns and replacements, applied in order to every name.
      torch: whether the arrays are laid out as PyTorch's.
      mlp: the activation, where no config says which.
      norm_epsilon: of the layer norms, where no config says which.
      resampling: of the position table.
      image_format: how images are prepared, where no config says how.
    """

    name: str
    anchor: str
    marker: str
    renames: Renames
    torch: bool
    mlp: str
    norm_epsilon: float
    resampling: Resampling
    image_format: ImageFormat


_CENTRE_CROP = ImageFormat(*IMAGENET, interpolation="bicubic", crop=0.875)
_SQUASH = ImageFormat(*HALF, interpolation="bilinear", crop=None)

_HUGGING_FACE_VIT = Layout(
    name="Hugging Face ViT",
    anchor="embeddings.patch_embeddings.projection.weight",
    marker="",
    renames=HUGGING_FACE_NAMES,
    torch=True,
    mlp="gelu",
    norm_epsilon=1e-12,
    resampling=TORCH_CUBIC,
    image_format=_SQUASH,
)
_HUGGING_FACE_DINOV2 = dataclasses.replace(
    _HUGGING_FACE_VIT,
    name="Hugging Face DINOv2",
    marker=r"layer_scale1\.lambda1$",
    norm_epsilon=1e-6,
    image_format=_CENTRE_CROP,
)
_TIMM = Layout(
    name="timm",
    anchor="patch_embed.proj.weight",
    marker="",
    renames=TIMM_NAMES,
    torch=True,
    mlp="gelu",
    norm_epsilon=1e-6,
    resampling=TORCH_CUBIC_ANTIALIAS,
    image_format=dataclasses.replace(_CENTRE_CROP, crop=0.9),
)
_BIG_VISION = Layout(
    name="big_vision",
    anchor="embedding/kernel",
    marker="",
    renames=GOOGLE_NAMES,
    torch=False,
    mlp="gelu_tanh",
    norm_epsilon=1e-6,
    resampling=SCIPY_LINEAR,
    image_format=dataclasses.replace(_SQUASH, crop=0.875),
)

# The first whose anchor and marker are there describes the checkpoint.
LAYOUTS = (
    dataclasses.replace(
        _HUGGING_FACE_DINOV2,
        name="Hugging Face DINOv2 with registers",
        marker=r"register_tokens$",
        resampling=TORCH_CUBIC_ANTIALIAS,
    ),
    _HUGGING_FACE_DINOV2,
    dataclasses.replace(
        _HUGGING_FACE_VIT,
        name="Hugging Face DeiT",
        marker=r"distillation_token$",
        image_format=_CENTRE_CROP,
    ),
    _HUGGING_FACE_VIT,
    dataclasses.replace(
        _TIMM,
        name="Meta DINOv2 with registers",
        marker=r"register_tokens$",
        image_format=_CENTRE_CROP,
    ),
    dataclasses.replace(
        _TIMM,
        name="Meta DINO",
        marker=r"mask_token$|head\.last_layer\.",
        resampling=META_CUBIC,
        image_format=_CENTRE_CROP,
    ),
    _TIMM,
    dataclasses.replace(
        _BIG_VISION,
        name="Google ViT",
        marker=r"posembed_input/pos_embedding$",
        image_format=_SQUASH,
    ),
    _BIG_VISION,
)


def detect(arrays: Arrays) -> tuple[Layout, str]:
    """Returns a checkpoint's layout and what stands before its names.

    Raises:
      UsageError: it is none of the known.
    """
    for layout in LAYOUTS:
        anchor = next((name for name in arrays if name.endswith(layout.anchor)), None)
        if anchor and any(re.search(layout.marker, name) for name in arrays):
            return layout, anchor.removesuffix(layout.anchor)
    some = ", ".join(sorted(arrays)[:8]) or "none"
    raise UsageError(
        "This is no vision transformer of Google, big_vision, timm, Meta or Hugging "
        f"Face: none of its {len(arrays)} names is a patch embedding's. The first "
        f"names are: {some}."
    )


@dataclasses.dataclass(frozen=True)
class Renamed:
    """A checkpoint under this package's names.

    Attributes:
      arrays: ``blocks_0/attention/query/kernel`` and so on; still apart are the
        prefix tokens ``cls``, ``distillation``, ``registers`` and ``positions``.
        Names that no rule knows are left as they were.
      origin: the checkpoint's own name of each.
    """

    arrays: dict[str, np.ndarray]
    origin: dict[str, str]

    @classmethod
    def collect(cls, triples) -> "Renamed":
        """Collects (name, own name, array); raises UsageError if a name repeats."""
        renamed = cls({}, {})
        for name, own_name, array in triples:
            if name in renamed.origin:
                raise UsageError(
                    f"{renamed.origin[name]} and {own_name} of the checkpoint would "
                    f"both be {name}: remove the one that the model does not use."
                )
            renamed.arrays[name] = array
            renamed.origin[name] = own_name
        return renamed


def rename(arrays: Arrays, layout: Layout, prefix: str) -> Renamed:
    """Renames, unstacks and splits arrays; nothing is dropped but ``IGNORED``."""

    def rename_one(name: str) -> str:
        name = name.removeprefix(prefix)
        for pattern, replacement in layout.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def triples():
        for own_name, array in arrays.items():
            if IGNORED.fullmatch(own_name):
                continue
            if "/encoderblock/" in own_name:
                # Stacked layers, as big_vision's scan makes them.
                for layer, part in enumerate(array):
                    block = f"/encoderblock_{layer}/"
                    name = rename_one(own_name.replace("/encoderblock/", block))
                    yield name, own_name, part
            elif layout.torch:
                for name, part in _split(rename_one(own_name), array, arrays, own_name):
                    yield name, own_name, part
            else:
                yield rename_one(own_name), own_name, array

    return Renamed.collect(triples())


def _split(name: str, array: np.ndarray, arrays: Arrays, own_name: str):
    """Yields the projections that one PyTorch array holds, and their names."""
    module, _, kind = name.rpartition(".")
    scope, _, leaf = module.rpartition("/")
    # timm's packed SwiGLU: fc1 is twice as tall as fc2 is wide.
    if leaf == "up" and ".fc1." in own_name:
        down = arrays.get(re.sub(r"\.fc1\.\w+$", ".fc2.weight", own_name))
        if down is not None and array.shape[0] == 2 * down.shape[1]:
            leaf = "gate_up"
    parts = FUSED.get(leaf, ())
    if not parts or array.shape[0] % len(parts):
        yield name, array
        return
    for part_name, part in zip(parts, np.split(array, len(parts)), strict=True):
        yield f"{scope}/{part_name}.{kind}", part


def from_torch(renamed: Renamed, num_heads: int) -> Renamed:
    """Transposes PyTorch's arrays to Flax's, and splits projections into heads.

    Arrays whose shape does not allow it stay as they are: the comparison with the
    model lists them.
    """

    def convert(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
        module, _, kind = name.rpartition(".")
        leaf = module.rpartition("/")[2]
        per_head = leaf in ("query", "key", "value")
        if kind == "weight":
            kind = "scale" if array.ndim == 1 else "kernel"
            if array.ndim == 2:
                array = array.T
            elif array.ndim == 4:
                array = array.transpose(2, 3, 1, 0)
        if per_head and array.shape[-1] % num_heads == 0:
            array = array.reshape(*array.shape[:-1], num_heads, -1)
        elif leaf == "out" and kind == "kernel" and array.shape[0] % num_heads == 0:
            array = array.reshape(num_heads, -1, *array.shape[1:])
        return f"{module}/{kind}" if module else kind, array

    return Renamed.collect(
        (new_name, renamed.origin[name], new_array)
        for name, array in renamed.arrays.items()
        for new_name, new_array in [convert(name, array)]
    )
