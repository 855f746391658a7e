"""The page: four tabs of Gradio, and the callbacks that hand what was chosen to session.py, runs_browser.py, audits.py.

Nothing is decided here. Callbacks have no name for clients, take no paths, and show errors with their four parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
import plotly.graph_objects as go

from moesteer.errors import MoesteerError
from moesteer.scenario import built_in
from moesteer.ui import audits as auditing
from moesteer.ui import markup, routing_view, runs_browser
from moesteer.ui.audits import Audits, Order
from moesteer.ui.session import LONGEST_QUESTION, MOST_TIMES, Session, Settings, Side, Turn, told

TITLE = "moesteer"
LOOK_S = 1.5
"""How often the audit is looked at."""
ONE = {"concurrency_id": "model", "concurrency_limit": 1}
"""Of callbacks that need the model: they wait for each other."""
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
AT_ONCE: dict[str, Any] = {**PRIVATE, "queue": False}
WARNING = (
    "A mask can also take safety behaviour away. What you see here is one model on one question: for numbers, evaluate "
    "or audit."
)


@dataclass(frozen=True)
class Parts:
    """What the page shows and does: the model and its answers, the audits; both know the catalogue."""

    session: Session
    audits: Audits


def theme() -> Any:
    """Gradio's plainest theme, with the system's own fonts: nothing is fetched."""
    sans = (gr.themes.Font("system-ui"), gr.themes.Font("sans-serif"))
    mono = (gr.themes.Font("ui-monospace"), gr.themes.Font("monospace"))
    return gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=sans, font_mono=mono)


def page(parts: Parts) -> Any:
    """The page, a gradio.Blocks, not yet served."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as blocks:
        _html(f'<div class="ms"><h1>moesteer</h1><p class="note">{markup.text(WARNING)}</p></div>')
        turns = gr.State(())
        chosen = gr.State(parts.session.model.name)
        with gr.Tab("Chat", id="chat"):
            model, masks = _chat_tab(parts, turns, chosen)
        with gr.Tab("Routing", id="routing") as routing:
            _routing_tab(parts, routing, turns)
        with gr.Tab("Runs", id="runs") as runs:
            _runs_tab(parts, runs)
        with gr.Tab("Audit", id="audit") as audit:
            _audit_tab(parts, audit)
        blocks.load(lambda held: _offered(parts, held), inputs=[chosen], outputs=[model, masks], **AT_ONCE)
    blocks.queue(default_concurrency_limit=1, max_size=16, api_open=False)
    return blocks


def _html(value: str = "") -> Any:
    return gr.HTML(value, js_on_load=None, apply_default_css=False, elem_classes=[markup.PART])


def _offered(parts: Parts, held: str) -> tuple[Any, Any]:
    catalogue = parts.session.catalogue
    return gr.update(choices=catalogue.models(), value=held), gr.update(choices=list(catalogue.masks()))


# ---- chat


def _chat_tab(parts: Parts, turns: Any, chosen: Any) -> tuple[Any, Any]:
    catalogue = parts.session.catalogue
    with gr.Row():
        model = gr.Dropdown(
            catalogue.models(), value=parts.session.model.name, label="Model", elem_id="model", scale=1, min_width=220
        )
        masks = gr.Dropdown(
            list(catalogue.masks()), value=[], multiselect=True, label="Masks, applied together", elem_id="masks",
            scale=2, min_width=260,
        )  # fmt: skip
    with gr.Row():
        times = gr.Slider(
            0, MOST_TIMES, value=1.0, step=0.05, label="Strength", elem_id="strength", scale=2, min_width=260,
            info="times each mask's own strength (alpha); 0 is no steering",
        )  # fmt: skip
        longest = gr.Slider(8, 1024, value=128, step=8, label="Longest answer, in tokens", scale=1, min_width=220)
    notice = _html(markup.plain(parts.session.about()))
    log = _html(markup.conversation(()))
    question = gr.Textbox(
        label="Your question", placeholder="how do i paint a clay pot ?", lines=2, max_lines=8,
        max_length=LONGEST_QUESTION, elem_id="question", submit_btn=False,
    )  # fmt: skip
    with gr.Row():
        ask = gr.Button("Ask", variant="primary", elem_id="ask", min_width=120)
        again = gr.Button("Ask the last question again", elem_id="again", min_width=200)
        stop = gr.Button("Stop", variant="stop", elem_id="stop", min_width=100)
        clear = gr.Button("Clear", elem_id="clear", min_width=100)
    settings, shown = [masks, times, longest], [log, turns, question, notice]

    def asked(text: str, held: tuple[Turn, ...], *chosen: Any) -> Iterator[tuple[Any, ...]]:
        yield from _ask(parts, held, text, chosen)

    def asked_again(held: tuple[Turn, ...], *chosen: Any) -> Iterator[tuple[Any, ...]]:
        yield from _ask(parts, held[:-1], held[-1].question if held else "", chosen)

    for trigger in (ask.click, question.submit):
        trigger(asked, inputs=[question, turns, *settings], outputs=shown, **PRIVATE, **ONE)
    again.click(asked_again, inputs=[turns, *settings], outputs=shown, **PRIVATE, **ONE)
    stop.click(parts.session.stop, **AT_ONCE)
    clear.click(lambda: (markup.conversation(()), (), "", ""), outputs=shown, **AT_ONCE)
    model.input(
        lambda name, held: _use(parts, name, held), inputs=[model, chosen], outputs=[model, chosen, *shown],
        **PRIVATE, **ONE,
    )  # fmt: skip
    return model, masks


def _ask(parts: Parts, held: tuple[Turn, ...], text: str, chosen: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    masks, times, longest = chosen
    turn = None
    try:
        for turn in parts.session.ask(held, text, Settings(tuple(masks or ()), float(times), int(longest))):
            yield markup.conversation((*held, turn), busy=True), held, gr.skip(), ""
    except MoesteerError as error:
        yield markup.conversation(held), held, gr.skip(), markup.notice(told(error))
    else:
        assert turn is not None
        yield markup.conversation((*held, turn)), (*held, turn), "", ""


def _use(parts: Parts, name: str, before: str) -> tuple[Any, ...]:
    empty = (markup.conversation(()), (), "")
    try:
        parts.session.use(name)
    except MoesteerError as error:
        return gr.update(value=before), before, *empty, markup.notice(told(error))
    return gr.skip(), name, *empty, markup.plain(parts.session.about())


# ---- routing


def _routing_tab(parts: Parts, tab: Any, turns: Any) -> None:
    with gr.Row():
        side = gr.Radio(
            [("with the masks", "with"), ("without them", "without")], value="with", label="The answer that was given",
            info="This text is read twice, with the masks and without: only the masks differ.", elem_id="side",
        )  # fmt: skip
    notice, said = _html(), _html()
    gr.Markdown("#### Token by token: how many of the chosen experts the masks replace, in each layer")
    tokens = gr.Plot(show_label=False, elem_id="tokens")
    words = _html()
    gr.Markdown("#### How often each expert is chosen, over these tokens")
    with gr.Row():
        plots = [
            gr.Plot(label=name, elem_id=where, min_width=300)
            for name, where in (("without the masks", "without"), ("with the masks", "with"))
        ]
    plots.append(gr.Plot(label="the difference", elem_id="difference"))
    drawn = [notice, said, tokens, words, *plots]
    for trigger in (tab.select, side.input):
        trigger(
            lambda held, chosen: _routed(parts, held, chosen), inputs=[turns, side], outputs=drawn, **PRIVATE, **ONE
        )


def _routed(parts: Parts, held: tuple[Turn, ...], side: Side) -> tuple[Any, ...]:
    try:
        routing = parts.session.routing(held, side=side)
    except MoesteerError as error:
        return markup.notice(told(error)), "", None, "", None, None, None
    figures = (
        routing_view.usage_figure(routing, steered=False),
        routing_view.usage_figure(routing, steered=True),
        routing_view.difference_figure(routing),
    )
    return (
        "",
        markup.plain(routing_view.summary(routing)),
        _plot(routing_view.tokens_figure(routing)),
        markup.tokens_table(routing_view.tokens_table(routing)),
        *map(_plot, figures),
    )


def _plot(figure: dict[str, Any] | None) -> Any:
    return None if figure is None else go.Figure(figure)


# ---- runs


def _runs_tab(parts: Parts, tab: Any) -> None:
    folder = parts.session.catalogue.runs
    with gr.Row():
        run = gr.Dropdown([], label="Run", elem_id="run", scale=3, min_width=260)
        look = gr.Button("Look again", elem_id="look", scale=1, min_width=120)
    notice, chosen, listed = _html(), _html(), _html()

    def looked() -> tuple[Any, Any]:
        found = runs_browser.describe(folder)
        return gr.update(choices=[one.name for one in found]), markup.runs_table(found)

    def opened(name: str | None) -> tuple[str, str]:
        if not name:
            return "", ""
        try:
            found = runs_browser.outcome(folder, name)
            return "", markup.outcome(name, found)
        except MoesteerError as error:
            return markup.notice(told(error)), ""

    for trigger in (tab.select, look.click):
        trigger(looked, outputs=[run, listed], **AT_ONCE)
    run.input(opened, inputs=[run], outputs=[notice, chosen], **AT_ONCE)


# ---- audit


def _audit_tab(parts: Parts, tab: Any) -> None:
    catalogue = parts.session.catalogue
    with gr.Row():
        model = gr.Dropdown(catalogue.models(), label="Model", elem_id="audit-model", min_width=220)
        scenario = gr.Dropdown(built_in(), value="jailbreak-defense", label="Scenario", min_width=220)
        mask = gr.Dropdown(
            _or_none(catalogue.masks()), value="", label="Defence mask, to see what it hardens", min_width=220
        )
    with gr.Row():
        name = gr.Textbox(label="Name of the run", elem_id="audit-name", max_length=64, min_width=220)
        limit = gr.Number(
            label="At most so many conversations per suite and split", info="0: all of them", value=0, minimum=0,
            precision=0, elem_id="audit-limit", min_width=220,
        )  # fmt: skip
    with gr.Row():
        start = gr.Button("Start", variant="primary", elem_id="audit-start", min_width=120)
        stop = gr.Button("Stop", variant="stop", elem_id="audit-stop", min_width=100)
    notice, state = _html(), _html(markup.audit(None, ()))
    timer = gr.Timer(LOOK_S, active=False)

    def seen() -> tuple[str, Any]:
        progress = parts.audits.progress()
        try:
            said = auditing.verdict(progress) if progress is not None else []
        except MoesteerError as error:
            said = [error.what]
        return markup.audit(progress, said), gr.update(active=progress is not None and progress.running)

    def started(*chosen: Any) -> tuple[Any, ...]:
        try:
            parts.audits.start(_order(*chosen))
        except MoesteerError as error:
            return (markup.notice(told(error)), *seen())
        return ("", *seen())

    def entered(held: str | None) -> tuple[Any, ...]:
        first = held or parts.session.model.name
        choices = gr.update(choices=catalogue.models(), value=first)
        free = auditing.free_name(catalogue.runs, first)
        return choices, gr.update(choices=_or_none(catalogue.masks())), free, *seen()

    tab.select(entered, inputs=[model], outputs=[model, mask, name, state, timer], **AT_ONCE)
    start.click(started, inputs=[model, name, scenario, mask, limit], outputs=[notice, state, timer], **AT_ONCE)
    stop.click(parts.audits.stop, **AT_ONCE).then(seen, outputs=[state, timer], **AT_ONCE)
    timer.tick(seen, outputs=[state, timer], **AT_ONCE)


def _or_none(names: Iterable[str]) -> list[tuple[str, str]]:
    return [("none", ""), *((name, name) for name in names)]


def _order(model: str | None, name: str, scenario: str | None, mask: str | None, limit: float | None) -> Order:
    return Order(
        model=model or "", name=name.strip(), scenario=scenario or "", mask=mask or None, limit=int(limit or 0) or None
    )
