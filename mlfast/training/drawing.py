"""Figures without pyplot: no window, and no global state in the caller's process."""

from __future__ import annotations

import io
from typing import Any

BLUE, ORANGE, GREEN, GREY = "#3b6fb6", "#d9822b", "#2f9e6e", "#777777"


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Any) -> None:
    """The look that all pictures share: a light grid, two spines, a legend where there is something to name."""
    axes.grid(True, which="both", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def png(figure: Any, dpi: int = 130) -> bytes:
    """The figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()
