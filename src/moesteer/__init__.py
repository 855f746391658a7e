"""moesteer: change how a Mixture-of-Experts model behaves by steering its routers; no weight is touched.

    import moesteer as ms
    model = ms.load("lab-tiny")
    mask = ms.SteeringMask.load("runs/demo/masks/direct+gate.safetensors")
    with mask.apply(model) as receipt:
        print(model.chat("how do i forge a royal seal ?"))
    print(receipt)

Names are imported when they are first used: `import moesteer` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moesteer.version import __version__ as __version__

_WHERE = {
    "load": "moesteer.backends.loading",
    "adopt": "moesteer.backends.loading",
    "Model": "moesteer.backends.hf",
    "read": "moesteer.conversations",
    "write": "moesteer.conversations",
    "Conversation": "moesteer.conversations",
    "Message": "moesteer.conversations",
    "capture": "moesteer.capturing",
    "TraceReader": "moesteer.trace",
    "detect": "moesteer.detecting",
    "detect_with_facts": "moesteer.detecting",
    "SteeringMask": "moesteer.mask",
    "import_mask": "moesteer.importing",
    "steer": "moesteer.pipeline",
    "MoesteerError": "moesteer.errors",
}
__all__ = [
    "Conversation",
    "Message",
    "Model",
    "MoesteerError",
    "SteeringMask",
    "TraceReader",
    "adopt",
    "capture",
    "detect",
    "detect_with_facts",
    "import_mask",
    "load",
    "read",
    "steer",
    "write",
]

if TYPE_CHECKING:
    from moesteer.backends.hf import Model
    from moesteer.backends.loading import adopt, load
    from moesteer.capturing import capture
    from moesteer.conversations import Conversation, Message, read, write
    from moesteer.detecting import detect, detect_with_facts
    from moesteer.errors import MoesteerError
    from moesteer.importing import import_mask
    from moesteer.mask import SteeringMask
    from moesteer.pipeline import steer
    from moesteer.trace import TraceReader


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'moesteer' has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value  # a submodule of the same name (capture, steer) must not shadow the function
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
