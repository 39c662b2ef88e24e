"""Measure, show and train from the patch interactions of vision transformers.

Import the part you need; nothing is imported here, so that
``from wf_vit import indicators`` stays light.
"""

__version__ = "0.1.0"
