"""importing.py and expert_table.py: masks from tables, and every way a table can be wrong."""

from __future__ import annotations

import contextlib
import json
import math
import random
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from moesteer import files
from moesteer.cli.main import app
from moesteer.errors import DataError, FileError, InputError, LimitError, MoesteerError, UnknownNameError
from moesteer.importing import import_mask, made_for, read_scores
from moesteer.mask import SteeringMask
from tests.unit.test_mask import additive, fingerprint, forced

MODEL = fingerprint()  # layers 1, 3, 4; 8 experts, top 2
COUNTED = [  # layer, expert, A1, N1, A2, N2; D = 0.4, 0.2, -0.5, 0
    (1, 3, 60, 100, 40, 200), (1, 7, 50, 100, 60, 200), (3, 1, 10, 100, 120, 200), (4, 0, 30, 100, 60, 200),
]  # fmt: skip
NAMES = ("layer", "expert", "wanted_count", "wanted_tokens", "other_count", "other_tokens")
SCORED = [(1, 0, 3.0), (1, 1, 2.5), (1, 2, 2.0), (3, 5, 1.0), (3, 6, -4.0), (4, 7, -0.5)]
SIGMA = np.array([0.5, 2.0, 1.0], np.float32)


def rows(records, names=NAMES):
    return [dict(zip(names, record, strict=True)) for record in records]


def write(path, table):
    """A list of objects, as whatever the path's ending says."""
    if path.suffix == ".csv":
        lines = [",".join(table[0])] + [",".join("" if v is None else str(v) for v in row.values()) for row in table]
        path.write_text("\n".join(lines) + "\n", "utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(table), "utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(table), path)
    return path


def take(path, **changes):
    return import_mask(path, **{"fingerprint": MODEL, "toward": "refuse", "on": 2, "off": 1, **changes})


def entries(table):
    return {(int(r), int(e)): float(table[r, e]) for r, e in np.argwhere(table)}


FORMATS = ["csv", "json", "parquet"]


@pytest.fixture(params=FORMATS)
def path(request, tmp_path):
    return tmp_path / f"table.{request.param}"


# ---------------------------------------------------------------- tables that are sound


def test_counts_give_the_risk_difference_and_the_mask(path):
    write(path, rows(COUNTED))
    found = read_scores(path, fingerprint=MODEL)
    assert {k: pytest.approx(v, rel=1e-12) for k, v in entries(found.score_LE).items()} == {
        (0, 3): 0.4, (0, 7): 0.2, (1, 1): -0.5
    }  # fmt: skip
    mask = take(path)
    assert mask.forced and entries(mask.force_LE) == {(0, 3): 1.0, (0, 7): 1.0, (1, 1): -1.0}
    assert mask.info.method == "import" and mask.info.intent.toward == "refuse" and mask.info.fingerprint == MODEL
    assert mask.info.settings == {
        "table": path.name, "table_sha256": files.sha256(path.read_bytes()), "rows": 4,
        "columns": {name: name for name in NAMES}, "by": "risk-difference", "layer_numbers": "ids",
        "form": "forced", "on": 2, "off": 1, "reverse": False,
    }  # fmt: skip
    mask.save(path.with_name("m"))
    assert SteeringMask.load(path.with_name("m")).sha256 == mask.sha256


def test_log_odds_of_the_counts_have_half_a_token_added(path):
    found = read_scores(write(path, rows(COUNTED)), fingerprint=MODEL, by="log-odds")
    a1, n1, a2, n2 = COUNTED[2][2:]
    expected = math.log((a1 + 0.5) / (n1 - a1 + 0.5)) - math.log((a2 + 0.5) / (n2 - a2 + 0.5))
    assert found.score_LE[1, 1] == pytest.approx(expected, rel=1e-12)


def test_a_score_ranks_experts_and_a_full_layer_passes_its_turn_on(path):
    write(path, rows(SCORED, ("layer", "expert", "score")))
    mask = take(path, on=3, off=2)  # at most 2 on in a layer: expert 2 of layer 1 stays free
    assert entries(mask.force_LE) == {(0, 0): 1, (0, 1): 1, (1, 5): 1, (1, 6): -1, (2, 7): -1}
    back = take(path, on=2, off=2, reverse=True)
    assert entries(back.force_LE) == {(1, 6): 1, (2, 7): 1, (0, 0): -1, (0, 1): -1}
    assert back.info.settings["reverse"] is True


def test_an_additive_mask_has_strengths_relative_to_the_largest_score(path):
    write(path, rows(SCORED, ("layer", "expert", "score")))
    mask = take(path, on=3, off=1, form="additive", sigma_L=SIGMA)
    assert entries(mask.strength_LE) == {(0, 0): 0.75, (0, 1): 0.625, (0, 2): 0.5, (1, 6): -1.0}
    assert mask.sigma_L.tolist() == SIGMA.tolist() and mask.info.alpha == 1.0
    turned = take(path, on=1, off=1, form="additive", sigma_L=SIGMA, reverse=True)
    assert entries(turned.strength_LE) == {(1, 6): 1.0, (0, 0): -0.75}


def test_a_score_wins_over_a_risk_difference_and_by_says_which_is_read(path):
    write(path, rows([(1, 0, 1.0, -1.0, 2.0)], ("layer", "expert", "score", "risk_diff", "log_odds")))
    assert read_scores(path, fingerprint=MODEL).score_LE[0, 0] == 1.0
    unread = {"columns": {"score": ""}}
    assert read_scores(path, fingerprint=MODEL, **unread).score_LE[0, 0] == -1.0
    assert read_scores(path, fingerprint=MODEL, by="log-odds", **unread).score_LE[0, 0] == 2.0


@pytest.mark.parametrize("names", [
    ("Layer", "Expert", "A1", "N1", "A2", "N2"),
    ("Layer Index", "EXPERT-ID", "Wanted Count", "wanted-tokens", "other_count", "Other_Tokens"),
])  # fmt: skip
def test_columns_are_known_by_several_names(path, names):
    write(path, rows(COUNTED, names))
    assert take(path).info.settings["columns"] == dict(zip(NAMES, names, strict=True))


def test_columns_can_be_named_and_others_are_not_looked_at(path):
    names = ("L", "which", "hits+", "n+", "hits-", "n-")
    write(path, [{**row, "note": "x", "score": "no number", "": None} for row in rows(COUNTED, names)])
    mapping = {**dict(zip(NAMES, names, strict=True)), "score": ""}
    assert entries(take(path, columns=mapping).force_LE) == entries(take(write(path, rows(COUNTED))).force_LE)


def test_layers_may_be_counted_from_0(path):
    write(path, [{**row, "layer": {1: 0, 3: 1, 4: 2}[row["layer"]]} for row in rows(COUNTED)])
    assert entries(take(path, layer_numbers="rows").force_LE) == {(0, 3): 1, (0, 7): 1, (1, 1): -1}
    with pytest.raises(DataError, match="no router in layer 0") as caught:
        take(path)
    assert "--layer-numbers rows" in caught.value.do


STATED = {
    "risk_diff": lambda a1, n1, a2, n2: a1 / n1 - a2 / n2,
    "log_odds": lambda a1, n1, a2, n2: math.log(a1 / (n1 - a1)) - math.log(a2 / (n2 - a2)),
    "log_odds_ratio": lambda *n: math.log((n[0] + 0.5) / (n[1] - n[0] + 0.5) / ((n[2] + 0.5) / (n[3] - n[2] + 0.5))),
    "score": lambda a1, n1, a2, n2: np.float32(a1 / n1 - a2 / n2).item(),  # kept in float32
}


@pytest.mark.parametrize("name", STATED)
def test_statistics_of_the_table_that_follow_from_its_counts_pass_and_others_do_not(path, name):
    table = [{**row, name: STATED[name](*list(row.values())[2:])} for row in rows(COUNTED)]
    take(write(path, table))
    true = table[2][name]
    table[2][name] = true + 2e-5
    with pytest.raises(DataError) as caught:
        take(write(path, table))
    place = "line 4" if path.suffix == ".csv" else "row 3"
    assert f"the table says {true + 2e-5:.9g}, its counts give " in caught.value.what
    assert place in caught.value.where and repr(name) in caught.value.where and str(path) in caught.value.where
    assert float(caught.value.what.split()[-1]) == pytest.approx(true, abs=1e-7)
    take(path, columns={"log_odds" if "log" in name else "risk_difference" if "risk" in name else name: ""})


def test_a_table_that_counts_from_the_other_side_is_told_so(path):
    write(path, [{**row, "risk_diff": -STATED["risk_diff"](*list(row.values())[2:])} for row in rows(COUNTED)])
    with pytest.raises(DataError) as caught:
        take(path)
    assert "swap the columns of the wanted and the other side" in caught.value.do


@pytest.mark.parametrize("ending", ["csv", "parquet"])  # JSON has no infinity
def test_log_odds_may_be_infinite_or_empty_where_they_are_not_defined(tmp_path, ending):
    path = tmp_path / f"t.{ending}"
    table = rows([(1, 0, 0, 10, 5, 10, -math.inf), (1, 1, 5, 10, 0, 10, math.inf), (1, 2, 0, 10, 0, 10, math.nan)],
                 (*NAMES, "log_odds"))  # fmt: skip
    found = read_scores(write(path, table), fingerprint=MODEL)
    assert entries(found.score_LE) == {(0, 0): -0.5, (0, 1): 0.5}
    table[2]["log_odds"] = None
    read_scores(write(path, table), fingerprint=MODEL)
    table[1]["log_odds"] = -math.inf
    with pytest.raises(DataError, match="says -inf, its counts give"):
        read_scores(write(path, table), fingerprint=MODEL)


def test_json_may_be_columns_of_lists_and_csv_may_have_a_mark_blank_lines_quotes_and_an_index(tmp_path):
    expected = entries(take(write(tmp_path / "a.csv", rows(COUNTED))).force_LE)
    columns = {name: [row[name] for row in rows(COUNTED)] for name in NAMES}
    (tmp_path / "b.json").write_text(json.dumps(columns))
    lines = (tmp_path / "a.csv").read_text().splitlines()
    text = "\ufeff\n" + "\r\n\r\n".join(f'{i or ""},"{line.split(",", 1)[0]}" ,{line.split(",", 1)[1]}'
                                        for i, line in enumerate(lines)).replace('" ', '"')  # fmt: skip
    (tmp_path / "c.csv").write_text(text, "utf-8", newline="")
    (tmp_path / "D.CSV").write_text((tmp_path / "a.csv").read_text())
    for name in ("b.json", "c.csv", "D.CSV"):
        assert entries(take(tmp_path / name).force_LE) == expected


def test_whole_numbers_written_as_floats_are_whole_numbers(path):
    write(path, [{name: float(value) for name, value in row.items()} for row in rows(COUNTED)])
    assert take(path).expert_count == 3


tables = st.lists(
    st.tuples(st.sampled_from([1, 3, 4]), st.integers(0, 7), st.floats(-1, 1).filter(bool)),
    min_size=1, max_size=24, unique_by=lambda row: row[:2],
)  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(tables, st.integers(0, 4), st.integers(0, 4))
def test_the_choice_is_what_a_loop_over_its_description_gives(tmp_path_factory, table, on, off):
    path = write(tmp_path_factory.getbasetemp() / "loop.json", rows(table, ("layer", "expert", "score")))
    chosen = {}
    for sign, count, cap in ((1, on, 2), (-1, off, 6)):
        taken = {layer: 0 for layer in (1, 3, 4)}
        for layer, expert, score in sorted(table, key=lambda row: (-sign * row[2], row[:2])):
            if sign * score > 0 and taken[layer] < cap and sum(taken.values()) < count:
                taken[layer] += 1
                chosen[(1, 3, 4).index(layer), expert] = float(sign)
    on_found, off_found = (sum(v == s for v in chosen.values()) for s in (1, -1))
    if on + off == 0:
        return
    if (on_found, off_found) != (on, off):
        with pytest.raises(DataError, match="the table has"):
            take(path, on=on, off=off)
    else:
        assert entries(take(path, on=on, off=off).force_LE) == chosen


# ---------------------------------------------------------------- tables that are not


def changed(row=2, drop=(), **cells):
    table = rows(COUNTED)
    table[row] = {**table[row], **cells}
    return [{name: value for name, value in one.items() if name not in drop} for one in table]


BAD = {
    "unknown-layer": (changed(layer=2), "no router in layer 2"),
    "negative-layer": (changed(layer=-1), "no router in layer -1"),
    "huge-layer": (changed(layer=2**31), "no router in layer 2147483648"),
    "expert-E": (changed(expert=8), "no expert 8"),
    "expert-negative": (changed(expert=-1), "no expert -1"),
    "repeated": (changed(layer=1, expert=3), "layer 1, expert 3 occurs twice"),
    "no-layer": (changed(drop=["layer"]), "it lacks layer"),
    "no-expert": (changed(drop=["expert"]), "it lacks expert"),
    "no-tokens": (changed(drop=["other_tokens", "wanted_tokens"]), "it lacks wanted_tokens, other_tokens"),
    "no-numbers": (changed(drop=NAMES[2:]), "neither counts nor a score"),
    "negative-count": (changed(wanted_count=-1), "a count of -1"),
    "count-above-tokens": (changed(other_count=201), "selected for 201 of 200 tokens"),
    "no-token": (changed(wanted_tokens=0, wanted_count=0), "0 tokens on one side"),
    "negative-tokens": (changed(other_tokens=-5), "-5 tokens on one side"),
    "fraction": (changed(wanted_count=10.5), "10.5 is not a whole number"),
    "fractional-layer": (changed(layer=1.5), "1.5 is not a whole number"),
    "huge-count": (changed(wanted_count=2**53 + 2), "too large a number"),
    "empty-cell": (changed(wanted_count=None), "the cell is empty"),
    "more-than-k": (
        [*changed(), *rows([(4, e, 90, 100, 1, 200) for e in (1, 2)])], "210 selections for 100 tokens"
    ),
}  # fmt: skip


def refused(path, error, what, **settings):
    start = time.monotonic()
    with pytest.raises(MoesteerError) as caught:
        take(path, **settings)
    assert time.monotonic() - start < 2.0
    assert type(caught.value) is error, repr(caught.value)
    assert what in caught.value.what, caught.value.what
    assert caught.value.where and caught.value.expected and caught.value.do
    return caught.value


@pytest.mark.parametrize("table, what", BAD.values(), ids=BAD)
def test_a_table_that_is_not_sound_is_refused(path, table, what):
    assert str(path) in refused(write(path, table), DataError, what).where


def test_a_bad_cell_is_named_by_row_and_column(tmp_path):
    error = refused(write(tmp_path / "t.csv", changed(wanted_count="x")), DataError, "'x' is not a number")
    assert error.where == f"{tmp_path / 't.csv'}, line 4, column 'wanted_count'"
    error = refused(write(tmp_path / "t.json", changed(wanted_count="x")), DataError, "'x' is not a number")
    assert error.where == f"{tmp_path / 't.json'}, row 3, column 'wanted_count'"


@pytest.mark.parametrize("cell", [
    "nan", "NaN", "inf", "-Infinity", "=1+1", "@SUM(A1)", "+", "-", "1_000", "0x10", "1e999", "٣", "1;5", "true",
    "None", "1 2", "'10", "10%", "1e", ".", "\x00", "9" * 400,
])  # fmt: skip
def test_a_cell_that_is_no_number_is_refused(tmp_path, cell):
    if cell == "\x00":
        refused(write(tmp_path / "t.csv", changed(wanted_count=cell)), DataError, "")
    else:
        refused(write(tmp_path / "t.csv", changed(wanted_count=cell)), DataError, "is not a number")


@pytest.mark.parametrize("cell", [True, None, [1], {"a": 1}, 10**400, "1e999", ""])
def test_a_json_value_that_is_no_number_is_refused(tmp_path, cell):
    refused(
        write(tmp_path / "t.json", changed(wanted_count=cell)), DataError, "" if cell not in (None, "") else "empty"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_in_a_score_is_refused(tmp_path, value):
    table = rows([(1, 0, value), (1, 1, 1.0)], ("layer", "expert", "score"))
    for ending in ("csv", "parquet"):
        refused(write(tmp_path / f"t.{ending}", table), DataError, "is not a number")
    refused(write(tmp_path / "t.json", table), DataError, "not valid JSON")


RAW = {
    "empty.csv": (b"", "no rows"),
    "blank.csv": (b"\n \n,,\n", "no rows"),
    "header.csv": (b"layer,expert,score\n", "no rows"),
    "short.csv": (b"layer,expert,score\n1,2\n", "2 cells under a header of 3"),
    "long.csv": (b"layer,expert,score\n1,2,3,4\n", "4 cells under a header of 3"),
    "twice.csv": (b"layer,layer,score\n1,2,3\n", "two columns are called 'layer'"),
    "ambiguous.csv": (b"layer,Layer,expert,score\n1,1,2,3\n", "'layer' and 'Layer' could both be 'layer'"),
    "latin.csv": ("layer,expert,score,n\u00f6te\n".encode("latin-1"), "not UTF-8"),
    "utf16.csv": ("layer,expert,score\n1,2,3\n".encode("utf-16"), "not UTF-8"),
    "quote.csv": (b'layer,expert,score\n1,"2,3\n', "not valid CSV"),
    "wide.csv": (b"layer,expert,score\n1,2," + b"9" * 200_000 + b"\n", "not valid CSV"),
    "semicolon.csv": (b"layer;expert;score\n1;2;3\n", "it lacks layer, expert"),
    "empty.json": (b"", "not valid JSON"),
    "none.json": (b"[]", "no rows"),
    "nothing.json": (b"{}", "no rows"),
    "number.json": (b"3", "the JSON is a int"),
    "list.json": (b"[1, 2]", "the JSON is a list"),
    "object.json": (b'{"layer": 1}', "the JSON is a dict"),
    "uneven.json": (b'{"layer": [1, 2], "expert": [1], "score": [1, 2]}', "differ in length"),
    "repeated-key.json": (b'[{"layer": 1, "layer": 3, "expert": 1, "score": 2}]', "a key occurs twice"),
    "lacking.json": (b'[{"layer": 1, "expert": 1, "score": 2}, {"layer": 1, "expert": 2}]', "differ in score"),
    "nan.json": (b'[{"layer": 1, "expert": 1, "score": NaN}]', "NaN is not JSON"),
    "deep.json": (b"[" * 100_000, "not valid JSON"),
    "empty.parquet": (b"", "not a whole Parquet file"),
    "text.parquet": (b"layer,expert\n", "not a whole Parquet file"),
    "magic.parquet": (b"PAR1" + b"\xff" * 64 + b"PAR1", "not a whole Parquet file"),
    "frame.pkl": (b"\x80\x04.", "the file ending '.pkl' is not known"),
    "table": (b"layer,expert,score\n", "the file ending '' is not known"),
}


@pytest.mark.parametrize("name", RAW)
def test_bytes_that_are_no_table_are_refused(tmp_path, name):
    data, what = RAW[name]
    (tmp_path / name).write_bytes(data)
    assert str(tmp_path / name) in refused(tmp_path / name, DataError, what).where


def test_a_parquet_file_cut_or_changed_anywhere_ends_in_a_named_error_or_a_mask(tmp_path):
    whole = write(tmp_path / "w.parquet", rows(COUNTED)).read_bytes()
    for size in range(0, len(whole), 16):
        (tmp_path / "t.parquet").write_bytes(whole[:size])
        refused(tmp_path / "t.parquet", DataError, "not a whole Parquet file")
    draw = random.Random(0)
    for bit in draw.sample(range(len(whole) * 8), 500):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "t.parquet").write_bytes(damaged)
        with contextlib.suppress(MoesteerError):
            take(tmp_path / "t.parquet")


def test_too_many_rows_and_too_many_bytes_are_refused(tmp_path, monkeypatch):
    many = rows([(1, i, 1.0) for i in range(25)], ("layer", "expert", "score"))
    for ending in FORMATS:
        refused(write(tmp_path / f"t.{ending}", many), DataError, "more than 24 rows")
    (tmp_path / "c.json").write_text(json.dumps({"layer": [1] * 25, "expert": [1] * 25, "score": [1] * 25}))
    refused(tmp_path / "c.json", DataError, "more than 24 rows")
    (tmp_path / "big.csv").write_bytes(b"x" * (files.LIMITS_BYTES["table"] + 1))
    refused(tmp_path / "big.csv", LimitError, "larger than 16,777,216 bytes")
    bomb = pa.table({"layer": [1], "expert": [1], "score": [1.0], "note": ["x" * 100_000]})
    pq.write_table(bomb, tmp_path / "bomb.parquet", compression="zstd", use_dictionary=False)
    monkeypatch.setitem(files.LIMITS_BYTES, "table", 50_000)
    refused(tmp_path / "bomb.parquet", LimitError, "unpacks to")


def test_a_file_that_is_not_there_or_is_a_folder_is_named(tmp_path):
    refused(tmp_path / "none.csv", FileError, "No such file")
    (tmp_path / "d.csv").mkdir()
    refused(tmp_path / "d.csv", FileError, "directory")


def test_a_risk_difference_beyond_1_is_refused(path):
    write(path, rows([(1, 0, 40.0), (1, 1, -0.5)], ("layer", "expert", "risk_diff")))
    refused(path, DataError, "a risk difference of 40")
    assert take(path, on=1, columns={"score": "risk_diff"}).expert_count == 2


@pytest.mark.parametrize("settings, error, what", [
    ({"on": 0, "off": 0}, InputError, "0 experts to switch on and 0"),
    ({"on": -1, "off": 3}, InputError, "-1 experts to switch on and 3"),
    ({"toward": " "}, InputError, "toward nothing"),
    ({"form": "soft"}, UnknownNameError, "no form 'soft'"),
    ({"by": "p-value"}, UnknownNameError, "no by 'p-value'"),
    ({"layer_numbers": "names"}, UnknownNameError, "no layer-numbers 'names'"),
    ({"columns": {"weight": "x"}}, UnknownNameError, "no column 'weight' is looked for"),
    ({"columns": {"layer": "x"}}, DataError, "it has no column 'x'"),
    ({"columns": {"layer": ""}}, DataError, "it lacks layer"),
    ({"on": 3}, DataError, "3 experts are to be switched on, and the table has 2 that can be"),
    ({"off": 2}, DataError, "2 experts are to be switched off, and the table has 1 that can be"),
    ({"form": "additive"}, InputError, "sigma is not given"),
    ({"form": "additive", "sigma_L": SIGMA[:2]}, InputError, "sigma is ["),
    ({"form": "additive", "sigma_L": np.array([0, 1, 1], np.float32)}, InputError, "sigma is ["),
    ({"form": "additive", "on": 3, "sigma_L": SIGMA}, DataError, "the table has 2"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused(tmp_path, settings, error, what):
    refused(write(tmp_path / "t.csv", rows(COUNTED)), error, what, **settings)


# ---------------------------------------------------------------- what the model's routers can follow


GROUPED = fingerprint(top_k=3, scoring="sigmoid k=3, renormalised, 2 of 4 groups by top2-sum")
"""4 groups of 2, 2 kept, 3 selected: on in two groups at most, and one off of any two groups."""


@pytest.mark.parametrize("asked", [{"on": 1, "off": 0}, {"on": 2, "off": 1}])
def test_experts_on_in_top_1_routers_are_refused(tmp_path, asked):
    path = write(tmp_path / "t.csv", rows(SCORED, ("layer", "expert", "score")))
    top_1 = fingerprint(top_k=1, scoring="topk-sigmoid k=1")
    error = refused(path, InputError, "are to be switched on in top-1 routers", fingerprint=top_1, **asked)
    assert error.where == "import for a fake_moe (topk-sigmoid k=1)" and "--off" in error.do and "additive" in error.do
    assert entries(take(path, fingerprint=top_1, on=0, off=2).force_LE) == {(1, 6): -1, (2, 7): -1}
    assert take(path, fingerprint=top_1, form="additive", sigma_L=SIGMA, **asked).expert_count == sum(asked.values())


def test_within_groups_what_cannot_be_followed_passes_its_turn_on(path):
    write(path, rows([*((1, e, 9.0 - e) for e in range(8)), (3, 7, 0.5)], ("layer", "expert", "score")))
    mask = take(path, fingerprint=GROUPED, on=4, off=0)
    assert entries(mask.force_LE) == {(0, 0): 1, (0, 1): 1, (0, 2): 1, (1, 7): 1}  # layer 1 takes three
    write(path, rows([(1, 0, 4.0), (1, 2, 3.0), (1, 4, 2.0), (1, 1, 1.0), (3, 0, -1.0), (3, 1, -0.5), (4, 7, -0.1)],
                     ("layer", "expert", "score")))  # fmt: skip
    mask = take(path, fingerprint=GROUPED, on=3, off=2)
    assert entries(mask.force_LE) == {(0, 0): 1, (0, 2): 1, (0, 1): 1, (1, 0): -1, (2, 7): -1}
    error = refused(path, DataError, "4 experts are to be switched on, and the table has 3", fingerprint=GROUPED, on=4)
    assert "within what a layer can take" in error.expected
    refused(path, DataError, "3 experts are to be switched off, and the table has 2", fingerprint=GROUPED, off=3)
    ungrouped = fingerprint(top_k=3, scoring="somebody else's words")
    assert take(path, fingerprint=ungrouped, on=3, off=3).expert_count == 6


@pytest.mark.parametrize(("name", "on", "off"), [("deepseek_v3", 4, 1), ("llama4_text", 0, 6), ("mixtral", 4, 1)])
def test_what_is_imported_can_be_applied(tmp_path, model_of, name, on, off):
    model = model_of(name)
    ids, numbers = model.fingerprint.layer_ids, np.random.default_rng(0).normal(size=(2, 8))
    table = [(ids[row], expert, float(numbers[row, expert])) for row in (0, 1) for expert in range(8)]
    path = write(tmp_path / "t.csv", rows(table, ("layer", "expert", "score")))
    mask = take(path, fingerprint=model.fingerprint, on=on, off=off)
    with mask.apply(model) as receipt:
        model.chat("what is the capital of arvonia ?", max_new_tokens=2)
    assert mask.expert_count == on + off and receipt.changed > 0


def test_the_command_says_it_of_a_loaded_model_and_writes_nothing(tmp_path, folder_of):
    path = write(tmp_path / "t.csv", rows([(1, 0, 1.0), (2, 0, -1.0)], ("layer", "expert", "score")))
    command = [
        "mask", "import", str(path), "--model", str(folder_of("llama4_text")), "--on", "1", "--toward", "refuse",
        "--out", str(tmp_path / "m.safetensors"),
    ]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, InputError), result.output
    assert result.exception.what == "1 experts are to be switched on in top-1 routers"
    assert "llama4_text (topk-sigmoid k=1)" in result.exception.where and not (tmp_path / "m.safetensors").exists()


# ---------------------------------------------------------------- the model that a table is of


def test_the_model_is_that_of_a_mask(tmp_path):
    additive().save(tmp_path / "a")
    forced().save(tmp_path / "f")
    fingerprint_, sigma = made_for(tmp_path / "a")
    assert fingerprint_ == MODEL and sigma.tolist() == [0.5, 2.0, 1.0]
    assert made_for(tmp_path / "f") == (MODEL, None)
    with pytest.raises(FileError, match="No such file"):
        made_for(tmp_path / "none")
