"""Who may ask for what: decided on a request's bytes before vLLM sees them. Default deny.

Pure functions and tables; the web server around them is serve/middleware.py. What may not be said is refused with 400
and a sentence; nothing is dropped or corrected in silence.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moesteer import files
from moesteer.backends.vllm.catalogue import Catalogue
from moesteer.backends.vllm.requests import MASK, OURS
from moesteer.errors import InputError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PREFIX = "/plugins/moesteer"
METRICS = "/metrics"
"""The admin's, where clients have keys: its counters tell one client what another sent."""
OPEN = {("GET", "/health"), ("GET", "/ready"), ("HEAD", "/health"), ("HEAD", "/ready")}
"""Without a key: whether it runs, whether it may be sent requests, and the pinned masks' digests."""
CLIENT = {
    ("GET", "/v1/models"), ("GET", "/version"), ("GET", METRICS), ("GET", f"{PREFIX}/masks"),
    ("POST", CHAT), ("POST", COMPLETIONS),
}  # fmt: skip
ADMIN = {("GET", f"{PREFIX}/status")}
"""With the admin token, and only where one is set."""
REFUSED_KEYS = {
    "kv_transfer_params": "caches of other engines do not know of masks",
    "ec_transfer_params": "caches of other engines do not know of masks",
    "prompt_embeds": "no gate can read embeddings",
    "mm_processor_kwargs": "settings of the engine are the operator's",
    "chat_template": "the template is the operator's",
    "logits_processors": "code is the operator's",
    "use_beam_search": "beams are requests that no gate was asked for",
    "priority": "the queue is the operator's",
    "request_id": "ids are the server's",
    "cache_salt": "the cache is keyed by the mask; keys of clients are not taken",
}


TAKEN = frozenset({
    "model", "stream", "stream_options", "n", "best_of", "temperature", "top_p", "top_k", "min_p", "max_tokens",
    "max_completion_tokens", "min_tokens", "stop", "stop_token_ids", "seed", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "length_penalty", "logit_bias", "logprobs", "top_logprobs", "prompt_logprobs",
    "response_format", "structured_outputs", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens",
    "include_stop_str_in_output", "return_tokens_as_token_ids", "return_token_ids", "user", "metadata", "store",
    "vllm_xargs", "bad_words", "allowed_token_ids", "add_special_tokens", "echo", "suffix", "prompt", "messages",
    "tools", "tool_choice", "parallel_tool_calls", "reasoning_effort", "include_reasoning", "add_generation_prompt",
    "continue_final_message", "chat_template_kwargs", "service_tier", "safety_identifier", "prompt_cache_key",
    "verbosity",
})  # fmt: skip
"""What a body may say. Everything else is refused, also what a later vLLM will know."""
TEXT = ("prompt", "messages", "suffix", "tools", "response_format", "structured_outputs")
"""Where long text may stand."""
MOST_NODES = 20_000
"""Values in a body, a prompt's tokens left out: validation takes time and memory for each."""
MOST_PARTS = 64
"""Parts of a message."""
MOST_CHARACTERS = 4_096
"""Of a string that is no text for the model."""


@dataclass(frozen=True)
class Limits:
    """What one request and one key may take."""

    body_bytes: int = 1 << 20
    body_s: float = 10.0
    messages: int = 1_000
    sequences: int = 16
    concurrent: int = 8
    queued: int = 32
    header_bytes: int = 16 << 10


@dataclass(frozen=True)
class Asked:
    """A request that may pass: the mask id it names, and its messages (None: a bare prompt)."""

    mask: str | None
    messages: tuple[Mapping[str, Any], ...] | None
    stream: bool
    sha256: str


def parsed(body: bytes) -> dict[str, Any]:
    """The JSON object of a body, strictly: what a lenient parser reads twice, it might read in two ways."""
    try:
        found = files.parse_json(body)
    except (ValueError, RecursionError) as error:
        raise _refusal(f"the body is not plain JSON ({error})"[:200], "a JSON object in UTF-8, no key twice") from error
    if not isinstance(found, dict):
        raise _refusal("the body is not a JSON object", "a JSON object")
    return found


def checked(path: str, body: bytes, catalogue: Catalogue, limits: Limits) -> Asked:
    """What a request to CHAT or COMPLETIONS asks for. Raises InputError for what it may not say."""
    asked = parsed(body)
    for key in asked:
        if key.lower().startswith(OURS):
            raise _refusal(f"a request may not say {key!r}"[:120], f"a mask id at vllm_xargs.{MASK}, or nothing")
        if key in REFUSED_KEYS and asked[key] is not None and asked[key] is not False:
            raise _refusal(f"{key} is not taken here: {REFUSED_KEYS[key]}", f"a request without {key}")
        if key not in TAKEN and key not in REFUSED_KEYS:
            raise _refusal(f"{key!r} is not taken here"[:120], "keys of OpenAI's API and vLLM's sampling parameters")
    _require_bounded(asked)
    mask = _mask(asked.get("vllm_xargs"))
    catalogue.acting(mask)
    messages = None
    if path == CHAT:
        given = asked.get("messages")
        if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
            raise _refusal("messages is not a list of objects", "a list of messages, each with role and content")
        if len(given) > limits.messages:
            raise _refusal(f"{len(given)} messages", f"at most {limits.messages}")
        for one in given:
            _require_parts(one.get("content"))
        messages = tuple(given)
    each = max(_count(asked.get("n")), _count(asked.get("best_of")))
    sequences = each * (_prompts(asked.get("prompt")) if path == COMPLETIONS else 1)
    if sequences > limits.sequences:
        raise _refusal(f"{min(sequences, 10**9)} answers in one request", f"at most {limits.sequences}: prompts x n")
    return Asked(mask, messages, asked.get("stream") is True, hashlib.sha256(body).hexdigest())


def _require_bounded(asked: Mapping[str, Any]) -> None:
    """Few values, short strings but for text, no half characters: all of it is looked at before vLLM's slower eyes."""
    waiting: list[tuple[Any, bool]] = [(value, key in TEXT) for key, value in asked.items() if key != "prompt"]
    waiting += [(text, True) for text in _texts(asked.get("prompt"))]
    nodes = len(asked)
    while waiting:
        value, text = waiting.pop()
        nodes += 1
        if isinstance(value, str):
            _require_text(value, most=None if text else MOST_CHARACTERS)
        elif isinstance(value, dict):
            waiting += [(inner, text) for inner in value.values()]
            waiting += [(key, False) for key in value]
        elif isinstance(value, list):
            waiting += [(inner, text) for inner in value]
        if nodes + len(waiting) > MOST_NODES:
            raise _refusal("the body has too many values", f"at most {MOST_NODES}")


def _texts(prompt: Any) -> list[Any]:
    """What is text of a prompt. Raises InputError for lists of several kinds, which vLLM would look at one by one."""
    if not isinstance(prompt, list):
        return [prompt]
    kinds = {type(one) for one in prompt}
    inner = {type(one) for row in prompt for one in row} if kinds == {list} else {int}
    if len(kinds) > 1 or not inner <= {int} or not kinds <= {int, str, list}:
        raise _refusal("prompt mixes kinds", "a string, strings, tokens, or lists of tokens")
    return prompt if kinds == {str} else []


def _require_text(value: str, *, most: int | None) -> None:
    if most is not None and len(value) > most:
        raise _refusal(f"a string of {len(value)} characters where no text belongs", f"at most {most}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _refusal("a string holds half a character (a lone surrogate)", "text") from error


def _require_parts(content: Any) -> None:
    """Content of a message: text, or parts with a type. Pictures come in the body: the server fetches nothing."""
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list) or len(content) > MOST_PARTS:
        raise _refusal("a message's content is neither text nor a short list of parts", f"at most {MOST_PARTS} parts")
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise _refusal("a part of a message is no object with a type", '{"type": "text", "text": "..."}')
        _require_no_address(part)


def _require_no_address(part: Mapping[str, Any]) -> None:
    """Whatever the type says: what a key names as a URL, and anything that looks like one, is data in the body."""
    waiting = [(key, value) for key, value in part.items() if key not in ("type", "text", "refusal", "thinking")]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(inner, one) for inner, one in value.items()]
        elif isinstance(value, list):
            waiting += [(key, one) for one in value]
        elif isinstance(value, str) and not value.startswith("data:") and (key.endswith("url") or ":" in value):
            raise _refusal("a part of a message names an address to fetch", "data: in the body")
    if "uuid" in part or part["type"] == "prompt_embeds":
        raise _refusal("a part of a message is a reference or an embedding", "text, or data: in the body")


def _mask(extra: Any) -> str | None:
    if extra is None:
        return None
    if not isinstance(extra, dict):
        raise _refusal("vllm_xargs is not an object", f'{{"{MASK}": "ID"}}')
    unknown = [key for key in extra if key != MASK]
    if unknown:
        raise _refusal(f"vllm_xargs may not hold {str(unknown[0])!r}"[:120], f'{{"{MASK}": "ID"}} and nothing else')
    named = extra.get(MASK)
    if named is not None and not isinstance(named, str):
        raise _refusal(f"vllm_xargs.{MASK} is no string", "a mask id")
    return named


def _count(value: Any) -> int:
    if value is None:
        return 1
    if isinstance(value, bool) or not isinstance(value, int):
        raise _refusal("n or best_of is no whole number", "a whole number")
    return max(value, 1)


def _prompts(prompt: Any) -> int:
    """How many prompts: a list of strings or of token lists; a list of tokens is one."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        return len(prompt)
    return 1


def _refusal(what: str, expected: str) -> InputError:
    return InputError(what, where="the request's body", expected=expected, do="correct the request")


class Keys:
    """Who may ask: clients by key, the admin by token. Compared in constant time; only digests are kept."""

    def __init__(self, clients: Mapping[str, str], admin: str | None) -> None:
        """clients: key by name. Both empty: everyone is the client `anyone`, and nobody the admin."""
        self._clients = {name: _digest(key) for name, key in clients.items()}
        self._admin = _digest(admin) if admin else None

    @property
    def needed(self) -> bool:
        """Whether clients need a key."""
        return bool(self._clients)

    @property
    def has_admin(self) -> bool:
        """Whether there is an admin."""
        return self._admin is not None

    def client(self, authorization: str) -> str | None:
        """The name of the client whose key a header `Bearer KEY` holds; None for nobody."""
        if not self._clients:
            return "anyone"
        given = _bearer(authorization)
        names = [name for name, digest in self._clients.items() if hmac.compare_digest(digest, given)]
        return names[0] if names else None

    def is_admin(self, authorization: str) -> bool:
        """Whether a header holds the admin's token."""
        return self._admin is not None and hmac.compare_digest(self._admin, _bearer(authorization))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _bearer(authorization: str) -> bytes:
    scheme, _, key = authorization.partition(" ")
    return _digest(key.strip() if scheme.lower() == "bearer" else "")


def read_keys(text: str, *, where: str) -> dict[str, str]:
    """Keys of a file with a line NAME:KEY for each client. Raises InputError, never with a key in it."""
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, key = (part.strip() for part in line.partition(":"))
        if not colon or not name.isidentifier() or len(key) < 16 or name in found:
            raise InputError(
                "a line is no NAME:KEY, names one twice, or has a key of fewer than 16 characters",
                where=f"{where}, line {number}",
                expected="a name of letters, digits and _, a colon, a key of 16 characters or more",
                do="correct the line; `openssl rand -hex 24` makes a key",
            )
        found[name] = key
    return found
