"""GANterfactual: losses, exact resumption, translation at other sizes, and a task it learns."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from prism_nb import ganterfactual as g
from prism_nb.checkpoints import newest_first
from prism_nb.classifiers import ClassifierError, build_classifier, fit, predict
from prism_nb.diffusion import weights_hash


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small films: a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def squares(num, seed, size=32):
    """Noisy films (2, num, size, size): without a bright square, and others with one."""
    rng = np.random.default_rng(seed)
    films = rng.normal(90, 12, (2, num, size, size))
    for film in films[1]:
        row, column = rng.integers(0, size - 10, 2)
        film[row : row + 10, column : column + 10] += 90
    return films.clip(0, 255).astype(np.uint8)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


class Same(nn.Module):
    """A generator that changes nothing."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(1, 1, 1)  # where translate looks for the device

    def forward(self, x):
        return x


@pytest.fixture(scope="module")
def guide():
    """A small classifier that knows the square; its head 1 is the finding."""
    films, labels = np.concatenate(squares(64, 0)), np.repeat([[1, 0], [0, 1]], 64, axis=0)
    model = build_classifier("test_efficientnet", 2)
    list(fit(model, films, labels, films, labels, epochs=5))
    return model


def tiny(seed=0):
    return g.build_gan(32, 4, seed)


def brief(gan=None, num_steps=6, films=None, **settings):
    """A GAN after a few steps, and what it said of them."""
    gan = gan or tiny()
    films = squares(5, 1) if films is None else films
    settings = {"batch_size": 2, "pool_size": 3, "num_steps": num_steps} | settings
    return gan, list(g.fit_gan(gan, *films, **settings))


def test_generators_keep_shape_and_range_and_the_seed_decides_them():
    gan, x = tiny(), torch.rand(2, 1, 64, 64) * 2 - 1
    made = gan.to_present(x)
    assert made.shape == x.shape
    assert made.abs().max() < 1
    assert gan.discriminators["absent"](x).shape == (2, 1, 7, 7)
    assert weights_hash(gan) == weights_hash(tiny()) != weights_hash(tiny(seed=1))


def test_losses_meet_their_closed_forms():
    gan = tiny()
    gan.to_absent = gan.to_present = Same()
    constant = nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 1))
    nn.init.zeros_(constant[1].weight)
    nn.init.constant_(constant[1].bias, 0.25)
    gan.discriminators["absent"] = gan.discriminators["present"] = constant
    x, y = torch.rand(2, 3, 1, 32, 32)
    (adversarial, cycle, identity), (absent, present) = g.generator_losses(gan, x, y)
    assert (cycle, identity) == (0, 0)
    assert adversarial.item() == pytest.approx(2 * 0.75**2)
    assert torch.equal(absent, y)
    assert torch.equal(present, x)
    loss = g.discriminator_loss(gan, x, y, absent, present)
    assert loss.item() == pytest.approx(2 * (0.75**2 + 0.25**2))


def test_the_guide_is_asked_for_the_other_class():
    def brightness(films):  # (B, S, S) in [0, 1] to logits of two heads
        return torch.stack([films.mean((1, 2)), 20 * films.mean((1, 2)) - 10], dim=1)

    dark, bright = -torch.ones(2, 1, 32, 32), torch.ones(2, 1, 32, 32)
    assert g.guide_loss(brightness, 1, dark, bright) < 1e-6
    assert g.guide_loss(brightness, 1, bright, dark) == pytest.approx(2, abs=1e-3)
    assert g.guide_loss(brightness, 0, dark, dark) == pytest.approx(2 * 0.25)


def test_the_pool_fills_and_then_gives_back_earlier_films():
    rng, pool = np.random.default_rng(0), torch.zeros(3, 1, 2, 2)
    films = torch.arange(1.0, 41).reshape(10, 4, 1, 1, 1).expand(10, 4, 1, 2, 2)
    shown = torch.stack([g.exchange(pool, part, 4 * k, rng) for k, part in enumerate(films)])
    assert torch.equal(shown[0, :3], films[0, :3])
    earlier = shown[:, :, 0, 0, 0] < films[:, :, 0, 0, 0]
    assert 0.25 < earlier.float().mean() < 0.7
    values = torch.cat([shown[:, :, 0, 0, 0].flatten(), pool[:, 0, 0, 0]])
    assert sorted(values.tolist())[:3] != [1, 1, 1]
    assert set(values.tolist()) == set(range(1, 41))  # none is lost
    none = torch.zeros(0, 1, 2, 2)
    assert torch.equal(g.exchange(none, films[0], 0, rng), films[0])


@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (48, 80), (20, 20)])
def test_a_generator_that_changes_nothing_gives_films_back_exactly(shape):
    gan, films = tiny(), noise(3, *shape)
    gan.to_absent = Same()
    assert np.array_equal(g.translate(gan, films, present=False, batch_size=2), films)


def test_translation_adds_the_change_made_at_the_size_of_the_gan():
    gan = tiny()
    films = noise(5, 32, 32)
    with torch.no_grad():
        direct = (gan.to_present(g.to_sd(films))[:, 0] + 1) / 2
    assert np.array_equal(g.translate(gan, films, True, batch_size=2), g.unit_to_uint8(direct))
    assert not np.array_equal(g.translate(gan, films, False), g.translate(gan, films, True))
    large = np.full((1, 64, 64), 100, np.uint8)
    large[:, ::2] += 2  # detail that is not there at 32 pixels
    change = g.translate(gan, large, True).astype(int) - large
    small = g.resize(large, 32)
    at_32 = (g.translate(gan, small, True).astype(int) - small).repeat(2, 1).repeat(2, 2)
    assert np.corrcoef(change.ravel(), at_32.ravel())[0, 1] > 0.9
    assert g.translate(gan, films[:0], True).shape == (0, 32, 32)


def test_films_are_averaged_where_they_shrink():
    films = np.zeros((70, 64, 64), np.uint8)
    films[:, ::2, ::2] = 200
    small = g.resize(films, 32)
    assert small.shape == (70, 32, 32)
    assert np.ptp(small[:, 4:-4, 4:-4].astype(int)) <= 1
    assert small.mean() == pytest.approx(50, abs=1)
    assert g.resize(small, 32) is small
    assert g.resize(films[:0], 32).shape == (0, 32, 32)


def test_training_ends_the_same_whatever_happens_on_the_way(tmp_path, guide):
    settings = {"guide": guide, "head": 1, "num_steps": 7, "checkpoint_every": 2}
    whole, steps = brief(**settings)
    gan = tiny()
    training = g.fit_gan(
        gan, *squares(5, 1), batch_size=2, pool_size=3, folder=tmp_path, **settings
    )
    first = [next(training) for _ in range(5)]
    training.close()
    assert weights_hash(gan) == weights_hash(tiny())  # stopped early: as it was given
    gan, rest = brief(gan, folder=tmp_path, **settings)
    assert first[:4] + rest == steps
    assert weights_hash(gan) == weights_hash(whole)
    again, none = brief(folder=tmp_path, **settings)
    assert none == []
    assert weights_hash(again) == weights_hash(whole)
    assert all(weight.requires_grad for weight in guide.parameters())  # the caller's is its own


def test_another_training_does_not_go_on_from_this_one(tmp_path):
    brief(folder=tmp_path, num_steps=2)
    for change in ({"seed": 1}, {"films": squares(5, 2)}, {"cycle_weight": 5}, {"gan": tiny(1)}):
        assert [p.step for p in brief(folder=tmp_path, **{"num_steps": 2} | change)[1]] == [0, 1]


def test_the_rate_falls_to_zero_over_the_second_half():
    rates = [progress.learning_rate for progress in brief(num_steps=8, learning_rate=1e-3)[1]]
    assert rates == pytest.approx([1e-3] * 5 + [0.75e-3, 0.5e-3, 0.25e-3])


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(tmp_path):
    gan = tiny()
    with pytest.raises(g.GanError, match=r"not finite at step \d.*lower learning_rate") as error:
        brief(gan, num_steps=40, learning_rate=1e38, folder=tmp_path, checkpoint_every=1)
    assert "\n" not in str(error.value)
    assert weights_hash(gan) == weights_hash(tiny())
    assert newest_first(tmp_path)


def test_a_square_is_given_and_taken(guide):
    gan, films = g.build_gan(32, 8), squares(64, 3)
    settings = {"batch_size": 8, "learning_rate": 1e-3, "guide_weight": 4, "head": 1}
    steps = list(g.fit_gan(gan, *films, guide, num_steps=60, **settings))
    cycle = [progress.cycle_loss for progress in steps]
    assert np.mean(cycle[-10:]) < 0.5 * np.mean(cycle[:5])
    absent, present = squares(16, 4)
    before = [predict(guide, part)[:, 1].mean() for part in (absent, present)]
    given, taken = g.translate(gan, absent, True), g.translate(gan, present, False)
    after = [predict(guide, part)[:, 1].mean() for part in (given, taken)]
    assert after[0] > before[0] + 0.3
    assert after[1] < before[1] - 0.3


def test_saved_generators_come_back_in_half_precision(tmp_path):
    gan, films = tiny(), noise(4, 32, 32)
    g.save_gan(tmp_path, gan, {"finding": "Support Devices"})
    loaded, card = g.load_gan(tmp_path)
    assert card["finding"] == "Support Devices"
    assert (loaded.size, loaded.width) == (32, 4)
    for present in (False, True):
        off = g.translate(loaded, films, present).astype(int) - g.translate(gan, films, present)
        assert np.abs(off).max() <= 2
    assert all("discriminators" not in key for key in g.load_file(tmp_path / "model.safetensors"))


def test_what_cannot_be_loaded_is_one_line(tmp_path):
    with pytest.raises(g.GanError, match=r"no GAN in .*python -m prism_nb.ganterfactual"):
        g.load_gan(tmp_path)
    g.save_gan(tmp_path, tiny(), {})
    card = json.loads((tmp_path / "card.json").read_text())
    for change in ({"width": 6}, {"size": 33}, {"sha256": "0"}, {"size": None}):
        (tmp_path / "card.json").write_text(json.dumps(card | change))
        with pytest.raises(g.GanError, match=r"is damaged \(.*train it anew") as error:
            g.load_gan(tmp_path)
        assert "\n" not in str(error.value)


def test_unusable_requests_are_refused(guide):
    films = squares(4, 0)
    for size in (0, 16, 40, -32):
        with pytest.raises(g.GanError, match=f"size is {size}; a multiple of 16"):
            g.build_gan(size)
    for part, kind in ((0, "without"), (1, "with")):
        pair = [film[:0] if k == part else film for k, film in enumerate(films)]
        with pytest.raises(g.GanError, match=f"no film {kind} the finding"):
            brief(films=pair)
    with pytest.raises(g.GanError, match="uint8"):
        brief(films=films / 255)
    with pytest.raises(g.GanError, match="uint8"):
        g.translate(tiny(), films[0][0], True)
    for size, head in ((32, 2), (64, 1)):
        with pytest.raises(g.GanError, match=r"trained at 32 pixels with 2 heads; .* are asked"):
            brief(g.build_gan(size, 4), guide=guide, head=head)
    with pytest.raises(ClassifierError, match="needs 63 or more"):
        brief(guide=build_classifier("alexnet", 1))


def test_a_guide_of_another_finding_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(g, "build_classifier", lambda *_: build_classifier("test_resnet", 1))
    films = noise(8, 32, 32), np.tile([[0], [1]], (4, 1)).astype(np.float32)
    trained, fit = [], g.fit
    monkeypatch.setattr(g, "fit", lambda *given, **how: trained.append(1) or fit(*given, **how))
    for finding, times in (("Edema", 1), ("Edema", 1), ("Pleural Effusion", 2)):
        g.phantom_guide(tmp_path, finding, {"train": films, "val": films})
        assert len(trained) == times
        assert json.loads((tmp_path / "card.json").read_text())["heads"] == [finding]


def test_the_program_trains_saves_and_goes_on(tmp_path, monkeypatch, caplog):
    small = lambda name, heads: build_classifier("test_resnet", heads)  # noqa: E731
    monkeypatch.setattr(g, "build_classifier", small)
    options = ["--num-patients", "60", "--size", "32", "--width", "4", "--processes", "0"]
    g.main([str(tmp_path), "--num-steps", "2", *options])
    gan, card = g.load_gan(tmp_path)
    assert (card["finding"], card["num_steps"], card["size"]) == ("Support Devices", 2, 32)
    assert card["films_absent"] + card["films_present"] + card["test_films"] == 55
    assert card["steps_in_these_seconds"] == 2
    assert str(tmp_path) not in (tmp_path / "card.json").read_text()
    before = weights_hash(gan)
    g.main([str(tmp_path), "--num-steps", "2", *options])
    gan, card = g.load_gan(tmp_path)
    assert card["steps_in_these_seconds"] == 0
    assert weights_hash(gan.to_absent) == weights_hash(g.load_gan(tmp_path)[0].to_absent)
    assert weights_hash(gan) == before
    with pytest.raises(SystemExit, match=r"ganterfactual: 'devces' is not a finding"):
        g.main([str(tmp_path), "--finding", "devces"])
