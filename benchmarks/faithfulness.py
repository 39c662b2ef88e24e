"""How well each indicator ranks what happens when an interaction is really cut.

    python -m benchmarks.faithfulness --output results/faithfulness

Photographs of scikit-image that come with its package, a real DINOv2 ViT-S/14, and
the protocol of ``wf_vit.verify``: interactions drawn uniformly from all pairs of
patches in some layers, each cut in all heads, the rest of the network run. The cuts
are run in float64, because the weakest ones in early layers move the CLS token by
little more than the rounding of float32; indicators are computed in float32. In the
last layer a cut between patches cannot reach the CLS token, whose effect and
indicator are judged in the other layers.

Prints the tables and writes OUTPUT.json and OUTPUT.md. Takes twelve minutes on two
cores.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import photographs
from wf_vit import indicators, verify
from wf_vit import measure
from wf_vit.models import pretrained

_LAYERS = flags.DEFINE_list("layers", ["0", "3", "6", "9", "11"], "Layers to cut in.")
_INTERACTIONS = flags.DEFINE_integer("interactions", 80, "Cuts per layer and photo.")
_PROBES = flags.DEFINE_integer("probes", 16, "M of the propagated indicator.")
_PROBE_SEEDS = flags.DEFINE_integer("probe_seeds", 3, "Repeats with other probes.")
_SEED = flags.DEFINE_integer("seed", 0, "Of interactions, probes and baselines.")

ATTENTION_ONLY = ("mean", "max", "std", "odds")
PROPAGATED = ("tokens", "cls")


class Network:
    """A pretrained model: its indicators, and its answers to cuts, in float64."""

    def __init__(self, loaded: pretrained.Pretrained):
        self.model = loaded.model
        self.params = loaded.params
        self.exact = self.model.clone(dtype=jnp.float64)
        with jax.enable_x64(True):
            self.exact_params = jax.tree.map(
                lambda leaf: leaf.astype(jnp.float64), self.params
            )
        self._inputs = jax.jit(self._run_to, static_argnames="layers")
        self._run_from = jax.jit(self._finish, static_argnames="layer")

    def _run_to(self, params, image, layers):
        variables = {"params": params}
        tokens = self.exact.apply(variables, image, method="embed")
        inputs, start = {}, 0
        for layer in sorted(layers):
            tokens, _ = self.exact.apply(
                variables, tokens, start=start, stop=layer, method="encode"
            )
            inputs[layer], start = tokens, layer
        return inputs

    def _finish(self, params, tokens, bias, layer):
        variables = {"params": params}
        tokens = jnp.broadcast_to(tokens, (len(bias), *tokens.shape[1:]))
        bias = bias.astype(tokens.dtype)
        biases = [bias if n == layer else None for n in range(self.model.depth)]
        tokens, _ = self.exact.apply(
            variables, tokens, start=layer, bias=biases, method="encode"
        )
        return self.exact.apply(variables, tokens, method="readout")[1]["tokens"]

    def predict(self, image, layers: tuple[int, ...]) -> verify.Predict:
        """Returns the protocol's view of the network, for one image ``[1 ...]``."""
        with jax.enable_x64(True):
            inputs = self._inputs(self.exact_params, image, layers=layers)

        def predict(layer, bias):
            with jax.enable_x64(True):
                return self._run_from(
                    self.exact_params, inputs[layer], bias, layer=layer
                )

        return predict

    def propagate(self, image, target: str, key, *, shrink: bool = True) -> jax.Array:
        """Returns the propagated indicator of one image, ``[L, P, P]``."""
        (result,) = measure.propagate(
            self.model,
            self.params,
            image,
            target=target,
            key=key,
            num_probes=_PROBES.value,
            shrink=shrink,
            batch_size=1,
        )
        return result.impact[:, 0]

    def impacts(self, image, layers: tuple[int, ...], key) -> dict[str, np.ndarray]:
        """Returns every indicator of one image, ``[L, P, P]``, seeds in front."""
        prefix = {"num_prefix_tokens": self.model.num_prefix_tokens}
        (recorded,) = measure.record(self.model, self.params, image)
        stretch = indicators.expected_stretch(
            recorded.attention,
            parameters.head_gain(self.model, self.params),
            recorded.scale,
        )[np.array(layers), 0, self.model.num_prefix_tokens :, None]
        attention, values = (
            recorded.attention[np.array(layers), 0],
            recorded.values[np.array(layers), 0],
        )
        indicator = functools.partial(
            indicators.interaction_indicator, attention, grid=self.model.grid, **prefix
        )
        impacts = {method: indicator(method=method) for method in ATTENTION_ONLY}
        impacts["knockout"] = indicators.knockout_impact(
            attention,
            values,
            *parameters.output_projection(self.model, self.params, layers),
            **prefix,
        )
        impacts["knockout, stretched"] = stretch * impacts["knockout"]
        seeds = jax.random.split(key, _PROBE_SEEDS.value)
        for target, shrink in itertools.product(PROPAGATED, (True, False)):
            name = f"propagated {target}" + ("" if shrink else ", not shrunk")
            repeats = [
                self.propagate(image, target, seed, shrink=shrink) for seed in seeds
            ]
            impacts[name] = jnp.stack(repeats)[:, np.array(layers)]
        impacts["distance"] = indicator(method="distance")
        impacts["random"] = jnp.stack(
            [indicator(method="random", key=seed) for seed in seeds]
        )
        return {name: np.asarray(impact) for name, impact in impacts.items()}


def measure(network: Network, images, layers: tuple[int, ...]) -> dict:
    """Returns the summary of the correlations by target and indicator."""
    key = jax.random.key(_SEED.value)
    results = []
    for place, image in enumerate(images):
        cuts, probes = jax.random.split(jax.random.fold_in(key, place))
        results.append(
            verify.faithfulness(
                network.predict(image, layers),
                network.impacts(image, layers, probes),
                layers,
                key=cuts,
                num_prefix_tokens=network.model.num_prefix_tokens,
                num_interactions=_INTERACTIONS.value,
            )
        )
        print(f"{place + 1} of {len(images)} photographs", flush=True)
    return {
        target: {
            name: summarize(
                np.stack([r.correlation[target][name] for r in results], axis=-2),
                layers,
            )
            for name in results[0].correlation[target]
        }
        for target in verify.TARGETS
    }


def summarize(correlation: np.ndarray, layers: tuple[int, ...]) -> dict:
    """Means over the layers where ``[seeds..., photographs, layers]`` is defined."""
    correlation = correlation.reshape(-1, *correlation.shape[-2:])
    defined = np.isfinite(correlation).all((0, 1))
    correlation, layers = correlation[..., defined], np.array(layers)[defined]
    by_photograph = correlation.mean((0, -1))
    return {
        "mean": float(by_photograph.mean()),
        "standard_error_over_photographs": standard_error(by_photograph),
        "range_over_seeds": np.ptp(correlation.mean((1, 2))).item(),
        "by_photograph": by_photograph.tolist(),
        "by_layer": dict(
            zip(layers.tolist(), correlation.mean((0, 1)).tolist(), strict=True)
        ),
    }


def standard_error(samples: Sequence[float]) -> float | None:
    """Returns the standard error of a mean; None for a single sample."""
    if len(samples) < 2:
        return None
    return float(np.std(samples, ddof=1)) / len(samples) ** 0.5


def tables(results: dict) -> str:
    """Returns the results as Markdown, one table for each target."""
    names = ", ".join(results["photographs"])
    parts = [
        f"Spearman's rank correlation with real cuts (`{results['command']}`): mean "
        f"over layers and photographs ± standard error over photographs ({names}), "
        f"{results['interactions']} cuts for each layer and photograph; then the mean "
        "over photographs by layer.\n"
    ]
    for target, summaries in results["correlation"].items():
        layers = results["layers"]
        rows = [[f"effect on {target}", "mean", *(f"layer {n}" for n in layers)]]
        rows.append(["---"] * len(rows[0]))
        for name, summary in summaries.items():
            mean = f"{summary['mean']:.3f}"
            error = summary["standard_error_over_photographs"]
            mean += "" if error is None else f" ± {error:.3f}"
            by_layer = summary["by_layer"]
            values = (f"{by_layer[n]:.3f}" if n in by_layer else "" for n in layers)
            rows.append([name, mean, *values])
        parts.append("".join(f"| {' | '.join(row)} |\n" for row in rows))
    return "\n".join(parts)


def main(argv: Sequence[str]) -> None:
    """Measures, prints and writes."""
    del argv
    layers = tuple(sorted(int(layer) for layer in _LAYERS.value))
    loaded, images = photographs.load()
    network = Network(loaded)
    results = {
        **photographs.setting("faithfulness", images),
        "layers": layers,
        "interactions": _INTERACTIONS.value,
        "seed": _SEED.value,
        "probes": _PROBES.value,
        "probe_seeds": _PROBE_SEEDS.value,
        "correlation": measure(network, list(images.values()), layers),
    }
    photographs.report(results, tables)


if __name__ == "__main__":
    app.run(main)
