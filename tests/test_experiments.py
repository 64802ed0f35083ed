"""The smoke run of each experiment notebook, by papermill, from another folder and without real data, against the numbers it gave before.

`make reference` (pytest tests/test_experiments.py --renew) writes tests/reference/<slug>_smoke.json anew. Do that on purpose, after a change that is meant to move a result, and say why in the commit message.
"""
import ast, json, os, re, shutil, subprocess, sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted(p for p in (ROOT / "nbs").glob("5[0-9]_*.ipynb") if p.stem != "59_speed")   # that one trains no task and has no reference numbers: tests/test_bench.py runs it
every_experiment = pytest.mark.parametrize("nb", EXPERIMENTS, ids=lambda p: p.stem)
OWN = {"profile": "smoke", "data": "", "out": ""}   # parameters that are no field of the config
ALSO = {"51_inpaint": {"study", "study_steps", "study_generated"}, "52_mmgan": {"study", "study_steps"}, "53_vqvae": {"prior_steps", "samples"}, "55_sr3d": {"draw_steps"}}   # ... of one notebook

# One thread, fp32, no GPU: on one machine the numbers repeat exactly (also with two threads). On another CPU the last bits differ, which has two ways to grow.
# A simulated slice is rounded to 8 bits, so a few pixels may fall on the other side: some 0.001 dB for methods that learn nothing or solve in closed form.
# Training carries rounding errors from step to step. How far is bounded by bf16, whose rounding is 65,000 times coarser: it moved the trained network by 0.025 dB, 0.001 in SSIM, 0.003 in gradient ratio.
# The tolerances are five times that. What they must notice costs more: another seed 0.1 to 0.4 dB, a loss that does not fit or no training at all 2 dB.
FIXED = {"psnr": .02, "ssim": .001, "gradient_ratio": .005, "frechet_distance": .02}
TRAINED = {"psnr": .15, "ssim": .005, "gradient_ratio": .02, "frechet_distance": .5}
METHODS_WITHOUT_TRAINING = {"identity", "histogram", "places", "zero", "mean", "lookup", "linear", "griddata", "harmonic", "tv", "biharmonic", "ridge", "real", "blurred real", "block_mean", "kmeans", "kmeans_linear", "nearest", "cubic", "back_projection"}


def slug(nb): return nb.stem[3:]
def config(nb): return import_module(f"mri_gen.{slug(nb)}").Config


def parameters(nb):
    "name -> value of the cell tagged `parameters`"
    cell = next(c for c in json.loads(nb.read_text(encoding="utf-8"))["cells"] if "parameters" in c["metadata"].get("tags", []))
    return {n.target.id: ast.literal_eval(n.value) for n in ast.parse("".join(cell["source"])).body}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    "An empty folder to start from, and a root with nothing but the split table and the feature network that distances need: no slices cut by an earlier version, no other weights"
    base = tmp_path_factory.mktemp("elsewhere")
    (base / "here").mkdir()
    shutil.copytree(ROOT / "data", base / "root/data", ignore=lambda folder, names: [n for n in names if not n.endswith(".csv")])
    shutil.copytree(ROOT / "artifacts/features", base / "root/artifacts/features")
    return base


def papermill(nb, base, out, **params):
    "Run a notebook as a stranger would, without MRI_GEN_DATA; the executed notebook lands beside `out`"
    env = {k: v for k, v in os.environ.items() if k not in ("MRI_GEN_DATA", "PYTHONPATH")}
    env |= {"MRI_GEN_ROOT": str(base / "root"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"}
    words = [w for k, v in {"out": out, "precision": "fp32", **params}.items() for w in ("-p", k, str(v))]
    return subprocess.run([sys.executable, "-m", "papermill", str(nb), f"{out}.ipynb", "-k", "python3", "--no-progress-bar", *words], cwd=base / "here", env=env, capture_output=True, text=True, timeout=600)


def records(out): return json.loads((out / "metrics.json").read_text())


def complete(run, out):
    "The run ended well and left what a run folder holds"
    assert run.returncode == 0, run.stderr[-4000:]
    assert {"DONE", "config.json", "env.json", "metrics.csv", "metrics.json", "weights.safetensors"} <= {p.name for p in out.iterdir()}
    assert not [o for c in json.loads(Path(f"{out}.ipynb").read_text())["cells"] for o in c.get("outputs", []) if o["output_type"] == "error"]


@every_experiment
def test_parameters_are_the_smoke_profile(nb):
    "The notebook as it stands is the smoke run; what a profile can change has a name that papermill can reach"
    cfg, values = config(nb), parameters(nb)
    assert {k: values.pop(k, None) for k in OWN} == OWN
    assert ALSO.get(nb.stem, set()) <= set(values); values = {k: v for k, v in values.items() if k not in ALSO.get(nb.stem, ())}
    assert sorted(set(values) - set(cfg.model_fields)) == [], f"no fields of mri_gen.{slug(nb)}.Config"
    smoke = cfg.profile("smoke").model_dump(mode="json")
    assert values == {k: smoke[k] for k in values}, "other values than Config.PROFILES['smoke']"
    assert sorted({k for p in cfg.PROFILES.values() for k in p} - set(values)) == [], "set by a profile, but no parameter of the notebook"


@every_experiment
@pytest.mark.slow
def test_a_misspelt_parameter_stops_the_run(nb, elsewhere):
    "papermill itself only warns, and runs with the defaults"
    out = elsewhere / f"{slug(nb)}-misspelt"
    run = papermill(nb, elsewhere, out, stepz=3)
    assert run.returncode and re.search(r"UserError: parameters: stepz=3: .*known: .*\bsteps\b", run.stderr), run.stderr[-3000:]
    assert not out.exists()


@pytest.mark.slow
@every_experiment
def test_smoke_run(nb, elsewhere, reference):
    "From another folder, without real data; the same numbers as before"
    before, out = nb.read_bytes(), elsewhere / slug(nb)
    complete(papermill(nb, elsewhere, out), out)
    assert nb.read_bytes() == before and [p.name for p in (elsewhere / "here").iterdir()] == [], "a run writes into its run folder only"
    got = [r for r in records(out) if r["metric"] in TRAINED and not r["convention"].startswith("gauss11") and r["region"] in ("hole", "whole")]
    assert {(r["task"], r["data"]) for r in got} == {(slug(nb), "simulated")}
    name = lambda r: "/".join(r[k] for k in ("split", "cell", "region", "metric", "method"))
    tolerance = {name(r): (FIXED if r["method"] in METHODS_WITHOUT_TRAINING else TRAINED)[r["metric"]] for r in got}
    reference(f"{slug(nb)}_smoke", {name(r): r["mean"] for r in got} | {"n_images": got[0]["n_images"]}, tolerance | {"n_images": 0})


@pytest.mark.slow
def test_inpaint_on_real_data(elsewhere, mri_data):
    "Four people of the IXI volumes (one to learn from, one for the curve, two held out), handed over as the parameter `data`"
    from mri_gen.datasets import find_volumes, split_of
    if not (mri_data / "ixi_hh_t1_2mm").is_dir(): pytest.skip("ixi_hh_t1_2mm needed (data/README.md)")
    by = {}
    for r in find_volumes(mri_data / "ixi_hh_t1_2mm", modalities=["T1"]): by.setdefault(split_of(r["subject"], "ixi_hh_t1_2mm"), []).append(r["path"])
    few = elsewhere / "data/ixi_hh_t1_2mm"
    few.mkdir(parents=True)
    for p in by["train"][:1] + by["dev"][:1] + by["val"][:2]: (few / p.name).symlink_to(p.resolve())
    out = elsewhere / "real"
    complete(papermill(ROOT / "nbs/51_inpaint.ipynb", elsewhere, out, data=few.parent, simulated=0), out)
    psnr = {r["method"]: r["mean"] for r in records(out) if (r["metric"], r["region"]) == ("psnr", "hole")}
    assert {(r["data"], r["split"], r["cell"], r["n_subjects"]) for r in records(out)} == {("ixi_hh_t1_2mm", "val", "sagittal", 2)}
    assert psnr["linear"] < psnr["biharmonic"] < 25 and 18 < psnr["linear"], psnr
