"""The door, with a fake app behind it: what passes, what is refused, and what is never let out. Needs no vLLM."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import logging
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from moesteer.backends.vllm.catalogue import Catalogue
from moesteer.serve.gated import Asking, asking
from moesteer.serve.middleware import HEADER, PASSED, audit
from moesteer.serve.policy import Keys, Limits
from tests.server.attacks import PATHS
from tests.server.fakes import (
    CHAT_BODY,
    OTHER,
    PIN,
    Answer,
    Client,
    FakeApp,
    additive,
    chat_body,
    gated,
    named,
    pinned,
    policy,
    run,
)

ALICE, BOB, ADMIN = "alice" * 4, "bob" * 8, "admin" * 4
KEYS = Keys({"alice": ALICE, "bob": BOB}, ADMIN)
CHAT = "/v1/chat/completions"
MARK = additive(PIN).sha256[:12]


def ask(door: Any, *args: Any, **more: Any) -> Answer:
    """One request."""
    found: Answer = run(lambda: Client(door).ask(*args, **more))
    return found


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """The audit log."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler, level = Keep(), audit.level
    audit.addHandler(handler)
    audit.setLevel(logging.INFO)
    yield found
    audit.removeHandler(handler)
    audit.setLevel(level)


# ---------------------------------------------------------------- what passes


def test_a_request_passes_byte_for_byte() -> None:
    app = FakeApp()
    body = b' {"messages" : [ {"role": "user", "content": "h\\u0069"} ]}\n '
    found = ask(policy(app), body=body)
    assert (found.status, found.body) == (200, body) and app.seen == [("POST", CHAT, body)]
    parts = [body[i : i + 3] for i in range(0, len(body), 3)]
    assert ask(policy(app), chunks=[*parts, b""]).body == body


@pytest.mark.parametrize(("keys", "client"), [(None, "anyone"), ("KEYS", "alice")])
def test_who_asks_what_is_known_while_the_request_is_answered(keys: str | None, client: str) -> None:
    seen: list[Asking] = []
    app = FakeApp(before=lambda: seen.append(asking.get()))
    door = policy(app, keys=None if keys is None else KEYS)

    async def both() -> None:
        for path, body in ((CHAT, CHAT_BODY), ("/v1/completions", b'{"prompt": "x"}')):
            await Client(door).ask(path=path, body=body, key=ALICE)
            assert asking.get() == Asking()
        app.raises = RuntimeError("broken")
        with pytest.raises(RuntimeError):
            await Client(door).ask(key=ALICE)
        assert asking.get() == Asking()

    run(both)
    talk = ({"role": "user", "content": "hello"},)
    assert seen == [Asking(client, talk), Asking(client, None), Asking(client, talk)]


def test_two_clients_at_once_are_not_taken_for_each_other() -> None:
    app = FakeApp(until=asyncio.Event())
    seen: list[str] = []

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)
        seen.append(asking.get().client)

    door = policy(inside, keys=KEYS)

    async def both() -> None:
        tasks = [asyncio.create_task(Client(door).ask(key=key)) for key in (ALICE, BOB)]
        await asyncio.sleep(0.05)
        assert app.at_work == 2 and app.until is not None
        app.until.set()
        await asyncio.gather(*tasks)

    run(both)
    assert sorted(seen) == ["alice", "bob"]


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_headers_that_vllm_acts_on_do_not_pass(method: str) -> None:
    app = FakeApp()
    shut = ("X-Request-Id", "X-Vllm-Priority", "X-Session-ID", "X-data-parallel-rank", "transfer-encoding", "Cookie",
            "X-Forwarded-For", "traceparent", "X-Moesteer-Mask", "TRANSFER-ENCODING", "x-request-id")  # fmt: skip
    passed = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(CHAT_BODY)),
              "ACCEPT": "*/*", "User-Agent": "test"}  # fmt: skip
    path = CHAT if method == "POST" else "/v1/models"
    headers = [*((name, "7") for name in shut), *passed.items(), ("Authorization", f"Bearer {ALICE}")]
    assert ask(policy(app, keys=KEYS), method, path, headers=headers).status == 200
    assert app.headers == [{name.lower(): value for name, value in passed.items()}]
    assert {name.decode() for name in PASSED} == {name.lower() for name in passed}


def test_the_lifespan_passes() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    run(lambda: policy(app)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]


# ---------------------------------------------------------------- paths


OPEN_GET = ["/health", "/v1/models", "/version", "/metrics"]
TWISTED = [
    "/v1/chat/completions/", "//v1/chat/completions", "/v1//chat/completions", "/V1/chat/completions",
    "/v1/chat/completions;x", "/v1/chat/completions?x", "/v1/chat/completions#", "/v1/chat%2fcompletions",
    "/v1/%63hat/completions", "/v1/./chat/completions", "/v1/x/../chat/completions", "/v1/chat/completions\0",
    "/v1/chat/completions ", " /v1/chat/completions", "/v1/chat/completions\n", "/ｖ1/chat/completions", "",
    "v1/chat/completions", "/v1/chat/completions/..", "http://127.0.0.1/v1/chat/completions",
]  # fmt: skip


@pytest.mark.parametrize("path", [*TWISTED, *(path for path in PATHS[2:] if path != "/ready")], ids=ascii)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "post", ""])
def test_all_other_paths_and_methods_are_shut(path: str, method: str) -> None:
    app = FakeApp()
    for key in (None, "nobody" * 3):
        assert ask(policy(app, keys=KEYS), method, path, key=key).status == 401
    assert ask(policy(app, keys=KEYS), method, path, key=ALICE).status in (401, 404)
    assert ask(policy(app), method, path).status == 404
    assert not app.seen


@pytest.mark.parametrize(
    "path",
    [*TWISTED, "/v1/chat/completions", "/v1/completions", "/plugins/moesteer/masks/", "/ready/", "/docs"],
    ids=ascii,
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_nothing_else_is_read(path: str, method: str) -> None:
    app = FakeApp()
    assert ask(policy(app), method, path).status == 404 and not app.seen


@pytest.mark.parametrize("path", OPEN_GET)
def test_what_is_read_is_read_by_get_alone(path: str) -> None:
    app = FakeApp()
    door = policy(app)
    assert ask(door, "GET", path, chunks=[b""]).status == 200
    for method in ("POST", "PUT", "OPTIONS", "DELETE", *(() if path == "/health" else ("HEAD",))):
        assert ask(door, method, path).status == 404
    assert [seen[:2] for seen in app.seen] == [("GET", path)]


def test_a_query_does_not_open_or_shut_a_path() -> None:
    assert ask(policy(), query=b"x=1&moesteer_mask=../x").status == 200
    assert ask(policy(), path="/pause", query=b"/v1/chat/completions").status == 404


def test_websockets_are_closed() -> None:
    app = FakeApp()
    assert ask(policy(app), path="/v1/realtime", kind="websocket").status == 1008
    assert ask(policy(app), path=CHAT, kind="websocket").status == 1008
    assert not app.seen


def test_the_path_that_counts_is_the_routed_one() -> None:
    headers = [("X-Original-URL", CHAT), ("X-Rewrite-URL", CHAT), ("X-Forwarded-Prefix", "/v1")]
    app = FakeApp()
    assert ask(policy(app), path="/pause", headers=headers).status == 404
    assert ask(policy(app, keys=KEYS), "GET", "/v1/models", headers=[("X-Original-URL", "/health")]).status == 401
    assert not app.seen


# ---------------------------------------------------------------- limits


def test_long_headers_are_refused() -> None:
    app = FakeApp()
    for path, method in ((CHAT, "POST"), ("/ready", "GET"), ("/health", "GET")):
        found = ask(policy(app), method, path, headers=[("x", "y" * (16 << 10))])
        assert found.status == 431
    assert ask(policy(app), headers=[(f"x{i}", "y" * 100) for i in range(200)]).status == 431
    assert not app.seen
    assert ask(policy(app), headers=[("x", "y" * 16_000)]).status == 200


def test_long_bodies_are_refused_before_they_are_read_whole() -> None:
    app = FakeApp()
    given = []

    def endless() -> Iterator[bytes]:
        while len(given) < 200:
            given.append(1)
            yield b" " * 65_536

    assert ask(policy(app), body=CHAT_BODY + b" " * (1 << 20)).status == 413

    async def stream() -> Answer:
        client, source = Client(policy(app)), endless()
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers}

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": next(source), "more_body": True}

        async def send(message: Any) -> None:
            client.answer.status = message.get("status", client.answer.status)

        await client.app(scope, receive, send)
        return client.answer

    assert run(stream).status == 413 and len(given) == 17 and not app.seen
    room = (1 << 20) - len(CHAT_BODY)
    assert ask(policy(app), body=CHAT_BODY + b" " * room).status == 200


def test_a_slow_body_is_refused_in_time() -> None:
    """A client that sends a byte a second (here: faster, with less time) holds nothing."""
    app = FakeApp()
    door = policy(app, limits=Limits(body_s=0.3, concurrent=1, queued=0))

    async def both() -> tuple[Answer, Answer]:
        slow = asyncio.create_task(Client(door).ask(chunks=[b"x"] * 1000, pause=0.05))
        await asyncio.sleep(0.1)
        quick = await Client(door).ask()
        return await slow, quick

    slow, quick = run(both)
    assert slow.status == 408 and 0.25 < slow.seconds < 1.0 and quick.status == 200
    assert Limits().body_s == 10 and len(app.seen) == 1


@pytest.mark.parametrize("name", ["gzip", "identity", "br", "", "GZIP, identity"])
def test_compressed_bodies_are_not_taken(name: str) -> None:
    app = FakeApp()
    assert ask(policy(app), headers=[("Content-Encoding", name)]).status == 415
    assert not app.seen


@pytest.mark.parametrize(
    "kind", ["text/plain", "", "application/x-www-form-urlencoded", "application/jsonx", "multipart/form-data"]
)
def test_bodies_are_said_to_be_json(kind: str) -> None:
    """A page in a browser can send the other kinds anywhere without asking first."""
    app = FakeApp()
    assert ask(policy(app), headers=[("Content-Type", kind)]).status == 415 and not app.seen
    twice = [("Content-Type", "application/json"), ("Content-Type", "text/plain")]
    assert ask(policy(app), headers=twice).status == 415 and not app.seen
    assert ask(policy(app), headers=[("Content-Type", "Application/JSON; charset=utf-8")]).status == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "",
"127.0.0.1:80:80",
                                  "evil.example:8000", "0.0.0.0", "[::1].x", "localhost@evil.example",
                                  "127.0.0.1\n"])  # fmt: skip
def test_without_keys_only_this_machines_own_names_are_answered(host: str) -> None:
    """A page whose name was made to point here (DNS rebinding) still says its own name."""
    app = FakeApp()
    if host != "127.0.0.1\n":
        assert ask(policy(app), headers=[("Host", host)]).status == 403
        assert ask(policy(app), "GET", "/plugins/moesteer/masks", headers=[("Host", host)]).status == 403
        assert ask(policy(app), headers=[("Host", "localhost"), ("Host", host)]).status == 403
    assert not app.seen
    assert ask(policy(app, keys=KEYS), headers=[("Host", host)], key=ALICE).status == 200
    for own in ("localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]:8000"):
        assert ask(policy(app), headers=[("Host", own)]).status == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400), (b"[]", 400), (b'{"a": 1, "a": 1}', 400), (b"\xff", 400), (b"[" * 100_000, 400),
        (chat_body(vllm_xargs={"moesteer_mask": "nothing"}), 400),
        (chat_body(vllm_xargs={"moesteer_mask": "clash"}), 400),
        (chat_body(vllm_xargs={"moesteer_mask": "../other"}), 400),
        (chat_body(vllm_xargs={"moesteer_row": "!raw"}), 400),
        (chat_body(moesteer_mask="other"), 400), (chat_body(n=10**6), 400), (chat_body(chat_template="{{ x }}"), 400),
        (chat_body(messages=[{}] * 100_000), 400), (chat_body(vllm_xargs={"moesteer_mask": "other"}), 200),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_what_the_policy_refuses_never_gets_inside(body: bytes, status: int) -> None:
    app = FakeApp()
    assert ask(policy(app), body=body).status == status
    assert len(app.seen) == (status == 200)


# ---------------------------------------------------------------- who


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/models", "/version", "/plugins/moesteer/masks"])
def test_clients_need_a_key_and_it_must_be_theirs(path: str) -> None:
    method = "GET" if path not in (CHAT, "/v1/completions") else "POST"
    body = CHAT_BODY if path == CHAT else b'{"prompt": "x"}'
    app = FakeApp()
    door = policy(app, keys=KEYS)
    for headers in (
        [], [("Authorization", "")], [("Authorization", ALICE)], [("Authorization", f"Basic {ALICE}")],
        [("Authorization", f"Bearer {ALICE}x")], [("Authorization", f"Bearer {ADMIN}")], [("X-API-Key", ALICE)],
        [("Authorization", f"Bearer {ALICE}"), ("Authorization", f"Bearer {ALICE}")],
        [("Authorization", "Bearer x"), ("authorization", f"Bearer {ALICE}")],
        [("Authorization", f"Bearer {ALICE}, Bearer {BOB}")], [("Cookie", f"key={ALICE}")],
    ):  # fmt: skip
        found = ask(door, method, path, body, headers=headers)
        assert found.status == 401 and ("www-authenticate", "Bearer") in [
            (k.decode(), v.decode()) for k, v in found.headers
        ]
    assert not app.seen
    for headers in ([("Authorization", f"Bearer {ALICE}")], [("AUTHORIZATION", f"bearer {BOB}")]):
        assert ask(door, method, path, body, headers=headers).status == 200


def test_the_status_is_the_admins() -> None:
    path = "/plugins/moesteer/status"
    for keys in (Keys({}, None), Keys({"alice": ALICE}, None)):
        for key in (None, "", ALICE, ADMIN, "None"):
            assert ask(policy(keys=keys), "GET", path, key=key).status == 404
    for keys in (KEYS, Keys({}, ADMIN)):
        for key in (None, "", ALICE, ADMIN + "x"):
            assert ask(policy(keys=keys), "GET", path, key=key).status == 401
        twice = [("Authorization", f"Bearer {ADMIN}")] * 2
        assert ask(policy(keys=keys), "GET", path, headers=twice).status == 401
        found = json.loads(ask(policy(keys=keys), "GET", path, key=ADMIN).body)
        assert (
            found["ready"]
            and found["pinned"][0]["mask"] == additive(PIN).sha256
            and list(found["refused"]) == ["clash"]
        )
        assert ask(policy(keys=keys), "POST", path, key=ADMIN).status == (401 if keys is KEYS else 404)


def test_the_metrics_are_the_admins_where_clients_have_keys() -> None:
    app = FakeApp()
    door = policy(app, keys=KEYS)
    for key in (None, "", ALICE, BOB, ADMIN + "x"):
        found = ask(door, "GET", "/metrics", key=key)
        assert found.status == 401 and found.header("www-authenticate") == ["Bearer"]
    assert ask(door, "GET", "/metrics", headers=[("Authorization", f"Bearer {ADMIN}")] * 2).status == 401
    for key in (None, ALICE, ADMIN, "None"):
        assert ask(policy(app, keys=Keys({"alice": ALICE}, None)), "GET", "/metrics", key=key).status == 404
    assert not app.seen
    assert ask(door, "GET", "/metrics", key=ADMIN, chunks=[b""]).status == 200
    for keys in (Keys({}, None), Keys({}, ADMIN)):  # its own machine's, all of them one client
        assert ask(policy(app, keys=keys), "GET", "/metrics", chunks=[b""]).status == 200
        assert ask(policy(app, keys=keys), "GET", "/metrics", headers=[("Host", "evil.example")]).status == 403
    assert [seen[:2] for seen in app.seen] == [("GET", "/metrics")] * 3


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD"])
def test_the_admin_reads_the_metrics_by_get_alone(method: str) -> None:
    app = FakeApp()
    assert ask(policy(app, keys=KEYS), method, "/metrics", key=ADMIN).status in (401, 404) and not app.seen


def test_a_client_learns_the_ids_it_may_name() -> None:
    found = json.loads(ask(policy(keys=KEYS), "GET", "/plugins/moesteer/masks", key=ALICE).body)
    assert found == {"pinned": MARK, "masks": ["other"]}


def test_health_and_readiness_need_no_key_and_tell_nothing() -> None:
    door = policy(keys=KEYS)
    assert ask(door, "GET", "/health", chunks=[b""]).status == 200
    found = ask(door, "GET", "/ready")
    assert found.status == 200 and set(json.loads(found.body)) <= {"ready", "mask"}
    assert ask(door, "HEAD", "/ready").status == 200


# ---------------------------------------------------------------- ready or not


def test_nothing_is_answered_before_the_masks_are_known_to_act() -> None:
    app = FakeApp()
    door = policy(app, ready=False)
    assert ask(door, "GET", "/ready").status == 503 and not json.loads(ask(door, "GET", "/ready").body)["ready"]
    for path, body in ((CHAT, CHAT_BODY), ("/v1/completions", b'{"prompt": "x"}'), (CHAT, b"nonsense")):
        found = ask(door, path=path, body=body)
        assert found.status == 503 and found.header("retry-after")
    assert not app.seen
    door.state.reason = ""
    assert ask(door).status == 200


def test_nothing_is_answered_after_the_engine_died() -> None:
    app = FakeApp()
    door = policy(app, keys=KEYS)
    assert ask(door, key=ALICE).status == 200
    door.gated.engine.errored = True
    assert ask(door, "GET", "/ready").status == 503 and ask(door, key=ALICE).status == 503
    status = json.loads(ask(door, "GET", "/plugins/moesteer/status", key=ADMIN).body)
    assert not status["ready"] and status["reason"] == "the engine died"
    door.gated.engine.errored = False  # it does not come back by itself
    assert ask(door, key=ALICE).status == 503 and len(app.seen) == 1


def test_an_engine_that_dies_under_a_request_answers_503() -> None:
    app = FakeApp(status=500)
    door = policy(app)
    assert ask(door).status == 500 and door.state.ready  # an error of its own leaves it up

    def die() -> None:
        door.gated.engine.errored = True

    app.before = die
    found = ask(door)
    assert found.status == 503 and found.header(HEADER) == [MARK] and not door.state.ready


def test_a_request_that_waited_while_the_engine_died_is_not_let_in() -> None:
    app = FakeApp(until=asyncio.Event())
    door = policy(app, limits=Limits(concurrent=1))

    async def two() -> list[int]:
        both = [asyncio.create_task(Client(door).ask()) for _ in range(2)]
        await asyncio.sleep(0.05)
        door.state.reason = "the canary found the engine not steering"
        assert app.until is not None
        app.until.set()
        return [(await one).status for one in both]

    assert run(two) == [503, 503] and len(app.seen) == 1


def test_an_answer_on_its_way_breaks_off_when_the_canary_fails() -> None:
    app = FakeApp(stream=10_000, pause=0.01)
    door = policy(app)

    async def story() -> int:
        client = Client(door)
        task = asyncio.create_task(client.ask())
        await asyncio.sleep(0.1)
        door.state.reason = "the canary found the engine not steering"
        count = len(client.answer.chunks)
        with pytest.raises(ConnectionAbortedError):
            await task
        assert client.answer.status == 200 and len(client.answer.chunks) == count > 3
        return count

    run(story)
    assert all(slots.at_work == 0 for slots in door.slots.values())


def test_the_error_that_a_dead_engine_leaves_is_passed_on() -> None:
    app = FakeApp(stream=3, pause=0.01)
    door = policy(app)

    def die() -> None:
        door.gated.engine.errored, door.state.reason = True, "the engine died"

    app.before = die
    assert ask(door).status == 200  # a stream that had begun: what comes is vLLM's error


# ---------------------------------------------------------------- overload


def crowd(door: Any, count: int, release: asyncio.Event) -> list[Answer]:
    async def all_of_them() -> list[Answer]:
        tasks = [asyncio.create_task(Client(door).ask(key=ALICE)) for _ in range(count)]
        await asyncio.sleep(0.3)
        early = [task for task in tasks if task.done()]
        release.set()
        answers = await asyncio.gather(*tasks)
        assert {id(task.result()) for task in early} == {id(found) for found in answers if found.status == 429}
        return list(answers)

    found: list[Answer] = run(all_of_them)
    return found


def test_64_clients_meet_8_places_and_a_queue_of_32() -> None:
    """All at once, in one turn of the loop: the worst that can come."""
    app = FakeApp(until=asyncio.Event())
    door = policy(app, keys=KEYS)
    assert app.until is not None
    answers = crowd(door, 64, app.until)
    by_status = {status: [a for a in answers if a.status == status] for status in (200, 429)}
    assert len(by_status[200]) == 40 and len(by_status[429]) == 24 and app.most == 8
    assert max(found.seconds for found in by_status[429]) < 0.1
    assert all(found.header("retry-after") == ["1"] for found in by_status[429])
    found = ask(door, key=ALICE)
    assert found.status == 200 and found.seconds < 0.1  # recovered


def test_one_clients_crowd_does_not_keep_another_out() -> None:
    app = FakeApp(until=asyncio.Event())
    door = policy(app, keys=KEYS, limits=Limits(concurrent=2, queued=1))

    async def crowded() -> None:
        alice = [asyncio.create_task(Client(door).ask(key=ALICE)) for _ in range(6)]
        await asyncio.sleep(0.05)
        bob = asyncio.create_task(Client(door).ask(key=BOB))
        await asyncio.sleep(0.05)
        assert app.at_work == 3 and app.until is not None
        app.until.set()
        assert (await bob).status == 200
        assert sorted([(await one).status for one in alice]) == [200] * 3 + [429] * 3

    run(crowded)


def test_an_overload_takes_little_memory() -> None:
    app = FakeApp()
    door = policy(app)

    async def storm() -> None:
        for _ in range(20):
            app.seen.clear()
            app.headers.clear()
            await asyncio.gather(*(Client(door).ask(body=CHAT_BODY + b" " * 10_000) for _ in range(64)))

    run(storm)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    run(storm)
    gc.collect()
    after, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 1 << 20 and most - before < 20 << 20
    assert all(slots.at_work == 0 and not slots.line for slots in door.slots.values())


def test_a_client_that_goes_while_it_waits_gives_up_its_place() -> None:
    app = FakeApp(until=asyncio.Event())
    door = policy(app, limits=Limits(concurrent=1, queued=1))

    async def leaving() -> None:
        first = asyncio.create_task(Client(door).ask())
        await asyncio.sleep(0.02)
        for _ in range(5):
            waiting = Client(door)
            task = asyncio.create_task(waiting.ask())
            await asyncio.sleep(0.02)
            assert (await Client(door).ask()).status == 429
            waiting.gone.set()
            await task
            assert waiting.answer.status == 0
        last = asyncio.create_task(Client(door).ask())
        await asyncio.sleep(0.02)
        assert app.until is not None
        app.until.set()
        assert [(await first).status, (await last).status] == [200, 200]

    run(leaving)
    assert len(app.seen) == 2


def test_places_survive_clients_that_go_or_are_cancelled_at_any_moment() -> None:
    """500 requests, each gone or cancelled after a random number of turns: every place comes back."""
    import random

    rng = random.Random(0)
    door = policy(FakeApp(stream=2), limits=Limits(concurrent=2, queued=500))

    async def storm() -> None:
        async def one() -> None:
            client = Client(door)
            task = asyncio.create_task(client.ask())
            for _ in range(rng.randrange(40)):
                await asyncio.sleep(0)
            if rng.random() < 0.5:
                client.gone.set()
            else:
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        for _ in range(50):
            await asyncio.gather(*(one() for _ in range(10)))
        (slots,) = door.slots.values()
        assert slots.at_work == 0 and not slots.line
        assert (await Client(door).ask()).status == 200

    run(storm)


def test_a_client_that_goes_in_mid_stream_gives_up_its_place() -> None:
    app = FakeApp(stream=10_000, pause=0.01)
    door = policy(app, limits=Limits(concurrent=1, queued=0))

    async def leaving() -> float:
        client = Client(door)
        task = asyncio.create_task(client.ask())
        await asyncio.sleep(0.1)
        assert len(client.answer.chunks) > 3 and (await Client(door).ask()).status == 429
        client.gone.set()
        start = asyncio.get_running_loop().time()
        await task
        app.stream = 1
        assert (await Client(door).ask()).status == 200
        return asyncio.get_running_loop().time() - start

    assert run(leaving) < 1.0 and app.left == ["http.disconnect"]


def test_an_app_that_fails_gives_up_its_place() -> None:
    door = policy(FakeApp(raises=RuntimeError("broken")), limits=Limits(concurrent=1, queued=0))
    for _ in range(3):
        with pytest.raises(RuntimeError, match="broken"):
            ask(door)
    assert [slots.at_work for slots in door.slots.values()] == [0]


def test_a_send_that_fails_gives_up_its_place() -> None:
    door = policy(limits=Limits(concurrent=1, queued=0))
    for _ in range(3):
        client = Client(door)
        client.broken = True
        with pytest.raises(OSError):
            run(client.ask)
    assert ask(door).status == 200


# ---------------------------------------------------------------- the header


def test_every_answer_from_inside_says_which_mask_made_it() -> None:
    for app in (FakeApp(), FakeApp(stream=3), FakeApp(status=400), FakeApp(status=500)):
        assert ask(policy(app)).header(HEADER) == [MARK]
        found = ask(policy(app), body=chat_body(vllm_xargs={"moesteer_mask": "other"}))
        assert found.header(HEADER) == [f"{MARK}, {additive(OTHER).sha256[:12]}"]
        assert found.first <= found.chunks[0][0]


def test_nobody_else_writes_the_header() -> None:
    found = ask(policy(FakeApp(forge="none")), headers=[(HEADER, "none")])
    assert found.header(HEADER) == [MARK]


def test_the_header_tells_strengths_and_gates() -> None:
    from moesteer.serve.middleware import labels

    gate = gated(additive({(1, 3): 1.0}))
    members = [pinned(additive(PIN), alpha=0.25), named("g", gate), named("n", additive(OTHER), alpha=-2)]
    assert labels(members) == f"{MARK}@0.25, {gate.sha256[:12]};gated, {additive(OTHER).sha256[:12]}@-2"
    assert labels([]) == "none" and labels(Catalogue([named("n", additive(OTHER))]).pins) == "none"


# ---------------------------------------------------------------- the audit log

SECRET = "how do i paint a clay pot"


def test_every_request_leaves_one_line_without_its_text(lines: list[str]) -> None:
    door = policy(keys=KEYS)
    body = chat_body(messages=[{"role": "user", "content": SECRET}], vllm_xargs={"moesteer_mask": "other"})
    ask(door, body=body, key=ALICE)
    (line,) = lines
    found = json.loads(line)
    assert found.pop("time").endswith("+00:00")
    assert found == {
        "method": "POST", "path": CHAT, "client": "alice", "mask": f"{MARK}, {additive(OTHER).sha256[:12]}",
        "requested": "other", "sha256": hashlib.sha256(body).hexdigest(), "status": 200, "verdict": "passed",
    }  # fmt: skip


def test_refusals_leave_a_line_too(lines: list[str]) -> None:
    door = policy(keys=KEYS)
    ask(door)
    ask(door, key=ALICE, body=chat_body(vllm_xargs={"moesteer_mask": "../x"}))
    ask(door, key=ALICE, path="/pause")
    ask(door, key=ALICE, headers=[("x", "y" * 20_000)])
    ask(door, key=ALICE, headers=[("content-encoding", "gzip")])
    ask(door, "GET", "/plugins/moesteer/status", key=ALICE)
    ask(door, "GET", "/plugins/moesteer/status", key=ADMIN)
    ask(door, "GET", "/ready")
    ask(door, "GET", "/health", chunks=[b""])
    found = [json.loads(line) for line in lines]
    assert [one["status"] for one in found[:6]] == [401, 400, 404, 431, 415, 401]
    assert all(one["verdict"].startswith("refused: ") for one in found[:6])
    assert found[6]["client"] == "admin" and len(found) == 7  # whether it runs is asked too often to be told


def test_a_failure_and_a_client_that_goes_leave_a_line(lines: list[str]) -> None:
    with pytest.raises(RuntimeError):
        ask(policy(FakeApp(raises=RuntimeError("broken"))))

    async def leave() -> None:
        client = Client(policy())
        client.gone.set()
        await client.ask(chunks=[])

    run(leave)
    found = [json.loads(line) for line in lines]
    assert len(found) == 2 and found[0]["status"] == 500 and found[1]["status"] == 499


def test_no_line_holds_a_prompt_a_key_or_a_line_break(lines: list[str]) -> None:
    door = policy(keys=KEYS)
    nasty = f'{SECRET}\r\n{{"status": 200}}\u2028\x1b[31m'
    for more in ({}, {"vllm_xargs": {"moesteer_mask": "other"}}, {"user": nasty}, {"n": 99}, {"moesteer": nasty}):
        for key in (ALICE, BOB, "wrong" * 5, None):
            ask(door, body=chat_body(**{"messages": [{"role": "user", "content": nasty}], **more}), key=key)
    ask(door, path="/x\r\nfake: line\u2028\x00", key=ALICE)
    ask(door, "GET\r\nX: y", "/x" * 10_000, key=ALICE)
    ask(door, headers=[("authorization", f"Bearer {ALICE}\r\n")], path="/pause")
    assert len(lines) == 23
    for line in lines:
        assert line.isascii() and line.isprintable() and len(line) < 1500
        assert not any(text in line for text in (SECRET, ALICE, BOB, ADMIN, "wrongwrong"))
        assert "T" in json.loads(line)["time"]
