"""How the pictures look: dark lines on a light card, to be read on a light page and on a dark one.

The scripts beside this file draw a picture each: `python -m lessons.pictures.grid` in the repository.
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
USER, MOSHI, TEXT, QUIET = "#b4552d", "#2f6f9f", "#3d7a45", "#e4e2da"  # colours of who speaks, and of silence

plt.rcParams.update(
    {
        "figure.facecolor": "#fbfaf6",
        "axes.facecolor": "#fbfaf6",
        "savefig.facecolor": "#fbfaf6",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "path",
        "svg.hashsalt": "moshi_min",
        "figure.constrained_layout.use": True,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
    }
)


def save(figure, path: Path) -> None:
    """Writes the SVG, the same bytes for the same picture."""
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)
