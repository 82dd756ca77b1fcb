"""What is counted in a validation, against torchmetrics; and losses against torch's and timm's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy as TimmBinaryCrossEntropy
from torchmetrics.classification import MulticlassAccuracy, MulticlassStatScores

from tests.training.runs import fit_tiny, rows_of
from vit_cls.data.mixing import MixedTargets
from vit_cls.errors import ConfigError
from vit_cls.training.losses import (
    LOSSES,
    BinaryCrossEntropy,
    CrossEntropy,
    class_shares,
    make_loss,
    register_loss,
)
from vit_cls.training.options import OptimOptions
from vit_cls.training.validation import (
    VAL_METRICS,
    ClassCounts,
    Validation,
    better_of,
    make_metrics,
    register_metric,
)


@pytest.mark.parametrize("classes", [2, 3, 7, 40])
def test_counts_are_those_of_torchmetrics(classes, generator):
    ours = ClassCounts(classes)
    scores = MulticlassStatScores(classes, average=None)
    top5 = MulticlassAccuracy(classes, top_k=min(5, classes), average="micro")
    losses, seen = [], 0
    for size in (64, 1, 13):
        logits = torch.randn(size, classes, generator=generator)
        targets = torch.randint(0, max(1, classes - 1), (size,), generator=generator)  # one class is absent
        for metric in (ours, scores, top5):
            metric.update(logits, targets)
        losses.append(F.cross_entropy(logits, targets, reduction="sum"))
        seen += size
    reference = scores.compute()
    assert torch.equal(ours.correct, reference[:, 0])
    assert torch.equal(ours.images, reference[:, 4])
    found = ours.compute()
    assert found["images"] == seen
    assert found["correct"] == reference[:, 0].sum()
    assert found["acc5"] == pytest.approx(float(top5.compute()))
    assert found["loss"] == pytest.approx(float(sum(losses) / seen), rel=1e-6)
    present = reference[:, 4] > 0
    recall = reference[present, 0] / reference[present, 4]
    assert found["balanced_acc1"] == pytest.approx(float(recall.mean()), rel=1e-6)


def test_counting_takes_memory_linear_in_the_classes():
    classes, biggest = 3000, 0
    logits, targets = torch.randn(8, classes), torch.arange(8)
    ours = ClassCounts(classes)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal biggest
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else [out]:
                if isinstance(value, torch.Tensor):
                    biggest = max(biggest, value.numel())
            return out

    with Watch():
        ours.update(logits, targets)
    assert biggest <= 8 * classes


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_is_timms(smoothing, generator):
    logits = torch.randn(6, 5, generator=generator)
    targets = torch.randint(0, 5, (6,), generator=generator)
    timms = TimmBinaryCrossEntropy(smoothing=smoothing)
    assert BinaryCrossEntropy(smoothing)(logits, targets) == pytest.approx(float(timms(logits, targets)))


@pytest.mark.parametrize("name", LOSSES)
def test_a_mixed_image_of_one_class_is_that_image(name, generator):
    logits = torch.randn(6, 5, generator=generator)
    targets = torch.randint(0, 5, (6,), generator=generator)
    mixed = MixedTargets(targets, targets.flip(0), torch.ones(6))
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
    for class_weights in (None, weights):
        loss = make_loss(name, label_smoothing=0.1, class_weights=class_weights)
        assert loss(logits, mixed) == pytest.approx(float(loss(logits, targets)), rel=1e-6)
        assert float(loss.weight(mixed)) == pytest.approx(float(loss.weight(targets)))
    assert loss.weight(targets) == weights[targets].sum()


def test_shares_of_mixed_classes_add_up(generator):
    first, second = torch.tensor([0, 1, 2]), torch.tensor([1, 1, 0])
    shares = class_shares(MixedTargets(first, second, torch.tensor([0.25, 0.5, 1.0])), 3)
    assert shares.tolist() == [[0.25, 0.75, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


def test_an_own_loss_gets_classes_or_shares():
    seen = []

    def own(logits, targets):
        seen.append(targets)
        return F.cross_entropy(logits, targets)

    register_loss("own-loss", own)
    try:
        register_loss("own-loss", own)  # the same again, as when a module is imported twice
        loss = make_loss("own-loss", label_smoothing=0.3)
        logits, targets = torch.randn(2, 3), torch.tensor([0, 2])
        assert loss(logits, targets) == CrossEntropy()(logits, targets)
        mixed = MixedTargets(targets, targets.flip(0), torch.tensor([0.5, 0.5]))
        assert loss(logits, mixed) == pytest.approx(float(CrossEntropy()(logits, mixed)))
        assert [target.shape for target in seen] == [(2,), (2, 3)]
        with pytest.raises(ConfigError, match=r"optim.class_weights has no effect on the loss own-loss"):
            make_loss("own-loss", class_weights=torch.ones(3))
        assert OptimOptions(loss="own-loss").loss == "own-loss"
    finally:
        del LOSSES["own-loss"]
    with pytest.raises(ConfigError, match="the loss bce is there already"):
        register_loss("bce", own)
    with pytest.raises(ConfigError, match=r"optim.loss.*own-loss"):
        OptimOptions(loss="own-loss")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda logits, targets: F.nll_loss(logits, targets.float()), r"own-loss fails on logits .2, 3. and"),
        (lambda logits, targets: logits.sum(dim=1), r"must give the mean over the images.*; got .2,.\."),
        (lambda logits, targets: 1.0, r"a tensor with no dimension; got float\."),
        (torch.nn.CrossEntropyLoss, r"an object that is called with them.* Give CrossEntropyLoss\(\)\."),
        ("bce", r"the loss own-loss must be a function of logits and targets"),
    ],
    ids=["raises", "no mean", "number", "class", "word"],
)
def test_an_own_loss_that_is_none_is_one_paragraph(function, message):
    with pytest.raises(ConfigError, match=message):
        try:
            register_loss("own-loss", function)
            make_loss("own-loss")(torch.randn(2, 3), torch.tensor([0, 2]))
        finally:
            LOSSES.pop("own-loss", None)


def test_names_of_losses_and_metrics_are_kept_apart():
    for name in ("raw_acc1", "loss", "f1", "values"):
        with pytest.raises(ConfigError, match=f"the metric {name} is there already"):
            register_metric(name, MulticlassAccuracy)
    with pytest.raises(ConfigError, match="the name of a metric must be small letters"):
        register_metric("val/kappa", MulticlassAccuracy)
    with pytest.raises(ConfigError, match="the name of a loss must be small letters"):
        register_loss("My loss", F.cross_entropy)


def test_an_own_metric_must_be_one():
    register_metric("own", lambda classes: classes)
    try:
        with pytest.raises(ConfigError, match="the metric own must be made as a torchmetrics Metric"):
            make_metrics(["own"], 3)
    finally:
        del VAL_METRICS["own"]


def test_further_metrics_reach_the_table(image_root, tmp_path):
    fit_tiny(image_root, tmp_path / "run", epochs=1, metrics=["f1", "auroc"])
    (row,) = rows_of(tmp_path / "run")
    assert 0 <= float(row["val/f1"]) <= 1
    assert 0 <= float(row["val/auroc"]) <= 1


def test_a_metric_must_compute_one_number():
    with pytest.raises(ConfigError, match="the metric acc1 is there already"):
        register_metric("acc1", MulticlassAccuracy)
    own = Validation(3, {"each": MulticlassAccuracy(3, average=None)})
    own.update(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ConfigError, match="the metric each must compute one number"):
        own.compute()
    assert "each" not in VAL_METRICS


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_make_no_probabilities_are_wrong_answers_and_not_class_0(bad):
    logits = torch.tensor([[3.0, 0.0, 1.0], [bad, 0.0, 0.0], [0.0, bad, bad], [0.0, 2.0, -torch.inf]])
    targets = torch.tensor([0, 0, 1, 1])
    validation = Validation(3, make_metrics(["f1"], 3))
    validation.update(logits, targets)
    values = validation.compute()
    assert (values["correct"], values["images"], values["acc5"]) == (2, 4, 0.5)
    assert values["loss"].isnan()
    assert values["f1"].isnan()
    validation.update(logits[[0, 3]], targets[[0, 3]])  # minus infinity masks
    values = validation.compute()
    assert (values["correct"], values["images"]) == (2, 2)
    assert values["loss"].isfinite()
    assert values["f1"] > 0.5


def test_weights_whose_loss_is_nan_are_not_the_better_ones():
    found = [
        {"correct": torch.tensor(3.0), "acc1": torch.tensor(0.5), "loss": torch.tensor(v)}
        for v in (9, torch.nan)
    ]
    for raw, ema, better in ((*found, "raw"), (*found[::-1], "ema")):
        assert better_of(raw, ema)[0] == better
