"""Random attention, and a layer in float64 to compare with."""

import jax.numpy as jnp
import numpy as np


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def random_attention(*shape, seed=0, spread=1.0):
    logits = np.random.default_rng(seed).normal(size=(*shape, shape[-1])) * spread
    return jnp.asarray(softmax(logits), jnp.float32)


class Layer:
    """One attention layer in float64, which can really mask a key."""

    def __init__(self, heads=3, tokens=14, head_width=5, width=8, spread=1.0, seed=0):
        rng = np.random.default_rng(seed)
        self.rng = rng
        self.logits = rng.normal(size=(heads, tokens, tokens)) * spread
        self.values = rng.normal(size=(tokens, heads, head_width))
        self.kernel = rng.normal(size=(heads, head_width, width))
        self.scale = rng.normal(size=width)

    def make_near_one_hot(self, boost):
        """Lets one random key of every row and head take nearly all weight."""
        heads, tokens, _ = self.logits.shape
        key = self.rng.integers(tokens, size=(heads, tokens, 1))
        top = np.take_along_axis(self.logits, key, -1) + boost
        np.put_along_axis(self.logits, key, top, -1)

    def head_outputs(self, logits):
        heads = np.einsum("hqn,nhk->hqk", softmax(logits), self.values)
        return np.einsum("hqk,hkd->hqd", heads, self.kernel) * self.scale

    def displacements(self):
        """The displacement of every head's output for every cut, [H, N, N, D]."""
        before = self.head_outputs(self.logits)
        cuts = []
        for key in range(self.logits.shape[-1]):
            masked = self.logits.copy()
            masked[:, :, key] = -np.inf
            cuts.append(before - self.head_outputs(masked))
        return np.stack(cuts, 2)

    def arrays(self):
        """Attention, values, output kernel and scale, as a model records them."""
        arrays = (softmax(self.logits), self.values, self.kernel, self.scale)
        return tuple(jnp.asarray(x, jnp.float32) for x in arrays)
