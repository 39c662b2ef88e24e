"""A model and photographs to figures, data and pages.

``wf_vit.explain`` (`notebook`) does it in one line; the task ``explain`` (`task`) for
folders of photographs, going on where it was interrupted.
"""

from wf_vit.explanation.explanation import ClassEffect, Explanation
from wf_vit.explanation.notebook import Explained, explain

__all__ = ["ClassEffect", "Explained", "Explanation", "explain"]
