"""The report: whole in itself, and true to the run."""

import base64
import io
import re

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from prism_nb.files import read_json, write_json, write_text
from prism_nb.manifest import Manifest
from prism_nb.report import CAPTIONS, NOTES, RENAMED, write_report
from prism_nb.run import Run, RunFolderError, record_path

TEXT = r"""# 03 · Invert
Inline $\bar\alpha_t$, unknown $\nosuchmacro{x}$ and

$$z_0 = \frac{z_t}{\sqrt{\bar\alpha_t}}$$

[contents](README.md) [next](04_edit.ipynb) [here](03_invert.ipynb#a) [out](https://example.org)
![a figure](../figures/03_x.png) ![far](https://example.org/x.png) ![secret](../../secret.png)
"""


@pytest.fixture
def folder(tmp_path):
    """A run with a figure, tables, nested metrics and an executed notebook."""
    folder = tmp_path / "a run"
    (tmp_path / "secret.png").write_bytes(b"secret")
    run = Run("03_invert", {"run_dir": str(folder)})
    figure, ax = plt.subplots()
    run.save_figure(ax, "03_x")
    run.save_figure(ax, "03_reconstruction")
    plt.close(figure)
    run.save_table(pd.DataFrame({"films": [1234, 5], "psnr": [1 / 3, None]}, ["<b>", "y"]), "t")
    run.save_table(pd.DataFrame({"loss": range(300)}), "losses")
    run.save_metrics(
        psnr=31.25, auroc={"Cardiomegaly": 0.5}, interval=[0.1, 0.2], tables={"heads": {"x": 7.77}}
    )
    run.finish()
    bar = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": " 10%|# | 1/10"}
    dial = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "IntSlider(value=0)"}
    code = "<script src='https://example.org/x.js'></script><p>kept</p>"
    image = (folder / "figures" / "03_x.png").read_bytes()
    drawn = new_output("display_data", {"image/png": base64.b64encode(image).decode()})
    injected = {"tags": ["injected-parameters"]}
    cells = [
        new_markdown_cell(TEXT),
        new_code_cell("seed = 3", metadata=injected),
        new_code_cell("x = 1", outputs=[new_output("display_data", d) for d in (bar, dial)]),
        new_code_cell("y", outputs=[new_output("display_data", {"text/html": code})]),
        new_code_cell('run.save_figure(ax, "03_reconstruction")', outputs=[drawn]),
    ]
    (folder / "notebooks").mkdir()
    nbformat.write(new_notebook(cells=cells), folder / "notebooks" / "03_invert.ipynb")
    made = {"device": "cpu", "seed": 3, "versions": {"torch": "2.1"}}
    done = {"outputs": {}, "seconds": 62.0, "finished": "2026-01-01T00:00:00+0000"}
    steps = {"03_invert": done | {"provenance": made, "fingerprint": {}}}
    steps["04_edit"] = {"fingerprint": {}, "provenance": made | {"versions": {"torch": "2.2"}}}
    parameters = {"seed": 3, "edits": ["remove Edema", "add Edema"]}
    manifest = {"profile": "mine", "parameters": parameters, "steps": steps}
    write_json(folder / "manifest.json", manifest)
    return folder


@pytest.fixture
def report(folder):
    """The one page, read."""
    index = write_report(folder)
    assert [path.name for path in index.parent.iterdir()] == ["index.html"]
    return index.read_text(encoding="utf-8")


def rows(html):
    """Every row of every table, as texts of its cells."""
    soup = BeautifulSoup(html, "html.parser")
    return [[cell.get_text() for cell in row(["th", "td"])] for row in soup("tr")]


def test_nothing_is_loaded_from_elsewhere(report):
    assert "<script" not in report
    assert "<link" not in report
    assert "url(" not in report
    for source in re.findall(r"src=['\"]([^'\"]*)", report):
        assert source.startswith("data:image/")
    assert "secret" in report  # its description, in place of an image outside the run


def test_formulas_are_drawn_and_unknown_ones_kept_as_source(report):
    assert len(re.findall(r"data:image/svg\+xml", report)) == 2
    assert r"<code>\nosuchmacro{x}</code>" in report


def test_links_stay_inside_the_page(report):
    soup = BeautifulSoup(report, "html.parser")
    names = [tag["id"] for tag in soup(id=True)]
    assert len(names) == len(set(names))
    targets = [link["href"] for link in soup("a")]
    assert {href for href in targets if not href.startswith("#")} == {"https://example.org"}
    lead = {href[1:] for href in targets if href.startswith("#")} - {"03_invert-a"}  # of the text
    assert lead <= set(names)
    assert ".ipynb" not in report
    assert '<a href="#report">contents</a>' in report


def test_outputs_stay_and_widgets_leave_a_note(report):
    assert "<p>kept</p>" in report
    assert "10%|" not in report
    assert report.count("Interactive: open the notebook in JupyterLab") == 1
    assert "What the profile sets:" in report


def test_a_figure_has_its_caption_wherever_it_stands(report):
    soup = BeautifulSoup(report, "html.parser")
    caption = CAPTIONS["03_reconstruction"]
    assert [image["alt"] for image in soup("img") if image["alt"] == caption] == [caption] * 2
    told = [text.get_text() for text in soup("figcaption")]
    assert told == [f"03_reconstruction {caption}", "03_x "]  # as the notebooks draw them


def test_images_lose_nothing(folder, report):
    soup = BeautifulSoup(report, "html.parser")
    embedded = soup.find("figure", id="figure-03_x").img["src"].partition("base64,")[2]
    shown = Image.open(io.BytesIO(base64.b64decode(embedded)))
    stored = Image.open(folder / "figures" / "03_x.png")
    np.testing.assert_array_equal(
        np.asarray(shown.convert("RGB")), np.asarray(stored.convert("RGB"))
    )


def test_it_begins_with_state_and_time(report):
    assert "Profile mine: 1 notebook in 1 min 2 s, on cpu, finished 2026-01-01 00:00 UTC" in report
    found = rows(report)
    assert ["03_invert", "done", "1 min 2 s", "2026-01-01 00:00 UTC"] in found
    assert ["04_edit", "failed or cut short", "", ""] in found
    assert ["05_evaluate", "not run", "", ""] in found
    assert "A1_vqa" not in report, "an appendix is shown where it ran"
    assert "<a href='#03_invert'>03_invert</a>" in report


def test_tables_metrics_parameters_and_versions(report):
    found = rows(report)
    assert ["<b>", "1,234", "0.333"] in found
    assert ["y", "5", "–"] in found
    losses = "<details><summary><b>losses</b> Training loss by step. (the first 200 of 300 rows)"
    assert losses in report
    assert ["auroc, Cardiomegaly", "0.5"] in found
    assert ["interval", "0.1, 0.2"] in found
    assert "7.77" not in report, "tables in metrics.json have files of their own"
    assert ["seed", "3", "every random draw starts here"] in found
    assert ["edits", "remove Edema, add Edema", "add or remove a finding"] in found
    assert ["torch", "2.1, 2.2"] in found, "of a run that was continued after an update"


def test_results_come_first_and_by_edit(folder):
    lines = [
        (edit, method, metric, 4.0, 4.0, mean, mean - 0.25, mean + 0.25)
        for method, mean in (("ours", 0.5), ("sdedit", 0.125), ("inversion", 0.0))
        for edit in ("remove Edema", "add Edema")
        for metric in ("cpg", "tea_effectiveness", "ssim")
    ]
    lines += [("remove Edema", "PRISM (paper)", "cpg", None, None, 0.8, None, None)]
    names = ["edit", "method", "metric", "n", "patients", "mean", "low", "high"]
    pd.DataFrame(lines, columns=names).to_csv(folder / "tables" / "table2.csv", index=False)
    html = write_report(folder).read_text(encoding="utf-8")
    assert html.index("id='Results'") < html.index("id='Figures'") < html.index("id='Tables'")
    found = rows(html)
    start = found.index(["edit", "method", "n", "effectiveness", "gain (signed CPG)"])
    half, eighth = "0.500 (0.250 to 0.750)", "0.125 (-0.125 to 0.375)"
    assert found[start + 1 : start + 5] == [
        ["remove Edema", "ours", "4", half, half],
        ["", "SDEdit", "4", eighth, eighth],
        ["add Edema", "ours", "4", half, half],
        ["", "SDEdit", "4", eighth, eighth],
    ]
    assert ["edit", "method", "n", "cpg", "tea effectiveness", "ssim"] in found
    assert ["remove Edema", "PRISM (paper)", "–", "0.800", "–", "–"] in found


def test_intervals_stand_beside_their_number_and_columns_have_one_precision(folder):
    frame = {"head": ["a", "b"], "auroc": [0.9, 0.975], "auroc_low": [0.8, 0.975]}
    frame |= {
        "auroc_high": [1.0, 0.975],
        "w": [7.5, 1.0],
        "seconds": [130.4, 7.0],
        "rate": [1e-5, 0],
    }
    pd.DataFrame(frame).to_csv(folder / "tables" / "heads.csv", index=False)
    wide = {f"x{n}": [0.001234 * n, 0.5] for n in range(13)}
    pd.DataFrame({"arm": ["plain", "true_x"]} | wide).to_csv(
        folder / "tables" / "wide.csv", index=False
    )
    found = rows(write_report(folder).read_text(encoding="utf-8"))
    assert ["head", "auroc", "w", "seconds", "rate"] in found
    assert ["a", "0.900 (0.800 to 1.000)", "7.5", "130.4", "1e-05"] in found
    assert ["b", "0.975", "1.0", "7.0", "0"] in found
    assert ["arm", "plain", "true x"] in found, "few rows of many columns lie on their side"
    assert ["x3", "0.004", "0.500"] in found


def test_arms_stand_side_by_side_with_the_range_of_their_trainings(folder):
    frame = {"arm": ["plain", "true_x"] * 2, "seed": [0, 0, 1, 1]}
    frame |= {"i.i.d. ece": [0.1, 0.25, 0.2, 0.25], "flip_device": [0.5, 0.25, 0.75, 0.5]}
    pd.DataFrame(frame).to_csv(folder / "tables" / "arms.csv", index=False)
    html = write_report(folder).read_text(encoding="utf-8")
    found = rows(html)
    assert ["measure", "plain", "true x"] in found
    assert ["i.i.d. ece", "0.150 (0.100 to 0.200)", "0.250"] in found
    assert ["flip device", "0.625 (0.500 to 0.750)", "0.375 (0.250 to 0.500)"] in found
    assert NOTES["arms"] in html
    assert "<td>0.150 <span>(0.100 to 0.200)</span></td>" in html  # may stand below its number


def test_columns_and_names_are_those_of_a_reader(folder):
    frame = {"arm": ["true_counterfactuals"], "baseline": ["sdedit"], "mean": [0.5], "low": [0.25]}
    frame |= {"high": [0.75], "only_a": [3]}
    pd.DataFrame(frame).to_csv(folder / "tables" / "differences.csv", index=False)
    found = rows(write_report(folder).read_text(encoding="utf-8"))
    assert ["arm", "baseline", "difference", "arm alone right"] in found
    assert ["true counterfactuals", "SDEdit", "0.500 (0.250 to 0.750)", "3"] in found


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.json", b"{"),
        ("metrics.json", b"[1]"),
        ("tables/empty.csv", b""),
        ("tables/table2.csv", b"method,metric\n\xfcber,1\n"),
        ("tables/twice.csv", b"metric,n,mean,edit\na,1,1,x\na,1,2,x\n"),
        ("figures/03_cut.png", b"\x89PNG"),
        ("notebooks/04_edit.ipynb", b""),
        ("notebooks/04_edit.ipynb", b"{}"),
    ],
)
def test_what_cannot_be_read_is_named_and_the_rest_is_there(folder, name, content):
    (folder / name).write_bytes(content)
    html = write_report(folder).read_text(encoding="utf-8")
    assert f"{name} cannot be shown" in html
    of_metrics = () if name == "metrics.json" else ("psnr", "31.2")
    for other in ("figure-03_x", "<p>kept</p>", "remove Edema", *of_metrics):
        assert other in html


def test_means_of_nothing_counted_are_a_table_like_any_other(folder):
    pd.DataFrame({"metric": ["l1"], "mean": [0.5]}).to_csv(folder / "tables/x.csv", index=False)
    assert ["l1", "0.5"] in rows(write_report(folder).read_text(encoding="utf-8"))


def test_a_damaged_manifest_is_one_line(folder):
    for text in ("{", "[]", '{"steps": 1}'):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(RunFolderError, match=r"manifest\.json is no"):
            write_report(folder)


def test_results_of_other_parameters_are_called_stale(tmp_path, make_notebook):
    folder, books = tmp_path / "run", tmp_path / "notebooks"
    write_text(folder / "cohort.json", "{}")
    write_json(record_path(folder, "01_caption"), {})
    for name in ("02_finetune", "03_invert"):
        notebook = make_notebook(books / f"{name}.ipynb", "seed: int = 0")
        book = Manifest(folder, "mine")
        book.begin(name, book.fingerprint(name, notebook, {"seed": 1}))
        run = Run(name, {"run_dir": str(folder), "seed": 1})
        run.save_metrics(psnr=1.0)
        run.finish()
        book.complete(name, read_json(record_path(folder, name)), 1.0)
    book.parameters = {"seed": 1}
    book.write()
    html = write_report(folder, books).read_text(encoding="utf-8")
    assert "stale" not in html.partition("</style>")[2].lower()
    book.parameters = {"seed": 2}  # with which 02_finetune then failed
    book.begin("02_finetune", {})
    html = write_report(folder, books).read_text(encoding="utf-8")
    states = {row[0]: row[1] for row in rows(html) if len(row) == 4}
    assert states["02_finetune"] == "failed or cut short"
    assert states["03_invert"] == "stale: parameters changed: seed"
    above = html.partition("<h2 id='Metrics'>")[2].partition("<details>")[0]
    assert "Stale" in above
    assert "03_invert" in above


def test_grids_have_the_whole_width(folder):
    Image.new("L", (1200, 1600)).save(folder / "figures" / "03_grid.png")
    soup = BeautifulSoup(write_report(folder).read_text(encoding="utf-8"), "html.parser")
    assert [card["id"] for card in soup("figure", class_="large")] == ["figure-03_grid"]


def test_notes_and_columns_belong_to_tables():
    assert {*NOTES, *RENAMED} <= {*CAPTIONS}


def test_every_figure_and_table_of_the_notebooks_has_a_caption(root):
    sources = [path.read_text(encoding="utf-8") for path in (root / "notebooks").glob("*.ipynb")]
    text = "\n".join(sources).replace('\\"', '"')
    figures = set(re.findall(r'save_figure\([^"]*"(\w+)"\)', text))
    tables = set(re.findall(r'save_table\(.*?"(\w+)"\)\\?n?"', text)) | {"measured", "leakage"}
    assert len(figures) > 30
    assert len(tables) > 20
    assert figures | tables == set(CAPTIONS)


def test_the_gallery_tells_the_same(root):
    gallery = (root / "figures" / "README.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| \[(\w+)\]\(\1\.png\) \| (.*?) \| .* \| \[.*\) \|$", gallery, re.M))
    there = {path.stem for path in (root / "figures").glob("*.png")}
    assert told == {name: CAPTIONS[name] for name in told}
    assert set(told) == there
