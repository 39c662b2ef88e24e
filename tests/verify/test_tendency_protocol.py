"""The protocol ``tendency``: nulls, regions and plants on cases that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import verify as verify_config
from wf_vit.fields import responsive_field
from wf_vit.grid import distances
from wf_vit.verify import tendency as protocol
from wf_vit.verify.tendency import INSIDE, NULLS, REGIONS, Tendency

GRID = (5, 6)
PATCHES = 30


def test_the_mean_kernel_of_a_stationary_impact_is_its_geometry():
    rows = np.exp(-distances(GRID) / 2)
    field = responsive_field(jnp.asarray(rows, jnp.float32), GRID)
    found = protocol.mean_kernel_geometry(rows[None], GRID)
    np.testing.assert_allclose(found[0], field.displacement, atol=1e-4)


def test_a_box_holds_the_patches_whose_centres_it_covers():
    extents = np.zeros((PATCHES, 4), np.float32)
    extents[8] = (1.2, 0.4, 0.9, 1.0)  # Row 1, column 2: left, top, right, bottom.
    inside = protocol.in_box(extents, GRID)
    np.testing.assert_array_equal(np.flatnonzero(inside[8]), [7, 8, 13, 14])
    np.testing.assert_array_equal(np.delete(inside, 8, 0).sum(-1), 1)


def test_regions_hold_what_they_are_said_to():
    share = np.full((1, 1, 4, 4), 0.1, np.float32)
    share[..., 3] = 0.7
    field = np.zeros((1, 1, 4, 4), bool)
    field[..., 3] = True
    held = protocol._inside(share, field, np.stack([~field, field]).astype(np.float32))
    np.testing.assert_allclose(held[:, :, 0, 0], [[0.3, 0, 0], [0.7, 1, 1]], atol=1e-6)


def test_alike_and_unlike_arrows():
    arrows = np.random.default_rng(0).normal(size=(3, 2, 40, 2))
    arrows[1] = 2 * arrows[0]
    found = protocol._correlations(arrows)
    assert found["largest"] == pytest.approx(1)
    assert np.mean(found["by_layer"]) == pytest.approx(found["mean"])
    assert 0.2 < found["mean"] < 0.5
    assert protocol._correlations(arrows[:1])["mean"] == 0
    # A layer without arrows, as the last one where only CLS counts.
    arrows[:, 1] = 0
    without = protocol._correlations(arrows)
    assert without["by_layer"] == [pytest.approx(without["mean"]), None]


def test_a_planted_tendency_of_a_patchs_size_is_found():
    rows = protocol.planted()
    moderate = [row for row in rows if row["strength"] <= 30]
    assert len(moderate) == 4
    for row in moderate:
        assert row["worst"] < 0.05
        assert row["slope"] == pytest.approx(1, abs=0.05)


def test_all_numbers_of_a_batch(case, estimate):
    subject = Tendency(case.subject, verify_config.get_config())
    outcomes = subject.measure(case, 2)
    depth = case.subject.model.depth
    patches = np.prod(case.subject.model.grid)
    shape = (len(case.images), 1 + len(NULLS), depth, patches, 2)
    assert outcomes["arrows"].shape == shape
    assert outcomes["inside"].shape == (len(case.images), 2, 3, depth)
    summary = subject.summarize(outcomes, estimate)
    assert set(summary["nulls"]) == set(NULLS)
    with_popularity = summary["nulls"]["fitted, with popularity"]["excess_share"]
    # It leaves nothing that points to the middle, which geometry nearly does.
    assert with_popularity["largest"] < 0.1
    mask = summary["regions"][REGIONS[1]]
    assert mask[INSIDE[0]]["mean"] >= protocol.MASS
    assert mask[INSIDE[1]]["mean"] == 1
    text = "\n".join(subject.tables(summary, 2))
    assert "fitted, with popularity" in text
    ((name, figure),) = subject.figures(summary)
    assert name == "tendency"
    assert len(figure.axes) == 3
    jax.tree.map(np.asarray, summary)  # Numbers and lists only, as JSON wants them.
