"""What Python users call: `vit_cls.load`, and the classifier that it returns."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vit_cls.errors import ConfigError, ImageError
from vit_cls.inference import InferenceConfig, batches, require_head
from vit_cls.model.classifier import ImageClassifier
from vit_cls.weights.factory import load as load_classifier


class Labelled(NamedTuple):
    """What a classifier says about some images."""

    labels: list[str]
    """Name of the likeliest class of each image."""
    probs: Tensor
    """Of all classes, in the order of ``class_names``; float64, shape ``(images, classes)``, on the CPU."""


class Classifier(ImageClassifier):
    """An `ImageClassifier` that reads image files too."""

    @classmethod
    def of(cls, classifier: ImageClassifier) -> Classifier:
        """The same classifier, weights and settings shared."""
        same = cls.__new__(cls)
        same.__dict__.update(classifier.__dict__)
        return same

    def predict(self, paths: Iterable[str | Path], *, batch_size: int = 64) -> Labelled:
        """Label image files, with the pixels that ``vit-cls evaluate`` and ``predict`` use.

        For very many files, or some that cannot be read: `vit_cls.evaluation.predictions.predict_batches`.

        Args:
            paths: Image files.
            batch_size: Images a forward pass.

        Returns:
            ``(labels, probs)``, in the order of the paths.

        Raises:
            ImageError: If a file cannot be read; the message names it.
            ModelFileError: If the model has no head, or its output is not finite.
            ConfigError: If one path is given instead of several, or ``batch_size`` is below 1.
        """
        if isinstance(paths, str | Path):
            raise ConfigError(f"paths must be a list of image files; got {paths!r}. Write [{str(paths)!r}].")
        require_head(self)
        config = InferenceConfig(self.mean.device, "32", batch_size, num_workers=0)
        parts, training = [torch.empty((0, len(self.class_names)), dtype=torch.float64)], self.training
        try:
            for outputs in batches(self, paths, self, config):
                for path, reason in outputs.failures.items():
                    raise ImageError(f"{path} cannot be read: {reason}.")
                assert outputs.values is not None
                parts.append(self.probs(outputs.values))
        finally:
            self.train(training)
        probs = torch.cat(parts)
        return Labelled([self.class_names[best] for best in probs.argmax(dim=1).tolist()], probs)


def load(model: str | Path) -> Classifier:
    """Load a classifier from anything that ``--model`` takes.

    Args:
        model: A run folder, a ``model.safetensors``, a training checkpoint (``.ckpt``), a folder of
            transformers or of ``vit-cls export --format timm``, timm's ``name`` or ``name.tag``, or
            ``name=path/to/weights``.

    Returns:
        The classifier in evaluation mode, on the CPU; its ``predict`` labels image files. Without known
        classes its outputs are named ``output_0``, ``output_1``...; a headless one has none.

    Raises:
        ModelFileError: If there is no such model, or it cannot be read.
        ConfigError: If the name is unknown.
    """
    return Classifier.of(load_classifier(model))
