"""Any function of a model over any number of images: the one loop that everything but training uses."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from vit_cls.checks import check_choice, check_range
from vit_cls.data.dataset import Batch, ImageSource
from vit_cls.data.loader import TIMEOUT_SECONDS, Images, load_once
from vit_cls.data.transforms import model_reader
from vit_cls.environment import is_out_of_memory, start_of, unusable_gpu
from vit_cls.errors import ConfigError, ModelFileError, RunError, VitClsError
from vit_cls.model.classifier import ImageClassifier
from vit_cls.model.token_model import TokenModel

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "32", "bf16")
NO_HEAD = (
    "the model has no head, so it cannot name a class. Train one: vit-cls fit --config "
    "configs/linear_probe.yaml --model.name NAME --model.pretrained WEIGHTS --data.root FOLDER."
)

Values = TypeVar("Values", Tensor, dict[int, Tensor])


@dataclass(frozen=True)
class Precision:
    """The numbers that a model computes with.

    Args:
        name: ``32``, ``bf16`` or ``fp16``, as records have it.
        dtype: That of autocast; None computes in the dtype of the weights.
    """

    name: str
    dtype: torch.dtype | None = None

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which the model is run."""
        return torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype is not None)


FP32 = Precision("32")
BF16 = Precision("bf16", torch.bfloat16)
FP16 = Precision("fp16", torch.float16)


@dataclass(frozen=True)
class InferenceConfig:
    """How a model is run over images; does not change the result beyond rounding.

    Args:
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``mps``; or a device of torch.
        precision: ``auto`` (autocast on a GPU, see `reduced_precision`), ``32`` or ``bf16``.
        batch_size: Images a forward pass.
        num_workers: Loading processes; None means the usable cores, from 4 on without one for the model, no
            more than batches, and none for images in memory or for no more than one batch.
        timeout_seconds: How long no loading process may give a batch; 0 waits for ever.
        compile: Whether the encoder's blocks are compiled.
        exact: Whether images are resized by Pillow, as timm's loader does it.
        show_progress: Whether a bar is drawn on stderr.

    Raises:
        ConfigError: If a number is out of range, or the device or the precision is not available.
    """

    device: str | torch.device = "auto"
    precision: str = "auto"
    batch_size: int = 64
    num_workers: int | None = None
    timeout_seconds: float = TIMEOUT_SECONDS
    compile: bool = False
    exact: bool = False
    show_progress: bool = False

    def __post_init__(self) -> None:
        check_range("--batch_size", self.batch_size, at_least=1)
        check_range("--num_workers", self.num_workers, at_least=0)
        check_range("--timeout_seconds", self.timeout_seconds, at_least=0)
        check_choice("--precision", self.precision, PRECISIONS)
        if self.device != "auto":  # there always is one, and looking for a GPU takes time
            choose_device(self.device)

    @property
    def computes_in(self) -> Precision:
        """What ``precision`` means on this device."""
        if self.precision == "auto":
            return reduced_precision(choose_device(self.device)) or FP32
        return BF16 if self.precision == "bf16" else FP32

    @property
    def record(self) -> dict[str, str | None]:
        """Device, its name where it is a GPU, and precision, as every result has them."""
        device = choose_device(self.device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        return {"device": str(device), "device_name": name, "precision": self.computes_in.name}


def reduced_precision(device: torch.device) -> Precision | None:
    """The shorter numbers that a device computes fast with: bf16, or fp16 on a GPU that only emulates bf16.

    Args:
        device: Of a machine's GPUs, which are taken to be alike, the current one is asked.

    Returns:
        None where there are none: on a CPU and on MPS.
    """
    if device.type != "cuda":
        return None
    return BF16 if torch.cuda.is_bf16_supported(including_emulation=False) else FP16


AUTO_DEVICE: ContextVar[str | torch.device] = ContextVar("AUTO_DEVICE", default="auto")
"""What ``auto`` means here: a study that runs on a device sets it for all that it calls."""


def choose_device(device: str | torch.device) -> torch.device:
    """The device that ``--device`` means; one of torch is itself.

    Raises:
        ConfigError: If it is unknown or not there.
    """
    if device == "auto":
        device = AUTO_DEVICE.get()
    if isinstance(device, torch.device):
        return device
    check_choice("--device", device, DEVICES)
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return torch.device("cuda" if available["cuda"] else "mps" if available["mps"] else "cpu")
    if not available[device]:
        reason = unusable_gpu() if device == "cuda" else None
        why = f": {reason}" if reason else ""
        raise ConfigError(
            f"--device {device} is not available on this machine{why}. Use --device auto or cpu."
        )
    return torch.device(device)


@dataclass(frozen=True)
class Outputs(Generic[Values]):
    """What was computed of one batch.

    Args:
        items: What was asked for: positions in the index, or paths.
        places: Which of the items have values, ascending.
        values: One row for each of them, float32, on the CPU; by layer where the computation gives several.
            None where no image could be read.
        errors: Why the other items have none, by their place.
    """

    items: list[Any]
    places: list[int]
    values: Values | None
    errors: dict[int, str]

    @property
    def done(self) -> list[Any]:
        """The items that have values."""
        return [self.items[place] for place in self.places]

    @property
    def failures(self) -> dict[Any, str]:
        """Why the other items have none, by the item."""
        return {self.items[place]: reason for place, reason in self.errors.items()}


def batches(
    classifier: ImageClassifier,
    images: Images,
    compute: Callable[[Tensor], Values],
    config: InferenceConfig | None = None,
) -> Iterator[Outputs[Values]]:
    """Compute something of images, a batch at a time, in their order and in constant memory.

    Args:
        classifier: Says how pixels are made; is moved to the device and put in evaluation mode.
        images: Those of an index, or paths; an endless source will do. It is read a few batches ahead.
        compute: From uint8 images on the device, shape ``(batch, 3, height, width)``, to one row an image, or
            to such rows by layer. It is called in inference mode, under autocast if there is one.

    Yields:
        Outputs of ``batch_size`` images, of fewer at the end.

    Raises:
        ModelFileError: If a value is not finite, of weights that diverged, say.
        RunError: If a loading process dies, or memory is not enough.
    """
    config = config or InferenceConfig()
    device = choose_device(config.device)
    precision = config.computes_in
    classifier.to(device).eval()
    if config.compile:
        classifier.model.compile_encoder()
    loaded = load_once(
        images,
        model_reader(classifier.preprocess, exact=config.exact),
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        timeout_seconds=config.timeout_seconds,
        pin_memory=device.type == "cuda",
    )
    # A GPU is given the next batch before the results of the last are waited for.
    ahead = 1 if _overlaps(device) else 0
    running: deque[_Running[Values]] = deque()
    with _progress(images, config) as advance, _named_want_of_memory(classifier, config):
        for items, batch in loaded:
            running.append(_start(items, batch, compute, device, precision))
            if len(running) > ahead:
                yield _finish(running.popleft(), images, precision, advance)
        while running:
            yield _finish(running.popleft(), images, precision, advance)


@contextlib.contextmanager
def _named_want_of_memory(classifier: ImageClassifier, config: InferenceConfig) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, VitClsError) or not is_out_of_memory(error):
            raise
        pixels = "x".join(map(str, classifier.preprocess.img_size))
        smaller = ""
        if config.batch_size > 1:
            smaller = f" Try --batch_size {config.batch_size // 2}: the results are the same, to rounding."
        raise RunError(
            f"the memory is not enough for --batch_size {config.batch_size} at {pixels} pixels "
            f"({start_of(error)}).{smaller} --device cpu uses the machine's own memory."
        ) from error


@dataclass(frozen=True)
class _Running(Generic[Values]):
    """A batch that the device may still be at work on; its tensors are for the CPU."""

    items: list[Any]
    batch: Batch
    values: Values | None
    finite: dict[Any, Tensor]
    """Whether each row is finite, by layer; None is no layer."""
    ready: torch.cuda.Event | None = None
    """Comes when the tensors are there; None where they are."""


def _start(
    items: list[Any],
    batch: Batch,
    compute: Callable[[Tensor], Values],
    device: torch.device,
    precision: Precision,
) -> _Running[Values]:
    if not len(batch.indices):
        return _Running(items, batch, None, {})
    pixels = batch.images.to(device, non_blocking=True)
    with torch.inference_mode(), precision.autocast(device):
        values = compute(pixels)
        parts: dict[Any, Tensor] = {None: values} if isinstance(values, Tensor) else values
        finite = {layer: part.reshape(len(part), -1).isfinite().all(dim=1) for layer, part in parts.items()}
    with torch.inference_mode():
        overlaps = _overlaps(device)
        fetch = _copy_later if overlaps else Tensor.cpu
        finite = {layer: fetch(rows) for layer, rows in finite.items()}
        if isinstance(values, Tensor):
            values = fetch(values.float())
        else:
            values = {layer: fetch(part.float()) for layer, part in values.items()}
    return _Running(items, batch, values, finite, _mark(device) if overlaps else None)


def _overlaps(device: torch.device) -> bool:
    """Whether the device works while the host does something else, and copies too."""
    return device.type == "cuda"


def _copy_later(tensor: Tensor) -> Tensor:
    """A copy on the CPU that begins when the device has come so far; into memory that is page-locked, or
    the host would wait.
    """
    there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return there.copy_(tensor, non_blocking=True)


def _mark(device: torch.device) -> torch.cuda.Event:
    """An event that comes when the device has done what it was given so far."""
    return torch.cuda.current_stream(device).record_event()


def _finish(
    running: _Running[Values], images: Images, precision: Precision, advance: Callable[[int], None]
) -> Outputs[Values]:
    """The results, on the CPU; raises where one is not finite."""
    items, places = running.items, running.batch.indices.tolist()
    if running.ready is not None:
        running.ready.synchronize()
    for layer, finite in running.finite.items():
        if not bool(finite.all()):
            first = items[places[int((~finite).nonzero()[0])]]
            name = images.index.path(first) if isinstance(images, ImageSource) else first
            what = "the model's output is" if layer is None else f"tokens of layer {layer} are"
            short = "" if precision.dtype is None else f", or {precision.name} is too short (--precision 32)"
            raise ModelFileError(f"{what} not finite for {name}: weights that diverged{short}.")
    advance(len(items))
    return Outputs(items, places, running.values, dict(running.batch.failures))


@contextlib.contextmanager
def _progress(images: Images, config: InferenceConfig) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, or a counter where the number of images is not known; gives what advances it."""
    if not config.show_progress:
        yield lambda count: None
        return
    total = len(images.index) if isinstance(images, ImageSource) else None
    columns = Progress.get_default_columns()
    counter = (columns[0], "{task.completed}")
    with Progress(*(counter if total is None else columns), console=Console(stderr=True)) as bar:
        task = bar.add_task("predicting", total=total)
        yield lambda count: bar.advance(task, count)


def layer_tokens(classifier: ImageClassifier, layers: Sequence[int]) -> Callable[[Tensor], dict[int, Tensor]]:
    """What `batches` computes to have the tokens of some layers, as the block left them, ``(batch, tokens,
    dim)``.

    Args:
        classifier: Hooks on its blocks take the tokens, so native and adapted models are read alike.
        layers: 0 is before the first block, ``l`` after block ``l``.
    """

    def compute(images: Tensor) -> dict[int, Tensor]:
        with _captured(classifier.model, layers) as tokens:
            classifier.model.encode(classifier.normalise(images))
        return {layer: tokens[layer] for layer in layers}

    return compute


@contextlib.contextmanager
def _captured(model: TokenModel, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Have a forward pass leave the tokens of some layers in what is given."""
    tokens: dict[int, Tensor] = {}

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        tokens[0] = args[0]

    def after(layer: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def keep(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            tokens[layer] = out

        return keep

    blocks: list[nn.Module] = list(model.blocks)
    with contextlib.ExitStack() as hooks:
        for layer in layers:
            block = blocks[max(0, layer - 1)]
            hook = (
                block.register_forward_pre_hook(before)
                if layer == 0
                else block.register_forward_hook(after(layer))
            )
            hooks.callback(hook.remove)
        yield tokens


def require_head(classifier: ImageClassifier) -> None:
    """Refuse a model that cannot name a class.

    Raises:
        ModelFileError: If it has no head.
    """
    if not classifier.class_names:
        raise ModelFileError(NO_HEAD)
