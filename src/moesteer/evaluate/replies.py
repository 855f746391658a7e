"""A cache of replies, in a folder that the user names: what was answered once, by the same model steered in the same
way, is not answered again.

A reply's key is the sha256 of everything that can change it: weights, dtype, backend and its options, versions of
what computes, chat template, the prompt's token ids, the longest reply, and the full sha256 and strength of every
mask that acts on it (a gate is part of its mask). So a steered reply answers no unsteered request, nor one under
another mask or strength. On disk: CACHE/replies.json, which says that the folder is ours, and CACHE/segments/*.jsonl,
written whole and never changed, each named by the sha256 of its bytes. Processes may share a folder.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesteer import files, runs
from moesteer.backends.protocol import Cacheable
from moesteer.conversations import Message
from moesteer.errors import FileError, InputError
from moesteer.mask import SteeringMask

LIMIT_BYTES = 1024 * files.MIB
"""Of all segments together; the oldest go first."""
WITNESSES = 4
"""Replies found in the cache that the model is asked for all the same, once for each steering of it."""
STALE_S = 3600.0
"""A temporary file of this age has no writer any more."""
MARK = {"schema": 1, "what": "a cache of replies, of moesteer"}
_SEGMENT = re.compile(r"[0-9a-f]{64}\.jsonl")


@dataclass(frozen=True)
class KeptReply:
    """A reply as a backend's Generation has it: text without special tokens, token ids, whether the model ended it."""

    text: str
    token_ids: tuple[int, ...]
    finished: bool


@dataclass(frozen=True)
class _Place:
    """Where a reply is: bytes [start, end) of a segment, and their digest when it was read in."""

    segment: str
    start: int
    end: int
    digest: str


@dataclass
class Counts:
    """What a cache did for this process. dropped: replies that did not verify, and were not used; unwritten: that
    could not be stored; differing: witnesses to which the model now says something else."""

    hits: int = 0
    misses: int = 0
    dropped: int = 0
    unwritten: int = 0
    witnesses: int = 0
    differing: int = 0


@dataclass
class ReplyCache:
    """A folder of replies. settings: what decides replies beside the model itself (backend, its options, quantisation).

    Raises FileError for a folder that holds something else, or cannot be written to.
    """

    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    limit_bytes: int = LIMIT_BYTES
    counts: Counts = field(default_factory=Counts)
    _index: dict[str, _Place] = field(default_factory=dict)
    _known: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        mark = self.folder / "replies.json"
        if not mark.exists():
            self._require_empty()
            files.write_json(mark, MARK)
        elif files.read_json(mark) != MARK:
            raise self._not_ours("its replies.json is not one of this version")
        self._drop_stale()
        self.refresh()

    @property
    def segments(self) -> Path:
        """Where the replies are."""
        return self.folder / "segments"

    def around(self, model: Cacheable, *, masks: Sequence[SteeringMask] = (), together: bool = True) -> CachedModel:
        """The model with this cache before it. masks, together: as it is steered now, which is checked."""
        return CachedModel(model, self, masks=masks, together=together)

    def as_json(self) -> dict[str, int]:
        """For results.json."""
        return dict(vars(self.counts))

    # ---- reading

    def refresh(self) -> None:
        """Take in segments that are new, of this process or another; one that does not verify is deleted."""
        there = self._listed()
        self._known.intersection_update(there)  # one that made room may come again
        for name in there:
            if name not in self._known:
                self._known.add(name)
                self._take_in(name)

    def get(self, key: str) -> KeptReply | None:
        """The reply of a key; None where there is none, or it is not what was stored."""
        place = self._index.get(key)
        if place is None:
            return None
        try:
            with open(self.segments / place.segment, "rb") as handle:
                handle.seek(place.start)
                line = handle.read(place.end - place.start)
        except FileNotFoundError:  # another process made room
            del self._index[key]
            return None
        except OSError:
            line = b""
        if files.sha256(line) != place.digest:
            self.counts.dropped += 1
            del self._index[key]
            return None
        return _reply(files.parse_json(line))

    def _listed(self) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.segments) if _SEGMENT.fullmatch(name))
        except FileNotFoundError:
            return []

    def _take_in(self, name: str) -> None:
        path = self.segments / name
        try:
            data = files.read_bytes(path, kind="replies")
        except FileError:
            if not path.exists():  # another process made room
                return
            data = b""
        lines = data.split(b"\n")[:-1]
        try:
            if files.sha256(data) != path.stem:
                raise ValueError("not the bytes that were written")
            rows = [files.parse_json(line) for line in lines]
            keys = [row["key"] for row in rows if _reply(row) is not None]
        except (ValueError, RecursionError, KeyError, TypeError):
            self.counts.dropped += max(1, len(lines))
            files.remove(path)
            return
        start = 0
        for key, line in zip(keys, lines, strict=True):
            self._index[key] = _Place(name, start, start + len(line), files.sha256(line))
            start += len(line) + 1

    # ---- writing

    def put(self, replies: Mapping[str, KeptReply]) -> None:
        """Store replies, all or none of them. What cannot be stored is counted: a full disk ends no run here."""
        if not replies:
            return
        rows = [
            {"key": key, "text": one.text, "token_ids": list(one.token_ids), "finished": one.finished}
            for key, one in sorted(replies.items())
        ]
        data = "".join(files.dumps(row, indent=None) for row in rows).encode("utf-8")
        name = f"{files.sha256(data)}.jsonl"
        try:
            if len(data) > min(self.limit_bytes, files.LIMITS_BYTES["replies"]):
                raise FileError("too large", where=name, expected="less than the limit", do="raise the limit")
            files.write_bytes(self.segments / name, data)
            self._make_room()
        except FileError:
            self.counts.unwritten += len(rows)
            return
        if name not in self._known:
            self._known.add(name)
            self._take_in(name)

    def _make_room(self) -> None:
        """Delete the oldest segments until the rest is within the limit."""
        found = []
        for name in self._listed():
            try:
                status = (self.segments / name).stat()
            except FileNotFoundError:
                continue
            found.append((status.st_mtime_ns, name, status.st_size))
        total = sum(size for *_, size in found)
        for _, name, size in sorted(found):
            if total <= self.limit_bytes:
                break
            files.remove(self.segments / name)
            total -= size

    def _drop_stale(self) -> None:
        """Temporary files of killed writers; a young one may be another process's."""
        for path in self.folder.rglob(f".*{files.TEMPORARY_SUFFIX}"):
            try:
                if time.time() - path.stat().st_mtime > STALE_S:
                    files.remove(path)
            except FileNotFoundError:
                continue

    def _require_empty(self) -> None:
        try:
            strangers = self.folder.exists() and any(
                not entry.name.endswith(files.TEMPORARY_SUFFIX) for entry in self.folder.iterdir()
            )
        except OSError as error:
            raise self._not_ours(str(error.strerror)) from error
        if strangers:
            raise self._not_ours("it is not empty and holds no replies")

    def _not_ours(self, what: str) -> FileError:
        return FileError(
            f"the folder cannot hold a cache of replies: {what}",
            where=str(self.folder),
            expected="a new or empty folder, or one that this version of moesteer made with --cache",
            do="choose another --cache",
        )


class CachedModel:
    """A model that is asked only for what the cache does not hold. What it lets through is steered as ever.

    Of the first replies that are found WITNESSES are made anew all the same, and those are used: a steered model's
    receipt then counts something, and one that answers otherwise than the cache is seen.
    """

    def __init__(
        self, model: Cacheable, cache: ReplyCache, *, masks: Sequence[SteeringMask] = (), together: bool = True
    ) -> None:
        self.model, self.cache, self.masks, self.together = model, cache, tuple(masks), together
        if hasattr(model, "new_tokens_at_once"):
            self.new_tokens_at_once = model.new_tokens_at_once
        self._witnessed = False
        self._common: dict[str, Any] | None = None

    def generate(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int = 128,
        rows: Sequence[int] | None = None,
        title: str | None = None,
    ) -> list[Any]:
        """Greedy replies in order, from the cache or the model. Raises InputError where the model is steered by other
        masks than the cache was told of, and what the model raises."""
        self._require_masks()
        if self._undecided(rows, len(conversations)) or bool(getattr(self.model, "shifts", None)):
            return list(self.model.generate(conversations, max_new_tokens=max_new_tokens, rows=rows, title=title))
        keys = self._keys(conversations, rows, max_new_tokens)
        self.cache.refresh()
        found: dict[int, Any] = {}
        for i, key in enumerate(keys):
            if (kept := self.cache.get(key)) is not None:
                found[i] = kept
        watched = [] if self._witnessed else list(found)[:WITNESSES]
        self._witnessed = self._witnessed or bool(watched)
        asked = [i for i in range(len(keys)) if i not in found or i in watched]
        made = self._ask(conversations, rows, asked, max_new_tokens, title)
        self._count(found, made, watched)
        self.cache.put({keys[i]: _kept(one) for i, one in made.items() if i not in found})
        return [made[i] if i in made else found[i] for i in range(len(keys))]

    def _ask(
        self,
        conversations: Sequence[Sequence[Message]],
        rows: Sequence[int] | None,
        asked: Sequence[int],
        most: int,
        title: str | None,
    ) -> dict[int, Any]:
        if not asked:
            return {}
        made = self.model.generate(
            [conversations[i] for i in asked], max_new_tokens=most,
            rows=None if rows is None else [rows[i] for i in asked], title=title,
        )  # fmt: skip
        return dict(zip(asked, made, strict=True))

    def _count(self, found: Mapping[int, Any], made: Mapping[int, Any], watched: Sequence[int]) -> None:
        counts = self.cache.counts
        counts.hits += len(found) - len(watched)
        counts.misses += sum(i not in found for i in made)
        counts.witnesses += len(watched)
        counts.differing += sum(tuple(made[i].token_ids) != found[i].token_ids for i in watched)

    def _undecided(self, rows: Sequence[int] | None, count: int) -> bool:
        """Whether it is for the model to say which of several masks acts on what, or that the rows are wrong."""
        if rows is None:
            return len(self.masks) > 1 and not self.together
        known = len(self.masks)
        return (known > 1 and self.together) or len(rows) != count or not all(0 <= row <= known for row in rows)

    def _require_masks(self) -> None:
        told = tuple(mask.sha256[:12] for mask in self.masks)
        if tuple(self.model.mask_sha256) != told:
            raise InputError(
                f"the model is steered by {list(self.model.mask_sha256) or 'nothing'}",
                where="the cache of replies",
                expected=f"the masks that the cache was told of: {list(told) or 'none'}",
                do="give ReplyCache.around the masks of the block it is used in",
            )

    def _keys(self, conversations: Sequence[Sequence[Message]], rows: Sequence[int] | None, most: int) -> list[str]:
        if self._common is None:
            template = getattr(self.model.tokenizer, "chat_template", None)
            self._common = {
                "weights": self.model.weights_sketch, "dtype": self.model.dtype,
                "runs_in": type(self.model).__name__, "settings": files.plain(dict(self.cache.settings)),
                "template": files.sha256(str(template).encode("utf-8")), "tokens": len(self.model.tokenizer),
                "stops": list(getattr(self.model, "stops", ())),
                "versions": runs.versions(*["vllm"] * (self.cache.settings.get("backend") == "vllm")),
                # what "auto" came to: another device may round otherwise
                "device": str(getattr(self.model, "device", "")).partition(":")[0],
            }  # fmt: skip
        masks = [(mask.sha256, alpha) for mask, alpha in zip(self.masks, self.model.alphas, strict=True)]
        keys = []
        for i, messages in enumerate(conversations):
            row = None if rows is None else rows[i]
            acting = masks if row is None else [masks[row - 1]] if row else []
            prompt = list(self.model.encode(messages).token_ids)
            keys.append(key_of({**self._common, "masks": acting, "prompt": prompt, "most": most}))
        return keys


def key_of(material: Mapping[str, Any]) -> str:
    """The key of everything that decides a reply."""
    return files.sha256(files.dumps(material, indent=None).encode("utf-8"))


def _kept(generation: Any) -> KeptReply:
    return KeptReply(generation.text, tuple(generation.token_ids), generation.finished)


def _reply(row: Any) -> KeptReply:
    """From a line of a segment. Raises ValueError, KeyError, TypeError where it is none."""
    text, ids, finished = row["text"], row["token_ids"], row["finished"]
    if not isinstance(text, str) or not isinstance(finished, bool) or not all(type(i) is int for i in ids):
        raise ValueError("not a reply")
    return KeptReply(text, tuple(ids), finished)
