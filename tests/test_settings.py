"""Every key of every config is declared, and a value out of its range is refused."""

import importlib
import importlib.util
import math

import jax
import ml_collections
import pytest
from hypothesis import strategies as st

from tests.fuzz import AMOUNTS, fuzz
from tests.test_configs import ARGUMENTS, ROOT
from wf_vit import command, settings
from wf_vit.data.config import DataInfo
from wf_vit.errors import UsageError
from wf_vit.models import registry
from wf_vit.settings import ANY, Setting
from wf_vit.train.config import resolve

CASES = [(n, a) for n, arguments in ARGUMENTS.items() for a in arguments or [None]]


def load(name, argument=None):
    arguments = () if argument is None else (argument,)
    return importlib.import_module(f"configs.{name}").get_config(*arguments)


def leaves(tree, name=""):
    for key, declared in tree.items():
        if isinstance(declared, Setting):
            yield f"{name}{key}", declared
        else:
            yield from leaves(declared, f"{name}{key}.")


DECLARED = {
    f"{task}: {key}": declared
    for task in ("train", "explain", "verify", "export")
    for key, declared in leaves(command.keys_of(task))
}


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_every_key_of_every_config_is_declared_and_in_range(name, argument):
    config = load(name, argument)
    command.check(config)
    with config.unlocked():
        config.undeclared = 3
    with pytest.raises(UsageError, match=r"config\.undeclared is not a setting"):
        command.check(config)
    with config.unlocked():
        del config.undeclared
        del config["seed" if "seed" in config else "weights"]
    with pytest.raises(UsageError, match=r"config\.(seed|weights) is missing"):
        command.check(config)


@pytest.mark.parametrize("key", DECLARED)
def test_a_declaration_has_a_range_that_holds_its_default(key):
    declared = DECLARED[key]
    assert declared.meaning
    assert not declared.meaning.endswith(".")
    assert declared.accepts(declared.default)
    kind = declared.of_kind
    inner = declared.items if kind is tuple else kind
    numeric = inner in (int, float)
    if numeric:
        assert None not in (
            declared.low if declared.above is None else declared.above,
            declared.high if declared.below is None else declared.below,
        )
    many = declared.length if declared.length not in (None, ANY) else 1
    wrong = [math.nan, math.inf, -math.inf, 10**400, object(), [object()]]
    wrong += [{}] if kind is not dict else [{"a": 3}, {"": "a"}]
    wrong += [None] if not declared.may_be_none else []
    wrong += [3] if inner in (str, bool) else ["3", True, "", "nan"]
    if numeric and declared.low is not None:
        wrong.append(declared.low - 1)
    if numeric and declared.high is not None:
        wrong.append(declared.high + 1)
    wrong += [bound for bound in (declared.above, declared.below) if bound is not None]
    for value in wrong:
        assert not declared.accepts(value), value
        if kind is tuple:
            assert not declared.accepts((value,) * many), value
    if declared.choices:
        assert not declared.accepts("something else")


@pytest.mark.parametrize(
    "override",
    [
        "seed=1180591620717411303424",
        "seed=-1",
        "total_epochs=nan",
        "total_epochs=inf",
        "log_steps=0",
        "eval_epochs=-1",
        "warmup_percent=101",
        "total_steps=100000000000000000000",
        "model.width=0",
        "model.depth=0",
        "model.num_registers=-1",
        "model.drop_path=1",
        "model.dtype=float64",
        "model.fields.growth=nan",
        "model.fields.extents=()",
        "data.pad=-1",
        "data.eval_resize=-1",
        "data.shuffle_buffer=0",
        "data.min_area=0",
        "data.image_size=0",
        "data.image_size=1000000000",
        "data.crop=middle",
        "data.augment.mixup_alpha=0",
        "data.augment.std=(0.5,0.5,0.0)",
        "data.augment.std=(0.5,0.5)",
        "data.augment.flip_probability=1.5",
        "label_smoothing=2",
        "ema_decay=1.5",
        "ema_decay=1",
        "batch_size=0",
        "accumulate_steps=0",
        "optimizer.learning_rate=nan",
        "optimizer.b1=1",
        "optimizer.clip_norm=-1",
        "guidance.weight=-1",
        "guidance.match=values",
        "guidance.num_probes=1",
        "evaluate_checkpoint=first",
        "distributed.process_id=-1",
    ],
)
def test_a_value_out_of_range_is_refused_before_data_are_opened(
    override, monkeypatch, tmp_path
):
    key, _, value = override.partition("=")
    monkeypatch.setattr(command, "parse", _once(command.parse, monkeypatch))
    with pytest.raises(UsageError) as error:
        command.run([f"--config.{override}", f"--workdir={tmp_path}/run"])
    [line] = str(error.value).splitlines()
    assert line.startswith(f"config.{key} is {value if value != 'middle' else ''}"[:20])
    assert ": expected " in line
    assert line.endswith(").")
    assert not (tmp_path / "run").exists()


def _once(parse, monkeypatch):
    """Lets a command read its config, but import nothing to run it with."""

    def parsed(arguments):
        result = parse(arguments)
        keys_of = importlib.import_module("wf_vit.train.keys")

        def only_keys(name, package=None):
            assert name == "wf_vit.train.keys", name
            return keys_of

        monkeypatch.setattr(importlib, "import_module", only_keys)
        return result

    return parsed


def test_the_message_says_what_was_given_expected_and_meant():
    config = load("digits", "vit")
    config.data.pad = -1
    config.seed = -3
    with pytest.raises(UsageError) as error:
        command.check(config)
    assert str(error.value).splitlines() == [
        "config.seed is -3: expected a whole number from 0 to 2^31 - 1 (of all that is "
        "random).",
        "config.data.pad is -1: expected a whole number from 0 to 8,192 (of crop=pad: "
        "pixels on each side).",
    ]


@pytest.mark.parametrize("task", ["explain", "verify", "export"])
def test_declarations_are_ours_whatever_lies_beside_the_config(task, tmp_path):
    """A config of one's own may have the name of one of ours."""
    own = tmp_path / f"{task}.py"
    own.write_text(
        "import ml_collections\n"
        "def get_config():\n"
        f"    return ml_collections.ConfigDict({{'task': '{task}'}})\n"
    )
    with pytest.raises(UsageError, match=r"has no|is missing"):
        command.run([f"--config={own}", f"--workdir={tmp_path}"])


@pytest.mark.parametrize("name", ["digits", "explain", "verify", "export"])
def test_help_with_a_config_lists_all_its_keys(name, capsys):
    assert command.main([f"--config={name}", "--config.task=" + load(name).task, "-h"])\
        == 0  # fmt: skip
    text = capsys.readouterr().out
    tree = command.keys_of(load(name).task)
    for key, declared in leaves(tree):
        assert f"\n  --config.{key}=" in text
        assert declared.meaning[:30] in text
    assert command.main(["--config.batchsize=3", "--help"]) == 2


def test_the_page_of_settings_is_up_to_date():
    """If not: ``python docs/make_settings.py``."""
    path = ROOT / "docs/make_settings.py"
    spec = importlib.util.spec_from_file_location("make_settings", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page()


# Random overrides.

KEYS = [key for key, _ in leaves(command.keys_of("train"))]
VALUES = st.one_of(
    st.sampled_from(["0", "1", "2", "0.1"]),
    st.integers(-3, 3).map(str),
    st.integers(-(2**70), 2**70).map(str),
    st.floats(width=32).map(str),
    st.sampled_from(["nan", "inf", "-inf", "1e400", "None", "True", "", "()", "(1,2)"]),
    st.sampled_from(["(1.0,)", "(0.5,0.5,nan)", "vit", "windowfree", "pad", "reflect"]),
    st.text(max_size=8),
)


@AMOUNTS
@pytest.mark.usefixtures("no_type_checks")
def test_random_overrides_are_accepted_or_usage_errors(examples, monkeypatch):
    monkeypatch.chdir(ROOT)

    def init_params(model, seed):
        jax.random.key(seed)
        return {}  # Parameters are another test's.

    monkeypatch.setattr(registry, "init_params", init_params)
    info = DataInfo(("a", "b"), {"train": 1000, "test": 10}, (16, 16))
    outcomes = {True: 0, False: 0}

    def check(overrides):
        arguments = [f"--config.{key}={value}" for key, value in overrides.items()]
        try:
            config, _ = command.parse(arguments)
            command.check(config)
            resolve(config, info)
            outcomes[True] += 1
        except UsageError:
            outcomes[False] += 1

    strategy = st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3)
    fuzz(check, examples, overrides=strategy)
    assert min(outcomes.values()) > 0


@AMOUNTS
def test_random_values_in_a_config_are_accepted_or_usage_errors(examples):
    """Those that a config file sets are of any type."""
    values = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
        st.lists(st.floats() | st.integers() | st.text(max_size=3), max_size=3),
        st.dictionaries(st.text("ab", max_size=3), st.integers(), max_size=2),
    )
    known = load("digits", "vit").to_dict()

    def check(key, value):
        config = ml_collections.ConfigDict(known, type_safe=False)
        *scopes, last = key.split(".")
        place = config
        for scope in scopes:
            place = place[scope]
        place[last] = value
        found = settings.problems(command.keys_of("train"), config, "config")
        assert len(found) <= 1
        assert all(f"config.{key} is " in line for line in found)

    fuzz(check, examples, key=st.sampled_from(KEYS), value=values)
