"""TensorFlow as the data take it: without Keras, which is there for who asks for it."""

import subprocess
import sys

CODE = """
import os, sys
from pathlib import Path
from wf_vit.data.tensorflow import tf
from wf_vit.data import pipeline
from wf_vit.train import loop, reporter

with reporter.Reporter(
    Path(sys.argv[1]), step=0, total=1, batch_size=1, active=True
) as report:
    report.write(1, {"train/loss": 1.0})
assert not {"keras", "sklearn"} & set(sys.modules), sorted(sys.modules)
assert "TF_USE_LEGACY_KERAS" not in os.environ
assert tf.keras.layers.Dense(3)(tf.ones((1, 2))).shape == (1, 3)
"""


def test_keras_is_imported_when_it_is_used_and_not_before(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("events.out.tfevents.*"))
