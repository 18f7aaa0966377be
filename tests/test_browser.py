"""JupyterLab in a real browser: 04_edit runs from top to bottom, and the studio is used by hand.

The server listens on loopback alone. The tests stand in the order in which a reader does things,
on one page. A picture of each state is left in pytest's temporary folder (`--basetemp` names it).
"""

import io
import json
import os
import shutil
import subprocess
import sys
import time

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from safetensors.torch import save_file

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 60_000  # what a loaded machine may take for any one thing, in ms


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium: the system's, else playwright's own."""
    with sync_playwright() as play:
        found = next(filter(None, map(shutil.which, NAMES)), play.chromium.executable_path)
        if not os.path.exists(found):
            need = "no browser here: `make browser` installs Chromium"
            (pytest.fail if os.environ.get("CI") else pytest.skip)(need)
        options = {"executable_path": found, "args": ["--disable-quic", "--disable-gpu"]}
        with play.chromium.launch(**options) as opened:
            yield opened


@pytest.fixture(scope="module")
def folder(root, tiny_run, tmp_path_factory):
    """A folder with a run after 03_invert, and 04_edit that reads it."""
    folder = tmp_path_factory.mktemp("browser")
    run = shutil.copytree(tiny_run, folder / "run")
    (run / "steps").mkdir()
    for name in ("01_caption", "02_finetune", "03_invert"):
        (run / "steps" / f"{name}.json").write_text("{}")
    floors = dict.fromkeys(("vae", "reconstruction"), torch.zeros(6, 64, 64, dtype=torch.uint8))
    save_file(
        {name: films.clone() for name, films in floors.items()},
        run / "inversions" / "reconstructions.safetensors",
    )
    book = nbformat.read(root / "notebooks" / "04_edit.ipynb", as_version=4)
    (cell,) = (c for c in book.cells if "parameters" in c.metadata.get("tags", []))
    cell.source = cell.source.replace('"runs/smoke"', repr(str(run)))
    nbformat.write(book, folder / "04_edit.ipynb")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    """JupyterLab on a free port of loopback, with settings of its own: its address."""
    places = ("RUNTIME_DIR", "CONFIG_DIR", "DATA_DIR")
    own = {f"JUPYTER_{place}": str(folder / ".jupyter" / place) for place in places}
    own |= {f"JUPYTERLAB_{x}_DIR": str(folder / ".jupyter" / x) for x in ("SETTINGS", "WORKSPACES")}
    env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | own
    settings = folder / ".jupyter" / "SETTINGS" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0"]
    command += ["--ip=127.0.0.1", f"--ServerApp.root_dir={folder}"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            runtime = folder / ".jupyter" / "RUNTIME_DIR"
            for _ in range(600):
                if found := list(runtime.glob("jpserver-*.json")):
                    break
                assert process.poll() is None, (folder / "server.log").read_text()[-2000:]
                time.sleep(0.2)
            about = json.loads(found[0].read_text())
            yield "{url}lab/tree/04_edit.ipynb?token={token}".format(**about)
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def page(browser, server):
    """04_edit in JupyterLab, every cell run."""
    page = browser.new_page(viewport={"width": 1400, "height": 1500})
    page.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    page.goto(server)
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator(".prism-studio").wait_for()
    return page


@pytest.fixture
def studio(page):
    return page.locator(".prism-studio")


@pytest.fixture(autouse=True)
def picture(request, folder):
    """Leave a picture of the page when a test has ended."""
    yield
    if "page" in request.fixturenames:
        page = request.getfixturevalue("page")
        page.locator(".prism-studio").evaluate("node => node.scrollIntoView()")
        page.screenshot(path=folder / f"{request.node.name}.png")


def dial(studio, name):
    """A widget by its label."""
    return studio.locator(".jupyter-widgets:has(> .widget-label)", has_text=name).first


def press(studio, name):
    studio.get_by_role("button", name=name, exact=True).click()


def says(studio, text):
    """Wait for what the studio says; it may be one line only."""
    line = studio.locator(".widget-html", has_text=text).last
    line.wait_for()
    return line.inner_text()


def upload(page, studio, file):
    with page.expect_file_chooser() as chooser:
        studio.get_by_role("button", name="my own film").click()
    chooser.value.set_files(file)


def test_run_all_ends_with_the_studio(page, studio, folder):
    done = folder / "run" / "steps" / "04_edit.json"
    for _ in range(PATIENCE // 200):
        if done.is_file():
            break
        page.wait_for_timeout(200)
    assert done.is_file(), "every cell ran"
    assert page.locator("[data-mime-type*=error]").count() == 0
    expect(studio.get_by_role("button", name="Edit", exact=True)).to_be_enabled()
    expect(studio.locator("img:visible")).to_have_count(6)  # the edit that 04 made of the film


def test_a_dial_is_moved_and_an_edit_made(page, studio):
    guidance, difference = dial(studio, "guidance w"), studio.locator(".prism-difference")
    before = float(guidance.locator(".widget-readout").inner_text())
    shown = difference.get_attribute("src")
    guidance.locator(".noUi-handle").focus()
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    expect(guidance.locator(".widget-readout")).to_have_text(f"{before + 4:.2f}")
    press(studio, "Edit")
    says(studio, "done in")
    expect(difference).not_to_have_attribute("src", shown)
    expect(studio.get_by_text("S_CLIP")).to_be_visible()


def test_before_and_after_are_wiped(page, studio):
    picture = studio.locator(".prism-original_counterfactual")
    shown = picture.get_attribute("src")
    studio.locator(".widget-vbox:has(> .prism-original_counterfactual) .noUi-handle").focus()
    page.keyboard.press("PageUp")
    expect(picture).not_to_have_attribute("src", shown)


def test_a_pair_is_saved_and_copied_as_code(studio, folder):
    press(studio, "Save pair")
    assert "run/studio/001_" in says(studio, "saved")
    (path,) = (folder / "run" / "studio").glob("*.json")
    call = json.loads(path.read_text())["call"]
    press(studio, "As code")
    code = studio.locator("textarea").last
    expect(code).to_be_visible()
    assert f"guidance_scale={call['guidance_scale']}" in code.input_value()


def test_a_long_edit_is_cancelled(page, studio):
    steps = dial(studio, "steps N").locator("input")
    steps.fill("900")
    steps.press("Enter")
    press(studio, "Edit")
    says(studio, "working")
    press(studio, "Cancel")
    says(studio, "cancelled: nothing was changed")
    expect(studio.get_by_role("button", name="Edit", exact=True)).to_be_enabled()
    steps.fill("3")
    steps.press("Enter")


def test_a_broken_file_is_refused_in_one_line(page, studio, folder):
    upload(page, studio, {"name": "a.png", "mimeType": "image/png", "buffer": b"no film"})
    line = says(studio, "a.png: this is not a PNG or JPEG")
    assert "\n" not in line.strip()
    assert "Traceback" not in page.locator(".jp-Notebook").inner_text()


def test_a_film_of_ones_own_is_edited(page, studio, folder):
    film = np.random.default_rng(0).integers(0, 256, (80, 80), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(film).save(buffer, format="JPEG")
    own = {"name": "own.jpg", "mimeType": "image/jpeg", "buffer": buffer.getvalue()}
    upload(page, studio, own)
    says(studio, "own.jpg: choose an edit")
    expect(studio.locator("img:visible")).to_have_count(1)
    dial(studio, "edit").locator("select").select_option("add Edema")
    target = studio.locator("textarea").nth(1)
    expect(target).to_have_value("chest x-ray showing edema")
    target.fill("chest x-ray showing a ghost")
    target.blur()
    says(studio, "never trained, so of no known effect: a, ghost")
    press(studio, "Edit")
    says(studio, "done in")
    expect(studio.locator("img:visible")).to_have_count(4)  # of this one no truth is known


def test_another_film_is_chosen(page, studio):
    source = studio.locator("textarea").first
    before = source.input_value()
    studio.locator("button[title^=patient]").last.click()
    expect(source).not_to_have_value(before)
