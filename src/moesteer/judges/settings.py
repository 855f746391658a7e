"""`[[judge]]` of a scenario file: which judge, and how it is asked. Checked strictly; docs/judges.md has every key."""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moesteer.judges.phrases import PHRASE_KINDS
from moesteer.judges.prompts import GUIDELINES
from moesteer.judges.protocol import Verdict
from moesteer.judges.table import GUARDS

ENDPOINT = "endpoint"
KINDS = (*PHRASE_KINDS, *GUARDS, ENDPOINT)
HARM: tuple[Verdict, ...] = ("refused", "complied", "deflected")
RIGHT: tuple[Verdict, ...] = ("correct", "wrong", "refused")
_OF_MODELS = ("model", "revision", "replies", "repeat")
_OF_GUARDS = (*_OF_MODELS, "request", "backend", "device", "dtype", "threshold", "engine_options")
_OF_ENDPOINTS = (
    *_OF_MODELS, "base_url", "key_env", "asks", "criteria", "response_format", "concurrency", "timeout_s", "max_tokens",
)  # fmt: skip


class JudgeSettings(BaseModel):
    """One `[[judge]]`.

    model: a Hub id or a folder (of guard models, by default the table's); for an endpoint, what it calls the model.
    revision: a commit of a Hub id. replies: whether every reply of a played conversation is judged, or the last.
    request: what a judge of one request and one response is shown as the request: the conversation up to the response
    (which for one turn is the user's message, as published), the last user message, or the conversation's `group`.
    threshold: of a probability or grade, from where on a response is harmful. risk: Granite Guardian's. guidelines:
    ShieldGemma's. repeat: ask so often; the first verdict counts, and later ones that differ are counted.
    base_url: of an endpoint, `/chat/completions` is asked below it. key_env: environment variable that holds its key.
    asks: "harm" (refused, complied, deflected) or "right" (correct, wrong, refused, against the reference). criteria:
    the operator's own sentences, added to what is asked. timeout_s: of one try.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    kind: str
    model: str | None = None
    revision: str | None = Field(default=None, min_length=1)
    backend: Literal["hf", "vllm"] = "hf"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    engine_options: dict[str, Any] = Field(default_factory=dict)
    replies: Literal["all", "last"] = "all"
    request: Literal["conversation", "last", "group"] = "conversation"
    threshold: float = Field(default=0.5, gt=0.0, lt=1.0)
    risk: str = Field(default="harm", pattern=r"^[a-z_]{1,40}$")
    guidelines: tuple[str, ...] = Field(default=tuple(GUIDELINES), min_length=1)
    repeat: int = Field(default=1, ge=1, le=5)
    base_url: str | None = None
    key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    asks: Literal["harm", "right"] = "harm"
    criteria: str = Field(default="", max_length=4000)
    response_format: Literal["json_schema", "json_object", "none"] = "json_schema"
    concurrency: int = Field(default=4, ge=1, le=64)
    timeout_s: float = Field(default=60.0, gt=0.0, le=60.0)
    max_tokens: int = Field(default=512, ge=16, le=8192)

    @model_validator(mode="after")
    def _fits_its_kind(self) -> JudgeSettings:
        if self.kind not in KINDS:
            raise ValueError(f"no kind of judge {self.kind!r}; there are {', '.join(KINDS)}")
        if self.name in PHRASE_KINDS:
            raise ValueError(f"{self.name!r} is the name of a judge by phrases: choose another")
        if foreign := sorted(self.model_fields_set - {"name", "kind", *self._known()}):
            raise ValueError(f"{', '.join(foreign)} cannot be set for the kind {self.kind}")
        if unknown := [name for name in self.guidelines if name not in GUIDELINES]:
            raise ValueError(f"no guideline {', '.join(unknown)}; there are {', '.join(GUIDELINES)}")
        if self.engine_options and self.backend != "vllm":
            raise ValueError("engine_options are of vLLM: set backend = 'vllm'")
        if self.kind == ENDPOINT:
            self._require_endpoint()
        return self

    def _known(self) -> tuple[str, ...]:
        if self.kind in PHRASE_KINDS:
            return ()
        if self.kind == ENDPOINT:
            return _OF_ENDPOINTS
        own = {"granite-guardian": ("risk",), "shieldgemma": ("guidelines",)}
        return (*_OF_GUARDS, *own.get(self.kind, ()))

    def _require_endpoint(self) -> None:
        if self.base_url is None or self.model is None:
            raise ValueError("an endpoint needs base_url and model")
        if self.revision is not None:
            raise ValueError("revision cannot be set for the kind endpoint")
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError("base_url must begin with https:// or http://, and name a host")
        if url.username or url.password or url.query or url.fragment:
            raise ValueError("base_url must hold no user, password, query or fragment: a key belongs into key_env")
        if self.key_env and url.scheme == "http" and not _is_here(url.hostname):
            raise ValueError("a key is not sent over http:// to another machine: use https://")

    @property
    def verdicts(self) -> frozenset[Verdict]:
        """What this judge can say, unscored and broken aside."""
        if self.kind == "refusal" or self.kind in GUARDS:
            return frozenset(HARM)
        return frozenset(HARM if self.kind == ENDPOINT and self.asks == "harm" else RIGHT)


def _is_here(host: str) -> bool:
    """Whether a host is this machine."""
    if host == "localhost":
        return True
    try:
        return ip_address(re.sub(r"%.*", "", host)).is_loopback
    except ValueError:
        return False
