"""Areas under perturbation curves that are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import verify as verify_config
from wf_vit.errors import UsageError
from wf_vit.verify.maps import importance_maps, map_names
from wf_vit.verify.pixels import (
    Pixels,
    auc,
    blurred,
    mean_filled,
    pixels,
)

# 10 patches of 2 x 3 pixels, so that each step fills one.
GRID, PATCH = (2, 5), (2, 3)
SHARES = np.array([[0.28, 0.02, 0.2, 0.1, 0.0, 0.06, 0.16, 0.04, 0.1, 0.04]])


def bright_images():
    """Images whose patches are as bright as their shares."""
    patches = SHARES.reshape(-1, *GRID)
    values = patches.repeat(PATCH[0], axis=1).repeat(PATCH[1], axis=2)
    return jnp.asarray(np.repeat(values[..., None], 3, axis=-1), jnp.float32)


def brightness(images):
    """A classifier whose probability of class 0 is the sum of the patches left."""
    rest = images.sum((1, 2, 3)) / (3 * PATCH[0] * PATCH[1])
    return jnp.log(jnp.maximum(jnp.stack([rest, 1 - rest], axis=-1), 1e-9))


def measure(maps, labels=None):
    images = bright_images()
    return pixels(
        brightness,
        images,
        {name: jnp.asarray(importance) for name, importance in maps.items()},
        {"black": jnp.zeros_like(images)},
        grid=GRID,
        labels=labels,
    )


def trapezoid(curve):
    curve = np.asarray(curve)
    return (0.5 * curve[0] + curve[1:-1].sum() + 0.5 * curve[-1]) / 10


def test_areas_of_a_classifier_that_adds_up_patches():
    found = measure({"right": SHARES, "wrong": -SHARES})
    probability = found["predicted_probability"][0]
    assert probability.shape == (2, 1, 2, 11)
    falling = np.sort(SHARES[0])[::-1]
    deletion = 1 - np.concatenate([[0], np.cumsum(falling)])
    negative = 1 - np.concatenate([[0], np.cumsum(falling[::-1])])
    np.testing.assert_allclose(probability[0, 0, 0], deletion, atol=5e-6)
    np.testing.assert_allclose(probability[0, 0, 1], negative, atol=5e-6)
    np.testing.assert_allclose(
        auc(probability[0, 0]),
        [trapezoid(deletion), trapezoid(negative)],
        atol=5e-6,
    )
    # A map upside down fills in the opposite order.
    np.testing.assert_allclose(
        auc(probability[1, 0]), auc(probability[0, 0])[::-1], atol=5e-6
    )
    # Class 0 stays the top one until less than half of the brightness is left.
    np.testing.assert_array_equal(
        found["predicted_top1"][0, 0, 0, 0], deletion > 0.5 - 1e-6
    )


def test_insertion_is_deletion_of_the_least_important_read_backwards():
    probability = measure({"right": SHARES})["predicted_probability"][0, 0, 0]
    restored = np.concatenate([[0], np.cumsum(np.sort(SHARES[0])[::-1])])
    np.testing.assert_allclose(probability[1][::-1], restored, atol=5e-6)


def test_the_true_class_may_be_another_than_the_predicted_one():
    found = measure({"right": SHARES}, labels=jnp.array([1]))
    np.testing.assert_allclose(
        found["true_probability"], 1 - found["predicted_probability"], atol=5e-6
    )
    np.testing.assert_array_equal(found["true_top1"], 1 - found["predicted_top1"])


def test_area_of_a_line():
    assert auc(np.linspace(1, 0, 11)) == pytest.approx(0.5)
    assert auc(np.ones(11)) == pytest.approx(1)


def test_fills():
    images = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
    mean = mean_filled(images)
    assert mean.shape == images.shape
    np.testing.assert_allclose(mean[1, 3, 4], images[1].mean((0, 1)), rtol=1e-5)
    soft = blurred(images, (2, 3))
    # A constant stays, also at the border; a point becomes a Gaussian.
    constant = blurred(jnp.ones_like(images), (2, 3))
    np.testing.assert_allclose(constant, 1, rtol=1e-5)
    assert soft.std() < 0.5 * images.std()
    point = jnp.zeros((1, 41, 61, 3)).at[0, 20, 30].set(1)
    spread = blurred(point, (2, 3))[0, :, :, 0]
    rows, columns = (np.arange(n) - n // 2 for n in spread.shape)
    np.testing.assert_allclose(spread.sum(1) @ rows**2, 4, rtol=1e-2)
    np.testing.assert_allclose(spread.sum(0) @ columns**2, 9, rtol=1e-2)


def test_maps_and_grids_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="9 patches"):
        measure({"short": SHARES[:, :9]})
    images = bright_images()
    with pytest.raises(UsageError, match="no grid"):
        pixels(brightness, images, {}, {}, grid=(3, 5), labels=None)


def test_maps_are_of_their_class(case):
    classes = {"predicted": case.whole.logits.argmax(-1), "true": case.labels}
    maps = importance_maps(case, classes)
    assert tuple(maps) == map_names(classes)
    shape = (6, case.impact.shape[-1])
    assert {importance.shape for importance in maps.values()} == {shape}
    swapped = dict(zip(classes, reversed(classes.values()), strict=True))
    others = importance_maps(case, swapped)
    first, second = (f"effect on {kind} class" for kind in classes)
    np.testing.assert_array_equal(maps[first], others[second])
    assert (maps[first] != maps[second]).any()
    # Without a CLS token attention is what a patch receives from all patches.
    received = np.asarray(case.attention).mean(2).mean(-2).sum(0)
    np.testing.assert_allclose(maps["attention"], received, rtol=1e-5)


def test_areas_belong_to_their_order_and_curves_to_their_map(case, estimate):
    protocol = Pixels(case.subject, verify_config.get_config())
    names = ("predicted", "true")
    curves = np.empty((40, len(map_names(names)), 2, 2, 11), np.float32)
    falling, late = np.linspace(1, 0, 11), np.array([1.0] * 10 + [0.0])
    curves[..., 0, :], curves[..., 1, :] = falling, late
    curves[:, 1] *= 0.5
    outcomes = {
        f"{kind}_{of}": curves for kind in names for of in ("probability", "top1")
    }
    summary = protocol.summarize(outcomes, estimate)
    areas = summary["auc"]["true"]
    assert areas["deletion"]["impact"]["mean"]["mean"] == pytest.approx(0.5)
    assert areas["insertion"]["impact"]["blur"]["mean"] == pytest.approx(0.95)
    own = areas["negative perturbation"]["effect on predicted class"]["mean"]
    assert own["mean"] == pytest.approx(0.475)
    # The map of another class than the one that is asked for is left out.
    (true,) = (t for t in protocol.tables(summary, 40) if "| true class, mean" in t)
    assert "effect on true class" in true
    assert "effect on predicted class" not in true
    figure = dict(protocol.figures(summary))["pixels_predicted_mean"]
    insertion = figure.axes[1]
    assert insertion.get_title() == "insertion"
    # Read backwards: nothing is shown on the left.
    x, y = insertion.lines[0].get_data()
    assert y[np.argmin(x)] == 0
    assert y[np.argmax(x)] == 100
