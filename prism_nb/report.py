"""The report of a run: one page a notebook and an index, whole in themselves.

The pages open without a network: images are embedded, formulas are drawn as SVG, and no script
or style comes from elsewhere. The index shows the profile, the state and time of each notebook,
the metrics, the tables and every figure. Used by `prism-nb run` and `prism-nb report`.
"""

import base64
import io
import re
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path

from prism_nb.files import read_json, write_text
from prism_nb.run import APPENDICES, STEPS, record_path

WIDGET = "application/vnd.jupyter.widget-view+json"
LONG = 24  # rows; a longer table is folded up
SHOWN = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]


def report_path(folder: Path) -> Path:
    """Where the index of a run's report stands."""
    return folder / "report" / "index.html"


def write_report(folder: Path) -> Path:
    """Write report/index.html and one page an executed notebook; return the index."""
    manifest = read_json(folder / "manifest.json")
    pages = sorted((folder / "notebooks").glob("[!.]*.ipynb"))
    names = [path.stem for path in pages]
    for path in pages:
        write_text(folder / "report" / f"{path.stem}.html", _notebook_page(path, folder, names))
    body = "".join(part(folder, manifest) for part in PARTS)
    title = f"Run {folder.name}"
    return write_text(report_path(folder), _page(title, _heading(folder, manifest) + body, names))


def _heading(folder: Path, manifest: dict) -> str:
    profile = escape(manifest["profile"])
    return f"<h1>Run {escape(folder.name)}</h1><p class='sub'>Profile {profile}</p>"


def _steps(folder: Path, manifest: dict) -> str:
    rows = []
    for notebook in STEPS:
        entry = manifest["steps"].get(notebook, {})
        if notebook in APPENDICES and not entry:
            continue
        done = "outputs" in entry and record_path(folder, notebook).exists()
        page = folder / "report" / f"{notebook}.html"
        state = "done" if done else "failed or cut short" if entry else "not run"
        seconds = f"{entry['seconds']:.0f} s" if done else ""
        link = f"<a href='{notebook}.html'>{notebook}</a>" if page.exists() else notebook
        mark = "state" if done else "state failed" if entry else "note"
        when = entry.get("finished", "")
        rows.append([link, f"<span class='{mark}'>{state}</span>", seconds, when])
    head = ["notebook", "state", "time", "finished"]
    return "<h2>Notebooks</h2>" + _table(head, rows, raw=True)


def _metrics(folder: Path, manifest: dict) -> str:
    path = folder / "metrics.json"
    metrics = read_json(path) if path.exists() else {}
    rows = [[nb, name, _number(v)] for nb, values in metrics.items() for name, v in _flat(values)]
    return "<h2>Metrics</h2>" + _table(["notebook", "metric", "value"], rows) if rows else ""


def _flat(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Numbers inside dicts and lists with the way to them as their name: auroc, Cardiomegaly."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}, {key}" if name else key)
    elif isinstance(value, list):
        yield name, ", ".join(_number(inner) for inner in value)
    else:
        yield name, value


def _tables(folder: Path, manifest: dict) -> str:
    import pandas

    parts = []
    paths = (folder / "tables").glob("[!.]*.csv")  # the paper's tables first
    for path in sorted(paths, key=lambda path: (not path.stem.startswith("table"), path.stem)):
        frame = pandas.read_csv(path)
        rows = [[_number(value) for value in row] for row in frame.itertuples(index=False)][:200]
        head = ["" if str(name).startswith("Unnamed") else name for name in frame.columns]
        cut = f", the first 200 of {len(frame)} rows" if len(frame) > 200 else ""
        name, table = f"{escape(path.stem)}{cut}", _table(head, rows)
        if len(frame) > LONG:
            parts.append(f"<details><summary>{name}</summary>{table}</details>")
        else:
            parts.append(f"<h3>{name}</h3>{table}")
    return "<h2>Tables</h2>" + "".join(parts) if parts else ""


def _figures(folder: Path, manifest: dict) -> str:
    parts = []
    for path in sorted((folder / "figures").glob("[!.]*.png")):
        image, name = _data_uri(path), escape(path.stem)
        shown = f"<a href='../figures/{name}.png'><img src='{image}' alt='{name}'></a>"
        parts.append(f"<figure>{shown}<figcaption>{name}</figcaption></figure>")
    return f"<h2>Figures</h2><div class='gallery'>{''.join(parts)}</div>" if parts else ""


def _parameters(folder: Path, manifest: dict) -> str:
    rows = [[key, str(value)] for key, value in sorted(manifest["parameters"].items())]
    note = "<p class='note'>What the profile gives; all else has the notebooks' defaults.</p>"
    return "<h2>Parameters</h2>" + note + _table(["name", "value"], rows)


def _provenance(folder: Path, manifest: dict) -> str:
    rows = {}
    for notebook in STEPS:
        made = manifest["steps"].get(notebook, {}).get("provenance", {})
        rows |= made.get("versions", {}) | ({"device": made["device"]} if made else {})
    return "<h2>Versions</h2>" + _table(["what", "version"], [*rows.items()]) if rows else ""


PARTS: tuple[Callable[[Path, dict], str], ...] = (
    _steps,
    _figures,
    _tables,
    _metrics,
    _parameters,
    _provenance,
)


def _notebook_page(path: Path, folder: Path, names: list[str]) -> str:
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    _without_widgets(notebook)
    html, _ = _exporter().from_notebook_node(notebook)
    return _page(path.stem, _offline(html, path.parent, folder, names), names, current=path.stem)


def _exporter() -> object:
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
    from traitlets.config import Config

    class Renderer(IPythonRenderer):
        def inline_math(self, body):
            return _math(body)

        def block_math(self, body):
            return _math(body, block=True)

        def latex_environment(self, name, body):
            return _math(body, block=True)

    def markdown(source):
        return MarkdownWithMath(renderer=Renderer(escape=False)).render(source)

    config = Config({"NbConvertBase": {"display_data_priority": SHOWN}})
    exporter = HTMLExporter(template_name="basic", config=config)
    exporter.register_filter("markdown2html", markdown)
    return exporter


def _math(source: str, block: bool = False) -> str:
    """Draw a formula as an embedded SVG; what matplotlib cannot set stays as its source."""
    from matplotlib.mathtext import math_to_image

    image = io.BytesIO()
    shown = escape(source.strip())
    try:
        math_to_image(f"${' '.join(source.split())}$", image, format="svg", dpi=72)
    except ValueError:
        return f"<code>{shown}</code>"
    data = base64.b64encode(image.getvalue()).decode()
    kind = "math block" if block else "math"
    return f"<img class='{kind}' alt='{shown}' src='data:image/svg+xml;base64,{data}'>"


def _without_widgets(notebook: object) -> None:
    # A widget is dead outside JupyterLab. A progress bar goes; of others a note remains.
    for cell in notebook.cells:
        kept = []
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if WIDGET in data and not any(kind.startswith("image/") for kind in data):
                text = "".join(data.get("text/plain", ""))
                if "%|" in text or "/s]" in text or "Progress" in text:
                    continue
                note = "<p class='note'>Interactive: open the notebook in JupyterLab.</p>"
                output["data"] = {"text/html": note}
            kept.append(output)
        if "outputs" in cell:
            cell["outputs"] = kept
    notebook.metadata.pop("widgets", None)


def _offline(html: str, base: Path, folder: Path, names: list[str]) -> str:
    """Embed images of the run, point links at pages, and drop what would need a network."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(html, "html.parser")
    for tag in soup(["script", "link", "iframe"]):
        tag.decompose()
    for image in soup("img"):
        source = image.get("src", "")
        path = (base / source).resolve() if not source.startswith("data:") else None
        if path and path.is_file() and path.is_relative_to(folder.resolve()):
            image["src"] = _data_uri(path)
        elif path:
            image.replace_with(image.get("alt", source))
    for link in soup("a", href=re.compile(r"^[^:]*\.ipynb(#.*)?$")):
        target, hash_sign, place = link["href"].partition("#")
        name = Path(target).stem
        if name in names:
            link["href"] = f"{name}.html{hash_sign}{place}"
        else:
            link.unwrap()
    for table in soup("table"):
        table.wrap(soup.new_tag("div", attrs={"class": "scroll"}))
    return str(soup)


def _page(title: str, body: str, names: list[str], current: str = "index") -> str:
    from pygments.formatters import HtmlFormatter

    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    code = HtmlFormatter(style="default").get_style_defs(".highlight")
    links = "".join(
        f"<a href='{name}.html'{' aria-current=page' if name == current else ''}>{shown}</a>"
        for name, shown in [("index", "Report"), *((name, name) for name in names)]
    )
    return (
        f"<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>{escape(title)}"
        "</title><meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<style>{code}\n.highlight {{ background: none; }}\n{style}</style></head><body>"
        f"<nav><div>{links}</div></nav><main>{body}</main></body></html>\n"
    )


def _table(head: list, rows: list, raw: bool = False) -> str:
    def row(cells: list, tag: str) -> str:
        return "".join(
            f"<{tag}{'' if _numeric(cell) else ' class=text'}>"
            f"{cell if raw else escape(str(cell))}</{tag}>"
            for cell in cells
        )

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    numeric = [all(_numeric(cells[i]) for cells in rows) for i in range(len(head))]
    top = "".join(
        f"<th{'' if number else ' class=text'}>{escape(str(name))}</th>"
        for name, number in zip(head, numeric, strict=True)
    )
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='scroll'>{table}</div>"


def _numeric(cell: object) -> bool:
    return bool(re.fullmatch(r"-?[\d,.]+(e[-+]?\d+)?( s| %)?|–", str(cell)))


def _number(value: object) -> str:
    if value is None or value != value:  # NaN is the one value that differs from itself
        return "–"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    if isinstance(value, float | int) and not isinstance(value, bool):
        return f"{int(value):,}"
    return str(value)


def _data_uri(path: Path) -> str:
    kind = "svg+xml" if path.suffix == ".svg" else path.suffix.lstrip(".").replace("jpg", "jpeg")
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
