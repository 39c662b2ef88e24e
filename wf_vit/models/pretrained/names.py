"""How published checkpoints name their parameters: patterns and our names.

The patterns are applied in order to every name, with what stands before the names of
the network taken off. A name that no pattern knows is left as it is, and is then
listed as unknown.
"""

Renames = tuple[tuple[str, str], ...]


def _projections(scope: str) -> Renames:
    """Separate query, key, value and output projections, named as in Hugging Face."""
    return (
        (rf"/{scope}\.q_proj\.", "/attention/query."),
        (rf"/{scope}\.k_proj\.", "/attention/key."),
        (rf"/{scope}\.v_proj\.", "/attention/value."),
        (rf"/{scope}\.(?:o_proj|out_proj)\.", "/attention/out."),
    )


TIMM_NAMES: Renames = (
    (r"^cls_token$", "cls"),
    (r"^dist_token$", "distillation"),
    (r"^(?:reg_token|register_tokens|storage_tokens)$", "registers"),
    (r"^pos_embed$", "positions"),
    (r"^patch_embed\.proj\.", "patches."),
    (r"^(?:norm_pre|patch_embed\.norm)\.", "embedding_norm."),
    # Meta stores the blocks of its largest models in chunks.
    (r"^blocks\.(?:\d+\.)?(\d+)\.", r"blocks_\1/"),
    (r"/norm1\.", "/attention_norm."),
    (r"/norm2\.", "/mlp_norm."),
    (r"/attn\.([qv])_bias$", r"/attn.\1_proj.bias"),
    (r"/attn\.qkv\.", "/attention/qkv."),
    (r"/attn\.proj\.", "/attention/out."),
    *_projections("attn"),
    (r"/attn\.relative_position_bias_table$", "/relative_positions"),
    (r"^rel_pos_bias\.relative_position_bias_table$", "relative_positions"),
    (r"/(?:ls1\.gamma|gamma_1)$", "/attention_scale"),
    (r"/(?:ls2\.gamma|gamma_2)$", "/mlp_scale"),
    (r"^fc_norm\.", "norm."),
    (r"^head_dist\.", "head_distillation."),
    (r"^linear_head\.", "head."),
    (r"^attn_pool\.latent$", "attention_pool/probe"),
    (r"^attn_pool\.norm\.", "attention_pool/norm."),
    (r"^attn_pool\.mlp\.", "attention_pool/mlp."),
    (r"^attn_pool\.q\.", "attention_pool/attention/query."),
    (r"^attn_pool\.kv\.", "attention_pool/attention/kv."),
    (r"^attn_pool\.proj\.", "attention_pool/attention/out."),
    (r"/mlp\.w12\.", "/mlp/gate_up."),
    (r"/mlp\.(?:fc1_g|w1)\.", "/mlp/gate."),
    (r"/mlp\.(?:fc1_x|w2)\.", "/mlp/up."),
    (r"/mlp\.(?:fc1|c_fc)\.", "/mlp/up."),
    (r"/mlp\.(?:fc2|w3|c_proj)\.", "/mlp/down."),
    (r"/mlp\.(?:norm|ffn_ln)\.", "/mlp/norm."),
)

# AIMv2 as Apple stores it: fc1 and fc3 are what timm calls fc1_g and fc1_x.
APPLE_NAMES: Renames = (
    (r"^preprocessor\.pos_embed$", "positions"),
    (r"^preprocessor\.patchifier\.proj\.", "patches."),
    (r"^preprocessor\.patchifier\.norm\.", "embedding_norm."),
    (r"^trunk\.post_trunk_norm\.", "norm."),
    (r"^trunk\.blocks\.(\d+)\.", r"blocks_\1/"),
    (r"/norm_1\.", "/attention_norm."),
    (r"/norm_2\.", "/mlp_norm."),
    (r"/attn\.qkv\.", "/attention/qkv."),
    (r"/attn\.proj\.", "/attention/out."),
    (r"/mlp\.fc1\.", "/mlp/gate."),
    (r"/mlp\.fc3\.", "/mlp/up."),
    (r"/mlp\.fc2\.", "/mlp/down."),
)

# Both the names in the files, and those of transformers 5 in memory.
HUGGING_FACE_NAMES: Renames = (
    (r"^embeddings\.patch_embeddings\.(?:projection\.)?", "patches."),
    (r"^embeddings\.patch_embed(?:ding)?\.", "patches."),
    (r"^embeddings\.(?:cls_token|class_embedding)$", "cls"),
    (r"^embeddings\.distillation_token$", "distillation"),
    (r"^embeddings\.register_tokens$", "registers"),
    (r"^embeddings\.position_embeddings?(?:\.weight)?$", "positions"),
    (r"^(?:pre_layrnorm|embeddings\.rms_norm)\.", "embedding_norm."),
    (r"^(?:model\.|encoder\.)?layers?\.(\d+)\.", r"blocks_\1/"),
    (r"/(?:layernorm_before|(?:rms_|layer_)?norm1)\.", "/attention_norm."),
    (r"/(?:layernorm_after|(?:rms_|layer_)?norm2)\.", "/mlp_norm."),
    (r"/attention\.attention\.(query|key|value)\.", r"/attention/\1."),
    (r"/attention\.output\.dense\.", "/attention/out."),
    *_projections("(?:attention|self_attn)"),
    (
        r"/(?:attention\.attention\.)?relative_position_bias\.\w+$",
        "/relative_positions",
    ),
    (
        r"^(?:encoder\.relative|shared)_position_bias\.relative_position_bias_table$",
        "relative_positions",
    ),
    (r"/(?:intermediate\.dense|(?:mlp|ffn)\.(?:fc1|up_proj))\.", "/mlp/up."),
    (r"/(?:mlp|ffn)\.gate_proj\.", "/mlp/gate."),
    (r"/mlp\.weights_in\.", "/mlp/gate_up."),
    (r"/(?:output\.dense|(?:mlp|ffn)\.(?:fc2|weights_out|down_proj))\.", "/mlp/down."),
    (r"/(?:layer_scale1\.lambda1|lambda_1)$", "/attention_scale"),
    (r"/(?:layer_scale2\.lambda1|lambda_2)$", "/mlp_scale"),
    (r"^(?:pooler\.layernorm|layernorm|post_layernorm|rms_norm)\.", "norm."),
    (r"^pooler\.dense\.", "representation."),
    (r"^visual_projection\.", "representation."),
    (r"^(?:cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_distillation."),
    (r"^head\.(?:probe|cls_token)$", "attention_pool/probe"),
    (r"^head\.attention\.in_proj_(weight|bias)$", r"attention_pool/attention/qkv.\1"),
    (r"^head\.k_proj\.", "attention_pool/attention/key."),
    (r"^head\.v_proj\.", "attention_pool/attention/value."),
    (
        r"^head\.(?:attention\.out_proj|output_proj)\.",
        "attention_pool/attention/out.",
    ),
    (r"^head\.layernorm\.", "attention_pool/norm."),
    (r"^head\.mlp\.fc1\.", "attention_pool/mlp/up."),
    (r"^head\.mlp\.fc2\.", "attention_pool/mlp/down."),
)

# CLIP as OpenAI and OpenCLIP store it, and Meta's Perception Encoder.
CLIP_NAMES: Renames = (
    (r"^conv1\.", "patches."),
    (r"^class_embedding$", "cls"),
    (r"^positional_embedding$", "positions"),
    (r"^ln_pre\.", "embedding_norm."),
    (r"^ln_post\.", "norm."),
    (r"^proj$", "representation.kernel"),
    (r"^transformer\.resblocks\.(\d+)\.", r"blocks_\1/"),
    (r"/ln_1\.", "/attention_norm."),
    (r"/ln_2\.", "/mlp_norm."),
    (r"/attn\.in_proj_(weight|bias)$", r"/attention/qkv.\1"),
    (r"/attn\.out_proj\.", "/attention/out."),
    (r"/ls_1\.gamma$", "/attention_scale"),
    (r"/ls_2\.gamma$", "/mlp_scale"),
    (r"^attn_pool\.probe$", "attention_pool/probe"),
    (r"^attn_pool\.attn\.in_proj_(weight|bias)$", r"attention_pool/attention/qkv.\1"),
    (r"^attn_pool\.attn\.out_proj\.", "attention_pool/attention/out."),
    (r"^attn_pool\.layernorm\.", "attention_pool/norm."),
    (r"^attn_pool\.mlp\.", "attention_pool/mlp."),
    (r"/mlp\.c_fc\.", "/mlp/up."),
    (r"/mlp\.c_proj\.", "/mlp/down."),
    (r"^attention_pool/mlp\.c_fc\.", "attention_pool/mlp/up."),
    (r"^attention_pool/mlp\.c_proj\.", "attention_pool/mlp/down."),
)

GOOGLE_NAMES: Renames = (
    (r"^embedding/", "patches/"),
    (r"^(?:Transformer/posembed_input/)?pos_embedding$", "positions"),
    (r"^Transformer/encoder_norm/", "norm/"),
    (r"^MAPHead_0/LayerNorm_0/", "attention_pool/norm/"),
    (r"^MAPHead_0/", "attention_pool/"),
    (r"^Transformer/encoderblock_(\d+)/", r"blocks_\1/"),
    (r"/LayerNorm_0/", "/attention_norm/"),
    (r"/LayerNorm_[12]/", "/mlp_norm/"),
    (r"/MultiHeadDotProductAttention_\d/", "/attention/"),
    (r"/MlpBlock_\d/Dense_0/", "/mlp/up/"),
    (r"/MlpBlock_\d/Dense_1/", "/mlp/down/"),
    (r"^pre_logits/", "representation/"),
)
