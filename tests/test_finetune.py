"""Fine-tuning: what is trained, from which draws, and that nothing but the settings decides it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from prism_nb import finetune as program
from prism_nb import phantom
from prism_nb.captions import captions
from prism_nb.cohort import load_cohort, read_cohort, split_by_patient, write_cohort
from prism_nb.diffusion import embed_captions, load_model
from prism_nb.files import write_json
from prism_nb.finetune import (
    TrainingError,
    batch,
    check_seen,
    draws,
    epoch_rows,
    finetune,
    history,
    own_positions,
    snr_weights,
    validation_levels,
    validation_loss,
)
from prism_nb.latents import load_latents
from prism_nb.params import Finetune, load_profile

CAPTIONS = ["chest radiograph with edema", "chest radiograph", ""]
ROWS = np.arange(2, 12)


@dataclass
class FakeLatents:
    """What finetune needs of prism_nb.latents.Latents, random."""

    mean: torch.Tensor
    std: torch.Tensor
    text: torch.Tensor
    caption_index: np.ndarray
    captions: list
    film_ids: list
    key: str = "key of the latents"

    def __len__(self):
        return len(self.mean)

    def gather(self, rows):
        return self.mean[rows], self.std[rows]

    def cond(self, rows):
        return self.text[self.caption_index[rows]]


def fake_latents(model, num_films=12):
    generator = torch.Generator().manual_seed(0)
    shape = (num_films, model.unet.config.in_channels, 8, 8)
    return FakeLatents(
        mean=torch.randn(shape, generator=generator),
        std=torch.rand(shape, generator=generator) / 10,
        text=embed_captions(model, CAPTIONS),
        caption_index=np.arange(num_films) % 2,
        captions=CAPTIONS,
        film_ids=[f"film{i}" for i in range(num_films)],
    )


@pytest.fixture(scope="module")
def random_base(random_base, tmp_path_factory):
    """The base model of random weights, with a U-Net that takes milliseconds an update."""
    folder = tmp_path_factory.mktemp("small") / "base"
    shutil.copytree(random_base, folder)
    config = UNet2DConditionModel.load_config(folder / "unet")
    small = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    small |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    small |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 2}
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(config, **small).save_pretrained(folder / "unet")
    return folder


@pytest.fixture
def latents(model):
    return fake_latents(model)


@pytest.fixture
def settings(random_base):
    def make(**other):
        small = {"num_train_steps": 4, "train_batch_size": 4, "learning_rate": 1e-3, "seed": 3}
        return Finetune(**(small | {"base_model": str(random_base), "ema_decay": 0.0} | other))

    return make


@pytest.fixture
def train(random_base, latents, settings):
    """Train a fresh model to the end; returns its weights, flat, and the updates."""

    def run(folder=None, **other):
        model = load_model(str(random_base), device="cpu")
        steps = list(finetune(model, latents, ROWS, settings(**other), folder))
        return flat(model), steps

    return run


def flat(model):
    return torch.cat([w.detach().flatten() for w in model.unet.parameters()])


def distance(a, b, start):
    """Difference of two trained weights, as a share of how far training moved them.

    Adam divides by the gradient's own size, so single weights of tiny gradient differ more.
    """
    return float((a - b).norm() / (a - start).norm())


def copies(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(module, before):
    return any(
        not torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items()
    )


# What is trained


def test_only_the_unet_is_trained_and_frozen_again(model, latents, settings):
    parts = (model.vae, model.text_encoder, model.unet)
    before = [copies(part) for part in parts]
    steps = list(finetune(model, latents, ROWS, settings()))
    assert [step.step for step in steps] == [0, 1, 2, 3]
    changes = [changed(part, then) for part, then in zip(parts, before, strict=True)]
    assert changes == [False, False, True]
    assert not model.unet.training
    assert not any(w.requires_grad for part in parts for w in part.parameters())


def test_training_lowers_the_validation_loss(model, latents, settings):
    before = validation_loss(model, latents, ROWS)
    list(finetune(model, latents, ROWS, settings(num_train_steps=25)))
    assert validation_loss(model, latents, ROWS).mean() < 0.9 * before.mean()


def test_lora_trains_a_low_rank_change_and_leaves_a_plain_unet(model, latents, settings, tmp_path):
    before = copies(model.unet)
    stop_after(model, latents, settings(lora_rank=2), None, 2)
    assert set(model.unet.state_dict()) == set(before)
    assert not changed(model.unet, before)
    list(finetune(model, latents, ROWS, settings(lora_rank=2), tmp_path))
    after = model.unet.state_dict()
    assert set(after) == set(before)
    name = next(n for n in before if n.endswith("attn1.to_q.weight"))
    assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) == 2
    assert torch.equal(after["conv_in.weight"], before["conv_in.weight"])
    again = load_model(model.base_model, device="cpu")
    assert list(finetune(again, latents, ROWS, settings(lora_rank=2), tmp_path)) == []
    assert torch.equal(flat(again), flat(model))


def test_lora_without_peft_says_what_to_install(model, latents, settings, monkeypatch):
    monkeypatch.setattr(program.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match=r"pip install 'prism_nb\[lora\]'"):
        list(finetune(model, latents, ROWS, settings(lora_rank=2)))


def test_the_text_encoder_is_trained_when_asked(model, latents, settings, tmp_path):
    before, text = copies(model.text_encoder), latents.text.clone()
    options = settings(train_text_encoder=True, ema_decay=0.9)
    list(finetune(model, latents, ROWS, options, tmp_path))
    assert changed(model.text_encoder, before)
    assert not any(w.requires_grad for w in model.text_encoder.parameters())
    assert not torch.allclose(latents.text, text)
    torch.testing.assert_close(latents.text, embed_captions(model, CAPTIONS))


def test_bf16_is_for_the_forward_pass_alone(random_base, latents, settings):
    model = load_model(str(random_base), device="cpu", precision="bf16")
    steps = list(finetune(model, latents, ROWS, settings(precision="bf16", num_train_steps=2)))
    assert all(np.isfinite(step.loss) for step in steps)
    assert {w.dtype for w in model.unet.parameters()} == {torch.float32}


# Algorithm 1, from which draws


def test_noisy_latents_follow_algorithm_1(model, latents, settings):
    positions = np.arange(20, 24)
    noisy, t, _, noise = batch(model, latents, ROWS, positions, settings())
    spread, same_noise, same_t, _ = draws(3, positions, latents.mean.shape[1:])
    assert torch.equal(noise, same_noise)
    assert torch.equal(t, same_t)
    chosen = epoch_rows(ROWS, positions, seed=3)
    z0 = latents.mean[chosen] + latents.std[chosen] * spread  # a sample of the VAE's posterior
    alpha = model.alphas[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy, alpha.sqrt() * z0 + (1 - alpha).sqrt() * noise)


def test_draws_are_normal_and_uniform_and_belong_to_their_position():
    spread, noise, t, chance = draws(5, np.arange(400), (2, 4, 4))
    for field in (spread, noise):
        assert abs(field.mean()) < 0.03
        assert field.std() == pytest.approx(1, abs=0.03)
    assert abs((spread * noise).mean()) < 0.03
    assert t.double().mean() == pytest.approx(499.5, abs=50)
    assert chance.mean() == pytest.approx(0.5, abs=0.05)
    assert (t >= 0).all()
    assert (t < 1000).all()
    alone = draws(5, np.array([7]), (2, 4, 4))
    assert torch.equal(alone[1][0], noise[7])
    assert alone[2][0] == t[7]
    assert not torch.equal(draws(6, np.array([7]), (2, 4, 4))[1], alone[1])


def test_dropped_captions_are_the_empty_one(model, latents, settings):
    positions = np.arange(300)
    for share in (0.0, 0.1, 1.0):
        *_, captions, _ = batch(model, latents, ROWS, positions, settings(caption_dropout=share))
        assert (captions == 2).double().mean() == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("batch_size", [3, 4, 16])
def test_every_film_is_seen_once_an_epoch(batch_size):
    rows = np.array([2, 3, 5, 7, 11, 13, 17])
    starts = np.arange(21)[:, None] * batch_size
    seen = np.concatenate([epoch_rows(rows, s + np.arange(batch_size), seed=9) for s in starts])
    epochs = seen[: len(seen) // 7 * 7].reshape(-1, 7)
    assert (np.sort(epochs) == rows).all()
    assert not (epochs[0] == epochs[1]).all()


def test_an_unfair_order_is_noticed(model, settings):
    training = program.Training(model, settings())
    training.history = [None] * 5  # 20 films were seen: two epochs of ten
    check_seen(torch.full((10,), 2), training, 0)
    unfair = torch.tensor([2] * 8 + [1, 3])
    with pytest.raises(TrainingError, match="seen 1 to 3 times in 2 to 2 epochs"):
        check_seen(unfair, training, 0)


def test_min_snr_weights_follow_the_closed_form(model):
    t = torch.tensor([0, 10, 300, 999])
    snr = model.alphas[t] / (1 - model.alphas[t])
    weights = snr_weights(model.scheduler, t, 5.0)
    torch.testing.assert_close(weights, torch.minimum(snr, torch.tensor(5.0)) / snr)
    assert (snr_weights(model.scheduler, t, 0.0) == 1).all()


def test_min_snr_changes_the_loss(train):
    assert train(min_snr_gamma=5.0)[1][0].loss < train()[1][0].loss


def test_the_average_is_that_of_diffusers(random_base, latents, settings):
    model = load_model(str(random_base), device="cpu")
    weights = list(model.unet.parameters())
    ema = EMAModel(weights, decay=0.9)
    for _ in finetune(model, latents, ROWS, settings(ema_decay=0.9)):
        ema.step([w.detach().requires_grad_() for w in weights])
        last = flat(model)
    shadow = torch.cat([w.flatten() for w in ema.shadow_params])
    torch.testing.assert_close(flat(model), shadow)
    assert not torch.allclose(flat(model), last, atol=1e-6)


# What may differ without changing the result


def test_the_same_seed_gives_the_same_weights(train):
    first = train(num_train_steps=2)[0]
    assert torch.equal(first, train(num_train_steps=2)[0])
    assert not torch.equal(first, train(num_train_steps=2, seed=4)[0])


def test_accumulation_equals_one_large_batch(train, model):
    whole, steps = train(train_batch_size=8)
    parts, other = train(train_batch_size=2, accumulation=4)
    assert [s.loss for s in steps] == pytest.approx([s.loss for s in other], rel=1e-4)
    assert distance(whole, parts, flat(model)) < 1e-3


def test_the_learning_rate_follows_its_schedule(train):
    rates = [s.learning_rate for s in train(lr_schedule="cosine", lr_warmup_steps=2)[1]]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 5e-4])
    assert [s.learning_rate for s in train(num_train_steps=2)[1]] == [1e-3, 1e-3]


# Checkpoints


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("step-*"))


def stop_after(model, latents, settings, folder, num_steps):
    steps = finetune(model, latents, ROWS, settings, folder)
    for _ in range(num_steps):
        next(steps)
    steps.close()


@pytest.mark.parametrize(
    "more", [{}, {"lr_schedule": "cosine", "ema_decay": 0.9, "train_text_encoder": True}]
)
def test_a_stopped_training_goes_on_exactly(train, model, latents, settings, tmp_path, more):
    more = {"num_train_steps": 6, "checkpoint_every": 2, **more}
    whole, steps = train(**more)
    start = flat(model)
    stop_after(model, latents, settings(**more), tmp_path, 5)
    assert torch.equal(flat(model), start)
    assert not any(w.requires_grad for w in model.unet.parameters())
    resumed, rest = train(tmp_path, **more)
    assert [step.step for step in rest] == [4, 5]
    assert torch.equal(resumed, whole)
    frame = history(tmp_path)
    pd.testing.assert_frame_equal(frame, pd.DataFrame(steps))
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "log.csv"), frame)
    assert checkpoints(tmp_path) == ["step-00000004", "step-00000006"]


def test_a_finished_training_yields_nothing_and_loads_its_weights(train, tmp_path):
    first, steps = train(tmp_path, ema_decay=0.9)
    again, none = train(tmp_path, ema_decay=0.9)
    assert (len(steps), none) == (4, [])
    assert torch.equal(again, first)


def test_a_longer_training_goes_on_from_a_shorter_one(train, tmp_path):
    train(tmp_path)
    longer, steps = train(tmp_path, num_train_steps=6)
    assert [step.step for step in steps] == [4, 5]
    assert torch.equal(longer, train(num_train_steps=6)[0])


def test_a_checkpoint_of_other_settings_is_not_used(train, tmp_path, caplog):
    train(tmp_path)
    other, steps = train(tmp_path, learning_rate=5e-4, num_train_steps=2)
    assert len(steps) == 2
    assert "starting anew" in caplog.text
    assert torch.equal(other, train(learning_rate=5e-4, num_train_steps=2)[0])
    assert checkpoints(tmp_path) == ["step-00000002"]


def test_other_latents_films_or_start_are_another_training(model, latents, settings):
    def key(rows=ROWS, **other):
        return program.training_key(model, latents, rows, settings(**other))

    first = key()
    assert first == key(device="cpu", num_train_steps=9, tracker="none")
    assert first == key(train_batch_size=2, accumulation=2)
    assert first != key(ROWS[1:])
    assert first != key(seed=4)
    assert key(lr_schedule="cosine") != key(lr_schedule="cosine", num_train_steps=9)
    latents.key = "of another VAE"
    second = key()
    with torch.no_grad():
        model.unet.conv_in.bias += 1
    assert len({first, second, key()}) == 3


@pytest.mark.parametrize("damage", ["torn", "flipped", "no file", "no json"])
def test_a_damaged_checkpoint_is_passed_over(train, tmp_path, caplog, damage):
    whole, _ = train(tmp_path, checkpoint_every=2)
    path = tmp_path / "step-00000004" / "state.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "torn":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[-9] ^= 1
        path.write_bytes(content)
    elif damage == "no file":
        path.unlink()
    else:
        path.with_name("checkpoint.json").write_text("{")
    assert list(history(tmp_path)["step"]) == [0, 1]
    again, steps = train(tmp_path, checkpoint_every=2)
    assert "is damaged" in caplog.text
    assert [step.step for step in steps] == [2, 3]
    assert torch.equal(again, whole)


def test_the_history_of_a_shorter_training_is_its_own(train, tmp_path):
    train(tmp_path, num_train_steps=4, checkpoint_every=2)
    train(tmp_path, num_train_steps=2, checkpoint_every=2)
    assert list(history(tmp_path, 2)["step"]) == [0, 1]
    assert list(history(tmp_path, 3)["step"]) == [0, 1]
    assert list(history(tmp_path)["step"]) == [0, 1, 2, 3]


def test_without_a_whole_checkpoint_there_is_no_history(tmp_path):
    with pytest.raises(FileNotFoundError, match="run finetune with this folder first"):
        history(tmp_path)


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(model, latents, settings, tmp_path):
    steps = finetune(model, latents, ROWS, settings(checkpoint_every=1), tmp_path)
    next(steps)
    next(steps)
    before = load_file(tmp_path / "step-00000002" / "state.safetensors")
    start = flat(load_model(model.base_model, device="cpu"))
    latents.mean[:] = float("nan")
    with pytest.raises(TrainingError, match=r"loss is nan.* step 2: lower learning_rate") as error:
        next(steps)
    assert "\n" not in str(error.value)
    assert checkpoints(tmp_path) == ["step-00000001", "step-00000002"]
    kept = load_file(tmp_path / "step-00000002" / "state.safetensors")
    assert torch.equal(flat(model), start)
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())


def test_tensorboard_that_is_not_installed_is_said(train, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "is_tensorboard_available", lambda: False)
    with pytest.raises(TrainingError, match="pip install tensorboard"):
        train(tmp_path, tracker="tensorboard")


def test_nothing_is_logged_when_asked(train, tmp_path):
    train(tmp_path, tracker="none")
    assert not (tmp_path / "log.csv").exists()


# Other processes

SCRIPT = """
    import json, os, pathlib, signal, sys
    import torch
    from prism_nb import finetune as program
    from prism_nb.diffusion import load_model
    from prism_nb.params import Finetune
    from test_finetune import ROWS, fake_latents, flat

    given = json.loads(sys.argv[1])
    settings = Finetune(**given["settings"])
    for folder in given["folders"]:
        model = load_model(settings.base_model, device="cpu")
        steps = program.finetune(model, fake_latents(model), ROWS, settings, folder)
        for progress in steps:
            if progress.step == given["kill"]:
                os.kill(os.getpid(), signal.SIGKILL)
        print(progress.step, program.weights_hash(model.unet))
"""


def launch(*command, root):
    paths = {"PYTHONPATH": os.path.dirname(__file__), "PRISM_NB_ROOT": str(root)}
    environment = os.environ | paths | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *command]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=180, check=False
    )


def test_a_killed_training_ends_with_the_weights_of_an_uninterrupted_one(settings, tmp_path):
    options = settings(num_train_steps=5, checkpoint_every=2, ema_decay=0.9).model_dump()
    killed, whole = str(tmp_path / "killed"), str(tmp_path / "whole")
    script = textwrap.dedent(SCRIPT)

    def run(folders, kill):
        given = {"settings": options, "folders": folders, "kill": kill}
        return launch("-c", script, json.dumps(given), root=tmp_path)

    assert run([killed], 2).returncode == -signal.SIGKILL
    assert checkpoints(tmp_path / "killed") == ["step-00000002"]
    both = run([killed, whole], None)
    assert both.returncode == 0, both.stderr
    first, second = both.stdout.splitlines()
    assert first == second
    assert first.startswith("4 ")


@pytest.fixture
def profile(random_base, tmp_path, monkeypatch):
    """A profile of a small training, and a function that makes its run folder."""
    monkeypatch.setenv("PRISM_NB_ROOT", str(tmp_path))
    csv = phantom.write_cohort(tmp_path / "phantom", 14, 64, seed=1)

    def make(name, **other):
        cohort = load_cohort(csv)
        table = split_by_patient(cohort.table)
        cohort.table = table.assign(caption=captions(table))
        cohort.settings |= {"image_size": 64, "fit": "squash"}
        write_cohort(cohort, tmp_path / name)
        write_json(tmp_path / name / "steps" / "01_caption.json", {})
        values = {"run_dir": name, "base_model": str(random_base), "device": "cpu"}
        values |= {"num_train_steps": 6, "train_batch_size": 4, "accumulation": 2}
        values |= {"learning_rate": 1e-4} | other
        path = tmp_path / f"{name}.yaml"
        path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()))
        return path

    return make


def test_two_processes_of_the_program_give_the_model_of_one(profile, random_base, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    program_of = ("-m", "prism_nb.finetune", "--num-processes", "2", "--params")
    two = launch(*torchrun, *program_of, str(profile("two")), root=tmp_path)
    assert two.returncode == 0, two.stderr
    assert two.stderr.count("step 6 of 6: loss") == 1
    program.main(["--params", str(profile("one"))])
    start = flat(load_model(str(random_base), device="cpu"))
    models = [load_model(str(tmp_path / name / "model"), device="cpu") for name in ("one", "two")]
    assert distance(*map(flat, models), start) < 1e-3
    losses = [history(tmp_path / name / "training")["loss"] for name in ("one", "two")]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    # Notebook 02 then finds the training finished.
    latents = load_latents(tmp_path / "two" / "latents")
    model = load_model(str(random_base), device="cpu")
    table = read_cohort(tmp_path / "two").table
    rows = latents.rows(table.loc[table["split"] == "train", "film_id"])
    p = Finetune(**load_profile(tmp_path / "two.yaml"))
    assert list(finetune(model, latents, rows, p, tmp_path / "two" / "training")) == []
    assert torch.equal(flat(model), flat(models[1]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--num-processes", "2"], "2 processes were promised, 1 started: torchrun"),
        (["--set", "learning_rate=fast"], "learning_rate = 'fast': a number is needed"),
        (["--set", "base_model=nowhere"], "nowhere"),
    ],
)
def test_the_program_refuses_in_one_line(profile, options, words):
    with pytest.raises(SystemExit) as error:
        program.main(["--params", str(profile("refused")), *options])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_shares_of_the_processes_are_the_films_of_one(settings):
    options = settings(accumulation=3)
    one = own_positions(5, options, Started(1))
    assert (one.ravel() == np.arange(5 * 12, 6 * 12)).all()
    two = [own_positions(5, options, Started(2, rank)) for rank in (0, 1)]
    assert (np.concatenate(two, axis=1) == one).all()


def test_a_promised_number_of_processes_must_have_started(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    train(num_train_steps=1)
    monkeypatch.setattr(program, "Accelerator", lambda **options: Started(1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="2 processes were promised, 1 started"):
        train()


@dataclass
class Started:
    """An accelerator of so many processes, as far as the order of films looks at it."""

    num_processes: int
    process_index: int = 0


def test_a_batch_must_divide_among_the_processes(settings, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(TrainingError, match="train_batch_size is 4 for 3 processes"):
        program.check_request(ROWS, settings(), Started(3))


def test_no_film_is_one_line(model, latents, settings):
    with pytest.raises(TrainingError, match="no film to train on"):
        next(finetune(model, latents, np.array([], dtype=int), settings()))


# Validation


def test_validation_loss_is_by_film_and_level_and_the_same_twice(model, latents):
    first = validation_loss(model, latents, ROWS, seed=2)
    assert first.shape == (10, 8)
    assert (first == validation_loss(model, latents, ROWS, seed=2)).all()
    assert not np.allclose(first, validation_loss(model, latents, ROWS, seed=3))
    assert validation_levels(4).tolist() == [125, 375, 625, 875]


def test_validation_noise_belongs_to_the_film_not_to_its_batch(model, latents):
    whole = validation_loss(model, latents, ROWS)
    alone = validation_loss(model, latents, ROWS[3:5], batch_size=1)
    np.testing.assert_allclose(whole[3:5], alone, rtol=1e-4)


def test_validation_sees_the_captions_as_the_text_encoder_in_training_does(
    model, latents, settings
):
    for _ in finetune(model, latents, ROWS, settings(train_text_encoder=True)):
        looked = validation_loss(model, latents, ROWS)
        now = replace(latents, text=embed_captions(model, CAPTIONS))
    assert not torch.allclose(
        now.text, embed_captions(load_model(model.base_model, device="cpu"), CAPTIONS)
    )
    np.testing.assert_allclose(looked, validation_loss(model, now, ROWS), rtol=1e-4)


def test_an_untrained_prediction_of_zero_has_the_loss_of_the_noise(model, latents, monkeypatch):
    zero = lambda model, z, t, cond: torch.zeros_like(z)  # noqa: E731
    monkeypatch.setattr(program, "predict_noise", zero)
    assert validation_loss(model, latents, ROWS).mean() == pytest.approx(1, abs=0.02)
