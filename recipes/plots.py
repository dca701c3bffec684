"""Plots drawn with Matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.recipes.atomic_files import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(**settings: Any) -> Figure:
    """A Matplotlib figure whose `savefig` draws names literally: dollar signs in them do not start formulas."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    class Literal(Figure):
        def savefig(self, *args: Any, **kwargs: Any) -> None:
            for text in self.findobj(Text):
                text.set_parse_math(False)
            with matplotlib.rc_context({"text.parse_math": False}):  # for labels that are made while it is drawn
                super().savefig(*args, **kwargs)

    return Literal(layout="constrained", **settings)


def plot_curves(path: Path, history: list[dict[str, Any]], title: str, scores: dict[str, str]) -> None:
    """Plot loss, scores and learning rate over the epochs.

    Args:
        path: The PNG to write.
        history: A record per epoch: `epoch`, `lr`, and any of `train_loss`, `val_loss`, `train_<score>`,
            `val_<score>`.
        title: The title of the figure.
        scores: The titles of the scores, which are in percent, by name; the best value of the first one is marked.
    """
    from matplotlib.ticker import MaxNLocator

    def series(key: str) -> tuple[list[int], list[float]]:
        points = [(record["epoch"], record[key]) for record in history if record.get(key) is not None]
        return [x for x, _ in points], [y for _, y in points]

    figure = new_figure(figsize=(12, 3.8), dpi=120)
    figure.suptitle(title, fontsize=11)
    loss, score, rate = figure.subplots(1, 3)
    for key, where in (("train_loss", "training (augmented)"), ("val_loss", "validation")):
        if series(key)[0]:
            loss.plot(*series(key), marker=".", label=where)
    for name, label in scores.items():
        for split, where in (("train", "training (augmented)"), ("val", "validation")):
            if series(f"{split}_{name}")[0]:
                score.plot(*series(f"{split}_{name}"), marker=".", label=where if len(scores) == 1 else label)
    main, label = next(iter(scores.items()))
    epochs, values = series(f"val_{main}")
    if values:
        best = max(range(len(values)), key=values.__getitem__)
        score.axhline(values[best], color="grey", linewidth=0.8, linestyle=":")
        score.set_title(f"{label}: best {values[best]:.2f} % in epoch {epochs[best]}, last {values[-1]:.2f} %", size=9)
    rate.plot(*series("lr"), marker=".", color="tab:green")
    loss.set_title("loss", size=9)
    rate.set_title("learning rate at the end of the epoch", size=9)
    score.set_ylabel("%")
    for axes in (loss, score, rate):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
    loss.legend(fontsize=8)
    if score.lines:
        score.legend(fontsize=8, loc="lower right")
    with atomic(path) as file:
        figure.savefig(file, format="png")
