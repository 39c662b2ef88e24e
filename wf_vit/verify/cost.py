"""How long it takes to find out what to keep, beside a forward pass."""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax

from wf_vit.measure import impact
from wf_vit.shapes import Images, Key
from wf_vit.verify import report
from wf_vit.verify.subject import Subject, classify

FORWARD, SINGLE, TOGETHER = "forward pass", "single cuts", "chosen together"


def measure(
    subject: Subject, choose: Callable[[Images, Key], Any], turns: int
) -> dict[str, float]:
    """Returns milliseconds for one image, the median over turns, compiled before.

    Args:
      subject: the model.
      choose: chooses what to keep of some images.
      turns: how often.
    """
    model, params = subject.model, subject.params
    key = jax.random.key(0)
    images = jax.random.normal(key, (1, *model.image_size, 3))
    single = partial(
        impact,
        model,
        params,
        images,
        "propagated",
        per_head=True,
        num_probes=subject.num_probes,
        key=key,
    )
    functions = {
        FORWARD: partial(classify, params, images, model=model),
        SINGLE: lambda: single().heads,
        TOGETHER: partial(choose, images, key),
    }
    return take_turns(functions, turns)


def table(milliseconds: Mapping[str, float], what: str) -> str:
    """Returns the costs as Markdown.

    Args:
      milliseconds: of ``measure``.
      what: what is chosen together.
    """
    whole = milliseconds[FORWARD]
    lines = []
    for name, time_of in milliseconds.items():
        label = f"{name}, {what}" if name == TOGETHER else name
        lines.append([label, f"{time_of:,.1f}", f"{time_of / whole:,.1f}"])
    return report.markdown(["cost for one image", "ms", "forward passes"], lines)


def take_turns(
    functions: Mapping[Any, Callable[[], Any]], turns: int
) -> dict[Any, float]:
    """Returns the median time of each function, in milliseconds."""
    for function in functions.values():
        jax.block_until_ready(function())
    taken = {name: [] for name in functions}
    for _ in range(turns):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            taken[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in taken.items()}
