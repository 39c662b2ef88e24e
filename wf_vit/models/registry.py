"""Models by name: ``config.model`` in, a Flax module out."""

import dataclasses
import difflib
import json
import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import traverse_util
from jaxtyping import Array, Int

from wf_vit import settings
from wf_vit.errors import UsageError
from wf_vit.models import controls
from wf_vit.models.attention import FIELD_NAMES, REPORT
from wf_vit.models.checks import ATTRIBUTES
from wf_vit.models.positions import Rotary
from wf_vit.models.vit import ViT
from wf_vit.models.windowfree import FieldConfig, FieldViT, WindowFreeViT
from wf_vit.settings import setting
from wf_vit.shapes import Params

_LOG = logging.getLogger(__name__)

MODELS = {
    "vit": ViT,
    "windowfree": WindowFreeViT,
    # What the window-free transformer is compared with, beside ViT.
    "relative_bias": controls.RelativeBiasViT,
    "gaussian": controls.GaussianViT,
    "growing_window": controls.GrowingWindowViT,
    "static_fields": controls.StaticFieldViT,
}

# Sizes of arXiv 2010.11929 and 2106.10270; "mu" is for tests.
VARIANTS = {
    "mu": {"width": 32, "depth": 2, "mlp_dim": 128, "num_heads": 2},
    "Ti": {"width": 192, "depth": 12, "mlp_dim": 768, "num_heads": 3},
    "S": {"width": 384, "depth": 12, "mlp_dim": 1536, "num_heads": 6},
    "B": {"width": 768, "depth": 12, "mlp_dim": 3072, "num_heads": 12},
    "L": {"width": 1024, "depth": 24, "mlp_dim": 4096, "num_heads": 16},
}

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def _as_in_vit(name: str, default: Any) -> Any:
    """Returns a field that is declared as the attribute of a ViT, with a default."""
    return ATTRIBUTES[name].as_field(default)


def _of_variant(name: str) -> Any:
    """Returns a field that replaces what the variant says."""
    return ATTRIBUTES[name].as_field(None, ", if not the variant's")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model, ``config.model``.

    What the attributes do is documented in ``ViT``.

    Attributes:
      fields: how the fields start, for the models that have them.
    """

    name: str = setting("vit", "kind of the model", choices=tuple(MODELS))
    variant: str = setting(
        "S/16", f"size and side of a patch; sizes are {', '.join(VARIANTS)}"
    )
    width: int | None = _of_variant("width")
    depth: int | None = _of_variant("depth")
    mlp_dim: int | None = _of_variant("mlp_dim")
    num_heads: int | None = _of_variant("num_heads")
    pool: str = _as_in_vit("pool", "mean")
    cls_token: bool = _as_in_vit("cls_token", False)
    num_registers: int = _as_in_vit("num_registers", 0)
    positions: str = _as_in_vit("positions", "sincos")
    layer_scale: float | None = _as_in_vit("layer_scale", None)
    drop_path: float = _as_in_vit("drop_path", 0.0)
    dtype: str = setting("bfloat16", "of the computation", choices=tuple(DTYPES))
    remat: bool = _as_in_vit("remat", False)
    fields: FieldConfig = dataclasses.field(default_factory=FieldConfig)

    @classmethod
    def of(cls, config: ml_collections.ConfigDict) -> "ModelConfig":
        """Returns what ``config.model`` says."""
        return cls(**config.to_dict() | {"fields": _fields(config.fields.to_dict())})


# The declarations of ``config.model``.
KEYS = {**settings.of(ModelConfig), "fields": settings.of(FieldConfig)}


def default_config(name: str, variant: str) -> ml_collections.ConfigDict:
    """Returns ``config.model``, every key of which can be overridden."""
    config = settings.config_of(KEYS)
    config.update(name=name, variant=variant)
    return config


def create_model(
    config: ModelConfig,
    *,
    num_classes: int,
    image_size: int | tuple[int, int],
) -> ViT:
    """Makes the model that a config describes.

    Args:
      config: the model.
      num_classes: C.
      image_size: ``(height, width)`` in pixels, or one number for a square.

    Returns:
      The module, without parameters.

    Raises:
      UsageError: an unknown name or variant, or sizes that contradict one another.
    """
    options = dataclasses.asdict(config)
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


def init_params(model: ViT, seed: int | Int[Array, ""]) -> Params:
    """Returns fresh parameters; they depend on nothing but the model and the seed."""
    images = jnp.zeros((1, *model.image_size, 3))
    key = jax.random.key(seed)
    return jax.jit(lambda: model.init(key, images)["params"])()


def rebuild(model: ViT, config: ModelConfig) -> ViT:
    """Returns a model of the same architecture, to be trained as ``config`` says.

    Args:
      model: a checkpoint's model, say.
      config: of which ``name``, ``fields``, ``drop_path``, ``dtype`` and ``remat``
        count, but not ``fields.hidden`` where the model predicts fields already: a ViT
        can become a window-free transformer, which has the same parameters and those
        of its fields.
    """
    options = to_json(model)
    options["name"] = config.name
    options["fields"] = dataclasses.asdict(config.fields)
    if isinstance(model, WindowFreeViT):
        options["fields"]["hidden"] = model.fields.hidden
    for key in ("drop_path", "dtype", "remat"):
        options[key] = getattr(config, key)
    return from_json(options)


def adopt_fields(new: Params, loaded: Params, *, source: str) -> Params:
    """Returns ``loaded``, with the fields of ``new`` if it has none.

    Fields are what a checkpoint may lack: they turn a ViT into a window-free
    transformer. (A head for other classes is the importer's to make.)

    Raises:
      UsageError: other parameters differ; they are named.
    """
    ours = traverse_util.flatten_dict(new, sep="/")
    theirs = traverse_util.flatten_dict(loaded, sep="/")
    fresh = [n for n in ours if n not in theirs and set(FIELD_NAMES) & {*n.split("/")}]
    wrong = [n for n in ours if n not in theirs and n not in fresh]
    wrong += [n for n in theirs if n not in ours]
    if wrong:
        raise UsageError(
            f"{source} and config.model.name differ in the parameters "
            f"{', '.join(wrong)}: name the checkpoint's model."
        )
    if fresh:
        _LOG.info("Not in %s, so started afresh: %s", source, ", ".join(fresh))
    # Zeros, so that what the model computes stays what it was.
    ours |= {n: jnp.zeros_like(ours[n]) for n in fresh if REPORT in n.split("/")}
    taken = jax.tree.map(jnp.asarray, theirs)
    return traverse_util.unflatten_dict({**ours, **taken}, sep="/")


def to_json(model: ViT) -> dict[str, Any]:
    """Returns every attribute of a model in terms of JSON; see ``from_json``."""
    options = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in ("parent", "name")
    }
    options["name"] = _key_of(type(model), MODELS)
    options["dtype"] = _key_of(model.dtype, DTYPES)
    for name in ("fields", "rotary"):
        if options.get(name) is not None:
            options[name] = dataclasses.asdict(options[name])
    return json.loads(json.dumps(options))


def with_dtype(model: ViT, dtype: str) -> ViT:
    """Returns the model, computing in a dtype of ``DTYPES``."""
    return model.clone(dtype=_lookup("dtype", dtype, DTYPES))


def from_json(options: dict[str, Any]) -> ViT:
    """Returns the model that ``to_json`` described."""
    options = dict(options)
    model_class = _lookup("model name", options.pop("name"), MODELS)
    fields = options.pop("fields", {})
    if "fields" in model_class.__dataclass_fields__:
        options["fields"] = _fields(fields)
    if not issubclass(model_class, FieldViT):
        options.pop("trained_patches", None)
    options["dtype"] = _lookup("dtype", options["dtype"], DTYPES)
    for size in ("image_size", "patch_size"):
        options[size] = tuple(options[size])
    if options.get("rotary") is not None:
        span = options["rotary"]["span"]
        rotary = options["rotary"] | {"span": span if span is None else tuple(span)}
        options["rotary"] = Rotary(**rotary)
    return model_class(**options).validate()


def _fields(options: dict[str, Any]) -> FieldConfig:
    """Returns the fields that a dict describes; it may come from an older file."""
    known = {field.name for field in dataclasses.fields(FieldConfig)}
    if options.keys() != known:
        raise UsageError(
            f"The fields of the model have the settings {', '.join(sorted(options))}, "
            f"expected {', '.join(sorted(known))}: correct the config. A run that an "
            "earlier version made is opened by that version."
        )
    return FieldConfig(**options | {"extents": tuple(options["extents"])})


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
