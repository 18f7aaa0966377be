"""The judge: another architecture, other films, a card that says so."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from prism_nb import judging as j
from prism_nb.classifiers import ClassifierError, build_classifier, save_classifier
from prism_nb.findings import PAPER_HEADS
from prism_nb.ganterfactual import GanError, build_gan, load_gan, save_gan
from prism_nb.images import load_films

PARAMS = {
    "judge": "test_resnet",
    "judge_films": 0,
    "judge_epochs": 1,
    "classifier": "test_efficientnet",
    "classifier_weights": "",
    "classifier_size": 0,
    "classifier_batch_size": 8,
    "classifier_learning_rate": 5e-3,
    "seed": 0,
}


@pytest.fixture(scope="module")
def cohort(make_cohort):
    return make_cohort(20, 64)


@pytest.fixture(scope="module")
def films(cohort):
    return load_films([cohort.image_root / path for path in cohort.table["path"]], 64)


def make(cohort, films, folder, **changed):
    return j.make_judge(cohort, films, SimpleNamespace(**PARAMS | changed), folder)


def test_labels_are_the_papers_heads_and_who_it_is(cohort):
    table = cohort.table.copy()
    table["Sex"], table["Age"] = ["Male", "Female", "Unknown"] + ["Male"] * 17, 60.0
    table.loc[0, "Age"], table.loc[1, "Age"] = 61, np.nan
    labels = j.judge_labels(table)
    assert labels.shape == (20, len(j.HEADS))
    assert np.array_equal(labels[:, :4], table[list(PAPER_HEADS)].to_numpy(np.float32))
    table.loc[0, "Cardiomegaly"] = -1.0  # uncertain: "mention" keeps it
    assert np.isnan(j.judge_labels(table)[0, 1])
    assert np.array_equal(labels[:3, 4], [1, 0, np.nan], equal_nan=True)
    assert np.array_equal(labels[:3, 5], [1, np.nan, 0], equal_nan=True)


def test_a_judge_of_the_cohort_learns_from_all_but_the_test_films(cohort, films, tmp_path):
    judge, card, epochs = make(cohort, films, tmp_path)
    split = cohort.table["split"]
    assert len(epochs) == 1
    assert card["role"] == "judge"
    assert card["training_films"] == (split == "train").sum()
    learned = j.keys_of(cohort, cohort.table.loc[split != "test", "film_id"])
    assert card["trained_on"] == sorted(learned)
    again, same, none = make(cohort, films, tmp_path, judge=str(tmp_path / "judge"))
    assert (same, none) == (card, [])
    ask, other = j.asker(judge, card), j.asker(again, same)
    assert np.array_equal(ask(films), other(films))
    assert ask(films).shape == (20, len(j.HEADS))


def test_a_judge_of_other_patients_learns_without_the_link(cohort, films, tmp_path):
    _, card, _ = make(cohort, films, tmp_path, judge_films=17)
    assert card["training_films"] == 15
    assert len(card["trained_on"]) == 17
    assert not set(card["trained_on"]) & set(j.keys_of(cohort, cohort.table["film_id"]))
    recipe = (tmp_path / ".films" / "phantom.json").read_text()
    assert str(j.LEAST) in recipe


def test_a_judge_of_films_that_it_learned_from_is_refused(cohort, films, tmp_path):
    make(cohort, films, tmp_path)
    swapped = cohort.table["split"].map({"train": "test", "val": "val", "test": "train"})
    other = SimpleNamespace(**vars(cohort) | {"table": cohort.table.assign(split=swapped)})
    with pytest.raises(ClassifierError, match=r"trained on \d+ of the \d+ films") as error:
        make(other, films, tmp_path, judge=str(tmp_path / "judge"))
    assert "\n" not in str(error.value)


def test_no_judge_is_the_classifier_or_lacks_a_head(cohort, films, tmp_path):
    with pytest.raises(ClassifierError, match="must be another architecture"):
        make(cohort, films, tmp_path, judge="test_efficientnet")
    four = build_classifier("test_resnet", 4)
    save_classifier(tmp_path, four, PAPER_HEADS, {"role": "judge", "trained_on": []})
    with pytest.raises(ClassifierError, match="has no head male"):
        make(cohort, films, tmp_path, judge=str(tmp_path))
    make(cohort, films, tmp_path / "own")
    saved = str(tmp_path / "own" / "judge")
    with pytest.raises(ClassifierError, match="must be another architecture"):
        make(cohort, films, tmp_path, judge=saved, classifier="test_resnet")
    with pytest.raises(ClassifierError, match="the nearest is 'test_resnet'"):
        make(cohort, films, tmp_path, judge="test_resne")


def test_a_file_of_start_weights_is_the_classifiers_alone(cohort, films, tmp_path):
    start = save_classifier(tmp_path / "start", build_classifier("test_efficientnet", 4), "abcd")
    for weights in (start, start / "model.safetensors"):
        _, card, _ = make(cohort, films, tmp_path, classifier_weights=str(weights))
        assert card["start"] == "from scratch"


def baseline(cohort, films, folder, name):
    params = SimpleNamespace(seed=0, baseline=str(name), baseline_steps=2, baseline_size=32)
    return j.make_baseline(cohort, films, params, folder)


def weights(gan):
    return torch.cat([w.flatten() for w in gan.to_absent.parameters()])


def test_the_gan_that_was_used_is_kept_for_06(cohort, films, tmp_path, monkeypatch):
    other = save_gan(tmp_path / "other", build_gan(32, 4, seed=5), {"finding": "Edema"})
    monkeypatch.setattr(j, "BUNDLED", other)
    kept = tmp_path / "run" / "baseline"
    for name in (other, "bundled"):
        gan, finding = baseline(cohort, films, kept, name)
        again, card = load_gan(kept)
        assert (finding, card["finding"]) == ("Edema", "Edema")
        assert torch.equal(weights(gan), weights(again))
        (kept / "card.json").unlink()
    save_gan(kept, build_gan(32, 4), {"finding": "Edema"})
    assert baseline(cohort, films, kept, "none") == (None, "")
    with pytest.raises(GanError, match="no GAN in"):
        load_gan(kept)


def test_a_gan_is_trained_once_though_its_folder_is_cleared(cohort, films, tmp_path, monkeypatch):
    small = lambda name, heads, **given: build_classifier("test_resnet", heads, **given)  # noqa: E731
    monkeypatch.setattr(j, "build_classifier", small)
    made, build = tmp_path / "run" / "baseline", lambda size, seed: build_gan(size, 4, seed)
    monkeypatch.setattr(j, "build_gan", build)
    first, finding = baseline(cohort, films, made, "train")
    assert finding == load_gan(made)[1]["finding"] == j.DEVICES
    shutil.rmtree(made)
    updates, fit = [], j.fit_gan
    monkeypatch.setattr(j, "fit_gan", lambda *a, **k: updates.extend(fit(*a, **k)) or updates)
    again, _ = baseline(cohort, films, made, "train")
    assert updates == []
    assert torch.equal(weights(first), weights(again))


@pytest.mark.parametrize("shown", [np.nan, 0.0, 1.0])
def test_no_gan_is_trained_on_films_of_one_kind(cohort, films, tmp_path, caplog, shown):
    table = cohort.table.assign(**{j.DEVICES: shown})
    one_kind, kept = SimpleNamespace(**vars(cohort) | {"table": table}), tmp_path / "baseline"
    save_gan(kept, build_gan(32, 4), {"finding": "Edema"})
    assert baseline(one_kind, films, kept, "train") == (None, "")
    assert "no GANterfactual is trained" in caplog.text
    assert not (kept / "card.json").exists()


def test_heads_come_in_the_right_order(films, tmp_path):
    model = build_classifier("test_resnet", len(j.HEADS)).eval()
    ask = j.asker(model, {"heads": list(reversed(j.HEADS))})
    with torch.inference_mode():
        plain = model(torch.from_numpy(films)).sigmoid().numpy()
    np.testing.assert_allclose(ask(films), plain[:, ::-1], atol=1e-5)
    half = j.asker(model, {"heads": list(reversed(j.HEADS))}, "bf16")(films)
    assert 0 < np.abs(half - plain[:, ::-1]).max() < 0.03
