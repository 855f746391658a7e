"""The pieces of the page that are HTML: every text of a model, a user or a file is made inert here, nowhere else."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote

from moesteer.report import word_diff
from moesteer.report.palette import PALETTE
from moesteer.report.wording import printable

if TYPE_CHECKING:
    from moesteer.ui.audits import Progress
    from moesteer.ui.runs_browser import Outcome, Run
    from moesteer.ui.session import Turn

PART = "ms-part"
"""Class of the boxes that these pieces go into; an empty one takes no room."""
REPORT_PATH = "/runs/"
"""Where reports are served, by the name of their run (door.py)."""


def text(value: object) -> str:
    """Any text as HTML that shows it letter by letter: escaped, with nothing hidden in it."""
    return html.escape(printable(str(value)), quote=True)


def style() -> str:
    """The style sheet of these pieces: the report's colours, by Gradio's theme."""
    light, dark = (" ".join(f"--ms-{name}: {tint[place]};" for name, tint in PALETTE.items()) for place in range(2))
    return f":root {{ {light} }}\n.dark {{ {dark} }}\n{RULES}"


RULES = """
.ms { color: var(--ms-ink); font-size: 15px; line-height: 1.5; overflow-wrap: anywhere; }
.ms h1 { font-size: 24px; font-weight: 700; margin: 0; }
.ms.log { max-height: 60vh; overflow-y: auto; display: flex; flex-direction: column; gap: 14px; }
.ms .asked { background: var(--ms-accent-soft); border-radius: 8px; padding: 8px 12px; margin: 0 0 8px; }
.ms .sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 10px; }
.ms .side { border: 1px solid var(--ms-line); background: var(--ms-card); border-radius: 8px; padding: 8px 12px; }
.ms .who { display: block; font-size: 13px; color: var(--ms-muted); }
.ms .said { white-space: pre-wrap; min-height: 1.5em; }
.ms mark { background: var(--ms-added); color: inherit; border-radius: 3px; padding: 0 1px; }
.ms .side.before mark { background: var(--ms-removed); }
.ms .note, .ms.plain { color: var(--ms-muted); font-size: 13px; margin: 4px 0 0; }
.ms .notice { border: 1px solid var(--ms-warn-line); background: var(--ms-warn-paper); border-radius: 8px;
  padding: 8px 12px; }
.ms .notice dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 12px; margin: 0; }
.ms .notice dt { color: var(--ms-muted); } .ms .notice dd { margin: 0; }
.ms .scroll { overflow-x: auto; }
.ms table { border-collapse: collapse; width: 100%; }
.ms th, .ms td { text-align: left; padding: 5px 10px 5px 0; border-bottom: 1px solid var(--ms-line);
  vertical-align: top; }
.ms th { color: var(--ms-muted); font-weight: 600; font-size: 13px; }
.ms a { color: var(--ms-accent); text-decoration: underline; }
.ms pre { background: var(--ms-card); border: 1px solid var(--ms-line); border-radius: 8px; padding: 8px 12px;
  max-height: 260px; overflow: auto; font-size: 13px; white-space: pre-wrap; }
.ms progress { appearance: none; width: 160px; height: 10px; border: 0; border-radius: 5px; overflow: hidden;
  background: var(--ms-grid); }
.ms progress::-webkit-progress-bar { background: var(--ms-grid); }
.ms progress::-webkit-progress-value { background: var(--ms-accent); }
.ms progress::-moz-progress-bar { background: var(--ms-accent); }
.ms iframe { width: 100%; height: 80vh; border: 1px solid var(--ms-line); border-radius: 8px; background: #fff; }
.ms-part:not(:has(.ms)) { display: none; }
.modebar-container { display: none; }
.js-plotly-plot text { fill: var(--ms-muted) !important; }
.js-plotly-plot .hoverlayer text { fill: #e8eaee !important; }
.ms summary { cursor: pointer; color: var(--ms-accent); }
"""


def conversation(turns: Sequence[Turn], *, busy: bool = False) -> str:
    """The turns so far: each question, below it both answers beside each other, the words that differ marked."""
    if not turns:
        return '<div class="ms log" role="log"><p class="note">Nothing asked yet.</p></div>'
    last = len(turns) - 1
    rows = "".join(_turn(turn, whole=not (busy and place == last)) for place, turn in enumerate(turns))
    return f'<div class="ms log" role="log" aria-busy="{str(busy).lower()}">{rows}</div>'


def _turn(turn: Turn, *, whole: bool) -> str:
    asked = (
        f'<div class="asked"><span class="who">you</span><div class="said" dir="auto">{text(turn.question)}</div></div>'
    )
    without, steered = text(turn.without), text(turn.with_masks or "")
    parts = word_diff.compare(turn.without, turn.with_masks) if whole and turn.with_masks else None
    if parts is not None:
        without, steered = (_marked(side) for side in parts)
    sides = _side("before", "without masks" if turn.with_masks is not None else "the model as it is", without)
    if turn.with_masks is not None:
        sides += _side("after", f"with {settings_in_words(turn)}", steered)
    notes = "".join(f'<p class="note">{text(note)}</p>' for note in turn.notes)
    return f'<div class="turn">{asked}<div class="sides">{sides}</div>{notes}</div>'


def settings_in_words(turn: Turn) -> str:
    """`a.safetensors and b.safetensors at 1.5 times their strength`."""
    return f"{' and '.join(turn.settings.masks)} at {turn.settings.times:g} times the strength"


def _side(kind: str, who: str, said: str) -> str:
    return (
        f'<div class="side {kind}"><span class="who">{text(who)}</span><div class="said" dir="auto">{said}</div></div>'
    )


def _marked(parts: Iterable[word_diff.Part]) -> str:
    return "".join(text(part.text) if part.kind == "same" else f"<mark>{text(part.text)}</mark>" for part in parts)


def notice(parts: Sequence[tuple[str, str]]) -> str:
    """An error with its four parts; empty where there is none."""
    if not parts:
        return ""
    rows = "".join(f"<dt>{text(name)}</dt><dd>{text(said)}</dd>" for name, said in parts)
    return f'<div class="ms"><div class="notice" role="alert"><dl>{rows}</dl></div></div>'


def plain(said: str) -> str:
    """A quiet sentence."""
    return f'<p class="ms plain">{text(said)}</p>' if said else ""


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, name: str) -> str:
    """A table with a scroll bar of its own. Cells are texts, or markup that `link` made."""
    top = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="ms scroll" role="region" aria-label="{text(name)}" tabindex="0"><table>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


class _Markup(str):
    """Markup of our own."""


def _cell(cell: object) -> str:
    return cell if isinstance(cell, _Markup) else text(cell)


def report_url(name: str) -> str:
    """Where a run's report is served."""
    return f"{REPORT_PATH}{quote(name, safe='/')}/report.html"


def link(name: str) -> str:
    """A link to a run's report, in a tab of its own that cannot reach this one."""
    return _Markup(f'<a href="{text(report_url(name))}" target="_blank" rel="noopener noreferrer">open report</a>')


def runs_table(runs: Sequence[Run]) -> str:
    """Every run found."""
    if not runs:
        return plain("No runs in the folder yet.")
    rows = [
        (run.name, run.model, run.scenario, run.status, run.when, link(run.name) if run.has_report else "none")
        for run in runs
    ]
    return table(("run", "model", "scenario", "status", "last written (UTC)", "report"), rows, name="runs")


def outcome(name: str, found: Outcome) -> str:
    """What came of a run, and its report in a frame that runs its own script and reaches nothing else."""
    said = "".join(f"<p>{text(line)}</p>" for line in found.lines)
    kind = f"{found.kind}: " if found.kind else ""
    head = f'<div class="ms"><p><strong>{text(kind + found.title)}</strong></p>{said}'
    if not found.has_report:
        return f'{head}<p class="note">No report: `moesteer report` writes it.</p></div>'
    return (
        f'{head}<p>{link(name)}</p><iframe title="report of {text(name)}" src="{text(report_url(name))}" '
        'sandbox="allow-scripts" referrerpolicy="no-referrer"></iframe></div>'
    )


def audit(progress: Progress | None, said: Sequence[str]) -> str:
    """How far the audit is. said: its verdict, once there is one."""
    if progress is None:
        return plain("No audit was started from here.")
    minutes, seconds = divmod(int(progress.seconds), 60)
    head = (
        f'<p role="status"><strong>{text(progress.name)}</strong>: {text(progress.status)}, '
        f"{minutes} min {seconds:02d} s</p>"
    )
    rows = "".join(
        f"<tr><td>{text(name)}</td><td>{text(done if of is None else f'{done} of {of}')}</td>"
        f"<td>{_bar(name, done, of)}</td></tr>"
        for name, done, of in progress.rows
    )
    answers = (
        '<table><thead><tr><th scope="col">answers</th><th scope="col">so far</th><th scope="col"></th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
        if rows
        else ""
    )
    verdict = "".join(f"<p>{text(line)}</p>" for line in said)
    if progress.has_report:
        verdict += f"<p>{link(progress.name)}</p>"
    tail = "\n".join(progress.lines)
    printed = f"<p>What it printed:</p><pre>{text(tail)}</pre>" if tail else ""
    return f'<div class="ms">{head}{verdict}{answers}{printed}</div>'


def _bar(name: str, done: int, of: int | None) -> str:
    if not of:
        return ""
    return f'<progress value="{min(done, of)}" max="{of}" aria-label="{text(name)}"></progress>'


def tokens_table(rows: Sequence[tuple[str, str, int, str]]) -> str:
    """The token figure in words, folded away."""
    drawn = table(("token", "of", "experts replaced", "in layers"), rows, name="tokens")
    return f'<div class="ms"><details><summary>The same as a table</summary>{drawn}</details></div>'
