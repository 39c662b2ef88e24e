"""What the paper about pods counts is what the compiled update reduces."""

import functools
import re

import jax
import numpy as np
import pytest

from benchmarks import pods
from tests.cases import slow
from wf_vit.data.config import DataInfo
from wf_vit.errors import UsageError
from wf_vit.train import parallel, steps
from wf_vit.train.config import default_config, resolve

INFO = DataInfo(("a", "b", "c"), {"train": 100}, (8, 8))
MACHINES = {machine.name: machine for machine in pods.MACHINES}
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1}


def tiny_config(model):
    config = default_config(model, "mu/4")
    config.model.update(width=16, depth=1, mlp_dim=16, dtype="float32")
    config.data.image_size = 8
    config.batch_size = 8
    return config


def all_reduced(program):
    """Returns the bytes of all results of all-reduces, which are those of operands."""
    total = 0
    for shapes in re.findall(r"= (\S.*?) all-reduce(?:-start)?\(", program):
        for kind, sides in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            total += BYTES[kind] * int(np.prod([int(x) for x in sides.split(",") if x]))
    return total


@pytest.mark.parametrize(
    ("model", "accumulate_steps"),
    [("windowfree", 2), slow("windowfree", 1), slow("vit", 1), slow("vit", 2)],
)
def test_the_bytes_are_those_of_the_compiled_update(model, accumulate_steps):
    config = tiny_config(model)
    config.accumulate_steps = accumulate_steps
    training = resolve(config, INFO)
    step = functools.partial(
        steps.train_step,
        model=training.model,
        optimizer=training.optimizer,
        objective=training.objective,
        axis=parallel.AXIS,
    )
    devices = jax.local_device_count()
    assert devices > 1
    batch = {
        "image": np.zeros((devices, 2, 8, 8, 3), np.uint8),
        "label": np.zeros((devices, 2), np.int32),
    }
    mapped = jax.pmap(step, parallel.AXIS, in_axes=(None, 0), out_axes=None)
    program = mapped.lower(training.start(), batch).compile().as_text()
    counted = pods.reduced_bytes(training, 2)
    assert counted == all_reduced(program)
    gradients = sum(4 * x.size for x in jax.tree.leaves(training.params))
    # The loss and top-1; with fields, their area.
    assert counted - gradients == (12 if model == "windowfree" else 8)


def test_a_ring_sends_each_byte_twice_but_for_its_own_part():
    machine = MACHINES["TPU v5e"]
    assert machine.bandwidth == pytest.approx(1e11)
    assert machine.seconds(10**9, 2) == pytest.approx(0.01)
    assert machine.seconds(10**9, 256) == pytest.approx(0.02 * 255 / 256)


def test_a_host_reduces_before_it_sends():
    within, across = (
        MACHINES[name] for name in ("H100, NVLink", "H100, 100 Gbit Ethernet")
    )
    assert across.seconds(10**9, 8) == within.seconds(10**9, 8)
    extra = across.seconds(10**9, 32) - across.seconds(10**9, 8)
    assert extra == pytest.approx(2 * 3 / 4 * 10**9 / 12.5e9)


def test_rows_have_both_batches_and_shares_between_0_and_1():
    result = pods.on_paper(
        tiny_config("vit"), INFO, devices=[2, 8], per_device=4, mfu=0.5
    )
    batches = {(row["devices"], row["batch"]) for row in result["rows"]}
    assert batches == {(2, 8), (8, 8), (8, 32)}
    assert all(0 < row["share"] < 1 for row in result["rows"])
    assert result["forward_flops"] > 0
    assert "| 8 | 32 |" in pods.table([result], 0.5)


@pytest.mark.parametrize(
    ("devices", "message"), [(3, "cannot share"), (12, "hosts of 8")]
)
def test_devices_that_cannot_be(devices, message):
    config = tiny_config("vit")
    config.batch_size = 24 if devices == 12 else 8
    with pytest.raises(UsageError, match=message):
        pods.on_paper(config, INFO, devices=[devices], per_device=4, mfu=0.5)


def test_configs_are_files():
    config = pods.open_config("configs/vit.py", "B/16")
    assert (config.model.name, config.model.variant) == ("vit", "B/16")
    with pytest.raises(UsageError, match="no config"):
        pods.open_config("configs/none.py", "B/16")
