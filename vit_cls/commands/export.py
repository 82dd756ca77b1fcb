"""``vit-cls export``: a file that others can run, checked for equality."""

from __future__ import annotations

from pathlib import Path

from vit_cls.checks import check_choice
from vit_cls.commands.outcome import Outcome
from vit_cls.commands.parsing import MODEL_HELP, make_parser, parse
from vit_cls.export.timm import check_new_folder, export_timm
from vit_cls.files import making, output_folder, write_errors
from vit_cls.model.classifier import ImageClassifier
from vit_cls.weights.bundle import MODEL_FILE, load_classifier, save_classifier
from vit_cls.weights.factory import load

FORMATS = ("timm", "safetensors")


def run(words: list[str]) -> Outcome:
    """Export a model: the folder or file, and by how much its logits differ from the model's."""
    parser = make_parser("export", "Write a model for others, and check that it computes the same.")
    parser.add_argument("--model", type=str, required=True, help=MODEL_HELP)
    parser.add_argument(
        "--format",
        type=str,
        required=True,
        help="timm: a folder that timm.create_model('local-dir:FOLDER', pretrained=True) opens; "
        f"safetensors: one {MODEL_FILE} of ours, from anything that --model takes",
    )
    parser.add_argument("--output", type=str, required=True, help="a new folder")
    args = parse(parser, words)
    check_choice("--format", args.format, FORMATS)
    output = output_folder(args.output)
    assert output is not None
    check_new_folder(output)
    classifier = load(args.model)
    with write_errors(output):
        return _timm(classifier, output) if args.format == "timm" else _safetensors(classifier, output)


def _timm(classifier: ImageClassifier, output: Path) -> Outcome:
    export = export_timm(classifier.float(), output)
    data = {
        "output": str(output),
        "format": "timm",
        "architecture": export.architecture,
        "max_relative_difference": export.difference,
    }
    shown = [
        f"timm's {export.architecture}, logits equal to {export.difference:.1e} of the largest: {output}",
        f'Use: timm.create_model("local-dir:{output}", pretrained=True)',
    ]
    return Outcome(data, shown)


def _safetensors(classifier: ImageClassifier, output: Path) -> Outcome:
    with making(output):
        file = save_classifier(classifier, output / MODEL_FILE)
    again = load_classifier(file)
    same = all((a == b).all() for a, b in zip(classifier.parameters(), again.parameters(), strict=True))
    assert same, "the file does not hold the weights that were written"
    data = {"output": str(file), "format": "safetensors", "max_relative_difference": 0.0}
    return Outcome(data, [str(file), f"Use: vit-cls evaluate --model {file} --data FOLDER"])
