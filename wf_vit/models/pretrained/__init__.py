"""Published checkpoints as models of this package.

``load`` reads Google's, big_vision's, timm's, Meta's and Hugging Face's vision
transformers, and this package's own runs. Every parameter is accounted for by name.
"""

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from wf_vit.arrays import is_module
from wf_vit.errors import UsageError
from wf_vit.models.pretrained.containers import arrays_in
from wf_vit.models.pretrained.embedding import Parameters
from wf_vit.models.pretrained.guards import check_names, check_weights, explained
from wf_vit.models.pretrained.hints import Hints
from wf_vit.models.pretrained.infer import (
    Checkpoint,
    check_depth,
    count_blocks,
    infer,
)
from wf_vit.models.pretrained.positions import (
    TORCH_CUBIC_ANTIALIAS,
    Resampling,
    resize_table,
)
from wf_vit.models.pretrained.preprocess import Preprocess
from wf_vit.models.pretrained.readers import (
    HUB,
    download,
    read,
    read_module,
)
from wf_vit.models.pretrained.runs import is_run, read_run
from wf_vit.models.pretrained.save import OWN, is_own, read_own, save
from wf_vit.models.vit import ViT
from wf_vit.shapes import Params

_LOG = logging.getLogger(__name__)

# What makes way for a head of another number of classes.
HEAD = ("head", "head_distillation", "representation")


@dataclasses.dataclass(frozen=True, repr=False)
class Pretrained:
    """A model that has been trained.

    Attributes:
      model: the module.
      params: its parameters, float32.
      preprocess: turns uint8 images of any size into the model's input.
      class_names: C names, in the order of the logits, or none where they are not
        known.
      resampling: how the checkpoint's library resizes position tables.
    """

    model: ViT
    params: Params
    preprocess: Preprocess
    class_names: tuple[str, ...] = ()
    resampling: Resampling = TORCH_CUBIC_ANTIALIAS

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        model, grid = self.model, self.model.grid
        return (
            f"Pretrained({type(model).__name__} of {count:,} parameters: "
            f"{model.depth} layers, {model.num_heads} heads, width {model.width}, "
            f"{grid[0]} x {grid[1]} patches of {model.image_size[0]} x "
            f"{model.image_size[1]} pixels, {model.num_prefix_tokens} prefix tokens, "
            f"{model.num_classes} classes)"
        )

    def resized(self, image_size: tuple[int, int]) -> "Pretrained":
        """Returns the same model for images of another size.

        A learned position table is resized to the new grid, and learned fields scale
        with it.

        Raises:
          UsageError: patches do not divide the size, or a parameter belongs to the
            grid and cannot be resized.
        """
        if tuple(image_size) == self.model.image_size:
            return self
        model = self.model.at_size(image_size)
        preprocess = Preprocess(model.image_size, self.preprocess.image_format)
        params = traverse_util.flatten_dict(self.params, sep="/")
        if model.positions == "learned":
            table = np.asarray(params["position_table"])
            table = resize_table(table, model.grid, self.resampling)
            params["position_table"] = jnp.asarray(table, jnp.float32)
        size = f"The model at {image_size[0]} x {image_size[1]} pixels"
        _compare(params, _shapes(model), {}, size)
        return dataclasses.replace(
            self,
            model=model,
            params=traverse_util.unflatten_dict(params, sep="/"),
            preprocess=preprocess,
        )

    def save(self, path: str | Path, *, layout: str = OWN) -> Path:
        """Saves the model as a folder; see `pretrained.save`."""
        return save(
            self.model,
            self.params,
            path,
            layout=layout,
            preprocess=self.preprocess,
            class_names=self.class_names,
            resampling=self.resampling,
        )


def load(
    source: Any,
    *,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    num_heads: int | None = None,
    which: str | None = None,
    prefix: str | None = None,
) -> Pretrained:
    """Loads a published checkpoint.

    Known are, from Google, timm, Meta, OpenAI, Apple and Hugging Face, in their own
    layouts (``layouts.LAYOUTS``): ViT, DeiT, DINO, MoCo v3, iBOT, MAE, BEiT, DINOv2
    and what shares its layout, DINOv3, EVA-02, CLIP, SigLIP, Perception Encoder and
    AIMv2; and this package's own runs. docs/checkpoints.md has the table.

    The architecture is read off the names and shapes of the tensors. What they cannot
    tell is taken from ``config.json`` and ``preprocessor_config.json`` beside them
    (Hugging Face's or timm's), and else from the convention of the layout: the number
    of heads, the activation, epsilon, rotary positions, how images are prepared. What
    was so assumed is logged as a warning, and can be replaced by ``num_heads`` or
    ``model.clone(mlp=...)``. A position table is resized as the library does that the
    layout belongs to; a run's is resized as timm's.

    Of a file with several sets of parameters the averages, or the teacher, are taken,
    and the log names the others. What is no part of the model (optimizers, decoders,
    heads of pretraining, text encoders) is left out and named.

    Args:
      source: a file; a folder with one and, perhaps, its configs; a run's working
        directory (its last checkpoint) or ``<workdir>/checkpoints/<step>``;
        ``hf://owner/name[@revision]`` (needs the extra ``hub``); a PyTorch module of
        timm or Hugging Face, of which the weights and the config are read; or the
        state dict of one.
      image_size: ``(height, width)`` in pixels, or one number for a square. The
        position table is resized to its grid, and learned fields scale with it.
        None: the checkpoint's own.
      num_classes: None keeps the checkpoint's head, or its lack of one. A number other
        than the checkpoint's replaces the head, and what is before it since the
        pooling, by a new one, or by none for 0; the log says so.
      num_heads: H, where it cannot be inferred.
      which: of a file that nests several state dicts, the entry that is meant, such
        as "state_dict" or "student".
      prefix: of a state dict with several networks, what stands before the names of
        the one that is meant, such as "student.backbone".

    Returns:
      The model, its parameters and the preprocessing of its images.

    Raises:
      UsageError: the source cannot be read, is of no known form, or has missing,
        unknown or misshapen parameters, all of which are listed.
    """
    if isinstance(image_size, int):
        image_size = (image_size, image_size)
    checkpoint = _read(
        source,
        image_size=image_size,
        num_heads=num_heads,
        which=which,
        prefix=prefix,
    )
    if not isinstance(source, str | Path):
        source = f"The {type(source).__name__}"  # What messages call it.
    parameters, model = checkpoint.parameters, checkpoint.model
    names = checkpoint.class_names
    if num_classes not in (None, model.num_classes):
        _LOG.info(
            "The head of %s, for %d classes, makes way for a new one for %d.",
            source,
            model.num_classes,
            num_classes,
        )
        model = model.clone(num_classes=num_classes, representation_size=None)
        parameters = _without_head(parameters) | _new_head(model)
        names = ()
    if image_size is not None:
        model = model.at_size(image_size)
    if model.positions == "learned":
        table = parameters["position_table"]
        table = resize_table(table, model.grid, checkpoint.resampling)
        parameters = parameters | {"position_table": table}
    if len(names) not in (0, model.num_classes):
        _LOG.warning(
            "%s names %d classes, but its head has %d: the names are left out.",
            source,
            len(names),
            model.num_classes,
        )
        names = ()
    expected = _shapes(model)
    _compare(parameters, expected, checkpoint.origin, source)
    params = {name: jnp.asarray(parameters[name], jnp.float32) for name in expected}
    return Pretrained(
        model=model,
        params=traverse_util.unflatten_dict(params, sep="/"),
        preprocess=Preprocess(
            model.image_size,
            checkpoint.image_format,
            checkpoint.leftover
            if model.image_size == checkpoint.model.image_size
            else (0, 0),
        ),
        class_names=names,
        resampling=checkpoint.resampling,
    )


def _read(
    source: Any,
    *,
    image_size: tuple[int, int] | None,
    num_heads: int | None,
    which: str | None,
    prefix: str | None,
) -> Checkpoint:
    """Returns what a source holds, before any change of size or head."""
    if is_module(source):
        arrays, hints = read_module(source)
    elif isinstance(source, Mapping):
        arrays, hints = arrays_in(source, which=which), Hints()
    elif isinstance(source, str | Path):
        path = download(source) if str(source).startswith(HUB) else Path(source)
        with explained(path, "Look at its name and its permissions."):
            if is_run(path):
                return _checked(read_run(path))
            if is_own(path):
                return _checked(read_own(path))
            arrays, hints = read(path, which=which)
    else:
        raise UsageError(
            f"The checkpoint is a {type(source).__name__}, expected a path, "
            "hf://owner/name, a state dict, or a module of timm or transformers."
        )
    # Arrays of another rank than a layer has.
    with explained("The checkpoint", "Its arrays have shapes of no known form."):
        return infer(
            arrays, hints, image_size=image_size, num_heads=num_heads, prefix=prefix
        )


def _checked(own: Checkpoint) -> Checkpoint:
    """Returns a checkpoint of ours; raises UsageError if it cannot be true.

    Its attributes were not read off its parameters, so a depth without blocks, which
    would take an age to compare, is found here.
    """
    check_names(own.parameters, "The checkpoint")
    check_weights(own.parameters)
    check_depth(count_blocks(own.parameters), own.model.depth)
    return own


def _shapes(model: ViT) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a model's parameters, by flat name.

    Only one block is traced, since all are alike: tracing takes most of a load.
    """
    shallow = model.clone(depth=min(model.depth, 1))
    shapes = {}
    for name, shape in jax.eval_shape(lambda: _initial(shallow)).items():
        module, *rest = name.split("/")
        if module == "blocks_0":
            names = [f"blocks_{layer}" for layer in range(model.depth)]
        else:
            names = [module]
        shapes |= {"/".join([name, *rest]): shape for name in names}
    return shapes


def _initial(model: ViT) -> Parameters:
    """Returns fresh parameters by flat name."""
    images = jnp.zeros((1, *model.image_size, 3))
    params = model.init(jax.random.key(0), images)["params"]
    return traverse_util.flatten_dict(params, sep="/")


def _is_head(name: str) -> bool:
    return name.partition("/")[0] in HEAD


def _without_head(parameters: Parameters) -> Parameters:
    return {n: array for n, array in parameters.items() if not _is_head(n)}


def _new_head(model: ViT) -> Parameters:
    """Returns the fresh parameters of the head alone."""

    def head() -> Parameters:
        return {n: array for n, array in _initial(model).items() if _is_head(n)}

    return jax.jit(head)()


def _compare(
    parameters: Parameters,
    expected: Mapping[str, jax.ShapeDtypeStruct],
    origin: Mapping[str, str],
    source: str | Path,
) -> None:
    """Raises UsageError if there are missing, unknown or misshapen parameters."""

    def named(name: str) -> str:
        own_name = origin.get(name, name)
        return name if own_name == name else f"{own_name} (here {name})"

    wrong = [f"missing: {name}" for name in expected if name not in parameters]
    wrong += [f"unknown: {named(name)}" for name in parameters if name not in expected]
    wrong += [
        f"misshapen: {named(name)} is {parameters[name].shape}, expected {array.shape}"
        for name, array in expected.items()
        if name in parameters and parameters[name].shape != array.shape
    ]
    if wrong:
        listing = "\n  ".join(wrong)
        heads = all(re.search(r"attention/(query|key|value|out)", w) for w in wrong)
        raise UsageError(
            f"{source} does not fit the model that its parameters imply: "
            + ("pass num_heads, or it is" if heads else "it is")
            + " damaged, or a variant of the vision transformer that is not supported."
            f"\n  {listing}"
        )
