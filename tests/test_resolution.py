"""The benchmark of other resolutions: every run, every size, both kinds of fields."""

import jax.numpy as jnp
import numpy as np

from benchmarks import resolution, sweep
from tests.networks import random_params
from tests.runs import small_winft, write_run
from wf_vit.models import registry
from wf_vit.models.pretrained import load


def test_runs_are_evaluated_at_all_sizes(tmp_path):
    model = small_winft(num_classes=3, image_size=16)
    write_run(tmp_path / "winft", model, random_params(model))
    plain = registry.rebuild(model, registry.ModelConfig("vit", dtype="float32"))
    write_run(tmp_path / "vit", plain, random_params(plain))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    loaded = load(tmp_path / "winft")
    logits, _ = loaded.model.apply(
        {"params": loaded.params}, jnp.asarray(loaded.preprocess(list(images)))
    )
    labels = np.array(logits.argmax(-1))
    labels[0] = (labels[0] + 1) % 3
    runs = [str(tmp_path / name) for name in ("winft", "vit")]
    rows = resolution.evaluate(runs, sweep.Split(images, labels), (1.0, 2.0))
    assert [row["fields"] for row in rows] == [resolution.SCALED, resolution.LEFT, ""]
    for row in rows[:2]:
        assert row["top1"]["1"] == 0.75
    assert set(rows[2]["top1"]) == {"1", "2"}
    text = resolution.table(rows)
    assert "| 75.0 |" in text
    assert len(text.splitlines()) == 5
