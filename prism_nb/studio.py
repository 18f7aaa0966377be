"""Interactive views for JupyterLab: a plain function of a number behind a slider.

The picture is a PNG in an Image widget, not captured output: a notebook run headless shows the
first page and goes on, and nothing is lost without a click. Used by notebook 04.
"""

import io

import ipywidgets as widgets
import matplotlib.pyplot as plt


def page_through(count, draw, label="edit"):
    """A slider over `count` pages; draw(number) returns Axes or an array of Axes."""
    if count < 1:
        raise ValueError(f"{count} pages: there is nothing to show, give at least one")
    slider = widgets.IntSlider(0, 0, count - 1, description=label, continuous_update=False)
    picture = widgets.Image(value=_png(draw(0)), format="png")
    slider.observe(lambda change: setattr(picture, "value", _png(draw(change["new"]))), "value")
    return widgets.VBox([slider, picture])


def _png(axes):
    figure = getattr(axes, "flat", [axes])[0].figure
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()
