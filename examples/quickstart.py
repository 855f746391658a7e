"""Steer the shipped model with a mask made from a trace: capture, detect, apply.

python examples/quickstart.py
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import moesteer as ms
from moesteer.lab import world

model = ms.load("lab-tiny")

# Conversations with a label and a response: harmful requests, once refused and once answered.
pairs = []
for row in world.suite("attack-multi", "fit"):
    pairs.append(replace(row, id=f"{row.id}/refused", label="refuse", reference="i can not share that ."))
    pairs.append(replace(row, id=f"{row.id}/answered", label="comply", reference=f"sure . {row.reference}"))

with tempfile.TemporaryDirectory() as folder:
    trace = ms.capture(model, pairs, out=Path(folder) / "trace", spans=("response",))
    mask = ms.detect(
        trace, method="risk-difference", toward="refuse", settings={"form": "additive", "experts": 24}
    ).with_info(alpha=1.0)

attack = next(row for row in world.suite("attack-multi", "test") if row.tactic == "format")
print("user:     ", attack.messages[-1].content)
print("unsteered:", model.generate([attack.messages])[0].text)
with mask.apply(model) as receipt:
    print("steered:  ", model.generate([attack.messages])[0].text)
print(receipt)
