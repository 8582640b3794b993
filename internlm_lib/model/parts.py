"""Names of a transformer layer's parts that can be recomputed one by one. Imports nothing heavy."""

PARTS = (
    "input_layernorm",
    "qkv",
    "core_attention",
    "pre_mlp_layernorm",
    "linear_fc1",
    "activation",
)
"""In the order they run; `qkv` is the projection with the rotary embedding, `activation` is SwiGLU.
The output of each is kept for the next one's backward pass, and dropped if the part is recomputed.
The two projections back to the hidden size are not among them: nothing keeps their outputs."""

WHOLE_LAYER = "layer"
"""All of a layer: only its input is kept."""
