"""The benchmark compares like with like: its statistics, its checks, its report and its refusals."""

import json
import math

import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")  # busy cores make sharing such models very slow
TINY = ["--models", "vit_pico_patch7_28", "--batch_size", "2", "--rounds", "3"]


@pytest.fixture
def small_gemm(benchmark, monkeypatch):
    monkeypatch.setitem(benchmark.GEMM_SIDE, "cpu", 64)


def _numbers(node):
    """Every number of a report, however deep."""
    if isinstance(node, dict):
        return [number for value in node.values() for number in _numbers(value)]
    if isinstance(node, list):
        return [number for value in node for number in _numbers(value)]
    return [node] if isinstance(node, int | float) and not isinstance(node, bool) else []


def test_ratios_are_taken_within_each_pair(benchmark):
    # Worked by hand: ratios 2, 1.5, 1, 0.5, 4; sorted 0.5, 1, 1.5, 2, 4.
    stats = benchmark.paired_stats([1.0, 2.0, 3.0, 4.0, 1.0], [2.0, 3.0, 3.0, 2.0, 4.0])
    expected = {"min": 0.5, "q1": 1.0, "median": 1.5, "q3": 2.0, "max": 4.0, "pairs": 5, "ours_faster": 3}
    assert stats == expected


def test_a_slow_spell_that_hits_a_whole_pair_leaves_the_ratio_alone(benchmark):
    assert benchmark.paired_stats([1.0, 10.0, 1.0], [1.2, 12.0, 1.2])["max"] == pytest.approx(1.2)


def test_the_side_that_goes_first_alternates(benchmark):
    order = []
    settings = benchmark.parse([*TINY, "--rounds", "3"])
    seconds = benchmark.time_pairs(lambda: order.append("ours"), lambda: order.append("timm"), settings)
    assert order[2:] == ["ours", "timm", "timm", "ours", "ours", "timm"]  # the first two warm up
    assert [len(side) for side in seconds] == [3, 3]


def test_arithmetic_agrees_with_torchs_flop_counter(benchmark):
    from torch.utils.flop_counter import FlopCounterMode

    ours, theirs = benchmark.build_pair("vit_pico_patch7_28", "cls")
    for train in (False, True):
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            logits = theirs(torch.zeros(1, 3, 28, 28))
            if train:
                logits.sum().backward()
        counted = 1e-9 * counter.get_total_flops()
        assert benchmark.gflop_per_image(ours.config, train=train) == pytest.approx(counted)


@pytest.mark.parametrize("name", ["vit_pico_patch7_28", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("pool", ["cls", "gap", "max"])
def test_both_sides_have_the_same_parameters_and_logits(benchmark, name, pool):
    ours, theirs = benchmark.build_pair(name, pool, num_classes=5)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    images = torch.randn(1, 3, *ours.config.image_hw, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(ours.eval()(images), theirs.eval()(images), atol=1e-5)


def test_peak_memory_counts_what_lives_at_once_and_not_what_was_freed(benchmark):
    megabyte = 2**20

    def step():
        torch.empty(3 * megabyte, dtype=torch.uint8)  # freed at once
        held = torch.empty(2 * megabyte, dtype=torch.uint8)
        more = torch.empty(4 * megabyte, dtype=torch.uint8)
        return held, more

    assert benchmark.peak_step_bytes(step, "cpu") == 6 * megabyte


@pytest.mark.usefixtures("small_gemm")
def test_a_run_reports_every_suite_in_finite_positive_numbers(benchmark, tmp_path, capsys):
    target = tmp_path / "report.json"
    assert benchmark.main([*TINY, "--json", str(target)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    report = json.loads(target.read_text())
    keys = "date device_name gemm_ceiling memory_measured rows schema_version settings threads versions"
    assert " ".join(sorted(report)) == keys
    assert sorted(report["versions"]) == ["python", "timm", "torch", "vit_cls"]
    assert [row["suite"] for row in report["rows"]] == list(benchmark.SUITES)
    shown = capsys.readouterr().out
    for row in report["rows"]:
        agreement = row.pop("agreement")
        assert all(math.isfinite(value) for value in agreement.values())
        assert row["ratio"].pop("ours_faster") in range(4)
        assert row["ratio"]["pairs"] == len(row["ours"]["seconds"]) == len(row["timm"]["seconds"]) == 3
        assert all(math.isfinite(number) and number > 0 for number in _numbers(row))
        assert f"{row['ratio']['median']:.3f}" in shown


@pytest.mark.usefixtures("small_gemm")
def test_a_run_under_autocast_works(benchmark):
    assert benchmark.main(["model", *TINY, "--precision", "bf16", "--pool", "gap"]) == 0


@pytest.mark.usefixtures("small_gemm")
@pytest.mark.parametrize("suite", ["model", "train"])
def test_sides_that_differ_in_one_weight_are_refused(benchmark, suite, monkeypatch, tmp_path, capsys):
    build_pair = benchmark.build_pair

    def perturbed(*args):
        ours, theirs = build_pair(*args)
        with torch.no_grad():
            ours.blocks[0].mlp.fc1.weight[0, 0] += 1.0
        return ours, theirs

    monkeypatch.setattr(benchmark, "build_pair", perturbed)
    assert benchmark.main([suite, *TINY, "--json", str(tmp_path / "report.json")]) == 1
    assert "logits differ by" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_gemm")
def test_gradients_that_differ_are_refused_though_the_logits_agree(benchmark, monkeypatch, capsys):
    build_pair = benchmark.build_pair

    def perturbed(*args):
        ours, theirs = build_pair(*args)
        ours.head.weight.register_hook(torch.neg)
        return ours, theirs

    monkeypatch.setattr(benchmark, "build_pair", perturbed)
    assert benchmark.main(["train", *TINY]) == 1
    assert "the loss of the timed steps differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["modle"], r"SUITE 'modle' is not known. Did you mean `model`?"),
        (["--models", "vit_tny_patch16_224"], "Did you mean `vit_tiny_patch16_224`?"),
        (["--rounds", "1"], "--rounds must be at least 2; got 1."),
        (["--json", "/nowhere/at/all/report.json"], "cannot be written: No such file or directory."),
        (["--json", "/"], "cannot be written: / is a folder."),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments, message, refuses):
    refuses(arguments, message)
