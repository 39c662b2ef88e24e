"""The task ``explain``: a checkpoint and photographs to figures, data and pages."""

from wf_vit.explanation.task import explain

__all__ = ["explain"]
