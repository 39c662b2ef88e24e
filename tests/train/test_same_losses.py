"""The losses of a run do not depend on how many devices and processes share it."""

import dataclasses
import functools

import jax
import numpy as np

from tests.data.test_bad_data import bad_image, bad_label, rewrite
from wf_vit.data.digits import prepared_builder
from wf_vit.train import loop, parallel, steps
from wf_vit.train.reporter import read_jsonl


def losses(run, processes, count):
    """Returns the losses of the first steps, all devices of so many processes.

    One process trains on one device here, more on as many devices, each of which gets
    what the process of its number would read.
    """
    objective = dataclasses.replace(run.training.objective, guidance=None)
    step = functools.partial(
        steps.train_step,
        model=run.training.model,
        optimizer=run.training.optimizer,
        objective=objective,
        axis=parallel.AXIS,
    )
    if processes == 1:
        update = jax.jit(parallel.on_one_device(step))
    else:
        update = jax.pmap(step, parallel.AXIS, in_axes=(None, 0), out_axes=None)
    streams = [
        run.data.train_batches(
            batch_size=run.batch_size,
            seed=objective.seed,
            process_index=index,
            process_count=processes,
        )
        for index in range(processes)
    ]
    state, found = run.training.start(), []
    for _ in range(count):
        parts = [next(stream) for stream in streams]
        batch = parts[0]
        if processes > 1:
            batch = {name: np.stack([p[name] for p in parts]) for name in batch}
        state, metrics = update(state, batch)
        found.append(float(metrics["loss"]))
    return found


def test_one_device_and_four_processes_have_the_same_losses(digits_config):
    """With flips and mixup; batches straddle the end of an epoch."""
    digits_config.data.train = "train[:101]"
    digits_config.optimizer.learning_rate = 1e-3
    run = loop.open_run(digits_config)
    one = losses(run, 1, 12)
    assert len(set(one)) == 12
    np.testing.assert_allclose(losses(run, 4, 12), one, rtol=0, atol=1e-5)


def test_what_is_skipped_is_counted_in_the_metrics(
    digits_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "save_figures", lambda *_, **__: None)
    builder = prepared_builder(str(tmp_path / "data"))
    for split, change in {"train": bad_label, "test": bad_image}.items():
        (path,) = builder.info.splits[split].filepaths
        rewrite(str(path), change)
    digits_config.data.data_dir = str(tmp_path / "data")
    digits_config.data.train = "train[:32]"
    digits_config.data.on_error = "skip"
    digits_config.log_steps = 2
    loop.train(digits_config, tmp_path / "run")
    rows = read_jsonl(tmp_path / "run")
    # An epoch in each window of two steps, and one bad example in each epoch.
    assert [
        r["train/examples_skipped"] for r in rows if "train/examples_skipped" in r
    ] == [1, 1]
    assert [
        r["test/examples_skipped"] for r in rows if "test/examples_skipped" in r
    ] == [1, 1]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
