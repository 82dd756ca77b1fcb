"""The probe ``invert``: how much of an image can be reconstructed from its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit_cls import formatting as fmt
from vit_cls.checks import check_choice
from vit_cls.lab.features import checked_layers
from vit_cls.lab.probes.base import Probe, Subject
from vit_cls.lab.probes.common import described
from vit_cls.lab.probes.pixel_decoders import MAX_FLAT, Decoded
from vit_cls.lab.probes.reconstructions import READS, Reconstructions, Scores
from vit_cls.lab.results import Figure, LabResult, Line, LineChart, Pictures, Table
from vit_cls.stats.image_metrics import frequency_bands
from vit_cls.stats.intervals import wilson_interval
from vit_cls.stats.least_squares import PENALTIES, R2_UNIT, r2, r2_scores
from vit_cls.stats.random_effects import mean_interval
from vit_cls.stats.verdicts import GREATER, Claim, judge_all

DECODERS = ("ridge", "conv")
PICTURES = 8
ENLARGED = 96
"""Pixels a side of the pictures, at least."""


@dataclass(frozen=True, kw_only=True)
class InvertProbe(Probe):
    """Predict an image's pixels from its frozen tokens.

    Decoders are fitted on training images, their penalty is chosen on validation images, and test images are
    decoded once. R2 is the share of the pixels' variance around the training mean, over all test images.

    Args:
        margin: The largest difference of R2 that does not matter, in (0, 1).
        seed: Of the random encoder, the network's training, the bootstrap and the choice of pictures.
        layers: Where the class token and the mean of the patches are read for the curve; 0 is before the
            first block. None means everywhere.
        decoder: ``ridge``, linear and in closed form; or ``conv``, a small convolutional network, for the
            last layer (the curve stays linear).

    Raises:
        ConfigError: If the decoder or the margin is impossible.

    Source:
        Linear inversion of features: Dosovitskiy and Brox 2016, https://arxiv.org/abs/1506.02753; the ceiling
        of a linear read-out: Eckart and Young 1936, https://doi.org/10.1007/BF02288367.
    """

    margin: float = 0.02
    layers: Sequence[int] | None = None
    decoder: str = "ridge"

    name = "invert"
    question = "How much of the image do its tokens keep, and how much of it is more than the class?"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("--decoder", self.decoder, DECODERS)

    def measure(self, subject: Subject) -> LabResult:
        """See `Probe.measure`."""
        depth = subject.reader.depth
        layers = range(depth + 1) if self.layers is None else self.layers
        layers = checked_layers(subject.classifier.model, layers)
        probe = Reconstructions(subject, self.decoder, self.seed)
        decoded = probe.decode()
        scores = {name: probe.score(found.images) for name, found in decoded.items()}
        curves = probe.curves(layers)
        totals, frozen = probe.totals, probe.frozen
        findings = judge_all(_claims(scores, totals, self.margin), seed=self.seed)
        shares = {name: r2(found.errors, totals) for name, found in scores.items()}
        own = "cls" if "cls" in shares else "gap"
        interval = fmt.interval(_interval(scores[own].errors, totals), fmt.bare_percent)
        headline = (
            f"{findings[0].claim[:-1]}: {findings[0].verdict}. Of the pixels' variance in "
            f"{len(frozen.test)} test images, the {READS[own]} explains {fmt.percent(shares[own])} "
            f"({interval}), the label alone {fmt.percent(shares['label'])}, all tokens "
            f"{fmt.percent(shares['tokens'])} ({self.decoder} decoder)."
        )
        size, hw = probe.size, "x".join(map(str, subject.classifier.preprocess.img_size))
        return self.result(
            headline,
            findings,
            tables=[_table(probe, decoded, scores)],
            figures=_figures(probe, decoded, scores, curves),
            settings={
                "architecture": described(subject.classifier.model),
                "decoder": self.decoder,
                "margin": self.margin,
                "seed": self.seed,
                "pixels": f"{size[0]}x{size[1]}, areas of the model's {hw} averaged",
                "penalties": [0.0, *PENALTIES],
                "chosen": {name: found.settings for name, found in decoded.items()},
            },
            parts=frozen.rows,
            data={
                "origin": frozen.origin,
                "failures": {name: part.failures for name, part in frozen.by_name.items()},
                **{name: len(part) for name, part in frozen.by_name.items()},
            },
            values=_values(decoded, scores, totals, curves),
            predictions={
                "paths": frozen.test.paths,
                "targets": frozen.test.labels,
                "totals": totals,
                **{
                    name: {"errors": found.errors, "identified": found.identified, "agrees": found.agrees}
                    for name, found in scores.items()
                },
            },
            notes=_notes(probe),
        )


def _claims(scores: dict[str, Scores], totals: np.ndarray, margin: float) -> list[Claim]:
    wanted = [
        ("The class token keeps more of the pixels than the label alone tells.", "label", "cls"),
        ("All tokens together keep more of the pixels than the class token.", "cls", "tokens"),
        ("The class token keeps more than that of the same network with fresh weights.", "random", "cls"),
        ("The class token keeps more of the pixels than the mean of the patches.", "gap", "cls"),
    ]
    if "cls" not in scores:
        wanted = [
            ("The mean of the patches keeps more of the pixels than the label alone tells.", "label", "gap"),
            ("All tokens together keep more of the pixels than their mean.", "gap", "tokens"),
        ]

    def score(name: str) -> np.ndarray:
        return r2_scores(scores[name].errors, totals)

    return [
        Claim(claim, score(a), score(b), GREATER, margin, (NAMES[a], NAMES[b]), R2_UNIT)
        for claim, a, b in wanted
    ]


NAMES = {
    "cls": "reading the class token",
    "gap": "reading the mean of the patches",
    "tokens": "reading all tokens",
    "random": "reading the class token of a random encoder",
    "label": "knowing the label alone",
}
"""Subjects of the sentences of verdicts; each is singular."""


def _interval(errors: np.ndarray, totals: np.ndarray) -> tuple[float, float]:
    return mean_interval(r2_scores(errors, totals)).ci95


def _table(probe: Reconstructions, decoded: dict[str, Decoded], scores: dict[str, Scores]) -> Table:
    rows: list[list[str | int | float | None]] = []
    for name, one in scores.items():
        bounds = _interval(one.errors, probe.totals)
        hits = wilson_interval(round(float(one.identified.sum())), len(one.identified))
        agrees = None if one.agrees is None else float(one.agrees.mean())
        rows.append(
            [
                READS[name],
                fmt.estimate_cell(r2(one.errors, probe.totals), bounds, fmt.three_decimals),
                fmt.three_decimals(decoded[name].in_sample),
                float(one.psnr.mean()),
                float(one.ssim.mean()),
                fmt.estimate_cell(float(one.identified.mean()), hits),
                agrees,
            ]
        )
    columns = ["from", "R2 [95 %]", "R2 in sample", "PSNR, dB", "SSIM", "identified [95 %]", "same class (%)"]
    note = (
        f"{len(probe.totals)} test images. R2: share of the variance around the training mean. In sample: on "
        f"the training images, least squares{' or the trained network' if probe.decoder == 'conv' else ''}. "
        f"Identified: nearer to its own image than to any other; by chance 1 in {len(probe.totals)}. Same "
        "class: the model gives the reconstruction the class that it gives the image."
    )
    return Table("Images from tokens", columns, rows, note)


def _figures(
    probe: Reconstructions,
    decoded: dict[str, Decoded],
    scores: dict[str, Scores],
    curves: dict[str, dict[int, np.ndarray]],
) -> list[Figure]:
    totals = probe.totals
    lines = [
        Line(
            READS[pool],
            [(layer, r2(errors, totals)) for layer, errors in sorted(by_layer.items())],
            [_interval(errors, totals) for _, errors in sorted(by_layer.items())],
        )
        for pool, by_layer in curves.items()
    ]
    marks = {name: r2(scores[name].errors, totals) for name in ("label", "pca")}
    by_layer = LineChart(
        "Pixels by layer",
        "layer (0: before the first block)",
        "R2 of the test pixels",
        lines,
        marks={"label alone": marks["label"], "principal components": marks["pca"]},
        note="Ridge regression. Bands: 95 %, over images. No linear read-out of as many numbers as a token "
        "is wide explains more than the principal components do, on the images that both were fitted on.",
    )
    _, ends = frequency_bands(*probe.size, probe.num_bands)
    centres = ends - ends[0] / 2
    names = [name for name in ("cls", "gap", "tokens", "random", "label") if name in scores]
    shares = {
        name: 1 - scores[name].bands.sum(0) / np.maximum(probe.total_bands.sum(0), 1e-300) for name in names
    }
    bands = LineChart(
        "Pixels by frequency",
        "cycles a pixel",
        "R2 of the test pixels",
        [
            Line(READS[n], [(float(c), float(s)) for c, s in zip(centres, shares[n], strict=True)])
            for n in names
        ],
        note=f"Rings of the Fourier plane, {probe.size[0]}x{probe.size[1]} pixels; the last has the corners.",
    )
    return [by_layer, bands, _pictures(probe, decoded)]


def _pictures(probe: Reconstructions, decoded: dict[str, Decoded]) -> Pictures:
    test, names = probe.frozen.test, [n for n in ("cls", "gap", "tokens", "label") if n in decoded]
    order = np.random.default_rng(probe.seed).permutation(len(test)).tolist()
    first = [i for n, i in enumerate(order) if test.labels[i] not in test.labels[order[:n]]]
    chosen = [*first, *(i for i in order if i not in first)][:PICTURES]
    rows = [
        [enlarge(probe.pixels[2][i]), *(enlarge(decoded[name].images[i]) for name in names)] for i in chosen
    ]
    labels = [test.class_names[test.labels[i]] for i in chosen]
    note = "Drawn at random, of different classes as far as there are any."
    return Pictures("Images from tokens", ["original", *(READS[n] for n in names)], rows, labels, note)


def enlarge(image: np.ndarray) -> np.ndarray:
    """Pixels in [0, 1], ``(channels, height, width)``, as a picture that is large enough for the eye."""
    times = -(-ENLARGED // max(image.shape[1:]))
    pixels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))  # grey ones too are shown as RGB
    return pixels.repeat(times, axis=0).repeat(times, axis=1)


def _values(
    decoded: dict[str, Decoded],
    scores: dict[str, Scores],
    totals: np.ndarray,
    curves: dict[str, dict[int, np.ndarray]],
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, one in scores.items():
        values[name] = {
            "r2": r2(one.errors, totals),
            "r2_ci95": _interval(one.errors, totals),
            "r2_in_sample": decoded[name].in_sample,
            "psnr": float(one.psnr.mean()),
            "ssim": float(one.ssim.mean()),
            "identified": float(one.identified.mean()),
            "same_class": None if one.agrees is None else float(one.agrees.mean()),
        }
    by_layer = {pool: {k: r2(e, totals) for k, e in sorted(found.items())} for pool, found in curves.items()}
    return values | {"by_layer": by_layer, "chance_identified": 1 / len(totals)}


def _notes(probe: Reconstructions) -> list[str]:
    notes = [
        "The label alone is the true label of each test image, which no read-out was given.",
        "What a linear decoder does not find may still be there for another one.",
    ]
    if not probe.names_data:
        notes.append(
            "The classes of the model are not those of the data, so it is not said whether it gives a "
            "reconstruction the class that it gives the image."
        )
    flat = probe.layout.num_tokens * probe.frozen.train.embed_dim <= MAX_FLAT
    if probe.decoder == "ridge" and not flat:
        notes.append(
            "All tokens are too many numbers for one regression: each patch was predicted from its own token "
            "and the class token, with the same weights everywhere and an intercept for each place."
        )
    if not probe.layout.class_token:
        notes.append("The model has no class token, so nothing was read from one.")
    if probe.decoder == "conv":
        notes.append("The network is not linear: the principal components are no ceiling for it.")
    return notes
