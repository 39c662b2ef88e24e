"""The libraries themselves, at real sizes (the extra `peers`)."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.models.pretrained.checkpoints import compute
from wf_vit.models import pretrained


def assert_close(loaded: pretrained.Pretrained, images: np.ndarray, **expected):
    """Compares within 1e-4 of each output's largest entry."""
    got = compute(loaded, images)
    for kind, tensor in expected.items():
        array = tensor.detach().numpy()
        error = np.abs(got[kind] - array).max() / np.abs(array).max()
        assert error < 1e-4, f"{kind}: {error}"


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, (160, 256)])
@pytest.mark.parametrize(
    ("architecture", "suffix"),
    [
        ("vit_tiny_patch16_224", ".safetensors"),
        ("vit_small_patch16_224", ".safetensors"),
        ("vit_base_patch16_224", ".pth"),
        ("deit_small_distilled_patch16_224", ".pth"),
        ("vit_small_patch14_reg4_dinov2", ".safetensors"),
    ],
)
def test_timm_at_real_sizes(tmp_path, architecture, suffix, size):
    torch = pytest.importorskip("torch")
    timm = pytest.importorskip("timm")
    if "patch14" in architecture:
        size = size and (154, 266)
    torch.manual_seed(0)
    model = timm.create_model(architecture).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and not name.endswith("norm.weight"):
                parameter.normal_(0, 0.1)
            if "gamma" in name:
                parameter.normal_(1, 0.1)
    path = tmp_path / f"model{suffix}"
    if suffix == ".pth":
        torch.save({"model": model.state_dict(), "epoch": 1}, path)
    else:
        arrays = {k: v.numpy() for k, v in model.state_dict().items()}
        save_file(arrays, path)
    loaded = pretrained.load(path, image_size=size)
    if size:
        model.set_input_size(img_size=size)
    images = torch.randn((2, 3, *loaded.model.image_size))
    with torch.no_grad():
        tokens = model.forward_features(images)
        logits = model.forward_head(tokens)
    images = images.permute(0, 2, 3, 1).numpy()
    assert_close(loaded, images, tokens=tokens, logits=logits)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(224, 224), (140, 322), (518, 518)])
def test_the_real_dinov2_against_transformers(shared, tmp_path, size):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    weights = shared / "weights/dinov2_s14.safetensors"
    config = transformers.Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14
    )
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").symlink_to(weights)
    model = transformers.Dinov2Model.from_pretrained(
        tmp_path, attn_implementation="eager"
    ).eval()
    with np.load(shared / "reference/dinov2_s14_reference.npz") as file:
        photographs = file["images"][:2]
    loaded = pretrained.load(weights, image_size=size)
    images = loaded.preprocess(photographs)
    with torch.no_grad():
        output = model(
            torch.from_numpy(images).permute(0, 3, 1, 2), output_attentions=True
        )
    forward = jax.jit(
        lambda params, x: loaded.model.apply({"params": params}, x, record=(0, 11))[1]
    )
    got = forward(loaded.params, images)
    np.testing.assert_allclose(
        got["tokens"], output.last_hidden_state.numpy(), atol=2e-4, rtol=0
    )
    for layer in (0, 11):
        np.testing.assert_allclose(
            got["records"][layer]["attention"],
            output.attentions[layer].numpy(),
            atol=1e-5,
            rtol=0,
        )
