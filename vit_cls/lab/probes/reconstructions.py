"""Test images reconstructed from each read of frozen tokens, and how near they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA

from vit_cls.data.dataset import ImageSource
from vit_cls.data.partition import Partition
from vit_cls.inference import InferenceConfig
from vit_cls.lab.features import FrozenTokens, freeze_reads
from vit_cls.lab.probes.common import freeze_parts
from vit_cls.lab.probes.pixel_decoders import (
    MAX_FLAT,
    Decoded,
    Triple,
    conv_decoded,
    pixels_of,
    ridge_decoded,
    ridge_decoded_by_patch,
    working_size,
)
from vit_cls.lab.seeding import seeded
from vit_cls.model.classifier import ImageClassifier
from vit_cls.stats.image_metrics import band_energy, identified, psnr, ssim
from vit_cls.weights.architecture import build_model

READS = {
    "cls": "class token",
    "gap": "mean of the patches",
    "tokens": "all tokens",
    "random": "class token, random encoder",
    "label": "label alone (mean image of the class)",
    "mean": "mean image",
    "pca": "as many principal components as channels",
}


@dataclass(frozen=True)
class Scores:
    """How near the reconstructions of the test images by one read are.

    Args:
        errors: Squared error of each image, shape ``(images,)``.
        psnr: Of each image, in dB.
        ssim: Of each image.
        identified: Of each image, see `vit_cls.stats.image_metrics.identified`.
        bands: Squared error of each image in each ring of frequencies, shape ``(images, bands)``.
        agrees: Whether the model gives each reconstruction the class that it gives the image; None where the
            reconstructions are not of the model's size, or its classes are not those of the data.
    """

    errors: np.ndarray
    psnr: np.ndarray
    ssim: np.ndarray
    identified: np.ndarray
    bands: np.ndarray
    agrees: np.ndarray | None


class Reconstructions:
    """Frozen tokens and pixels of the three parts, and the reconstructions of the pixels from the tokens.

    Args:
        decoder: ``ridge`` or ``conv``.
    """

    def __init__(
        self,
        classifier: ImageClassifier,
        parts: Partition,
        decoder: str,
        seed: int,
        config: InferenceConfig,
        cache: Path | None,
    ) -> None:
        self.classifier = classifier
        self.parts = parts
        self.decoder = decoder
        self.seed = seed
        self.config, self.cache = config, cache
        self.sources = parts.sources
        self.frozen = freeze_parts(classifier, self.sources, config, cache)
        self.layout = classifier.model.layout
        hw = classifier.preprocess.img_size
        self.size = working_size(hw, self.layout.grid_size)
        train, val, test = (
            pixels_of(source, frozen.positions, classifier.preprocess, self.size)
            for source, frozen in zip(self.sources, self.frozen, strict=True)
        )
        self.pixels: Triple = (train, val, test)
        self.mean = train.mean(axis=0)
        self.totals = np.square(test - self.mean).reshape(len(test), -1).sum(axis=1)
        self.num_bands = max(1, min(8, min(self.size) // 2))
        self.total_bands = band_energy(test - self.mean, self.num_bands)
        # A class that the data does not have is none to agree on.
        self.names_data = list(classifier.class_names) == list(parts.class_names)
        self.own_preds = self._preds(test) if self.size == hw and self.names_data else None

    def decode(self) -> dict[str, Decoded]:
        """Test images from every read of the last layer, and the baselines."""
        found = {}
        if self.layout.class_token:
            found["cls"] = self._from(self._read("cls"))
        found["gap"] = self._from(self._read("gap"))
        found["tokens"] = self._from_all_tokens()
        if self.layout.class_token:
            found["random"] = self._from(self._random_class_tokens())
        return found | self._baselines()

    def _read(self, pool: str) -> Triple:
        train, val, test = (one.read(pool) for one in self.frozen)
        return train, val, test

    def _from(self, x: Triple) -> Decoded:
        if self.decoder == "conv":
            return conv_decoded(x, self.pixels, self.layout.grid_size, seed=self.seed)
        return ridge_decoded(x, self.pixels)

    def _from_all_tokens(self) -> Decoded:
        frozen, depth = self.frozen, self.frozen[0].depth
        if self.decoder == "conv":
            train, val, test = (self._patches_and_class_token(one) for one in frozen)
            return conv_decoded((train, val, test), self.pixels, self.layout.grid_size, seed=self.seed)
        if self.layout.num_tokens * frozen[0].embed_dim <= MAX_FLAT:
            train, val, test = (one.normed(depth).reshape(len(one), -1) for one in frozen)
            return ridge_decoded((train, val, test), self.pixels)

        def token(part: int, place: int) -> np.ndarray:
            raw = torch.from_numpy(np.array(frozen[part].tokens(depth)[:, place]))
            return frozen[part].reader.normed(raw).numpy()

        return ridge_decoded_by_patch(token, self.layout, self.pixels)

    def _patches_and_class_token(self, frozen: FrozenTokens) -> np.ndarray:
        tokens = frozen.normed(frozen.depth)
        patches = tokens[:, self.layout.num_prefix_tokens :]
        if not self.layout.class_token:
            return patches
        return np.concatenate([patches, np.broadcast_to(tokens[:, :1], patches.shape)], axis=2)

    def _random_class_tokens(self) -> Triple:
        old, depth = self.classifier, self.frozen[0].depth
        with seeded(self.seed):
            model = build_model(old.model.config)
        fresh = ImageClassifier(model, old.preprocess, old.class_names)
        train, val, test = (
            self._reads(fresh, source, [depth], ["cls"])["cls", depth] for source in self.sources
        )
        return train, val, test

    def _reads(
        self, classifier: ImageClassifier, source: ImageSource, layers: Sequence[int], pools: Sequence[str]
    ) -> dict[tuple[str, int], np.ndarray]:
        return freeze_reads(classifier, source, layers, pools, config=self.config, cache=self.cache)[0]

    def _baselines(self) -> dict[str, Decoded]:
        train, _, test = self.pixels
        labels, targets = self.frozen[0].labels, self.frozen[2].labels
        of_class = np.stack(
            [
                train[labels == k].mean(axis=0) if (labels == k).any() else self.mean
                for k in range(len(self.frozen[0].class_names))
            ]
        )
        total = float(np.square(train - self.mean).sum())
        flat = train.reshape(len(train), -1)
        components = min(self.frozen[0].embed_dim, *flat.shape)
        solver = "covariance_eigh" if len(flat) >= flat.shape[1] else "full"
        pca = PCA(components, svd_solver=solver).fit(flat)
        back = pca.inverse_transform(pca.transform(test.reshape(len(test), -1))).reshape(test.shape)
        within = 1 - float(np.square(train - of_class[labels]).sum()) / max(total, 1e-300)
        ceiling = float(np.minimum(pca.explained_variance_ratio_.sum(), 1.0))
        return {
            "label": Decoded(of_class[targets], within, {}),
            "mean": Decoded(np.broadcast_to(self.mean, test.shape), 0.0, {}),
            "pca": Decoded(back, ceiling, {"components": float(components)}),
        }

    def score(self, images: np.ndarray) -> Scores:
        """Compare reconstructions with the test images.

        Args:
            images: Shape ``(images, channels, height, width)``.
        """
        test = self.pixels[2]
        agrees = None if self.own_preds is None else self._preds(images) == self.own_preds
        return Scores(
            np.square(images - test).reshape(len(test), -1).sum(axis=1),
            psnr(images, test),
            ssim(images, test),
            identified(images, test),
            band_energy(images - test, self.num_bands),
            agrees,
        )

    @torch.inference_mode()
    def _preds(self, images: np.ndarray) -> np.ndarray:
        """The class that the model gives to each image; working size and input size agree."""
        pixels = torch.from_numpy(np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8))
        device = self.classifier.mean.device
        chunks = pixels.split(self.config.batch_size)
        return torch.cat([self.classifier(c.to(device)).argmax(1).cpu() for c in chunks]).numpy()

    def curves(self, layers: Sequence[int]) -> dict[str, dict[int, np.ndarray]]:
        """Squared error of each test image by layer, linearly, from the class token and the patches' mean.

        Args:
            layers: Where; 0 is before the first block.
        """
        pools = ["cls", "gap"] if self.layout.class_token else ["gap"]
        train, val, test = (self._reads(self.classifier, source, layers, pools) for source in self.sources)
        found: dict[str, dict[int, np.ndarray]] = {pool: {} for pool in pools}
        for pool, layer in train:
            x = (train[pool, layer], val[pool, layer], test[pool, layer])
            images = ridge_decoded(x, self.pixels).images
            errors = np.square(images - self.pixels[2]).reshape(len(images), -1).sum(axis=1)
            found[pool][layer] = errors
        return found
