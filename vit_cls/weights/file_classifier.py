"""A classifier that takes image files: what `vit_cls.load` returns."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vit_cls.data.decode import read_image
from vit_cls.data.transforms import Transform, eval_transform
from vit_cls.errors import ConfigError, ImageError, ModelFileError
from vit_cls.model.classifier import ImageClassifier, Preprocess

NO_HEAD = (
    "the model has no head, so it cannot name a class. Train one: vit-cls fit --config "
    "configs/linear_probe.yaml --model.name NAME --model.pretrained WEIGHTS --data.root FOLDER."
)


class Labelled(NamedTuple):
    """What a classifier says about some images."""

    labels: list[str]
    """Name of the likeliest class of each image."""
    probs: Tensor
    """Of all classes, in the order of ``class_names``; float64, shape ``(images, classes)``, on the CPU."""


def transform_of(preprocess: Preprocess, *, exact: bool = False) -> Transform:
    """The fixed transform that a model's preprocessing describes.

    Args:
        preprocess: The model's.
        exact: Whether images are resized by Pillow, as timm's loader does it.

    Returns:
        A function from decoded pixels to uint8 pixels of the model's size.
    """
    return eval_transform(
        preprocess.img_size,
        crop_pct=preprocess.crop_pct,
        crop_mode=preprocess.crop_mode,
        interpolation=preprocess.interpolation,
        exact=exact,
    )


class FileClassifier(ImageClassifier):
    """An `ImageClassifier` that reads image files too."""

    @classmethod
    def of(cls, classifier: ImageClassifier) -> FileClassifier:
        """The same classifier, weights and settings shared.

        Args:
            classifier: Any.
        """
        same = cls.__new__(cls)
        same.__dict__.update(classifier.__dict__)
        return same

    @torch.inference_mode()
    def predict(self, paths: Iterable[str | Path], *, batch_size: int = 64) -> Labelled:
        """Label image files, with the pixels that ``vit-cls evaluate`` and ``predict`` use.

        For very many files, or some that cannot be read, see `vit_cls.evaluation.streaming.predict_files`.

        Args:
            paths: Image files.
            batch_size: Images a forward pass.

        Returns:
            ``(labels, probs)``, in the order of the paths.

        Raises:
            ImageError: If a file cannot be read; the message names it.
            ModelFileError: If the model has no head.
            ConfigError: If one path is given instead of several, or ``batch_size`` is below 1.
        """
        if isinstance(paths, str | Path):
            raise ConfigError(f"paths must be a list of image files; got {paths!r}. Write [{str(paths)!r}].")
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1; got {batch_size}.")
        if not self.class_names:
            raise ModelFileError(NO_HEAD)
        transform = transform_of(self.preprocess)
        files, training = [Path(path) for path in paths], self.training
        probs = torch.empty((len(files), len(self.class_names)), dtype=torch.float64)
        self.eval()
        try:
            for start in range(0, len(files), batch_size):
                part = files[start : start + batch_size]
                images = torch.stack([transform(self._read(path)) for path in part])
                probs[start : start + len(part)] = self.probs(self(images.to(self.mean.device)).float().cpu())
        finally:
            self.train(training)
        return Labelled([self.class_names[best] for best in probs.argmax(dim=1).tolist()], probs)

    def _read(self, path: Path) -> Tensor:
        try:
            return read_image(path, self.preprocess.background)
        except (ImageError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise ImageError(f"{path} cannot be read: {reason}.") from error
