"""What is reported of a window of steps, also of one that two settings share."""

import jax.numpy as jnp
import pytest

from wf_vit.train.config import Progress
from wf_vit.train.window import Window

ROW = {"loss": 2.0, "updates_skipped": 0.0}


def test_a_window_may_have_other_metrics_since_a_resume():
    earlier = {**ROW, "guidance_loss": 0.5, "examples_skipped": 3.0}
    done = Progress(step=1, examples=8, window=(earlier,))
    window = Window(done, batch_size=8, max_skipped_updates=0)
    now = {**ROW, "loss": 4.0, "field_area": 0.25}
    window.add(2, {name: jnp.float32(value) for name, value in now.items()})
    means = window.close()
    assert means.pop("train/images_per_second") > 0
    assert means == pytest.approx(
        {
            "train/loss": 3.0,
            "train/guidance_loss": 0.5,
            "train/field_area": 0.25,
            "train/examples_skipped": 3.0,
        }
    )
