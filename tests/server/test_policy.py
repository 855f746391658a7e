"""Who may ask for what, by the bytes of a request alone. Needs no vLLM."""

from __future__ import annotations

import hmac
import json
from typing import Any

import pytest

from moesteer.errors import InputError
from moesteer.serve import policy
from moesteer.serve.policy import CHAT, COMPLETIONS, REFUSED_KEYS, Keys, Limits, checked, parsed, read_keys
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
    for value in ("x", {"a": 1}, ["x"], 1, True, "", [], {}):
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
