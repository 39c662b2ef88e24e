"""Data: records read and cropped on the host, augmented on the device.

``config`` names every setting, ``pipeline`` (which needs TensorFlow) makes the
batches, ``augment`` (which does not) works on them inside a jitted step. Nothing is
imported here, so that a machine without TensorFlow can import ``data.augment``.
"""
