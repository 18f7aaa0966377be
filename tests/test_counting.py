"""Counting: FLOPs as formulas give them, bytes as a real training step takes them."""

import subprocess
import sys

import pytest
import torch

from prism_nb.counting import Alive, Sketch, classifier_flops, configs, measured_rate
from prism_nb.files import write_json
from prism_nb.params import load_profile
from prism_nb.planner import LIBRARIES, SLACK, Plan

BEGIN = """
import gc
from pathlib import Path

import psutil
import torch
from diffusers.training_utils import EMAModel
from prism_nb.diffusion import decode_latents, load_model, predict_noise

def noise(rows):
    z, cond = torch.randn(rows, 16, 32, 32), torch.randn(rows, 77, 128)
    return predict_noise(model, z, 500, cond)

model = load_model("phantom", device="cpu", precision="fp32")
with torch.no_grad():
    noise(1)
gc.collect()
before = psutil.Process().memory_info().rss
Path("/proc/self/clear_refs").write_text("5")  # forget the peak before
"""
TRAIN = """
weights = list(model.unet.requires_grad_(True).parameters())
adam, ema = torch.optim.AdamW(weights, lr=1e-5, fused=True), EMAModel(weights, foreach=True)
for _ in range(2):
    noise(16).square().mean().backward()
    adam.step()
    adam.zero_grad(set_to_none=True)
    ema.step(weights)
"""
EDIT = """
with torch.no_grad():
    noise(16)
    decode_latents(model, torch.randn(8, 16, 32, 32))
"""
END = """
status = Path("/proc/self/status").read_text()
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(peak, peak - before)
"""


@pytest.fixture(scope="module")
def paper():
    """Stable Diffusion v1 at 512 px, on a GPU in bf16."""
    return Sketch("stable-diffusion-v1-5/stable-diffusion-v1-5", 512, gpu=True, bf16=True)


def test_a_convolution_takes_the_flops_of_its_formula(paper):
    with paper.mode:
        conv, x = torch.nn.Conv2d(3, 16, 5, padding=2), torch.empty(2, 3, 20, 30)
    flops, _ = paper.count(lambda: conv(x))
    assert flops == 2 * (2 * 20 * 30) * 16 * (3 * 5 * 5)


def test_stable_diffusion_takes_what_is_known_of_it(paper):
    assert paper.num_unet == paper.num_trained == 859_520_964
    assert (paper.latent, paper.caption) == ((4, 64, 64), (77, 768))
    known = {"predict": 803.3, "train": 2406.8, "encode": 1116.7, "decode": 2514.5}
    for way, giga in known.items():
        assert getattr(paper, way)(1)[0] == pytest.approx(giga * 1e9, rel=1e-4), way
    assert paper.tune(1)[0] == pytest.approx(1669.2e9, rel=1e-3)
    assert all(weight.requires_grad for weight in paper.trained)


def test_bytes_that_are_alive_at_one_time():
    layer = torch.nn.Linear(10, 10)
    with Alive(layer) as alive, torch.no_grad():
        x = torch.zeros(25, 10)  # 1000 bytes
        y = layer(x)
        assert alive.now == 2000
        view = y[:5].t()  # no bytes of its own, as the weights
        del x
        assert alive.now == 1000
        y = y + 1
        assert alive.now == 2000  # the view holds the old one
        del view
        assert alive.now == 1000
    assert alive.peak == 2000


@pytest.mark.skipif(sys.platform != "linux", reason="the peak stands in /proc")
@pytest.mark.parametrize("what", ["training", "editing"])
def test_the_bundled_base_takes_the_memory_that_is_planned(root, what):
    code = BEGIN + {"training": TRAIN, "editing": EDIT}[what] + END
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, of_step = (int(number) for number in done.stdout.split())
    given = {"ema_decay": 0.99, "train_batch_size": 16, "edit_batch_size": 8, "precision": "fp32"}
    plan = Plan(load_profile(root / "params" / "phantom.yaml") | given, gpus=0, num_films=600)
    planned = getattr(plan, what)()
    print(f"{peak / 1e6:.0f} MB measured, {planned / 1e6:.0f} MB planned")
    assert planned == pytest.approx(peak, rel=0.3)
    if what == "training":  # of which the step takes most: it alone, without what was there before
        planned -= LIBRARIES + SLACK * plan.sketch().num_bytes
        print(f"{of_step / 1e6:.0f} MB of them by the step, {planned / 1e6:.0f} MB planned")
        assert planned == pytest.approx(of_step, rel=0.3)


def test_gradients_stay_and_a_gpu_keeps_norms_in_float32():
    gpu, cpu = (Sketch("phantom", 256, gpu=gpu, bf16=True) for gpu in (True, False))
    (flops, one), (same, two) = gpu.train(4), gpu.train(4, batches=2)
    assert cpu.train(4)[1] < one < 2 * cpu.train(4)[1]
    assert two - one == pytest.approx(4 * gpu.num_trained, rel=0.5)
    assert same == flops
    assert gpu.num_bytes < cpu.num_bytes  # the frozen parts in bf16


def test_lora_trains_as_many_numbers_as_peft_makes(model):
    pytest.importorskip("peft")
    from prism_nb.finetune import add_lora

    add_lora(model.unet, 4, seed=0)
    real = sum(weight.numel() for weight in model.unet.parameters() if weight.requires_grad)
    sketch = Sketch(model.base_model, 64, lora_rank=4)
    assert sketch.num_trained == real
    whole = Sketch(model.base_model, 64)
    assert sketch.num_unet == whole.num_unet
    assert sketch.train(2)[1] < whole.train(2)[1]


def test_settings_are_a_folders_its_bases_or_the_papers(random_base, tmp_path):
    unet, vae, text = configs(str(random_base))
    assert (unet["in_channels"], vae["latent_channels"], text["hidden_size"]) == (16, 16, 128)
    about = {"base_model": str(random_base), "revision": ""}
    write_json(tmp_path / "base.json", about)
    assert configs(str(tmp_path)) == (unet, vae, text)
    assert configs("someone/something")[0]["cross_attention_dim"] == 768


def test_classifiers_and_this_machine():
    flops = classifier_flops("efficientnet_b0", 224)
    assert flops == pytest.approx(0.77e9, rel=0.05)  # on three channels; ours see one
    assert measured_rate(rows=1, repeats=1) > 1e8
