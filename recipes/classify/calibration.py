"""How far a classifier's figures can be trusted: calibration, the temperature that improves it, and an interval.

A classifier is calibrated if it is right as often as its probabilities say. Guo et al., On Calibration of Modern Neural
Networks, ICML 2017 (arXiv:1706.04599), describes the calibration error, the reliability diagram and the temperature.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import TypedDict

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from zoo.recipes import plots
from zoo.recipes.atomic_files import atomic

BINS = 15
CONFIDENCE = 0.95  # of the interval
MOST_LOGITS = 10**8  # that are kept: 0.4 GB
LEAST_IMAGES = 100  # for a temperature: half of them are for the fit
_BOUNDS = (0.05, 20.0)  # of the temperature
_CHUNK = 4096  # rows in float64 at a time


class Scores(TypedDict):
    """How well probabilities fit: `ece` in percent, `nll` and `brier`; per bin [images, mean confidence, accuracy]."""

    ece: float
    nll: float
    brier: float
    diagram: list[list[float | None]]


class Calibration(TypedDict):
    """The calibration of a model on `images` images.

    `all` is measured on all of them. The temperature is fitted on `fitted_on` of them; `before` and `after` are
    measured on the other ones, with temperature 1 and with the fitted one. If there is no temperature, `reason` says
    why, and these are None.
    """

    bins: int
    images: int
    all: Scores
    temperature: float | None
    reason: str | None
    seed: int
    fitted_on: int
    before: Scores | None
    after: Scores | None


def interval(right: int, images: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's interval of an accuracy in percent, of which `right` of `images` images were right.

    It is the score interval of E. B. Wilson, JASA 22 (1927), without a continuity correction: unlike the textbook's
    interval, it is also right for few images and near 100 %.
    """
    z, share = NormalDist().inv_cdf(0.5 + confidence / 2), right / images
    middle = share + z**2 / (2 * images)
    reach = z * math.sqrt(share * (1 - share) / images + z**2 / (4 * images**2))
    whole = 1 + z**2 / images
    return 100 * max(0.0, (middle - reach) / whole), 100 * min(1.0, (middle + reach) / whole)


def scores(logits: np.ndarray, targets: np.ndarray, temperature: float = 1.0, bins: int = BINS) -> Scores:
    """Measure the calibration of softmax(logits / temperature).

    `ece` is the expected calibration error of the most probable class: the mean over the images of the distance
    between the mean confidence and the accuracy of their bin. The bins of the confidence are equally wide. `nll` is the
    negative log-likelihood; `brier` the sum over the classes of the squared errors of the probabilities (0 to 2).

    Args:
        logits: (N, classes), N at least 1.
        targets: The labels (N,), integers.
        temperature: Divides the logits.
        bins: The number of bins.
    """
    nll, brier = 0.0, 0.0
    counts, sums, rights = np.zeros(bins), np.zeros(bins), np.zeros(bins)
    for log_p, labels in _chunks(logits, targets, temperature):
        own, p = log_p[np.arange(len(labels)), labels], np.exp(log_p)
        nll -= own.sum()
        brier += (p**2).sum() - 2 * np.exp(own).sum() + len(own)
        confidence, right = p.max(1), p.argmax(1) == labels
        place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
        for total, values in ((counts, None), (sums, confidence), (rights, right)):
            total += np.bincount(place, values, bins)
    filled = np.maximum(counts, 1)
    diagram = [
        [int(n), c, a] if n else [0, None, None]
        for n, c, a in zip(counts, (sums / filled).tolist(), (rights / filled).tolist(), strict=True)
    ]
    return {
        "ece": float(100 * np.abs(rights - sums).sum() / len(targets)),
        "nll": float(nll / len(targets)),
        "brier": float(brier / len(targets)),
        "diagram": diagram,
    }


def _chunks(logits: np.ndarray, targets: np.ndarray, temperature: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Logarithms of probabilities, in float64, with their labels."""
    for i in range(0, len(targets), _CHUNK):
        yield log_softmax(logits[i : i + _CHUNK].astype(np.float64) / temperature, axis=1), targets[i : i + _CHUNK]


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """The temperature, from 0.05 to 20, that gives the labels (N,) the highest likelihood; logits are (N, classes)."""

    def loss(log_temperature: float) -> float:
        chunks = _chunks(logits, targets, math.exp(log_temperature))
        return -sum(log_p[np.arange(len(labels)), labels].sum() for log_p, labels in chunks) / len(targets)

    # The loss is convex in 1 / temperature, so it has one minimum.
    low, high = map(math.log, _BOUNDS)
    return math.exp(minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-5}).x)


def halves(targets: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split positions into two halves at random, with half of every class in each."""
    order = np.random.default_rng(seed).permutation(len(targets))
    order = order[np.argsort(targets[order], kind="stable")]
    return np.sort(order[::2]), np.sort(order[1::2])


def calibrate(logits: np.ndarray, targets: np.ndarray, seed: int) -> Calibration:
    """Measure the calibration, fit the temperature on one half of the images, and measure again on the other half.

    Args:
        logits: (N, classes).
        targets: The labels (N,), integers.
        seed: Determines the halves.
    """
    fitted, other = halves(targets, seed)
    found: Calibration = {
        "bins": BINS,
        "images": len(targets),
        "all": scores(logits, targets),
        "temperature": None,
        "reason": None,
        "seed": seed,
        "fitted_on": 0,
        "before": None,
        "after": None,
    }
    if len(targets) < LEAST_IMAGES:
        found["reason"] = f"it takes {LEAST_IMAGES} images or more"
        return found
    temperature = fit_temperature(logits[fitted], targets[fitted])
    if not 1.01 * _BOUNDS[0] < temperature < _BOUNDS[1] / 1.01:
        way = "lower" if temperature < 1 else "higher"
        found["reason"] = (
            f"the {way} it is, the more likely are the labels of the {len(fitted)} images that it is fitted on"
        )
        return found
    found |= {
        "temperature": temperature,
        "fitted_on": len(fitted),
        "before": scores(logits[other], targets[other]),
        "after": scores(logits[other], targets[other], temperature),
    }
    return found


def describe(found: Calibration) -> str:
    """The figures in one line."""
    whole = found["all"]
    text = f"Calibration: ECE {whole['ece']:.2f} % ({found['bins']} bins), Brier score {whole['brier']:.4f}"
    if found["temperature"] is None or found["before"] is None or found["after"] is None:
        return f"{text}. No temperature is fitted: {found['reason']}."
    # If those that it is fitted on have almost no mistakes, it comes out too low.
    advice = ": do not use it" if found["after"]["nll"] > found["before"]["nll"] else ""
    return (
        f"{text}. Temperature {found['temperature']:.4g}, fitted on {found['fitted_on']} of the images: on the other "
        f"{found['images'] - found['fitted_on']}, ECE {found['before']['ece']:.2f} -> {found['after']['ece']:.2f} %, "
        f"loss {found['before']['nll']:.4f} -> {found['after']['nll']:.4f}{advice}"
    )


def plot_reliability(path: Path, found: Calibration) -> None:
    """Draw the reliability diagram; with a temperature, one before and one after it, of the same images."""
    if found["before"] and found["after"]:
        others = found["images"] - found["fitted_on"]
        panels = [
            ("as it is", found["before"], others),
            (f"temperature {found['temperature']:.3g}", found["after"], others),
        ]
    else:
        panels = [("as it is", found["all"], found["images"])]
    figure = plots.new_figure(figsize=(4.4 * len(panels) + 0.2, 5.2), dpi=110)
    axes = figure.subplots(2, len(panels), squeeze=False, sharex=True, height_ratios=(3, 1))
    edges = np.linspace(0, 100, found["bins"] + 1)
    for column, (title, measured, images) in enumerate(panels):
        upper, lower = axes[:, column]
        counts = np.array([row[0] for row in measured["diagram"]])
        confidence, accuracy = (
            np.array([100 * (row[i] if row[0] else math.nan) for row in measured["diagram"]]) for i in (1, 2)
        )
        upper.plot([0, 100], [0, 100], color="grey", linewidth=0.8, linestyle=":")
        upper.bar(edges[:-1], accuracy, np.diff(edges), align="edge", color="tab:blue", alpha=0.75, edgecolor="white")
        upper.plot(confidence, accuracy, ".", color="black", markersize=5)
        upper.vlines(confidence, accuracy, confidence, color="tab:red", linewidth=1.5)
        upper.set_xlim(0, 100)
        upper.set_ylim(0, 102)
        upper.set_title(f"{title}: ECE {measured['ece']:.2f} % of {images} images", fontsize=9)
        lower.bar(edges[:-1], counts, np.diff(edges), align="edge", color="tab:grey", edgecolor="white")
        lower.set_yscale("symlog", linthresh=1)
        lower.set_ylim(bottom=0)
        lower.yaxis.set_major_formatter("{x:.0f}")
        lower.set_xlabel("probability of the predicted class in %", fontsize=8)
        for one in (upper, lower):
            one.tick_params(labelsize=8)
    axes[0, 0].set_ylabel("right in %", fontsize=8)
    axes[1, 0].set_ylabel("images", fontsize=8)
    with atomic(path) as file:
        figure.savefig(file, format="png")
