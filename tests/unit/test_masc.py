"""detection/masc.py on planted traces, whose answer is known. Legend: L layers, E experts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moesteer.detection import masc, surrogate
from moesteer.detection.masc import KEEP, UNWANTED, WANTED, detect, detect_grid, read, split_by_group
from moesteer.errors import InputError, NoEffectError, TraceLabelError, UnknownNameError
from tests.unit.planted_traces import LEANS, TOLD_BY, largest, planted

THREE = ("bad", "good", "keep")
QUICK = {"steps": 60, "surrogates": 2}


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """Little noise: the told and the kept lean to one expert each."""
    return planted(tmp_path_factory.mktemp("masc") / "t", THREE, spans=("final_turn", "final_user"), noise=0.5,
                   lengths=dict.fromkeys(THREE, (2, 5)))  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Without a class to keep."""
    return planted(tmp_path_factory.mktemp("masc") / "p", ("bad", "good"), spans=("final_turn",), noise=0.5,
                   lengths=dict.fromkeys(THREE, (2, 5)))  # fmt: skip


def own_stack(found, *, kind="lstm", seed=0, surrogates=4, batch=96):
    """The surrogates that `detect` fits."""
    train, _ = split_by_group(found.groups, seed=seed)
    classes = 3 if found.rows(KEEP) else 2
    seeds = [1000 * seed + i for i in range(surrogates)]
    return surrogate.fit(kind, found.data, train=train, classes=classes, seeds=seeds, batch=batch)


def classes_under(mask, found, stack, label):
    """[G, n] class of every sequence with the label, under the mask at alpha 1, one sequence at a time."""
    verdicts = []
    for i in found.rows(label):
        logits = found.data.logits_NTLE[i, : found.data.lengths_N[i]] + torch.from_numpy(mask.bias_LE(1.0))
        verdicts.append(stack.classes(stack(logits[None, None], found.data.lengths_N[i : i + 1])))
    return torch.cat(verdicts, dim=1)


# ---------------------------------------------------------------- what it finds


@pytest.mark.parametrize("kind", surrogate.KINDS)
def test_the_expert_that_tells_the_sides_apart_gets_the_largest_strength(trace, kind):
    found = detect(trace, toward="good", surrogate_kind=kind, l1=3.0, steps=100, surrogates=4)
    assert largest(found.mask.strength_LE) == TOLD_BY
    assert found.mask.strength_LE[TOLD_BY] > 0.5
    np.testing.assert_array_equal(found.scores_LE, found.mask.strength_LE)
    np.testing.assert_array_equal(found.mask.sigma_L, trace.sigma_L)
    assert found.facts["surrogate_held_out_accuracy"] > 0.8 and found.facts["surrogate_train_accuracy"] > 0.9
    assert found.facts["surrogate_keep_accuracy"] > 0.9 and found.facts["warning"] is None


def test_the_other_side_gets_the_other_sign(trace):
    found = detect(trace, toward="bad", l1=3.0, steps=100, surrogates=4)
    assert largest(found.mask.strength_LE) == TOLD_BY and found.mask.strength_LE[TOLD_BY] < -0.5


def test_the_unwanted_move_and_the_kept_stay(trace):
    found = read(trace, toward="good", keep=("keep",), span="final_turn")
    stack = own_stack(found)
    guarded = detect(trace, toward="good", l1=0.3, steps=100, surrogates=4)
    loose = detect(trace, toward="good", l1=0.3, steps=100, surrogates=4, keep_weight=0.0)
    for made in (guarded, loose):
        moved = float((classes_under(made.mask, found, stack, UNWANTED) == WANTED).float().mean())
        assert made.facts["moved_to_wanted_class"] == pytest.approx(moved, abs=1e-6) and moved > 0.9
    before = classes_under(guarded.mask.with_info(alpha=1.0).top(0), found, stack, UNWANTED)
    assert float((before == WANTED).float().mean()) < 0.1
    stay = [float((classes_under(made.mask, found, stack, KEEP) == KEEP).float().mean()) for made in (guarded, loose)]
    assert stay[0] > 0.95 and stay[1] < 0.5
    assert float((classes_under(guarded.mask, found, stack, WANTED) == WANTED).float().mean()) > 0.95


def test_without_a_class_to_keep_there_are_two_classes(pair):
    found = detect(pair, toward="good", l1=0.3, surrogates=4)
    assert found.mask.strength_LE[TOLD_BY] > 0 and found.facts["moved_to_wanted_class"] > 0.9
    assert np.isnan(found.facts["surrogate_keep_accuracy"])


def test_what_keep_names_is_kept_and_nothing_else(trace):
    found = read(trace, toward="good", keep=("keep",), span="final_turn")
    assert [len(found.rows(label)) for label in (UNWANTED, WANTED, KEEP)] == [24, 24, 24]
    found = read(trace, toward="good", keep=("nobody",), span="final_turn")
    assert [len(found.rows(label)) for label in (UNWANTED, WANTED, KEEP)] == [48, 24, 0]
    with pytest.raises(TraceLabelError, match="one side of the contrast is empty"):
        read(trace, toward="keep", keep=("good", "bad"), span="final_user")


def test_the_span_is_what_it_reads(tmp_path):
    """Logits differ in the response alone: the final turn says nothing, the response all."""
    from tests.unit.traces_by_hand import Spoken, write

    rng = np.random.default_rng(0)
    spoken = []
    for i in range(40):
        turn, response = rng.normal(size=(2, 3, 3, 12))
        response[:, 1, 4] += 4.0 if i % 2 else -4.0
        logits = {"final_turn": turn, "response": response}
        chosen = {name: np.argsort(-one, axis=-1)[..., :2] for name, one in logits.items()}
        spoken.append(Spoken(f"c{i}", f"g{i}", ("bad", "good")[i % 2], chosen, logits))
    made = write(tmp_path / "t", spoken, experts=12, per_shard=20)
    given = {"toward": "good", "surrogate_kind": "linear", "keep": (), "l1": 0.3, **QUICK}
    assert detect(made, span="response", **given).mask.strength_LE[TOLD_BY] > 0.3
    assert detect(made, span="response", **given).facts["surrogate_held_out_accuracy"] == 1.0
    assert detect(made, span="final_turn", **given).facts["surrogate_held_out_accuracy"] < 0.9


# ---------------------------------------------------------------- lambda, start and seed


def test_a_larger_lambda_leaves_fewer_experts_and_the_rest_exactly_zero(trace):
    found = [detect(trace, toward="good", l1=l1, steps=150, surrogates=2).mask for l1 in (0.0, 1.0, 3.0, 5.0)]
    counts = [mask.expert_count for mask in found]
    assert counts[0] == 36 and counts == sorted(counts, reverse=True) and 0 < counts[-1] < 15
    assert [float(np.abs(mask.strength_LE).sum()) for mask in found] == sorted(
        (float(np.abs(mask.strength_LE).sum()) for mask in found), reverse=True
    )


def test_a_lambda_that_leaves_nothing_is_an_error(trace):
    with pytest.raises(NoEffectError, match="masc found no expert"):
        detect(trace, toward="good", l1=1e4, **QUICK)


@pytest.mark.parametrize("start", masc.STARTS)
def test_lambdas_in_one_batch_are_each_lambda_alone(trace, start):
    """Batched sums round in another order, and Adam takes a rounded sign for a step: 0.02 of strengths of 1 to 2."""
    variants = [{"l1": 0.3}, {"l1": 3.0}, {"l1": 1.0, "surrogate_kind": "linear"}, {}]
    together = detect_grid(trace, variants, toward="good", start=start, l1=1.5, **QUICK)
    by_setting = {(d.mask.info.settings["surrogate_kind"], d.mask.info.settings["l1"]): d for d in together}
    assert set(by_setting) == {("lstm", 0.3), ("lstm", 3.0), ("lstm", 1.5), ("linear", 1.0)}
    for (kind, l1), one in by_setting.items():
        alone = detect(trace, toward="good", surrogate_kind=kind, l1=l1, start=start, **QUICK)
        np.testing.assert_allclose(one.mask.strength_LE, alone.mask.strength_LE, atol=0.02)
        assert one.mask.info.settings == alone.mask.info.settings
        assert one.facts["moved_to_wanted_class"] == pytest.approx(alone.facts["moved_to_wanted_class"], abs=0.03)


def bytes_of(found, *, sequences, copies):
    """A bound that so many sequences fit into, each so many times."""
    _, tokens, layers, experts = found.data.logits_NTLE.shape
    return 4 * tokens * layers * experts * sequences * copies


@pytest.mark.parametrize("sequences", [1, 2.5, 7])
def test_memory_decides_how_many_passes_a_step_takes_and_not_the_mask(trace, monkeypatch, sequences):
    """So many sequences with three lambdas in a pass, or 2, 7 and 21 with one; 24 and 32 are asked for.

    Sums round in another order, and Adam takes a rounded sign for a step: 0.02 of strengths of 1 to 2, as above.
    """
    lambdas = (0.3, 1.0, 3.0)
    free = [detect(trace, toward="good", l1=l1, **QUICK) for l1 in lambdas]
    found = read(trace, toward="good", keep=("keep",), span="final_turn")
    copies = len(lambdas) * masc.PER_STEP
    monkeypatch.setattr(surrogate, "PASS_BYTES", int(bytes_of(found, sequences=sequences, copies=copies)))
    together = detect_grid(trace, [{"l1": l1} for l1 in lambdas], toward="good", **QUICK)
    alone = [detect(trace, toward="good", l1=l1, **QUICK) for l1 in lambdas]
    for one, two, three in zip(together, alone, free, strict=True):
        np.testing.assert_allclose(one.mask.strength_LE, two.mask.strength_LE, atol=0.02)
        np.testing.assert_allclose(one.mask.strength_LE, three.mask.strength_LE, atol=0.02)
        assert one.mask.info.settings == two.mask.info.settings == three.mask.info.settings
        assert one.facts["moved_to_wanted_class"] == pytest.approx(three.facts["moved_to_wanted_class"], abs=0.03)


@pytest.mark.parametrize("kind", surrogate.KINDS)
def test_the_gradient_of_the_passes_is_that_of_the_whole_part(trace, monkeypatch, kind):
    """Passes of 1, 3 (with a rest of 2) and 11 sequences, weighed by their size; tolerance: sums of float32."""
    found = read(trace, toward="good", keep=("keep",), span="final_turn")
    stack, sigma = own_stack(found, kind=kind, surrogates=2), torch.from_numpy(trace.sigma_L)
    part = torch.randperm(72, generator=torch.Generator().manual_seed(0))[:11]
    begun = torch.randn((2, 3, 12), generator=torch.Generator().manual_seed(1))
    gradients, passes = [], []
    for sequences in (11, 3, 1):
        monkeypatch.setattr(surrogate, "PASS_BYTES", bytes_of(found, sequences=sequences, copies=2 * masc.PER_STEP))
        passes.append([len(some) for some in found.data.passes(part, copies=2 * masc.PER_STEP)])
        matrix = begun.clone().requires_grad_(True)
        masc._add_gradient(stack, found.data, part, sigma, matrix, weight=0.3)
        gradients.append(matrix.grad)
    assert passes == [[11], [3, 3, 3, 2], [1] * 11]
    assert gradients[0].abs().max() > 1e-3
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("surrogates", [1, 4])
def test_no_pass_holds_more_than_the_bound(trace, monkeypatch, surrogates):
    """Logits times surrogates, in the optimisation and in what is measured after it; the fit is not among them."""
    held = []

    def watched(stack, logits, lengths):
        count = len(stack.seeds) if stack._chosen is None else len(stack._chosen)
        if not stack.head.requires_grad:
            held.append(4 * logits.numel() * count)
        return real(stack, logits, lengths)

    real = surrogate.Stack.forward
    monkeypatch.setattr(surrogate.Stack, "forward", watched)
    found = read(trace, toward="good", keep=("keep",), span="final_turn")
    bound = bytes_of(found, sequences=3, copies=4)
    given = {"toward": "good", "steps": 2, "surrogates": surrogates}
    detect_grid(trace, [{"l1": 0.3}, {"l1": 1.0}], **given)
    assert max(held) > bound
    held.clear()
    monkeypatch.setattr(surrogate, "PASS_BYTES", bound)
    detect_grid(trace, [{"l1": 0.3}, {"l1": 1.0}], **given)
    assert 0 < max(held) <= bound


def test_a_grid_leaves_out_the_lambdas_that_leave_nothing(trace):
    variants = [{"l1": 1e4}, {"l1": 1.0}, {"l1": 1e4, "surrogate_kind": "linear"}]
    found = detect_grid(trace, variants, toward="good", **QUICK)
    assert [one.mask.info.settings["l1"] for one in found] == [1.0]
    with pytest.raises(NoEffectError, match="masc found no expert"):
        detect_grid(trace, [variants[0], variants[2]], toward="good", **QUICK)


def test_a_zero_start_holds_what_was_asked_for_and_a_random_one_its_noise(trace):
    zero, random = (detect(trace, toward="good", l1=0.0, start=start, steps=20, surrogates=4) for start in masc.STARTS)
    begun = torch.randn((3, 12), generator=torch.Generator().manual_seed(0)).numpy()

    def likeness(found):
        return float(np.corrcoef(found.mask.strength_LE.ravel(), begun.ravel())[0, 1])

    assert likeness(random) > 0.6 > 0.4 > abs(likeness(zero))


def test_the_seed_decides_and_the_same_seed_gives_the_same_bytes(trace):
    one, two = (detect(trace, toward="good", seed=1, **QUICK).mask for _ in range(2))
    assert one.to_bytes() == two.to_bytes()
    other = detect(trace, toward="good", seed=2, **QUICK).mask
    assert not np.array_equal(one.strength_LE, other.strength_LE)


def test_only_the_layers_named_are_steered(trace):
    for start in masc.STARTS:
        found = detect(trace, toward="good", layers=[2], start=start, **QUICK)
        assert not found.mask.strength_LE[:2].any() and found.mask.strength_LE[2].any()
    with pytest.raises(InputError, match="no layers 7"):
        detect(trace, toward="good", layers=[0, 7])
    with pytest.raises(InputError, match="no layer is left"):
        detect(trace, toward="good", layers=[])


def test_so_many_conversations_of_each_class_are_drawn_by_seed(trace):
    every = read(trace, toward="good", keep=("keep",), span="final_turn")
    some = every.sample(5, seed=1)
    assert [len(some.rows(label)) for label in (UNWANTED, WANTED, KEEP)] == [5, 5, 5]
    for i, length in enumerate(some.data.lengths_N.tolist()):
        same = [j for j in range(72) if torch.equal(every.data.logits_NTLE[j], some.data.logits_NTLE[i])]
        assert [(every.groups[j], int(every.data.labels_N[j]), len(every.token_ids[j])) for j in same] == [
            (some.groups[i], int(some.data.labels_N[i]), length)
        ]
    assert every.sample(5, seed=1).groups == some.groups != every.sample(5, seed=2).groups
    assert every.sample(99, seed=1).groups == every.groups


# ---------------------------------------------------------------- the split and the plain classifiers


def test_a_group_is_never_on_both_sides():
    groups = [f"g{i % 10}" for i in range(57)]
    seen = set()
    for seed in range(12):
        train, held = split_by_group(groups, seed=seed)
        assert sorted(train + held) == list(range(57))
        assert not {groups[i] for i in train} & {groups[i] for i in held}
        assert len({groups[i] for i in held}) == 2
        assert split_by_group(groups, seed=seed) == (train, held)
        seen.add(tuple(held))
    assert len(seen) > 5
    assert split_by_group(["only"] * 4, seed=0) == ([0, 1, 2, 3], [])


def test_surrogates_are_fitted_without_the_held_out_groups(trace, monkeypatch):
    used = {}

    def watched(kind, data, *, train, **options):
        used["train"] = list(train)
        return real(kind, data, train=train, **options)

    real = surrogate.fit
    monkeypatch.setattr(surrogate, "fit", watched)
    found = read(trace, toward="good", keep=("keep",), span="final_turn")
    facts = detect(trace, toward="good", seed=3, **QUICK).facts
    train, held = split_by_group(found.groups, seed=3)
    assert used["train"] == train and facts["surrogate_held_out"] == len(held) * 2 // 3 > 0


def test_a_length_that_tells_the_sides_apart_is_warned_of(tmp_path):
    made = planted(tmp_path / "t", ("bad", "good"), spans=("final_turn",), lengths={"bad": (6, 9), "good": (2, 4)})
    facts = detect(made, toward="good", **QUICK).facts
    assert facts["length_only_accuracy"] == 1.0 and "the number of tokens 100 %" in facts["warning"]


def test_a_planted_difference_in_the_held_out_groups_alone_is_no_accuracy(tmp_path):
    """Noise everywhere: the surrogate knows its training part by heart, and the held-out part says so."""
    made = planted(tmp_path / "t", ("bad", "good"), spans=("final_turn",), leans={}, each=40)
    facts = detect(made, toward="good", steps=10, surrogates=3).facts
    assert facts["surrogate_train_accuracy"] > 0.9 and facts["surrogate_held_out_accuracy"] < 0.75


# ---------------------------------------------------------------- provenance and errors


def test_all_settings_are_in_the_mask(trace):
    given = {
        "l1": 0.5, "keep": ["keep"], "span": "final_user", "surrogate_kind": "gru", "surrogates": 2, "start": "random",
        "keep_weight": 1.5, "steps": 20, "batch": 30, "learning_rate": 0.04, "seed": 6,
        "conversations": 20, "layers": [0, 1],
    }  # fmt: skip
    info = detect(trace, toward="good", **given).mask.info
    assert info.settings == given
    assert (info.method, info.intent.toward, info.data_sha256) == ("masc", "good", trace.manifest.plan_sha256)
    assert set(given) == {*masc.METHOD.settings, "seed"}


@pytest.mark.parametrize("toward, labels", [("good", ("good", "keep")), ("good", ("bad", "keep")), ("x", THREE)])
def test_a_missing_side_is_an_error(tmp_path, toward, labels):
    made = planted(tmp_path / "t", labels, each=2, spans=("final_turn",))
    with pytest.raises(TraceLabelError, match="one side of the contrast is empty") as caught:
        detect(made, toward=toward, **QUICK)
    assert repr(toward) in caught.value.expected


def test_a_side_without_a_token_is_an_error(tmp_path):
    made = planted(tmp_path / "t", THREE, each=4, spans=("final_turn",), lengths={"bad": (0, 1)})
    with pytest.raises(TraceLabelError, match="no token in the span 'final_turn'") as caught:
        detect(made, toward="good", **QUICK)
    assert "4 sequences labelled 'good', 0 others" in caught.value.where


def test_other_spans_and_selections_alone_are_errors(trace, tmp_path):
    with pytest.raises(TraceLabelError, match="lacks the span 'response'"):
        detect(trace, toward="good", span="response", **QUICK)
    from tests.unit.traces_by_hand import Spoken, drawn, write

    rng = np.random.default_rng(0)
    spoken = [Spoken(f"c{i}", f"g{i}", ("a", "b")[i % 2], {"final_turn": drawn(rng, 3)}) for i in range(4)]
    with pytest.raises(TraceLabelError, match="needs logits"):
        detect(write(tmp_path / "t", spoken, experts=6), toward="a", **QUICK)


@pytest.mark.parametrize(
    "name, value",
    [
        ("l1", -1.0), ("l1", float("nan")), ("l1", "much"), ("surrogates", 0), ("surrogates", 1.5), ("steps", 0),
        ("batch", 0), ("learning_rate", 0.0), ("keep_weight", -0.1), ("start", "ones"),
        ("conversations", 0), ("conversations", 2.5),
    ],
)  # fmt: skip
def test_a_setting_out_of_its_range_is_an_error(trace, name, value):
    for call in (
        lambda: detect(trace, toward="good", **{name: value}),
        lambda: detect_grid(trace, [{name: value}], toward="good"),
    ):
        with pytest.raises(InputError, match=f"the setting {name} is out of its range") as caught:
            call()
        assert f"masc with {name}={value!r}" in caught.value.where


def test_an_unknown_surrogate_is_an_error(trace):
    with pytest.raises(UnknownNameError, match="no surrogate 'mlp'"):
        detect(trace, toward="good", surrogate_kind="mlp")


def test_leans_are_what_the_traces_hold(trace):
    """The planting itself."""
    found = read(trace, toward="good", keep=("keep",), span="final_turn")
    for name, label in (("bad", UNWANTED), ("good", WANTED), ("keep", KEEP)):
        means = torch.cat([found.data.logits_NTLE[i, : found.data.lengths_N[i]] for i in found.rows(label)]).mean(0)
        for place, lean in LEANS[name].items():
            assert float(means[place]) == pytest.approx(lean, abs=0.2)


def test_moved_counts_what_is_put_into_the_wanted_class_and_no_other() -> None:
    class Stub:
        """Three unwanted sequences, two surrogates: wanted, keep, unwanted; and wanted, wanted, keep."""

        seeds = (0, 1)

        def __call__(self, logits, lengths):  # type: ignore[no-untyped-def]
            return torch.zeros(2, len(lengths), 3)

        def classes(self, verdicts):  # type: ignore[no-untyped-def]
            return torch.tensor([[masc.WANTED, masc.KEEP, masc.UNWANTED], [masc.WANTED, masc.WANTED, masc.KEEP]])

    labels = [masc.UNWANTED, masc.KEEP, masc.UNWANTED, masc.WANTED, masc.UNWANTED]
    data = surrogate.Sequences.of([np.zeros((2, 1, 4), dtype=np.float32)] * 5, labels)
    found = masc.Labelled(data, ["g"] * 5, [np.zeros(2, dtype=np.int32)] * 5)
    assert masc._moved(Stub(), found, torch.ones(1), torch.zeros(1, 4)) == pytest.approx(3 / 6)  # type: ignore[arg-type]
