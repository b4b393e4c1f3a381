"""Plot docs/method.png, which shows one training step of GradAug: `python docs/method.py`.

The photo is scikit-learn's `flower.jpg` (CC BY 2.0, flickr.com/photos/vultilion/6056698931).
"""

from dataclasses import dataclass
from pathlib import Path

import PIL.Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from sklearn.datasets import load_sample_image

FILE = Path(__file__).with_suffix(".png")
INK, KEPT, LEFT_OUT, LOSS = "#263238", "#3f51b5", "#dfe4e8", "#d84315"
CHANNELS = (10, 10, 20, 20)  # of each layer
CHANNEL_HEIGHT = 0.055
LAYER_WIDTH, LAYER_PITCH = 0.22, 0.42
ROW_HEIGHT = 1.55
IMAGE_SIDE = 1.2  # of the full network's image
IMAGES_X, MODEL_X, PREDICTION_X, LOSS_X = 1.1, 2.95, 5.5, 8.39
HEADINGS = {
    IMAGES_X: "the same images, resized",
    MODEL_X + 0.74: "the same weights, fewer channels",
    PREDICTION_X + 0.45: "predictions",
    LOSS_X: "losses, added up",
}


@dataclass(frozen=True)
class Row:
    """One pass of the step.

    Args:
        title: name of the sub-network.
        width: its width multiplier.
        side: side of its images in pixels.
        prediction: probability of each class.
    """

    title: str
    width: float
    side: int
    prediction: tuple[float, ...]


ROWS = (
    Row("full model", 1.0, 224, (0.06, 0.72, 0.10, 0.12)),
    Row("sub-network", 0.9, 160, (0.09, 0.64, 0.12, 0.15)),
    Row("sub-network", 0.75, 192, (0.12, 0.55, 0.12, 0.21)),
    Row("narrowest sub-network", 0.6, 128, (0.20, 0.42, 0.13, 0.25)),
)


def main() -> None:
    figure = Figure(figsize=(9.5, 6.7))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 9.5), ylim=(0.5 - 6.7, 0.5), aspect="equal")
    axes.set_axis_off()
    photo = PIL.Image.fromarray(load_sample_image("flower.jpg")).crop((110, 0, 537, 427))
    centres = [-(place + 0.5) * ROW_HEIGHT for place in range(len(ROWS))]
    for row, y in zip(ROWS, centres, strict=True):
        plot_images(axes, row, photo, y)
        plot_model(axes, row, y)
        plot_prediction(axes, row, y)
        plot_arrow(axes, (IMAGES_X + IMAGE_SIDE / 2 + 0.08, y), (MODEL_X - 0.12, y))
        plot_arrow(axes, (MODEL_X + 1.62, y), (PREDICTION_X - 0.15, y))
    plot_losses(axes, centres)
    for x, text in HEADINGS.items():
        axes.text(x, 0.22, text, ha="center", va="center", fontsize=10, fontweight="bold", color=INK)
    figure.savefig(FILE, dpi=130)
    PIL.Image.open(FILE).convert("RGB").quantize(128, dither=PIL.Image.Dither.NONE).save(FILE, optimize=True)


def plot_images(axes: Axes, row: Row, photo: PIL.Image.Image, y: float) -> None:
    """Plot the photo at the side that the sub-network sees."""
    side = IMAGE_SIDE * row.side / ROWS[0].side
    left, bottom = IMAGES_X - side / 2, y - side / 2
    axes.imshow(photo.resize((row.side, row.side)), extent=(left, left + side, bottom, bottom + side), zorder=2)
    axes.text(IMAGES_X, bottom - 0.07, f"{row.side} pixels", ha="center", va="top", fontsize=9, color=INK)


def plot_model(axes: Axes, row: Row, y: float) -> None:
    """Plot each layer as a column of channels; a sub-network keeps the first ones."""
    for layer, channels in enumerate(CHANNELS):
        left, top = MODEL_X + layer * LAYER_PITCH, y + channels * CHANNEL_HEIGHT / 2
        kept = max(1, int(channels * row.width + 0.5))
        for channel in range(channels):
            colour = KEPT if channel < kept else LEFT_OUT
            place = (left, top - (channel + 1) * CHANNEL_HEIGHT)
            axes.add_patch(Rectangle(place, LAYER_WIDTH, CHANNEL_HEIGHT, facecolor=colour, edgecolor="white", lw=0.6))
    middle = MODEL_X + ((len(CHANNELS) - 1) * LAYER_PITCH + LAYER_WIDTH) / 2
    text = f"{row.title}, width {row.width:g}"
    axes.text(middle, y - 0.62, text, ha="center", va="top", fontsize=9, color=INK)


def plot_prediction(axes: Axes, row: Row, y: float) -> None:
    """Plot the probability of each class as a bar."""
    bottom = y - 0.35
    for place, probability in enumerate(row.prediction):
        bar = Rectangle((PREDICTION_X + 0.24 * place, bottom), 0.18, 0.98 * probability, facecolor=INK)
        axes.add_patch(bar)
    axes.plot([PREDICTION_X - 0.04, PREDICTION_X + 0.94], [bottom, bottom], color=INK, lw=1)


def plot_losses(axes: Axes, centres: list[float]) -> None:
    """Plot the losses: cross-entropy for the full model, KL divergence from its prediction for the others."""
    full, *others = centres
    end = LOSS_X - 0.92
    plot_box(axes, full, "cross-entropy\nwith the label")
    plot_arrow(axes, (PREDICTION_X + 1.05, full), (end, full), LOSS)
    for y in others:
        plot_box(axes, y, "KL divergence from the\nfull model's prediction")
        plot_arrow(axes, (PREDICTION_X + 1.05, y - 0.14), (end, y - 0.14), LOSS)
    turn = PREDICTION_X + 1.32
    axes.plot([turn, turn], [full, others[-1] + 0.14], color=INK, lw=1.4, ls=(0, (4, 2)))
    for y in others:
        plot_arrow(axes, (turn, y + 0.14), (end, y + 0.14), dashed=True)
    note = "target,\nwithout a gradient"
    axes.text(turn + 0.1, (full + others[0]) / 2, note, ha="left", va="center", fontsize=9, color=INK)


def plot_box(axes: Axes, y: float, text: str) -> None:
    """Plot the box of one loss."""
    style = "round,pad=0.02,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((LOSS_X - 0.86, y - 0.3), 1.72, 0.6, style, facecolor="#fbe9e7", edgecolor=LOSS))
    axes.text(LOSS_X, y, text, ha="center", va="center", fontsize=9, color=INK)


def plot_arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK, dashed: bool = False
) -> None:
    """Plot an arrow from one point to another."""
    line = {"arrowstyle": "-|>", "color": colour, "lw": 1.4, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=line | ({"ls": (0, (4, 2))} if dashed else {}))


if __name__ == "__main__":
    main()
