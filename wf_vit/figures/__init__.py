"""Figures for papers: arrays in, matplotlib Figures out; the caller saves.

All figures share one style: readable in a paper column (3.3 inches), colour-blind
safe, with text as text. Categories have Okabe and Ito's colours. Over a photograph,
amounts, signed effects and directions are colours whose opacity is the value, so that
the photograph stays visible where nothing happens; legends show the same colours on
light and on dark. ``source`` names model and indicator, once, at the foot. Save inside
``style()``, so that text stays text in a PDF:

    figure = learned_fields(images, gaussians, grid=(14, 14))
    with style():
        figure.savefig("fields.pdf")
        figure.savefig("fields.png")

Where there are more layers than a column has room for, the first, the last and some
spread evenly between them are shown.

Panels over a photograph use patch coordinates: the centre of the patch in row r and
column c is at (c, r), so the photograph spans -0.5 to GW - 0.5 and -0.5 to GH - 0.5.
"""

from wf_vit.figures.choice import telling_patches
from wf_vit.figures.curves import depth_profile, training_curves
from wf_vit.figures.effects import class_map
from wf_vit.figures.evidence import Curve, evidence
from wf_vit.figures.learned import (
    learned_areas,
    learned_beside_measured,
    learned_fields,
)
from wf_vit.figures.maps import indiscriminative, interactions, removal
from wf_vit.figures.regions import field_size, responsive_fields, tendency
from wf_vit.figures.style import COLUMN, PAGE, flow_colors, style
from wf_vit.figures.tokens import (
    class_attention,
    components_of,
    heads,
    principal_components,
)

__all__ = [
    "COLUMN",
    "PAGE",
    "Curve",
    "class_attention",
    "class_map",
    "components_of",
    "depth_profile",
    "evidence",
    "field_size",
    "flow_colors",
    "heads",
    "indiscriminative",
    "interactions",
    "learned_areas",
    "learned_beside_measured",
    "learned_fields",
    "principal_components",
    "removal",
    "responsive_fields",
    "style",
    "telling_patches",
    "tendency",
    "training_curves",
]
