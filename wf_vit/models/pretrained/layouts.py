"""How published checkpoints name and use their parameters: one ``Layout`` a family.

What the libraries do beyond the tensors (activation, epsilon, rotary positions, how
position tables are resized, how images are prepared) is a convention that stands with
the layout. A config beside the tensors has precedence (``hints``).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from wf_vit.models.positions import DINOV3_ROTARY, Rotary
from wf_vit.models.pretrained.names import (
    APPLE_NAMES,
    CLIP_NAMES,
    GOOGLE_NAMES,
    HUGGING_FACE_NAMES,
    TIMM_NAMES,
    Renames,
)
from wf_vit.models.pretrained.positions import (
    META_CUBIC,
    SCIPY_LINEAR,
    TORCH_CUBIC,
    TORCH_CUBIC_ANTIALIAS,
    Resampling,
)
from wf_vit.models.pretrained.preprocess import CLIP, HALF, IMAGENET, ImageFormat

# Widths whose heads are not 64 wide, and their number of heads: ViT-H, the giant ViTs
# of Google, OpenCLIP and timm, and the shape-optimised 400M model.
HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions as a library has them.

    Attributes:
      rotary: in this package's terms.
      interleaved: whether channels 2 c and 2 c + 1 of a head make a point, and not
        c and c + K / 2. The channels of queries and keys are then put in our order,
        which leaves every logit as it was.
      columns_first: whether the first half of the points turns with the column.
      spans_table: whether the span is the grid of the position table.
    """

    rotary: Rotary
    interleaved: bool = True
    columns_first: bool = False
    spans_table: bool = False


DINOV3_ROPE = Rope(DINOV3_ROTARY, interleaved=False)
# In timm EVA-02 was trained on, and is stretched to, 16 x 16 patches.
EVA02_ROPE = Rope(Rotary(10_000.0, span=(16.0, 16.0)))
PE_ROPE = Rope(Rotary(10_000.0, offset=1.0), columns_first=True, spans_table=True)


@dataclasses.dataclass(frozen=True)
class Layout:
    """One family of checkpoints.

    Attributes:
      name: for messages.
      anchor: the name of the patch embedding's kernel. What stands before it in a
        checkpoint ("vit.", "module.backbone.", "params/img/") is not part of names.
      renames: patterns and replacements, applied in order to every name.
      image_format: how images are prepared, where no config says how.
      resampling: of the position table.
      has: patterns each of which some name of such a checkpoint matches.
      lacks: patterns that no name matches.
      torch: whether the arrays are laid out as PyTorch's.
      model: attributes of ``ViT``, where neither tensors nor a config say them;
        "rotary" is a ``Rope``.
      classifier: more of them, where there is a head for classes.
      head_width: of each head, where no config says how many there are.
      heads: widths for which that is another number, and how many heads they have.
    """

    name: str
    anchor: str
    renames: Renames
    image_format: ImageFormat
    resampling: Resampling
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    torch: bool = True
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    classifier: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    head_width: int = 64
    heads: Mapping[int, int] = dataclasses.field(default_factory=HEADS.copy)


_CENTRE_CROP = ImageFormat(*IMAGENET, interpolation="bicubic", crop=0.875)
_SQUASH = ImageFormat(*HALF, interpolation="bilinear", crop=None)
_CLIP_CROP = ImageFormat(*CLIP, interpolation="bicubic", crop=1.0)
_DINOV3_SQUASH = ImageFormat(*IMAGENET, interpolation="bilinear", crop=None)

_EXACT = {"mlp": "gelu", "norm_epsilon": 1e-6}
_LOOSE = {"mlp": "gelu", "norm_epsilon": 1e-5}
_DINOV3 = {**_LOOSE, "rotary": DINOV3_ROPE, "image_size": (224, 224)}
_DINOV3_HEADS = {**HEADS, 1280: 20, 4096: 32}
_PE_HEADS = {**HEADS, 1536: 16}
_PE = {**_LOOSE, "rotary": PE_ROPE, "pool_heads": 8}
_AIMV2 = {"norm_epsilon": 1e-5, "pool": "mean"}

_HUGGING_FACE_VIT = Layout(
    name="Hugging Face ViT",
    anchor="embeddings.patch_embeddings.projection.weight",
    renames=HUGGING_FACE_NAMES,
    model={"mlp": "gelu", "norm_epsilon": 1e-12},
    resampling=TORCH_CUBIC,
    image_format=_SQUASH,
)
_HUGGING_FACE_DINOV2 = dataclasses.replace(
    _HUGGING_FACE_VIT,
    name="Hugging Face DINOv2",
    has=(r"layer_scale1\.lambda1$",),
    model=_EXACT,
    image_format=_CENTRE_CROP,
)
_HUGGING_FACE_CLIP = Layout(
    name="Hugging Face CLIP",
    anchor="embeddings.patch_embedding.weight",
    has=(r"embeddings\.class_embedding$",),
    renames=HUGGING_FACE_NAMES,
    model={"mlp": "quick_gelu", "norm_epsilon": 1e-5, "representation_tanh": False},
    classifier={"pool": "mean", "final_norm": False},
    resampling=TORCH_CUBIC,
    image_format=_CLIP_CROP,
)
_TIMM = Layout(
    name="timm",
    anchor="patch_embed.proj.weight",
    renames=TIMM_NAMES,
    model={**_EXACT, "pool_tokens": "patches"},
    resampling=TORCH_CUBIC_ANTIALIAS,
    image_format=dataclasses.replace(_CENTRE_CROP, crop=0.9),
)
_CLIP = Layout(
    name="OpenAI CLIP",
    anchor="conv1.weight",
    has=(r"transformer\.resblocks\.",),
    renames=CLIP_NAMES,
    model={"mlp": "quick_gelu", "norm_epsilon": 1e-5, "representation_tanh": False},
    resampling=TORCH_CUBIC_ANTIALIAS,
    image_format=_CLIP_CROP,
)
_BIG_VISION = Layout(
    name="big_vision",
    anchor="embedding/kernel",
    renames=GOOGLE_NAMES,
    torch=False,
    model={"mlp": "gelu_tanh", "norm_epsilon": 1e-6, "positions": "sincos"},
    resampling=SCIPY_LINEAR,
    image_format=dataclasses.replace(_SQUASH, crop=0.875),
)

# The first that fits describes the checkpoint.
LAYOUTS = (
    Layout(
        name="Hugging Face DINOv3",
        anchor="embeddings.patch_embeddings.weight",
        renames=HUGGING_FACE_NAMES,
        model=_DINOV3,
        heads=_DINOV3_HEADS,
        resampling=TORCH_CUBIC,
        image_format=_DINOV3_SQUASH,
    ),
    _HUGGING_FACE_CLIP,
    dataclasses.replace(
        _HUGGING_FACE_CLIP,
        name="Hugging Face SigLIP",
        has=(),
        model={"mlp": "gelu_tanh", "norm_epsilon": 1e-6},
        classifier={"pool": "mean"},
        image_format=dataclasses.replace(_SQUASH, interpolation="bicubic"),
    ),
    Layout(
        name="Hugging Face AIMv2",
        anchor="embeddings.patch_embed.weight",
        renames=HUGGING_FACE_NAMES,
        model={**_AIMV2, "pool_mlp_dim": 0, "positions": "sincos_mae"},
        head_width=128,
        heads={},
        resampling=TORCH_CUBIC,
        image_format=_CLIP_CROP,
    ),
    dataclasses.replace(
        _HUGGING_FACE_VIT,
        name="Hugging Face BEiT",
        has=(r"relative_position_bias_table$",),
        lacks=(r"attention\.(attention\.key|k_proj)\.bias$",),
        image_format=_SQUASH,
    ),
    dataclasses.replace(
        _HUGGING_FACE_DINOV2,
        name="Hugging Face DINOv2 with registers",
        has=(r"register_tokens$",),
        resampling=TORCH_CUBIC_ANTIALIAS,
    ),
    _HUGGING_FACE_DINOV2,
    dataclasses.replace(
        _HUGGING_FACE_VIT,
        name="Hugging Face DeiT",
        has=(r"distillation_token$",),
        image_format=_CENTRE_CROP,
    ),
    _HUGGING_FACE_VIT,
    dataclasses.replace(
        _TIMM,
        name="Meta DINOv3",
        has=(r"storage_tokens$",),
        model=_DINOV3,
        heads=_DINOV3_HEADS,
        image_format=_DINOV3_SQUASH,
    ),
    dataclasses.replace(
        _TIMM,
        name="Meta DINOv2 with registers",
        has=(r"register_tokens$",),
        model=_EXACT,
        image_format=_CENTRE_CROP,
    ),
    dataclasses.replace(
        _TIMM,
        name="Meta DINO",
        has=(r"mask_token$|head\.last_layer\.",),
        lacks=(r"decoder_", r"relative_position_bias_table$", r"attn\.q_bias$"),
        model=_EXACT,
        resampling=META_CUBIC,
        image_format=_CENTRE_CROP,
    ),
    dataclasses.replace(
        _TIMM,
        name="timm DINOv3",
        has=(r"gamma_1$", r"reg_token$", r"cls_token$"),
        lacks=(r"pos_embed$", r"relative_position_bias_table$"),
        model={**_DINOV3, "pool": "mean"},
        heads=_DINOV3_HEADS,
        image_format=dataclasses.replace(_CENTRE_CROP, crop=1.0),
    ),
    dataclasses.replace(
        _TIMM,
        name="timm EVA-02",
        has=(
            r"attn\.(q_bias|q_proj\.weight)$",
            r"pos_embed$",
            r"mlp\.(fc1_g|w1|fc1)\.",
        ),
        lacks=(r"relative_position_bias_table$", r"gamma_1$"),
        model={**_EXACT, "rotary": EVA02_ROPE},
        image_format=dataclasses.replace(_CENTRE_CROP, crop=1.0),
    ),
    dataclasses.replace(
        _TIMM,
        name="timm Perception Encoder",
        has=(r"norm_pre\.", r"attn_pool\.latent$"),
        model=_PE,
        heads=_PE_HEADS,
        image_format=ImageFormat(*HALF, interpolation="bicubic", crop=None),
    ),
    dataclasses.replace(
        _TIMM,
        name="timm Perception Encoder without final norm",
        has=(r"norm_pre\.",),
        lacks=(r"(^|\.)(fc_)?norm\.weight$",),
        model={**_PE, "pool": "mean", "final_norm": False},
        heads=_PE_HEADS,
        image_format=ImageFormat(*HALF, interpolation="bicubic", crop=None),
    ),
    dataclasses.replace(
        _TIMM,
        name="timm CLIP",
        has=(r"norm_pre\.",),
        model=_LOOSE,
        image_format=_CLIP_CROP,
    ),
    dataclasses.replace(
        _TIMM,
        name="timm AIMv2",
        has=(r"patch_embed\.norm\.weight$", r"mlp\.fc1_g\."),
        lacks=(r"norm1\.bias$",),
        model=_AIMV2,
        head_width=128,
        heads={},
        image_format=_CLIP_CROP,
    ),
    _TIMM,
    Layout(
        name="Apple AIMv2",
        anchor="preprocessor.patchifier.proj.weight",
        renames=APPLE_NAMES,
        model=_AIMV2,
        head_width=128,
        heads={},
        resampling=TORCH_CUBIC_ANTIALIAS,
        image_format=_CLIP_CROP,
    ),
    dataclasses.replace(
        _CLIP,
        name="Meta Perception Encoder",
        has=(*_CLIP.has, r"attn_pool\.probe$"),
        model={**_PE, "representation_tanh": False},
        heads=_PE_HEADS,
        image_format=ImageFormat(*HALF, interpolation="bilinear", crop=None),
    ),
    dataclasses.replace(
        _CLIP,
        name="Meta Perception Encoder without pooling",
        lacks=(r"ln_post\.",),
        model={**_PE, "pool": "mean", "final_norm": False},
        heads=_PE_HEADS,
        image_format=ImageFormat(*HALF, interpolation="bilinear", crop=None),
    ),
    _CLIP,
    dataclasses.replace(
        _BIG_VISION,
        name="Google ViT",
        has=(r"posembed_input/pos_embedding$",),
        image_format=_SQUASH,
    ),
    _BIG_VISION,
)
