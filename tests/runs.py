"""The folder of a run as training leaves it, for the tests that load one."""

import json

import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

from wf_vit.models import registry
from wf_vit.models.registry import ModelConfig

DATA = {
    "augment": {"mean": [0.5] * 3, "std": [0.5] * 3},
    "resize_method": "bilinear",
    "eval_resize": 1.0,
}


def small_winft(num_classes, image_size, **changes):
    """The smallest window-free transformer, in patches of 4 pixels."""
    changes = {"dtype": "float32"} | changes
    config = ModelConfig(name="windowfree", variant="mu/4", **changes)
    return registry.create_model(config, num_classes=num_classes, image_size=image_size)


def write_run(folder, model, params, *, step=1, average=None, data=DATA):
    """Adds a checkpoint, perhaps with a moving average of the parameters, to a run."""
    state = {
        "step": jnp.int32(step),
        "params": params,
        "opt_state": optax.adamw(1e-3).init(params),
        "ema_params": average,
    }
    items = {
        "state": ocp.args.StandardSave(state),
        "meta": ocp.args.JsonSave({"model": registry.to_json(model)}),
    }
    # The last checkpoint is not the best.
    metrics = {"top1": 1 / step}
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)
    (folder / "config.json").write_text(json.dumps({"data": data}))
