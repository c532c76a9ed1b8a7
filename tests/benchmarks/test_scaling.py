import json
from collections.abc import Callable
from pathlib import Path

import cost_grid
import kaf_parts
import pytest
import scaling
import torch
from kaf_parts import CHANNELS, Inputs
from limits import Work, best_limits, machine_limits
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.fusion import Diffusion, KAFLayer
from nnunetv2_kaf.keypoints import KeypointDetector

CPU = torch.device("cpu")


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
def test_fit_finds_the_exponent_of_a_power_law(power: float) -> None:
    x = [64, 100, 1000, 4096]
    found = scaling.fit(x, [3e-4 * value**power for value in x])
    assert found == pytest.approx({"exponent": power, "exponent_of_last_step": power}, abs=1e-9)


def test_last_step_is_that_of_the_last_two_points() -> None:
    found = scaling.fit([1, 2, 4], [1.0, 1.0, 4.0])
    assert found["exponent_of_last_step"] == pytest.approx(2.0)
    assert found["exponent"] == pytest.approx(1.0)


def test_floor_is_the_slower_of_memory_and_arithmetic() -> None:
    limits = {"bytes_per_second": 10.0, "flops_per_second": 1000.0}
    assert Work(bytes=50.0, flops=100.0).floor_seconds(limits) == 5.0
    assert Work(bytes=50.0, flops=8000.0).floor_seconds(limits) == 8.0


def test_limits_are_measured_and_the_best_is_kept() -> None:
    limits = machine_limits(CPU, repetitions=1, edge=64)
    assert 1e8 < limits["bytes_per_second"] < 1e13
    assert 1e6 < limits["flops_per_second"] < 1e15
    one = {"bytes_per_second": 1.0, "flops_per_second": 4.0, "how": "x"}
    other = {"bytes_per_second": 2.0, "flops_per_second": 3.0, "how": "x"}
    assert best_limits(one, other) == {"bytes_per_second": 2.0, "flops_per_second": 4.0, "how": "x"}


def test_work_of_a_stage_by_hand() -> None:
    part = kaf_parts.build("stage", Inputs((4, 4, 4), 8, 0, CPU))
    weights = 2 * (27 * 32 * 32 + 32 + 2 * 32)
    assert part.work.flops == 3 * 2 * 2 * 27 * 32 * 32 * 64
    assert part.work.bytes == 4 * ((4 + 15) * 32 * 64 + 3 * weights)


def test_work_of_detection_by_hand() -> None:
    detector = KeypointDetector(KAFConfig(num_keypoints=8), (1.0, 1.0, 1.0))
    # radii of three standard deviations: 3, 3, 5 and 8 voxels, along three axes
    assert kaf_parts.detection_work(detector, 1000).flops == 2 * 3 * (7 + 7 + 11 + 17) * 1000


def test_work_of_the_diffusion_by_hand() -> None:
    diffusion = Diffusion(6, 5, 4, (3, 3))
    first, second = 9 * 6 * 4, 9 * 4 * 5
    diffusion.evaluation = "dense"
    dense = kaf_parts.diffusion_work(diffusion, 2, 100)
    assert dense == Work(4.0 * 5 * (6 + 2 * 4) * 100, 6.0 * 100 * (first + second))
    diffusion.evaluation = "sparse"
    sparse = kaf_parts.diffusion_work(diffusion, 2, 100)
    assert sparse == Work(0.0, 6.0 * (2 * first + 18 * second))
    diffusion.evaluation = "auto"
    assert kaf_parts.diffusion_work(diffusion, 2, 100) == sparse
    assert kaf_parts.diffusion_work(diffusion, 200, 100) == dense


@pytest.mark.parametrize("name", ["kaf", "paper_sparse", "paper_dense", "stage"])
def test_floor_counts_the_operations_that_torch_counts(name: str) -> None:
    part = kaf_parts.build(name, Inputs((12, 12, 12), 16, 0, CPU))
    with FlopCounterMode(display=False) as counter:
        part.step()
    # the first layers' inputs (positions, a map of tokens) need no gradient or need it at few voxels
    assert part.work.flops == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_the_layers_of_the_parts_are_not_the_identity_and_evaluate_as_named() -> None:
    inputs = Inputs((6, 6, 6), 4, 0, CPU)
    for name, evaluation in (("kaf", "auto"), ("paper_sparse", "sparse"), ("paper_dense", "dense")):
        layer = kaf_parts._layer(name, inputs)
        assert layer.diffusion.evaluation == evaluation
        assert isinstance(layer, KAFLayer)
        fused, _ = layer(inputs.features, inputs.keypoints, inputs.shape)
        assert not torch.equal(fused[:, -CHANNELS:], inputs.features)


def test_a_step_leaves_no_gradient_behind() -> None:
    inputs = Inputs((6, 6, 6), 4, 0, CPU)
    part = kaf_parts.build("kaf", inputs)
    part.step()
    assert inputs.features.grad is None
    assert all(tensor.grad is None for tensor in part.alive)


@pytest.mark.parametrize(("keypoints", "pick"), [(1, "sparse"), (64, "dense")])
def test_what_auto_picks_is_told_by_its_operations(keypoints: int, pick: str) -> None:
    step = cost_grid.make_step(Diffusion(8, 4, None, (3, 3, 3)), keypoints, (4, 4, 4), seed=0)
    assert cost_grid.picked(step) == pick


def test_auto_that_does_neither_is_mixed() -> None:
    def step(evaluation: str) -> None:
        size = {"sparse": 2, "dense": 3, "auto": 4}[evaluation]
        torch.ones(size, size) @ torch.ones(size, size)

    assert cost_grid.picked(step) == "mixed"


@pytest.mark.parametrize("pick", ["sparse", "dense", "mixed"])
def test_loss_is_that_of_what_auto_picks(pick: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wall = {"sparse": 2.0, "dense": 1.0, "auto": 3.0}

    def alternate(arms: dict[str, Callable[[int], object]], *_: object) -> dict[str, list[tuple[float, float]]]:
        return {name: [(wall[name], 0.0)] * 3 for name in arms}

    monkeypatch.setattr(cost_grid, "alternate", alternate)
    monkeypatch.setattr(cost_grid, "picked", lambda _: pick)
    found = cost_grid.measure_point(Diffusion(8, 4, None, (3, 3)), 2, (4, 4), 3, 1, 0)
    assert found["loss"] == wall["auto" if pick == "mixed" else pick]
    assert ("auto" in found["seconds"]) == (pick == "mixed")


def test_more_keypoints_than_voxels_are_refused() -> None:
    args = scaling.parser().parse_args(["--edges", "4", "--fixed-keypoints", "65", "--sweeps", "V"])
    with pytest.raises(ValueError, match="edge 4 has fewer voxels than 65"):
        scaling.sizes(args)


def test_the_document_and_its_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_grid, "WIDTHS", ((8, None, 4), (8, 4, 4)))
    monkeypatch.setattr(cost_grid, "EDGES", {3: (4,)})
    monkeypatch.setattr(cost_grid, "KEYPOINTS", (2, 1000))
    monkeypatch.setattr(scaling, "machine_limits", lambda device: machine_limits(device, 1, 64))
    out = tmp_path / "scaling.json"
    sizes = ["--keypoints", "8", "16", "--edges", "6", "12", "8", "--fixed-edge", "6", "--fixed-keypoints", "8"]
    limits = ["--max-edge", "8", "--max-dense-edge", "6", "--cost-grid", "--grid-dims", "3", "--rounds", "2"]
    threads = torch.get_num_threads()
    scaling.main([*sizes, *limits, "--warmup", "1", "--device", "cpu", "--threads", "1", "--out", str(out)])
    assert torch.get_num_threads() == threads
    document = json.loads(out.read_text())
    assert {"machine", "versions", "seed", "limits", "load_average", "memory"} <= set(document)
    rows = {(row["sweep"], row["edge"], row["keypoints"], row["part"]): row for row in document["rows"]}
    assert len(rows) == len(document["rows"]) == 2 * 4 + 3 * 5
    unmeasured = {key for key, row in rows.items() if row["seconds"] == "not measured"}
    assert unmeasured == {("V", 12, 8, part) for part in scaling.PARTS} | {("V", 8, 8, "paper_dense")}
    for key in rows.keys() - unmeasured:
        row = rows[key]
        assert row["times_floor"] == pytest.approx(row["seconds"] / row["floor_seconds"])
        assert row["peak_bytes"] > 4 * row["voxels"]
    fitted = {(one["sweep"], one["part"]) for one in document["exponents"]}
    assert fitted == {("K", part) for part in scaling.PARTS if part != "stage"} | {
        ("V", part) for part in scaling.PARTS if part != "paper_dense"
    }
    assert document["cost_grid"]["summary"]["points"] == len(document["cost_grid"]["rows"]) == 2
    rows[("V", 8, 8, "stage")].update(seconds=1.2345, times_floor=7.25, peak_bytes=3 * 2**20)
    out.write_text(json.dumps(document))
    capsys.readouterr()
    scaling.main(["--table", "--out", str(out)])
    shown = capsys.readouterr().out
    assert "| 8^3 | 8 |" in shown
    assert "| 1234.5 (7.2), 3 |" in shown
    assert f"| 12^3 | 8 |{' not measured |' * 5}" in shown
    assert "2 points: auto takes" in shown
