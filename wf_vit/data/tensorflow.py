"""TensorFlow and TFDS, without Keras: all modules here take both from this one.

At the end of its import TensorFlow imports Keras, and Keras imports scikit-learn and
pyplot: two fifths of the CPU time of the import, for what nothing here uses.
"""

import importlib.util
import os

# Makes TensorFlow import the package tf_keras in place of Keras, and go on without
# where there is none. It is unset again at once: who uses ``tf.keras`` gets Keras then.
_LEGACY = "TF_USE_LEGACY_KERAS"

_unset = _LEGACY not in os.environ and importlib.util.find_spec("tf_keras") is None
if _unset:
    os.environ[_LEGACY] = "1"
try:
    import tensorflow as tf
    import tensorflow_datasets as tfds
finally:
    if _unset:
        del os.environ[_LEGACY]

__all__ = ["tf", "tfds"]
