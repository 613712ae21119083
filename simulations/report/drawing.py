"""Draw with matplotlib as SVG for use inside an HTML page, or as PNG.

Text in an SVG stays text, the colors are the variables of the page's style sheet, and equal data give equal bytes.
matplotlib is imported when a figure is drawn.
"""

import re
import warnings
from collections.abc import Callable
from html import escape
from io import BytesIO, StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 72  # an inch; one point is one unit of the SVG
SHARPNESS = 3  # pixels a unit of a PNG
WIDTH = 440.0  # units: the width of a phone, so that text of 11 units is readable there
LONGEST = 16  # characters of a name next to a plot
CHARACTER = 6.3  # units, about

# Each color stands for a variable of the style sheet, which has a light and a dark value. The arms differ in shape as
# well; the hues are of Okabe and Ito's palette for color-blind readers, darkened until they are readable as text.
INK, MUTED, LINE, TILE, DROPPED = "#1b1f24", "#59636e", "#d4d9df", "#c5dcea", "#b3400d"
ARM_COLORS = {"base": "#6a737d", "local": "#a65a00", "global": "#0069a8", "personal": "#00735a"}
PAPER = "#fefefe"
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    TILE: "--tile",
    DROPPED: "--dropped",
    PAPER: "--paper",
    **{color: f"--{arm}" for arm, color in ARM_COLORS.items()},
}
STYLE: dict[Any, object] = {
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.labelsize": 10.5,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.family": ["DejaVu Sans"],  # only to measure; the page has its own
    "font.size": 10.5,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # a name may contain a dollar sign
    "xtick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.color": LINE,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
}


def svg(key: str, title: str, description: str, height: float, paint: Callable[["Figure"], None]) -> str:
    """An ``<svg>`` element of ``WIDTH`` by ``height``.

    Args:
        key: Letters only, different for each figure of the page.
        title: What a screen reader says, and a resting pointer shows.
        description: What the figure shows, in words.
        height: In units of the SVG.
        paint: Draws on the empty figure.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    out = StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": key}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(WIDTH / POINTS, height / POINTS))
        FigureCanvasSVG(figure)
        paint(figure)
        figure.savefig(out, format="svg", metadata={"Date": None})
    return _inline(out.getvalue(), key, title, description)


def png(height: float, paint: Callable[["Figure"], None]) -> bytes:
    """A picture of ``WIDTH`` by ``height`` as on the light page, at ``SHARPNESS`` pixels a unit."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    out = BytesIO()
    with mpl.rc_context({**STYLE, "figure.facecolor": "white"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(WIDTH / POINTS, height / POINTS))
        FigureCanvasAgg(figure)
        paint(figure)
        figure.savefig(out, format="png", dpi=SHARPNESS * POINTS, metadata={"Software": None})
    return out.getvalue()


def axes(figure: "Figure", *, left: float, top: float, width: float, height: float) -> "Axes":
    """Axes at a place in units of the SVG, measured from the upper left corner."""
    full_width, full_height = figure.get_size_inches() * POINTS
    lower = full_height - top - height
    return figure.add_axes((left / full_width, lower / full_height, width / full_width, height / full_height))


def short(name: str) -> str:
    """A name that fits next to a plot."""
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def _inline(document: str, key: str, title: str, description: str) -> str:
    body = document[document.index("<svg") :]
    opening, _, rest = body.partition(">")
    view = re.search(r'viewBox="[^"]*"', opening)
    rest = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", rest, flags=re.DOTALL)
    rest = re.sub(r'<g id="[^"]*"', "<g", rest).replace("xlink:href", "href")
    rest = re.sub(r"font: ((?:\d+ )?[\d.]+px) [^;\"]*", r"font: \1 var(--font)", rest)
    rest = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", rest)
    for color, variable in VARIABLES.items():
        rest = rest.replace(color, f"var({variable})")
    head = (
        f'<svg {view[0] if view else ""} role="img" aria-labelledby="{key}-title {key}-text">'
        f'<title id="{key}-title">{escape(title)}</title><desc id="{key}-text">{escape(description)}</desc>'
    )
    return head + rest.strip()
