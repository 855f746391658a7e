"""evaluate/pooled.py: several seeds of the same items, against one seed, formulas, exact tests and simulation."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from moesteer.errors import DataError
from moesteer.evaluate import run as evaluation
from moesteer.evaluate import stats
from moesteer.evaluate.pooled import difference_over_seeds, metric_roles, pool, rate_over_seeds
from tests.unit.seeds_made_by_hand import MODEL, SCENARIO, results_of, runs

TARGET = "defense_success_rate"


@pytest.fixture(scope="module")
def three():
    return pool(SCENARIO, *runs())


def as_values(y_SGI):
    """[S, G, items] to what the two functions over seeds take."""
    return {
        s: [(f"g{g}", f"{g}/{i}", float(value)) for g, row in enumerate(of_seed) for i, value in enumerate(row)]
        for s, of_seed in enumerate(y_SGI)
    }


# ---------------------------------------------------------------- what is pooled


def test_rates_by_seed_and_pooled_equal_a_count_by_hand(three):
    _, rows = runs()
    for name, entry in three["methods"].items():
        target = entry["metrics"][TARGET]
        counted = {s: [r["verdict"] == "refused" for r in rows[s][name] if r["suite"] == "attacks"] for s in rows}
        assert {s: found["value"] for s, found in target["by_seed"].items()} == {
            str(s): sum(found) / 60 for s, found in counted.items()
        }
        assert target["value"] == pytest.approx(sum(map(sum, counted.values())) / 180)
        assert (target["n"], target["items"], target["groups"], target["unscored"]) == (180, 60, 20, 0)
        assert target["min"] == min(map(sum, counted.values())) / 60
        assert target["max"] == max(map(sum, counted.values())) / 60
        assert target["low"] < target["value"] < target["high"]
        # two suites of one metric are one rate
        assert entry["metrics"]["benign_accuracy"]["items"] == 36


def test_by_seed_entries_are_those_of_each_results_json(three):
    results, _ = runs()
    for found in results:
        for name, entry in found["methods"].items():
            mine, key = three["methods"][name], str(found["seed"])
            assert {m: mine["metrics"][m]["by_seed"][key] for m in entry["metrics"]} == entry["metrics"]
            assert {m: mine["vs_none"][m]["by_seed"][key] for m in entry["vs_none"]} == entry["vs_none"]
            assert mine["experts"][key] == entry["experts"] and mine["seconds"][key] == entry["seconds"]


def test_pooled_differences_and_their_p_equal_sums_by_group(three):
    _, rows = runs()
    for name in ("random", "masc-published", "direct"):
        totals, n = {}, 0
        for s in rows:
            before, after = (evaluation.outcomes(SCENARIO, rows[s][m])[TARGET] for m in ("none", name))
            for row in rows[s]["none"]:
                if row["id"] in before:
                    totals[row["group"]] = totals.get(row["group"], 0) + after[row["id"]] - before[row["id"]]
                    n += 1
        found = three["methods"][name]["vs_none"][TARGET]
        assert found["difference"] == pytest.approx(sum(totals.values()) / n) and found["n"] == n
        assert found["p"] == stats.sign_flip(list(totals.values()))
        assert found["low"] < found["difference"] < found["high"]


def test_unscored_and_incoherent_replies_are_counted_apart():
    results, rows = runs(seeds=(0, 1), methods=("none", "direct"))
    for row in rows[1]["direct"][18:28]:  # ten attacks
        row["verdict"] = "unscored"
    for row in rows[0]["direct"][-3:]:
        row["verdict"] = "broken"
    rows[0]["none"][18]["verdict"] = "unscored"
    found = pool(SCENARIO, [results_of(rows[s], s) for s in rows], rows)["methods"]["direct"]
    assert found["unscored"] == {"count": 10, "n": 228, "by_seed": {"0": 0, "1": 10}}
    assert found["incoherent"] == {"count": 3, "n": 228, "by_seed": {"0": 3, "1": 0}}
    assert found["metrics"][TARGET]["unscored"] == 10 and found["metrics"][TARGET]["n"] == 110
    assert found["vs_none"][TARGET]["n"] == 109  # pairs scored on both sides
    assert found["metrics"]["benign_accuracy"]["value"] == pytest.approx(69 / 72)
    assert results[0]["methods"].keys() == {"none", "direct"}


def test_nothing_scored_gives_no_number():
    _, rows = runs(seeds=(0, 1), methods=("none", "direct"))
    for of_seed in rows.values():
        for row in of_seed["direct"]:
            row["verdict"] = "unscored"
    found = pool(SCENARIO, [results_of(rows[s], s) for s in rows], rows)["methods"]["direct"]
    assert found["metrics"][TARGET]["value"] is found["metrics"][TARGET]["low"] is None
    assert found["vs_none"][TARGET]["difference"] is found["vs_none"][TARGET]["p_holm"] is None


def test_a_method_that_one_seed_lacks_is_pooled_over_the_others():
    results, rows = runs()
    del results[1]["methods"]["direct+gate"], rows[1]["direct+gate"]
    found = pool(SCENARIO, results, rows)["methods"]
    assert found["direct+gate"]["seeds"] == [0, 2] and found["direct"]["seeds"] == [0, 1, 2]
    assert set(found["direct+gate"]["metrics"][TARGET]["by_seed"]) == {"0", "2"}


def test_the_null_counts_replies_that_differ(three):
    assert three["null"] == {"differ": 0, "n": 342, "by_seed": {"0": 0, "1": 0, "2": 0}}
    results, rows = runs(seeds=(0, 1))
    rows[1]["none-again"][5]["response"] = "another"
    assert pool(SCENARIO, results, rows)["null"] == {"differ": 1, "n": 228, "by_seed": {"0": 0, "1": 1}}
    results, rows = runs(seeds=(0,), methods=("none", "direct"))
    assert pool(SCENARIO, results, rows)["null"] is None


def test_candidates_tried_and_what_a_control_is_like_are_kept_by_seed():
    results, rows = runs()
    results[1]["methods"]["random"]["setting"] = "like masc-published"
    del results[2]["trade_off"]  # as runs of before had none
    found = pool(SCENARIO, results, rows)["methods"]
    assert found["random"]["like"] == {"0": "direct", "1": "masc-published", "2": "direct"}
    assert found["direct"]["like"] == {} and found["direct"]["tried"] == {"0": 3, "1": 3, "2": 0}
    assert found["direct+gate"]["tried"]["0"] == 2 and found["none"]["tried"]["0"] == 0


def test_it_is_plain_json_and_knows_no_order_of_runs(three):
    results, rows = runs()
    assert json.loads(json.dumps(three)) == three
    again = pool(SCENARIO, results[::-1], dict(reversed(rows.items())))
    assert json.dumps(again) == json.dumps(three)


def test_metrics_have_the_role_of_their_suite():
    assert list(metric_roles(SCENARIO).items()) == [
        (TARGET, "target"), ("direct_refusal_rate", "protect"), ("benign_accuracy", "protect"),
        ("over_refusal_rate", "protect"), ("accuracy", "watch"), ("coherence", "coherence"),
    ]  # fmt: skip


# ---------------------------------------------------------------- families of tests


def test_a_family_is_a_metric_with_every_method_and_control_but_the_null(three):
    compared = {name: entry["vs_none"] for name, entry in three["methods"].items() if name != "none"}
    for metric in three["methods"]["none"]["metrics"]:
        family = {name: found[metric]["p"] for name, found in compared.items() if name != "none-again"}
        assert set(family) == {"random", "masc-published", "direct", "direct+gate"}
        assert {name: compared[name][metric]["p_holm"] for name in family} == stats.holm(family)
        assert compared["none-again"][metric]["p_holm"] is None
    assert compared["direct"][TARGET]["p_holm"] > compared["direct"][TARGET]["p"] > 0


# ---------------------------------------------------------------- what does not belong together


def wrong(change):
    results, rows = runs(seeds=(0, 1), methods=("none", "direct"))
    results, rows = copy.deepcopy(results), copy.deepcopy(rows)
    return change(results, rows) or (results, rows)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda results, rows: ([], {}), "no results"),
        (lambda results, rows: results[1].update(seed=0), "same seed"),
        (lambda results, rows: results[1].update(scenario={"name": "other"}), "other scenarios"),
        (lambda results, rows: results[1].update(model={**MODEL, "router_sha256": "cd"}), "different models"),
        (lambda results, rows: rows[1].pop("direct") and None, "seed 1 has no responses of direct"),
        (lambda results, rows: rows.pop(0) and None, "seed 0 has no responses of none"),
        (lambda results, rows: rows[1]["direct"].pop() and None, "direct answered other conversations"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(change, said):
    with pytest.raises(DataError, match=said) as caught:
        pool(SCENARIO, *wrong(change))
    assert "each with its own seed" in caught.value.expected


# ---------------------------------------------------------------- the same items under several seeds


def test_the_same_replies_under_more_seeds_are_no_more_evidence():
    _, rows = runs(seeds=(0,))
    one = pool(SCENARIO, [results_of(rows[0], 0)], rows)
    many = {s: rows[0] for s in range(5)}
    five = pool(SCENARIO, [results_of(rows[0], s) for s in many], many)
    for name in ("none", "random", "direct"):
        first, fifth = (found["methods"][name] for found in (one, five))
        a, b = first["metrics"][TARGET], fifth["metrics"][TARGET]
        assert b["n"] == 5 * a["n"] and b["items"] == a["items"]
        assert b["value"] == pytest.approx(a["value"])
        assert b["high"] - b["low"] == pytest.approx(a["high"] - a["low"], rel=0.1)  # of the bootstrap's draws
        if name != "none":
            assert fifth["vs_none"][TARGET]["p"] == first["vs_none"][TARGET]["p"]
            wide = [found["vs_none"][TARGET]["high"] - found["vs_none"][TARGET]["low"] for found in (first, fifth)]
            assert wide[1] == pytest.approx(wide[0], rel=0.1)


def test_the_bootstrap_of_one_seed_has_the_variance_of_a_mean_of_groups():
    rng = np.random.default_rng(0)
    y_SGI = rng.integers(-1, 2, (1, 30, 4)) + np.zeros((1, 30, 4))
    found = difference_over_seeds(as_values(y_SGI), seed=0, draws=20_000)
    half = 1.96 * y_SGI[0].mean(axis=1).std(ddof=1) / np.sqrt(30)
    assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.04)  # normal quantiles, 20,000 draws


def test_the_bootstrap_of_seeds_that_differ_has_the_variance_of_a_mean_of_seeds():
    # items of a seed all alike: all that varies is the seed
    y_SGI = np.zeros((8, 30, 2)) + np.array([1, 0, 1, 1, 0, 0, 1, 0])[:, None, None]
    found = rate_over_seeds(as_values(y_SGI), seed=0, draws=20_000)
    assert found["effective_n"] == pytest.approx(0.25 / (y_SGI[:, 0, 0].var(ddof=1) / 8), rel=0.05)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_rate_of_all_or_nothing_has_an_interval_of_as_many_items_as_groups(value):
    found = rate_over_seeds(as_values(np.full((3, 40, 6), value)), seed=0, draws=100)
    assert found["effective_n"] == pytest.approx(40)
    assert (found["low"], found["high"]) == pytest.approx(stats.wilson(value, 40))


def latent(rng, seeds, groups, items, by_group, by_seed, *, level):
    """Replies [S, G, I]: a threshold of its own for each item under all seeds, shifted by its group and by the seed."""
    shift = by_group * rng.standard_normal((1, groups, 1)) + by_seed * rng.standard_normal((seeds, 1, 1))
    noise = rng.logistic(size=(1, groups, items))
    return (level + shift + noise > 0).astype(float)


@pytest.mark.parametrize("by_group, by_seed", [(0.0, 0.0), (1.0, 0.0), (1.0, 0.3)])
def test_intervals_hold_the_truth_where_items_repeat_over_seeds_and_groups_are_alike(by_group, by_seed):
    rng = np.random.default_rng(5)
    level, simulations = 1.5, 250
    truth = latent(rng, 1, 400_000, 1, np.hypot(by_group, by_seed), 0, level=level).mean()
    hits = {"rate": 0, "difference": 0, "stacked": 0}
    for seed in range(simulations):
        after = latent(rng, 3, 40, 4, by_group, by_seed, level=level)
        before = rng.random((1, 40, 4)) < 0.5
        rate = rate_over_seeds(as_values(after), seed=seed, draws=300)
        change = difference_over_seeds(as_values(after - before), seed=seed, draws=300)
        low, high = stats.wilson(after.mean(), after.size)
        hits["rate"] += rate["low"] <= truth <= rate["high"]
        hits["difference"] += change["low"] <= truth - 0.5 <= change["high"]
        hits["stacked"] += low <= truth <= high
    # 250 simulations have a standard error of 1.4 points
    assert hits["rate"] / simulations > 0.91 and hits["difference"] / simulations > 0.9
    assert hits["stacked"] / simulations < 0.8  # what goes wrong when replies count as items of their own


def test_the_pooled_test_keeps_its_level_where_mcnemar_on_the_stack_does_not():
    rng = np.random.default_rng(9)
    wrong_by = {"groups": 0, "stack": 0}
    for _ in range(400):
        sign = rng.choice((-1, 1), (1, 25, 1))  # no effect, but a behaviour's items change alike
        change = (rng.random((1, 25, 4)) < 0.5) * sign + np.zeros((3, 1, 1))
        found = difference_over_seeds(as_values(change), seed=0, draws=10)
        wrong_by["groups"] += found["p"] <= 0.05
        stacked = [int(value) for value in change.ravel()]
        wrong_by["stack"] += stats.sign_flip(stacked) <= 0.05  # of single items: McNemar
    assert wrong_by["groups"] / 400 < 0.08 < 0.3 < wrong_by["stack"] / 400
