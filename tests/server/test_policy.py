"""Who may ask for what, by the bytes of a request alone. Needs no vLLM."""

from __future__ import annotations

import gc
import hmac
import json
import time
from typing import Any

import pytest

from moesteer.errors import InputError
from moesteer.serve import policy
from moesteer.serve.policy import (
    CHAT,
    COMPLETIONS,
    MOST_CHARACTERS,
    MOST_NODES,
    MOST_PARTS,
    REFUSED_KEYS,
    TAKEN,
    TEXT,
    Keys,
    Limits,
    checked,
    parsed,
    read_keys,
)
from tests.server.attacks import PREFIXED, TRAVERSALS
from tests.server.fakes import catalogue, chat_body

MASKS = catalogue(gate=True)


def ask(path: str = CHAT, **more: Any) -> policy.Asked:
    given = {"messages": [{"role": "user", "content": "hello"}]} if path == CHAT else {"prompt": "hello"}
    return checked(path, json.dumps({**given, **more}).encode(), MASKS, Limits())


def refused(path: str = CHAT, **more: Any) -> str:
    with pytest.raises(InputError) as caught:
        ask(path, **more)
    return caught.value.what


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"{", b"nonsense", b"{'a': 1}", b'{"a": 1,}', b'{"a": 1} {"a": 2}', b'{"a": 1}\0', b'\0{"a": 1}',
        b'{"a": NaN}', b'{"a": Infinity}', b'{"a": -Infinity}', b'{"a": 1e999}', b"\xff\xfe{\0}\0", b'{"a": "\xff"}',
        b'{"a": "\xed\xa0\x80"}', b'\xef\xbb\xbf{"a": 1}', '{"a": "ä"}'.encode("utf-16"), b'{"a": "\n"}',
        b'{"a": 1, "a": 2}', b'{"b": {"a": 1, "a": 1}}', b'{"b": [{"a": 1, "a": 1}]}', b'{"a": 1, "\\u0061": 2}',
        b"[" * 100_000, b'{"a":' * 100_000, b'{"a": ' + b"9" * 5_000 + b"}", b"[]", b"null", b"1", b'"x"', b"true",
        b'[{"messages": []}]',
    ],
    ids=lambda body: repr(body[:24]),
)  # fmt: skip
def test_a_body_is_one_strict_json_object(body: bytes) -> None:
    with pytest.raises(InputError):
        parsed(body)


def test_a_plain_body_passes_and_is_known_by_its_digest() -> None:
    import hashlib

    body = chat_body(stream=True, vllm_xargs={"moesteer_mask": "other"})
    found = checked(CHAT, body, MASKS, Limits())
    assert found == policy.Asked(
        "other", ({"role": "user", "content": "hello"},), True, hashlib.sha256(body).hexdigest()
    )
    bare = ask(COMPLETIONS)
    assert bare.mask is None and bare.messages is None and not bare.stream


def test_a_repeated_key_cannot_hide_a_mask() -> None:
    body = b'{"prompt": "x", "vllm_xargs": {"moesteer_mask": "other"}, "vllm_xargs": {"moesteer_row": "!raw"}}'
    with pytest.raises(InputError, match="twice"):
        checked(COMPLETIONS, body, MASKS, Limits())


# ---------------------------------------------------------------- fields


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_fields_that_are_the_operators_are_refused(path: str, key: str) -> None:
    for value in ("x", {"a": 1}, ["x"], 1, 0, 0.0, True, "", [], {}):
        assert key in refused(path, **{key: value})
    ask(path, **{key: None})
    ask(path, **{key: False})


def test_the_list_of_refused_fields_is_whole() -> None:
    assert set(REFUSED_KEYS) >= {
        "kv_transfer_params", "ec_transfer_params", "prompt_embeds", "mm_processor_kwargs", "chat_template",
        "logits_processors", "use_beam_search", "priority", "request_id", "cache_salt",
    }  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("key", [*PREFIXED, "MOESTEER", "mOESTEER_mask", "moesteerMask"])
def test_our_prefix_is_refused_at_the_top_in_any_case(path: str, key: str) -> None:
    for value in ("other", None, False, {}, 1):
        assert repr(key) in refused(path, **{key: value})


@pytest.mark.parametrize(
    "extra",
    [
        "other", 1, 0, True, False, [], [1], ["moesteer_mask"], {"moesteer_mask": 1}, {"moesteer_mask": True},
        {"moesteer_mask": False}, {"moesteer_mask": 0}, {"moesteer_mask": ["other"]},
        {"moesteer_mask": {"id": "other"}},
        {"moesteer_mask": "other", "x": 1}, {"x": 1}, {"Moesteer_mask": "other"}, {"MOESTEER_MASK": "other"},
        {" moesteer_mask": "other"}, {"moesteer_mask ": "other"}, {"": "other"}, {"moesteer_alpha": 2.0},
        *({key: "!raw"} for key in PREFIXED if key != "moesteer_mask"),
    ],
    ids=repr,
)  # fmt: skip
def test_the_only_extra_argument_is_a_mask_id(extra: Any) -> None:
    refused(CHAT, vllm_xargs=extra)
    refused(COMPLETIONS, vllm_xargs=extra)


def test_the_extra_arguments_that_may_be() -> None:
    assert ask(vllm_xargs=None).mask is None
    assert ask(vllm_xargs={}).mask is None
    assert ask(vllm_xargs={"moesteer_mask": None}).mask is None
    assert ask(vllm_xargs={"moesteer_mask": "other"}).mask == "other"


@pytest.mark.parametrize("name", TRAVERSALS, ids=lambda name: ascii(name)[:32])
def test_strings_that_are_no_mask_are_refused(name: str) -> None:
    said = refused(vllm_xargs={"moesteer_mask": name})
    assert len(said) < 200
    refused(COMPLETIONS, vllm_xargs={"moesteer_mask": name})


def test_there_are_forty_of_them() -> None:
    assert len(set(TRAVERSALS)) >= 40


def test_a_refusal_is_short_and_says_nothing_of_experts() -> None:
    with pytest.raises(InputError) as caught:
        ask(vllm_xargs={"moesteer_mask": "clash"})
    assert "pinned" in caught.value.what and "expert" not in caught.value.what + caught.value.expected
    with pytest.raises(InputError) as caught:
        ask(**{"moesteer" + "x" * 100_000: 1})
    assert len(caught.value.what) <= 120


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    "key",
    [
        "data_parallel_rank", "session_id", "truncate_prompt_tokens", "lora_request", "extra_body", "extra_args",
        "documents", "mm_data", "media_io_kwargs", "x", "", " model", "Model", "MODEL", "model\0", "\ud800", "ｍodel",
        "__class__", "functions",
    ],
    ids=lambda key: ascii(key)[:24],
)  # fmt: skip
def test_fields_that_nobody_knows_are_refused(path: str, key: str) -> None:
    for value in ("x", None, False, 0, {}):
        said = refused(path, **{key: value})
        assert "not taken here" in said and len(said) <= 120
        said.encode("utf-8")
        assert len(refused(path, **{key + "x" * 100_000: value})) == 120


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("key", sorted(TAKEN))
def test_fields_that_are_known_are_taken(path: str, key: str) -> None:
    ask(path, **({key: [{"role": "user", "content": "x"}] if key == "messages" else None}))


def test_what_is_taken_is_not_what_is_refused() -> None:
    assert not TAKEN & set(REFUSED_KEYS) and set(TEXT) <= TAKEN and not any(key.startswith("moesteer") for key in TAKEN)


# ---------------------------------------------------------------- bounds


def quickly(path: str, **more: Any) -> str:
    """What is refused, in well under a second."""
    given = {"messages": [{"role": "user", "content": "hello"}]} if path == CHAT else {"prompt": "hello"}
    body = json.dumps({**given, **more}).encode()
    gc.freeze()  # what other tests left is not to be looked through, nor what their threads do to be counted
    start = time.thread_time()
    with pytest.raises(InputError) as caught:
        checked(path, body, MASKS, Limits())
    took_s = time.thread_time() - start
    gc.unfreeze()
    assert took_s < 0.9
    return caught.value.what


PLACES: dict[str, Any] = {
    "model": lambda text: {"model": text}, "user": lambda text: {"user": text},
    "stop": lambda text: {"stop": ["a", text]}, "metadata": lambda text: {"metadata": {"a": {"b": [text]}}},
    "metadata, a key": lambda text: {"metadata": {text: 1}}, "bad_words": lambda text: {"bad_words": [text]},
    "logit_bias": lambda text: {"logit_bias": {text: 1}},
    "stream_options": lambda text: {"stream_options": {"x": text}},
    "a mask": lambda text: {"vllm_xargs": {"moesteer_mask": text}}, "tools, a key": lambda text: {"tools": [{text: 1}]},
    "template": lambda text: {"chat_template_kwargs": {"x": text}}, "n": lambda text: {"n": text},
    "a message's key": lambda text: {"messages": [{"role": "user", "content": "x", text: 1}]},
    "tool_choice": lambda text: {"tool_choice": {"type": "function", "function": {"name": text}}},
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_long_strings_stand_only_where_text_belongs(path: str, place: str) -> None:
    for text in ("/a" * 8_192, "x" * (MOST_CHARACTERS + 1)):
        assert f"a string of {len(text)} characters" in quickly(path, **PLACES[place](text))


@pytest.mark.parametrize("place", ["model", "user", "stop", "metadata", "metadata, a key", "tools, a key", "template"])
def test_strings_that_are_long_enough_for_anything_pass(place: str) -> None:
    ask(**PLACES[place]("x" * MOST_CHARACTERS))


TEXTS: dict[str, tuple[str, Any]] = {
    "a message": (CHAT, lambda text: {"messages": [{"role": "user", "content": text}]}),
    "a part": (CHAT, lambda text: {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]}),
    "a tool": (CHAT, lambda text: {"tools": [{"type": "function", "function": {"description": text}}]}),
    "a schema": (CHAT, lambda text: {"response_format": {"type": "json_schema", "json_schema": {"schema": text}}}),
    "a grammar": (COMPLETIONS, lambda text: {"structured_outputs": {"grammar": text}}),
    "a prompt": (COMPLETIONS, lambda text: {"prompt": text}),
    "prompts": (COMPLETIONS, lambda text: {"prompt": ["x", text]}),
    "a suffix": (COMPLETIONS, lambda text: {"suffix": text}),
}


@pytest.mark.parametrize("place", TEXTS)
def test_text_may_be_long(place: str) -> None:
    path, put = TEXTS[place]
    ask(path, **put("x" * 200_000))


MANY: dict[str, tuple[str, Any]] = {
    "a content of numbers": (CHAT, {"messages": [{"role": "user", "content": [0] * 300_000}]}),
    "contents of parts": (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}] * 64}] * 400}),
    "a content of lists": (CHAT, {"messages": [{"role": "user", "content": [[]] * 250_000}]}),
    "tools": (CHAT, {"tools": [{}] * 250_000}),
    "keys": (CHAT, {"metadata": {str(i): 0 for i in range(60_000)}}),
    "biases": (COMPLETIONS, {"logit_bias": {str(i): 0 for i in range(60_000)}}),
    "tokens that stop": (COMPLETIONS, {"stop_token_ids": list(range(150_000))}),
    "words": (COMPLETIONS, {"bad_words": ["a"] * 150_000}),
    "prompts": (COMPLETIONS, {"prompt": ["a"] * 150_000}),
    "empty prompts": (COMPLETIONS, {"prompt": [[]] * 200_000}),
    "a prompt in an object": (COMPLETIONS, {"prompt": {"x": [0] * 300_000}}),
    "a choice of values, each few": (CHAT, {key: [0] * 5_000 for key in ("stop", "bad_words", "tools", "metadata")}),
    "lists in lists": (CHAT, {"metadata": [[[0] * 100] * 100] * 20}),
}


@pytest.mark.parametrize("case", MANY)
def test_many_values_are_refused_at_once(case: str) -> None:
    path, given = MANY[case]
    assert "answers in one" in (said := quickly(path, **given)) or "too many values" in said


def test_how_many_values() -> None:
    """With the two at the top, the message, its keys and values: MOST_NODES or one more."""

    def fits(count: int) -> bool:
        try:
            ask(bad_words=["x"] * count)
        except InputError as error:
            assert "too many values" in error.what
            return False
        return True

    assert fits(MOST_NODES - 20) and not fits(MOST_NODES)
    low = max(count for count in range(MOST_NODES - 20, MOST_NODES) if fits(count))
    assert not any(fits(count) for count in range(low + 1, MOST_NODES))


def test_a_deep_body_is_refused_or_passes_without_a_fall() -> None:
    deep: Any = 0
    for _ in range(400):
        deep = [{"a": deep}]
    ask(metadata=deep)
    with pytest.raises(InputError):
        checked(CHAT, b'{"messages": [], "metadata": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", MASKS, Limits())


@pytest.mark.parametrize("half", ["\ud800", "\udfff", "x\udc80y", "\udc00\ud800"], ids=ascii)
@pytest.mark.parametrize("place", [*PLACES, *TEXTS])
def test_half_characters_are_refused_anywhere(place: str, half: str) -> None:
    paths = (CHAT, COMPLETIONS) if place in PLACES else (TEXTS[place][0],)
    put = PLACES.get(place) or TEXTS[place][1]
    for path in paths:
        assert "half a character" in refused(path, **put(half))


def test_whole_characters_pass_escaped_or_not() -> None:
    body = '{"prompt": "\\ud83d\\ude00 😀 \\u00e4"}'.encode()
    checked(COMPLETIONS, body, MASKS, Limits())


# ---------------------------------------------------------------- contents and prompts


def said_of(content: Any) -> str:
    return refused(messages=[{"role": "system", "content": "x"}, {"role": "user", "content": content}])


DATA = "data:image/png;base64,AA=="


@pytest.mark.parametrize(
    "content",
    [
        "", "x", None, [], [{"type": "text", "text": "x"}], [{"type": "text", "text": "x"}] * MOST_PARTS,
        [{"type": "image_url", "image_url": {"url": DATA}}], [{"type": "image_url", "image_url": DATA}],
        [{"type": "text", "text": "http://example.org"}],
        [{"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}],
        [{"type": "image_url", "image_url": {"url": DATA}}, {"type": "text", "text": "what is it?"}],
    ],
    ids=lambda content: repr(content)[:40],
)  # fmt: skip
def test_contents_that_may_be(content: Any) -> None:
    ask(messages=[{"role": "user", "content": content}])
    ask(messages=[{"role": "user"}])


@pytest.mark.parametrize(
    "content",
    [
        0, 1.5, True, False, {}, {"type": "text", "text": "x"}, [{"type": "text", "text": "x"}] * (MOST_PARTS + 1),
        ["x"], [1], [None], [[]], [{}], [{"text": "x"}], [{"type": None}], [{"type": 1}], [{"type": ["text"]}],
        [{"type": "text", "text": "x"}, "x"], [{"image_url": {"url": DATA}}],
    ],
    ids=lambda content: repr(content)[:40],
)  # fmt: skip
def test_contents_that_may_not_be(content: Any) -> None:
    assert "content" in (said := said_of(content)) or "part of a message" in said


ADDRESSES = ("http://169.254.169.254/", "https://example.org/a.png", "file:///etc/passwd", "/etc/passwd", "", "ftp://x",
             " data:image/png", "DATA:,", "//example.org", "gopher://x", "javascript:1")  # fmt: skip


@pytest.mark.parametrize("url", ADDRESSES)
@pytest.mark.parametrize("kind", ["image_url", "video_url", "audio_url", "new_url"])
def test_parts_that_name_an_address_are_refused(kind: str, url: str) -> None:
    for link in (url, {"url": url}, {"url": url, "detail": "auto"}):
        assert "address to fetch" in said_of([{"type": "text", "text": "x"}, {"type": kind, kind: link}])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_image", "image_url": "http://169.254.169.254/"},
        {"type": "text", "text": "x", "uuid": "u", "image_url": "http://169.254.169.254/"},
        {"type": "text", "text": "x", "uuid": "u", "image_url": {"url": "http://169.254.169.254/"}},
        {"type": "image_url", "image_url": DATA, "uuid": "u", "video_url": "http://169.254.169.254/"},
        {"type": "video_url", "video_url": DATA, "uuid": "u", "image_url": "http://169.254.169.254/"},
    ],
    ids=repr,
)  # fmt: skip
def test_parts_that_name_an_address_elsewhere_are_refused(part: dict[str, Any]) -> None:
    assert "address to fetch" in said_of([part])


@pytest.mark.parametrize(
    "prompt",
    [
        ["x", 1], [1, "x"], [[1], "x"], [[1], 1], [1, [1]], [["x"]], [[1, "x"]], [[1], ["x"]], [[[1]]], [1, True],
        [True], [None], [1, None], [1.5], [1, 1.5], [{}], [{"prompt": "x"}], [[1.5]], [[True]], [[None]], [[{}]],
        ["x", None], [*range(100_000), "x"], [[*range(100_000), "x"]], [1.0] * 300_000, [None] * 200_000,
    ],
    ids=lambda prompt: repr(prompt)[:24],
)  # fmt: skip
def test_prompts_of_mixed_kinds_are_refused(prompt: Any) -> None:
    assert "mixes kinds" in quickly(COMPLETIONS, prompt=prompt)


def test_prompts_of_one_kind_pass_however_long() -> None:
    for prompt in ("x", ["x", "y"], [1, 2], [[1], [2, 3]], [], [[]], list(range(200_000)), [[1] * 100_000] * 2):
        ask(COMPLETIONS, prompt=prompt)
    body = json.dumps({"prompt": [100_000] * 200_000}).encode()
    start = time.process_time()
    checked(COMPLETIONS, body, MASKS, Limits())
    assert time.process_time() - start < 0.9


# ---------------------------------------------------------------- limits


def test_how_many_messages() -> None:
    one = {"role": "user", "content": "x"}
    assert len(ask(messages=[one] * 1000).messages or ()) == 1000
    assert "1001 messages" in refused(messages=[one] * 1001)
    for wrong in (None, "x", {}, [1], [one, "x"], [[one]], 1):
        refused(messages=wrong)


def test_messages_are_needed_in_a_chat() -> None:
    with pytest.raises(InputError):
        checked(CHAT, b"{}", MASKS, Limits())


@pytest.mark.parametrize("key", ["n", "best_of"])
def test_how_many_answers(key: str) -> None:
    for path in (CHAT, COMPLETIONS):
        ask(path, **{key: 16})
        ask(path, **{key: None})
        for wrong in (17, 10**6, 10**4000, True, False, 1.0, 16.5, "1", [1], {"n": 1}):
            refused(path, **{key: wrong})


@pytest.mark.parametrize("key", ["n", "best_of"])
def test_prompts_times_answers(key: str) -> None:
    ask(COMPLETIONS, prompt=["x"] * 4, **{key: 4})
    assert "20 answers" in refused(COMPLETIONS, prompt=["x"] * 4, **{key: 5})
    assert "17 answers" in refused(COMPLETIONS, prompt=["x"] * 17)
    refused(COMPLETIONS, prompt=[[1], [2]] * 9)
    ask(COMPLETIONS, prompt=list(range(200)))


# ---------------------------------------------------------------- keys

LONG = "0123456789abcdef"
OTHER = "fedcba9876543210"


def test_a_key_is_a_client() -> None:
    keys = Keys({"a": LONG, "b": OTHER}, None)
    assert keys.client(f"Bearer {LONG}") == "a" and keys.client(f"bearer {OTHER}") == "b"
    for wrong in ("", "Bearer", "Bearer ", LONG, f"Basic {LONG}", f"Bearer {LONG}x", f"Bearer {LONG[:-1]}",
                  f"Bearer {LONG.upper()}", f"Bearer {LONG} {OTHER}", f"Bearer\t{LONG}", f"Bearer {LONG}\0",
                  "Bearer \xff"):  # fmt: skip
        assert keys.client(wrong) is None


def test_without_keys_everyone_is_anyone_and_nobody_the_admin() -> None:
    keys = Keys({}, None)
    assert keys.client("") == keys.client("Bearer x") == "anyone"
    assert not keys.needed and not keys.has_admin and not keys.is_admin("") and not keys.is_admin("Bearer None")


def test_an_empty_token_is_no_admin() -> None:
    keys = Keys({}, "")
    assert not keys.is_admin("") and not keys.is_admin("Bearer ") and not keys.is_admin("Basic x")


def test_the_admin_is_no_client_and_a_client_no_admin() -> None:
    keys = Keys({"a": LONG}, OTHER)
    assert keys.is_admin(f"Bearer {OTHER}") and keys.client(f"Bearer {OTHER}") is None
    assert not keys.is_admin(f"Bearer {LONG}")


def test_keys_are_compared_in_constant_time_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def spy(a: Any, b: Any) -> bool:
        compared.append((len(a), len(b)))
        return real(a, b)

    monkeypatch.setattr(policy.hmac, "compare_digest", spy)
    keys = Keys({"a": LONG, "b": OTHER, "c": LONG * 2}, "t" * 40)
    for given in (f"Bearer {LONG}", "Bearer short", "", "Bearer " + "x" * 10_000):
        compared.clear()
        keys.client(given)
        assert compared == [(32, 32)] * 3  # digests of one length, and no end at the first that fits
        compared.clear()
        keys.is_admin(given)
        assert compared == [(32, 32)]


def test_no_key_is_kept() -> None:
    keys = Keys({"a": LONG}, OTHER)
    assert LONG not in repr(vars(keys)) and OTHER not in repr(vars(keys))


def test_the_file_of_keys() -> None:
    text = f"# clients\n\nalice: {LONG}\nbob:{OTHER}:with:colons\r\n"
    assert read_keys(text, where="keys") == {"alice": LONG, "bob": f"{OTHER}:with:colons"}


@pytest.mark.parametrize(
    "line",
    [
        LONG,
        f":{LONG}",
        f"a b:{LONG}",
        f"a-b:{LONG}",
        f"1a:{LONG}",
        "a:",
        "a:secretsecret",
        f"alice:{OTHER}",
        f"\0:{LONG}",
    ],
)
def test_wrong_lines_are_named_by_number_never_by_key(line: str) -> None:
    with pytest.raises(InputError) as caught:
        read_keys(f"alice:{LONG}\n{line}", where="keys")
    text = str(caught.value)
    assert "line 2" in text and LONG not in text and OTHER not in text and "secretsecret" not in text
