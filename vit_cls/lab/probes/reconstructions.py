"""Test images reconstructed from each read of frozen tokens, and how near they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.decomposition import PCA

from vit_cls.lab.features import FrozenTokens
from vit_cls.lab.probes.base import Subject
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
from vit_cls.stats.image_metrics import band_energy, identified, psnr, ssim

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
    """How near the reconstructions of the test images by one read are; a value for each image.

    Args:
        errors: Squared error.
        bands: Squared error in each ring of frequencies, shape ``(images, bands)``.
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
    """Frozen tokens and pixels of the three parts, and the pixels reconstructed from the tokens."""

    def __init__(self, subject: Subject, decoder: str, seed: int) -> None:
        self.subject, self.classifier = subject, subject.classifier
        self.decoder = decoder
        self.seed = seed
        self.frozen = subject.freeze()
        self.layout = self.classifier.model.layout
        preprocess = self.classifier.preprocess
        self.size = working_size(preprocess.img_size, self.layout.grid_size)
        train, val, test = (
            pixels_of(source, part.positions, preprocess, self.size)
            for source, part in zip(subject.parts.sources, self.frozen.by_name.values(), strict=True)
        )
        self.pixels: Triple = (train, val, test)
        self.mean = train.mean(axis=0)
        self.totals = np.square(test - self.mean).reshape(len(test), -1).sum(axis=1)
        self.num_bands = max(1, min(8, min(self.size) // 2))
        self.total_bands = band_energy(test - self.mean, self.num_bands)
        # A class that the data does not have is none to agree on.
        self.names_data = list(self.classifier.class_names) == list(subject.parts.class_names)
        same_size = self.size == preprocess.img_size
        self.own_preds = self._preds(test) if same_size and self.names_data else None

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
        train, val, test = (part.read(pool) for part in self.frozen.by_name.values())
        return train, val, test

    def _from(self, x: Triple) -> Decoded:
        if self.decoder == "conv":
            return conv_decoded(x, self.pixels, self.layout.grid_size, seed=self.seed)
        return ridge_decoded(x, self.pixels)

    def _from_all_tokens(self) -> Decoded:
        frozen = list(self.frozen.by_name.values())
        depth = frozen[0].depth
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
        depth = self.frozen.train.depth
        reads, _ = self.subject.control("untrained", self.seed).read_layers([depth], ["cls"])
        return reads["train"]["cls", depth], reads["val"]["cls", depth], reads["test"]["cls", depth]

    def _baselines(self) -> dict[str, Decoded]:
        train, _, test = self.pixels
        labels, targets = self.frozen.train.labels, self.frozen.test.labels
        of_class = np.stack(
            [
                train[labels == k].mean(axis=0) if (labels == k).any() else self.mean
                for k in range(len(self.frozen.train.class_names))
            ]
        )
        total = float(np.square(train - self.mean).sum())
        flat = train.reshape(len(train), -1)
        components = min(self.frozen.train.embed_dim, *flat.shape)
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
        """Compare reconstructions, ``(images, channels, height, width)``, with the test images."""
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
        chunks = pixels.split(self.subject.config.batch_size)
        return torch.cat([self.classifier(c.to(device)).argmax(1).cpu() for c in chunks]).numpy()

    def curves(self, layers: Sequence[int]) -> dict[str, dict[int, np.ndarray]]:
        """Squared error of each test image by layer, linearly, from the class token and the patches' mean."""
        pools = ["cls", "gap"] if self.layout.class_token else ["gap"]
        reads, _ = self.subject.read_layers(layers, pools)
        found: dict[str, dict[int, np.ndarray]] = {pool: {} for pool in pools}
        for pool, layer in reads["train"]:
            x = (reads["train"][pool, layer], reads["val"][pool, layer], reads["test"][pool, layer])
            images = ridge_decoded(x, self.pixels).images
            found[pool][layer] = np.square(images - self.pixels[2]).reshape(len(images), -1).sum(axis=1)
        return found
