"""Protocols that check whether the indicators say what they claim to say.

A protocol takes what the model predicts as functions, and arrays; it knows neither
models nor data sets. Each compares what an indicator chooses with controls of equal
size:

- ``faithfulness``: the ranks of interactions, against real cuts;
- ``windows``: all layers' attention restricted to the strongest interactions;
- ``removal``: the least telling patches gathered out, from some layer on;
- ``pixels``: patches of the image filled, in the order of a map.

``wf_vit.verify.run`` wires a checkpoint and a data set to them: the task "verify".
"""

from wf_vit.verify.answers import Answer, agreement
from wf_vit.verify.bootstrap import Interval, intervals
from wf_vit.verify.faithfulness import (
    TARGETS,
    CutImpact,
    Faithfulness,
    Predict,
    cut_impact,
    faithfulness,
    rank_correlation,
    sample_interactions,
)
from wf_vit.verify.pixels import auc, blurred, mean_filled, pixels
from wf_vit.verify.removal import patch_scores, removal
from wf_vit.verify.windows import masks, windows

__all__ = [
    "TARGETS",
    "Answer",
    "CutImpact",
    "Faithfulness",
    "Interval",
    "Predict",
    "agreement",
    "auc",
    "blurred",
    "cut_impact",
    "faithfulness",
    "intervals",
    "masks",
    "mean_filled",
    "patch_scores",
    "pixels",
    "rank_correlation",
    "removal",
    "sample_interactions",
    "windows",
]
