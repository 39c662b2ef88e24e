"""The overlap of fields, on masks whose overlap is known."""

import jax.numpy as jnp
import numpy as np

from benchmarks import field_overlap


def test_the_largest_keys_of_every_query():
    score = jnp.asarray([[[0.1, 0.3, 0.2], [3.0, 1.0, 2.0], [0.0, -1.0, -2.0]]])
    expected = [[[0, 1, 1], [1, 0, 1], [1, 1, 0]]]
    np.testing.assert_array_equal(field_overlap.largest(score, 2), np.bool_(expected))


def test_overlap_is_the_intersection_over_the_union_image_by_image():
    rows = jnp.asarray([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]], bool)
    masks = jnp.broadcast_to(rows[None, :, None], (2, 3, 4, 4))  # [L, B, P, P]
    first = jnp.broadcast_to(rows[:1, None], masks.shape)
    overlap = field_overlap.overlap(first, masks)
    np.testing.assert_allclose(overlap, [1, 1 / 3, 0], atol=1e-6)
    # Layers count alike.
    half = first.at[1].set(~first[1])
    np.testing.assert_allclose(field_overlap.overlap(first, half), 0.5, atol=1e-6)
