"""ghost_apply_pipelined under the emulator gives the bits of ghost_apply, whatever the schedule.

GHOST_OPS_CUDA_PIPELINE is read once per process, so that each run is a job of ``cuda_driver``.
"""

from __future__ import annotations

import re
from pathlib import Path

import emulator
import pytest
import torch
from conftest import native_module
from cuda_driver import PIPELINED, Job, results_of, spawn

VARIABLE = "GHOST_OPS_CUDA_PIPELINE"
DEVICES = ("sm_90", "tiny sm_90", "sm_80")
# Checks of the driver that have no digest: NaN, and batch norms with statistics of the batch.
OTHERS = ("nan in vectors", "train vectors")


def digests(output: str) -> list[tuple[str, str]]:
    """(kernel, digest of its output) of each check, in order."""
    return re.findall(r"^digest (.+) (\w+)$", output, re.MULTILINE)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, str]]]:
    """Digests of all cases under all schedules with the variable set, by device; under "off" those
    of ghost_apply."""
    library = emulator.or_skip(emulator.build_ops)
    runs = [("off", "sm_90", "0", ["plain"])]
    runs += [(device, device, "1", list(emulator.SCHEDULES)) for device in DEVICES]
    cases = [*PIPELINED, *OTHERS]
    jobs = [
        Job(name, str(library), cases, schedules, device, {VARIABLE: value})
        for name, device, value, schedules in runs
    ]
    found = results_of(jobs, tmp_path_factory.mktemp("pipelined"))
    assert all(job["status"] == 0 for job in found.values()), [j["output"] for j in found.values()]
    return {name: digests(job["output"]) for name, job in found.items()}


@pytest.mark.parametrize("device", DEVICES)
def test_the_bits_of_ghost_apply(outputs: dict[str, list[tuple[str, str]]], device: str) -> None:
    plain, pipelined = outputs["off"], outputs[device]
    assert len(pipelined) == len(PIPELINED) * len(emulator.SCHEDULES)
    for i, (kernel, digest) in enumerate(pipelined):
        name, (other, want) = list(PIPELINED)[i % len(PIPELINED)], plain[i % len(PIPELINED)]
        assert ("pipelined" in kernel) == (device != "sm_80"), name
        assert "pipelined" not in other, name
        assert digest == want, name


@pytest.mark.gpu
def test_the_bits_of_ghost_apply_on_a_gpu() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the device is older than sm_90")
    driver, found = Path(__file__).with_name("cuda_driver.py"), []
    for value in ("0", "1"):
        done = spawn(str(driver), "--gpu", "--cases", *PIPELINED, *OTHERS, **{VARIABLE: value})
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(digests(done.stdout))
    assert len(found[0]) == len(PIPELINED)
    assert found[0] == found[1]


EXPLAIN = """
import torch, ghost_ops
for shape, oup, arguments in (
    ((256, 40, 28, 28), 240, {}),
    ((256, 40, 28, 28), 240, {"residual": True}),
    ((256, 40, 28, 28), 240, {"device": "sm_80"}),
    ((256, 40, 28, 28), 240, {"channels_last": False}),
    ((256, 42, 28, 28), 240, {}),
    ((256, 160, 7, 7), 960, {}),
):
    arguments = {"device": "sm_90", "dtype": torch.float16, "channels_last": True, **arguments}
    (one,) = ghost_ops.planner.explain(shape, oup, **arguments).passes
    assert one.smem_bytes <= 227 << 10
    print(one.kernel)
"""


@pytest.mark.skipif(native_module() is None, reason="the native library is not built")
@pytest.mark.parametrize("value", ["0", "1"])
def test_the_plan_names_the_kernel(value: str) -> None:
    root = Path(__file__).resolve().parent.parent
    done = spawn("-c", EXPLAIN, **{VARIABLE: value, "PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr
    names = done.stdout.split()
    assert names[0] == ("ghost_apply_pipelined" if value == "1" else "ghost_apply")
    assert names[1:] == ["ghost_apply"] * 5
