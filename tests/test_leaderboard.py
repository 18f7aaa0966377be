"""The method benchmark: the floors are where they must be, and what is finished stays."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from prism_nb import leaderboard, methods
from prism_nb.cli import app
from prism_nb.diffusion import load_model
from prism_nb.evaluation import NOTHING, PERFECT
from prism_nb.images import uint8_to_unit
from prism_nb.leaderboard import MEASURES, benchmark, differences, tabulate
from prism_nb.methods import EDITS, FLOORS, METHODS, USUAL, Inverter, choose, draw_cases

TWO = ["remove Support Devices", "add Support Devices"]


@pytest.fixture(scope="module")
def base(random_base):
    """The random base, loaded once."""
    return load_model(str(random_base), device="cpu")


@pytest.fixture(scope="module")
def cases():
    """Three films of 64 px an edit."""
    return draw_cases(EDITS, 3, 64)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of the benchmark that `table` runs."""
    return tmp_path_factory.mktemp("benchmark")


def again(base, out, methods=("default", "sdedit"), **given):
    given = {"num_films": 3, "edits": TWO, "num_steps": 2} | given
    return benchmark(base, out, methods=methods, **given)


@pytest.fixture(scope="module")
def table(base, out):
    """A benchmark of two methods on two edits: leaderboard.csv's rows."""
    return again(base, out)


@pytest.fixture
def finished(monkeypatch, table):
    """From here on nothing can be made, only read."""

    def make(*_):
        raise RuntimeError("it was made again")

    monkeypatch.setattr(leaderboard._Runner, "_make", make)
    return table


def means(table, method, edit=TWO[0]):
    rows = table[(table["method"] == method) & (table["edit"] == edit)]
    return rows.set_index("metric")["mean"]


# Cases


def test_cases_are_the_same_patients_whatever_else_is_asked(cases):
    assert [each.edit for each in cases] == list(EDITS)
    fewer = draw_cases(EDITS[2:3], 2, 64)[0]
    assert fewer.film_ids == cases[2].film_ids[:2]
    np.testing.assert_array_equal(fewer.truth, cases[2].truth[:2])
    assert (draw_cases(EDITS[2:3], 2, 64)[0].films == fewer.films).all()


def test_a_case_has_the_finding_to_change_and_a_truth_that_shows_it(cases):
    for each in cases:
        verb, name = each.edit.split(" ", 1)
        assert len(set(each.film_ids)) == len(each.film_ids) == 3
        for source, target in zip(each.sources, each.targets, strict=True):
            assert (name.lower() in source) == (verb == "remove") != (name.lower() in target)
        changed = (each.films != each.truth).mean((1, 2))
        assert (changed > 0).all()
        assert (changed < 0.8).all()


def test_edits_that_no_film_can_show_are_one_line():
    with pytest.raises(ValueError, match="the nearest is 'Support Devices'"):
        draw_cases(["remove Suport Devices"], 2, 64)
    with pytest.raises(ValueError, match="it follows from the others"):
        draw_cases(["add No Finding"], 2, 64)
    with pytest.raises(ValueError, match="num_films is 0"):
        draw_cases(EDITS, 0, 64)


def test_another_draw_differs_from_the_truth_only_in_what_the_film_does_not_tell():
    edits = ["remove Support Devices", "remove Pleural Effusion", "remove Cardiomegaly"]
    for each in draw_cases([*edits, "add Support Devices"], 6, 64):
        told = each.edit in edits[:2]
        same = (each.redrawn == each.truth).all((1, 2))
        assert same.all() if told else same.mean() < 0.5, each.edit
        moved = FLOORS["another draw"](None, each, None, 0)
        np.testing.assert_array_equal(moved, uint8_to_unit(each.redrawn))


# Methods


def test_an_inversion_is_made_once_for_methods_in_a_row(base, cases):
    inverter = Inverter(base, 2)
    first = inverter(cases[0], method="direct")
    spent, cost = inverter.spent, inverter.cost
    again = inverter(cases[0], method="direct")
    assert inverter.spent == spent
    assert inverter.cost == pytest.approx(2 * cost)
    np.testing.assert_array_equal(first.offsets, again.offsets)
    still = inverter(cases[0], method="none")
    assert (still.trajectory == first.trajectory[0]).all()
    assert inverter.spent > spent


def test_every_usual_method_runs_and_the_default_is_a_point_of_the_grid(base, cases):
    one = methods.Cases(cases[1].edit, *(part[:1] for part in cases[1][1:]))
    inverter, made = Inverter(base, 3), {}
    for name in (*USUAL, "direct/plain/auto", "null_text/plain/auto"):
        made[name] = METHODS[name](base, one, lambda **how: inverter(one, **how), 0)
        assert made[name].shape == one.films.shape
        assert ((made[name] >= 0) & (made[name] <= 1)).all(), name
    np.testing.assert_allclose(made["default"], made["direct/plain/auto"], atol=1e-5)
    assert len([name for name in METHODS if name.count("/") == 2]) == 7 * 3 * 2


def test_methods_are_chosen_by_name():
    assert list(choose()) == [*FLOORS, *USUAL]
    assert list(choose(["all"])) == [*FLOORS, *METHODS]
    with pytest.raises(ValueError, match="no method 'defualt'; the nearest is 'default'"):
        choose(["defualt"])


# Results


def test_every_method_has_every_measure_on_every_edit(table):
    assert set(table["metric"]) == set(MEASURES)
    assert len(table) == len(TWO) * len([*FLOORS, "default", "sdedit"]) * len(MEASURES)
    assert (table["n"] == 3).all()
    assert (table["patients"] == 3).all()
    assert (table["low"] <= table["mean"] + 1e-12).all()
    assert (table["mean"] <= table["high"] + 1e-12).all()


@pytest.mark.parametrize("edit", TWO)
def test_doing_nothing_and_perfection_are_the_two_ends(table, edit):
    none, best = means(table, NOTHING, edit), means(table, PERFECT, edit)
    ends = ("error_ratio", "error_outside", "tea_effectiveness", "tea_amplification", "over_edit")
    assert list(none[list(ends)]) == [1, 0, 0, 0, 0]
    np.testing.assert_allclose(best[list(ends)], [0, 0, 1, 0, 0], atol=1e-6)
    assert (none["l1"], none["seconds_inversion"]) == (0, 0)
    assert best["iou_at_area"] == pytest.approx(1)
    assert means(table, "default", edit)["seconds_inversion"] > 0


def test_tables_text_and_picture_are_written(out, table):
    read = pd.read_csv(out / "leaderboard.csv")
    pd.testing.assert_frame_equal(read, table, check_dtype=False)
    text = (out / "leaderboard.md").read_text()
    heads = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    assert heads.index(PERFECT) == 2  # heading, rule, then the least error
    assert text.count(f"## {TWO[0]}, n = 3") == 1
    assert "default less sdedit, n = 3: error in mask" in text
    assert "Set aside" not in text
    assert len(pd.read_csv(out / "differences.csv")) == 2 * len(TWO)
    with Image.open(out / "contact.png") as picture:
        assert "SYNTHETIC" in picture.info["Description"]


def test_what_is_finished_is_not_made_again(base, out, finished):
    pd.testing.assert_frame_equal(again(base, out), finished)
    with pytest.raises(ValueError, match=r"no method worked: .*it was made again"):
        again(base, out, seed=1)
    with pytest.raises(ValueError, match="no method worked"):
        again(base, out, num_steps=3)


def test_a_new_method_is_one_function_and_one_that_raises_is_set_aside(
    base, out, table, monkeypatch
):
    def halfway(model, cases, invert, seed):
        return uint8_to_unit(cases.films) / 2 + uint8_to_unit(cases.truth) / 2

    def broken(model, cases, invert, seed):
        raise RuntimeError("no such luck\nat all")

    def loud(model, cases, invert, seed):
        return 255 * uint8_to_unit(cases.films)

    mine = {"halfway": halfway, "broken": broken, "loud": loud}
    for name, function in mine.items():
        monkeypatch.setitem(METHODS, name, function)
    found = again(base, out, ["broken", "loud", "halfway"])
    assert means(found, "halfway")["error_ratio"] == pytest.approx(0.5, abs=0.03)
    assert means(found, "halfway")["tea_effectiveness"] == pytest.approx(0.5, abs=0.02)
    assert not set(found["method"]) & {"broken", "loud"}
    text = (out / "leaderboard.md").read_text()
    assert f"- broken: {TWO[0]}: RuntimeError: no such luck\n" in text
    assert f"- loud: {TWO[0]}: ValueError: it made films (3, 64, 64) that are not all fine" in text


def test_a_dial_out_of_range_stops_it_before_anything_is_made(base, tmp_path):
    with pytest.raises(ValueError, match="num_steps is 0"):
        again(base, tmp_path, num_steps=0)
    with pytest.raises(ValueError, match="the nearest is 'sdedit'"):
        again(base, tmp_path, ["sdedi"])
    assert not list(tmp_path.iterdir())


# Statistics


@pytest.fixture
def results():
    """Twenty films, each of a patient, by three methods: errors known."""
    rng, who = np.random.default_rng(0), [f"p{number}" for number in range(20)]
    start = rng.uniform(0.1, 0.3, 20)
    parts = [("default", 0.2 * start, 0.5), ("worse", 0.4 * start, 0.5), ("noisy", start, None)]
    frames = []
    for method, error, over in parts:
        frame = pd.DataFrame({"film_id": who, "patient_id": who, "edit": "add Edema"})
        over = rng.uniform(0, 1, 20) if over is None else over
        errors = {"error_inside": error, "error_nothing": start, "over_edit": over}
        frames.append(frame.assign(method=method, **errors))
    return pd.concat(frames, ignore_index=True)


def test_the_ratio_is_one_of_means_with_an_interval(results):
    rows = tabulate(results).set_index(["metric", "method"]).loc["error_ratio"]
    np.testing.assert_allclose(rows.loc["default", ["mean", "low", "high"]], 0.2)
    np.testing.assert_allclose(rows.loc["noisy", ["mean", "low", "high"]], 1)


def test_differences_are_paired_and_say_who_wins(results):
    rows = differences(results).set_index(["peer", "metric"])
    assert rows.loc[("worse", "error_inside"), "verdict"] == "the default beats it"
    assert rows.loc[("worse", "error_inside"), "high"] < 0
    assert rows.loc[("worse", "over_edit"), "verdict"] == "not told apart"
    flipped = results.replace({"method": {"default": "worse", "worse": "default"}})
    rows = differences(flipped).set_index(["peer", "metric"])
    assert rows.loc[("worse", "error_inside"), "verdict"] == "it beats the default"
    assert differences(results[results["method"] != "default"]).empty


# The command


def test_the_command_prints_the_table(random_base, tmp_path):
    given = ["--model", str(random_base), "--num-films", "2", "--edits", "add Support Devices"]
    given += ["--methods", "sdedit, default", "--steps", "2", "--out", str(tmp_path / "new")]
    result = CliRunner().invoke(app, ["benchmark", *given])
    assert result.exit_code == 0, result.output
    assert "## add Support Devices, n = 2" in result.stdout
    assert "| perfect editor" in result.stdout
    assert (tmp_path / "new" / "contact.png").is_file()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--methods", "prisma"], "no method 'prisma'; the nearest is 'prism'"),
        (["--edits", "drop Edema"], 'write "add" or "remove" and a finding'),
        (["--num-films", "0"], "num_films is 0"),
        (["--precision", "fp8"], "it must be fp32, bf16 or auto"),
        (["--model", "nowhere"], "no such folder; give a run, phantom or owner/model"),
    ],
)
def test_what_the_command_cannot_do_is_exit_2_and_one_line(random_base, tmp_path, given, words):
    model = [] if "--model" in given else ["--model", str(random_base)]
    result = CliRunner().invoke(app, ["benchmark", *given, *model, "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
