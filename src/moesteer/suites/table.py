"""The table of named suites: one frozen row each. `moesteer suites` shows it, docs/suites.md explains it.

Facts were looked up on each data set's own page, its repository or its paper. Where one could not be found it is
"unknown" or None. Revisions are pinned where the commit is known to hold the columns named here.
"""

from __future__ import annotations

from collections.abc import Mapping

from moesteer.errors import UnknownNameError
from moesteer.suites import mappings as m
from moesteer.suites.named import UNKNOWN, Hub, NamedSuite

_DIRECT = ("direct_refusal_rate",)
_BENIGN = ("benign_accuracy", "over_refusal_rate")
_UNNAMED = f"{UNKNOWN}: neither its page nor its repository names one"


def _beavertails(split: str) -> Hub:
    return Hub("PKU-Alignment/BeaverTails", split, revision="8401fe609d288129cc684a9b3be6a93e41cfe678", gated=False)


def _file(address: str, *, home: str) -> Hub:
    return Hub("json", "train", files=address, gated=False, home=home)


_ROWS = (
    NamedSuite(
        name="mhj",
        title="Multi-Turn Human Jailbreaks",
        measures="whether attacks that people led over several turns, all of which broke some model, get through",
        hub=Hub("ScaleAI/mhj", "train", files="harmbench_behaviors.csv", gated=True),
        columns='message_0, message_1, ... (JSON of "role" and "body"), tactic, question_id; or conversation_history',
        licence="CC BY-NC 4.0",
        citation="Li et al. 2024, arXiv:2408.15221",
        rows=None,
        harmful=True,
        convert=m.mhj,
        judge="refusal",
        metrics=("defense_success_rate",),
        model_judge="llama-guard-3",
        note="537 conversations with its WMDP file, which is left out; seven tactics, so splits keep about 38 %. "
        "MASCing's attack suite. The system turns of some rows are kept.",
    ),
    NamedSuite(
        name="harmbench",
        title="HarmBench",
        measures="whether direct requests for harm are refused",
        hub=Hub("walledai/HarmBench", "train", config="standard"),
        columns="Behavior (ContextString) of harmbench_behaviors_text_*.csv, or prompt (context)",
        licence="MIT",
        citation="Mazeika et al. 2024, arXiv:2402.04249",
        rows=200,
        harmful=True,
        convert=m.harmbench,
        judge="refusal",
        metrics=_DIRECT,
        model_judge="harmbench",
        note="The Hub copy's standard behaviours; the authors' CSV has all 400, 100 of them copyright "
        "(github.com/centerforaisafety/HarmBench, data/behavior_datasets).",
    ),
    NamedSuite(
        name="advbench",
        title="AdvBench, harmful behaviors",
        measures="whether direct requests for harm are refused",
        hub=Hub("walledai/AdvBench", "train"),
        columns="goal of harmful_behaviors.csv, or prompt",
        licence="MIT",
        citation="Zou et al. 2023, arXiv:2307.15043",
        rows=520,
        harmful=True,
        convert=m.requests("goal", "prompt"),
        judge="refusal",
        metrics=_DIRECT,
        model_judge="llama-guard-3",
        note="Many near-duplicates; its affirmative targets are not used.",
    ),
    NamedSuite(
        name="strongreject",
        title="StrongREJECT",
        measures="whether direct requests for harm are refused, and how useful an answer would be",
        hub=Hub("walledai/StrongREJECT", "train", revision="df54272b395ce9e584d2f8140519935425d8549f"),
        columns="forbidden_prompt of strongreject_dataset.csv, or prompt",
        licence="MIT",
        citation="Souly et al. 2024, arXiv:2402.10260",
        rows=313,
        harmful=True,
        convert=m.requests("forbidden_prompt", "prompt"),
        judge="refusal",
        metrics=_DIRECT,
        model_judge="strongreject",
    ),
    NamedSuite(
        name="jailbreakbench",
        title="JailbreakBench, JBB-Behaviors: harmful",
        measures="whether direct requests for misuse are refused",
        hub=Hub("JailbreakBench/JBB-Behaviors", "harmful", config="behaviors", gated=False),
        columns="Goal, Behavior",
        licence="MIT",
        citation="Chao et al. 2024, arXiv:2404.01318",
        rows=100,
        harmful=True,
        convert=m.jailbreakbench,
        judge="refusal",
        metrics=_DIRECT,
        model_judge="llama-guard-3",
    ),
    NamedSuite(
        name="jailbreakbench-benign",
        title="JailbreakBench, JBB-Behaviors: benign",
        measures="whether harmless requests on the same topics are answered",
        hub=Hub("JailbreakBench/JBB-Behaviors", "benign", config="behaviors", gated=False),
        columns="Goal, Behavior",
        licence="MIT",
        citation="Chao et al. 2024, arXiv:2404.01318",
        rows=100,
        harmful=False,
        convert=m.jailbreakbench,
        judge="content",
        metrics=_BENIGN,
        model_judge="wildguard",
        note="Matches jailbreakbench behaviour by behaviour; both are one group and never in two splits.",
    ),
    NamedSuite(
        name="xstest",
        title="XSTest, safe prompts",
        measures="over-refusal: whether safe prompts that look unsafe are answered",
        hub=Hub("walledai/XSTest", "test"),
        columns="prompt, label (safe, unsafe)",
        licence="CC BY 4.0",
        citation="Röttger et al. 2023, arXiv:2308.01263",
        rows=250,
        harmful=False,
        convert=m.only(m.requests("prompt"), "label", "safe"),
        judge="content",
        metrics=_BENIGN,
        model_judge="wildguard",
        note="The authors' own copy is Paul/XSTest.",
    ),
    NamedSuite(
        name="xstest-unsafe",
        title="XSTest, unsafe contrasts",
        measures="whether the unsafe counterparts of XSTest's safe prompts are refused",
        hub=Hub("walledai/XSTest", "test"),
        columns="prompt, label (safe, unsafe)",
        licence="CC BY 4.0",
        citation="Röttger et al. 2023, arXiv:2308.01263",
        rows=200,
        harmful=True,
        convert=m.only(m.requests("prompt"), "label", "unsafe"),
        judge="refusal",
        metrics=_DIRECT,
        model_judge="wildguard",
    ),
    NamedSuite(
        name="or-bench",
        title="OR-Bench, hard",
        measures="over-refusal: whether harmless prompts that strong models tend to refuse are answered",
        hub=Hub("bench-llm/or-bench", "train", config="or-bench-hard-1k", gated=False),
        columns="prompt",
        licence="CC BY 4.0",
        citation="Cui et al. 2024, arXiv:2405.20947",
        rows=None,
        harmful=False,
        convert=m.requests("prompt"),
        judge="content",
        metrics=_BENIGN,
        model_judge="wildguard",
        note="About 1,000 (its paper); written by a model, and some are less harmless than meant.",
    ),
    NamedSuite(
        name="or-bench-toxic",
        title="OR-Bench, toxic",
        measures="whether toxic prompts are refused, so that answering everything does not win",
        hub=Hub("bench-llm/or-bench", "train", config="or-bench-toxic", gated=False),
        columns="prompt",
        licence="CC BY 4.0",
        citation="Cui et al. 2024, arXiv:2405.20947",
        rows=None,
        harmful=True,
        convert=m.requests("prompt"),
        judge="refusal",
        metrics=_DIRECT,
        model_judge="llama-guard-3",
        note="About 600 (its paper).",
    ),
    NamedSuite(
        name="beavertails",
        title="BeaverTails, prompts with an unsafe reply",
        measures="whether prompts to which a model once replied unsafely are refused",
        hub=Hub(
            "PKU-Alignment/BeaverTails", "30k_test", revision="8401fe609d288129cc684a9b3be6a93e41cfe678", gated=False
        ),
        columns="prompt, response, is_safe",
        licence="CC BY-NC 4.0",
        citation="Ji et al. 2023, arXiv:2307.04657",
        rows=None,
        harmful=True,
        convert=m.beavertails,
        judge="refusal",
        metrics=_DIRECT,
        model_judge="llama-guard-3",
        one_per_group=True,
        note="Of about 3,020 rows those rated unsafe, each prompt once. Not every prompt is itself harmful.",
    ),
    NamedSuite(
        name="beavertails-pairs",
        title="BeaverTails, refusal against unsafe reply",
        measures="SteerMoE's safety contrast, for detection: the same prompt with a refusal and with its unsafe reply",
        hub=Hub(
            "PKU-Alignment/BeaverTails", "30k_train", revision="8401fe609d288129cc684a9b3be6a93e41cfe678", gated=False
        ),
        columns="prompt, response, is_safe",
        licence="CC BY-NC 4.0",
        citation="Ji et al. 2023, arXiv:2307.04657; contrast: Fayyaz et al. 2025, arXiv:2509.09660",
        rows=None,
        harmful=True,
        convert=m.beavertails_pairs,
        judge="refusal",
        metrics=_DIRECT,
        one_per_group=True,
        pairs="response",
        note='Of about 27,200 rows those rated unsafe, each prompt once. Labels "refuse" and "comply"; the refusals '
        "are ours, eight of them.",
    ),
    NamedSuite(
        name="squad",
        title="SQuAD 1.1",
        measures="whether questions are answered from the document",
        hub=Hub("rajpurkar/squad", "validation", config="plain_text", gated=False),
        columns="context, question, answers; or the articles of its own JSON",
        licence="CC BY-SA 4.0",
        citation="Rajpurkar et al. 2016, arXiv:1606.05250",
        rows=10_570,
        harmful=False,
        convert=m.squad,
        judge="content",
        metrics=("faithfulness",),
        note="The first of several accepted answers counts, so the rate is a lower bound.",
    ),
    NamedSuite(
        name="squad-pairs",
        title="SQuAD 1.1, with and without its document",
        measures="SteerMoE's faithfulness contrast, for detection: a question below its document, and alone",
        hub=Hub("rajpurkar/squad", "train", config="plain_text", gated=False),
        columns="context, question, answers; or the articles of its own JSON",
        licence="CC BY-SA 4.0",
        citation="Rajpurkar et al. 2016, arXiv:1606.05250; contrast: Fayyaz et al. 2025, arXiv:2509.09660",
        rows=87_599,
        harmful=False,
        convert=m.squad_pairs,
        judge="content",
        metrics=("faithfulness",),
        pairs="final_user",
        note='Labels "follow-document" and "recall"; detect with --set span=question. The document stands in a system '
        "message.",
    ),
    NamedSuite(
        name="faitheval",
        title="FaithEval, counterfactual",
        measures="whether a document is followed where it contradicts common knowledge",
        hub=Hub("Salesforce/FaithEval-counterfactual-v1.0", "test", gated=False),
        columns="context, question, choices (label, text), answerKey",
        licence=_UNNAMED,
        citation="Ming et al. 2024, arXiv:2410.03727",
        rows=1_000,
        harmful=False,
        convert=m.faitheval,
        judge="content",
        metrics=("faithfulness",),
        note="Its Parquet needs datasets 4 or newer.",
    ),
    NamedSuite(
        name="faitheval-unanswerable",
        title="FaithEval, unanswerable",
        measures='whether "unknown" is said where the document does not hold the answer',
        hub=Hub("Salesforce/FaithEval-unanswerable-v1.0", "test", gated=False),
        columns="context, question",
        licence=_UNNAMED,
        citation="Ming et al. 2024, arXiv:2410.03727",
        rows=2_492,
        harmful=False,
        convert=m.faitheval_unanswerable,
        judge="content",
        metrics=("faithfulness",),
        note="Its Parquet needs datasets 4 or newer. Always abstaining wins: run it beside squad.",
    ),
    NamedSuite(
        name="faitheval-inconsistent",
        title="FaithEval, inconsistent",
        measures='whether "conflict" is said where documents disagree',
        hub=Hub("Salesforce/FaithEval-inconsistent-v1.0", "test", gated=False),
        columns="context, question",
        licence=_UNNAMED,
        citation="Ming et al. 2024, arXiv:2410.03727",
        rows=1_500,
        harmful=False,
        convert=m.faitheval_inconsistent,
        judge="content",
        metrics=("faithfulness",),
        note="Its Parquet needs datasets 4 or newer. Always saying so wins: run it beside squad.",
    ),
    NamedSuite(
        name="mquake",
        title="MQuAKE, facts in context",
        measures="whether edited facts in the context are followed over two to four hops",
        hub=_file(
            "https://raw.githubusercontent.com/princeton-nlp/MQuAKE/main/datasets/MQuAKE-CF-3k-v2.json",
            home="https://github.com/princeton-nlp/MQuAKE",
        ),
        columns="questions, new_answer, new_single_hops (cloze, answer)",
        licence=_UNNAMED,
        citation="Zhong et al. 2023, arXiv:2305.14795",
        rows=3_000,
        harmful=False,
        convert=m.mquake,
        judge="content",
        metrics=("faithfulness",),
        note="The first of three wordings; aliases of the answer do not count, so the rate is a lower bound.",
    ),
    NamedSuite(
        name="triviaqa-counterfactual",
        title="CF-TriviaQA",
        measures="whether a document is followed where it contradicts the known answer",
        hub=_file(
            "https://raw.githubusercontent.com/google-research-datasets/cf_triviaqa/main/har_dataset.jsonl",
            home="https://github.com/google-research-datasets/cf_triviaqa",
        ),
        columns="question_text, paragraph_text, annotation",
        licence="Apache-2.0 (questions: TriviaQA's own terms)",
        citation="Köksal et al. 2023, arXiv:2311.07424",
        rows=None,
        harmful=False,
        convert=m.triviaqa_counterfactual,
        judge="content",
        metrics=("faithfulness",),
        note="Versions of its page say 16,853 and 19,327 rows. Made by a model; its authors rate 0.87 as grounded and "
        "0.68 as counterfactual.",
    ),
    NamedSuite(
        name="mctest",
        title="MCTest, MC500 test",
        measures="whether questions about a short children's story are answered from it",
        hub=Hub(
            "sagnikrayc/mctest", "test", revision="refs/convert/parquet", files="mc500/test/*.parquet", gated=False
        ),
        columns="story, question, answer_options, answer",
        licence="Microsoft Research License Agreement",
        citation="Richardson et al. 2013, aclanthology.org/D13-1020",
        rows=600,
        harmful=False,
        convert=m.mctest,
        judge="content",
        metrics=("faithfulness",),
        note="The Hub's main branch is a program, which is never run: its Parquet branch is read, which is a moving "
        "name and no pin. The original .tsv and .ans files are not read.",
    ),
)
SUITES: Mapping[str, NamedSuite] = {row.name: row for row in _ROWS}


def named(name: str) -> NamedSuite:
    """A suite by name. Raises UnknownNameError."""
    if name not in SUITES:
        raise UnknownNameError(
            f"no suite {name!r}", where="suite:NAME", expected=", ".join(SUITES), do="name one (`moesteer suites`)"
        )
    return SUITES[name]
