"""lm-eval on steered models: unsteered it is lm-eval's own model to the last bit, and no cache mixes masks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the extra `lm-eval` is not installed")

from lm_eval import simple_evaluate, tasks
from lm_eval.tasks import TaskManager
from typer.testing import CliRunner

from moesteer.backends import gating
from moesteer.backends.hf import Model
from moesteer.backends.sources import LAB_TINY
from moesteer.cli.main import app
from moesteer.conversations import Message
from moesteer.errors import FileError, InputError, MaskContentError, MaskMismatchError, NoEffectError
from moesteer.harness import lm_eval_model
from moesteer.harness.lm_eval_command import with_model
from moesteer.harness.lm_eval_model import SteeredLM
from moesteer.mask import SteeringMask
from tests.harness.conftest import TEXTS

Files = dict[str, str]
CHOICES = (["a brush .", "i can not share that ."], ["langdon .", "no ."], ["a cloth .", "sure ."], ["hello .", "no ."])
TASKS = {
    "lab_choice": 'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\n'
    "doc_to_target: 0\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "lab_text": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{q}} {{choices[0]}}"\n'
    "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
    "lab_say": 'output_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{choices[0]}}"\n'
    'generation_kwargs: {until: ["\\n", " use"], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]\n',
}
"""One task of each kind of request."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tasks and their data."""
    found = tmp_path_factory.mktemp("tasks")
    rows = [{"q": text, "choices": choices} for text, choices in zip(TEXTS, CHOICES, strict=True)]
    (found / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {found / 'data.jsonl'}}}}}\n"
        (found / f"{name}.yaml").write_text(head + "test_split: test\n" + text)
    return found


@pytest.fixture(scope="module")
def manager(folder: Path) -> TaskManager:
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(autouse=True, scope="module")
def loaded_once(lab_tiny: Model) -> Iterator[None]:
    """Every SteeredLM of this file takes the model that the tests have."""
    before = lm_eval_model.load
    lm_eval_model.load = lambda *args, **kwargs: lab_tiny  # type: ignore[assignment]
    yield
    lm_eval_model.load = before


def scored(manager: TaskManager, model: Any, args: dict[str, Any], *names: str, **more: Any) -> dict[str, Any]:
    return simple_evaluate(
        model=model, model_args=args, tasks=list(names or TASKS), task_manager=manager, log_samples=True,
        bootstrap_iters=0, batch_size=3, **more,
    )  # fmt: skip


def responses(results: dict[str, Any]) -> dict[str, Any]:
    return {task: [one["resps"] for one in rows] for task, rows in results["samples"].items()}


def asked(*requests: tuple[Any, ...]) -> list[Any]:
    """Requests as lm-eval hands them to a model."""
    return [SimpleNamespace(args=args, task_name="test") for args in requests]


def test_unsteered_is_lm_eval_s_own_model_and_steered_is_not(
    manager: TaskManager, masks: Files, made: dict[str, SteeringMask], lab_tiny: Model
) -> None:
    own = scored(manager, "hf", {"pretrained": str(LAB_TINY), "dtype": "float32", "device": "cpu"})
    plain = scored(manager, "moesteer", {"pretrained": "lab-tiny"})
    assert responses(plain) == responses(own) and plain["results"] == own["results"]
    steered = scored(manager, "moesteer", {"pretrained": "lab-tiny", "mask": masks["low"], "alpha": 0.5})
    for task in TASKS:
        assert responses(steered)[task] != responses(own)[task], task
    told = steered["config"]["moesteer"]
    assert told["mask_sha256"] == [made["low"].sha256] and told["alphas"] == [0.5]
    assert told["receipt"]["changed"] > 0 and told["device"] == "cpu"
    assert steered["config"]["model_name_steered"] == f"lab-tiny+{made['low'].sha256[:12]}@0.5"
    assert plain["config"]["moesteer"]["mask_sha256"] == [] and plain["config"]["moesteer"]["receipt"] == {}
    assert lab_tiny.mask_sha256 == ()
    again = scored(manager, "moesteer", {"pretrained": "lab-tiny"})
    assert responses(again) == responses(own)  # the model is itself again


def test_steered_log_likelihoods_are_those_of_the_steered_model(
    masks: Files, made: dict[str, SteeringMask], lab_tiny: Model
) -> None:
    """Against one forward pass of each text by itself."""
    import torch

    model = SteeredLM("lab-tiny", mask=masks["low"], alpha=0.5, batch_size=4)
    pairs = [(text, f" {choice}") for text, choices in zip(TEXTS, CHOICES, strict=True) for choice in choices]
    found = model.loglikelihood(asked(*pairs), disable_tqdm=True)
    for (context, more), (total, _) in zip(pairs, found, strict=True):
        ids, start = model.tok_encode(context + more), len(model.tok_encode(context))
        with made["low"].apply(lab_tiny, alpha=0.5), torch.inference_mode():
            logits = lab_tiny.hf(torch.tensor([ids])).logits[0].log_softmax(-1)
        wanted = sum(float(logits[i - 1, ids[i]]) for i in range(start, len(ids)))
        assert total == pytest.approx(wanted, abs=2e-4)  # float32, sums of up to ten terms


def test_a_gate_decides_for_each_request(masks: Files, made: dict[str, SteeringMask], lab_tiny: Model) -> None:
    prompts = [lab_tiny.encode([Message("user", text)]) for text in TEXTS]
    fires = gating.decide(lab_tiny, prompts, [made["gated"]])[:, 0].tolist()
    assert fires.count(True) == 2
    plain, low, gated = (
        SteeredLM("lab-tiny", batch_size=4, **args) for args in ({}, {"mask": masks["low"]}, {"mask": masks["gated"]})
    )
    # as lm-eval makes them with --apply_chat_template
    texts = [gated.apply_chat_template([{"role": "user", "content": text}]) for text in TEXTS]
    pairs = [(text, more) for text in texts for more in ("i can", "use a")]
    scores = [model.loglikelihood(asked(*pairs), disable_tqdm=True) for model in (plain, low, gated)]
    said = [
        model.generate_until(asked(*((t, {"until": ["\n"], "max_gen_toks": 12}) for t in texts)), disable_tqdm=True)
        for model in (plain, low, gated)
    ]
    for i, open_ in enumerate(fires):
        source = 1 if open_ else 0
        assert said[2][i] == said[source][i]
        for j in (2 * i, 2 * i + 1):
            assert scores[2][j][0] == pytest.approx(scores[source][j][0], abs=2e-4)
            assert abs(scores[0][j][0] - scores[1][j][0]) > 1e-2  # or there would be nothing to tell apart
    assert gated.tally.counts["gated"] == 12 and gated.tally.counts["fired"] == 6
    with pytest.raises(InputError, match="running text holds none"):
        gated.loglikelihood_rolling(asked((TEXTS[0],)), disable_tqdm=True)


def test_a_cache_of_answers_belongs_to_one_model_and_mask(
    manager: TaskManager, masks: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-evaluation-harness 4063: its keys do not say who was asked."""
    cache = str(tmp_path / "answers")
    plain = {"pretrained": "lab-tiny"}
    first = scored(manager, "moesteer", plain, "lab_choice", use_cache=cache)
    for args in ({"mask": masks["low"]}, {"mask": masks["low"], "alpha": 0.5}, {"mask": masks["high"]}):
        with pytest.raises(FileError, match="holds answers of lab-tiny") as caught:
            scored(manager, "moesteer", plain | args, "lab_choice", use_cache=cache)
        assert "name another file" in caught.value.do
    steered = scored(manager, "moesteer", plain | {"mask": masks["low"]}, "lab_choice", use_cache=cache + "-low")
    assert responses(steered) != responses(first)
    monkeypatch.setattr(SteeredLM, "_loglikelihood_tokens", lambda *a, **k: pytest.fail("asked again"))
    again = scored(manager, "moesteer", plain | {"mask": masks["low"]}, "lab_choice", use_cache=cache + "-low")
    assert responses(again) == responses(steered)


def test_a_cache_that_another_model_made_is_refused(manager: TaskManager, tmp_path: Path) -> None:
    cache = str(tmp_path / "answers")
    scored(manager, "hf", {"pretrained": str(LAB_TINY), "device": "cpu"}, "lab_choice", use_cache=cache)
    with pytest.raises(FileError, match="a model that did not say which"):
        scored(manager, "moesteer", {"pretrained": "lab-tiny"}, "lab_choice", use_cache=cache)


def test_masks_that_do_not_fit_are_refused_before_the_first_request(
    masks: Files, made: dict[str, SteeringMask], tmp_path: Path
) -> None:
    info = made["low"].info
    other = info.fingerprint.model_copy(update={"router_sha256": "0" * 64})
    path = tmp_path / "other.safetensors"
    made["low"].with_info(fingerprint=other).save(path)
    with pytest.raises(MaskMismatchError, match="another checkpoint"):
        SteeredLM("lab-tiny", mask=str(path))
    assert SteeredLM("lab-tiny", mask=str(path), allow_other_checkpoint=True).steering.sha256
    with pytest.raises(MaskContentError, match="pinned"):
        SteeredLM("lab-tiny", mask=masks["low"], pin=masks["gated"])
    weak = SteeredLM("lab-tiny", mask=masks["weak"])
    with pytest.raises(NoEffectError, match="changed none"):
        weak.loglikelihood(asked((TEXTS[0], " hello")), disable_tqdm=True)


def test_the_command_runs_lm_eval_with_our_model(
    folder: Path, masks: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # its own thousands of tasks take seconds to list
    monkeypatch.setattr(tasks, "TaskManager", partial(TaskManager, include_defaults=False))
    done = CliRunner().invoke(
        app,
        [
            "lm-eval", "--model_args", f"pretrained=lab-tiny,mask={masks['low']},alpha=0.5", "--tasks", "lab_choice",
            "--include_path", str(folder), "--batch_size", "4", "--output_path", str(tmp_path),
        ],
    )  # fmt: skip
    assert done.exit_code == 0, (done.output, done.exception)
    assert "lab_choice" in done.stdout and "moesteer ({'pretrained': 'lab-tiny'" in done.stdout
    (written,) = tmp_path.rglob("results_*.json")
    assert json.loads(written.read_text())["config"]["moesteer"]["alphas"] == [0.5]


def test_help_is_ours_and_then_lm_eval_s() -> None:
    ours = CliRunner().invoke(app, ["lm-eval", "--help"])
    assert ours.exit_code == 0 and "lm-eval's own command line" in ours.stdout
    theirs = CliRunner().invoke(app, ["lm-eval", "run", "--help"])
    assert theirs.exit_code == 0 and "--model_args" in theirs.stdout


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["--tasks", "x"], ["--tasks", "x", "--model", "moesteer"]),
        (["run", "--tasks", "x"], ["run", "--tasks", "x", "--model", "moesteer"]),
        (["--model=hf", "--tasks", "x"], None), (["-M", "hf"], None), (["--config", "c.yaml"], None),
        (["ls", "tasks"], None), (["run", "--help"], None), ([], None),
    ],
)  # fmt: skip
def test_a_run_that_names_no_model_takes_ours(given: list[str], wanted: list[str] | None) -> None:
    assert with_model(given) == (wanted or given)
