"""What all tests share: a quiet environment, and small notebooks made on the spot."""

import os

os.environ.setdefault("MPLBACKEND", "agg")  # before anything imports matplotlib
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
os.environ.setdefault("OMP_NUM_THREADS", "2")

import textwrap
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The project root."""
    return ROOT


@pytest.fixture(scope="session")
def make_notebook():
    """A function that writes a notebook: a parameters cell and further code cells."""

    def make(path: Path, parameters: str, *cells: str) -> Path:
        first = nbformat.v4.new_code_cell(textwrap.dedent(parameters).strip())
        first.metadata.tags = ["parameters"]
        others = [nbformat.v4.new_code_cell(textwrap.dedent(cell).strip()) for cell in cells]
        kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
        notebook = nbformat.v4.new_notebook(cells=[first, *others], metadata={"kernelspec": kernel})
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)
        return path

    return make


@pytest.fixture(scope="session")
def make_cohort(tmp_path_factory):
    """A function that renders so many phantom films of so many pixels: split and captioned."""
    from prism_nb import phantom
    from prism_nb.captions import captions
    from prism_nb.cohort import load_cohort, split_by_patient

    def make(count, size):
        folder = tmp_path_factory.mktemp("cohort")
        cohort = load_cohort(phantom.write_cohort(folder, count, size, seed=2))
        table = split_by_patient(cohort.table, 0.4, 0.2)
        cohort.table = table.assign(caption=captions(table))
        cohort.settings |= {"image_size": size, "fit": "squash"}
        return cohort

    return make


@pytest.fixture(scope="session")
def random_base(tmp_path_factory):
    """A base model of 64 px with random weights: right in shape, wrong in everything else."""
    from prism_nb.phantom.pretrain import random_base

    return random_base(tmp_path_factory.mktemp("base"), size=64)


@pytest.fixture
def model(random_base):
    """That base model, loaded anew for each test."""
    from prism_nb.diffusion import load_model

    return load_model(str(random_base), device="cpu")


@pytest.fixture(scope="session")
def tiny_run(random_base, make_cohort, tmp_path_factory):
    """A run folder of six inverted and edited films of 64 px, as notebooks 01 to 05 leave one.

    Copy it before you write into it.
    """
    from prism_nb import classifiers, edits
    from prism_nb.cohort import write_cohort
    from prism_nb.diffusion import encode_films, load_model, save_unet
    from prism_nb.editing import edit
    from prism_nb.findings import PAPER_HEADS
    from prism_nb.images import load_films, uint8_to_unit
    from prism_nb.inversion import invert

    folder, cohort = tmp_path_factory.mktemp("tiny") / "run", make_cohort(20, 64)
    cohort.settings |= {"template": "plain", "negatives": False}
    write_cohort(cohort, folder)
    model = load_model(str(random_base), device="cpu")
    save_unet(model, folder / "model")
    chosen = cohort.table.head(6)
    films = load_films([cohort.image_root / path for path in chosen["path"]], 64)
    films, texts = uint8_to_unit(films), list(chosen["caption"])
    found = invert(model, encode_films(model, films), list(chosen["film_id"]), texts, num_steps=3)
    found.save(folder / "inversions")
    plan = edits.plan_edits(chosen, [edits.Edit("Support Devices", False)])
    made = edit(model, found, films, plan["row"], plan["target"], mask="none")
    rows = edits.filter_edits(plan, [0.5] * len(plan), made.area, 0.1)
    rows = rows.assign(**edits.recipe(found, "default", mask="none"))
    edits.save_edits(folder / "edits", rows, made, chosen, {"vae": films}, {})
    judge = classifiers.build_classifier("test_efficientnet", len(PAPER_HEADS))
    judge.image_size = 64
    classifiers.save_classifier(folder / "classifiers" / "judge", judge, PAPER_HEADS)
    return folder
