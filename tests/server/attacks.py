"""Strings and bodies that a hostile client may try: the same in the tests of the policy and of a real server."""

from __future__ import annotations

import json
import random
from typing import Any

TRAVERSALS = (
    "..", ".", "../x", "../../etc/passwd", "..\\", "..\\..\\x", "%2e%2e", "%2e%2e%2fother", "..%2fother", "..%5cother",
    "%252e%252e%252fother", "/etc/passwd", "/", "//other", "\\\\host\\other", "C:\\other", "file:///etc/passwd",
    "other/../other", "./other", "other/.", "other/", "other\\", "other\0", "\0", "other\0.safetensors", "other\n",
    " other", "other ", "other\t", "OTHER", "Other", "ｏｔｈｅｒ", "оther", "other\u200b", "\u202eother",
    "other.safetensors",
    "..\u2215other", "\uff0e\uff0e/other", "o" * 65, "o" * 100_000, "", "~/other", "$HOME", "other;clash", "!raw", "!1",
    "!1+other", "clash", "__class__", "other+other", "*", "othe?", "\ud800",
)  # fmt: skip
"""Ids that are no masks of the server's (which offers `other`, and refuses `clash`)."""

PREFIXED = ("moesteer", "moesteer_mask", "moesteer_row", "moesteer_read", "moesteer_ticket", "MOESTEER_ROW",
            "MoeSteer_Ticket", "moesteer.row", "moesteer_", "moesteerx")  # fmt: skip


def junk(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value."""
    kind = rng.randrange(8 if depth < 3 else 6)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind == 1:
        return rng.choice((0, 1, -1, 2**31, -(2**63), 10**18, 0.5, -0.0, 1e308))
    if kind < 5:
        return rng.choice(
            ("", "other", "clash", "!raw", "!1", "none", "a" * rng.randrange(200), rng.choice(TRAVERSALS[:40]))
        )
    if kind == 5:
        return rng.choice(PREFIXED)
    if kind == 6:
        return [junk(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice((*PREFIXED, "a", "mask", "")): junk(rng, depth + 1) for _ in range(rng.randrange(4))}


def extra(rng: random.Random) -> Any:
    """What a request may try at vllm_xargs: sometimes what it should be."""
    kind = rng.randrange(10)
    if kind == 0:
        return None
    if kind < 4:
        return {"moesteer_mask": rng.choice(("other", "asks", "clash", *TRAVERSALS))}
    if kind < 6:
        return junk(rng)
    found = {rng.choice((*PREFIXED, "x")): junk(rng, 1) for _ in range(rng.randrange(1, 4))}
    if rng.random() < 0.3:
        found["moesteer_mask"] = "other"
    return found


FIELDS = (
    "kv_transfer_params", "ec_transfer_params", "prompt_embeds", "mm_processor_kwargs", "chat_template", "cache_salt",
    "chat_template_kwargs", "logits_processors", "use_beam_search", "priority", "request_id", "moesteer_mask",
    "moesteer_row", "Moesteer_X", "n", "best_of", "stream", "temperature", "top_k", "max_tokens", "stop", "logit_bias",
    "logprobs", "echo", "seed", "min_p", "allowed_token_ids", "tools", "response_format", "structured_outputs",
    "add_generation_prompt", "continue_final_message", "documents", "user", "truncate_prompt_tokens", "suffix",
    "prompt_logprobs", "session_id", "return_token_ids", "model", "messages", "prompt", "extra_body", "extra_args",
    "min_tokens", "bad_words", "stop_token_ids", "stream_options", "lora_request", "data_parallel_rank",
)  # fmt: skip
PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/chat/completions/", "//v1/completions", "/v1//completions",
    "/V1/completions", "/v1/completions;x", "/v1/completions?x=1", "/v1/completions%2f", "/v1/%63ompletions",
    "/v1/./completions", "/v1/x/../completions", "/v1/responses", "/v1/messages", "/tokenize", "/detokenize",
    "/pooling",
    "/classify", "/score", "/v1/embeddings", "/rerank", "/invocations", "/inference/v1/generate", "/pause", "/resume",
    "/sleep", "/wake_up", "/collective_rpc", "/reset_prefix_cache", "/update_weights", "/init_weight_transfer_engine",
    "/start_profile", "/server_info", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/scale_elastic_ep", "/load",
    "/abort_requests", "/docs", "/openapi.json", "/v1/audio/transcriptions", "/plugins/moesteer/status",
    "/plugins/moesteer/masks", "/plugins/moesteer/", "/ready", "/health", "/ping", "/metrics", "/", "/v1/models",
)  # fmt: skip
"""Asked for by POST, only the first two are answered."""


def hostile(rng: random.Random) -> tuple[str, str, dict[str, str], bytes]:
    """(method, path, headers, body) of a request that tries something."""
    path = PATHS[rng.randrange(2)] if rng.random() < 0.8 else rng.choice(PATHS)
    method = "POST" if rng.random() < 0.93 else rng.choice(("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"))
    asked: dict[str, Any] = {"model": "lab-tiny", "max_tokens": 1}
    if "chat" in path:
        asked["messages"] = [{"role": "user", "content": "hello"}]
    else:
        asked["prompt"] = "hello"
    for _ in range(rng.randrange(3)):
        asked[rng.choice(FIELDS)] = junk(rng)
    if rng.random() < 0.7:
        asked["vllm_xargs"] = extra(rng)
    body = json.dumps(asked).encode()
    kind = rng.random()
    if kind < 0.05:
        body = body[: rng.randrange(len(body))]
    elif kind < 0.1:
        at = rng.randrange(len(body))
        body = body[:at] + bytes([rng.randrange(256)]) + body[at + 1 :]
    elif kind < 0.12:
        body = body[:-1] + b', "vllm_xargs": {"moesteer_row": "!raw"}}'
    elif kind < 0.14:
        body = rng.choice((b"", b"[]", b"null", b"\xff\xfe{}", b'{"a": NaN}', b"[" * 5000, b'"moesteer"'))
    headers = {"content-type": "application/json"}
    for _ in range(rng.randrange(2)):
        name, value = rng.choice((
            ("X-Moesteer-Mask", "none"), ("X-Request-Id", "canary-0"), ("X-data-parallel-rank", "7"),
            ("Content-Type", "text/plain"), ("Content-Encoding", "gzip"), ("X-Forwarded-Prefix", "/plugins"),
            ("X-HTTP-Method-Override", "GET"), ("Authorization", "Bearer x"), ("X-Original-URL", "/ready"),
            ("X-Forwarded-For", "127.0.0.1"), ("Expect", "100-continue"), ("Cookie", "moesteer_row=!raw"),
        ))  # fmt: skip
        headers[name] = value
    return method, path, headers, body
