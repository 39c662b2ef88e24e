"""Arrays on their way to a file and back."""

import numpy as np

from tests.explanation.example import arrays_of
from wf_vit.explanation.explanation import Explanation


def test_what_is_saved_is_loaded(run):
    folder = run / "images/a.png"
    explanation = Explanation.load(folder)
    explanation.save(run / "copy")
    first, second = arrays_of(run, "a.png"), np.load(run / "copy/data.npz")
    assert set(first) == set(second.files)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    assert explanation.indicator == "propagated"
