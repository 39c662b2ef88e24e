"""Whether opened checkpoints compute what the libraries do that they come from.

    pip install -e '.[test,peers]'
    python -m benchmarks.checkpoints --output results/checkpoints/parity

Each case makes a model of another library at a published size, with random weights
that matter to every output, saves it as it is published, opens it with
``pretrained.load``, and compares on random images: the final tokens, and what the head
reads or says. The error is relative to the largest entry. Layouts of libraries that
cannot be installed are timm's weights under those libraries' names; timm itself reads
such names, which is where they were checked.

Prints the table and writes OUTPUT.json and OUTPUT.md. Takes six minutes on two cores.
"""

import dataclasses
import gc
import inspect
import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import timm
import torch
import transformers
from absl import app, flags
from timm.models._hub import save_for_hf

from wf_vit.models import pretrained

_OUTPUT = flags.DEFINE_string("output", None, "Files to write, without suffix.")
_ONLY = flags.DEFINE_string("only", "", "A pattern of the cases' families and sources.")

Size = tuple[int, int]
Outputs = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Peer:
    """A model of another library, saved.

    Attributes:
      source: what ``pretrained.load`` opens.
      compute: from images [B, 3, height, width] to "tokens", "pooled" or "logits".
      options: more for ``pretrained.load``.
    """

    source: Any
    compute: Callable[[torch.Tensor], Outputs]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Case:
    """One family as one library has it.

    Attributes:
      family: for the table.
      source: library and class or architecture, for the table.
      make: saves the model in a folder.
      sizes: of the images, (height, width); the first is the model's own.
    """

    family: str
    source: str
    make: Callable[[Path], Peer]
    sizes: tuple[Size, ...]


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives every parameter a value that matters to the output, without blowing up."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = re.search(r"norm|ln_|ls\d|lambda|gamma|layer_scale", name)
            if parameter.ndim == 1:
                is_gain = gain and not name.endswith("bias")
                parameter.copy_(0.6 + 0.1 * noise if is_gain else 0.1 * noise)
            elif re.search(r"token|probe|latent|pos|class_emb|table", name):
                parameter.copy_(0.5 * noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model.eval()


def hugging_face(name: str, config: Any, *, file_names: bool = True):
    """Returns the maker of a model of transformers, saved by it."""

    def make(folder: Path) -> Peer:
        model = randomize(getattr(transformers, name)(config))
        model.save_pretrained(folder)
        parameters = inspect.signature(type(model).forward).parameters
        # Of CLIP and SigLIP it is among the **kwargs.
        resizes = "interpolate_pos_encoding" in parameters or "lip" in name
        options = {"interpolate_pos_encoding": True} if resizes else {}

        def compute(images: torch.Tensor) -> Outputs:
            output = model(images, **options)
            found = {"tokens": "last_hidden_state", "pooled": "pooler_output"}
            found |= {"logits": "logits", "embedding": "image_embeds"}
            got = {k: getattr(output, v, None) for k, v in found.items()}
            if name.startswith("CLIP"):
                # Its final norm is only for the CLS token.
                got["tokens"] = None
            if got["embedding"] is not None:
                got["pooled"] = got["embedding"]
            got.pop("embedding")
            return {k: v for k, v in got.items() if v is not None}

        return Peer(folder if file_names else model, compute)

    return make


def of_timm(architecture: str, *, file: bool = True, **options):
    """Returns the maker of a model of timm: its folder for the hub, or the module."""

    def make(folder: Path) -> Peer:
        model = randomize(timm.create_model(architecture, **options))
        if file:
            arguments = {k: v for k, v in options.items() if k != "num_classes"}
            save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
        return Peer(folder if file else model, timm_compute(model))

    return make


def timm_compute(model: torch.nn.Module) -> Callable[[torch.Tensor], Outputs]:
    """Returns what computes tokens and logits of a timm model."""

    def compute(images: torch.Tensor) -> Outputs:
        size = tuple(images.shape[-2:])
        if tuple(model.patch_embed.img_size or size) != size:
            model.set_input_size(img_size=size)
        tokens = model.forward_features(images)
        found = {"logits": model.forward_head(tokens)}
        if isinstance(getattr(model, "fc_norm", None), torch.nn.Identity):
            found["tokens"] = tokens
        return found

    return compute


def renamed(architecture: str, rename: Callable[[dict], dict], **options):
    """Returns the maker of timm's weights under another library's names."""
    load = options.pop("load", {})

    def make(folder: Path) -> Peer:
        model = randomize(timm.create_model(architecture, **options))
        state = rename({k: v.contiguous() for k, v in model.state_dict().items()})
        # timm's own reader of those names must give the same model back.
        filtered = sys.modules[type(model).__module__].checkpoint_filter_fn(
            dict(state.get("model", state)), model
        )
        model.load_state_dict(filtered, strict=False)
        torch.save(state, folder / "model.pth")
        return Peer(folder / "model.pth", timm_compute(model), load)

    return make


def swaps(*pairs: tuple[str, str]) -> Callable[[dict], dict]:
    """Returns what renames by patterns, in order."""

    def rename(state: dict) -> dict:
        new = {}
        for name, tensor in state.items():
            for pattern, replacement in pairs:
                name = re.sub(pattern, replacement, name)
            new[name] = tensor
        return new

    return rename


def as_meta_dinov3(state: dict) -> dict:
    """Meta's names of DINOv3, with its mask of biases and its training's leftovers."""
    new = {}
    for name, tensor in state.items():
        name = name.replace("reg_token", "storage_tokens")
        name = re.sub(r"gamma_(\d)", r"ls\1.gamma", name)
        name = name.replace("mlp.fc1_g", "mlp.w1").replace("mlp.fc1_x", "mlp.w2")
        name = name.replace("mlp.fc2", "mlp.w3") if "mlp.w1" in str(new) else name
        if name.endswith("q_bias"):
            stem = name.removesuffix("q_bias")
            value = state[stem + "v_bias"]
            new[stem + "qkv.bias"] = torch.cat([tensor, 0 * tensor, value])
            mask = torch.cat([0 * tensor + 1, tensor * torch.nan, 0 * tensor + 1])
            new[stem + "qkv.bias_mask"] = mask
        elif not name.endswith("v_bias"):
            new[name] = tensor
    width = state["cls_token"].shape[-1]
    new["rope_embed.periods"] = torch.ones(16)
    new["mask_token"] = torch.ones(1, width)
    new["projectors.0.weight"] = torch.ones(8, width)
    return new


def as_clip(state: dict) -> dict:
    """OpenAI's names of CLIP, and of Meta's Perception Encoder."""
    state = dict(state)
    for name in ("cls_token", "pos_embed"):
        if name in state:
            state[name] = state[name].flatten(0, 1)
    if "cls_token" in state:
        state["cls_token"] = state["cls_token"][0]
    if "head.weight" in state:
        state["head.weight"] = state["head.weight"].T.contiguous()
        state.pop("head.bias", None)
    if "attn_pool.q.weight" in state:
        for kind in ("weight", "bias"):
            parts = [state.pop(f"attn_pool.{n}.{kind}") for n in ("q", "kv")]
            state[f"attn_pool.attn.in_proj_{kind}"] = torch.cat(parts)
    new = swaps(
        (r"^attn_pool\.proj", "attn_pool.attn.out_proj"),
        (r"^attn_pool\.norm", "attn_pool.layernorm"),
        (r"^attn_pool\.latent", "attn_pool.probe"),
        (r"^norm_pre", "ln_pre"),
        (r"^norm\.", "ln_post."),
        (r"\.norm", ".ln_"),
        (r"^head\.weight", "proj"),
        (r"^blocks", "transformer.resblocks"),
        (r"attn\.qkv\.", "attn.in_proj_"),
        (r"attn\.proj", "attn.out_proj"),
        (r"gamma_(\d)", r"ls_\1.gamma"),
        (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
        (r"^patch_embed\.proj", "conv1"),
        (r"^cls_token", "class_embedding"),
        (r"^pos_embed", "positional_embedding"),
    )(state)
    new = {f"visual.{name}": tensor for name, tensor in new.items()}
    # The text half has names of the same kind.
    new["transformer.resblocks.0.ln_1.weight"] = torch.ones(8)
    new["positional_embedding"] = torch.ones(77, 8)
    new["logit_scale"] = torch.ones(())
    return new


as_apple = swaps(
    (r"^patch_embed\.", "preprocessor.patchifier."),
    (r"^pos_embed", "preprocessor.pos_embed"),
    (r"^norm\.", "trunk.post_trunk_norm."),
    (r"^blocks", "trunk.blocks"),
    (r"\.norm(\d)", r".norm_\1"),
    (r"mlp\.fc1_g", "mlp.fc1"),
    (r"mlp\.fc1_x", "mlp.fc3"),
)


as_baai = swaps(
    (r"attn\.([qv])_proj\.bias", r"attn.\1_bias"),
    (r"mlp\.fc1_g", "mlp.w1"),
    (r"mlp\.fc1_x", "mlp.w2"),
    (r"mlp\.fc2", "mlp.w3"),
    (r"mlp\.norm", "mlp.ffn_ln"),
)


def as_meta_dinov2(state: dict) -> dict:
    """Meta's names of DINOv2, which Franca has too."""
    return {**state, "mask_token": torch.ones(1, state["cls_token"].shape[-1])}


def with_decoder(state: dict) -> dict:
    """MAE's pretraining file: the encoder, and a decoder beside it."""
    extra = {"mask_token": 8, "decoder_pos_embed": 8, "decoder_embed.weight": 8}
    extra |= {"decoder_blocks.0.norm1.weight": 8, "decoder_pred.bias": 8}
    state = {k: v for k, v in state.items() if not k.startswith("head")}
    return {"model": state | {name: torch.ones(n) for name, n in extra.items()}}


S = {"num_classes": 10}
VIT_S = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}


def cases() -> list[Case]:
    """Returns all cases, by family."""
    t = transformers
    dinov3 = {"num_register_tokens": 4}
    dinov2 = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518}
    square, oblong = (224, 224), (160, 256)
    listed = [
        ("ViT", "transformers ViTForImageClassification B/16",
         hugging_face("ViTForImageClassification", t.ViTConfig(num_labels=10)),
         (square, oblong)),
        ("ViT", "timm vit_small_patch16_224",
         of_timm("vit_small_patch16_224", **S), (square, oblong)),
        ("DeiT", "timm deit3_small_patch16_224",
         of_timm("deit3_small_patch16_224", **S), (square, oblong)),
        ("DINOv2", "transformers Dinov2Model S/14",
         hugging_face("Dinov2Model", t.Dinov2Config(**dinov2, patch_size=14)),
         ((518, 518), (224, 224), (140, 322))),
        ("DINOv2", "timm vit_small_patch14_reg4_dinov2",
         of_timm("vit_small_patch14_reg4_dinov2", **S), ((518, 518), (154, 266))),
        ("Franca", "Meta's names of DINOv2, S/14",
         renamed("vit_small_patch14_dinov2", as_meta_dinov2, num_classes=0),
         ((518, 518),)),
        ("TIPSv2", "transformers Tipsv2VisionModel, S/14",
         hugging_face("Tipsv2VisionModel", t.Tipsv2VisionConfig(
             hidden_size=384, num_attention_heads=6, image_size=224)), (square,)),
        ("TIPSv2", "timm vit_base_patch14_reg1_tipsv2",
         of_timm("vit_base_patch14_reg1_tipsv2", **S), ((448, 448),)),
        ("DINOv3", "transformers DINOv3ViTModel S/16",
         hugging_face("DINOv3ViTModel", t.DINOv3ViTConfig(**dinov3)),
         (square, oblong, (512, 384))),
        ("DINOv3", "transformers DINOv3ViTModel S+/16, in memory",
         hugging_face("DINOv3ViTModel",
                      t.DINOv3ViTConfig(**dinov3, use_gated_mlp=True,
                                         hidden_act="silu"),
                      file_names=False), (square, oblong)),
        ("DINOv3", "transformers DINOv3ViTModel B/16",
         hugging_face("DINOv3ViTModel", t.DINOv3ViTConfig(
             **dinov3, hidden_size=768, num_attention_heads=12,
             intermediate_size=3072)), (square,)),
        ("DINOv3", "timm vit_small_patch16_dinov3",
         of_timm("vit_small_patch16_dinov3", **S), ((256, 256), oblong)),
        ("DINOv3", "timm vit_small_plus_patch16_dinov3_qkvb, module",
         of_timm("vit_small_plus_patch16_dinov3_qkvb", file=False, **S),
         ((256, 256), oblong)),
        ("DINOv3", "timm vit_huge_plus_patch16_dinov3, 2 layers",
         of_timm("vit_huge_plus_patch16_dinov3", depth=2, **S), ((256, 256),)),
        ("DINOv3", "Meta's names, S+/16",
         renamed("vit_small_plus_patch16_dinov3_qkvb", as_meta_dinov3,
                 num_classes=0, global_pool="token",
                 load={"image_size": 256}), ((256, 256),)),
        ("EUPE", "Meta's names, S/16",
         renamed("vit_small_patch16_dinov3_qkvb", as_meta_dinov3,
                 num_classes=0, global_pool="token",
                 load={"image_size": 256}), ((256, 256),)),
        ("EVA-02", "timm eva02_tiny_patch14_336",
         of_timm("eva02_tiny_patch14_336", **S), ((336, 336), (224, 280))),
        ("EVA-02", "timm eva02_base_patch14_448, module",
         of_timm("eva02_base_patch14_448", file=False, **S), ((448, 448),)),
        ("EVA-02", "BAAI's names, B/14 at 448",
         renamed("eva02_base_patch14_448", as_baai, num_classes=10), ((448, 448),)),
        ("EVA", "timm eva_giant_patch14_224, 2 layers",
         of_timm("eva_giant_patch14_224", depth=2, **S), (square,)),
        ("Perception Encoder", "timm vit_pe_core_tiny_patch16_384",
         of_timm("vit_pe_core_tiny_patch16_384", **S), ((384, 384), oblong)),
        ("Perception Encoder", "timm vit_pe_core_gigantic_patch14_448, 2 layers",
         of_timm("vit_pe_core_gigantic_patch14_448", depth=2, **S), ((448, 448),)),
        ("Perception Encoder", "timm vit_pe_spatial_small_patch16_512",
         of_timm("vit_pe_spatial_small_patch16_512", num_classes=0),
         ((512, 512), (256, 384))),
        ("Perception Encoder", "timm vit_pe_lang_large_patch14_448, 4 layers",
         of_timm("vit_pe_lang_large_patch14_448", depth=4, num_classes=0),
         ((448, 448),)),
        ("Perception Encoder", "Meta's names, core B/16",
         renamed("vit_pe_core_base_patch16_224", as_clip, num_classes=128),
         (square, oblong)),
        ("CLIP", "transformers CLIPVisionModelWithProjection B/32",
         hugging_face("CLIPVisionModelWithProjection", t.CLIPVisionConfig()),
         (square, oblong)),
        ("CLIP", "transformers CLIPModel B/32, vision half",
         clip_model, (square,)),
        ("CLIP", "transformers CLIPForImageClassification B/32",
         hugging_face("CLIPForImageClassification", t.CLIPConfig(num_labels=10)),
         (square,)),
        ("CLIP", "timm vit_base_patch16_clip_quickgelu_224",
         of_timm("vit_base_patch16_clip_quickgelu_224", **S), (square, oblong)),
        ("CLIP", "OpenAI's names, B/32",
         renamed("vit_base_patch32_clip_quickgelu_224", as_clip, num_classes=512),
         (square,)),
        ("SigLIP", "transformers SiglipVisionModel B/16",
         hugging_face("SiglipVisionModel", t.SiglipVisionConfig()), (square, oblong)),
        ("SigLIP", "transformers SiglipVisionModel so400m/14 at 384, 2 layers",
         hugging_face("SiglipVisionModel", t.SiglipVisionConfig(
             hidden_size=1152, num_attention_heads=16, intermediate_size=4304,
             num_hidden_layers=2, patch_size=14, image_size=384)), ((384, 384),)),
        ("SigLIP", "transformers SiglipForImageClassification B/16",
         hugging_face("SiglipForImageClassification", t.SiglipConfig(num_labels=10)),
         (square,)),
        ("SigLIP 2", "timm vit_base_patch32_siglip_256",
         of_timm("vit_base_patch32_siglip_256", **S), ((256, 256), oblong)),
        ("SigLIP 2", "timm vit_so400m_patch16_siglip_256, 4 layers",
         of_timm("vit_so400m_patch16_siglip_256", depth=4, **S), ((256, 256),)),
        ("AIMv2", "transformers Aimv2VisionModel L/14, 4 layers",
         hugging_face("Aimv2VisionModel", t.Aimv2VisionConfig(num_hidden_layers=4)),
         (square,)),
        ("AIMv2", "transformers Aimv2VisionModel L/14 native, 4 layers",
         hugging_face("Aimv2VisionModel", t.Aimv2VisionConfig(
             num_hidden_layers=4, is_native=True, use_head=False)),
         (square, (140, 322))),
        ("AIMv2", "timm aimv2_large_patch14_224, 4 layers",
         of_timm("aimv2_large_patch14_224", depth=4, **S), (square, (140, 322))),
        ("AIMv2", "Apple's names, L/14, 4 layers",
         renamed("aimv2_large_patch14_224", as_apple, depth=4, num_classes=0),
         (square,)),
        ("MAE", "transformers ViTMAEForPreTraining B/16, encoder", mae, (square,)),
        ("MAE", "Meta's names with decoder, S/16",
         renamed("vit_small_patch16_224", with_decoder, num_classes=0), (square,)),
        ("MAE", "timm vit_small_patch16_224, fine-tuned (fc_norm)",
         of_timm("vit_small_patch16_224", global_pool="avg", **S), (square, oblong)),
        ("BEiT", "transformers BeitForImageClassification B/16",
         hugging_face("BeitForImageClassification", t.BeitConfig(
             num_labels=10, use_relative_position_bias=True)), (square,)),
        ("BEiT", "timm beitv2_base_patch16_224",
         of_timm("beitv2_base_patch16_224", **S), (square,)),
        ("MoCo v3", "its names, S/16 with 12 heads", moco, (square, oblong)),
        ("iBOT", "its names, S/16: teacher and student", ibot, (square,)),
        ("RoPE-ViT", "timm vit_small_patch16_rope_ape_224",
         of_timm("vit_small_patch16_rope_ape_224", **S), (square, oblong)),
        ("RoPE-ViT", "timm vit_medium_patch16_rope_reg1_gap_256",
         of_timm("vit_medium_patch16_rope_reg1_gap_256", **S), ((256, 256),)),
    ]  # fmt: skip
    return [Case(*case) for case in listed]


def clip_model(folder: Path) -> Peer:
    """Both halves of a CLIP in one file."""
    model = randomize(transformers.CLIPModel(transformers.CLIPConfig()))
    model.save_pretrained(folder)

    def compute(images: torch.Tensor) -> Outputs:
        pooled = model.vision_model(images).pooler_output
        return {"pooled": model.visual_projection(pooled)}

    return Peer(folder, compute)


def mae(folder: Path) -> Peer:
    """A masked autoencoder, of which nothing is masked."""
    config = transformers.ViTMAEConfig(mask_ratio=0.0)
    model = randomize(transformers.ViTMAEForPreTraining(config))
    model.save_pretrained(folder)

    def compute(images: torch.Tensor) -> Outputs:
        # In the order of the noise, which is that of the patches.
        noise = torch.arange(196.0)[None].repeat(len(images), 1)
        return {"tokens": model.vit(images, noise=noise).last_hidden_state}

    return Peer(folder, compute)


def moco(folder: Path) -> Peer:
    """A training file of MoCo v3: two encoders, a predictor and an optimizer."""
    model = randomize(
        timm.create_model("vit_small_patch16_224", num_heads=12, num_classes=0)
    )
    state = model.state_dict()
    names = {f"module.base_encoder.{k}": v for k, v in state.items()}
    names |= {f"module.momentum_encoder.{k}": 0 * v for k, v in state.items()}
    names |= {f"module.base_encoder.head.{i}.weight": torch.ones(8) for i in (0, 1)}
    names["module.predictor.0.weight"] = torch.ones(8)
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    content = {"epoch": 300, "state_dict": names, "optimizer": optimizer}
    torch.save(content, folder / "model.pth.tar")
    peer = timm_compute(model)
    return Peer(folder / "model.pth.tar", peer, {"num_heads": 12})


def ibot(folder: Path) -> Peer:
    """A training file of iBOT or DINO: teacher, student, heads and a loss."""
    model = randomize(timm.create_model("vit_small_patch16_224", num_classes=0))
    state = model.state_dict()
    teacher = {f"backbone.{k}": v for k, v in state.items()}
    teacher |= {"backbone.mask_token": torch.ones(8)}
    teacher |= {"head.mlp.0.weight": torch.ones(8), "head.last_layer.weight_v": None}
    teacher["head.last_layer.weight_v"] = torch.ones(8)
    student = {f"module.{k}": 0 * v for k, v in teacher.items()}
    loss = {"center": torch.ones(1, 8)}
    content = {"student": student, "teacher": teacher, "loss": loss, "epoch": 3}
    torch.save(content, folder / "checkpoint.pth")
    return Peer(folder / "checkpoint.pth", timm_compute(model))


def errors(case: Case, folder: Path) -> dict[str, Any]:
    """Returns the largest relative error of each output, over the sizes."""
    peer = case.make(folder)
    found = {}
    for size in case.sizes:
        options = {"image_size": size, **peer.options} if size != case.sizes[0] else {}
        loaded = pretrained.load(peer.source, **(options or peer.options))
        model = loaded.model
        images = torch.randn((2, 3, *size), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = peer.compute(images)
        forward = jax.jit(
            lambda params, x, model=model: model.apply(
                {"params": params}, x, record=True
            )
        )
        # What no patch covers is cut off: 6 of 384 pixels, with patches of 14.
        height, width = model.image_size
        ours = images.permute(0, 2, 3, 1).numpy()[:, :height, :width]
        logits, out = forward(loaded.params, ours)
        got = {"logits": logits, "tokens": out["tokens"], "pooled": out["pooled"]}
        if model.num_classes == 0:
            got["logits"] = out["pooled"]
        rows = [r["attention"].sum(-1) for r in out["records"].values()]
        found["rows"] = max(
            found.get("rows", 0.0), *(float(np.abs(row - 1).max()) for row in rows)
        )
        for kind, tensor in expected.items():
            array = tensor.numpy()
            error = np.abs(np.asarray(got[kind]) - array).max() / np.abs(array).max()
            found[kind] = max(found.get(kind, 0.0), float(error))
    return found


def table(results: Mapping[str, Any]) -> str:
    """Returns the results as Markdown."""
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    lines = [
        f"Made by `{results['command']}`; {versions}; float32, random weights. Largest "
        "error relative to the largest entry, over the sizes.\n",
        "| family | as saved by | sizes | tokens | pooled or logits |",
        "|---|---|---|---|---|",
    ]
    for case in results["cases"]:
        error = case["errors"]
        sizes = ", ".join("x".join(map(str, size)) for size in case["sizes"])
        head = max((error[k] for k in ("pooled", "logits") if k in error), default=None)
        cells = ["" if e is None else f"{e:.0e}" for e in (error.get("tokens"), head)]
        lines.append(" | ".join(["| " + case["family"], case["source"], sizes, *cells]))
        lines[-1] += " |"
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    """Compares, prints and writes."""
    del argv
    measured = []
    for case in cases():
        if not re.search(_ONLY.value, f"{case.family}: {case.source}"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = {"family": case.family, "source": case.source, "sizes": case.sizes}
            row["errors"] = errors(case, Path(folder))
        print(json.dumps(row), flush=True)
        measured.append(row)
        gc.collect()
    packages = {"timm": timm, "transformers": transformers, "torch": torch, "jax": jax}
    results = {
        "command": " ".join(["python -m benchmarks.checkpoints", *sys.argv[1:]]),
        "versions": {name: module.__version__ for name, module in packages.items()},
        "cases": measured,
    }
    print(table(results))
    if _OUTPUT.value:
        output = Path(_OUTPUT.value)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        output.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    app.run(main)
