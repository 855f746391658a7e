"""One conversation's routing without a mask and with it, token by token: RUN/routing.json, for the report.

Both passes read the same words, so that a difference is the mask's and not that of another text. Two texts are read:
the conversation with the reply of the model as it is, and with the steered one. Costs two to four forward passes over
one sequence.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from moesteer import files
from moesteer.backends.protocol import Captures, Steers
from moesteer.conversations import Message
from moesteer.errors import MoesteerError
from moesteer.mask import SteeringMask

FILE = "routing.json"
PROMPT_TOKENS, RESPONSE_TOKENS = 40, 24
"""The last of the prompt and the first of the response are shown: where a reply is decided."""

Rows = Sequence[Mapping[str, Any]]


class Routed(Captures, Steers, Protocol):
    """A backend that tells what its routers selected, without masks and with them."""

    tokenizer: Any


def keep(
    run: Path,
    model: Any,
    *,
    name: str | None,
    none: Rows,
    after: Rows,
    masks: Sequence[SteeringMask],
    alphas: Sequence[float | None] | None = None,
) -> Path:
    """Write RUN/routing.json: a conversation of both rows (responses/*.jsonl), chosen by rule; its path.

    name: the condition of `after`, such as a method's. masks: what acted on it, all together; a gate is taken off,
    since on a conversation whose reply changed it had fired. model: a backend (`Routed`); one that does not tell its
    selections, and whatever else cannot be shown, is said in the file and on standard error. Deterministic, so that a
    run that is gone on with writes the same bytes.
    """
    try:
        found = _shown(model, name, none, after, masks, alphas)
    except MoesteerError as error:
        found = {"not_shown": f"{error.what} ({error.where})"}
    if found.get("not_shown"):
        print(f"routing of a conversation is not shown: {found['not_shown']}", file=sys.stderr)
    path = Path(run) / FILE
    text = files.dumps({"schema": 1, "kind": "routing", **found}, indent=None)
    files.write_text(path, text + "\n")
    return path


def _shown(
    model: Routed, name: str | None, none: Rows, after: Rows, masks: Sequence[SteeringMask],
    alphas: Sequence[float | None] | None,
) -> dict[str, Any]:  # fmt: skip
    if not masks:
        return {"not_shown": "no mask was applied, or none is recommended"}
    picked = choose(none, after)
    if picked is None:
        return {"not_shown": "no conversation has a reply both without the mask and with it"}
    before_row, after_row, rule = picked
    texts = []
    for owner, row in (("none", before_row), (name or "steered", after_row)):
        messages = [Message(m["role"], m["content"]) for m in row["messages"]]
        encoded = model.encode(messages, row["response"])
        start, end = encoded.spans["response"]
        places = list(range(max(0, start - PROMPT_TOKENS), min(end, start + RESPONSE_TOKENS)))
        texts.append({"reply_of": owner, "encoded": encoded, "places": places, "start": start})
    ungated = [mask.with_gate(None, None) if mask.gated else mask for mask in masks]
    sides = {"before": [_selected(model, text) for text in texts]}
    with model.steered(ungated, alphas=alphas, together=True, allow_other_checkpoint=True):
        sides["after"] = [_selected(model, text) for text in texts]
    fingerprint = model.fingerprint
    return {
        "name": name,
        "conversation": {
            "id": before_row["id"], "suite": before_row["suite"], "tactic": before_row.get("tactic"), "chosen": rule,
        },
        "layers": list(fingerprint.layer_ids), "experts": fingerprint.experts, "top_k": fingerprint.top_k,
        "texts": [
            _as_json(model, text, sides["before"][number], sides["after"][number]) for number, text in enumerate(texts)
        ],
    }  # fmt: skip


def choose(none: Rows, after: Rows) -> tuple[Mapping[str, Any], Mapping[str, Any], str] | None:
    """A conversation without and with the mask, and why this one: blind to what was said but for whether it changed.

    In the order of the SHA-256 of suite and id: the first whose verdict changed, else the first whose reply changed,
    else the first of all. A row without a reply, or with one that is withheld, is none.
    """
    others = {(row["suite"], row["id"]): row for row in after if _readable(row)}
    pairs = [
        (row, others[key]) for row in none if _readable(row) and (key := (row["suite"], row["id"])) in others
    ]  # fmt: skip
    pairs.sort(key=lambda pair: files.sha256(f"{pair[0]['suite']}\0{pair[0]['id']}".encode("utf-8", "surrogatepass")))
    rules = (
        ("the first, by SHA-256 of suite and id, whose verdict changed", "verdict"),
        ("the first, by SHA-256 of suite and id, whose reply changed", "response"),
    )
    for rule, field in rules:
        for before_row, after_row in pairs:
            if before_row[field] != after_row[field]:
                return before_row, after_row, rule
    return (*pairs[0], "the first, by SHA-256 of suite and id; no reply changed") if pairs else None


def _readable(row: Mapping[str, Any]) -> bool:
    return bool(row.get("response")) and not row.get("fault") and not row.get("forbidden")


def _selected(model: Routed, text: Mapping[str, Any]) -> list[Any]:
    """[T, L, K] expert ids of the shown tokens; each token's in ascending order, since their order is no choice."""
    _, chosen_TLK = model.router_outputs([text["encoded"]], [text["places"]], logits=False)
    chosen_TLK.sort(axis=-1)
    found: list[Any] = chosen_TLK.tolist()
    return found


def _as_json(model: Routed, text: Mapping[str, Any], before: list[Any], after: list[Any]) -> dict[str, Any]:
    ids, places = text["encoded"].token_ids, text["places"]
    return {
        "reply_of": text["reply_of"],
        "tokens": [
            {"text": _text(model, ids[place]), "part": "response" if place >= text["start"] else "prompt"}
            for place in places
        ],
        "left_out": [places[0], len(ids) - 1 - places[-1]],
        "before": before,
        "after": after,
    }


def _text(model: Routed, token_id: int) -> str:
    """A token as people read it; by its own name where it is no text, or part of a letter."""
    text = str(model.tokenizer.decode([token_id]))
    if text and "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    return str(model.tokenizer.convert_ids_to_tokens(token_id))
