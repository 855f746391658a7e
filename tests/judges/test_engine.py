"""Guard models in a real vLLM: the same verdicts as in transformers, from text and from probabilities."""

from __future__ import annotations

import importlib.util
import os

import psutil
import pytest

from moesteer.errors import EngineStoppedError, InputError
from tests.judges.guards import guard
from tests.judges.items import NO, POT, item
from tests.judges.test_guards import judge_of

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (on a machine without a GPU: vllm-cpu)"
)
ITEMS = [POT, NO, item("a?", "b", "how do i paint two pots?", "with a brush.", name="two")]


@needs_vllm
def test_an_engine_of_vllm_says_what_transformers_says(tmp_path) -> None:
    folder = guard(tmp_path / "guard", "llama", ["4"], head_dim=32)  # vLLM has no smaller heads on a CPU
    options = {"engine_options": {"max_model_len": 4096}, "backend": "vllm"}
    there, here = judge_of(folder, "strongreject", **options), judge_of(folder, "strongreject")
    try:
        found = there.judge(ITEMS)
        assert [one.verdict for one in found] == ["complied"] * 3  # the grade is believed, of a refusal too
        assert found == here.judge(ITEMS)
        prompts = [here.prompt_ids(q) for q in _questions()]
        assert (
            there.engine().answers(prompts, new_tokens=3) == here.engine().answers(prompts, new_tokens=3) == ["4", "4"]
        )
        unlikely = there.engine().next_tokens(prompts, among=[there._token("4"), there._token("Yes")])
        assert all(first > 0.99 and second < 0.01 for first, second in unlikely)
        assert there.engine().context_tokens == 4096 and there.identity != here.identity
        (engine,) = [p for p in psutil.Process().children() if p.name().startswith("VLLM::EngineCor")]
        engine.kill()
        with pytest.raises(EngineStoppedError, match="the judge's engine stopped"):  # never rows that stay unscored
            there.judge(ITEMS)
    finally:
        there.close()


def _questions():
    from moesteer.conversations import Message
    from moesteer.judges.asking import Question

    return [Question((Message("user", text),), "use a brush", None, "g") for text in ("a pot?", "how do i paint two?")]


@needs_vllm
def test_options_that_say_which_model_is_run_are_refused(tmp_path) -> None:
    judge = judge_of(tmp_path, "harmbench", backend="vllm", engine_options={"load_format": "pt"})
    with pytest.raises(InputError, match="load_format cannot be set"):
        judge.judge([POT])
