"""The evaluator: the do-nothing and the perfect editor frame every method."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from prism_nb import evidence
from prism_nb.editing import Edited
from prism_nb.edits import FLOORS, OWN, Edit, plan_edits, save_edits, truths
from prism_nb.evaluation import (
    FILTERED,
    GAN,
    NOTHING,
    PERFECT,
    add_baseline,
    collect,
    measure,
)
from prism_nb.files import plain
from prism_nb.findings import PAPER_HEADS
from prism_nb.ganterfactual import build_gan
from prism_nb.images import load_films, uint8_to_unit

EDITS = [Edit("Support Devices", False), Edit("Pleural Effusion", True)]


@pytest.fixture(scope="module")
def cohort(make_cohort):
    return make_cohort(14, 64)


def brightness(films):
    """A stand-in for a judge: each head looks at the mean grey of one sixth of the film."""
    parts = [
        part for half in np.array_split(films, 2, axis=1) for part in np.array_split(half, 3, 2)
    ]
    return np.stack([part.mean(axis=(1, 2)) / 255 for part in parts], axis=1)


def everywhere(films):
    """Films as edited without a mask."""
    return Edited(films, np.ones(films.shape, bool), np.ones(len(films)))


def write(cohort, folder, edited_of, kept=True, peers=None):
    """Write edits made by edited_of(factual, truth), and by peers: the table of edits.parquet."""
    chosen = cohort.table[cohort.table["split"] == "test"].reset_index(drop=True)
    films = uint8_to_unit(load_films([cohort.image_root / p for p in chosen["path"]], 64))
    plan = plan_edits(chosen, EDITS).assign(s_clip=0.5, kept=kept)
    truth, _ = truths(cohort, plan)
    factual = films[plan["row"]]
    others = {
        name: (plan.iloc[rows], everywhere(made(factual, truth)[rows]))
        for name, (made, rows) in (peers or {}).items()
    }
    made = everywhere(edited_of(factual, truth))
    return save_edits(folder, plan, made, chosen, dict.fromkeys(FLOORS, films), {}, others)


def measured(cohort, folder, *args, **options):
    table = write(cohort, folder, *args, **options)
    return measure(collect(cohort, table, folder), brightness)


def truth_of(factual, truth):
    return truth


def nothing_of(factual, truth):
    return factual


def test_a_perfect_method_scores_as_the_perfect_editor(cohort, tmp_path):
    frame = measured(cohort, tmp_path, truth_of).set_index("method")
    names = [name for name in frame if frame[name].dtype.kind == "f" and name != "s_clip"]
    own, perfect = frame.loc[OWN, names], frame.loc[PERFECT, names]
    np.testing.assert_allclose(own.to_numpy(float), perfect.to_numpy(float), atol=1e-6)
    zero = ["error_inside", "true_error", "over_edit", "under_edit", "leakage_beyond_truth"]
    np.testing.assert_allclose(perfect[[*zero, "attribute_error"]], 0, atol=1e-6)
    one = ["tea_effectiveness", "id_ratio", "iou_at_area", "pointing_game"]
    np.testing.assert_allclose(perfect[one], 1, atol=1e-5)


def test_a_lazy_method_scores_as_the_do_nothing_editor(cohort, tmp_path):
    frame = measured(cohort, tmp_path, nothing_of).set_index("method")
    for method in (OWN, NOTHING, *FLOORS.values()):
        zero = ["l1", "cpg", "cpg_absolute", "leakage", "identity_shift", "sparsity", "over_edit"]
        zero += ["tea_effectiveness", "iou_at_area", "id_ratio"]
        np.testing.assert_allclose(frame.loc[method, zero], 0, atol=1e-6)
        np.testing.assert_allclose(frame.loc[method, ["ssim", "true_error"]], 1, atol=1e-6)
    assert (frame.loc[PERFECT, "l1"] > 0).all()
    assert (frame.loc[NOTHING, "attribute_error"] > 0).any()


def test_the_filter_only_selects(cohort, tmp_path):
    frame = measured(cohort, tmp_path, truth_of, kept=False)
    assert FILTERED not in set(frame["method"])
    frame = measured(cohort, tmp_path, truth_of, kept=True)
    counts = frame.groupby("method").size()
    assert counts[FILTERED] == counts[OWN] == counts[PERFECT] == counts[NOTHING]


def test_every_method_of_the_table_is_measured_on_the_edits_that_it_made(cohort, tmp_path):
    peers = {"lazy": (nothing_of, [0, 1]), "true": (truth_of, [1, 2])}
    frame = measured(cohort, tmp_path, nothing_of, peers=peers).set_index("method")
    assert len(frame.loc["lazy"]) == len(frame.loc["true"]) == 2
    assert (frame.loc["lazy", "true_error"] == 1).all()
    assert (frame.loc["true", "true_error"] < 1e-6).all()
    own = frame.loc[OWN].reset_index()
    assert list(frame.loc["true", "film_id"]) == list(own["film_id"][1:3])


def test_the_baseline_makes_the_edits_of_its_finding_only(cohort, tmp_path):
    cases = collect(cohort, write(cohort, tmp_path, nothing_of), tmp_path)
    add_baseline(cases, build_gan(32, 4).eval(), "Support Devices")
    frame = measure(cases, brightness)
    mine = frame[frame["method"] == GAN]
    assert set(mine["finding"]) == {"Support Devices"}
    assert (mine["l1"] > 0).all()
    none = collect(cohort, write(cohort, tmp_path, nothing_of), tmp_path)
    add_baseline(none, build_gan(32, 4), "Edema")
    assert GAN not in none.films


def test_films_without_a_truth_are_measured_without_it(cohort, tmp_path, monkeypatch):
    monkeypatch.setattr("prism_nb.edits.phantom.is_phantom", lambda folder: False)
    table = write(cohort, tmp_path, nothing_of)
    cases = collect(cohort, table, tmp_path)
    frame = measure(cases, brightness)
    assert PERFECT not in set(frame["method"])
    assert "leakage_beyond_truth" not in frame
    assert frame["true_error"].isna().all()
    assert frame["cpg"].notna().all()
    own = evidence.filtered(frame, cases.plan)
    assert np.allclose(own["error"], 1 - own["cpg"])


def test_at_224_pixels_films_lose_what_the_baseline_could_not_see(cohort, tmp_path, monkeypatch):
    monkeypatch.setattr("prism_nb.evaluation.SMALL", 32)
    frame = measured(cohort, tmp_path, truth_of).set_index("method")
    assert (frame.loc[NOTHING, ["l1_224", "cpg_224"]] == 0).all(axis=None)
    close = frame.loc[OWN]
    np.testing.assert_allclose(close["l1_224"], close["l1"], rtol=0.5)
    np.testing.assert_allclose(close["cpg_224"], close["cpg"], atol=0.01)


# Bad input


def test_without_test_edits_the_way_out_is_named(cohort, tmp_path):
    table = write(cohort, tmp_path, nothing_of).assign(split="train")
    with pytest.raises(ValueError, match="raise num_test_films in 03_invert"):
        collect(cohort, table, tmp_path)


def test_edits_of_another_cohort_or_size_are_refused_in_one_line(cohort, tmp_path):
    table = write(cohort, tmp_path, nothing_of)
    other = replace(cohort, table=cohort.table.assign(film_id="x" + cohort.table["film_id"]))
    larger = replace(cohort, settings=cohort.settings | {"image_size": 96})
    relabelled = cohort.table.assign(**{"Support Devices": 0.0, "Pleural Effusion": 1.0})
    resplit = cohort.table.assign(split="train")  # the judge may have learned from these films
    for wrong, words in (
        (other, "the edits are of another cohort"),
        (replace(cohort, table=relabelled), "the edits are of another cohort"),
        (replace(cohort, table=resplit), "the edits are of another cohort"),
        (larger, "make the edits anew"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            collect(wrong, table, tmp_path)
        assert "\n" not in str(error.value)


# What the measurements say


@pytest.fixture(scope="module")
def both(cohort, tmp_path_factory):
    """Cases and measurements of a method that does half of what is wanted."""
    folder = tmp_path_factory.mktemp("half")
    table = write(cohort, folder, lambda factual, truth: (factual + truth) / 2)
    cases = collect(cohort, table, folder)
    return cases, measure(cases, brightness)


def test_table_2_has_every_row_and_the_papers_numbers(both):
    tidy = evidence.table2(both[1], num_bootstrap=20)
    assert {NOTHING, *FLOORS.values(), OWN, FILTERED, PERFECT, *evidence.PAPER.index} == set(
        tidy["method"]
    )
    assert not any(name.startswith("p ") for name in tidy["metric"])
    paper = tidy[tidy["method"].isin(evidence.PAPER.index)]
    assert paper["n"].isna().all()
    assert sorted(paper["mean"]) == [0.031, 0.091, 0.781, 0.845]
    shown = evidence.laid_out(tidy, ["l1", "cpg", "cpg_absolute"])
    assert list(shown.columns) == ["n", "l1", "cpg", "cpg_absolute"]
    assert shown["n"].map(type).eq(str).all()
    rows = shown.loc["remove Support Devices"]
    assert rows.loc[evidence.PAPER.index[0], "n"] == ""
    assert list(rows.index[-3:]) == [PERFECT, *evidence.PAPER.index]
    assert rows.loc[evidence.PAPER.index[1], "l1"] == "0.031"
    assert " to " in rows.loc[OWN, "l1"]


def test_a_metric_of_fewer_films_says_how_many():
    about = {"edit": "add Edema", "method": OWN, "mean": 0.5, "low": 0.4, "high": 0.6}
    tidy = pd.DataFrame([about | {"metric": "l1", "n": 9}, about | {"metric": "flip", "n": 2}])
    shown = evidence.laid_out(tidy.astype({"n": "Int64"}), ["flip", "l1"], 1).iloc[0]
    assert shown.tolist() == ["9", "0.5 (0.4 to 0.6), n = 2", "0.5 (0.4 to 0.6)"]


def test_means_keep_every_edit_of_a_method(both):
    means = evidence.means(evidence.table2(both[1], num_bootstrap=0), OWN)
    assert set(means["l1"]) == {"remove Support Devices", "add Pleural Effusion"}
    own = both[1][both[1]["method"] == OWN]
    assert means["l1"] == pytest.approx(own.groupby("edit")["l1"].mean().to_dict())
    assert evidence.means(evidence.table2(both[1], num_bootstrap=0), "no such method") == {}


def test_nested_holds_every_number_of_a_table(both):
    tidy = evidence.table2(both[1], num_bootstrap=5)
    found = evidence.nested(tidy, "edit", "method", "metric")
    for row in tidy.itertuples():
        cell = found[row.edit][row.method][row.metric]
        assert cell["mean"] == pytest.approx(row.mean)
        assert cell["n"] == (None if pd.isna(row.n) else row.n)
        assert (cell["low"] is None) == np.isnan(row.low)
    plain(found)  # has a form in JSON
    assert evidence.nested(pd.DataFrame(), "edit") == {}


def test_leakage_is_the_mean_change_of_each_head(both):
    made, true = (evidence.leakage_matrix(both[1], method) for method in (OWN, PERFECT))
    assert list(made.index) == list(dict.fromkeys(both[0].plan["edit"]))
    np.testing.assert_allclose(made, true / 2, atol=2e-3)
    assert (evidence.leakage_matrix(both[1], "VAE") == 0).all(axis=None)


def test_logits_move_as_far_as_the_floors_move_them(both):
    frame = both[1].copy()
    rows = frame["method"] == "VAE"
    p = frame.loc[rows, "p No Finding"]
    frame.loc[rows, "p No Finding"] = 1 / (1 + np.exp(-(np.log(p / (1 - p)) - 0.3)))
    table = evidence.logit_changes(frame, num_bootstrap=20).set_index(["method", "head"])
    assert table.loc[("VAE", "No Finding"), "mean"] == pytest.approx(0.3, abs=1e-5)
    assert table["mean"].sum() == pytest.approx(0.3, abs=1e-5)
    assert (table["n"] == frame["film_id"].nunique()).all()


def test_realism_knows_real_films_from_noise(both):
    cases, real = replace(both[0], films=dict(both[0].films)), both[0].factual
    cases.add("noise", np.random.default_rng(0).integers(0, 256, real.shape, np.uint8))
    table = evidence.realism(cases, real, brightness).set_index("method")
    assert table.loc["noise", "kid"] > table.loc[NOTHING, "kid"] + 0.01
    assert list(table.index) == list(cases.films)


def test_realism_counts_a_film_once(both):
    cases, real = both[0], both[0].factual
    made = cases.plan.loc[cases.made[OWN], "film_id"]
    assert made.duplicated().any()
    table = evidence.realism(cases, real, brightness).set_index("method")
    assert table.loc[OWN, "films"] == made.nunique()


def test_ways_back_are_further_rows_of_appendix_b(both):
    cases, frame = both
    films = cases.factual[:2]
    returned = {"exact": films, "darker": films // 2}
    tried = evidence.asked_back(brightness, ["a", "b"], films, returned)
    table = evidence.logit_changes(frame, tried, 20).set_index(["method", "head"])
    assert (table.loc["exact", "mean"] == 0).all()
    assert (table.loc["darker", "mean"] > 0.3).all()
    assert (table.loc["darker", "n"] == 2).all()
    assert table.loc[("VAE", "No Finding"), "n"] == frame["film_id"].nunique()


def test_cycles_of_an_exact_editor_are_zero():
    films = np.random.default_rng(0).random((3, 8, 8), np.float32) / 2

    def same(x):
        return x

    editors = {"exact": (same, lambda x: x + 0.25, lambda x: x - 0.25)}
    editors["fading"] = (lambda x: 0.9 * x, lambda x: 0.9 * x, same)
    table = evidence.cycles(films, editors).set_index(["method", "cycles"])
    np.testing.assert_allclose(table.loc["exact", ["composition", "reversibility"]], 0, atol=1e-6)
    for count in (1, 5):
        lost = films.mean() * (1 - 0.9**count)
        np.testing.assert_allclose(table.loc[("fading", count), "composition"], lost, rtol=1e-4)
        np.testing.assert_allclose(table.loc[("fading", count), "reversibility"], lost, rtol=1e-4)


def test_our_editor_takes_its_edits_back_with_the_captions_exchanged(monkeypatch):
    asked = []
    monkeypatch.setattr(evidence, "encode_films", lambda model, films: films)
    monkeypatch.setattr(evidence, "invert", lambda model, z0, ids, texts, *how: (ids, texts, how))

    def edit(model, inverted, films, rows, targets, **dials):
        asked.append((*inverted, list(rows), targets, dials.get("mask")))
        return Edited(films, films > 0, films.mean((1, 2)))

    monkeypatch.setattr(evidence, "edit", edit)
    made = {"03_invert": {"inversion": "direct", "num_ddim_steps": 7, "seed": 2}}
    made["04_edit"] = {"seed": 0, "guidance_scale": 0, "mask": "preset", "detail": -1}
    made["04_edit"]["preset"] = "default"
    plan = pd.DataFrame({"film_id": ["f"], "source": ["T"], "target": ["T'"]})
    for turn in evidence.own_editors(None, made, plan):
        turn(np.ones((1, 2, 2)))
    how = ("direct", 7, 2)
    assert asked[0] == (["f"], ["T"], how, [0], ["T"], "none")
    assert asked[1] == (["f"], ["T"], how, [0], ["T'"], None)
    assert asked[2] == (["f"], ["T'"], how, [0], ["T"], None)


def test_goals_name_the_number_the_rival_and_the_ceiling():
    rows = [("cpg", OWN, 0.9), ("cpg", GAN, 0.4), ("cpg", PERFECT, 0.8), ("l1", OWN, 0.02)]
    rows += [("l1", GAN, 0.01), ("leakage", OWN, 0.04)]
    tidy = pd.DataFrame(rows, columns=["metric", "method", "mean"])
    tidy = tidy.assign(edit="remove Support Devices", n=3, low=0.0, high=1.0)
    heads = pd.DataFrame({"head": PAPER_HEADS, "accuracy": 0.92, "auroc": [0.95, 0.95, 0.8, 0.95]})
    goals = evidence.check_goals(tidy, heads).set_index("goal")
    assert goals["met"].tolist() == [True, True, False, True, True, True, False]
    assert "n = 3; GANterfactual 0.400, perfect editor 0.800" in goals["found"].iloc[1]


def own_edits(error, kept):
    patients = [f"p{number}" for number in range(len(error))]
    score = np.where(kept, 0.5, 0.0) + np.linspace(0, 0.01, len(error))
    return pd.DataFrame(
        {"error": np.asarray(error, float), "kept": kept, "s_clip": score, "patient_id": patients}
    ).assign(edit="remove Edema")


@pytest.mark.parametrize(
    ("error", "kept", "words"),
    [
        ([0.1, 0.2, 0.1, 0.9, 0.8, 0.9] * 2, [1, 1, 1, 0, 0, 0] * 2, "; it helps."),
        ([0.9, 0.8, 0.9, 0.1, 0.2, 0.1] * 2, [1, 1, 1, 0, 0, 0] * 2, "; it keeps the worse ones."),
        ([0.1, 0.9, 0.5, 0.1, 0.9, 0.5] * 2, [1, 1, 1, 0, 0, 0] * 2, "do not tell."),
        ([0.1, 0.2, 0.9], [1, 1, 0], "fewer than 5 on one side do not tell"),
        ([0.1, 0.9], [1, 1], "keeps all 2 edits, so it selects nothing"),
        ([0.1, 0.9], [0, 0], "rejects all 2 edits"),
        ([np.nan], [1], "Nothing can be said"),
    ],
)
def test_the_filters_sentence_goes_both_ways(error, kept, words):
    said = evidence.filter_sentence(own_edits(error, np.array(kept, bool)), num_bootstrap=200)
    assert words in said
    assert "\n" not in said


def test_a_hard_kind_of_edit_does_not_decide_for_the_filter():
    easy = own_edits([0.1, 0.2, 0.1, 0.2], np.array([1, 0, 1, 0], bool))
    hard = own_edits([9.0, 18.0, 9.0, 18.0], np.array([1, 0, 1, 0], bool)).assign(edit="hard")
    own = pd.concat([easy, easy, hard], ignore_index=True)
    said = evidence.filter_sentence(own, num_bootstrap=200)
    assert "a kept one has 0.67 and a rejected one 1.33" in said
    assert "it helps" in said


def test_the_worst_of_each_kind_come_first():
    own = own_edits([0.2, np.nan, 0.9, 0.4], np.ones(4, bool))
    assert evidence.worst(own, 2) == [2, 3]
    own.loc[0, "edit"] = "add Edema"
    assert evidence.worst(own, 1) == [0, 2]
