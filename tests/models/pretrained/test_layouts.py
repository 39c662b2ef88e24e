"""Layouts of libraries: their names, and how each resizes its position table."""

import re

import numpy as np
import pytest

from tests.models.pretrained.checkpoints import (
    compute,
    copy_with,
    expected_of,
    source_of,
)
from wf_vit.models import pretrained
from wf_vit.models.pretrained import positions


@pytest.mark.parametrize("prefix", ["", "module.backbone.", "backbone."])
def test_metas_own_names(tmp_path, prefix):
    def to_meta(arrays):
        for name in list(arrays):
            own = name.replace("reg_token", "register_tokens")
            own = re.sub(r"^blocks\.(\d)\.", r"blocks.0.\1.", own)
            own = re.sub(r"mlp\.fc1", "mlp.w12", re.sub(r"mlp\.fc2", "mlp.w3", own))
            arrays[prefix + own] = arrays.pop(name)
        del arrays[prefix + "head.weight"], arrays[prefix + "head.bias"]
        arrays[prefix + "mask_token"] = np.ones((1, 16), np.float32)
        arrays["dino_head.mlp.0.weight"] = np.ones((3, 16), np.float32)

    name = "timm_dinov2_registers_swiglu"
    loaded = pretrained.load(copy_with(name, tmp_path, to_meta), num_heads=2)
    expected = expected_of(name)["16x16"]
    got = compute(loaded, expected["images"])
    np.testing.assert_allclose(got["tokens"], expected["tokens"], atol=1e-5)


def test_metas_models_without_registers_resize_with_their_offset(tmp_path):
    def to_meta(arrays):
        arrays["mask_token"] = np.ones((1, 16), np.float32)

    folder = copy_with("timm_vit", tmp_path, to_meta)
    own = pretrained.load(folder).params["position_table"]
    other = pretrained.load(folder, image_size=(24, 20)).params["position_table"]
    np.testing.assert_allclose(
        other, positions.resize_table(np.asarray(own), (6, 5), positions.META_CUBIC)
    )


def test_google_checkpoints_are_resized_by_googles_rule():
    own, other = (
        pretrained.load(source_of("google_augreg"), image_size=size).params
        for size in (None, (12, 32))
    )
    np.testing.assert_allclose(
        other["position_table"],
        positions.resize_table(
            np.asarray(own["position_table"]), (3, 8), positions.SCIPY_LINEAR
        ),
    )
    np.testing.assert_array_equal(own["prefix"], other["prefix"])
