"""Models by name: ``config.model`` in, a Flax module out."""

import dataclasses
import difflib
import json
import re
from typing import Any

import jax.numpy as jnp
import ml_collections
from ml_collections import config_dict

from wf_vit.errors import UsageError
from wf_vit.models import controls
from wf_vit.models.vit import ViT
from wf_vit.models.windowfree import FieldConfig, WindowFreeViT

MODELS = {
    "vit": ViT,
    "windowfree": WindowFreeViT,
    # What the window-free transformer is compared with, beside ViT.
    "relative_bias": controls.RelativeBiasViT,
    "gaussian": controls.GaussianViT,
    "growing_window": controls.GrowingWindowViT,
    "static_fields": controls.StaticFieldViT,
}

# Those whose fields are learned and can be guided.
FIELD_MODELS = ("windowfree", "static_fields")

# Sizes of arXiv 2010.11929 and 2106.10270; "mu" is for tests.
VARIANTS = {
    "mu": {"width": 32, "depth": 2, "mlp_dim": 128, "num_heads": 2},
    "Ti": {"width": 192, "depth": 12, "mlp_dim": 768, "num_heads": 3},
    "S": {"width": 384, "depth": 12, "mlp_dim": 1536, "num_heads": 6},
    "B": {"width": 768, "depth": 12, "mlp_dim": 3072, "num_heads": 12},
    "L": {"width": 1024, "depth": 24, "mlp_dim": 4096, "num_heads": 16},
}

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def default_config(name: str, variant: str) -> ml_collections.ConfigDict:
    """Returns ``config.model``, every key of which can be overridden.

    ``width``, ``depth``, ``mlp_dim`` and ``num_heads`` are the variant's unless they
    are set. The keys of a model that are not architecture are documented in
    ``ViT`` and in ``FieldConfig`` (``fields``, which models without fields ignore).
    """
    config = ml_collections.ConfigDict()
    config.name = name
    config.variant = variant
    for size in ("width", "depth", "mlp_dim", "num_heads"):
        config[size] = config_dict.placeholder(int)
    config.pool = "mean"
    config.cls_token = False
    config.num_registers = 0
    config.positions = "sincos"
    config.layer_scale = config_dict.placeholder(float)
    config.drop_path = 0.0
    config.dtype = "bfloat16"
    config.remat = False
    config.fields = ml_collections.ConfigDict(dataclasses.asdict(FieldConfig()))
    return config


def create_model(
    config: ml_collections.ConfigDict,
    *,
    num_classes: int,
    image_size: int | tuple[int, int],
) -> ViT:
    """Makes the model that ``config.model`` describes.

    Args:
      config: as ``default_config`` gives it, with any key overridden.
      num_classes: C.
      image_size: ``(height, width)`` in pixels, or one number for a square.

    Returns:
      The module, without parameters.

    Raises:
      UsageError: an unknown name or variant, or sizes that contradict one another.
    """
    options: dict[str, Any] = config.to_dict()
    variant = options.pop("variant")
    match = re.fullmatch(r"(\w+)/(\d+)", variant)
    if match is None:
        raise UsageError(
            f"The model variant is {variant!r}: expected size/patch, such as S/16."
        )
    sizes = _lookup("model size", match[1], VARIANTS)
    for key, value in sizes.items():
        if options[key] is None:
            options[key] = value
    if isinstance(image_size, int):
        image_size = (image_size, image_size)
    patch = int(match[2])
    return from_json(
        {
            "num_classes": num_classes,
            "image_size": image_size,
            "patch_size": (patch, patch),
            **options,
        }
    )


def rebuild(model: ViT, config: ml_collections.ConfigDict) -> ViT:
    """Returns a model of the same architecture, to be trained as ``config`` says.

    Args:
      model: a checkpoint's model, say.
      config: ``config.model``, of which ``name``, ``fields``, ``drop_path``, ``dtype``
        and ``remat`` count: a ViT can become a window-free transformer, which has the
        same parameters and those of its fields.
    """
    options = to_json(model)
    options["name"] = config.name
    options["fields"] = config.fields.to_dict()
    for key in ("drop_path", "dtype", "remat"):
        options[key] = config[key]
    return from_json(options)


def to_json(model: ViT) -> dict[str, Any]:
    """Returns every attribute of a model in terms of JSON; see ``from_json``."""
    options = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in ("parent", "name")
    }
    options["name"] = _key_of(type(model), MODELS)
    options["dtype"] = _key_of(model.dtype, DTYPES)
    if "fields" in options:
        options["fields"] = dataclasses.asdict(options["fields"])
    return json.loads(json.dumps(options))


def from_json(options: dict[str, Any]) -> ViT:
    """Returns the model that ``to_json`` described."""
    options = dict(options)
    model_class = _lookup("model name", options.pop("name"), MODELS)
    fields = options.pop("fields", {})
    if "fields" in model_class.__dataclass_fields__:
        fields = fields | {"extents": tuple(fields["extents"])}
        options["fields"] = FieldConfig(**fields)
    options["dtype"] = _lookup("dtype", options["dtype"], DTYPES)
    for size in ("image_size", "patch_size"):
        options[size] = tuple(options[size])
    return model_class(**options).validate()


def _key_of(value: Any, known: dict[str, Any]) -> str:
    """Returns the name under which a value is known."""
    return next(name for name, entry in known.items() if entry == value)


def _lookup(what: str, given: str, known: dict[str, Any]) -> Any:
    """Returns ``known[given]``, or raises an error that suggests the nearest name."""
    if given in known:
        return known[given]
    nearest = difflib.get_close_matches(given, known, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise UsageError(f"Unknown {what} {given!r}: {hint}Known: {', '.join(known)}.")
