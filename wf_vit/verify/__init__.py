"""The task ``verify``: do the indicators say what they claim to say?

A protocol compares what an indicator chooses with controls of equal size. Each has a
file of its own, with its rules, measurement, summary, table and figures:

- ``windows``: the attention of all layers restricted to some interactions;
- ``removal``: patches gathered out, from some layer on;
- ``pixels``: patches of the image filled, in the order of a map;
- ``faithfulness``: the ranks of interactions, against real cuts;
- ``groups``: what is predicted of whole sets of interactions, against real cuts.

``PROTOCOLS`` names them, ``subject`` says what a protocol is, and ``task`` runs them on
a checkpoint and a data set.
"""

from wf_vit.verify.faithfulness import (
    TARGETS,
    Comparison,
    CutImpact,
    Predict,
    cut,
    cut_impact,
    faithfulness,
    rank_correlation,
    sample_interactions,
)
from wf_vit.verify.task import PROTOCOLS, verify

__all__ = [
    "PROTOCOLS",
    "TARGETS",
    "Comparison",
    "CutImpact",
    "Predict",
    "cut",
    "cut_impact",
    "faithfulness",
    "rank_correlation",
    "sample_interactions",
    "verify",
]
