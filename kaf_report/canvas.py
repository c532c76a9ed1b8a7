"""From a matplotlib figure to the bytes of a small PNG; the colours that all pictures share."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image

DPI = 80
PALETTE_SIZE = 160
LABEL_COLORS = (
    "#e6550d", "#31a354", "#3182bd", "#fdd835", "#8e24aa", "#00acc1", "#ec407a", "#8d6e63", "#c0ca33", "#5e35b1",
)  # fmt: skip
SCALE_COLORS = ("#00e5ff", "#ffea00", "#ff4081", "#76ff03", "#ff9100", "#e040fb", "#ffffff")


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches. Not pyplot: it would choose a backend for the whole process."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """Draw a figure; few colours, so that a page of many stays small."""
    canvas: Any = figure.canvas
    canvas.draw()
    pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    buffer = io.BytesIO()
    # An octree keeps small areas of their own colour, such as a cross; the default merges them with frequent colours.
    palette = pixels.quantize(PALETTE_SIZE, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    palette.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def show(axes: Any, plane: npt.NDArray[Any], aspect: float, title: str = "", **options: Any) -> None:
    """Draw a grey image without ticks; its window is the 1st to 99th percentile."""
    low, high = np.percentile(plane, (1, 99))
    axes.imshow(plane, **{"cmap": "gray", "vmin": low, "vmax": max(high, low + 1e-6), "aspect": aspect, **options})
    clean(axes, title)


def clean(axes: Any, title: str = "") -> None:
    """No ticks, no frame, a small title that is never read as a formula."""
    axes.set_axis_off()
    axes.set_title(title, fontsize=8, parse_math=False)


def label_color(index: int) -> str:
    """Colour of a label by its number."""
    return LABEL_COLORS[(index - 1) % len(LABEL_COLORS)]


def label_map(most: int) -> ListedColormap:
    """Colours of the labels 1 to `most`, for an image of them."""
    return ListedColormap([label_color(index) for index in range(1, most + 1)])
