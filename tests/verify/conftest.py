"""A small model in a run folder, and what verifies it on embedded digits."""

import json

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest

from configs import verify as verify_config
from wf_vit.models import registry


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """The folder of a run: a WinfT for digits with random parameters."""
    folder = tmp_path_factory.mktemp("digits_run")
    config = registry.default_config("windowfree", "mu/4")
    config.dtype = "float32"
    model = registry.create_model(config, num_classes=10, image_size=16)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = tree.unflatten(
        x + 0.2 * jax.random.normal(k, x.shape)
        for x, k in zip(leaves, keys, strict=True)
    )
    state = {
        "step": jnp.int32(1),
        "params": params,
        "opt_state": optax.sgd(1e-3).init(params),
        "ema_params": None,
    }
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        manager.save(
            1,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                meta=ocp.args.JsonSave({"model": registry.to_json(model)}),
            ),
            metrics={"top1": 0.1},
        )
    data = {
        "augment": {"mean": [0.5] * 3, "std": [0.5] * 3},
        "resize_method": "bilinear",
        "eval_resize": 1.0,
    }
    (folder / "config.json").write_text(json.dumps({"data": data}))
    return folder


@pytest.fixture
def config(digits_run):
    """All protocols on a few digits, in two batches of which the last is not full."""
    config = verify_config.get_config()
    config.weights = str(digits_run)
    config.data.name = "digits"
    config.num_images = {
        "windows": 10,
        "removal": 7,
        "pixels": 3,
        "faithfulness": 1,
    }
    config.kept = (0.5, 0.25)
    config.removed = (0.5,)
    config.layers = (0, 1)
    config.num_cuts = 4
    config.num_probes = 2
    config.batch_size = 6
    config.bootstrap_samples = 20
    config.timing_turns = 0
    return config
