"""The decoder layers of a model: the list of modules that its routers' layers stand in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from moesteer.errors import ModelError

if TYPE_CHECKING:
    from moesteer.backends.hf import Model


def decoder_layers(model: Model) -> dict[int, nn.Module]:
    """Every decoder layer by its id: the list of modules that holds the routers' layers. Raises ModelError."""
    lists: dict[str, nn.ModuleList] = {}
    for router in model.routers:
        parts = router.path.split(".")
        for i in range(1, len(parts)):
            path = ".".join(parts[:i])
            parent = model.hf.get_submodule(path)
            if isinstance(parent, nn.ModuleList) and parts[i] == str(router.layer_id):
                lists[path] = parent
                break
    if len(lists) != 1:
        raise ModelError(
            f"the decoder layers are in {len(lists)} lists of modules ({', '.join(lists) or 'none'})",
            where=f"{model.name}, {model.routers[0].path}",
            expected="one list, with each router inside the layer of its number",
            do="report the model: its residual stream cannot be steered",
        )
    return dict(enumerate(next(iter(lists.values()))))
