"""The task on digits: every protocol, a new one, a kill in between, and its errors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.cases import slow
from tests.runs import small_winft, write_run
from tests.verify.conftest import noisy_params
from wf_vit import verify
from wf_vit.errors import UsageError
from wf_vit.models import pretrained
from wf_vit.verify import report, task
from wf_vit.verify.faithfulness import INDICATORS
from wf_vit.verify.groups import IN_UNITS, PREDICTORS, SHARES
from wf_vit.verify.pixels import FILLS, STEPS
from wf_vit.verify.removal import RULES as REMOVAL_RULES
from wf_vit.verify.windows import RULES

MEASURES = ("top1", "cosine", "patch_cosine")
KINDS = ("predicted", "true")
CURVES = (3, 10, len(FILLS), 2, STEPS + 1)
# Of each protocol: the shapes of its outcomes, the rows of its tables, its figures.
EXPECTED = {
    "windows": (
        {measure: (10, len(RULES), 2) for measure in MEASURES},
        RULES,
        ("windows",),
    ),
    "removal": (
        {measure: (7, 2, len(REMOVAL_RULES), 1) for measure in MEASURES},
        REMOVAL_RULES,
        tuple(f"removal_{measure}" for measure in MEASURES),
    ),
    "pixels": (
        {f"{kind}_{of}": CURVES for kind in KINDS for of in ("probability", "top1")},
        ("impact", "effect on true class", "attention", "rollout", "random"),
        tuple(f"pixels_{kind}_{fill}" for kind in KINDS for fill in FILLS),
    ),
    "faithfulness": (
        {"correlation": (1, 2, len(INDICATORS), 2)},
        INDICATORS,
        ("faithfulness",),
    ),
    "groups": (
        {
            "correlation": (2, 2, len(SHARES), len(PREDICTORS)),
            "ratio": (2, 2, len(SHARES), len(IN_UNITS)),
        },
        PREDICTORS,
        ("groups",),
    ),
}


class Toy:
    """The smallest protocol: the mean of each image, and its share of the luck."""

    needs_head = False

    def __init__(self, subject, config):
        del subject, config

    def measure(self, case, count):
        luck = jax.random.uniform(jax.random.fold_in(case.key, 9), (count,))
        bright = case.images[:count].mean((1, 2, 3))
        return {"brightness": np.asarray(bright), "luck": np.asarray(luck)}

    def summarize(self, outcomes, estimate):
        return {name: report.nested(estimate(o)) for name, o in outcomes.items()}

    def tables(self, summary, images):
        yield f"**Toy**, {images} images: {report.number(summary['luck'], 'cosine')}"

    def figures(self, summary):
        yield "toy", Figure(figsize=(1, 1))


def outcomes(folder):
    files = sorted((folder / "outcomes").glob("*.npz"))
    arrays = [dict(np.load(path)) for path in files]
    names = sorted({name for part in arrays for name in part})
    return {n: np.concatenate([p[n] for p in arrays if n in p]) for n in names}


@pytest.mark.parametrize("protocol", EXPECTED)
def test_a_protocol_leaves_outcomes_numbers_tables_and_figures(
    config, tmp_path, protocol
):
    config.protocols = (protocol,)
    results = verify.verify(config, tmp_path)
    written = json.loads((tmp_path / "verify.json").read_text())
    assert written == json.loads(json.dumps(results))
    images = config.num_images[protocol]
    assert written["images"] == {protocol: images}
    found = outcomes(tmp_path)
    shapes, rules, figures = EXPECTED[protocol]
    assert {name: outcome.shape for name, outcome in found.items()} == {
        "whole/top1": (images,),
        **{f"{protocol}/{measure}": shape for measure, shape in shapes.items()},
    }
    table = (tmp_path / "table.md").read_text()
    assert f"**{protocol.capitalize()}**, {images} images" in table
    for rule in rules:
        assert f"| {rule} |" in table
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {f"{name}.{kind}" for name in figures for kind in ("png", "pdf")}
    if protocol == "windows":
        _numbers_are_those_of_their_rule(written["windows"], found["windows/cosine"])


@pytest.mark.parametrize("protocol", ["tendency", slow("class_maps")])
def test_what_has_no_number_stops_nothing(config, tmp_path, protocol):
    """No patch of the last layer hears another for CLS's sake; Grad-CAM may be 0."""
    model = small_winft(num_classes=10, image_size=16, cls_token=True, pool="cls")
    write_run(tmp_path / "cls", model, noisy_params(model))
    config.update(weights=str(tmp_path / "cls"), target="cls", protocols=(protocol,))
    found = verify.verify(config, tmp_path / "out")
    assert (tmp_path / "out/table.md").exists()
    if protocol == "tendency":
        nulls = found[protocol]["nulls"].values()
        assert None in [null["correlation"]["by_layer"][-1] for null in nulls]


def test_a_verdict_names_the_controls_without_a_number():
    there = {"mean": 0.2, "low": 0.1, "high": 0.3}
    none = dict.fromkeys(there)
    margins = {"a": {"0.5": there, "0.1": none}, "b": {"0.5": none, "0.1": none}}
    assert report.verdict("own", margins, "cosine") == (
        "Own: at 50 % it beats every control, the nearest is a (+0.2 ± 0.1) (no number "
        "for b); at 10 % it cannot be compared (no number for a, b)."
    )


def _numbers_are_those_of_their_rule(summary, cosine):
    by_rule = summary["measures"]["cosine"]["nearest"]
    expected = cosine[:, RULES.index("nearest"), 1].mean()
    assert by_rule["0.25"]["mean"] == pytest.approx(expected, rel=1e-4)
    # The margin is over the controls, not the other way round.
    own = cosine[:, 0, 1].mean()
    margin = summary["margins"]["cosine"]["nearest"]["0.25"]["mean"]
    assert margin == pytest.approx(own - expected, rel=1e-3)


def test_a_new_protocol_needs_no_more_than_its_name_in_the_registry(
    config, headless_run, tmp_path, monkeypatch
):
    monkeypatch.setitem(verify.PROTOCOLS, "toy", Toy)
    config.update({"protocols": ("toy",), "weights": str(headless_run)})
    config.split = "test[:8]"
    written = verify.verify(config, tmp_path)
    # The config does not know it: all images there are.
    assert written["images"] == {"toy": 8}
    bright = outcomes(tmp_path)["toy/brightness"]
    assert bright.shape == (8,)
    summary = json.loads((tmp_path / "verify.json").read_text())["toy"]
    assert summary["brightness"]["mean"] == pytest.approx(bright.mean(), rel=1e-4)
    assert "**Toy**, 8 images: 0." in (tmp_path / "table.md").read_text()
    assert (tmp_path / "figures" / "toy.png").stat().st_size
    assert (tmp_path / "figures" / "toy.pdf").stat().st_size


def test_a_kill_changes_nothing(config, headless_run, tmp_path, monkeypatch):
    measured = []

    class Counts(Toy):
        def measure(self, case, count):
            measured.append(count)
            return super().measure(case, count)

    class Dies(Counts):
        def measure(self, case, count):
            if measured:
                raise KeyboardInterrupt
            return super().measure(case, count)

    def run(long, name):
        with monkeypatch.context() as patch:
            patch.setitem(verify.PROTOCOLS, "long", long)
            patch.setitem(verify.PROTOCOLS, "short", Toy)
            verify.verify(config, tmp_path / name)

    with config.unlocked():
        config.num_images = {"long": 10, "short": 7}
    config.update({"protocols": ("long,short",), "weights": str(headless_run)})
    run(Counts, "whole")
    assert measured == [6, 4]
    measured.clear()
    with pytest.raises(KeyboardInterrupt):
        run(Dies, "killed")
    assert not (tmp_path / "killed" / "verify.json").exists()
    run(Counts, "killed")
    # The second batch only.
    assert measured == [6, 4]
    whole, killed = (outcomes(tmp_path / name) for name in ("whole", "killed"))
    assert {name: len(outcome) for name, outcome in whole.items()} == {
        **dict.fromkeys(("long/brightness", "long/luck"), 10),
        **dict.fromkeys(("short/brightness", "short/luck"), 7),
    }
    assert len(np.unique(whole["long/luck"])) == 10
    jax.tree.map(np.testing.assert_array_equal, whole, killed)
    first, second = (
        json.loads((tmp_path / name / "verify.json").read_text())
        for name in ("whole", "killed")
    )
    assert first == second


def test_without_a_head_what_needs_one_is_left_out(
    config, headless_run, tmp_path, monkeypatch
):
    monkeypatch.setitem(verify.PROTOCOLS, "toy", Toy)
    config.update({"protocols": ("toy", "pixels"), "weights": str(headless_run)})
    config.split = "test[:2]"
    assert verify.verify(config, tmp_path / "toy")["images"] == {"toy": 2}
    config.protocols = ("pixels",)
    with pytest.raises(UsageError, match="no head, which the protocol pixels needs"):
        verify.verify(config, tmp_path / "pixels")


def test_no_names_stand_for_all_protocols(config, headless_run, tmp_path, monkeypatch):
    monkeypatch.setattr(task, "PROTOCOLS", {"one": Toy, "two": Toy})
    config.update({"protocols": (), "weights": str(headless_run)})
    config.split = "test[:2]"
    assert verify.verify(config, tmp_path)["images"] == {"one": 2, "two": 2}


def test_outcomes_of_other_settings_are_not_mixed(tmp_path):
    params = {"kernel": jnp.ones(3)}
    store = task.Store(tmp_path, {"seed": 0, "bootstrap_samples": 9}, params)
    store.save(0, {"a/b": np.zeros(2)})
    task.Store(tmp_path, {"seed": 0, "bootstrap_samples": 99}, params)
    with pytest.raises(UsageError, match="seed was 0 and is now 1"):
        task.Store(tmp_path, {"seed": 1, "bootstrap_samples": 9}, params)
    with pytest.raises(UsageError, match="parameters_sha256"):
        task.Store(tmp_path, {"seed": 0}, {"kernel": jnp.zeros(3)})


def test_stored_batches_come_back_in_their_order(tmp_path):
    store = task.Store(tmp_path, {}, {})
    store.save(10, {"a": np.array([3.0])})
    store.save(9, {"a": np.array([1.0, 2.0]), "b": np.array([7.0])})
    assert store.has(9)
    assert not store.has(0)
    np.testing.assert_array_equal(store.load()["a"], [1, 2, 3])
    np.testing.assert_array_equal(store.load()["b"], [7])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": ""}, "--config.weights"),
        ({"protocols": ("window",)}, "name some of windows"),
        ({"protocols": ("",)}, "name some of windows"),
        ({"layers": (0, 2)}, "0 to 1"),
        ({"image_size": 18}, "18"),
        ({"split": "validation"}, "validation"),
    ],
)
def test_says_what_is_wrong(config, tmp_path, settings, message):
    config.update(settings)
    with pytest.raises(UsageError, match=message):
        verify.verify(config, tmp_path)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("known", "names", "same"),
    [
        (("cat", "dog"), ("cat", "dog"), True),
        (("cat", "dog"), ("dog", "cat"), False),
        (("apple", "leaf"), ("leaf", "pear"), False),
        (("cat", "dog"), ("n02121808", "n02084071"), True),
        ((), ("cat", "dog"), True),
        ((), ("cat", "dog", "sky"), False),
    ],
)
def test_labels_count_only_if_the_classes_are_the_same(known, names, same):
    model = small_winft(num_classes=2, image_size=(8, 8))
    loaded = pretrained.Pretrained(model, {}, None, known)
    assert task.tells_apart(loaded, names) == same
