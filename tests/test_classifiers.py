"""Classifiers: training, scores and the folder on disk, on films with a bright square or none."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from prism_nb import classifiers as c

HEADS = ["Pleural Effusion", "Support Devices"]


def squares(num, seed):
    """Noisy films; head 0: a bright square somewhere, head 1: a bright edge."""
    rng = np.random.default_rng(seed)
    films = rng.normal(90, 12, (num, 32, 32))
    labels = rng.integers(0, 2, (num, 2)).astype(np.float32)
    for film, (square, edge) in zip(films, labels, strict=True):
        row, column = rng.integers(0, 22, 2)
        film[row : row + 10, column : column + 10] += 90 * square
        film[:, :3] += 90 * edge
    return films.clip(0, 255).astype(np.uint8), labels


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small films: a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained():
    model = c.build_classifier("test_efficientnet", 2)
    epochs = list(c.fit(model, *squares(192, 0), *squares(64, 1), epochs=6))
    return model, epochs


def weights(model):
    return torch.cat([value.flatten().float() for value in model.state_dict().values()])


def brief(num_films=24, seed=0, build_seed=0, **settings):
    """A model after a few steps."""
    model = c.build_classifier("test_efficientnet", 2, seed=build_seed)
    films = squares(num_films, 2)
    list(c.fit(model, *films, *squares(8, 3), epochs=2, batch_size=8, seed=seed, **settings))
    return model


def test_an_easy_task_is_learned(trained):
    model, epochs = trained
    films, labels = squares(128, 9)
    table = c.score_heads(labels, c.predict(model, films), np.arange(128), HEADS, num_bootstrap=100)
    assert (table["auroc"] > 0.95).all()
    assert (table["accuracy"] > table["majority"] + 0.2).all()
    assert [e.epoch for e in epochs] == [1, 2, 3, 4, 5, 6]
    assert epochs[-1].step == 72
    assert epochs[-1].loss < epochs[0].loss


def test_best_weights_are_restored():
    model = c.build_classifier("test_efficientnet", 2)
    kept, best = None, np.inf
    val = squares(16, 3)
    rate = 0.05  # so high that the last epoch is seldom the best
    for epoch in c.fit(model, *squares(32, 2), *val, epochs=5, batch_size=8, learning_rate=rate):
        assert epoch.best == (epoch.val_loss < best)
        if epoch.best:
            kept, best = weights(model), epoch.val_loss
    assert torch.equal(weights(model), kept)
    logits = torch.from_numpy(c.logits_of(model, val[0]))
    assert c.masked_loss(logits, torch.from_numpy(val[1])).item() == pytest.approx(best)
    assert not model.training


def test_stopping_early_keeps_the_best_weights():
    model = c.build_classifier("test_efficientnet", 2)
    run = c.fit(model, *squares(16, 2), *squares(8, 3), epochs=3, batch_size=8)
    next(run)
    first = weights(model)
    run.close()
    assert torch.equal(weights(model), first)


def test_patience_stops_training():
    films, labels = squares(16, 2)
    model = c.build_classifier("test_efficientnet", 2)
    wrong = films, 1 - labels  # validation gets worse as training gets better
    epochs = list(c.fit(model, films, labels, *wrong, epochs=30, batch_size=8, patience=2))
    assert len(epochs) < 30
    assert not any(e.best for e in epochs[-2:])


def test_same_seed_same_weights_and_global_randomness_left_alone():
    state = torch.get_rng_state()
    one, same, other = brief(), brief(), brief(seed=1)
    assert torch.equal(weights(one), weights(same))
    assert not torch.equal(weights(one), weights(other))
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_is_seeded_and_mild():
    assert torch.equal(weights(brief(augment=True)), weights(brief(augment=True)))
    films = torch.from_numpy(squares(8, 0)[0])
    moved = c.jitter(films, torch.Generator().manual_seed(0))
    assert moved.shape == films.shape
    assert 0 <= moved.min() <= moved.max() <= 1
    assert 0 < (moved - films / 255).abs().mean() < 0.15


def test_num_steps_is_kept_whatever_the_number_of_films():
    steps = []
    for num in (16, 40):
        model = c.build_classifier("test_efficientnet", 2)
        run = c.fit(model, *squares(num, 2), *squares(8, 3), epochs=3, batch_size=8, num_steps=7)
        steps.append([epoch.step for epoch in run])
    assert steps == [[2, 4, 7], [2, 4, 7]]


def test_missing_labels_have_no_gradient():
    logits = torch.randn(4, 3, requires_grad=True)
    labels = torch.tensor([[1, torch.nan, 0], [torch.nan] * 3, [0, torch.nan, 1], [1, 1, 1.0]])
    c.masked_loss(logits, labels).backward()
    assert torch.equal(logits.grad == 0, labels.isnan())
    logits.grad = None
    loss = c.masked_loss(logits, torch.full((4, 3), torch.nan))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_head_without_labels_is_not_trained():
    films, labels = squares(16, 2)
    labels[:, 1] = np.nan
    model = c.build_classifier("test_efficientnet", 2)
    before = model.network.get_classifier().weight.detach().clone()
    fit = c.fit(model, films, labels, films, labels, epochs=1, batch_size=8, weight_decay=0.0)
    assert np.isfinite(next(fit).val_loss)
    after = model.network.get_classifier().weight.detach()
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0], after[0])


def test_one_class_validation_has_no_auroc_and_none_at_all_no_loss():
    films, labels = squares(16, 2)
    model = c.build_classifier("test_efficientnet", 2)
    one = next(c.fit(model, films, labels, films, np.ones_like(labels), epochs=1, batch_size=8))
    assert np.isnan(one.val_auroc)
    assert np.isfinite(one.val_loss)
    none = list(c.fit(model, films, labels, films[:0], labels[:0], epochs=2, batch_size=8))
    assert all(np.isnan(epoch.val_loss) and epoch.best for epoch in none)


def test_loss_that_is_no_number_stops_with_the_best_weights_or_raises(monkeypatch, caplog):
    sane, calls = c.masked_loss, []

    def breaks(logits, labels):
        calls.append(1)
        return sane(logits, labels) * (torch.nan if len(calls) > 3 else 1)

    settings = {"epochs": 3, "batch_size": 8}  # 2 steps and 1 validation an epoch
    monkeypatch.setattr(c, "masked_loss", breaks)
    model = c.build_classifier("test_efficientnet", 2)
    epochs = list(c.fit(model, *squares(16, 2), *squares(8, 3), **settings))
    assert len(epochs) == 1
    assert torch.isfinite(weights(model)).all()
    assert "lower the learning rate (0.005)" in caplog.text
    calls.clear()
    with pytest.raises(c.ClassifierError, match="after step 4 of 6"):
        list(c.fit(model, *squares(16, 2), *squares(8, 3), **settings, on_bad="raise"))
    with pytest.raises(c.ClassifierError, match="after step 2 of 6"):
        list(c.fit(model, *squares(16, 2), *squares(8, 3), **settings))


def test_temperature_calibrates_and_changes_no_decision(trained):
    model, _ = trained
    films, labels = squares(64, 5)
    flipped = labels.copy()
    flipped[::4] = 1 - flipped[::4]  # a quarter of the answers is wrong: it was too sure
    before = c.predict(model, films)
    try:
        assert c.fit_temperature(model, films, flipped) > 1.5
        after = c.predict(model, films)
    finally:
        model.temperature = 1.0
    assert np.array_equal(before >= 0.5, after >= 0.5)
    people = np.arange(64)
    ece = [c.score_heads(flipped, p, people, HEADS, 0)["ece"].mean() for p in (before, after)]
    assert ece[1] < ece[0]


def test_scores_agree_with_scikit_learn_and_torchmetrics():
    from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score
    from torchmetrics.functional.classification import binary_calibration_error

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (80, 2)).astype(np.float32)
    p = np.round((labels * 0.3 + rng.random((80, 2)) * 0.7), 1).astype(np.float32)  # with ties
    labels[:20, 1] = np.nan
    table = c.score_heads(labels, p, np.arange(80) // 2, HEADS, num_bootstrap=300)
    for column, row in enumerate(table.to_dict("records")):
        known = ~np.isnan(labels[:, column])
        y, q = labels[known, column], p[known, column]
        assert row["n"] == known.sum()
        assert row["positives"] == y.sum()
        assert row["majority"] == pytest.approx(max(y.mean(), 1 - y.mean()))
        assert row["accuracy"] == pytest.approx(((q >= 0.5) == y).mean())
        assert row["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, q >= 0.5))
        assert row["auroc"] == pytest.approx(roc_auc_score(y, q))
        assert row["auprc"] == pytest.approx(average_precision_score(y, q))
        ece = binary_calibration_error(torch.tensor(q), torch.tensor(y).long(), n_bins=15)
        assert row["ece"] == pytest.approx(ece.item(), abs=1e-5)
        for name in c.SCORES:
            assert row[f"{name}_low"] < row[f"{name}_high"]
            assert name == "ece" or row[f"{name}_low"] < row[name] < row[f"{name}_high"]


def test_resampled_scores_are_the_scores_of_the_resample(monkeypatch):
    from sklearn import metrics as reference

    rng = np.random.default_rng(1)
    y, p = rng.integers(0, 2, 60).astype(np.float32), (rng.integers(0, 8, 60) + 0.5) / 8
    counts = rng.integers(0, 4, (1, 20)).astype(float)
    monkeypatch.setattr(c, "resample_patients", lambda *_: [counts])
    patients = np.array([f"p{number:02d}" for number in np.arange(60) // 3])
    (row,) = c.score_heads(y[:, None], p[:, None], patients, ["one"]).to_dict("records")
    weights = {"sample_weight": counts[0][np.arange(60) // 3]}
    expected = {
        "accuracy": reference.accuracy_score(y, p >= 0.5, **weights),
        "balanced_accuracy": reference.balanced_accuracy_score(y, p >= 0.5, **weights),
        "auroc": reference.roc_auc_score(y, p, **weights),
        "auprc": reference.average_precision_score(y, p, **weights),
    }
    for name, value in expected.items():
        assert row[f"{name}_low"] == row[f"{name}_high"] == pytest.approx(value), name
    drawn = np.repeat(np.arange(60), weights["sample_weight"].astype(int))
    again = c.score_heads(y[drawn, None], p[drawn, None], patients[drawn], ["one"], 0)
    assert row["ece_low"] == pytest.approx(again["ece"][0])


def test_heads_with_one_class_or_no_film_are_nan_not_an_error():
    labels = np.column_stack([np.ones(6), np.full(6, np.nan)]).astype(np.float32)
    table = c.score_heads(labels, np.full((6, 2), 0.7), list("aabbcc"), HEADS, num_bootstrap=20)
    one, none = table.to_dict("records")
    assert (one["accuracy"], one["majority"], one["n"]) == (1.0, 1.0, 6)
    assert (none["n"], none["positives"]) == (0, 0)
    for name in ("auroc", "auprc", "balanced_accuracy", "auroc_low"):
        assert np.isnan(one[name]), name
    assert np.isnan([none["accuracy"], none["majority"], none["ece"], none["auroc_high"]]).all()


def test_a_class_absent_from_a_split_is_one_line():
    labels = np.array([[1, 0, np.nan], [1, 1, np.nan]], np.float32)
    lines = c.one_sided(labels, ["a", "b", "c"], "test")
    assert lines == [
        "a has one class in the test split (all 2 labels are 1): no AUROC",
        "c has one class in the test split (no label): no AUROC",
    ]
    assert c.one_sided(labels[:, 1:2], ["b"], "train") == []


def test_scores_refuse_shapes_that_differ():
    with pytest.raises(c.ClassifierError, match="do not fit 5 patients and 2 heads"):
        c.score_heads(np.ones((4, 2)), np.ones((4, 2)), list("abcde"), HEADS)


def test_saved_classifier_predicts_the_same(trained, tmp_path):
    model, _ = trained
    films, _ = squares(16, 7)
    model.temperature = 1.7
    c.save_classifier(tmp_path / "judge", model, HEADS, {"role": "judge"})
    loaded, card = c.load_classifier(tmp_path / "judge")
    assert np.array_equal(c.predict(model, films), c.predict(loaded, films))
    assert card["heads"] == HEADS
    assert (card["role"], card["image_size"], card["temperature"]) == ("judge", 32, 1.7)
    model.temperature = 1.0
    with pytest.raises(c.ClassifierError, match="1 heads named"):
        c.save_classifier(tmp_path / "judge", model, HEADS[:1])


def test_a_judge_says_what_it_learned_from_and_judges_nothing_of_it(trained, tmp_path):
    keys = c.film_keys(["a", "b"], "phantom 1")
    assert keys != c.film_keys(["a", "b"], "phantom 2")
    c.save_classifier(tmp_path, trained[0], HEADS, {"role": "judge", "trained_on": keys})
    card = c.load_classifier(tmp_path)[1]
    c.check_judge(card, c.film_keys(["c"], "phantom 1"))
    c.check_judge(card, c.film_keys(["a"], "phantom 2"))
    with pytest.raises(c.ClassifierError, match="trained on 1 of the 2 films that it is to judge"):
        c.check_judge(card, c.film_keys(["b", "c"], "phantom 1"))
    for other in ({"role": "pupil", "trained_on": []}, {"role": "judge"}, {}):
        with pytest.raises(c.ClassifierError, match="only a judge") as error:
            c.check_judge(other, keys)
        assert "\n" not in str(error.value)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(c.ClassifierError, match="are a judge's"):
            c.build_classifier("test_efficientnet", 2, weights=str(path))


def test_features_are_what_the_last_layer_is_given(trained):
    model, films = trained[0], squares(5, 0)[0]
    features = c.features_of(model, films, batch_size=2)
    last = model.network.get_classifier()
    logits = torch.from_numpy(features) @ last.weight.T + last.bias
    assert np.allclose(logits.detach() / model.temperature, c.logits_of(model, films), atol=1e-5)
    assert c.features_of(model, films[:0]).shape == (0, features.shape[1])


def test_damaged_and_missing_classifiers_are_one_line(trained, tmp_path):
    with pytest.raises(c.ClassifierError, match="run 05_evaluate"):
        c.load_classifier(tmp_path)
    c.save_classifier(tmp_path, trained[0], HEADS)
    whole = (tmp_path / "model.safetensors").read_bytes()
    card = (tmp_path / "card.json").read_text()
    broken = [
        (whole[: len(whole) // 2], card),
        (b"", card),
        (whole, "{"),
        (whole, "{}"),
        (whole, card.replace("test_efficientnet", "test_resnet")),
        (whole, card.replace(HEADS[0], f'{HEADS[0]}", "more')),
    ]
    for data, text in broken:
        (tmp_path / "model.safetensors").write_bytes(data)
        (tmp_path / "card.json").write_text(text)
        with pytest.raises(c.ClassifierError, match="is damaged") as error:
            c.load_classifier(tmp_path)
        assert "\n" not in str(error.value)


def test_weights_from_a_path_take_all_but_the_last_layer(trained, tmp_path):
    model, _ = trained
    c.save_classifier(tmp_path, model, HEADS)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        start = c.build_classifier("test_efficientnet", 4, weights=str(path))
        assert torch.equal(start.network.conv_stem.weight, model.network.conv_stem.weight)
        assert c.predict(start, squares(4, 0)[0]).shape == (4, 4)


def test_weights_that_cannot_be_had_are_one_line(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 100)
    c.save_classifier(tmp_path / "other", c.build_classifier("test_resnet", 2), HEADS)
    for weights in ("imagenet", tmp_path / "bad.safetensors", tmp_path / "other"):
        with pytest.raises(c.ClassifierError, match=r"cannot be had .*train from scratch") as error:
            c.build_classifier("test_efficientnet", 2, weights=str(weights))
        assert "\n" not in str(error.value)
    for weights in (tmp_path / "none.safetensors", tmp_path / "model.pth", "imagnet"):
        with pytest.raises(c.ClassifierError, match="is no file"):
            c.build_classifier("test_efficientnet", 2, weights=str(weights))


def test_unknown_architecture_names_the_nearest():
    with pytest.raises(c.ClassifierError, match="'efficientnet_b0'"):
        c.build_classifier("efficentnet_b0", 2)


def test_alexnet_takes_grey_films(tmp_path):
    model = c.build_classifier("alexnet", 1)
    films = np.zeros((2, 64, 64), dtype=np.uint8)
    assert c.predict(model, films).shape == (2, 1)
    with pytest.raises(c.ClassifierError, match="needs 63 or more"):
        c.predict(model, films[:, :32, :32])
    model.sees = 32
    with pytest.raises(c.ClassifierError, match="seen at 32 pixels; alexnet needs 63 or more"):
        c.predict(model, films)


def test_unusable_films_and_labels_are_refused(trained):
    model, _ = trained
    films, labels = squares(8, 0)
    for bad in (films / 255, films[0], films[:, :16], films[..., None]):
        with pytest.raises(c.ClassifierError, match=r"uint8 \(N, size, size\) is needed"):
            c.predict(model, bad)
    with pytest.raises(c.ClassifierError, match="trained at 32"):
        c.predict(model, np.zeros((2, 64, 64), dtype=np.uint8))
    for bad in (labels[:4], labels[:, :1], np.where(labels == 1, -1, 0)):
        with pytest.raises(c.ClassifierError, match="labels"):
            next(c.fit(model, films, bad, films, labels))
    with pytest.raises(c.ClassifierError, match="at least 2"):
        next(c.fit(model, films[:1], labels[:1], films, labels))
    assert c.predict(model, films[:0]).shape == (0, 2)


def test_gradients_reach_films_given_as_floats(trained):
    films = (torch.from_numpy(squares(2, 0)[0]) / 255).requires_grad_()
    trained[0](films)[:, 0].sum().backward()
    assert films.grad.abs().sum() > 0


def test_metrics_need_no_torch():
    script = "import sys, prism_nb.metrics, prism_nb.geometry; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
