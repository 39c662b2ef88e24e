"""Training: a pure step, the one pmap that spreads it, and the loop around them.

``state``, ``steps``, ``schedule``, ``parallel``, ``guidance`` and ``teacher`` need no
TensorFlow.
"""
