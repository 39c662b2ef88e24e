"""Whole runs on real digits: resuming, evaluating, reporting, failing."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.cases import slow
from tests.networks import apply, random_params
from tests.runs import small_winft, write_run
from tests.train.conftest import tiny_digits
from wf_vit.errors import UsageError
from wf_vit.models import pretrained
from wf_vit.models.windowfree import FieldConfig, WindowFreeViT
from wf_vit.stops import Stopped
from wf_vit.train import config as resolving
from wf_vit.train import loop
from wf_vit.train.checkpoint import Checkpoints, chosen, restored
from wf_vit.train.reporter import Reporter, read_jsonl, save_config
from wf_vit.train.state import init_state
from wf_vit.train.window import NonFiniteLossError
from wf_vit.workdir import held


def draw_nothing(patch):
    patch.setattr(loop, "save_figures", lambda *_, **__: None)


@pytest.fixture
def no_figures(monkeypatch):
    """Runs draw nothing at their end, which takes longer than they do."""
    draw_nothing(monkeypatch)


def last_state(config, workdir, which="last"):
    template = loop.open_run(config).training.start()
    return restored(chosen(workdir, which), template)


def stop_after(config, steps):
    """The same run, interrupted: its schedule is still that of the whole."""

    class Interrupted(Exception):
        pass

    class Interrupting(Reporter):
        def advance(self, step):
            if step > steps:
                raise Interrupted

    return Interrupting, Interrupted


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("optimizer", ["adamw", slow("muon")])
def test_resuming_is_bit_for_bit(digits_config, tmp_path, monkeypatch, optimizer):
    digits_config.optimizer.name = optimizer
    loop.train(digits_config, tmp_path / "whole")
    reporter, interrupted = stop_after(digits_config, 2)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Reporter", reporter)
        with pytest.raises(interrupted):
            loop.train(digits_config, tmp_path / "parts")
    assert chosen(tmp_path / "parts", "last").arrays["step"] == 2
    # A row of a step that has no checkpoint yet is written again, not twice.
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "train/loss": 0.0}) + "\n")
    loop.train(digits_config, tmp_path / "parts")
    whole = last_state(digits_config, tmp_path / "whole")
    parts = last_state(digits_config, tmp_path / "parts")
    assert whole.step == parts.step == 4
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    rows = [
        [(row["step"], row.get("train/loss")) for row in read_jsonl(tmp_path / name)]
        for name in ("whole", "parts")
    ]
    assert rows[0] == rows[1]


@pytest.fixture
def compiled(monkeypatch):
    """How many programs each call of an update had to compile, in order."""
    counts = []
    updating = False
    map_update = loop.parallel.map_update

    def listen(event, seconds, **_):
        if updating and event.endswith("/backend_compile_duration"):
            counts[-1] += 1

    def spied(*arguments):
        update = map_update(*arguments)

        def call(*arguments):
            nonlocal updating
            counts.append(0)
            updating = True
            try:
                return update(*arguments)
            finally:
                updating = False

        return call

    monkeypatch.setattr(loop.parallel, "map_update", spied)
    # It stays, and hears nothing after the test: jax 0.8 has no way to take it back.
    jax.monitoring.register_event_duration_secs_listener(listen)
    return counts


@pytest.mark.usefixtures("no_figures")
def test_the_step_is_compiled_once_also_after_a_resume(
    digits_config, tmp_path, compiled
):
    """A state that came as host arrays made the second step compile again."""
    digits_config.total_steps = 3
    loop.train(digits_config, tmp_path)
    assert compiled == [1, 0, 0]
    compiled.clear()
    digits_config.total_steps = 6
    loop.train(digits_config, tmp_path)
    assert compiled == [1, 0, 0]


@pytest.fixture
def taken(monkeypatch):
    """The training examples that steps took, in order."""
    examples = []
    shard = loop.parallel.shard

    def spy(batch):
        if "mask" not in batch:
            examples.extend(image.tobytes() for image in batch["image"])
        return shard(batch)

    monkeypatch.setattr(loop.parallel, "shard", spy)
    return examples


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("sizes", "kept"),
    [
        ((16, 8), "meta"),
        ((8, 16), "nothing"),
        slow((8, 16), "meta"),
        slow((16, 24), "config"),
    ],
)
def test_another_batch_size_goes_on_at_the_next_example(
    digits_config, tmp_path, monkeypatch, taken, sizes, kept
):
    """Of checkpoints that do not count examples, too: the run's config tells."""
    digits_config.data.train = "train[:64]"
    digits_config.data.augment.mixup_probability = 0.0
    digits_config.total_steps = None
    digits_config.total_epochs = 80 / 64
    before, after = sizes
    digits_config.batch_size = before
    reporter, interrupted = stop_after(digits_config, 2)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Reporter", reporter)
        if kept != "meta":
            save = Checkpoints.save

            def save_as_before(self, state, meta, top1, **options):
                del meta["examples_seen"]
                save(self, state, meta, top1, **options)

            patch.setattr(Checkpoints, "save", save_as_before)
        with pytest.raises(interrupted):
            loop.train(digits_config, tmp_path)
    if kept == "nothing":
        (tmp_path / "config.json").unlink()
    seen = 2 * (after if kept == "nothing" else before)
    del taken[2 * before :]  # The step at which the run broke off is done again.

    digits_config.batch_size = after
    loop.train(digits_config, tmp_path)
    total = 2 + round((80 - seen) / after)
    rows = [row for row in read_jsonl(tmp_path) if "train/loss" in row]
    assert [row["step"] for row in rows] == list(range(1, total + 1))
    epochs = [(seen + after * (step - 2)) / 64 for step in range(3, total + 1)]
    assert [row["train/epoch"] for row in rows[2:]] == pytest.approx(epochs)
    end = chosen(tmp_path, "last").meta["examples_seen"]
    assert end == seen + after * (total - 2)
    assert abs(end - 80) <= after / 2

    data = loop.open_run(digits_config).data
    stream = data.train_batches(batch_size=1, seed=digits_config.seed)
    expected = [next(stream)["image"][0].tobytes() for _ in range(end)]
    assert taken[2 * before :] == expected[seen:]
    if kept != "nothing":
        assert taken == expected


def test_a_run_leaves_metrics_checkpoints_config_and_figures(digits_config, tmp_path):
    metrics = loop.train(digits_config, tmp_path)
    rows = read_jsonl(tmp_path)
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "test/top1" in row] == [2, 4]
    assert rows[-1]["test/top1"] == metrics["test/top1"]
    assert rows[0]["train/images_per_second"] > 0
    guided = [row["train/guidance_loss"] for row in rows if "train/loss" in row]
    assert guided[0] > guided[1] > guided[2] > guided[3] == 0
    assert rows[0]["train/learning_rate"] == 0
    assert rows[1]["train/learning_rate"] == pytest.approx(1e-2)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["data"]["name"] == "digits"
    for name in ("curves.png", "curves.pdf", "fields.png", "fields.pdf"):
        assert (tmp_path / "figures" / name).stat().st_size > 1000
    assert list(tmp_path.glob("events.out.tfevents.*"))
    # The task "evaluate" finds the same numbers in the checkpoint.
    digits_config.evaluate_checkpoint = "last"
    digits_config.guidance.teacher = "a folder that is gone"
    again = loop.evaluate(digits_config, tmp_path)
    assert again == pytest.approx(metrics)
    digits_config.guidance.teacher = ""
    # And the importer opens the folder: the same model, the averaged parameters.
    loaded = pretrained.load(tmp_path)
    state = last_state(digits_config, tmp_path)
    assert loaded.model == loop.open_run(digits_config).training.model
    jax.tree.map(np.testing.assert_array_equal, loaded.params, state.ema_params)


def test_a_trained_vit_becomes_a_window_free_transformer(
    digits_config, tmp_path, caplog
):
    """Started from a run of ViT, fields that cover the grid give what ViT gave."""
    digits_config.model.name = "vit"
    vit = loop.open_run(digits_config).training
    kernel = vit.params["head"]["kernel"]
    head = {"kernel": jax.random.normal(jax.random.key(0), kernel.shape)}
    params = {**vit.params, "head": {**vit.params["head"], **head}}
    save_config(digits_config, tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(init_state(params, vit.optimizer, ema=True), vit.meta, 0.5)

    digits_config.init_from = str(tmp_path)
    digits_config.model.name = "windowfree"
    digits_config.model.fields.extents = (0.0,)
    winft = loop.open_run(digits_config).training
    assert isinstance(winft.model, WindowFreeViT)
    image = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    expected, _ = apply(vit.model, params, image)
    got, out = apply(winft.model, winft.params, image)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert len(out["fields"]) == winft.model.depth

    # With another normalisation it would not see the same images.
    assert "sees other images" not in caplog.text
    digits_config.data.augment.mean = (0.4, 0.5, 0.5)
    loop.open_run(digits_config)
    assert '--config.data.augment.mean="(0.5, 0.5, 0.5)"' in caplog.text

    digits_config.model.name = "vit"
    digits_config.init_from = str(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="nowhere"):
        loop.open_run(digits_config)


def test_images_that_cannot_be_read_are_not_drawn(digits_config, monkeypatch):
    run = loop.open_run(digits_config)
    images = np.arange(3 * 6 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 6, 8, 8, 3)
    masks = np.arange(18).reshape(3, 6) >= 7
    batches = [{"image": i, "mask": m} for i, m in zip(images, masks, strict=True)]
    monkeypatch.setattr(type(run.data), "eval_batches", lambda *_, **__: iter(batches))
    np.testing.assert_array_equal(run.examples, images[1][1:])


def test_a_run_of_other_fields_can_be_trained_further(digits_config, tmp_path):
    model = small_winft(num_classes=10, image_size=8, fields=FieldConfig(hidden=16))
    write_run(tmp_path, model, random_params(model))
    digits_config.init_from = str(tmp_path)
    training = loop.open_run(digits_config).training
    assert training.model.fields.hidden == 16
    apply(training.model, training.params, jnp.zeros((1, 8, 8, 3)))


def test_evaluation_counts_every_example_once(digits_config):
    """360 odd test images do not fill batches of 100 on four devices."""
    run = loop.open_run(digits_config)
    params = dict(run.training.params)
    kernel = jax.random.normal(jax.random.key(0), params["head"]["kernel"].shape)
    params["head"] = {**params["head"], "kernel": kernel}
    got = run.evaluate(params)
    total = run.data.info.num_examples["test"]
    assert total % 100
    (batch,) = run.data.eval_batches("test", batch_size=total)
    assert batch["mask"].all()
    images = (batch["image"] / np.float32(255) - 0.5) / 0.5
    logits, _ = apply(run.training.model, params, images)
    expected = (logits.argmax(-1) == batch["label"]).mean()
    assert got["test/top1"] == pytest.approx(float(expected))
    losses = -jax.nn.log_softmax(logits)[np.arange(total), batch["label"]]
    assert got["test/loss"] == pytest.approx(float(losses.mean()), rel=1e-4)


@pytest.fixture
def infinite_rate(monkeypatch):
    """Makes every update infinite from now on, which no config can."""

    def apply():
        schedule = optax.constant_schedule(float("inf"))
        monkeypatch.setattr(
            resolving, "learning_rate_schedule", lambda *_, **__: schedule
        )

    return apply


@pytest.mark.usefixtures("no_figures")
def test_divergence_stops_and_keeps_the_last_good_checkpoint(
    digits_config, tmp_path, infinite_rate
):
    """The update of step 3 is infinite though its loss and gradient are finite."""
    digits_config.total_steps = 2
    loop.train(digits_config, tmp_path)
    digits_config.total_steps = 4
    digits_config.checkpoint_steps = 1
    infinite_rate()
    digits_config.max_skipped_updates = 0
    with pytest.raises(NonFiniteLossError, match="At step 3 the loss is 2"):
        loop.train(digits_config, tmp_path)
    assert chosen(tmp_path, "last").arrays["step"] == 2


def test_best_and_last_checkpoints_are_kept(digits_config, tmp_path):
    start = loop.open_run(digits_config).training.start()
    with Checkpoints(tmp_path) as checkpoints:
        for step, top1 in enumerate([0.2, 0.9, None, 0.5, None], start=1):
            checkpoints.save(start.replace(step=jnp.int32(step)), {}, top1)
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {2, 4, 5}
    assert last_state(digits_config, tmp_path, "best").step == 2
    assert last_state(digits_config, tmp_path, "last").step == 5


@pytest.mark.usefixtures("no_figures")
def test_the_best_checkpoint_is_chosen_by_the_evaluation_that_is_named(
    digits_config, tmp_path, caplog
):
    digits_config.data.unlock().eval = {"val": "train[:10%]", "test": "test"}
    with caplog.at_level("INFO", "wf_vit"):
        assert loop.open_run(digits_config).best_split == "test"
    assert "Of the evaluations test, val, test chooses" in caplog.text
    digits_config.best_split = "val"
    metrics = loop.train(digits_config, tmp_path)
    kept = json.loads((tmp_path / "checkpoints/4/metrics/metrics").read_text())
    assert kept["top1"] == metrics["val/top1"] != metrics["test/top1"]
    digits_config.best_split = ""
    digits_config.data.eval = {}
    with pytest.raises(UsageError, match=r"config\.data\.eval is empty"):
        loop.open_run(digits_config)
    digits_config.data.eval = {"val": "train[:10%]", "test": "test"}
    digits_config.best_split = "minival"
    with pytest.raises(UsageError, match=r"'minival', but config.data.eval has test"):
        loop.open_run(digits_config)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": list("0123456798")}, "classes: 9 before, 8 now"),
        ({"train_examples": 1000}, r"training images: 1000 before, 14\d\d now"),
        slow({"best_split": ["test", "test[:5]"]}, r"'test\[:5\]'\] before"),
    ],
)
def test_a_checkpoint_of_other_data_is_refused(
    digits_config, tmp_path, changes, message
):
    run = loop.open_run(digits_config)
    with Checkpoints(tmp_path) as checkpoints:
        start = run.training.start().replace(step=jnp.int32(1))
        checkpoints.save(start, {**run.meta, **changes}, 0.5)
    save_config(digits_config, tmp_path)
    with pytest.raises(UsageError, match=message):
        loop.train(digits_config, tmp_path)
    if "class_names" in changes:
        with pytest.raises(UsageError, match=message):
            loop.evaluate(digits_config, tmp_path)
    else:
        assert "test/top1" in loop.evaluate(digits_config, tmp_path)
    digits_config.on_change = "continue"
    loop.train(digits_config, tmp_path)


def test_a_checkpoint_of_another_model_is_refused(digits_config, tmp_path):
    training = loop.open_run(digits_config).training
    with Checkpoints(tmp_path) as checkpoints:
        start = training.start().replace(step=jnp.int32(1))
        checkpoints.save(start, training.meta, None)
    digits_config.model.width = 64
    with pytest.raises(UsageError, match="does not fit the config"):
        loop.train(digits_config, tmp_path)


def test_missing_checkpoints_and_unwritable_folders_are_named(digits_config, tmp_path):
    with pytest.raises(UsageError, match="no best checkpoint"):
        loop.evaluate(digits_config, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        loop.train(digits_config, tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 18}, "multiple of 4, such as 16 or 20"),
        ({"eval_batch_size": 2}, "config.eval_batch_size is 2"),
        ({"accumulate_steps": 3}, "each device has 4 examples"),
    ],
)
def test_batches_that_cannot_be_shared_are_named(digits_config, change, message):
    digits_config.update(change)
    with pytest.raises(UsageError, match=message):
        loop.open_run(digits_config)


@pytest.mark.usefixtures("no_figures")
def test_updates_that_are_not_finite_are_skipped_and_counted(
    digits_config, tmp_path, caplog, infinite_rate
):
    """An infinite rate makes every update infinite: none of them is done."""
    infinite_rate()
    digits_config.max_skipped_updates = 4
    loop.train(digits_config, tmp_path)
    assert "This update is skipped, number 4 of at most 4" in caplog.text
    rows = [row for row in read_jsonl(tmp_path) if "train/loss" in row]
    assert [row["train/updates_skipped"] for row in rows] == [1, 2, 3, 4]
    assert {row["train/max_skipped_updates"] for row in rows} == {4}
    # The schedule counts none of them.
    assert len({row["train/learning_rate"] for row in rows}) == 1
    saved = chosen(tmp_path, "last")
    assert saved.meta["updates_skipped"] == 4
    start = loop.open_run(digits_config).training.start()
    got = restored(saved, start)
    jax.tree.map(np.testing.assert_array_equal, got.params, start.params)
    # The count is the run's, also over its interruptions.
    digits_config.total_steps = 6
    with pytest.raises(NonFiniteLossError, match="5 updates were skipped, more"):
        loop.train(digits_config, tmp_path)


@pytest.fixture
def signalled(monkeypatch):
    """Makes a run see a signal once a condition holds, which each look asks for."""

    def when(condition):
        asked = []

        def look():
            if not asked and condition():
                asked.append("SIGTERM")
            return asked[0] if asked else ""

        monkeypatch.setattr(loop.stops, "asked", look)

    return when


# Reports come every third step, so that a stop also falls between two of them.
THIRDS = {"log_steps": 3, "checkpoint_steps": 3}


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """The folder of a run that nobody stopped."""
    folder, config = tmp_path_factory.mktemp("whole"), tiny_digits()
    config.update(THIRDS)
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        loop.train(config, folder)
    return folder


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("looks", [2, 5, *map(slow, (1, 3, 6, 8))])
def test_a_stop_at_any_moment_changes_nothing(
    digits_config, never_stopped, tmp_path, signalled, looks
):
    """At a step that is evaluated, within an evaluation of five batches, elsewhere."""
    digits_config.update(THIRDS)
    count = itertools.count(1)
    signalled(lambda: next(count) == looks)
    with pytest.raises(Stopped, match=r"Saved step (\d)\.") as stop:
        loop.train(digits_config, tmp_path)
    saved = chosen(tmp_path, "last")
    assert f"Saved step {saved.arrays['step']}." in str(stop.value)
    signalled(lambda: False)
    loop.train(digits_config, tmp_path)
    for which in ("last", "best"):
        ends = [chosen(folder, which) for folder in (never_stopped, tmp_path)]
        for path, array in ends[0].arrays.items():
            np.testing.assert_array_equal(ends[1].arrays[path], array, err_msg=path)
    reports = [read_jsonl(folder) for folder in (never_stopped, tmp_path)]
    for row in itertools.chain(*reports):
        row.pop("train/images_per_second", None)
    assert reports[0] == reports[1]


@pytest.mark.usefixtures("no_figures")
def test_a_second_run_on_a_working_directory_is_refused(digits_config, tmp_path):
    with held(tmp_path), pytest.raises(UsageError, match="in use by process"):
        loop.train(digits_config, tmp_path)
