"""What a network still computes with a small share of its patch interactions.

    python -m benchmarks.sparsity --output results/sparsity

A real DINOv2 ViT-S/14 and photographs of scikit-image that come with its package. In
all layers and heads at once only the best interactions between patches stay; those
with the CLS token all stay, and each patch keeps itself, within the budget. Reported
are the cosines of the final CLS token, and of the final patch tokens in the mean, with
those of the full network. The rules score an interaction by

    a               its attention
    p               its propagated impact on all final tokens, M probes
    c               its impact within the layer, the closed form
    a^x p^(1-x)     mixtures
    a norm(v)       attention times the norm of what the value writes to the residual
    random, nearest

and keep the best by one threshold, with a floor (the part of the budget that is dealt
out evenly to the queries), or the top k per query.

Prints the table and writes OUTPUT.json and OUTPUT.md. Takes about a minute a photograph
on two cores.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import photographs
from wf_vit import grid, indicators, interventions
from wf_vit import measure
from wf_vit.models import pretrained

_PROBES = flags.DEFINE_integer("probes", 16, "M of the propagated indicator.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the probes and of the random rule.")

SHARES = (0.5, 0.25, 0.1, 0.05)
FLOORS = {0.0: "one threshold", 0.25: "floor 0.25", 1.0: "top k"}
RULES = {
    "a": (0.0, 1.0),
    "p": (0.0, 0.25),
    "c": (0.0,),
    "a^.25 p^.75": (0.0, 0.25),
    "a^.5 p^.5": (0.0, 0.25),
    "a^.75 p^.25": (0.0,),
    "a^.5 c^.5": (0.0,),
    "a norm(v)": (1.0,),
    "random": (0.0,),
    "nearest": (1.0,),
}


class Network:
    """A pretrained model, one image, and any additive bias of its attention."""

    def __init__(self, loaded: pretrained.Pretrained):
        self.model, self.params = loaded.model, loaded.params
        self.prefix = self.model.num_prefix_tokens
        kernel, scale = parameters.output_projection(self.model, self.params)
        self.kernel = kernel if scale is None else kernel * scale[:, None, None]
        self.run = jax.jit(self._run)

    def bias(self, keep) -> list[jax.Array]:
        """Returns the bias that leaves the interactions ``[L, H, P, P]``."""
        return interventions.attention_bias(
            keep[:, None], num_prefix_tokens=self.prefix
        )

    def _run(self, image, bias):
        tokens = self.model.apply({"params": self.params}, image, bias=bias)[1][
            "tokens"
        ]
        return tokens[0]


def keep_strongest(scores, share: float, floor: float) -> jax.Array:
    """Returns the mask of one image, ``[L, H, P, P]``."""
    keep = interventions.keep_strongest(scores[:, None], share, floor=floor)
    return keep[:, 0]


def masks(network: Network, image, key) -> Iterator[tuple[str, float, jax.Array]]:
    """Yields rule, share and mask of one image."""
    probes, noise = jax.random.split(key)
    model, params = network.model, network.params
    (recorded,) = measure.record(model, params, image)
    attention, values = recorded.attention[:, 0], recorded.values[:, 0]
    (propagated,) = measure.propagate(
        model,
        params,
        image,
        target="tokens",
        key=probes,
        num_probes=_PROBES.value,
        per_head=True,
    )
    p = propagated.impact[:, 0]
    a = attention[:, :, network.prefix :, network.prefix :]
    written = jnp.einsum("lnhk,lhkd->lhnd", values, network.kernel)
    norm = jnp.linalg.norm(written, axis=-1)[:, :, None, network.prefix :]
    scores = {"a": a, "p": p, "a norm(v)": a * norm}
    scores["c"] = indicators.knockout_impact(
        attention,
        values,
        network.kernel,
        num_prefix_tokens=network.prefix,
        per_head=True,
    )
    scores["a^.25 p^.75"] = a**0.25 * p**0.75
    scores["a^.5 p^.5"] = jnp.sqrt(a * p)
    scores["a^.75 p^.25"] = a**0.75 * p**0.25
    scores["a^.5 c^.5"] = jnp.sqrt(a * scores["c"])
    scores["random"] = jax.random.uniform(noise, p.shape)
    scores["nearest"] = jnp.broadcast_to(-grid.distances(network.model.grid), p.shape)
    for name, floors in RULES.items():
        for floor in floors:
            for share in SHARES:
                mask = keep_strongest(scores[name], share, floor)
                yield f"{name}, {FLOORS[floor]}", share, mask


def measure(network: Network, image, key) -> dict[str, dict[str, list[float]]]:
    """Returns the cosines of CLS and of patches of one image, by rule and share."""
    full = network.run(image, None)
    cosines = {}
    for rule, share, keep in masks(network, image, key):
        tokens = network.run(image, network.bias(keep))
        norms = jnp.linalg.norm(tokens, axis=-1) * jnp.linalg.norm(full, axis=-1)
        cosine = (tokens * full).sum(-1) / norms
        pair = [float(cosine[0]), float(cosine[network.prefix :].mean())]
        cosines.setdefault(rule, {})[str(share)] = pair
    return cosines


def summarize(by_photograph: Sequence[dict]) -> dict:
    """Returns mean and standard error of ``[CLS, patches]``, by rule and share."""
    summary = {}
    for rule in by_photograph[0]:
        summary[rule] = {}
        for share in by_photograph[0][rule]:
            pairs = np.array([cosines[rule][share] for cosines in by_photograph])
            error = None
            if len(pairs) > 1:
                error = (pairs.std(0, ddof=1) / len(pairs) ** 0.5).tolist()
            summary[rule][share] = {
                "mean": pairs.mean(0).tolist(),
                "standard_error_over_photographs": error,
                "by_photograph": pairs.tolist(),
            }
    return summary


def table(results: dict) -> str:
    """Returns the results as Markdown, the best of each column in bold."""
    cosines = results["cosines"]
    best = {
        str(share): np.max(
            [c[str(share)]["mean"] for c in cosines.values() if str(share) in c], 0
        )
        for share in SHARES
    }

    def cell(of_rule: dict, share: str) -> str:
        if share not in of_rule:
            return ""
        mean = of_rule[share]["mean"]
        error = of_rule[share]["standard_error_over_photographs"] or [None, None]
        parts = []
        for value, top, spread in zip(mean, best[share], error, strict=True):
            text = f"{value:.3f}" if value < top else f"**{value:.3f}**"
            parts.append(text if spread is None else f"{text} ± {spread:.3f}")
        return " / ".join(parts)

    rows = [["rule", *(f"keep {100 * share:g} %" for share in SHARES)]]
    rows.append(["---"] * len(rows[0]))
    rows += [[n, *(cell(c, str(s)) for s in SHARES)] for n, c in cosines.items()]
    return (
        f"Keeping a share of the patch interactions in all layers and heads "
        f"(`{results['command']}`): cosine of CLS / of the patches with the full "
        f"network, mean ± standard error over photographs "
        f"({', '.join(results['photographs'])}), M = {results['probes']}, seed "
        f"{results['seed']}. Best of each column in bold.\n\n"
    ) + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main(argv: Sequence[str]) -> None:
    """Measures, prints and writes."""
    del argv
    loaded, images = photographs.load()
    network = Network(loaded)
    by_photograph = []
    for place, image in enumerate(images.values()):
        key = jax.random.fold_in(jax.random.key(_SEED.value), place)
        by_photograph.append(measure(network, image, key))
        print(f"{place + 1} of {len(images)} photographs", flush=True)
    results = {
        **photographs.setting("sparsity", images),
        "seed": _SEED.value,
        "probes": _PROBES.value,
        "cosines": summarize(by_photograph),
    }
    photographs.report(results, table)


if __name__ == "__main__":
    app.run(main)
