"""The studio: edit films by hand in JupyterLab (paper 2.3, Figures 3, 4 and 6).

    from prism_nb import studio
    studio.open("runs/phantom")

Pictures as PNG bytes first, then thin widgets over workbench.py. An edit runs in a thread, so that
it can be cancelled; errors are one line below the buttons. A notebook run without a reader shows
what 04_edit wrote of the first film, and goes on. Films (H, W) in [0, 1]. Used by notebook 04.
"""

import threading
import time
from base64 import b64encode
from functools import partial
from html import escape

import ipywidgets as W
from PIL import Image

from prism_nb import workbench
from prism_nb.attention import explain_alignment
from prism_nb.captions import PromptError, untrained_words
from prism_nb.editing import PRESETS
from prism_nb.edits import change_in_words
from prism_nb.files import one_line
from prism_nb.findings import FINDINGS, PRESENT, slug
from prism_nb.images import unit_to_uint8
from prism_nb.inversion import METHODS
from prism_nb.workbench import facts, framed, pictures, png, wipe

OWN_WORDS, ALL_FILMS = "own words: write T and T'", "all films"
FILM, WIPE = "film", "original | counterfactual"
PANELS = (FILM, WIPE, "difference", "mask", "true counterfactual", "true difference")
MASKS = [("automatic", "auto"), ("none: the whole film", "none"), ("a box", "box")]
MOST_FILMS, MOST_EDITS, SMALL = 60, 12, 72  # thumbnails at once, history, pixels of a thumbnail
UNSHOWN = ("threshold", "detail", "seed")  # dials without a widget: kept as an edit had them
CHOSEN = "#d55e00"


class Cancelled(Exception):
    """The cancel button was pressed."""


def open(run, **options):
    """Show the studio of a run, its folder or its Run; options: as for workbench.prepare."""
    try:
        return Studio(workbench.prepare(run, **options)).view
    except (ValueError, OSError) as error:
        return W.HTML(_line(error, bad=True))


class Studio:
    """The widgets over a Bench; `view` is what a notebook shows."""

    def __init__(self, bench):
        self.bench, self.film, self.result, self.choices = bench, "", None, {}
        self.thread, self.stop = None, threading.Event()
        table = bench.cohort.table.set_index("film_id")
        self.table, self.thumbnails = table.loc[bench.inverted.film_ids], {}
        self._make_choices()
        self._make_dials()
        self._make_pictures()
        self._connect()
        self._show_films()
        self._set_dials({"preset": "default", "num_steps": bench.inverted.num_steps})
        edited = set() if bench.edits is None else {*bench.edits["film_id"]}
        self.choose_film(next((f for f in self.table.index if f in edited), self.table.index[0]))

    def _make_choices(self):
        found = [f for f in FINDINGS if (self.table[f] == PRESENT).any()]
        self.finding = W.Dropdown(options=[ALL_FILMS, *found], description="films")
        self.upload = W.FileUpload(accept=".png,.jpg,.jpeg,.dcm", description="my own film")
        self.films, self.strip = (W.Box(layout=W.Layout(flex_flow="row wrap")) for _ in "ab")
        wide = {"layout": W.Layout(width="98%")}
        self.edit, self.words = W.Dropdown(description="edit", **wide), W.HTML(**wide)
        texts = {"continuous_update": False, "rows": 3, **wide}
        self.source, self.target = (W.Textarea(description=name, **texts) for name in ("T", "T'"))

    def _make_dials(self):
        side, wide = self.bench.side, {"layout": W.Layout(width="98%")}
        self.preset = W.Dropdown(options=list(PRESETS), description="preset")
        self.method = W.Dropdown(options=list(METHODS), description="inversion")
        self.guidance = W.FloatSlider(max=25, step=0.5, description="guidance w")
        self.steps = W.BoundedIntText(min=1, max=999, description="steps N")
        self.strength = W.FloatSlider(min=0.05, max=1, step=0.05, description="strength")
        self.mask = W.Dropdown(options=MASKS, description="mask")
        self.keep = W.Checkbox(description="keep a box as it is")
        spans = {"mask": (side // 4, 3 * side // 4), "keep": (0, side // 5)}
        self.boxes = {
            name: [W.IntRangeSlider(value=span, max=side, description=f"{name} {a}") for a in "xy"]
            for name, span in spans.items()
        }
        self.go = W.Button(description="Edit", button_style="primary")
        self.cancel = W.Button(description="Cancel", disabled=True)
        self.save, self.copy = (W.Button(description=name) for name in ("Save pair", "As code"))
        self.bar, self.status = W.FloatProgress(max=1, **wide), W.HTML(**wide)

    def _make_pictures(self):
        self.panels = {}
        for name in PANELS:
            image = W.Image(format="png", layout=W.Layout(width="256px", height="256px"))
            image.add_class(f"prism-{slug(name)}")
            self.panels[name] = W.VBox([W.HTML(f"<b>{name}</b>"), image])
        grid = W.Box([*self.panels.values()], layout=W.Layout(flex_flow="row wrap"))
        self.share = W.FloatSlider(value=0.5, max=1, step=0.01, readout=False)
        self.share.layout.width = "256px"
        self.panels[WIPE].children += (self.share,)
        self.facts, self.code = W.HTML(), W.Textarea(rows=16, layout=W.Layout(width="520px"))
        boxes = [self.mask, *self.boxes["mask"], self.keep, *self.boxes["keep"]]
        how = [self.preset, self.method, self.guidance, self.steps, self.strength, *boxes]
        buttons = [W.HBox([self.go, self.cancel]), W.HBox([self.save, self.copy])]
        words = [self.edit, self.source, self.target, self.words]
        dials = [*words, *how, *buttons, self.bar, self.status]
        dials = W.VBox(dials, layout=W.Layout(width="340px", flex="0 0 auto"))
        shown = W.VBox([grid, self.facts, self.code])
        films = [W.HBox([self.finding, self.upload]), self.films]
        self.view = W.VBox([*films, W.HBox([dials, shown]), W.HTML("<b>history</b>"), self.strip])
        self.view.add_class("prism-studio")

    def _connect(self):
        def when(widget, act, *arguments):
            widget.observe(lambda _: self._try(act, *arguments), "value")

        when(self.finding, self._show_films)
        when(self.upload, self._take_upload)
        when(self.edit, self._choose_edit)
        when(self.preset, lambda: self._set_dials({"preset": self.preset.value}))
        when(self.share, lambda: self._draw(WIPE, wipe(self.result, self.share.value)))
        for text in (self.source, self.target):
            when(text, self._explain)
        for dial in (self.mask, self.keep, *self.boxes["mask"], *self.boxes["keep"]):
            when(dial, self._frame)
        for button, act in ((self.go, self.run), (self.save, self._save), (self.copy, self._copy)):
            button.on_click(lambda _, act=act: self._try(act))
        self.cancel.on_click(lambda _: self.stop.set())

    def choose_film(self, film):
        """Take up a film, of the run or one's own, with the first edit that the run has of it."""
        self._take(film)
        if result := workbench.stored(self.bench, film):
            self.recall(result)
        else:  # what a film of one's own shows only its owner can say
            own = film not in self.table.index
            self._set_dials({"preset": "default", "num_steps": self.bench.inverted.num_steps})
            self._set_texts(*(("", "") if own else next(iter(self.choices.values()))))
            self.show(None)

    def recall(self, result):
        """Set film, words and dials as they were for an edit, and show it."""
        self._take(result.call["film"])
        self._set_dials(result.call)
        self._set_texts(result.call["source"], result.call["target"])
        self.show(result)

    def show(self, result):
        """Show an edit, or the film alone."""
        self.result = result
        shown = {WIPE: wipe(result, self.share.value), **pictures(result)} if result else {}
        for name in PANELS[1:]:
            self._draw(name, shown.get(name))
        self._frame()
        self.facts.value = facts(result) if result else ""
        self.save.disabled = self.copy.disabled = result is None
        self.code.layout.display = "none"

    def call(self):
        """What the dials say, as the arguments of make_edit."""
        call = {"film": self.film, "source": self.source.value, "target": self.target.value}
        call |= {"preset": self.preset.value, "method": self.method.value}
        call |= {"num_steps": self.steps.value, "guidance_scale": self.guidance.value}
        call["mask"] = self._box("mask") if self.mask.value == "box" else self.mask.value
        if self.keep.value:
            call["keep"] = self._box("keep")
        call |= self.others
        return call | ({"strength": self.strength.value} if self._is_peer() else {})

    def run(self):
        """Start the edit that the dials say, in a thread."""
        self.stop.clear()
        self._busy(True)
        self.say("working: the bar counts calls of the U-Net")
        self.thread = threading.Thread(target=self._work, args=(self.call(),), daemon=True)
        self.thread.start()

    def say(self, text, bad=False):
        """Say something in one line below the buttons."""
        self.status.value = _line(text, bad)

    def _work(self, call):
        started = time.monotonic()
        try:
            result = workbench.make_edit(self.bench, **call, progress=self._tick)
            tip = f"{call['target']} ({call['preset']}, w = {call['guidance_scale']:g})"
            act = partial(self._try, self.recall, result)
            thumbnail = _thumbnail(result.counterfactual, tip, act)
            self.strip.children = (thumbnail, *self.strip.children[: MOST_EDITS - 1])
            self.recall(result)
            self.say(f"done in {time.monotonic() - started:.1f} s")
        except Cancelled:
            self.say("cancelled: nothing was changed")
        except Exception as error:  # noqa: BLE001 - in a thread nobody else would say it
            self.say(error, bad=True)
        finally:
            self._busy(False)

    def _tick(self, done, total):
        if self.stop.is_set():
            raise Cancelled
        self.bar.value = done / total

    def _busy(self, busy):
        self.cancel.disabled, self.bar.value = not busy, 0
        self._allow()

    def _allow(self):
        """An edit can be made when none is being made and T and T' are written."""
        written = self.source.value.strip() and self.target.value.strip()
        self.go.disabled = not (written and self.cancel.disabled)

    def _mark(self):
        """Frame the chosen film in the strip."""
        for film, thumbnail in self.thumbnails.items():
            thumbnail.layout.border = f"3px solid {CHOSEN if film == self.film else 'transparent'}"

    def _try(self, act, *arguments):
        try:
            act(*arguments)
        except (ValueError, OSError) as error:
            self.say(error, bad=True)

    def _show_films(self):
        finding, films = self.finding.value, self.table
        films = films if finding == ALL_FILMS else films[films[finding] == PRESENT]
        films = films.index[:MOST_FILMS].tolist()
        for film in films:
            if film not in self.thumbnails:
                picture, act = workbench.film_of(self.bench, film), self.choose_film
                self.thumbnails[film] = _thumbnail(picture, film, partial(self._try, act, film))
        self._mark()
        self.films.children = [self.thumbnails[film] for film in films]

    def _take_upload(self):
        if self.upload.value:
            (file,) = self.upload.value
            self.upload.value = ()  # the same file may be given again
            try:
                film = workbench.receive(self.bench, bytes(file["content"]))
            except ValueError as error:
                raise ValueError(f"{file['name']}: {error}") from None
            self.choose_film(film)
            self.say(f"{file['name']}: choose an edit, or write what it shows (T) and should (T')")

    def _take(self, film):
        self.film, self.factual = film, workbench.film_of(self.bench, film)
        self.choices = workbench.choices(self.bench, film)
        self.edit.options = [OWN_WORDS, *self.choices]
        self._mark()

    def _choose_edit(self):
        pair = self.choices.get(self.edit.value)
        if pair and pair != (self.source.value, self.target.value):
            self._set_texts(*pair)
            if result := workbench.stored(self.bench, self.film, pair[1]):
                self.recall(result)

    def _set_texts(self, source, target):
        self.source.value, self.target.value = source, target
        self._explain()

    def _explain(self):
        """Below T and T': which words go and come, their alignment, and what was never trained."""
        pair = self.source.value, self.target.value
        names = (name for name, known in self.choices.items() if known == pair)
        self.edit.value = next(names, OWN_WORDS)
        tokenizer = self.bench.model.tokenizer
        self._allow()
        try:
            change = change_in_words(tokenizer, *pair)
            lines = explain_alignment(tokenizer, *pair)
        except PromptError as error:
            self.words.value = _line(error, bad=True)
            return
        text = f"<details><summary>{escape(change)}</summary>"
        odd = untrained_words(" ".join(pair), self.bench.trained)
        warning = _line(f"never trained, so of no known effect: {', '.join(odd)}", bad=True)
        self.words.value = f"{text}<pre>{escape(lines)}</pre></details>{warning if odd else ''}"

    def _is_peer(self):
        return PRESETS[self.preset.value].dials.method != "inversion"

    def _set_dials(self, call):
        """Set the dials as a preset has them, and what a call has besides."""
        self.preset.value = call["preset"]
        preset = PRESETS[call["preset"]]
        dials = vars(preset.dials) | {k: v for k, v in call.items() if k != "method"}
        self.method.value = call.get("method", preset.inversion["method"])
        self.guidance.value, self.strength.value = dials["guidance_scale"], dials["strength"]
        self.steps.value = dials.get("num_steps", self.steps.value)
        self.strength.layout.display = None if self._is_peer() else "none"
        for name, sliders in self.boxes.items():
            if isinstance(dials[name], list | tuple):
                left, top, right, bottom = dials[name]
                sliders[0].value, sliders[1].value = (left, right), (top, bottom)
        self.mask.value = dials["mask"] if isinstance(dials["mask"], str) else "box"
        self.keep.value = dials["keep"] is not None
        self.others = {name: call[name] for name in UNSHOWN if name in call}

    def _box(self, name):
        (left, right), (top, bottom) = (slider.value for slider in self.boxes[name])
        return left, top, right, bottom

    def _frame(self):
        """Show the film with the boxes that are in use, and their sliders."""
        used = {"mask": self.mask.value == "box", "keep": self.keep.value}
        for name, sliders in self.boxes.items():
            for slider in sliders:
                slider.layout.display = None if used[name] else "none"
        boxes = {name: self._box(name) for name in used if used[name]}
        self._draw(FILM, framed(self.factual, boxes))

    def _draw(self, panel, data):
        self.panels[panel].layout.display = "none" if data is None else None
        self.panels[panel].children[1].value = data or b""

    def _save(self):
        path = workbench.save_pair(self.bench, self.result)
        self.say(f"saved {workbench.shown(path)}, and its films beside it")

    def _copy(self):
        self.code.value = workbench.as_code(self.bench, self.result)
        self.code.layout.display = None


def _thumbnail(film, tip, act):
    """A button that shows a film; a click calls act()."""
    small = Image.fromarray(unit_to_uint8(film)).resize((SMALL, SMALL))
    size = {"width": f"{SMALL}px", "height": f"{SMALL}px"}
    button = W.Button(tooltip=tip, layout=W.Layout(**size))
    name, data = f"prism-{button.model_id}", b64encode(png(small)).decode()
    style = f"<style>.{name} {{background: url(data:image/png;base64,{data})}}</style>"
    button.add_class(name).on_click(lambda _: act())
    return W.Box([W.HTML(style, layout=W.Layout(display="none")), button])


def _line(text, bad=False):
    """One line of HTML, whatever was said; an error without words gets its name."""
    line = escape(one_line(text, 400))
    return f"<span style='color:{'#b00020' if bad else 'inherit'}'>{line}</span>"
