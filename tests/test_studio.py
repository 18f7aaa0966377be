"""The studio: the functions behind it without a widget, then the widgets without a browser."""

import datetime
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from prism_nb import phantom, studio, workbench
from prism_nb.editing import edit
from prism_nb.edits import PAPER_EDITS
from prism_nb.files import read_json
from prism_nb.images import uint8_to_unit
from prism_nb.run import ROOT_VARIABLE
from prism_nb.workbench import as_code, film_of, make_edit, prepare, receive, save_pair, stored


@pytest.fixture(scope="module")
def loaded(tiny_run):
    return prepare(tiny_run)


@pytest.fixture
def bench(loaded, tiny_run, tmp_path):
    return replace(loaded, folder=shutil.copytree(tiny_run, tmp_path / "run"), recent={})


@pytest.fixture
def film(bench):
    """A film with devices, and its captions without them."""
    row = bench.edits.iloc[0]
    return row["film_id"], row["source"], row["target"]


def file_of(picture, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format=kind)
    return buffer.getvalue()


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


# The functions


@pytest.mark.parametrize(
    ("lost", "notebook"),
    [("cohort.json", "01_caption"), ("model", "02_finetune"), ("inversions", "03_invert")],
)
def test_a_run_that_is_not_so_far_names_the_notebook(tiny_run, tmp_path, lost, notebook):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / lost).rename(run / "gone")
    with pytest.raises(ValueError, match=notebook):
        prepare(run)
    assert notebook in studio.open(run).value, "shown in one line"


def test_edits_are_those_of_the_package(bench, film, monkeypatch):
    film, source, target = film
    row = bench.inverted.film_ids.index(film)
    x = film_of(bench, film)[None]
    expected = edit(
        bench.model, bench.inverted.select([row]), x, [0], [target], mask="none", guidance_scale=5
    )
    monkeypatch.setattr(workbench, "invert", None)  # the run's own inversion fits
    result = make_edit(bench, film, source, target, mask="none", guidance_scale=5)
    np.testing.assert_array_equal(result.counterfactual, expected.films[0])
    assert result.recipe["guidance_scale"] == 5
    assert list(result.heads) == [
        "Pleural Effusion",
        "Cardiomegaly",
        "No Finding",
        "Support Devices",
    ]
    assert result.measures["mask_area"] == 1
    assert np.isfinite([*result.measures.values()]).all()


def test_another_caption_or_number_of_steps_inverts_once(bench, film):
    film, source, target = film
    assert make_edit(bench, film, source, target).call["num_steps"] == 3
    assert not bench.recent
    make_edit(bench, film, source + ", edema", target)
    make_edit(bench, film, source + ", edema", target, guidance_scale=1)
    assert len(bench.recent) == 1
    result = make_edit(bench, film, source, target, num_steps=2, preset="sdedit")
    assert len(bench.recent) == 2
    assert (result.recipe["inversion"], result.recipe["num_steps"]) == ("ddim", 2)


def test_boxes_bound_an_edit(bench, film):
    box, keep = (10, 20, 40, 50), (0, 0, 20, 30)
    result = make_edit(bench, *film, mask=box, keep=keep, guidance_scale=9)
    halves = [(10, 20, 25, 50), (25, 20, 40, 50)]
    union = make_edit(bench, *film, mask=halves, keep=keep, guidance_scale=9)
    np.testing.assert_array_equal(union.mask, result.mask)
    changed = result.counterfactual != result.factual
    inside = np.zeros_like(changed)
    inside[20:50, 10:40] = True
    inside[:30, :20] = False
    np.testing.assert_array_equal(result.mask, inside)
    assert changed[inside].any()
    assert not changed[~inside].any()
    for wrong in ((10, 20, 10, 50), (0, 0, 65, 20)):
        with pytest.raises(ValueError, match=r"give .left, top, right, bottom"):
            make_edit(bench, *film, mask=wrong)


def test_progress_counts_and_what_it_raises_ends_the_edit(bench, film):
    film, source, target = film
    seen = []
    make_edit(bench, film, "chest x-ray", target, progress=lambda *at: seen.append(at))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (6, 6)

    def stop(done, total):
        raise studio.Cancelled

    with pytest.raises(studio.Cancelled):
        make_edit(bench, film, source, target, progress=stop)
    assert not bench.model.unet._forward_pre_hooks
    make_edit(bench, film, source, target)


def test_a_saved_pair_and_its_code_make_the_edit_again(bench, film):
    result = make_edit(bench, *film, mask=(0, 0, 64, 32), keep=(0, 0, 9, 9), guidance_scale=3.5)
    path = save_pair(bench, result)
    about = read_json(path)
    again = make_edit(bench, **about["call"])
    np.testing.assert_array_equal(again.counterfactual, result.counterfactual)
    assert about["measures"] == pytest.approx(result.measures)
    with Image.open(path.with_suffix(".png")) as image:
        assert "SYNTHETIC" in image.text["Description"]
        assert json.loads(image.text["Recipe"])["mask"] == [0, 0, 64, 32]
    films = np.stack([pixels(file.read_bytes()) for file in sorted(path.parent.glob("*_film.png"))])
    np.testing.assert_array_equal(uint8_to_unit(films[0]), result.factual)
    assert about["code"] == as_code(bench, result)
    scope = {}
    exec(about["code"], scope)
    np.testing.assert_array_equal(scope["result"].counterfactual, result.counterfactual)
    assert [p.name[:3] for p in sorted(path.parent.glob("*.json"))] == ["001", "002"]


def test_an_edit_of_any_preset_is_made_again_by_its_call(bench, film):
    for dials in ({"preset": "prism"}, {"preset": "sdedit"}, {"method": "ddpm", "seed": 3}):
        result = make_edit(bench, *film, num_steps=1, **dials)
        bench.recent.clear()
        again = make_edit(bench, **result.call)
        np.testing.assert_allclose(again.counterfactual, result.counterfactual, atol=1e-6)
    bench.inverted = replace(bench.inverted, method="ddpm")  # its seed is nowhere said
    other = make_edit(bench, **result.call | {"seed": 4})
    assert abs(other.counterfactual - result.counterfactual).max() > 1e-3


def test_a_recalled_edit_keeps_the_dials_that_have_no_widget(bench, film):
    shown = studio.Studio(bench)
    shown.recall(make_edit(bench, *film, detail=0.0, threshold=0.5, seed=7, guidance_scale=20))
    assert shown.call()["guidance_scale"] == 20
    assert {"detail": 0.0, "threshold": 0.5, "seed": 7}.items() <= shown.call().items()
    shown.preset.value = "sdedit"
    assert not {"detail", "threshold", "seed"} & set(shown.call())


def test_a_film_of_ones_own_is_taken_in_and_edited(bench):
    rng = np.random.default_rng(0)
    name = receive(bench, file_of(rng.integers(0, 256, (90, 80), np.uint8), "JPEG"))
    assert film_of(bench, name).shape == (64, 64)
    assert [p.name for p in (bench.folder / "studio").iterdir()] == [name.split("/")[1]]
    pairs = workbench.choices(bench, name)
    assert pairs["add Edema"] == ("chest x-ray", "chest x-ray showing edema")
    result = make_edit(bench, name, *pairs["remove Support Devices"], mask="none")
    assert result.truth is None
    assert save_pair(bench, result).name.startswith("001_own_")
    for content, reason in ((b"", "zero bytes"), (b"x" * 99, "not a PNG or JPEG")):
        with pytest.raises(ValueError, match=reason) as error:
            receive(bench, content)
        assert "/" not in str(error.value), "where it lay for a moment is of no interest"


def test_choices_fit_the_films_labels(bench):
    for film in bench.inverted.film_ids:
        row = bench.cohort.table.set_index("film_id").loc[film]
        pairs = workbench.choices(bench, film)
        own = {name: pair for name, pair in pairs.items() if not name.startswith("paper: ")}
        assert len(pairs) - len(own) == len(PAPER_EDITS)
        assert all(source == row["caption"] for source, _ in own.values())
        assert all((row[name.split(" ", 1)[1]] == 1) == name.startswith("remove") for name in own)


def test_what_04_edit_wrote_is_shown_and_can_be_made_again(bench, film):
    film, source, _ = film
    result = stored(bench, film)
    assert result.call["source"] == source
    again = make_edit(bench, **result.call)
    assert abs(again.counterfactual - result.counterfactual).max() <= 0.5 / 255 + 1e-5
    assert stored(bench, film, "another caption") is None
    assert stored(bench, "no film") is None


def test_edits_of_another_model_are_not_shown(bench):
    path = bench.folder / "edits" / "edits.parquet"
    bench.edits.assign(model_key="another").to_parquet(path)
    assert prepare(bench.folder, bench.model, bench.scorer).edits.empty


def test_the_truth_is_found_from_the_captions(bench, film):
    film, source, target = film
    result = make_edit(bench, film, source, target, mask="none")
    do = {"Support Devices": 0}
    truth, _ = phantom.true_counterfactual(bench.cohort.image_root, film, do, 64)
    np.testing.assert_array_equal(result.truth, uint8_to_unit(truth))
    assert {"effectiveness", "error_inside", "error_outside"} < set(result.measures)
    call = {"film": film, "source": "chest x-ray, no edema", "target": "chest x-ray showing edema"}
    assert workbench._truth(bench, call)[1].any()
    assert workbench._truth(bench, call | {"target": "chest x-ray"}) == (None, None)


def test_pictures(bench, film):
    result = make_edit(bench, *film, mask=(0, 0, 32, 64), guidance_scale=9)
    assert (pixels(workbench.wipe(result, 0)) == pixels(workbench.png(result.counterfactual))).all()
    assert (pixels(workbench.wipe(result, 1)) == pixels(workbench.png(result.factual))).all()
    half = pixels(workbench.wipe(result, 0.5))
    assert (half[:, 32] == 255).all()
    shown = workbench.pictures(result)
    assert list(shown) == ["difference", "mask", "true counterfactual", "true difference"]
    grey = pixels(shown["difference"])[:, 32:]
    assert np.ptp(grey.astype(int), axis=(0, 1)).max() == 0, "nothing changed out there"
    mask = pixels(shown["mask"]).astype(int)
    assert (mask[:, 32:, 0] == mask[:, 32:, 2]).all()
    assert (mask[:, :32, 0] > mask[:, :32, 2]).all()
    frame = pixels(workbench.framed(result.factual, {"keep": (0, 0, 64, 64)}))
    assert tuple(frame[0, 0]) == tuple(frame[63, 63]) == workbench.COLOURS["keep"]
    text = workbench.facts(result)
    assert "S_CLIP" in text
    assert "Cardiomegaly" in text


# The widgets


@pytest.fixture
def app(bench):
    return studio.Studio(bench)


def press(app):
    app.go.click()
    app.thread.join(60)
    assert not app.thread.is_alive()
    return app.status.value


def shown(app):
    return [name for name, panel in app.panels.items() if panel.layout.display != "none"]


def test_without_a_click_it_shows_what_the_run_has(app, bench, film):
    app.choose_film(film[0])
    assert app.thread is None
    assert shown(app) == list(studio.PANELS)
    assert (app.source.value, app.target.value) == film[1:]
    assert app.edit.value == "remove Support Devices"
    assert len(app.films.children) == 6


def test_pressing_edit_shows_and_keeps_what_was_made(app, film):
    app.choose_film(film[0])
    before = app.panels["difference"].children[1].value
    app.guidance.value, app.mask.value = 9, "none"
    assert "done in" in press(app)
    assert app.result.call["guidance_scale"] == 9
    assert app.panels["difference"].children[1].value != before
    app.guidance.value = 0
    press(app)
    assert len(app.strip.children) == 2
    app.strip.children[1].children[1].click()
    assert app.guidance.value == app.result.call["guidance_scale"] == 9
    assert (app.go.disabled, app.cancel.disabled) == (False, True)


def test_cancel_ends_the_edit_and_nothing_is_lost(app, film):
    app.choose_film(film[0])
    kept = app.result
    app.stop.set()
    app.stop.clear = lambda: None  # as if cancel had been pressed at once
    assert "cancelled" in press(app)
    assert app.result is kept


def test_what_goes_wrong_is_said_in_one_line(app):
    app.preset.value = "prism"
    assert app.method.value == "null_text"
    app.method.value = "direct"
    assert "not inverted by null_text" in press(app)
    app.target.value = ""
    assert app.go.disabled, "nothing to edit without T'"
    app.target.value = "chest x-ray with a blob"
    assert "never trained" in app.words.value
    assert app.edit.value == studio.OWN_WORDS
    app.target.value = "edema " * 99
    assert "shorten it" in app.words.value
    assert not app.go.disabled


def test_uploads_good_and_broken(app, bench, monkeypatch):
    monkeypatch.setenv(ROOT_VARIABLE, str(bench.folder.parent))
    app.guidance.value = 9

    def upload(content):
        about = {"name": "chest.png", "type": "", "size": len(content)}
        about |= {"last_modified": datetime.datetime.now(), "content": memoryview(content)}
        app.upload.value = (about,)

    upload(b"this is no film")
    assert "chest.png: this is not a PNG or JPEG" in app.status.value
    upload(file_of(np.full((64, 64), 99, np.uint8)))
    assert app.film.startswith("studio/own_")
    assert shown(app) == [studio.FILM]
    assert app.save.disabled
    assert (app.edit.value, app.source.value, app.target.value) == (studio.OWN_WORDS, "", "")
    assert app.go.disabled, "what it shows is not known"
    assert app.guidance.value == 2, "as the preset has it"
    app.edit.value = "remove Support Devices"
    assert not app.go.disabled
    assert "done in" in press(app)
    app.save.click()
    assert "saved run/studio/001_own_" in app.status.value
    app.copy.click()
    assert f"film='{app.film}'" in app.code.value


def test_dials_follow_the_preset_and_films_the_filter(app, bench):
    assert app.strength.layout.display == "none"
    app.preset.value = "sdedit"
    assert app.strength.layout.display is None
    assert (app.method.value, app.guidance.value, app.strength.value) == ("ddim", 7.5, 0.5)
    assert app.call()["strength"] == 0.5
    app.mask.value, app.keep.value = "box", True
    assert app.boxes["keep"][0].layout.display is None
    assert app.call()["mask"] == (16, 16, 48, 48)
    app.finding.value = app.finding.options[1]
    has = (app.table[app.finding.value] == 1).sum()
    assert len(app.films.children) == has
    app.films.children[-1].children[1].click()
    marked = [thumbnail.layout.border_top for thumbnail in app.films.children]
    assert [studio.CHOSEN in border for border in marked] == [False] * (has - 1) + [True]
    assert app.film in app.films.children[-1].children[1].tooltip
