"""Mathematical identities of Vision Transformers, checked on the very model that a user has."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vit_cls.checks import check_choice
from vit_cls.errors import ConfigError
from vit_cls.lab.results import plain
from vit_cls.lab.verify import order, outputs, readout
from vit_cls.lab.verify.subject import RELATIVE, Check, NotApplicableError, Subject
from vit_cls.model.classifier import ImageClassifier

PRECISIONS = ("auto", "64", "32")
MAX_DOUBLE = 10_000_000
"""``auto`` examines models up to so many weights in float64, larger ones in float32."""

# name: the check; the first line of its docstring says what must hold
IDENTITIES: dict[str, Callable[[Subject], Check]] = {
    "prepend-equals-append": order.prepend_equals_append,
    "class-token-anywhere": order.class_token_anywhere,
    "patch-permutation-equivariance": order.patch_permutation_equivariance,
    "identical-class-tokens-stay-identical": order.identical_class_tokens_stay_identical,
    "shuffle-at-input": order.shuffle_at_input,
    "shuffle-at-output": order.shuffle_at_output,
    "block-1-query-constant": order.block_1_query_constant,
    "class-token-sees-image-in-block-1": order.class_token_sees_image_in_block_1,
    "causal-prepend-no-gradient": order.causal_prepend_no_gradient,
    "causal-append-has-gradient": order.causal_append_has_gradient,
    "last-block-class-token-only": readout.last_block_class_token_only,
    "gradient-at-last-patches": readout.gradient_at_last_patches,
    "attention-rows-sum-to-one": readout.attention_rows_sum_to_one,
    "value-contributions": readout.value_contributions,
    "lens-equals-logits": readout.lens_equals_logits,
    "batch-independence": outputs.batch_independence,
    "evaluation-is-deterministic": outputs.evaluation_is_deterministic,
    "normalisation": outputs.normalisation,
    "integrated-gradients-completeness": outputs.integrated_gradients_completeness,
}


@dataclass(frozen=True)
class Verification:
    """What every identity gave on one model.

    Args:
        checks: By the name of the identity, in the order of `IDENTITIES`.
        settings: Precision, device, images and seed.
    """

    checks: Mapping[str, Check]
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def failed(self) -> Sequence[str]:
        """Names of the identities that do not hold."""
        return [name for name, check in self.checks.items() if not check.ok]

    @property
    def ok(self) -> bool:
        """Whether every identity that applies holds."""
        return not self.failed

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold; residuals that are not finite are None."""
        rows = [
            {
                "name": name,
                "what": what(name),
                "kind": check.kind,
                "residual": check.residual,
                "tolerance": check.tolerance,
                "ok": check.ok,
                "applies": check.applies,
                "reason": check.reason,
            }
            for name, check in self.checks.items()
        ]
        counts = {
            "checked": sum(check.applies for check in self.checks.values()),
            "failed": len(self.failed),
            "not_applicable": sum(not check.applies for check in self.checks.values()),
        }
        found = {"identities": rows, "ok": self.ok, **counts, **self.settings, "seconds": self.seconds}
        return {key: plain(value) for key, value in found.items()}


def what(name: str) -> str:
    """What must hold, as a sentence.

    Example:
        >>> what("lens-equals-logits")
        "The head, applied to the tokens after the last block, gives the model's logits."
    """
    return (IDENTITIES[name].__doc__ or "").splitlines()[0]


def verify(
    classifier: ImageClassifier,
    *,
    precision: str = "auto",
    images: int = 2,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Verification:
    """Check every identity on a copy of a classifier, with random images.

    Args:
        classifier: Any; it stays as it is.
        precision: ``64``, ``32``, or ``auto``: 64 for models up to `MAX_DOUBLE` weights where the device has
            it.
        images: How many random images, at least 2.
        seed: Of the images and of everything else that is drawn.
        device: Where the copy runs.

    Returns:
        A check for every row of `IDENTITIES`; one that makes no statement about this model says why.

    Raises:
        ConfigError: If the precision or a number is not possible.
    """
    started = time.perf_counter()
    device = torch.device(device)
    dtype = _choose_dtype(precision, classifier, device)
    checks: dict[str, Check] = {}
    # The patch embedding's convolution would be rounded to TF32 on some GPUs.
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        subject = Subject(classifier, images=images, seed=seed, device=device, dtype=dtype)
        for name, check in IDENTITIES.items():
            try:
                checks[name] = check(subject)
            except NotApplicableError as reason:
                checks[name] = Check(None, RELATIVE, subject.tolerance, reason=str(reason))
    bits = 64 if dtype == torch.float64 else 32
    settings = {"precision": bits, "device": device.type, "images": images, "seed": seed}
    return Verification(checks, settings, time.perf_counter() - started)


def _choose_dtype(precision: str, classifier: ImageClassifier, device: torch.device) -> torch.dtype:
    check_choice("--precision", precision, PRECISIONS)
    if precision == "64" and device.type == "mps":
        raise ConfigError("--precision 64 is not available on mps. Use --precision 32 or --device cpu.")
    weights = sum(parameter.numel() for parameter in classifier.parameters())
    small = weights <= MAX_DOUBLE and device.type != "mps"
    return torch.float64 if precision == "64" or (precision == "auto" and small) else torch.float32
