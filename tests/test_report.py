"""The report: whole in itself, and true to the run."""

import re

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from prism_nb.files import write_json
from prism_nb.report import write_report
from prism_nb.run import Run

TEXT = r"""# 03 · Invert
Inline $\bar\alpha_t$, unknown $\nosuchmacro{x}$ and

$$z_0 = \frac{z_t}{\sqrt{\bar\alpha_t}}$$

[next](04_edit.ipynb) [here](03_invert.ipynb#a) [out](https://example.org)
![a figure](../figures/03_x.png) ![far](https://example.org/x.png) ![secret](../../secret.png)
"""


@pytest.fixture
def report(tmp_path):
    """The pages of a run with a figure, a table, nested metrics and an executed notebook."""
    folder = tmp_path / "a run"
    (tmp_path / "secret.png").write_bytes(b"secret")
    run = Run("03_invert", {"run_dir": str(folder)})
    figure, ax = plt.subplots()
    run.save_figure(ax, "03_x")
    plt.close(figure)
    run.save_table(pd.DataFrame({"films": [1234, 5], "psnr": [1 / 3, None]}, ["<b>", "y"]), "t")
    run.save_table(pd.DataFrame({"loss": range(300)}), "losses")
    run.save_metrics(psnr=31.25, auroc={"Cardiomegaly": 0.5}, interval=[0.1, 0.2])
    run.finish()
    bar = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": " 10%|# | 1/10"}
    dial = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "IntSlider(value=0)"}
    code = "<script src='https://example.org/x.js'></script><p>kept</p>"
    cells = [
        new_markdown_cell(TEXT),
        new_code_cell("x = 1", outputs=[new_output("display_data", d) for d in (bar, dial)]),
        new_code_cell("y", outputs=[new_output("display_data", {"text/html": code})]),
    ]
    (folder / "notebooks").mkdir()
    nbformat.write(new_notebook(cells=cells), folder / "notebooks" / "03_invert.ipynb")
    done = {"outputs": {}, "seconds": 2.0, "finished": "2026-01-01T00:00:00"}
    steps = {"03_invert": done, "04_edit": {"fingerprint": {}}}
    manifest = {"profile": "mine", "parameters": {"seed": 3}, "steps": steps}
    write_json(folder / "manifest.json", manifest)
    index = write_report(folder)
    return {page.stem: page.read_text() for page in index.parent.iterdir()}


def test_nothing_is_loaded_from_elsewhere(report):
    for page in report.values():
        assert "<script" not in page
        assert "<link" not in page
        for source in re.findall(r"src=['\"]([^'\"]*)", page):
            assert source.startswith("data:image/")
    assert "secret" in report["03_invert"]  # its description, in place of an image outside the run


def test_formulas_are_drawn_and_unknown_ones_kept_as_source(report):
    page = report["03_invert"]
    assert len(re.findall(r"data:image/svg\+xml", page)) == 2
    assert r"<code>\nosuchmacro{x}</code>" in page


def test_links_lead_to_pages_and_outputs_stay(report):
    page = report["03_invert"]
    assert 'href="https://example.org"' in page
    assert ".ipynb" not in page
    assert "<p>kept</p>" in page
    assert "10%|" not in page
    assert page.count("Interactive: open the notebook in JupyterLab") == 1


def test_the_index_shows_state_figures_tables_metrics_and_parameters(report):
    index = report["index"]
    assert "<a href='03_invert.html'>03_invert</a>" in index
    assert "failed or cut short" in index
    assert "not run" in index
    assert "A1_vqa" not in index, "an appendix is shown where it ran"
    assert "<figcaption>03_x</figcaption>" in index
    assert "&lt;b&gt;" in index
    assert "1,234" in index
    assert "0.3333" in index
    assert "<details><summary>losses, the first 200 of 300 rows</summary>" in index
    assert "auroc, Cardiomegaly" in index
    assert "0.1, 0.2" in index
    assert "<td class=text>seed</td><td>3</td>" in index
