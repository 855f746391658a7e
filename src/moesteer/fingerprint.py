"""What a mask or a trace was made with: enough to refuse another model."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Fingerprint(BaseModel):
    """A model's routing, in a few words.

    layer_ids: decoder layers that have a router, ascending. router_sha256: digest of all router weights as
    float32, so that a bfloat16 checkpoint has one fingerprint in whatever dtype it is loaded.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_type: str
    layer_ids: tuple[int, ...]
    experts: int
    top_k: int
    scoring: str
    router_sha256: str

    def shape_differences(self, other: Fingerprint) -> list[str]:
        """In what the shapes differ, as sentences; empty when a mask fits."""
        names = ("model_type", "layer_ids", "experts", "top_k", "scoring")
        return [
            f"{name}: mask has {getattr(self, name)}, model has {getattr(other, name)}"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]
