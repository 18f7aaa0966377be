"""What trains the bundled base: its films, and the text encoder's spread."""

import shutil

import diffusers
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from prism_nb.captions import caption
from prism_nb.diffusion import embed_captions, load_model
from prism_nb.images import save_png, uint8_to_unit, unit_to_sd
from prism_nb.phantom import DRAWN, pretrain

CAPTIONS = ["chest x-ray showing edema", "chest x-ray showing support devices", "chest x-ray"]


def words(model):
    """What the text encoder gives for the words of CAPTIONS alone, padding left out."""
    embedded = embed_captions(model, CAPTIONS)
    lengths = [len(model.tokenizer(text).input_ids) for text in CAPTIONS]
    return torch.cat([row[:n] for row, n in zip(embedded, lengths, strict=True)])


def test_spread_text_centres_and_scales_and_changes_nothing_else(model):
    before = words(model)
    pretrain.spread_text(model.text_encoder, model.tokenizer, CAPTIONS)
    after = words(model)
    expected = (before - before.mean(0)) / before.std(0).clamp(min=0.02)
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-3)


def test_a_family_is_a_film_and_four_twins_with_one_finding_turned_over():
    for number in range(1, 7):
        films, labels = pretrain._family(number, 64)
        assert films.shape == (pretrain.FAMILY, 64, 64)
        assert len(labels) == pretrain.FAMILY
        turned = [[k for k in DRAWN if row[k] != labels[0][k]] for row in labels[1:]]
        assert turned[:3] == [[finding] for finding in pretrain.MAIN]
        assert len(turned[3]) == 1
        assert turned[3][0] not in pretrain.MAIN
        if number % 3 == 2:
            assert not any(labels[0][name] for name in DRAWN if name not in pretrain.MAIN)


def test_the_same_family_is_drawn_again():
    assert np.array_equal(pretrain._family(4, 64)[0], pretrain._family(4, 64)[0])


def test_twins_come_in_pairs_of_one_family():
    rows = pretrain.twins(np.random.default_rng(0), 50, 6).reshape(-1, 2)
    assert (rows[:, 0] % pretrain.FAMILY == 0).all()
    assert (rows // pretrain.FAMILY == rows[:, :1] // pretrain.FAMILY).all()
    assert (rows[:, 0] != rows[:, 1]).all()
    assert len(set(rows[:, 0])) == 6


def test_standardised_latents_have_mean_0_and_spread_1_and_decode_as_before():
    torch.manual_seed(0)
    vae = pretrain.tiny_vae(4).eval()
    films = np.random.default_rng(0).integers(0, 256, (20, 64, 64), np.uint8)
    x = unit_to_sd(uint8_to_unit(films))
    with torch.no_grad():
        old = vae.encode(x).latent_dist
        decoded = vae.decode(old.mean).sample
        pretrain.standardise(vae, films)
        new = vae.encode(x).latent_dist
        torch.testing.assert_close(vae.decode(new.mean).sample, decoded, rtol=1e-3, atol=1e-4)
    mean, std = (getattr(old.mean, name)((0, 2, 3), keepdim=True) for name in ("mean", "std"))
    torch.testing.assert_close(new.mean, (old.mean - mean) / std, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(new.std, old.std / std, rtol=1e-3, atol=1e-3)
    assert vae.config.scaling_factor == 1


def test_lines_are_where_the_twin_without_devices_differs():
    families = [pretrain._family(number, 64) for number in (1, 2)]
    films = np.concatenate([made for made, _ in families])
    seen, lines = pretrain.device_lines(films)
    assert np.array_equal(seen, films[[0, 5, 3, 8]])  # devices are the third of MAIN
    assert np.array_equal(lines[0], abs(films[0].astype(int) - films[3]) > pretrain.SHOWS)
    assert np.array_equal(lines[:2], lines[2:])
    assert 0 < lines.mean() < 0.2


def test_windows_of_films_and_lines_are_the_same_windows():
    films = np.random.default_rng(0).integers(0, 256, (4, 32, 32), np.uint8)
    rows, found = np.array([1, 3]), set()
    for seed in range(6):
        rng = np.random.default_rng(seed)
        x, line = pretrain._crops(films, films > 99, rows, 16, rng, pretrain.CPU)
        assert x.shape == (2, 3, 16, 16)
        assert line.shape == (2, 1, 16, 16)
        grey = ((x + 1) * 127.5).round()
        assert torch.equal((grey[:, :1] > 99).float(), line)
        windows = [w for f in (films[1], films[1][:, ::-1]) for w in _windows(f, 16)]
        assert any(np.array_equal(grey[0, 0].numpy(), window) for window in windows)
        found.add(grey.sum().item())
    assert len(found) == 6


def _windows(film, side):
    return np.lib.stride_tricks.sliding_window_view(film, (side, side)).reshape(-1, side, side)


def test_every_film_has_its_caption_in_every_style(random_base):
    labels = [pretrain._family(number, 64)[1][0] for number in (1, 2, 3, 4)]
    embedded, which = pretrain.said(random_base, labels, pretrain.CPU)
    assert which.shape == (4, len(pretrain.STYLES))
    model = load_model(str(random_base), device="cpu")
    for row, style in ((0, 0), (2, 1), (3, 2)):
        text = caption(labels[row], **pretrain.STYLES[style][0])
        expected = embed_captions(model, [text])[0]
        own = embedded[which[row, style]].float()
        torch.testing.assert_close(own, expected, rtol=2e-3, atol=2e-3)
    empty = embed_captions(model, [""])[0]
    torch.testing.assert_close(embedded[-1].float(), empty, rtol=2e-3, atol=2e-3)


def test_real_films_join_as_families_of_equals_a_tenth_of_all():
    latents = torch.arange(90 * pretrain.FAMILY).float().view(-1, 1, 1, 1)
    real = -1 - torch.arange(4).float().view(-1, 1, 1, 1)
    labels, names = [{"row": row} for row in range(len(latents))], [{"real": n} for n in range(4)]
    both, said = pretrain.mixed(latents, labels, real, names)
    assert len(both) == len(said) == len(latents) + 2 * 4 * pretrain.FAMILY
    assert torch.equal(both[: len(latents)], latents)
    families = both[len(latents) :].view(-1, pretrain.FAMILY)
    assert (families == families[:, :1]).all()
    assert families[:, 0].tolist() == [-1, -2, -3, -4] * 2
    assert [row["real"] for row in said[len(latents) :: pretrain.FAMILY]] == [0, 1, 2, 3] * 2


def test_every_fifth_real_film_is_kept_for_measuring(tmp_path):
    lines = ["path,Pleural Effusion"]
    for n in range(7):
        save_png(tmp_path / f"{n}.png", np.full((16, 16), 30 * n, np.uint8))
        lines.append(f"{n}.png,{n % 2}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    films, labels = pretrain.real_films(tmp_path / "labels.csv", 16)
    assert films[:, 0, 0].tolist() == [30, 60, 90, 120, 180]
    assert [row["Pleural Effusion"] for row in labels] == [1, 0, 1, 0, 0]
    films, labels = pretrain.real_films(tmp_path / "labels.csv", 16, measured=True)
    assert films[:, 0, 0].tolist() == [0, 150]


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setitem(pretrain.EVERY, "cpu", 2)

    def trained(work, last):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)

        def loss_of(step):
            if step == last:
                raise KeyboardInterrupt
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            return (model(x) - x.sum(1, keepdim=True)).square().mean()

        work.mkdir(exist_ok=True)
        pretrain.train(model, list(model.parameters()), loss_of, 6, 0.1, work, "line")
        return model.weight.detach()

    whole = trained(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", 5)
    torch.testing.assert_close(trained(tmp_path / "cut", None), whole)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Films of 16 families, as the program leaves them in work/."""
    work = tmp_path_factory.mktemp("rendered")
    pretrain.phantom_films(work, 16, 64)
    return work


def start(folder):
    """Run the program, one step a stage; returns how many trainings it came to the end of."""
    ended, train = [], pretrain.train
    steps = [f"--{part}-steps=1" for part in ("vae", "decoder", "clip", "unet")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "train", lambda *a, **k: ended.append(train(*a, **k)))
        pretrain.main([str(folder), "--size=64", *steps, "--device=cpu"])
    return len(ended)


@pytest.fixture(scope="module")
def whole(rendered, tmp_path_factory):
    """A base of one step a stage, made in one go."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(rendered, folder / "work")
    assert start(folder) == 4
    return folder


def test_finished_stages_are_skipped(whole):
    assert start(whole) == 0


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (pretrain, "refine_decoder"),
        (pretrain, "spread_text"),
        (transformers.CLIPImageProcessor, "save_pretrained"),
        (diffusers.UNet2DConditionModel, "save_pretrained"),
    ],
)
def test_a_killed_stage_is_made_good(whole, rendered, tmp_path, monkeypatch, owner, name):
    def kill(_, *given, **__):
        if name == "save_pretrained":
            given[0].mkdir(exist_ok=True)  # as far as it came
        raise KeyboardInterrupt

    shutil.copytree(rendered, tmp_path / "work")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, kill)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path)
    start(tmp_path)
    made = sorted(path.name for path in (tmp_path / "work").glob("*.pt"))
    assert made == ["clip.pt", "decoder.pt", "unet.pt", "vae.pt"]
    for file in whole.glob("*/*.safetensors"):
        own = load_file(tmp_path / file.relative_to(whole))
        for key, tensor in load_file(file).items():
            torch.testing.assert_close(own[key], tensor, rtol=1e-3, atol=1e-3)


def test_the_unet_of_a_few_steps_is_written(random_base, tmp_path):
    folder = shutil.copytree(random_base, tmp_path / "base")
    latents = torch.randn(4 * pretrain.FAMILY, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = [row for number in range(1, 5) for row in pretrain._family(number, 64)[1]]
    before = load_model(str(folder), device="cpu").unet.conv_in.weight
    pretrain.fit_unet(folder, tmp_path, latents.half(), labels, 2, random_base, batch_size=4)
    after = load_model(str(folder), device="cpu").unet.conv_in.weight
    assert after.shape == before.shape
    assert not torch.equal(after, before)
    assert torch.allclose(after, before, atol=0.01)
