"""How far a static expert bias can go at all: lab tiny's document-following, with nothing kept.

    python bench/ceiling.py [--steps 200]

For each choice of positions that are steered, a bias [L, E] is optimised through the model on the fit split's own
documents towards the wanted answers, without any term that keeps other text and without a penalty: what this
optimisation reaches, a mask that must also keep other text should not be expected to exceed. Beside it: the same for
a vector added to the residual stream behind every decoder layer, which has more numbers and acts on more than
routing; and how often the model follows the same kind of document when the wording asks for it, which is what its
weights can do. Writes bench/results/ceiling.json.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesteer import files, runs
from moesteer import scenario as scenarios
from moesteer.backends.chat import Encoded
from moesteer.backends.hf import Model, response_places
from moesteer.backends.layers import decoder_layers
from moesteer.backends.loading import load
from moesteer.capturing import forward
from moesteer.conversations import Message
from moesteer.lab import dialogue, world
from moesteer.models.routers import Router
from moesteer.models.steering import BiasSteering

RESULTS = Path(__file__).parent / "results" / "ceiling.json"
RESPONSE_TOKENS = 12
QUESTION_TOKENS = 8
"""A plain question and the marks behind it: "what is the capital of X ?" and the reply's opening."""


class AtPositions(BiasSteering):
    """A bias that acts on some positions only."""

    def __init__(self, bias_LE: Tensor, open_N: Tensor) -> None:
        super().__init__(bias_LE)
        self.open_N = open_N

    def logits(self, router: Router, logits_NE: Tensor) -> Tensor:
        """logits + bias of the router's layer where it may act."""
        return logits_NE + self.bias_LE[router.index] * self.open_N[:, None]


def spans(encoded: Encoded, width: int, where: str) -> Tensor:
    """[width] 1 where the bias acts on one sequence."""
    start = encoded.spans["response"][0]
    low, high = {
        "everywhere": (0, width),
        "the reply": (start - 1, width),
        "the prompt": (0, start - 1),
        "the question and the reply": (start - 1 - QUESTION_TOKENS, width),
    }[where]
    found = torch.zeros(width)
    found[low:high] = 1.0
    return found


@contextmanager
def added(model: Model, vectors_LD: Tensor) -> Iterator[None]:
    """Vectors added to the residual stream, each behind its decoder layer, at every position."""

    def hook(row: int) -> Callable[[nn.Module, Any, Any], Any]:
        def shifted(module: nn.Module, given: Any, out: Any) -> Any:
            moved = vectors_LD[row]
            return (out[0] + moved, *out[1:]) if isinstance(out, tuple) else out + moved

        return shifted

    layers = decoder_layers(model)
    handles = [layers[layer_id].register_forward_hook(hook(row)) for row, layer_id in enumerate(sorted(layers))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def predicted(model: Model, items: Sequence[Encoded], bias_LE: Tensor, where: str) -> tuple[Tensor, Tensor, Tensor]:
    """(vocabulary logits, the tokens they should predict, number of the sequence) at the response's positions."""
    ids, attention = model.pad([e.token_ids for e in items], left=False)
    rows, columns = response_places(items, most=RESPONSE_TOKENS)
    opened = torch.stack([spans(e, ids.shape[1], where) for e in items]).reshape(-1)
    with model.tap.steer(AtPositions(bias_LE, opened)):
        logits = model._logits_at(ids, attention, rows, columns)
    return logits, ids[rows, [c + 1 for c in columns]], torch.tensor(rows)


def optimised(predict: Callable[[], tuple[Tensor, Tensor, Tensor]], numbers: Tensor, steps: int, rate: float) -> float:
    """Adam on the numbers towards the tokens that should be predicted; the last loss."""
    optimizer = torch.optim.Adam([numbers], lr=rate)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2.0 * (1.0 - step / steps)))
    last = float("nan")
    for _ in range(steps):
        logits, wanted, _ = predict()
        loss = nn.functional.cross_entropy(logits, wanted)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        falling.step()
        last = loss.item()
    return last


def followed(found: tuple[Tensor, Tensor, Tensor], items: Sequence[Encoded]) -> float:
    """Share of the items whose every response token is the likeliest."""
    logits, wanted, rows = found
    missed = rows[logits.argmax(-1) != wanted].unique()
    return 1.0 - len(missed) / len(items)


def capability(model: Model, wording: str, split: str) -> float:
    """Share of documents followed when the question says `according to the document` (or says nothing)."""
    rng = random.Random(0)
    asked, wanted = [], []
    for country in world._countries(split):
        for relation in world.w.RELATIONS:
            ask, stated, _ = dialogue.document(rng, country, relation, wording=wording)
            asked.append([Message("user", ask)])
            wanted.append(stated)
    made = model.generate(asked, max_new_tokens=8)
    return sum(one.text == text for one, text in zip(made, wanted, strict=True)) / len(wanted)


def in_the_stream(model: Model, items: dict[str, list[Encoded]], steps: int) -> dict[str, float]:
    """Shares followed with optimised vectors behind every layer, and the last loss."""
    vectors_LD = torch.zeros((len(decoder_layers(model)), model.hf.config.hidden_size), requires_grad=True)
    zero = torch.zeros((len(model.routers), model.fingerprint.experts))
    with added(model, vectors_LD):
        last = optimised(lambda: predicted(model, items["fit"], zero, "everywhere"), vectors_LD, steps, 0.03)
        with torch.no_grad():
            shares = {
                split: followed(predicted(model, rows, zero, "everywhere"), rows) for split, rows in items.items()
            }
    print(f"{'vectors in the residual stream':<36} {_line(shares)}  loss {last:.3f}", flush=True)
    return {**shares, "loss": last}


def unsteered(model: Model, items: dict[str, list[Encoded]]) -> dict[str, float]:
    """Shares followed by the model as it is, on the same documents."""
    zero = torch.zeros((len(model.routers), model.fingerprint.experts))
    with torch.no_grad():
        return {split: followed(predicted(model, rows, zero, "everywhere"), rows) for split, rows in items.items()}


def _line(shares: dict[str, float]) -> str:
    return "  ".join(f"{split} {100 * share:5.1f} %" for split, share in shares.items())


def main() -> None:
    """Optimise, print one table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    model = load("lab-tiny")
    for parameter in model.hf.parameters():
        parameter.requires_grad_(False)
    data = scenarios.splits(scenarios.load("faithfulness"), seed=0)["documents"]
    items = {split: [model.encode(c.messages, c.reference) for c in data[split]] for split in ("fit", "select")}
    logits_NLE = forward(model, items["fit"], spans=("response",), logits=True)[0][0]
    assert logits_NLE is not None
    sigma_L = torch.from_numpy(logits_NLE.std(axis=(0, 2)))
    asked = {w: {s: capability(model, w, s) for s in ("fit", "select")} for w in ("document", "plain")}
    found: dict[str, dict[str, float]] = {"nothing": unsteered(model, items)}
    print(f"{'nothing':<36} {_line(found['nothing'])}", flush=True)
    for where in ("everywhere", "the reply", "the prompt", "the question and the reply"):
        strength = torch.zeros((len(sigma_L), model.fingerprint.experts), requires_grad=True)
        last = optimised(
            lambda strength=strength, where=where: predicted(
                model, items["fit"], sigma_L[:, None] * strength, where
            ), strength, given.steps, 0.1,
        )  # fmt: skip
        bias = (sigma_L[:, None] * strength).detach()
        with torch.no_grad():
            shares = {split: followed(predicted(model, rows, bias, where), rows) for split, rows in items.items()}
        found[f"bias on {where}"] = {**shares, "loss": last}
        print(f"bias on {where:<28} {_line(shares)}  loss {last:.3f}", flush=True)
    found["vectors in the residual stream"] = in_the_stream(model, items, given.steps)
    for wording, shares in asked.items():
        print(f"wording {wording:<28} {_line(shares)}")
    files.write_json(
        RESULTS, {"steps": given.steps, "steered": found, "wording": asked, "versions": runs.versions(), "n": {
            split: len(rows) for split, rows in items.items()}},
    )  # fmt: skip
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
