"""Training: a pure step, the one pmap that spreads it, and the loop around them.

All but ``loop`` and ``reporter`` need no
TensorFlow.
"""
