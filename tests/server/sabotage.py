"""Ways in which a worker could stop steering while it goes on to answer; and how to mend each."""

from __future__ import annotations

from typing import Any

import numpy as np


class Sabotage:
    """Methods added to vLLM's worker (worker_extension_cls)."""

    model_runner: Any

    def sabotage(self, how: str) -> bool:
        """router: one router runs as vLLM made it. entry, table: tables are altered ("hidden": and deny it). rows: no
        token is steered. operator: every layer's passes the logits on. mend: as before."""
        steered = self.model_runner.moesteer
        tables = steered.tables
        if how == "mend":
            self._mend()
            return True
        self._mend = lambda: None  # type: ignore[method-assign]
        if how == "router":
            runner = steered.layers[1].runner
            kept = runner._moesteer_layer
            del runner._moesteer_layer
            self._mend = lambda: setattr(runner, "_moesteer_layer", kept)  # type: ignore[method-assign]
        elif how in ("entry", "table", "entry hidden"):
            bias, row = tables.bias[0], 1
            kept, expected = bias.clone(), steered._expected
            if how == "table":
                bias.zero_()
            else:
                at = int(np.argmax(np.abs(kept[row].numpy())))
                bias[row, at] = -bias[row, at]
            if "hidden" in how:
                steered._expected = steered._content_sha256()

            def mend() -> None:
                bias.copy_(kept)
                steered._expected = expected

            self._mend = mend  # type: ignore[method-assign]
        elif how == "rows":
            original = tables.set_rows
            tables.set_rows = lambda rows, staging: original(np.zeros_like(rows), staging)
            self._mend = lambda: delattr(tables, "set_rows")  # type: ignore[method-assign]
        elif how == "operator":
            tables.steer = lambda logits, layer_id: logits.clone()
            self._mend = lambda: delattr(tables, "steer")  # type: ignore[method-assign]
        else:
            raise ValueError(how)
        return True

    def _mend(self) -> None: ...
