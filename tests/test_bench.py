"The benchmark runs, from the command line and as a notebook, and leaves what it promises. No time is asserted: a busy machine is no defect"
import json, os, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NB = ROOT / "nbs/59_speed.ipynb"


@pytest.fixture
def go(tmp_path):
    "go(words...): run from an empty folder, one thread, no data, no shipped measurement"
    (tmp_path / "here").mkdir(); (tmp_path / "root").mkdir()
    env = {k: v for k, v in os.environ.items() if k not in ("MRI_GEN_DATA", "PYTHONPATH")} | {"MRI_GEN_ROOT": str(tmp_path / "root"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return lambda *words: subprocess.run([sys.executable, "-m", *map(str, words)], cwd=tmp_path / "here", env=env, capture_output=True, text=True, timeout=300)


def whole(path):
    "The result has every row of the smoke profile, and figures that can be times"
    from mri_gen.bench import RATIOS, ROWS, load_result
    r = load_result(path)
    assert {x["row"] for x in r["rows"]} | set(r["skipped"]) == set(ROWS) and set(r["skipped"]) == {"ours, compiled", "plain, workers"}
    assert {x["name"] for x in r["ratios"]} == {n for n, (a, b, _) in RATIOS.items() if not {a, b} & set(r["skipped"])}
    assert all(x["seconds"]["median"] > 0 for x in r["rows"]) and r["machine"]["threads"] == 1 and r["data"] == "noise"
    return r


def papermill(go, out, *words): return go("papermill", NB, out, "-k", "python3", "--no-progress-bar", "--cwd", ".", *words)


@pytest.mark.slow
def test_command(go, tmp_path):
    out = tmp_path / "bench.json"
    run = go("mri_gen.cli", "bench", "--profile", "smoke", "--device", "cpu", "--out", out)
    assert run.returncode == 0, run.stderr
    assert "plain / ours" in run.stdout and "switched off" in run.stdout
    whole(out)
    again = go("mri_gen.cli", "bench", "--profile", "smoke", "--out", out)
    assert (again.returncode, again.stderr.count("\n")) == (1, 1) and "--force" in again.stderr
    shown = papermill(go, tmp_path / "shown.ipynb", "-p", "result", out)              # the notebook shows that file
    assert shown.returncode == 0, shown.stderr[-3000:]
    assert "result of bench.json" in (tmp_path / "shown.ipynb").read_text() and sorted(p.name for p in (tmp_path / "here").iterdir()) == []


@pytest.mark.slow
def test_topics(go, tmp_path):
    "Where no weights are shipped, the rows of networks are named as not measured"
    out = tmp_path / "restore.json"
    run = go("mri_gen.cli", "bench", "--topic", "restore", "--profile", "smoke", "--device", "cpu", "--out", out)
    assert run.returncode == 0 and "biharmonic, one by one / all at once" in run.stdout and "unet: not measured" in run.stdout, run.stderr
    r = json.loads(out.read_text())
    assert {"biharmonic", "biharmonic, one by one"} <= {x["row"] for x in r["rows"]} and {"unet", "ridge"} <= set(r["skipped"]) and r["unit"] == "images"
    run = go("mri_gen.cli", "bench", "--topic", "impute", "--profile", "smoke", "--device", "cpu", "--out", out, "--force")
    assert run.returncode == 0 and "original, 29 M parameters" in run.stdout and "ours: not measured" in run.stdout and "boosted trees: not measured" in run.stdout, run.stderr
    run = go("mri_gen.cli", "bench", "--topic", "cooking")
    assert (run.returncode, run.stderr.count("\n")) == (1, 1) and "train, restore, generate, impute, impute-step" in run.stderr


@pytest.mark.slow
def test_notebook_measures_at_smoke_scale(go, tmp_path):
    before = NB.read_bytes()
    run = papermill(go, tmp_path / "run.ipynb", "-p", "out", tmp_path / "new.json")
    assert run.returncode == 0, run.stderr[-3000:]
    whole(tmp_path / "new.json")
    cells = json.loads((tmp_path / "run.ipynb").read_text())["cells"]
    assert any("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", []))
    assert NB.read_bytes() == before


@pytest.mark.slow
def test_notebook_refuses_a_misspelt_parameter(go, tmp_path):
    run = papermill(go, tmp_path / "run.ipynb", "-p", "roundz", "3")
    assert run.returncode and "roundz=3" in run.stderr and "known: chs" in run.stderr, run.stderr[-2000:]
