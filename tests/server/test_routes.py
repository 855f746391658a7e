"""Routes that would answer in place of vLLM's. Needs starlette, which comes with vLLM."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from moesteer.errors import ModelError
from moesteer.serve.policy import CLIENT, PREFIX
from moesteer.serve.server import require_known_routes

routing = pytest.importorskip("starlette.routing", reason="starlette comes with vLLM")
Mount, Route, WebSocketRoute = routing.Mount, routing.Route, routing.WebSocketRoute


def answer(module: str) -> Callable[[Any], Any]:
    def endpoint(request: Any) -> Any: ...

    endpoint.__module__ = module
    return endpoint


def routes() -> list[Any]:
    return [
        Route(path, answer("vllm.entrypoints.openai"), methods=[method])
        for method, path in sorted(CLIENT)
        if not path.startswith(PREFIX)
    ]


def test_the_routes_of_vllm_are_known() -> None:
    require_known_routes(
        [*routes(), Route("/pause", answer("evil"), methods=["POST"])]
    )  # shut, so that it may be there


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "shadow",
    [
        Route("/v1/completions", answer("evil"), methods=["POST"]),
        Route("/v1/{what}", answer("evil"), methods=["POST"]),
        Route("/{path:path}", answer("evil"), methods=["POST", "GET"]), Mount("/v1", app=answer("evil")),
        Mount("", app=answer("evil")), Route("/v1/models", answer("__main__"), methods=["GET"]),
        Route("/metrics", answer("moesteer_evil"), methods=["GET"]), Route("/v1/chat/completions", answer("vllmx.api")),
        Route("/v1/chat/{x}", answer("vllm_evil"), methods=["POST"]), Route("/v1/models", answer("")),
        Mount("/v1", app=object()),
    ],
    ids=repr,
)  # fmt: skip
def test_a_route_that_stands_before_vllms_is_refused(shadow: Any, first: bool) -> None:
    if getattr(shadow, "methods", None) == {"GET", "HEAD"} and "chat" in shadow.path:
        shadow = Route(shadow.path, shadow.endpoint, methods=["POST"])
    with pytest.raises(ModelError, match="routes answer"):
        require_known_routes([shadow, *routes()] if first else [*routes(), shadow])


def test_a_route_that_is_missing_is_refused() -> None:
    for gone in range(len(routes())):
        with pytest.raises(ModelError, match="0 routes"):
            require_known_routes([route for at, route in enumerate(routes()) if at != gone])
    with pytest.raises(ModelError):
        require_known_routes([WebSocketRoute("/v1/completions", answer("vllm.x"))])


def test_what_is_no_route_is_passed_over() -> None:
    require_known_routes([SimpleNamespace(path="/x"), *routes()])
