"""Training: a pure step, the one pmap that spreads it, and the loop around them.

All modules but ``loop`` and ``reporter`` work without TensorFlow.
"""
