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
