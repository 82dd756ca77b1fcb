"""Frozen tokens without a model, and trials that have ended without training, for the tests of the lab."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vit_cls.data.dataset import ArraySource
from vit_cls.data.index import ImageIndex, PathTable
from vit_cls.data.partition import Partition
from vit_cls.lab.features import FrozenTokens, Rows
from vit_cls.lab.seeding import seeded
from vit_cls.lab.studies.answers import Answers
from vit_cls.lab.studies.study import Study
from vit_cls.lab.studies.trials import ANSWERS, DONE, Trial, trial_folder
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.model.config import ViTConfig
from vit_cls.model.pooling import make_pooling
from vit_cls.model.pooling_base import PoolingContext
from vit_cls.model.token_reader import TokenReader
from vit_cls.model.tokens import TokenLayout
from vit_cls.model.vit import VisionTransformer
from vit_cls.weights.bundle import MODEL_FILE, save_classifier
from vit_cls.weights.factory import create_classifier

COLOURS = ["black", "white"]


class _Readable(nn.Module):
    """As much of a model as a reader looks at; it has no norms, so reads are the tokens themselves."""

    def __init__(self, layout: TokenLayout, depth: int, dim: int = 1) -> None:
        super().__init__()
        self.layout = layout
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(depth))
        self.norm = nn.Identity()
        self.fc_norm = nn.Identity()
        self.pooling_context = PoolingContext(layout, embed_dim=dim, depth=depth)
        self.pool = make_pooling("gap", self.pooling_context)
        self.config = type("Config", (), {"pool": "gap"})


@pytest.fixture
def frozen_part(tmp_path: Path):
    """A function from tokens by layer and labels to frozen tokens of 4 blocks and a 2x2 grid."""

    def make(
        tokens: dict[int, np.ndarray], labels: np.ndarray, *, classes: int, class_token: bool = True
    ) -> FrozenTokens:
        layout = TokenLayout(class_token, 0, (2, 2))
        folder = tmp_path / f"part{len(list(tmp_path.glob('part*')))}"
        folder.mkdir()
        for layer, values in tokens.items():
            assert values.shape[1] == layout.num_tokens
            (folder / f"layer{layer:03d}.f32").write_bytes(values.astype("<f4").tobytes())
        names, paths = [f"class {i}" for i in range(classes)], [f"{i}.png" for i in range(len(labels))]
        rows = Rows(np.asarray(labels, dtype=np.int64), names, paths, np.arange(len(labels)), {})
        dim = next(iter(tokens.values())).shape[2]
        return FrozenTokens(folder, TokenReader(_Readable(layout, 4)), sorted(tokens), rows, dim)

    return make


@pytest.fixture
def noisy_parts(frozen_part):
    """A function to train, val and test: class token and patch 1 carry the class, the rest is noise."""

    def make(
        *, counts: tuple[int, int, int] = (90, 60, 80), classes: int = 3, dim: int = 6, seed: int = 0
    ) -> list[FrozenTokens]:
        rng = np.random.default_rng(seed)
        centres = 1.5 * rng.standard_normal((classes, dim))
        parts = []
        for count in counts:
            labels, by_layer = np.arange(count) % classes, {}
            for layer in (1, 2, 3, 4):
                tokens = rng.standard_normal((count, 5, dim))
                for place in (0, 2):
                    tokens[:, place] += centres[labels] * layer / 4
                by_layer[layer] = tokens
            parts.append(frozen_part(by_layer, labels, classes=classes))
        return parts

    return make


@pytest.fixture
def relabelled():
    """A function to the same images with shuffled labels."""

    def shuffle(part: FrozenTokens, seed: int = 0) -> FrozenTokens:
        labels = np.random.default_rng(seed).permutation(part.labels)
        rows = Rows(labels, part.class_names, part.paths, part.positions, part.failures)
        return FrozenTokens(part.folder, part.reader, part.layers, rows, part.embed_dim)

    return shuffle


@pytest.fixture
def told():
    """A function that ends trials: right are the test images given, and as many of the validation images."""

    def tell(folder: Path, trials: Sequence[Trial], right: Sequence[np.ndarray], **note: object) -> None:
        known = {}
        for trial, row in zip(trials, right, strict=True):
            if trial.seed not in known:  # which images are tested on depends on nothing else
                known[trial.seed] = trial.data.parts(trial.seed)
            parts = known[trial.seed]
            place = trial_folder(folder, trial)
            place.mkdir(parents=True)
            arrays = {}
            for part, source in (("val", parts.val), ("test", parts.test)):
                targets = source.index.labels
                share = np.arange(len(targets)) < round(row.mean() * len(targets))
                rows = row if part == "test" else share
                answers = np.where(rows, targets, (targets + 1) % len(parts.class_names))
                probs = np.eye(len(parts.class_names), dtype=np.float32)[answers]
                arrays |= {f"{part}_probs": probs, f"{part}_targets": targets}
                arrays[f"{part}_positions"] = np.arange(len(targets))
            np.savez(place / ANSWERS, **arrays)
            record = {"data": parts.counts(), "origin": parts.origin, "seconds": 1.0, "parameters": 9}
            costs = {"head_parameters": 1, "head_macs": 1, "macs": 2, "tokens": 17}
            (place / DONE).write_text(json.dumps({**record, **costs, **note}))

    return tell


@pytest.fixture
def answered(told):
    """A function to the answers of a study each of whose arms has a share of the images right.

    Arms are named as in reports. Each seed has a few images right that another has not.
    """

    def answer(study: Study, shares: Mapping[str, float], *, images: int = 599) -> Answers:
        trials = study.trials()
        right = [np.arange(images) < round(shares[study.label(trial)] * images) for trial in trials]
        rows = [np.roll(row, trial.seed) for trial, row in zip(trials, right, strict=True)]
        told(study.setup.folder, trials, rows)
        return Answers(study.setup.folder)

    return answer


@pytest.fixture(scope="session")
def fresh():
    """A function to a `TrainFunction` that trains nothing: it saves the fresh model of the seed.

    ``change`` may do something to the model before.
    """

    def make(change: Callable[[nn.Module], object] = lambda model: None):
        def train(run_dir, train, val, *, origin, seed, model, optim, loader, epochs):
            with seeded(seed):
                classifier = create_classifier(class_names=train.index.class_names, **model)
            with torch.no_grad():
                change(classifier.model)
            run_dir.mkdir(parents=True, exist_ok=True)
            return save_classifier(classifier, run_dir / MODEL_FILE)

        return train

    return make


@pytest.fixture(scope="session")
def loud(fresh):
    """`fresh` with weights that are large enough for what a model is given to matter."""
    return fresh(lambda model: [parameter.mul_(4) for parameter in model.parameters()])


class Counting:
    """Trains nothing, counting what it was asked for, and raising where it is told to."""

    def __init__(self, train, errors):
        self.train = train
        self.errors = errors
        self.calls: Counter[str] = Counter()
        self.asked: dict[str, dict] = {}

    def __call__(self, run_dir, *args, **settings):
        key = run_dir.parent.name
        self.calls[key] += 1
        self.asked[key] = settings
        if key in self.errors:
            raise self.errors[key]
        return self.train(run_dir, *args, **settings)


@pytest.fixture
def counting(fresh):
    """A function to `Counting`, from errors by the trial's key."""
    return lambda errors=None: Counting(fresh(), errors or {})


@pytest.fixture(scope="session")
def quarters():
    """A function to parts in memory, from how many images of each of two classes each part has.

    An image of 8x8 has its class as the colour of the right upper quarter; all else is grey.
    """

    def source(counts: tuple[int, int]) -> ArraySource:
        labels = np.repeat([0, 1], counts)
        images = torch.full((len(labels), 3, 8, 8), 128, dtype=torch.uint8)
        images[:, :, :4, 4:] = torch.from_numpy(255 * labels).to(torch.uint8)[:, None, None, None]
        paths = PathTable([f"{COLOURS[label]}/{i}.png" for i, label in enumerate(labels)])
        return ArraySource(ImageIndex(Path("memory"), paths, labels, COLOURS), images)

    return lambda *counts: Partition(*map(source, counts), "memory")


@pytest.fixture(scope="session")
def quarter_classifier():
    """A function to a classifier of these images whose blocks do nothing, so that a token knows its patch.

    Tokens are ``(x, -x)``, where ``x`` is the mean colour of a patch from -1 to 1, and 0 for the class token.
    Settings are of `ViTConfig`; ``change`` may do something to the model.
    """

    def make(change: Callable[[nn.Module], object] = lambda model: None, **settings) -> ImageClassifier:
        sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 2, "num_heads": 1, "mlp_ratio": 1.0}
        model = VisionTransformer(ViTConfig(**sizes, num_classes=2, **settings))
        signs = torch.tensor([1.0, -1.0])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            model.patch_embed.proj.weight.copy_(signs[:, None, None, None].expand(2, 3, 4, 4) / 48)
            model.head.weight.copy_(torch.stack([-signs, signs]))
            change(model)
        return ImageClassifier(model, Preprocess((8, 8), crop_pct=1.0), COLOURS).eval()

    return make
