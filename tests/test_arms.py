"""Arms: equal budgets, groups, training that is kept, and the same numbers in any process."""

import typing
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from prism_nb import arms as a
from prism_nb import params
from prism_nb.classifiers import build_classifier, load_classifier, save_classifier
from prism_nb.findings import PAPER_HEADS

HEADS = list(PAPER_HEADS)
COLUMNS = [HEADS.index("Pleural Effusion"), HEADS.index("Support Devices")]
OWN = ("text_to_image", "gan_counterfactuals", "counterfactuals", "true_counterfactuals")


def films(num, value, heads=4):
    """Films whose grey value says where they come from; of two labels all four pairs occur."""
    labels = np.zeros((num, heads), dtype=np.float32)
    labels[:, 0], labels[:, -1] = np.arange(num) % 2, np.arange(num) // 2 % 2
    return np.full((num, 4, 4), value, dtype=np.uint8), labels


REAL = films(10, 10)
GROUPS = a.group_of(REAL[1], COLUMNS)
EXTRA = {arm: films(6, 20 + number) for number, arm in enumerate(OWN)}
EXTRA["counterfactuals_filtered"] = films(2, 30)


def built(name, budget=6, extra=EXTRA, seed=0):
    return a.build_arm(name, *REAL, budget, extra, GROUPS, seed)


def test_the_parameter_knows_all_arms():
    assert typing.get_args(params.Arm) == tuple(a.ARMS)
    assert params.validate("06_augment", {"arms": list(a.ARMS)}).arms == list(a.ARMS)
    for wrong in (["plain"], ["plain", "plain", "counterfactuals"]):
        with pytest.raises(params.ParamError, match="plain and counterfactuals among them"):
            params.validate("06_augment", {"arms": wrong})


def test_arms_have_equal_budgets():
    sizes = {name: len(built(name)[0]) for name in a.ARMS}
    assert sizes == {name: 10 if name == "plain" else 16 for name in a.ARMS}
    for name, (own, _) in EXTRA.items():
        images, labels = built(name)
        assert np.array_equal(images[:10], REAL[0])
        assert (images[10:] == own[0, 0, 0]).all()
        assert labels.shape == (16, 4)
    for name in ("duplicates", "standard_augmentation", *a.BALANCED):
        assert (built(name)[0] == 10).all()


def test_the_budget_is_all_counterfactuals_or_fewer_in_pairs():
    assert a.budget_of(EXTRA) == 6
    assert a.budget_of(EXTRA, 4) == 4
    kept = [built(arm, 4, seed=3)[1][10:] for arm in ("counterfactuals", "true_counterfactuals")]
    assert np.array_equal(*kept)  # the same edits
    assert np.array_equal(built("counterfactuals")[1][10:], EXTRA["counterfactuals"][1])
    for extra, wanted, words in (
        (EXTRA, 7, "augment_budget is 7 and there are 6 counterfactuals"),
        ({}, 0, "no counterfactuals of training films: raise num_train_films"),
        ({"counterfactuals": films(0, 20)}, 3, "no counterfactuals"),
    ):
        with pytest.raises(a.AugmentError, match=words) as error:
            a.budget_of(extra, wanted)
        assert "\n" not in str(error.value)


def test_duplicates_repeat_every_film_before_any_twice():
    images = np.arange(5, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), dtype=np.uint8)
    arm, _ = a.build_arm("duplicates", images, np.zeros((5, 1)), 12, seed=1)
    times = np.bincount(arm[:, 0, 0])
    assert (times.sum(), times.min(), times.max()) == (17, 3, 4)
    again, _ = a.build_arm("duplicates", images, np.zeros((5, 1)), 12, seed=1)
    assert np.array_equal(arm, again)


def test_groups_and_their_balance():
    labels = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [np.nan, 1]])
    assert a.group_of(labels, (0, 1)).tolist() == [0, 1, 2, 3, -1]
    labels = np.repeat(labels, (9, 3, 1, 7, 5), axis=0).astype(np.float32)
    images = np.arange(25, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), dtype=np.uint8)
    groups = a.group_of(labels, (0, 1))
    shown, balanced = a.build_arm("group_balanced", images, labels, 5, groups=groups)
    assert np.bincount(a.group_of(balanced, (0, 1))).tolist() == [8, 8, 7, 7]
    assert len(np.unique(shown[:, 0, 0][a.group_of(balanced, (0, 1)) == 0])) == 8  # none twice
    with pytest.raises(a.AugmentError, match="all four groups, and they hold 9, 3, 0, 7"):
        a.build_arm("group_dro", images, labels, 5, groups=np.where(groups == 2, -1, groups))


@pytest.mark.parametrize(
    ("name", "extra", "words"),
    [
        ("counterfactual", EXTRA, "nearest is 'counterfactuals'"),
        ("counterfactuals", {}, "no films of its own"),
        ("true_counterfactuals", {"true_counterfactuals": films(0, 20)}, "no films of its own"),
        ("counterfactuals", {"counterfactuals": films(6, 20, 3)}, "with 3 labels"),
        ("counterfactuals", {"counterfactuals": (REAL[0] / 255, REAL[1])}, "float64"),
        ("counterfactuals", {"counterfactuals": (REAL[0], REAL[1][:4])}, "are needed"),
    ],
)
def test_arms_that_cannot_be_built_are_one_line(name, extra, words):
    with pytest.raises(a.AugmentError) as error:
        built(name, extra=extra)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_no_real_films_are_refused():
    with pytest.raises(a.AugmentError, match="no real films"):
        a.build_arm("plain", *films(0, 10), 0)


@pytest.fixture(scope="module")
def task():
    """A small task of noise: what train_arms takes, but for folder and device."""
    rng = np.random.default_rng(0)
    shown = rng.integers(0, 255, (26, 32, 32)).astype(np.uint8)
    labels = np.tile(films(4, 0)[1], (7, 1))[:26]
    settings = SimpleNamespace(
        classifier="test_efficientnet",
        classifier_weights="",
        classifier_size=0,
        classifier_epochs=2,
        classifier_batch_size=8,
        classifier_learning_rate=5e-3,
        num_augment_seeds=2,
        augment_budget=0,
        augment_workers=0,
        seed=3,
    )
    extra = {"counterfactuals": (shown[:5], labels[:5])}
    tests = {"i.i.d.": shown[16:22], "balanced": shown[22:]}
    return (shown[:14], labels[:14]), extra, tests, HEADS, COLUMNS, settings


ARMS = ["plain", "counterfactuals"]


def train(arms, task, folder, **changed):
    settings = SimpleNamespace(**vars(task[-1]) | changed)
    return list(a.train_arms(arms, *task[:-1], settings, folder))


@pytest.fixture(scope="module")
def trained(task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("arms")
    return folder, train(ARMS, task, folder)


def test_arms_train_for_the_same_steps(task, tmp_path, monkeypatch):
    steps = []

    def fake(model, *args, **settings):
        steps.append(settings["num_steps"])
        model.image_size = 32
        yield

    monkeypatch.setattr(a, "fit", fake)
    train(["plain", "duplicates", "counterfactuals"], task, tmp_path)
    assert steps == [2 * 3] * 6  # 14 + 5 films in batches of 8


def test_an_outcome_an_arm_and_seed_with_its_classifier(task, trained):
    folder, outcomes = trained
    assert [(o.arm, o.seed) for o in outcomes] == [(arm, seed) for seed in (3, 4) for arm in ARMS]
    first = outcomes[0]
    assert {name: q.shape for name, q in first.probabilities.items()} == {
        "i.i.d.": (6, 4),
        "balanced": (4, 4),
    }
    model, card = load_classifier(first.folder)
    assert first.folder == folder / "plain-3"
    assert (card["role"], card["training_films"]) == ("arm plain", 14)
    with a._one_thread():
        assert np.array_equal(
            a.predict(model, task[2]["balanced"]), first.probabilities["balanced"]
        )
    assert not np.array_equal(*(o.probabilities["balanced"] for o in outcomes[:2]))


def test_what_is_trained_is_read_and_what_changed_is_trained_anew(task, trained, monkeypatch):
    folder, outcomes = trained
    (folder / "plain-4" / a.PROBABILITIES_FILE).unlink()
    jobs = []
    monkeypatch.setattr(a, "train_job", lambda job: jobs.append((job.arm, job.seed)))
    again = [o for o in train(ARMS, task, folder) if o]
    assert jobs == [("plain", 4)]
    for old, new in zip((outcomes[0], outcomes[1], outcomes[3]), again, strict=True):
        assert (old.arm, old.seed, old.seconds) == (new.arm, new.seed, new.seconds)
        assert all(np.array_equal(q, new.probabilities[k]) for k, q in old.probabilities.items())
    jobs.clear()
    real, extra, *rest = task
    other = {"counterfactuals": (extra["counterfactuals"][0] + 1, extra["counterfactuals"][1])}
    train(ARMS, (real, other, *rest), folder, num_augment_seeds=1)
    assert jobs == [("counterfactuals", 3)]
    jobs.clear()
    train(ARMS, task, folder, classifier_epochs=3, num_augment_seeds=1)
    assert jobs == [("plain", 3), ("counterfactuals", 3)]


def test_other_start_weights_are_another_training(task, tmp_path):
    weights, (*given, settings) = tmp_path / "start", task

    def keys(seed):
        save_classifier(weights, build_classifier("test_efficientnet", 4, seed=seed), HEADS)
        for path in (weights, weights / "model.safetensors"):
            own = SimpleNamespace(**vars(settings) | {"classifier_weights": str(path)})
            yield a._jobs(ARMS, *given, own, tmp_path, "cpu")[0].key

    first, other = list(keys(0)), list(keys(1))
    assert first[0] == first[1]  # one file, under either name
    assert other[0] == other[1] != first[0]


def test_two_processes_give_the_same_numbers_as_one(task, trained, tmp_path):
    parallel = train(ARMS, task, tmp_path, augment_workers=2, num_augment_seeds=1)
    parallel = {o.arm: o.probabilities for o in parallel}
    assert set(parallel) == set(ARMS)
    for outcome in trained[1][:2]:
        for name, q in outcome.probabilities.items():
            assert np.array_equal(q, parallel[outcome.arm][name])


def test_group_losses_are_means_over_the_known_of_each_group():
    logits, labels = torch.zeros(3, 2), torch.tensor([[1, 0], [0, torch.nan], [1, 1]])
    losses = a._group_losses(logits, labels, torch.tensor([0, 0, 3]))
    half = np.log(2)  # -log(1/2), whatever the label
    assert np.allclose(losses, [[half, half], [0, 0], [0, 0], [half, half]])


def test_group_dro_leans_on_the_cue_that_serves_the_worst_group():
    """Bright left: always right but faint. Bright right, strong: the shortcut, wrong in a tenth."""
    rng = np.random.default_rng(0)
    labels = np.zeros((200, 2), np.float32)
    labels[:, 0] = rng.integers(0, 2, 200)
    labels[:, 1] = np.where(rng.random(200) < 0.1, 1 - labels[:, 0], labels[:, 0])
    images = rng.integers(90, 110, (200, 32, 32)).astype(np.uint8)
    images[labels[:, 0] == 1, :, :16] += 20
    images[labels[:, 1] == 1, :, 16:] += 120
    groups = a.group_of(labels, (0, 1))
    recipe, worst = {"batch_size": 16, "rate": 5e-3, "steps": 40}, {}
    for name in ("plain", "group_dro"):
        shown, known = a.build_arm(name, images, labels, 40, groups=groups)
        model = build_classifier("test_efficientnet", 2, seed=1)
        if name == "plain":
            rates = 1, recipe["batch_size"], recipe["rate"]
            list(
                a.fit(model, shown, known, shown[:0], known[:0], *rates, num_steps=recipe["steps"])
            )
        else:
            a.fit_group_dro(model, shown, known, (0, 1), recipe)
        right = (a.predict(model, images)[:, 0] >= 0.5) == (labels[:, 0] == 1)
        worst[name] = min(right[groups == g].mean() for g in range(4))
    assert worst["group_dro"] >= max(worst["plain"], 0.7)
