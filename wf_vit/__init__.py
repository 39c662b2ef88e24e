"""Measure, show and train from the patch interactions of vision transformers.

    wf_vit.explain("hf://facebook/dinov2-small", "photo.jpg")

A part is imported when it is first used, so that ``import wf_vit`` is light, and
``wf_vit.indicators`` needs no TensorFlow.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PARTS = (
    "arrays",
    "data",
    "errors",
    "explanation",
    "fields",
    "figures",
    "grid",
    "indicators",
    "interventions",
    "measure",
    "models",
    "page",
    "selection",
    "shapes",
    "tendency",
    "train",
    "verify",
)


def __getattr__(name: str) -> Any:
    if name == "explain":
        return importlib.import_module(f"{__name__}.explanation.notebook").explain
    if name in _PARTS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PARTS, "explain"})
