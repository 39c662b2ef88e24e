"""What the files beside the tensors say: Hugging Face's configs, or timm's."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from wf_vit.errors import UsageError
from wf_vit.models.checks import MOST_PIXELS
from wf_vit.models.positions import DINOV3_ROTARY
from wf_vit.models.pretrained import guards
from wf_vit.models.pretrained.layouts import DINOV3_ROPE
from wf_vit.models.pretrained.preprocess import Triple

_LOG = logging.getLogger(__name__)

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    # Of gated MLPs, which the tensors tell.
    "silu": None,
    "swish": None,
}
# Those of Hugging Face's models that compute what ViT does. Others have the same names
# (MLCD those of CLIP, say) and compute something else.
MODEL_TYPES = (
    *("vit", "deit", "vit_msn", "vit_mae", "ijepa", "dinov2", "dinov2_with_registers"),
    *("dinov3_vit", "clip", "clip_vision_model", "metaclip_2", "siglip", "siglip2"),
    *("metaclip_2_vision_model", "siglip_vision_model", "siglip2_vision_model"),
    *("aimv2", "aimv2_vision_model", "beit", "tipsv2", "tipsv2_vision_model"),
)
# Pillow's numbers, which Hugging Face's files use.
RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
# Processors for which one number is the shorter edge, and not both.
_SHORTER_EDGE = ("CLIP", "Bit", "ConvNext", "Siglip")
# Keys of preprocessor_config.json that say nothing of one RGB image.
_IDLE_KEYS = (
    *("image_processor_type", "feature_extractor_type", "processor_class", "auto_map"),
    *("do_convert_rgb", "do_reduce_labels", "default_to_square", "return_tensors"),
    *("data_format", "input_data_format", "device", "disable_grouping"),
    *("_valid_processor_keys", "image_seq_length", "num_channels", "use_square_size"),
)


@dataclasses.dataclass(frozen=True)
class Hints:
    """What the files beside the tensors say.

    Attributes:
      model: attributes of ``ViT``; "rotary" is a ``Rope``, and "depth" is compared
        with what is there.
      image_format: arguments of ``preprocess.ImageFormat``.
      class_names: of the head.
      known: whether there is a config of a known form.
    """

    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    image_format: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    known: bool = False


def read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON object from a file, or {} if there is none.

    Raises:
      UsageError: the file holds something else.
    """
    if not path.exists():
        return {}
    with guards.explained(path, "Repair it or take it away."):
        content = json.loads(guards.read_text(path))
    if not isinstance(content, dict):
        raise UsageError(
            f"{path} holds a {type(content).__name__}, expected a JSON object: repair "
            "it or take it away."
        )
    return content


def number(
    config: Mapping[str, Any],
    key: str,
    *,
    whole: bool = False,
    most: int | float = 2**20,
) -> Any:
    """Returns a positive number of a config, or None if it is not there.

    Raises:
      UsageError: it is something else, or above ``most``.
    """
    value = config.get(key)
    kinds = (int,) if whole else (int, float)
    if value is None or (
        isinstance(value, kinds) and not isinstance(value, bool) and 0 < value <= most
    ):
        return value
    what = "a whole number" if whole else "a number"
    raise UsageError(
        f"The config says {key}={shown(value)}, expected {what} above 0 and up to "
        f"{most:,}: correct it."
    )


def choice(config: Mapping[str, Any], key: str, known: Collection[str]) -> str | None:
    """Returns one of some texts of a config, or None if it is not there.

    Raises:
      UsageError: it is something else.
    """
    value = config.get(key)
    if value is None or (isinstance(value, str) and value in known):
        return value
    raise UsageError(
        f"The config says {key}={shown(value)}, expected one of {', '.join(known)}: "
        "correct it."
    )


def shown(value: Any) -> str:
    """Returns a value for a message, shortened."""
    # Of a huge number Python does not even show the digits.
    with contextlib.suppress(ValueError):
        text = repr(value)
        return text if len(text) <= 200 else f"{text[:197]}..."
    return "a huge number"


def pair(config: Mapping[str, Any], key: str) -> tuple[int, int] | None:
    """Returns height and width from one number, from two, or from nothing.

    Raises:
      UsageError: it is something else.
    """
    value = config.get(key)
    if value is None:
        return None
    sizes = value if isinstance(value, list | tuple) else (value, value)
    if len(sizes) == 2 and None not in sizes:
        options = {"whole": True, "most": MOST_PIXELS}
        return tuple(number({key: size}, key, **options) for size in sizes)
    raise UsageError(
        f"The config says {key}={shown(value)}, expected one whole number or two: "
        "correct it."
    )


def triple(config: Mapping[str, Any], key: str) -> Triple | None:
    """Returns a number for each channel, or None if it is not there.

    Raises:
      UsageError: it is something else.
    """
    value = config.get(key)
    if value is None:
        return None
    values = value if isinstance(value, list | tuple) else (value,) * 3
    if len(values) != 3 or not all(
        isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= 1e6
        for x in values
    ):
        raise UsageError(
            f"The config says {key}={shown(value)}, expected three numbers: correct it."
        )
    return tuple(float(x) for x in values)


def said(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the attributes that are known."""
    return {name: value for name, value in attributes.items() if value is not None}


def read_hints(folder: Path, of_timm: Callable[[Mapping[str, Any]], Hints]) -> Hints:
    """Reads ``config.json`` and ``preprocessor_config.json``, where they exist."""
    config = read_json(folder / "config.json")
    preprocessor = read_json(folder / "preprocessor_config.json")
    path = folder / "config.json"
    with guards.explained(folder, "Correct its config.json, or the preprocessor's."):
        if "architecture" in config:
            return of_timm(config)
        if config and not {"model_type", "vision_config", "hidden_size"} & set(config):
            _LOG.warning(
                "%s is neither Hugging Face's nor timm's, and is not looked at.", path
            )
            config = {}
        return hugging_face_hints(config, preprocessor)


def hugging_face_hints(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any]
) -> Hints:
    """Understands Hugging Face's ``config.json`` and ``preprocessor_config.json``.

    Raises:
      UsageError: the model is of a kind that is not supported, or a value is none.
    """
    vision = config.get("vision_config", config)
    if not isinstance(vision, Mapping):
        raise UsageError(
            f"config.json says vision_config={vision!r}, expected a JSON object."
        )
    for kind in (config.get("model_type"), vision.get("model_type")):
        if kind is not None and kind not in MODEL_TYPES:
            raise UsageError(
                f"config.json says model_type={kind!r}; supported are "
                f"{', '.join(MODEL_TYPES)}. A model of another type may have the same "
                "names and compute something else."
            )
    activation = choice(vision, "hidden_act", ACTIVATIONS)
    gated = vision.get("use_gated_mlp") or "aimv2" in str(vision.get("model_type"))
    if gated and activation is not None and ACTIVATIONS[activation] is not None:
        raise UsageError(
            f"config.json says hidden_act={activation!r} of a gated MLP; supported is "
            "'silu', which makes it SwiGLU."
        )
    model = {
        "num_heads": number(vision, "num_attention_heads", whole=True),
        "mlp": ACTIVATIONS.get(activation),
        "norm_epsilon": number(vision, "layer_norm_eps", most=1)
        or number(vision, "rms_norm_eps", most=1),
        "depth": number(vision, "num_hidden_layers", whole=True, most=1000),
        "image_size": pair(vision, "image_size"),
    }
    if vision.get("model_type") == "dinov3_vit":
        theta = number(vision, "rope_theta", most=1e12) or DINOV3_ROTARY.temperature
        rotary = dataclasses.replace(DINOV3_ROTARY, temperature=float(theta))
        model["rotary"] = dataclasses.replace(DINOV3_ROPE, rotary=rotary)
    if vision.get("model_type") == "beit":
        model["pool"] = "mean" if vision.get("use_mean_pooling", True) else "cls"
    return Hints(
        said(model),
        image_hints(preprocessor),
        _labels(config.get("id2label") or {}),
        known=bool(config),
    )


def _labels(by_index: Any) -> tuple[str, ...]:
    """Returns Hugging Face's class names, unless they are its placeholders."""
    try:
        names = tuple(by_index[key] for key in sorted(by_index, key=int))
    except (IndexError, TypeError, ValueError, KeyError) as error:
        raise UsageError(
            f"config.json says id2label={shown(by_index)}, expected names by number."
        ) from error
    placeholders = all(name == f"LABEL_{k}" for k, name in enumerate(names))
    return () if placeholders else tuple(map(str, names))


def image_hints(preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """Understands every key of a ``preprocessor_config.json``.

    Returns:
      Arguments of ``ImageFormat``.

    Raises:
      UsageError: a key is unknown and not null, or contradicts another.
    """
    if not preprocessor:
        return {}
    known = {
        *_IDLE_KEYS,
        *("do_resize", "size", "resample", "do_center_crop", "crop_size"),
        *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
    }
    unknown = {
        key: value
        for key, value in preprocessor.items()
        if key not in known and value not in (None, False)
    }
    if unknown:
        raise UsageError(
            "preprocessor_config.json has keys that are not understood: "
            f"{shown(unknown)}. Take them away if they change nothing for an RGB image."
        )
    hints = {"floor": True}
    resample = preprocessor.get("resample")
    if resample is not None:
        if isinstance(resample, bool) or resample not in range(len(RESAMPLE)):
            raise UsageError(
                f"preprocessor_config.json says resample={resample!r}, expected one of "
                f"Pillow's numbers, 0 to {len(RESAMPLE) - 1}."
            )
        hints["interpolation"] = RESAMPLE[int(resample)]
    return hints | _scale(preprocessor) | _geometry(preprocessor)


def _scale(preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """Returns mean and std of images in [0, 1], whatever the image is multiplied by."""
    factor = 1.0
    if preprocessor.get("do_rescale", True):
        factor = number(preprocessor, "rescale_factor") or 1 / 255
    mean, std = (0.0,) * 3, (1.0,) * 3
    if preprocessor.get("do_normalize", True):
        mean, std = (triple(preprocessor, f"image_{x}") for x in ("mean", "std"))
        if mean is None or std is None:
            return {}
    mean, std = (tuple(x / (255 * factor) for x in y) for y in (mean, std))
    return {"mean": mean, "std": std}


def _geometry(preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how an image is resized and cropped."""
    if preprocessor.get("do_resize") is False:
        raise UsageError(
            "preprocessor_config.json says do_resize=false: which size an image has to "
            "have is then unknown. Set do_resize and size to what was trained with."
        )
    if preprocessor.get("size") is None:
        return {}
    shorter, size = _sides(preprocessor, "size")
    if not preprocessor.get("do_center_crop") or preprocessor.get("crop_size") is None:
        return {"crop": 1.0 if shorter else None}
    cropped, keep = _sides({**preprocessor, "default_to_square": True}, "crop_size")
    shares = {k / s for k, s in zip(keep, size, strict=True)}
    if cropped or len(shares) > 1 or max(shares) > 1:
        raise UsageError(
            f"preprocessor_config.json says size={preprocessor['size']} and crop_size="
            f"{preprocessor['crop_size']}: expected a crop no larger than the resized "
            "image, with the same share of height and width."
        )
    return {"crop": shares.pop(), "squash": not shorter}


def _sides(preprocessor: Mapping[str, Any], key: str) -> tuple[bool, tuple[int, int]]:
    """Returns whether a size is that of the shorter edge, and height and width."""
    size = preprocessor[key]
    if isinstance(size, Mapping):
        kind = {name for name, value in size.items() if value is not None}
        if kind == {"shortest_edge"}:
            return True, pair(size, "shortest_edge")
        if kind == {"height", "width"}:
            return False, pair({key: (size["height"], size["width"])}, key)
        raise UsageError(
            f"preprocessor_config.json says {key}={dict(size)}, expected shortest_edge,"
            " or height and width."
        )
    if isinstance(size, list | tuple):
        return False, pair({key: size}, key)
    processor = str(
        preprocessor.get("image_processor_type")
        or preprocessor.get("feature_extractor_type")
    )
    square = preprocessor.get("default_to_square")
    if square is None:
        square = not processor.startswith(_SHORTER_EDGE)
    return not square, pair({key: size}, key)
