"""What lies beside the parameters, and which parameters are meant where several are."""

import logging

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.models.pretrained.checkpoints import FIXTURES
from wf_vit.errors import UsageError
from wf_vit.models import pretrained

STATE = load_file(FIXTURES / "timm_vit/model.safetensors")
RAW = {name: array * 0.5 for name, array in STATE.items()}
HEADLESS = {name: a for name, a in STATE.items() if not name.startswith("head")}
ONE = np.ones(3, np.float32)


def under(prefix, state=STATE):
    return {f"{prefix}{name}": array for name, array in state.items()}


def params(source, **options):
    return pretrained.load(source, num_heads=2, **options).params


def assert_is(source, state, **options):
    got, expected = params(source, **options), params(state)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


# As timm, DINO, MoCo v3, MAE, Lightning, big_vision and people's own loops save.
NESTED = {
    "bare": STATE,
    "model": {"model": STATE, "optimizer": {"state": {0: {"exp_avg": ONE}}}},
    "model_state_dict": {"model_state_dict": STATE, "epoch": 3, "loss": 0.1},
    "arrays beside": {"model": STATE, "prototypes": ONE},
    "net": {"net": STATE, "acc": 91.5},
    "one unknown entry": {"my_vit": STATE, "epoch": 3},
    "deep": {"state": {"model": {"state_dict": STATE}}, "args": {"lr": 0.1}},
    "numbers beside": {**STATE, "epoch": np.asarray(3), "step": 7},
    "lightning": {"state_dict": under("model."), "callbacks": {}, "epoch": 1},
    "data parallel": {"state_dict": under("module.")},
    "loss beside": {**under("backbone."), "criterion.center": ONE, "loss.weight": ONE},
    "optimizer beside": {**under("params/"), "opt/mu/x": ONE, "step": np.asarray(3)},
    "optimizer beside, bare": {**STATE, "optimizer.mu": ONE, "scheduler.step": ONE},
}


@pytest.mark.parametrize("source", NESTED.values(), ids=NESTED)
def test_parameters_are_found_in_any_container(source):
    assert_is(source, STATE)


# A source of several sets of parameters, of which STATE is the one for use.
SEVERAL = {
    "timm": {"state_dict": RAW, "state_dict_ema": STATE},
    "deit": {"model": RAW, "model_ema": STATE, "optimizer": {}},
    "deit, module": {"model": RAW, "model_ema": under("module.")},
    "lightning": {"state_dict": {**under("net.", RAW), **under("net_ema.")}},
    "dino": {
        "student": {**under("module.backbone.", RAW), "module.head.mlp.0.weight": ONE},
        "teacher": {**under("backbone."), "head.last_layer.weight_v": ONE},
        "dino_loss": {"center": ONE},
    },
    "flat dino": {
        **under("student.backbone.", RAW),
        **under("teacher.backbone."),
        "dino_loss.center": ONE,
    },
    "moco": {
        "state_dict": {
            **under("module.base_encoder."),
            **under("module.momentum_encoder.", RAW),
            "module.predictor.0.weight": ONE,
        }
    },
    "i-jepa": {"encoder": RAW, "target_encoder": STATE, "predictor": under("", RAW)},
}


@pytest.mark.parametrize("source", SEVERAL.values(), ids=SEVERAL)
def test_the_average_or_the_teacher_is_taken_and_said(source, caplog):
    assert_is(source, STATE)
    assert "is taken; pass" in caplog.text


def test_the_caller_may_choose_another():
    both = SEVERAL["timm"]
    assert_is(both, RAW, which="state_dict")
    dino = SEVERAL["dino"]
    assert_is(dino, RAW, which="student")
    assert_is(SEVERAL["flat dino"], RAW, prefix="student.backbone")
    assert_is(SEVERAL["flat dino"], RAW, prefix="student.backbone.")
    with pytest.raises(UsageError, match=r"'ema'.*'state_dict', 'state_dict_ema'"):
        params(both, which="ema")
    with pytest.raises(UsageError, match="no entries, only parameters"):
        params(STATE, which="ema")
    with pytest.raises(UsageError, match=r"'online'.*'student\.backbone\.'"):
        params(SEVERAL["flat dino"], prefix="online")


def test_two_networks_of_equal_rank_are_not_chosen_between():
    with pytest.raises(UsageError, match=r"several networks.*'left\.', 'right\.'"):
        params({**under("left."), **under("right.", RAW)})


def test_what_is_left_out_is_named(caplog):
    caplog.set_level(logging.INFO)
    source = {**under("backbone."), "criterion.center": ONE, "queue": ONE}
    pretrained.load({"model": source, "epoch": 3, "args": {"a": 1}}, num_heads=2)
    assert "Left out, as not of the model: criterion.center, queue." in caplog.text
    caplog.clear()
    decoder = {"mask_token": ONE, "decoder_embed.weight": ONE, "decoder_pred.bias": ONE}
    assert_is({**HEADLESS, **decoder}, HEADLESS)
    for name in ("mask_token", "decoder_embed", "decoder_pred"):
        assert name in caplog.text
    caplog.clear()
    pretrained.load({**STATE, "epoch": 3, "arch": "vit"}, num_heads=2)
    assert "Left out, as it is no array: epoch, arch" in caplog.text


def test_what_looks_like_a_part_of_the_model_is_not_left_out():
    with pytest.raises(UsageError, match=r"unknown: blocks\.0\.attn\.lora_a"):
        params({**STATE, "blocks.0.attn.lora_a": ONE})
    with pytest.raises(UsageError, match=r"unknown: adapter"):
        params({**STATE, "adapter": ONE})
    with pytest.raises(UsageError, match=r"unknown: rope\.freqs"):
        params({**STATE, "rope.freqs": ONE})


def test_a_head_beside_the_network_is_its_head():
    head = {name: array for name, array in STATE.items() if name.startswith("head")}
    assert_is({**under("backbone.", HEADLESS), **head}, STATE)
    assert_is({**under("m.backbone.", HEADLESS), **under("m.", head)}, STATE)
