"""Draw the README's picture: an ordinary, an over-parameterized and a folded layer.

Run: python docs/draw_overview.py
"""

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

FILE = Path(__file__).with_name("overview.svg")
DATA, KERNEL, TRAINED, INK = "#e8eef7", "#c9dcf2", "#f6dcb8", "#222222"


def box(axes, x, y, text, color, width=1.9, height=0.8):
    """Draw a rounded box with text, centred at x and y."""
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0.06",
            facecolor=color, edgecolor=INK, linewidth=1,
        )
    )  # fmt: skip
    axes.text(x, y, text, ha="center", va="center", fontsize=11, color=INK)


def arrow(axes, start, end):
    """Draw an arrow between two points."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.2})


def layer(axes, title, note, kernel):
    """Draw x, the convolution and y from left to right, and the kernel that enters from above."""
    axes.set(xlim=(0, 6), ylim=(-0.5, 5.6), aspect="equal")
    axes.axis("off")
    axes.text(3, 5.3, title, ha="center", fontsize=13, fontweight="bold", color=INK)
    axes.text(3, -0.35, note, ha="center", fontsize=10, color=INK)
    box(axes, 0.55, 0.8, "x", DATA, width=0.6)
    box(axes, 3, 0.8, "convolution", DATA)
    box(axes, 5.45, 0.8, "y", DATA, width=0.6)
    arrow(axes, (0.95, 0.8), (1.95, 0.8))
    arrow(axes, (4.05, 0.8), (5.05, 0.8))
    box(axes, 3, 2.4, kernel, KERNEL, width=2.2)
    arrow(axes, (3, 1.92), (3, 1.3))


def draw():
    """Return the picture."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    ordinary, trained, folded = figure.subplots(1, 3)
    layer(ordinary, "ordinary layer", "trains K", "K\n(O, I/g, M)")
    layer(trained, "over-parameterized, in training", "trains W and D", "K = W·(E + D)ᵀ")
    box(trained, 1.5, 4.2, "W\n(O, I/g, S)", TRAINED)
    box(trained, 4.5, 4.2, "D\n(I, M, S)", TRAINED)
    arrow(trained, (1.5, 3.72), (2.5, 2.9))
    arrow(trained, (4.5, 3.72), (3.5, 2.9))
    layer(
        folded, "folded, for inference", "the same output, at the ordinary cost", "K\n(O, I/g, M)"
    )
    return figure


if __name__ == "__main__":
    mpl.rcParams["svg.hashsalt"] = "doconv"  # the same drawing gives the same file
    draw().savefig(FILE, metadata={"Date": None}, facecolor="white")
