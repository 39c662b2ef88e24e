"""From outcomes to numbers and sentences: signs, orders and places."""

import numpy as np
import pytest

from configs import verify as verify_config
from wf_vit.models.vit import ViT
from wf_vit.verify.draw import drawings
from wf_vit.verify.removal import RULES as REMOVAL_RULES
from wf_vit.verify.subject import Subject
from wf_vit.verify.summary import best_layer, summarize
from wf_vit.verify.table import table
from wf_vit.verify.windows import RULES

IMAGES = 40
RNG = np.random.default_rng(0)


@pytest.fixture
def subject():
    config = verify_config.get_config()
    config.kept, config.removed = (0.5, 0.1), (0.25, 0.5)
    config.bootstrap_samples = 200
    model = ViT(
        num_classes=10,
        image_size=(8, 8),
        patch_size=(4, 4),
        width=8,
        depth=3,
        mlp_dim=8,
        num_heads=2,
    )
    return Subject(model=model, params={}, layers=(0, 2), labelled=True, config=config)


def noisy(means):
    """Outcomes of all images around means, ``[images, ...]``."""
    noise = 0.01 * RNG.normal(size=(IMAGES, *np.shape(means)))
    return (np.asarray(means) + noise).astype(np.float32)


def windows_outcomes():
    means = np.full((len(RULES), 2), 0.5)
    means[0] = 0.9, 0.6
    means[RULES.index("random")] = 0.4, 0.7
    return {"windows/cosine": noisy(means)}


def report(outcomes, subject):
    results = {
        "command": "python main.py",
        "machine": {"cpus": 2, "device": "cpu"},
        "images": {name.partition("/")[0]: IMAGES for name in outcomes},
        **summarize(outcomes, subject),
    }
    return results, table(results)


def test_says_which_control_was_not_beaten(subject):
    results, text = report(windows_outcomes(), subject)
    margins = results["windows"]["margins"]["cosine"]
    assert "fields fused" not in margins  # No control, but another of our rules.
    assert margins["random"]["0.5"]["mean"] == pytest.approx(0.5, abs=0.02)
    assert margins["random"]["0.1"]["mean"] == pytest.approx(-0.1, abs=0.02)
    assert margins["random"]["0.1"]["high"] < 0
    (verdict,) = (line for line in text.splitlines() if line.startswith("Fields"))
    at_half, at_tenth = verdict.split(";")
    assert "at 50 % it beats every control" in at_half
    assert "at 10 % it does not beat random (-0." in at_tenth
    assert "nearest (" not in at_tenth
    row = next(line for line in text.splitlines() if line.startswith("| random"))
    cells = row.split("|")
    assert "**" not in cells[2]
    assert "**" in cells[3]


def test_best_layer_is_that_of_the_widest_margin(subject):
    means = np.full((2, len(REMOVAL_RULES), 2), 0.5)
    means[0, 0] = 0.52
    means[1, 0] = 0.6
    # A higher level is no wider margin.
    means[0] += 0.3
    outcomes = {
        "removal/cosine": noisy(means),
        "removal/top1": noisy(means[::-1]),
    }
    results, text = report(outcomes, subject)
    best = results["removal"]["best_layer"]
    assert best["cosine"]["least discriminative"] == 2
    assert best["top1"]["least discriminative"] == 0
    assert best_layer(results["removal"]) == 0
    assert text.index("before layer 0") < text.index("before layer 2")
    measured = results["removal"]["measures"]["cosine"]
    assert measured["2"]["least discriminative"]["0.25"]["mean"] == pytest.approx(
        0.6, abs=0.01
    )


def test_areas_belong_to_their_order_and_curves_to_their_map(subject):
    shape = (len(subject.maps), 2, 2, 11)
    falling, late = np.linspace(1, 0, 11), np.array([1.0] * 10 + [0.0])
    curves = np.empty((IMAGES, *shape), np.float32)
    curves[..., 0, :], curves[..., 1, :] = falling, late
    curves[:, 1] *= 0.5
    names = ("predicted", "true")
    outcomes = {f"pixels/{kind}_probability": curves for kind in names}
    outcomes |= {f"pixels/{kind}_top1": curves for kind in names}
    results, text = report(outcomes, subject)
    areas = results["pixels"]["auc"]["true"]
    assert areas["deletion"]["impact"]["mean"]["mean"] == pytest.approx(0.5)
    assert areas["insertion"]["impact"]["blur"]["mean"] == pytest.approx(0.95)
    own = areas["negative perturbation"]["effect on predicted class"]["mean"]
    assert own["mean"] == pytest.approx(0.475)
    # The map of another class than the one that is asked for is left out.
    true = text[text.index("| true class, mean fill") :]
    assert "effect on true class" in true
    assert "effect on predicted class" not in true
    figure = dict(drawings(results))["pixels_predicted_mean"]
    insertion = figure.axes[1]
    assert insertion.get_title() == "insertion"
    # Read backwards: nothing is shown on the left.
    x, y = insertion.lines[0].get_data()
    assert y[np.argmin(x)] == 0
    assert y[np.argmax(x)] == 100
