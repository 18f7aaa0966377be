"""The planner: its bytes and calls are those that the real thing takes; advice makes it fit."""

import gzip

import pandas as pd
import pytest
import torch
from safetensors import safe_open

from prism_nb.editing import PRESETS, edit
from prism_nb.finetune import finetune
from prism_nb.inversion import METHODS, invert
from prism_nb.latents import encode_cohort
from prism_nb.params import MODELS, Finetune, check_profile, load_profile
from prism_nb.planner import (
    Plan,
    _lighter_editing,
    _lighter_training,
    advice,
    count_films,
    edit_rows,
    inversion_rows,
    latent_bytes,
)


@pytest.fixture(scope="module")
def small(random_base):
    """A profile of the tiny base at its 64 px."""
    settings = {"base_model": str(random_base), "image_size": 64, "phantom_patients": 20}
    return settings | {"run_dir": "runs/none", "num_test_films": 4, "num_train_films": 4}


def tensor_bytes(path):
    with safe_open(path, "pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118


def test_latents_and_checkpoints_take_the_bytes_that_are_planned(
    small, model, make_cohort, tmp_path
):
    cohort = make_cohort(20, 64)
    table, folder = cohort.table, tmp_path / "latents"
    latents = encode_cohort(model, table, cohort.image_root, 64, "squash", folder)
    sketch = Plan(small, gpus=0).sketch()
    counted = latent_bytes(sketch, 20, len(latents.captions))
    assert counted == sum(tensor_bytes(path) for path in folder.glob("*.safetensors"))
    settings = Finetune(num_train_steps=1, train_batch_size=2)
    list(finetune(model, latents, [0, 1], settings, tmp_path / "training"))
    (path,) = (tmp_path / "training").glob("step-*/state.safetensors")
    assert Plan(small, gpus=0).disk()["checkpoints"] == pytest.approx(
        3 * path.stat().st_size, rel=0.02
    )


@pytest.mark.parametrize("method", METHODS)
def test_an_inversion_takes_the_bytes_and_calls_that_are_planned(small, model, method):
    z0, calls = torch.randn(2, 16, 8, 8), []
    model.unet.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    found = invert(model, z0, ["a", "b"], ["chest x-ray"] * 2, method, num_steps=3)
    held = sum(x.nbytes for name, x in found._tensors().items() if name != "inner_steps")
    plan = Plan(small | {"inversion": method, "num_ddim_steps": 3}, gpus=0)
    assert 2 * plan.inversion_bytes() == held
    planned = 2 * inversion_rows(method, 3, tune=1)
    # Null-text stops early where the captions hardly differ: its calls are at most those.
    assert sum(calls) <= planned if method == "null_text" else sum(calls) == planned


@pytest.mark.parametrize("preset", PRESETS)
def test_an_edit_takes_the_calls_that_are_planned(model, preset):
    words = ["chest x-ray showing edema", "chest x-ray showing support devices"]
    how = {"method": PRESETS[preset].inversion["method"]}
    found = invert(model, torch.randn(2, 16, 8, 8), ["a", "b"], words[:1] * 2, num_steps=8, **how)
    calls = []
    model.unet.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    films = torch.rand(2, 64, 64).numpy()
    edit(model, found, films, [0, 1], words[1:] * 2, preset=preset)
    planned = 2 * edit_rows(PRESETS[preset].dials, 8)
    assert sum(calls) == pytest.approx(planned, rel=0.3 if preset == "ledits++" else 0)


def test_a_plan_has_all_its_parts_and_more_gpus_need_less_time(small):
    one, two = Plan(small, gpus=1), Plan(small, gpus=2)
    assert two.hours()["02_finetune"] < one.hours()["02_finetune"]
    assert list(one.hours()) == list(MODELS)[:6]
    assert all(amount > 0 for amount in [*one.hours().values(), *one.memory().values()])
    half = Plan(small | {"precision": "bf16"}, gpus=1)
    assert half.hours()["03_invert"] < one.hours()["03_invert"]
    assert two.sketch().num_trained == one.sketch().num_unet


def test_minutes_are_those_that_the_phantom_profile_took_on_two_quiet_cores(root, monkeypatch):
    rate = {True: 130e9, False: 83e9}  # of one thread there, by measured_rate
    monkeypatch.setattr("prism_nb.planner._cpu_rate", rate.get)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    plan = Plan(load_profile(root / "params" / "phantom.yaml"), gpus=0, num_films=600)
    took = dict(zip(list(MODELS)[:6], (27, 162, 78, 135, 123, 121), strict=True))
    for name, hours in plan.hours().items():
        print(f"{name:<14}{3600 * hours:5.0f} s planned, {took[name]} s taken")
        assert took[name] / 1.5 < 3600 * hours < took[name] * 1.5, name
    assert 3600 * sum(plan.hours().values()) == pytest.approx(sum(took.values()), rel=0.2)


def test_advice_is_what_costs_least_and_nothing_where_all_fits(small):
    many = small | {"train_batch_size": 64}  # so that not the weights take most
    need = Plan(many, gpus=1).training()
    assert advice(many, 1, 1.01 * need) == {}
    found = advice(many, 1, 0.99 * need)
    assert found == {"precision": "bf16"}
    assert Plan(many | found, gpus=1).training() <= 0.99 * need
    least = {"precision": "bf16", "train_batch_size": 1, "lora_rank": 16}
    with pytest.raises(ValueError, match=r"^training needs 1 GB at least, more than 1 GB$"):
        advice(small | least, 1, 1e9)


@pytest.mark.parametrize(
    ("gpus", "given", "training"),
    [
        (1, {"train_batch_size": 8}, {"train_batch_size": 4, "accumulation": 2}),
        (4, {"train_batch_size": 8}, {"train_batch_size": 4, "accumulation": 2}),
        (4, {"train_batch_size": 12}, {"train_batch_size": 4, "accumulation": 3}),
        (1, {"train_batch_size": 1}, {"lora_rank": 16}),
        (1, {"train_batch_size": 1, "lora_rank": 4}, {}),
    ],
)
def test_a_lighter_training_takes_as_many_films_an_update(small, gpus, given, training):
    plan = Plan(small | {"precision": "bf16"} | given, gpus)
    assert _lighter_training(plan) == training
    check_profile(small | given | training)


def test_a_lighter_editing_takes_fewer_films_at_a_time(small):
    assert _lighter_editing(Plan(small)) == {"precision": "bf16"}
    half = small | {"precision": "bf16"}
    assert _lighter_editing(Plan(half)) == {"edit_batch_size": 4}
    assert _lighter_editing(Plan(half | {"edit_batch_size": 1})) == {}


def test_films_are_counted_where_they_are(small, tiny_run, tmp_path):
    cohort = Plan(small).cohort
    assert count_films(cohort)[0] == 20
    assert count_films(cohort, 7)[0] == 7
    of_run = Plan(small | {"run_dir": str(tiny_run)}).cohort
    captions = pd.read_parquet(tiny_run / "cohort.parquet")["caption"]
    assert count_films(of_run) == (len(captions), captions.nunique() + 1)
    (tmp_path / "films.csv").write_text("path\n" + "a.png\n" * 30)
    csv = small | {"csv": str(tmp_path / "films.csv"), "max_films": 25}
    assert Plan(csv).num_films == 25
    words = "path,report\n" + 'a.png,"two\nlines"\n' * 30  # a row may be several lines
    (tmp_path / "reports.csv").write_text(words)
    (tmp_path / "packed.csv.gz").write_bytes(gzip.compress(words.encode()))
    for name in ("reports.csv", "packed.csv.gz"):
        assert Plan(small | {"csv": str(tmp_path / name)}).num_films == 30
    (tmp_path / "dicom").mkdir()
    for number in range(5):
        (tmp_path / "dicom" / f"{number}.dcm").touch()
    assert Plan(small | {"csv": str(tmp_path / "dicom")}).num_films == 5
    with pytest.raises(ValueError, match="give --films"):
        Plan(small | {"csv": str(tmp_path / "none.csv")})
    with pytest.raises(ValueError, match="train_batch_size is 8 for 3 GPUs: give a multiple of 3"):
        Plan(small, gpus=3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"gpus": -1}, "gpus is -1; give 0 or more"),
        ({"tflops": 0}, "tflops is 0; give more than 0"),
        ({"num_films": -5}, "films is -5; give 0 or more"),
    ],
)
def test_numbers_that_no_machine_has_are_one_line(small, given, words):
    with pytest.raises(ValueError, match=words):
        Plan(small, **given)
