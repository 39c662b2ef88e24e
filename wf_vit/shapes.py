"""Axis letters and the array types that are named by them.

One letter means one axis in all code, docstrings and documents:

    B   batch                 L   layer
    H   head                  K   width of one head
    N   tokens                P   patches: N minus the prefix tokens
    D   width                 C   classes
    GH  rows of the grid      GW  columns of the grid; GH * GW = P

Tokens are ordered prefix first (CLS, distillation token, registers), then the
patches row by row: patch ``p`` lies in row ``p // GW`` and column ``p % GW``.
``attention[..., i, j]`` is the weight that query ``i`` gives to key ``j``.
Positions are ``(x, y)`` in patches, x to the right and y downwards.
"""

from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, UInt8
from jaxtyping import Key as KeyArray

# Images as the data layer gives them (8 bits) and as models take them.
RawImages = UInt8[Array, "B height width 3"]
Images = Float[Array, "B height width 3"]

# The residual stream of a model, and one value vector per token and head.
Tokens = Float[Array, "B N D"]
Values = Float[Array, "*batch N H K"]

# Attention weights after the softmax (each row sums to 1), or logits before it.
Attention = Float[Array, "*batch H N N"]

# A number per interaction i<-j of two patches, fused over heads.
Interactions = Float[Array, "*batch P P"]

Logits = Float[Array, "B C"]
Labels = Int[Array, "B"]
Mask = Bool[Array, "*batch N N"]

Params = PyTree[Array]
# Randomness: one key, or one for each image.
Key = PRNGKeyArray
Keys = Key | KeyArray[Array, "B"]
