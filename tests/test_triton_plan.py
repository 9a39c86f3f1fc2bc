"""The Triton backend's decisions: passes, tiles, and their autotuning with its file on disk."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import warnings

import pytest
import torch
from helpers import GHOSTNET

from ghost_ops.backends.triton import plan, tuning

H100 = plan.Device("H100", 132, 50 * 2**20)


def problem(
    n: int = 256,
    c: int = 16,
    size: int = 112,
    oup: int = 16,
    ratio: int = 2,
    d: int = 3,
    nhwc: bool = True,
    dtype: torch.dtype = torch.float16,
    has_primary: bool = True,
) -> plan.Problem:
    m = -(-oup // ratio)
    return plan.Problem(
        n, c, size, size, m, ratio, oup, d, 1, 1, 0.0, 1, 0.0, nhwc, dtype, has_primary
    )


def test_one_pass_where_images_fill_the_device() -> None:
    found = plan.passes(problem(n=256), H100, stores_z=True)
    assert found.one_pass
    assert found.bytes_one == 256 * 112 * 112 * (16 + 16) * 2
    assert found.bytes_two == found.bytes_one + 256 * 112 * 112 * 8 * 2
    assert "one pass" in str(found)


def test_two_launches_for_a_few_large_images() -> None:
    found = plan.passes(problem(n=8, c=64, size=512, oup=64), H100, stores_z=True)
    assert not found.one_pass
    assert "busy" in found.reason
    assert "two launches" in str(found)


def test_y_that_stays_in_the_cache_costs_nothing_to_read_again() -> None:
    found = plan.passes(problem(n=16), H100, stores_z=True)
    assert found.bytes_two == found.bytes_one


@pytest.mark.parametrize(
    ("p", "device", "epilogue", "word"),
    [
        (problem(ratio=1), H100, False, "ratio 1"),
        (problem(), H100, True, "residual"),
        (problem(), dataclasses.replace(H100, hip=True), False, "AMD"),
    ],
    ids=["ratio 1", "residual", "AMD"],
)
def test_never_one_pass(p: plan.Problem, device: plan.Device, epilogue: bool, word: str) -> None:
    found = plan.passes(p, device, stores_z=True, epilogue=epilogue)
    assert not found.one_pass
    assert word in found.reason


def test_no_images() -> None:
    assert plan.passes(problem(n=0), H100, stores_z=True).programs == 0


def test_u_is_stashed_where_x_is_wide() -> None:
    assert plan.stashes_u(problem(c=960, size=7, oup=160))
    assert not plan.stashes_u(problem(c=160, size=7, oup=960))
    assert not plan.stashes_u(problem(c=80, size=7, oup=160, has_primary=False))


def test_64_bit_offsets_are_taken_in_time() -> None:
    assert not problem(n=256, oup=480, c=80, size=14).wide
    assert problem(n=2**12, c=3, size=256, oup=16).wide
    assert problem(n=1, c=2**12, size=2**10, oup=16).wide


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("nhwc", [True, False])
@pytest.mark.parametrize("kind", plan.KINDS)
def test_tiles_are_what_a_kernel_can_run(kind: str, nhwc: bool, dtype: torch.dtype) -> None:
    for size, inp, oup, _ in GHOSTNET:
        p = problem(256, inp, size, oup, nhwc=nhwc, dtype=dtype)
        found = plan.candidates(kind, p, H100)
        assert found[0] == plan.default_tile(kind, p, H100)
        assert len(found) == len(set(found)) > 1
        for tile in found:
            for extent in (tile.pixels, tile.channels):
                assert extent == plan.power_of_two(extent)
            if kind in ("primary", "fused", "input_gradient", "weight_gradient"):
                assert min(tile.pixels, tile.channels, tile.depth) >= 16  # what tl.dot takes
            assert tile.pixels * tile.channels <= 16384


def test_programs_share_the_pixels_out() -> None:
    """No tile is left over, and programs are neither few nor many."""
    for size, inp, oup, _ in GHOSTNET:
        p = problem(256, inp, size, oup)
        for kind in plan.KINDS:
            tile = plan.default_tile(kind, p, H100)
            pixels = p.n * p.out_pixels
            each = plan.tiles_per_program(kind, p, tile, H100, 1, pixels)
            groups = -(-pixels // (tile.pixels * each))
            assert each >= 1
            assert groups * each * tile.pixels >= pixels
            blocks = -(-plan.channel_axis(kind, p) // tile.channels)
            if kind not in ("fused", "fused_gradient", "weight_gradient"):
                assert groups * blocks <= 20 * H100.multiprocessors
                assert groups * blocks >= min(H100.multiprocessors, pixels // tile.pixels)


def test_loop_lengths_are_few() -> None:
    lengths = {plan.rounded_up(n) for n in range(1, 1000)}
    assert len(lengths) < 40
    assert all(n <= plan.rounded_up(n) <= 1.25 * n + 1 for n in range(1, 1000))


def test_explain_prints_every_decision() -> None:
    text = plan.explain(problem(), H100)
    for word in ("one pass", "bytes", "training", *plan.KINDS):
        assert word in text


# --- autotuning -------------------------------------------------------------------------------


class Launcher:
    """A kernel of which one tile is the fastest, and some do not fit."""

    def __init__(self, best: int, too_large: tuple[int, ...] = ()) -> None:
        tiles = plan.candidates("primary", problem(), H100)
        self.best, self.too_large = tiles[best], [tiles[i] for i in too_large]
        self.launched: list[plan.Tile] = []
        self.timed = 0

    def __call__(self, tile: plan.Tile) -> plan.Tile:
        if tile in self.too_large:
            errors = pytest.importorskip("triton.runtime.errors")
            raise errors.OutOfResources(2**20, 2**16, "shared memory")
        self.launched.append(tile)
        return tile

    def measure(self, call) -> float:  # type: ignore[no-untyped-def]
        self.timed += 1
        return 1.0 if call() == self.best else 2.0

    def run(self, p: plan.Problem | None = None) -> plan.Tile:
        return tuning.run("primary", p or problem(), H100, self)


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Launcher:
    pytest.importorskip("triton")
    found = Launcher(best=3)
    monkeypatch.setenv("GHOST_OPS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "autotune", True)
    monkeypatch.setattr(tuning, "measure", found.measure)
    monkeypatch.setattr("ghost_ops.announce._said", set())
    tuning.forget()
    yield found
    tuning.forget()


def test_the_fastest_tile_is_taken_and_kept(launcher: Launcher, tmp_path: pathlib.Path) -> None:
    assert launcher.run() == launcher.best
    timed = launcher.timed
    assert timed == len(plan.candidates("primary", problem(), H100))
    assert launcher.run() == launcher.best
    assert launcher.timed == timed, "it is timed once"
    (file,) = tmp_path.iterdir()
    assert "H100" in file.name
    (entry,) = json.loads(file.read_text()).values()
    assert entry == {"tile": dataclasses.asdict(launcher.best), "milliseconds": 1.0}


def test_another_process_reads_it_from_the_file(launcher: Launcher) -> None:
    launcher.run()
    timed = launcher.timed
    tuning.forget()
    assert launcher.run() == launcher.best
    assert launcher.timed == timed


def test_another_shape_is_timed_anew_and_added(launcher: Launcher, tmp_path: pathlib.Path) -> None:
    launcher.run()
    timed = launcher.timed
    launcher.run(problem(n=128))
    assert launcher.timed > timed
    (file,) = tmp_path.iterdir()
    assert len(json.loads(file.read_text())) == 2


def test_a_slope_is_no_other_problem(launcher: Launcher) -> None:
    launcher.run()
    timed = launcher.timed
    launcher.run(dataclasses.replace(problem(), slope1=0.3))
    assert launcher.timed == timed


@pytest.mark.parametrize("text", ["{", "[]", '{"x": 1}', "\0"])
def test_a_broken_file_is_begun_anew(launcher: Launcher, tmp_path: pathlib.Path, text: str) -> None:
    launcher.run()
    (file,) = tmp_path.iterdir()
    file.write_text(text)
    tuning.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert launcher.run() == launcher.best
    assert launcher.best.pixels in [
        entry["tile"]["pixels"]
        for entry in json.loads(file.read_text()).values()
        if isinstance(entry, dict)
    ]


@pytest.mark.parametrize("tile", [None, {"pixels": 16}, {"pixels": "a", "channels": 1}])
def test_a_wrong_entry_is_replaced(
    launcher: Launcher, tmp_path: pathlib.Path, tile: object
) -> None:
    launcher.run()
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps({name: {"tile": tile} for name in json.loads(file.read_text())}))
    tuning.forget()
    assert launcher.run() == launcher.best


def test_a_folder_that_cannot_be_written_is_said_once(
    launcher: Launcher, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("GHOST_OPS_CACHE_DIR", str(blocker / "folder"))
    with pytest.warns(UserWarning, match="autotuning cache"):
        assert launcher.run() == launcher.best


def test_tiles_that_do_not_fit_are_passed_over(launcher: Launcher) -> None:
    launcher.too_large = plan.candidates("primary", problem(), H100)[:3]
    assert launcher.run() == launcher.best


@pytest.mark.parametrize("autotune", [True, False])
def test_the_error_is_raised_if_none_fits(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, autotune: bool
) -> None:
    errors = pytest.importorskip("triton.runtime.errors")
    monkeypatch.setattr(tuning, "autotune", autotune)
    launcher.too_large = plan.candidates("primary", problem(), H100)
    with pytest.raises(errors.OutOfResources):
        launcher.run()


def test_without_autotuning_the_first_that_fits_runs(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(tuning, "autotune", False)
    tiles = plan.candidates("primary", problem(), H100)
    assert launcher.run() == tiles[0]
    tuning.forget()
    launcher.too_large = tiles[:2]
    assert launcher.run() == tiles[2]
    assert launcher.run() == tiles[2]
    assert launcher.timed == 0
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_timed_while_a_graph_is_recorded(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_capturing", lambda: True)
    assert launcher.run() == plan.default_tile("primary", problem(), H100)
    assert launcher.timed == 0


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("GHOST_OPS_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert tuning.cache_file(H100).parent == pathlib.Path("/somewhere/ghost_ops")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning.cache_file(H100).parent == pathlib.Path("~/.cache/ghost_ops").expanduser()
