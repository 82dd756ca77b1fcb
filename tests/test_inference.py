"""One loop: any computation over an index or a stream of paths, with failures beside it and nothing else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vit_cls.data import loader as loader_module
from vit_cls.data.dataset import ArraySource, FolderSource
from vit_cls.data.index import ImageIndex, index_folder
from vit_cls.errors import ConfigError, ModelFileError, RunError
from vit_cls.inference import BF16, FP16, FP32, InferenceConfig, batches, choose_device, layer_tokens
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.model.config import ViTConfig
from vit_cls.model.token_model import TokenModel
from vit_cls.model.vit import VisionTransformer

NAMES = ["blue", "green", "red"]


def _config(batch_size=4, num_workers=0, **settings) -> InferenceConfig:
    return InferenceConfig("cpu", batch_size=batch_size, num_workers=num_workers, **settings)


@pytest.fixture
def classifier(tiny) -> ImageClassifier:
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig.from_dict({**tiny, "num_classes": 3}))
    return ImageClassifier(model, Preprocess((16, 16), crop_pct=0.8), NAMES)


@pytest.fixture
def in_memory(generator) -> ArraySource:
    images = torch.randint(0, 256, (10, 3, 20, 24), generator=generator, dtype=torch.uint8)
    index = ImageIndex(Path("memory"), [f"{i}" for i in range(10)], np.arange(10) % 3, NAMES)
    return ArraySource(index, images)


def _all(classifier, images, config):
    done = list(batches(classifier, images, classifier, config))
    return [item for out in done for item in out.done], torch.cat([out.values for out in done if out.places])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_index_and_the_paths_of_its_files_give_the_same_to_the_last_bit(
    num_workers, classifier, image_root
):
    index = index_folder(image_root / "train")
    paths = [str(index.path(i)) for i in range(len(index))]
    positions, of_index = _all(classifier, FolderSource(index), _config(num_workers=num_workers))
    items, of_paths = _all(classifier, paths, _config(num_workers=num_workers))
    assert positions == list(range(len(index)))
    assert items == paths
    assert torch.equal(of_index, of_paths)


def test_failures_are_named_by_item_and_a_batch_of_nothing_else_has_no_values(classifier, image_root):
    good = str(next((image_root / "train").rglob("*.png")))
    paths = ["gone.png", good, "nul\0.png", "gone.png", "gone.png", good]
    outputs = list(batches(classifier, paths, classifier, _config(batch_size=2)))
    assert [out.items for out in outputs] == [paths[:2], paths[2:4], paths[4:]]
    assert [out.places for out in outputs] == [[1], [], [1]]
    assert [out.values is None for out in outputs] == [False, True, False]
    assert outputs[1].errors == {0: "embedded null byte", 1: "No such file or directory"}
    assert outputs[1].failures == {"nul\0.png": "embedded null byte", "gone.png": "No such file or directory"}
    assert torch.equal(outputs[0].values, outputs[2].values)


def test_images_in_memory_need_no_processes_unless_some_are_asked_for(classifier, in_memory, monkeypatch):
    started = []
    original = loader_module.WatchedLoader

    def counted(*args, num_workers, prefetch_factor, timeout, **kwargs):
        started.append(num_workers)
        return original(*args, num_workers=0, **kwargs)

    monkeypatch.setattr(loader_module, "WatchedLoader", counted)
    monkeypatch.setattr(loader_module, "default_num_workers", lambda: 5)
    for source, config in (
        (in_memory, _config(4, None)),
        (in_memory, _config(4, 2)),
        (["a"] * 4, _config(4, None)),
        (["a"] * 5, _config(4, None)),
        (["a"] * 100, _config(4, None)),
    ):
        list(batches(classifier, source, classifier, config))
    assert started == [0, 2, 0, 2, 5]


def test_tokens_of_chosen_layers_come_by_layer_and_leave_no_hook(classifier, in_memory):
    compute = layer_tokens(classifier, [0, 2])
    outputs = list(batches(classifier, in_memory, compute, _config(batch_size=6)))
    pixels = []
    list(batches(classifier, in_memory, lambda x: pixels.append(x) or x[:, 0, 0], _config(batch_size=6)))
    for out, images in zip(outputs, pixels, strict=True):
        assert list(out.values) == [0, 2]
        with torch.inference_mode():
            tokens = classifier.model.embed_tokens(classifier.normalise(images))
            assert torch.equal(out.values[0], tokens)
            for block in list(classifier.model.blocks)[:2]:
                tokens = block(tokens)
        torch.testing.assert_close(out.values[2], tokens)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in classifier.model.blocks)


def test_a_value_that_is_not_finite_names_its_image_and_its_layer(classifier, in_memory, image_root):
    def broken_at_the_seventh(images):
        return torch.where(images[:, 0, :1, 0] == seventh, torch.nan, 1.0)

    pixels = []
    list(batches(classifier, in_memory, lambda x: pixels.append(x) or x[:, 0, 0], _config(batch_size=10)))
    seventh = pixels[0][7, 0, 0, 0]
    pattern = rf"the model's output is not finite for {Path('memory') / '7'}: weights that diverged"
    with pytest.raises(ModelFileError, match=pattern):
        list(batches(classifier, in_memory, broken_at_the_seventh, _config()))
    torch.nn.init.constant_(classifier.model.blocks[0].mlp.fc2.bias, torch.inf)
    assert list(batches(classifier, in_memory, layer_tokens(classifier, [0]), _config()))
    with pytest.raises(
        ModelFileError, match=r"tokens of layer 1 are not finite for .*: weights that diverged"
    ):
        list(batches(classifier, in_memory, layer_tokens(classifier, [0, 1]), _config()))


def test_a_process_that_dies_is_named(classifier, image_root, monkeypatch):
    monkeypatch.setattr("vit_cls.data.dataset.read_file", lambda path: __import__("os")._exit(9))
    paths = [str(path) for path in (image_root / "train").rglob("*.png")]
    with pytest.raises(RunError, match=r"a loading process died .* Use fewer --num_workers, or 0"):
        list(batches(classifier, paths, classifier, _config(num_workers=1)))


def test_a_batch_that_cannot_be_handed_over_is_not_waited_for(classifier, image_root, monkeypatch):
    def cannot_be_sent(items):
        return lambda: items  # what a full /dev/shm does to any batch

    monkeypatch.setattr(loader_module, "collate", cannot_be_sent)
    paths = [str(path) for path in (image_root / "train").rglob("*.png")]
    with pytest.raises(RunError, match=r"a loading process died .*/dev/shm has .* MB free"):
        list(batches(classifier, paths, classifier, _config(num_workers=1)))


def test_want_of_memory_names_a_smaller_batch(classifier, in_memory):
    def compute(images):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. 1 MiB is free. See docs.")

    pattern = r"not enough for --batch_size 4 at 16x16 pixels \(CUDA out of memory.* Try --batch_size 2:"
    with pytest.raises(RunError, match=pattern):
        list(batches(classifier, in_memory, compute, _config()))


def test_a_bar_is_drawn_on_stderr_where_it_is_asked_for(classifier, in_memory, image_root, capsys):
    paths = [str(path) for path in (image_root / "train").rglob("*.png")]
    for images in (in_memory, paths):
        for show in (False, True):
            list(batches(classifier, images, classifier, _config(show_progress=show)))
            captured = capsys.readouterr()
            assert captured.out == ""
            assert ("predicting" in captured.err) == show


def test_settings_are_checked_once_for_all():
    for settings, message in (
        ({"batch_size": 0}, "--batch_size must be at least 1; got 0"),
        ({"num_workers": -1}, "--num_workers must"),
        ({"device": "tpu"}, "--device must be one of auto, cpu, cuda, mps; got 'tpu'"),
        ({"precision": "16"}, "--precision must be one of auto, 32, bf16; got '16'"),
    ):
        with pytest.raises(ConfigError, match=message):
            InferenceConfig(**settings)


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_is_the_reduced_precision_that_the_gpu_has(monkeypatch, native, expected):
    def supported(including_emulation=True):
        return native or including_emulation  # as a T4 or a V100 answers

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert InferenceConfig(torch.device("cuda")).computes_in.name == expected
    assert InferenceConfig(torch.device("cuda"), "32").computes_in.name == "32"
    assert InferenceConfig("cpu").computes_in.name == "32"
    assert InferenceConfig("cpu", "bf16").computes_in.name == "bf16"
    assert InferenceConfig(torch.device("mps")).computes_in.name == "32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")


def test_the_model_computes_in_the_dtype_of_the_precision():
    layer, row = torch.nn.Linear(2, 2), torch.ones(1, 2)
    for precision, dtype in ((FP32, torch.float32), (BF16, torch.bfloat16), (FP16, torch.float16)):
        with precision.autocast(torch.device("cpu")):
            assert layer(row).dtype == dtype


class _SlowDevice:
    """Copies that are there when their event has come, and not before; an event is all that was begun."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self._begun: list[tuple[torch.Tensor, torch.Tensor]] = []

    def copy_later(self, tensor):
        there = torch.full_like(tensor, False if tensor.dtype == torch.bool else -1)
        self._begun.append((there, tensor.clone()))
        return there

    def mark(self, device):
        begun, self._begun = self._begun, []
        number = sum(line.startswith("begun") for line in self.log)
        self.log.append(f"begun {number}")

        def synchronize():
            self.log.append(f"waited {number}")
            with torch.inference_mode():
                for there, values in begun:
                    there.copy_(values)

        return SimpleNamespace(synchronize=synchronize)


@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_results_come_back_while_the_next_batch_is_computed(layers, classifier, in_memory, monkeypatch):
    compute = classifier if layers is None else layer_tokens(classifier, layers)
    expected = list(batches(classifier, in_memory, compute, _config(batch_size=4)))
    device = _SlowDevice()
    monkeypatch.setattr("vit_cls.inference._overlaps", lambda _: True)
    monkeypatch.setattr("vit_cls.inference._copy_later", device.copy_later)
    monkeypatch.setattr("vit_cls.inference._mark", device.mark)
    found = []
    for out in batches(classifier, in_memory, compute, _config(batch_size=4)):
        found.append(out)
        device.log.append(f"given {len(found) - 1}")
    assert [out.items for out in found] == [out.items for out in expected]
    for out, other in zip(found, expected, strict=True):
        for layer in layers or [None]:
            values = [one.values if layer is None else one.values[layer] for one in (out, other)]
            assert torch.equal(*values)
    assert device.log == [
        *("begun 0", "begun 1", "waited 0", "given 0", "begun 2", "waited 1", "given 1"),
        *("waited 2", "given 2"),
    ]


def test_a_batch_of_unreadable_files_keeps_its_place_while_others_are_computed(
    classifier, image_root, monkeypatch
):
    good = str(next((image_root / "train").rglob("*.png")))
    paths = [good, good, "gone.png", "gone.png", good, good]
    device = _SlowDevice()
    monkeypatch.setattr("vit_cls.inference._overlaps", lambda _: True)
    monkeypatch.setattr("vit_cls.inference._copy_later", device.copy_later)
    monkeypatch.setattr("vit_cls.inference._mark", device.mark)
    outputs = list(batches(classifier, paths, classifier, _config(batch_size=2)))
    assert [out.items for out in outputs] == [paths[:2], paths[2:4], paths[4:]]
    assert torch.equal(outputs[0].values, outputs[2].values)
    assert outputs[1].values is None


def test_compile_compiles_the_encoder_and_gives_the_same(classifier, in_memory, monkeypatch):
    original, counted = TokenModel.compile_encoder, []

    def backend(graph, inputs):
        counted.append(graph)
        return graph.forward

    monkeypatch.setattr(TokenModel, "compile_encoder", lambda model: original(model, backend))
    _, expected = _all(classifier, in_memory, _config(10))
    assert not counted
    _, values = _all(classifier, in_memory, _config(10, compile=True))
    assert counted
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
