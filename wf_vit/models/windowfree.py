"""WinfT, the window-free transformer: every patch learns where it looks.

The name and the aim are the paper's (arXiv 2203.05922); the parametrisation of the
fields is ours (``wf_vit.models.membership``).
"""

import functools

from wf_vit.models.membership import FieldConfig, PredictedFields
from wf_vit.models.vit import ViT


class WindowFreeViT(ViT):
    """A ViT in which each layer, patch and head predicts its own field.

    There is no partition and no fixed window. With fields far wider than the grid,
    and the same parameters, it computes exactly what ``ViT`` does.

    Attributes:
      fields: how the fields start and how sharp they are.
    """

    fields: FieldConfig = FieldConfig()

    def field_for_layer(self, layer: int):
        """Returns the maker of the module that predicts a layer's fields."""
        return functools.partial(
            PredictedFields, grid=self.grid, config=self.fields, layer=layer
        )
