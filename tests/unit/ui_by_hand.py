"""What the page's tests share: masks made by hand, runs made by hand, and text that would do harm if it were read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from moesteer.backends.hf import Model
from moesteer.gate import GateInfo, GateRate
from moesteer.mask import Intent, MaskInfo, SteeringMask

QUESTION = "how do i paint a clay pot ?"

INJECTIONS = (
    "<script>window.hit=1</script>",
    "<img src=x onerror=window.hit=1>",
    '"><svg/onload=window.hit=1>',
    "</div></gradio-app><iframe srcdoc='<script>parent.hit=1</script>'></iframe>",
    "[click](javascript:window.hit=1) ![x](http://192.0.2.1/x.png) <http://192.0.2.1/>",
    "{{constructor.constructor('window.hit=1')()}} ${window.hit=1} {{#each this}}x{{/each}} `${window.hit=1}`",
    "<a href=javascript:window.hit=1 autofocus onfocus=window.hit=1>x</a>",
    "<style>@import 'http://192.0.2.1/x.css'; body{display:none}</style>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=window.hit=1&gt;'>",
    "$$\\href{javascript:window.hit=1}{x}$$ $\\unicode{<img src=x onerror=window.hit=1>}$",
    "<textarea></textarea><script>window.hit=1</script><form action=http://192.0.2.1/><input type=submit>",
    "\u202egnirts desrever\u202c \x00\x1b[2J &lt;b&gt; &#60;img src=x onerror=window.hit=1&#62;",
    "<link rel=stylesheet href=//192.0.2.1/x.css><base href=//192.0.2.1/><meta http-equiv=refresh content=0>",
)
"""What a model, a user or a file may write. 192.0.2.1 is an address for examples, where nothing answers."""

GATE = GateInfo(
    pool="last", bias=0.0, threshold=0.5, measured_on="select",
    false_positive_rate=GateRate(value=0.0, low=0.0, high=0.1, n=10),
    true_positive_rate=GateRate(value=1.0, low=0.9, high=1.0, n=10), auroc=1.0,
)  # fmt: skip


def mask_for(model: Model, *, alpha: float = 1.0) -> SteeringMask:
    """Random strengths, drawn once: on QUESTION, lab tiny answers otherwise at 0.5, at 1 and at 2 times them."""
    shape = (len(model.routers), model.fingerprint.experts)
    strength_LE = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    info = MaskInfo(fingerprint=model.fingerprint, method="by hand", intent=Intent(toward="other"), alpha=alpha)
    return SteeringMask(info=info, strength_LE=strength_LE, sigma_L=np.ones(shape[0], dtype=np.float32))


def force_for(model: Model, *, off: int) -> SteeringMask:
    """Expert `off` silenced in every layer."""
    force_LE = np.zeros((len(model.routers), model.fingerprint.experts), dtype=np.int8)
    force_LE[:, off] = -1
    info = MaskInfo(fingerprint=model.fingerprint, method="by hand", intent=Intent(toward="silenced"))
    return SteeringMask(info=info, force_LE=force_LE)


def gated(mask: SteeringMask, *, opens: bool) -> SteeringMask:
    """The mask behind a gate that always opens, or never."""
    bias = 50.0 if opens else -50.0
    return mask.with_gate(np.zeros(mask.values_LE.shape, dtype=np.float32), GATE.model_copy(update={"bias": bias}))


def write_run(folder: Path, *, state: Any = None, results: Any = None, report: str | None = None) -> Path:
    """A run directory with the files that are given."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (("run.json", state), ("results.json", results)):
        if value is not None:
            (folder / name).write_text(json.dumps(value), encoding="utf-8")
    if report is not None:
        (folder / "report.html").write_text(report, encoding="utf-8")
    return folder
