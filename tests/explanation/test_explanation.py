"""The arrays of an image: against the library called by hand, and in their file."""

import jax
import numpy as np

from tests.explanation.example import GRID, SIZE, VIT, arrays_of, make_config
from wf_vit import fields, measure
from wf_vit import indicators as matrices
from wf_vit.explanation import images
from wf_vit.explanation.explanation import Explanation
from wf_vit.models import parameters, pretrained


def test_the_arrays_are_what_the_library_computes(run, photographs):
    loaded = pretrained.load(VIT, image_size=SIZE)
    # The first place of the second batch, of b.png and broken.jpg.
    arrays = arrays_of(run, "b.png")
    photograph = loaded.preprocess.fit(images.read(photographs / "b.png"))
    np.testing.assert_array_equal(arrays["photograph"], photograph)
    prepared = loaded.preprocess.normalize(photograph[None])
    recorded = measure.record(loaded.model, loaded.params, prepared)
    options = {"num_prefix_tokens": 1}
    attention, values = recorded.attention[:, 0], recorded.values[:, 0]
    propagated, _ = measure.propagate(
        loaded.model,
        loaded.params,
        prepared,
        target="tokens",
        num_probes=4,
        key=jax.random.fold_in(jax.random.key(0), 2),
    )
    expected = {
        "mean": attention.mean(1)[:, 1:, 1:],
        "knockout": matrices.knockout_impact(
            attention,
            values,
            *parameters.output_projection(loaded.model, loaded.params),
            **options,
        ),
        "propagated": propagated.impact[:, 0],
    }
    for name, impact in expected.items():
        np.testing.assert_allclose(
            arrays[f"impact/{name}"], impact, rtol=2e-4, atol=1e-7
        )
    mass = make_config().mass
    field = fields.responsive_field(propagated.impact[:, 0], GRID, mass=mass)
    for part, array in field._asdict().items():
        np.testing.assert_allclose(arrays[f"field/{part}"], array, atol=2e-4)
    np.testing.assert_allclose(
        arrays["discriminability"],
        fields.discriminability(propagated.impact[:, 0]),
        rtol=2e-4,
    )
    np.testing.assert_allclose(
        arrays["attention_distance"],
        matrices.mean_attention_distance(attention, grid=GRID, **options),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        arrays["relative_error"], propagated.relative_error[:, 0], rtol=1e-3
    )


def test_what_is_saved_is_loaded(run):
    folder = run / "images/a.png"
    explanation = Explanation.load(folder)
    explanation.save(run / "copy")
    first, second = arrays_of(run, "a.png"), np.load(run / "copy/data.npz")
    assert set(first) == set(second.files)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    assert explanation.indicator == "propagated"
