"The command line: what each command leaves, and one clear line for everything that can be wrong with what it is given"
import json, os, pickle, re, shutil, subprocess, sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]

PARAMETERS = '''profile: str = "smoke"  # size
data: str = ""          # where slices are
out: str = ""           # run folder
steps: int = 40         # optimiser steps
chs: list = [16, 32]    # channels
note: str = ""          # anything'''


def heads(n=40, subjects=8):
    "Drawn heads: (n,64,64) float32 in [0,1] and who they are"
    y, x = np.mgrid[-1:1:64j, -1:1:64j]; out = []
    for i in range(n):
        g = np.random.default_rng(i); r = np.hypot((x - .1 * g.normal()) / .75, (y - .05 * g.normal()) / .85)
        out.append(np.clip(1.2 - r, 0, 1) * (.6 + .4 * np.cos((7 + g.random()) * r + 3 * x)) * (r < 1) + .02 + .02 * g.random(x.shape))
    return np.clip(out, 0, 1).astype(np.float32), [f"TOY{i % subjects:02d}" for i in range(n)]


def notebook(path, cells):
    import nbformat
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    nb.cells = [nbformat.v4.new_code_cell(c, metadata={"tags": ["parameters"]} if i == 0 else {}) for i, c in enumerate(cells)]
    nbformat.write(nb, path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A checkout of its own: settings, split table, a trained and published toy network, files to try; MRI_GEN_ROOT points there"
    from mri_gen.cli import main
    from mri_gen.corrupt import tilted
    from mri_gen.datasets import SliceSet, save_slices
    d = tmp_path_factory.mktemp("cli"); home = d / "home"
    (home / "nbs").mkdir(parents=True); shutil.copy(ROOT / "settings.ini", home); (home / "data").mkdir(); shutil.copy(ROOT / "data/splits.csv", home / "data")
    old = {k: os.environ.get(k) for k in ("MRI_GEN_ROOT", "MRI_GEN_DATA")}
    os.environ["MRI_GEN_ROOT"] = str(home); os.environ.pop("MRI_GEN_DATA", None)
    x, who = heads(); split = ("train", "train", "train", "train", "dev", "val", "val", "val")
    save_slices(d / "slices", SliceSet(np.round(x[:, None] * 255).astype(np.uint8), [dict(subject=s, site="", slice=i, split=split[int(s[3:])], plane="sagittal", data="drawn") for i, s in enumerate(who)]))
    assert main(["train", "inpaint", "-p", "steps=5", "-p", "chs=[8,16]", "--data", d / "slices", "--out", d / "runs", "--name", "toy", "--device", "cpu"]) == 0
    assert main(["publish", "inpaint", d / "runs", "--data", d / "slices", "--device", "cpu"]) == 0
    known = tilted(64, 64); bad = (x * known)[:, None]
    np.save(d / "truth.npy", x[:, None]); np.save(d / "in.npy", bad); np.save(d / "mask.npy", known)
    yield d
    for k, v in old.items(): os.environ.pop(k, None) if v is None else os.environ.__setitem__(k, v)


@pytest.fixture
def call(place, capfd, tmp_path):
    "call(words...) -> (exit code, stdout, stderr)"
    from mri_gen.cli import main
    def go(*words):
        capfd.readouterr(); code = main([str(w) for w in words]); out, err = capfd.readouterr()      # of child processes too: a kernel must not chatter
        return code, out, err
    return go


@pytest.fixture
def wrong(call, tmp_path):
    "wrong(words..., says=...): exit code not 0, exactly one line on stderr that says so, and no output left"
    def go(*words, says, code=1):
        got, _, err = call(*words)
        assert (got, err.count("\n"), err.startswith("mri_gen: ")) == (code, 1, True), err
        assert "not foreseen" not in err, err
        for part in [says] if isinstance(says, str) else says: assert part in err, err
        assert not list(tmp_path.rglob("*.partial"))
        return err
    return go


# ---------------------------------------------------------------- the program itself

def test_help_is_complete():
    r = subprocess.run([sys.executable, "-m", "mri_gen.cli", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 0 and all(w in r.stdout for w in "demo simulate run train sweep publish evaluate predict generate report score doctor".split())


def test_heavy_imports_wait():   # what makes help quick
    r = subprocess.run([sys.executable, "-c", "import sys, mri_gen.cli; print([m for m in ('torch', 'numpy', 'matplotlib', 'papermill', 'pydantic') if m in sys.modules])"], capture_output=True, text=True, cwd=ROOT)
    assert r.stdout.strip() == "[]", r.stdout + r.stderr


def test_entry_point_prints_one_line(tmp_path):
    program = Path(sys.executable).with_name("mri_gen")
    words = [str(program)] if program.exists() else [sys.executable, "-m", "mri_gen.cli"]
    r = subprocess.run([*words, "predict", "inpaint", "no.npy", "--out", "x.npy"], capture_output=True, text=True, cwd=tmp_path)
    assert (r.returncode, r.stdout, r.stderr) == (1, "", "mri_gen: no.npy: no such file\n") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--debug", "predict", "inpaint", "no.npy", "--out", "x.npy"], ["predict", "inpaint", "no.npy", "--out", "x.npy", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(call, words):
    code, _, err = call(*words)
    assert code == 1 and "Traceback" in err and "no.npy: no such file" in err.splitlines()[-1]


def test_usage_errors(wrong):
    wrong("frobnicate", says="frobnicate", code=2)
    wrong("predict", "inpaint", "--out", "x.npy", says="Missing argument", code=2)
    wrong("simulate", "x", "--subjects", "many", says="--subjects", code=2)
    wrong("train", "inpaint", "--nonsense", says="--nonsense", code=2)


def test_ctrl_c(call, place, monkeypatch, tmp_path):
    from mri_gen import inpaint
    def stop(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(inpaint.Restorer, "predict", stop)
    assert call("predict", "inpaint", place / "in.npy", "--out", tmp_path / "o.npy", "--method", "linear")[0] == 130
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- predict

@pytest.mark.parametrize("method", ["unet", "ridge", "linear", "biharmonic", None])
def test_predict(call, place, tmp_path, method):
    from mri_gen.corrupt import tilted
    code, out, err = call("predict", "inpaint", place / "in.npy", "--out", tmp_path / "o.npy", "--device", "cpu", *(["--method", method] if method else []))
    x, y, m = np.load(place / "in.npy"), np.load(tmp_path / "o.npy"), tilted(64, 64)
    assert (code, err) == (0, "") and (y.shape, y.dtype) == (x.shape, np.float32) and (method or "unet") in out
    assert (y[:, :, m] == x[:, :, m]).all() and 0 <= y.min() and y.max() <= 1 and y[:, :, ~m].std() > 0


def test_predict_weights_by_run_file_and_name(call, place, tmp_path):
    files = []
    for i, w in enumerate([place / "runs/toy", place / "runs/toy/weights.safetensors", "unet"]):
        assert call("predict", "inpaint", place / "in.npy", "--out", tmp_path / f"{i}.npy", "--weights", w, "--device", "cpu")[0] == 0
        files.append(np.load(tmp_path / f"{i}.npy"))
    assert (files[0] == files[1]).all() and np.abs(files[1] - files[2]).max() < .01                  # the shipped ones are in half precision


def test_predict_shapes(call, place, tmp_path):
    g = np.random.default_rng(0)
    for i, (shape, mask) in enumerate([((2, 181, 217), (181, 217)), ((3, 1, 37, 50), (3, 37, 50)), ((4, 5, 3), (4, 5, 3))]):
        x, m = g.random(shape).astype(np.float32), g.random(mask) > .4; m[..., 0, 0] = True
        np.save(tmp_path / "x.npy", x); np.save(tmp_path / "m.npy", m.astype(np.uint8))
        assert call("predict", "inpaint", tmp_path / "x.npy", "--mask", tmp_path / "m.npy", "--out", tmp_path / "y.npy", "--force", "--device", "cpu")[0] == 0
        y = np.load(tmp_path / "y.npy"); mm = np.broadcast_to(m if m.ndim == 2 or x.ndim == 3 else m[:, None], shape)
        assert y.shape == shape and (y[mm] == x[mm]).all()


def test_predict_uint8_and_all_known(call, place, tmp_path):
    x = (np.load(place / "truth.npy") * 255).astype(np.uint8); np.save(tmp_path / "x.npy", x); np.save(tmp_path / "m.npy", np.ones((64, 64), bool))
    assert call("predict", "inpaint", tmp_path / "x.npy", "--mask", tmp_path / "m.npy", "--out", tmp_path / "y.npy")[0] == 0
    assert (np.load(tmp_path / "y.npy") == x.astype(np.float32) / 255).all()


ONE = np.random.default_rng(0).random((40, 16, 16)).astype(np.float32)
BAD = {"nan": (np.where(ONE > .99, np.nan, ONE), "NaN or Inf"), "inf": (np.where(ONE > .99, np.inf, ONE), "NaN or Inf"), "constant": (ONE * 0 + .5, "constant"), "black": (ONE * 0, "constant"),
       "empty": (ONE[:0], "empty"), "four channels": (np.stack([ONE] * 4, 1), "4 channels"), "complex": (ONE + 1j, "complex"), "above 1": (ONE * 255, "divide by 255"), "negative": (ONE - .5, "expected [0,1]"),
       "five axes": (ONE[None, None], "shape"), "one axis": (ONE[0, 0], "shape"), "int16": ((ONE * 1000).astype(np.int16), "int16"), "text": (np.array([["a"]]), "dtype"), "object": (np.array([[{}]], dtype=object), "pickle")}


@pytest.mark.parametrize("name", BAD)
def test_predict_bad_array(wrong, place, tmp_path, name):
    np.save(tmp_path / "x.npy", BAD[name][0], allow_pickle=True); np.save(tmp_path / "m.npy", ONE[0] > .5)
    wrong("predict", "inpaint", tmp_path / "x.npy", "--mask", tmp_path / "m.npy", "--out", tmp_path / "y.npy", "--method", "linear", says=["x.npy", BAD[name][1]])
    assert not (tmp_path / "y.npy").exists()


def test_predict_bad_files(wrong, place, tmp_path):
    class Evil:
        def __reduce__(self): return (os.mkdir, (str(tmp_path / "pwned"),))
    (tmp_path / "evil.npy").write_bytes(pickle.dumps(Evil())); (tmp_path / "text.npy").write_text("hello"); (tmp_path / "none.npy").write_bytes(b"")
    (tmp_path / "cut.npy").write_bytes((place / "in.npy").read_bytes()[:5000]); np.savez(tmp_path / "z.npz", a=ONE); (tmp_path / "folder.npy").mkdir()
    for f in ("evil.npy", "text.npy", "none.npy", "cut.npy", "z.npz", "folder.npy"): wrong("predict", "inpaint", tmp_path / f, "--out", tmp_path / "y.npy", "--method", "linear", says=f)
    wrong("predict", "inpaint", tmp_path / "absent.npy", "--out", tmp_path / "y.npy", says=["absent.npy", "no such file"])
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "y.npy").exists()


def test_predict_bad_masks(wrong, place, tmp_path):
    masks = {"shape": (np.ones((63, 64)), "does not fit"), "values": (np.full((64, 64), 2), "other values than 0 and 1"), "false": (np.zeros((64, 64), bool), "no pixel is known"), "nan": (np.full((64, 64), np.nan), "other values")}
    for name, (m, says) in masks.items():
        np.save(tmp_path / f"{name}.npy", m)
        wrong("predict", "inpaint", place / "in.npy", "--mask", tmp_path / f"{name}.npy", "--out", tmp_path / "y.npy", "--method", "linear", says=[f"{name}.npy", says])
    wrong("predict", "inpaint", place / "in.npy", "--mask", tmp_path / "absent.npy", "--out", tmp_path / "y.npy", "--method", "linear", says="absent.npy")


def test_predict_auto_mask_needs_enough_images_that_share_one(wrong, place, tmp_path):
    x = np.load(place / "in.npy"); np.save(tmp_path / "few.npy", x[:31]); np.save(tmp_path / "full.npy", np.load(place / "truth.npy"))
    g = np.random.default_rng(1); np.save(tmp_path / "mixed.npy", np.load(place / "truth.npy") * (g.random((40, 1, 64, 64)) > .5))
    for f in ("few.npy", "full.npy", "mixed.npy"): wrong("predict", "inpaint", tmp_path / f, "--out", tmp_path / "y.npy", "--method", "linear", says="--mask")


def test_predict_bad_options(wrong, place, tmp_path):
    a = ("predict", "inpaint", place / "in.npy", "--out", tmp_path / "y.npy")
    wrong(*a, "--method", "magic", says=["--method magic", "unet", "biharmonic"])
    wrong(*a, "--weights", "nowhere", says=["--weights nowhere", "unet, ridge"])
    wrong(*a, "--device", "cuda:77", says="CUDA devices"); wrong(*a, "--device", "toaster", says="toaster")
    wrong(*a[:-1], tmp_path / "y.png", says="name a .npy file")
    (tmp_path / "cut.safetensors").write_bytes((place / "runs/toy/weights.safetensors").read_bytes()[:999])
    wrong(*a, "--weights", tmp_path / "cut.safetensors", says=["cut.safetensors", "truncated"])
    from mri_gen.checkpoint import load_weights, save_weights
    nets, meta = load_weights(place / "runs/toy/weights.safetensors"); save_weights(tmp_path / "other.safetensors", nets, meta | {"config": meta["config"] | {"chs": [8, 24]}})
    wrong(*a, "--weights", tmp_path / "other.safetensors", says=["other.safetensors", "the weights do not fit"])


def test_no_gpu(wrong, place, tmp_path):
    import torch
    if torch.cuda.is_available(): pytest.skip("this machine has a GPU")
    wrong("predict", "inpaint", place / "in.npy", "--out", tmp_path / "y.npy", "--device", "cuda", says="--device cpu")
    wrong("train", "inpaint", "--data", place / "slices", "--out", tmp_path, "--device", "cuda", says="--device cpu")


def test_outputs_are_kept_without_force(wrong, call, place, tmp_path):
    (tmp_path / "y.npy").write_text("mine")
    wrong("predict", "inpaint", place / "in.npy", "--out", tmp_path / "y.npy", "--method", "linear", says="--force")
    wrong("evaluate", "inpaint", "--data", place / "slices", "--out", tmp_path / "y.npy", says="--force")
    assert (tmp_path / "y.npy").read_text() == "mine"
    np.save(tmp_path / "bad.npy", ONE * np.nan)                                           # a failing command with --force keeps the old file too
    wrong("predict", "inpaint", tmp_path / "bad.npy", "--out", tmp_path / "y.npy", "--method", "linear", "--force", says="NaN")
    assert (tmp_path / "y.npy").read_text() == "mine"
    assert call("predict", "inpaint", place / "in.npy", "--out", tmp_path / "y.npy", "--method", "linear", "--force")[0] == 0 and np.load(tmp_path / "y.npy").shape == (40, 1, 64, 64)
    (tmp_path / "cohort").mkdir(); wrong("simulate", tmp_path / "cohort", says="--force"); wrong("publish", "inpaint", place / "runs/toy", "--data", place / "slices", says="--force")


def test_read_only_folder(wrong, place, tmp_path):
    d = tmp_path / "closed"; d.mkdir(); d.chmod(0o500)
    try:
        if os.access(d, os.W_OK): pytest.skip("this user may write everywhere")
        wrong("predict", "inpaint", place / "in.npy", "--out", d / "y.npy", "--method", "linear", says="closed")
        wrong("train", "inpaint", "--data", place / "slices", "--out", d / "runs", says="--out")
    finally: d.chmod(0o700)


def test_full_disk(wrong, place, tmp_path):
    "Stands in for a full disk: files may not grow beyond 100 kB; the old output stays"
    import resource
    (tmp_path / "y.npy").write_text("mine"); soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try: wrong("predict", "inpaint", place / "in.npy", "--out", tmp_path / "y.npy", "--method", "linear", "--force", says="too large")
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "y.npy").read_text() == "mine"


def test_a_file_where_a_folder_should_be(wrong, place, tmp_path):
    (tmp_path / "f").write_text("x")
    wrong("predict", "inpaint", place / "in.npy", "--out", tmp_path / "f/y.npy", "--method", "linear", says="--out")


# ---------------------------------------------------------------- train, run

def test_train_is_done_once_and_resumes(call, place):
    code, out, _ = call("train", "inpaint", "-p", "steps=5", "-p", "chs=[8,16]", "--data", place / "slices", "--out", place / "runs", "--name", "toy", "--device", "cpu")
    assert code == 0 and "DONE step=5" in out and "loss" not in out


@pytest.fixture
def cohort(tmp_path):
    "(folder with four simulated-like heads, one of the two that are trained on truncated; who that is)"
    import nibabel as nib
    from mri_gen.datasets import split_subjects
    names = [f"SIM{i:03d}" for i in range(1, 5)]; g = np.indices((45, 58, 52)) * 4.
    for i, s in enumerate(names):
        r = sum(((a - c) / (q + i)) ** 2 for a, c, q in zip(g, (90, 112, 104), (68, 90, 84)))
        (tmp_path / "in" / s).mkdir(parents=True); nib.save(nib.Nifti1Image(((r < 1) * (600 + 200 * np.cos(g[1] / 9 + i)) + g[0] % 7).astype(np.float32), np.diag([4., 4, 4, 1])), tmp_path / "in" / s / "T1.nii.gz")
    lost = [s for s, v in split_subjects(names, [""] * 4).items() if v == "train"][0]
    f = tmp_path / "in" / lost / "T1.nii.gz"; f.write_bytes(f.read_bytes()[:2000])
    return tmp_path / "in", lost


def test_an_unreadable_volume_is_skipped_and_the_exit_code_says_so(call, place, cohort, tmp_path):
    folder, lost = cohort
    words = ("train", "inpaint", "-p", "steps=3", "-p", "chs=[8,16]", "-p", "sagittal=6", "-p", "axial=2", "--data", folder, "--out", tmp_path / "runs", "--name", "a", "--device", "cpu")
    for time in (1, 2):                                                                              # the run that lies there was trained without it, however often one asks
        code, out, err = call(*words)
        assert code == 3 and (tmp_path / "runs/a/DONE").exists() and "DONE step=3 skipped=1" in out, err
        assert err.count("\n") == 1 and err.startswith("mri_gen: done, but 1 file was skipped; the first: ") and f"{lost}/T1.nii.gz" in err
        rows = (tmp_path / "runs/a/skipped.csv").read_text().splitlines()
        assert rows[0] == "subject,file,reason" and len(rows) == 2 and rows[1].startswith(f"{lost},")
    shutil.rmtree(tmp_path / "runs"); assert call(*words)[0] == 3                                    # prepared slices remember what they lack
    code, out, err = call("evaluate", "inpaint", "--data", folder, "--split", "train", "--out", tmp_path / "m.json", "--device", "cpu")
    assert code == 3 and "| unet |" in out and (tmp_path / "m.json").exists() and err.count("\n") == 1 and lost in err
    assert call("evaluate", "inpaint", "--data", folder, "--weights", tmp_path / "runs/a", "--device", "cpu")[0] == 0   # only whom that run never saw: nobody of them is missing


def test_train_bad_input(wrong, place, tmp_path):
    a = ("train", "inpaint", "--data", place / "slices", "--out", tmp_path)
    wrong("train", "nonsense", says="'nonsense' is no task"); wrong(*a, "--profile", "huge", says=["huge", "smoke, demo, full"])
    wrong(*a, "-p", "stepz=3", says=["stepz", "known: ", "steps"]); wrong(*a, "-p", "steps=many", says="steps='many'"); wrong(*a, "-p", "steps=0", says="steps=0"); wrong(*a, "-p", "steps", says="NAME=VALUE")
    wrong("train", "inpaint", "--data", tmp_path / "absent", "--out", tmp_path, says=["absent", "no such"]); wrong("train", "inpaint", "--pattern", "{subject}.nii", says="--data")
    (tmp_path / "empty").mkdir(); wrong("train", "inpaint", "--data", tmp_path / "empty", "--out", tmp_path, says="empty")
    wrong("train", "inpaint", "-p", "steps=6", "-p", "chs=[8,16]", "--data", place / "slices", "--out", place / "runs", "--name", "toy", says="differs: steps")


def test_a_subject_in_two_splits(wrong, place, tmp_path):
    shutil.copytree(place / "slices", tmp_path / "leak"); t = (tmp_path / "leak/slices.csv").read_text().splitlines()
    t[-1] = re.sub(r"TOY\d\d", "TOY00", t[-1]); (tmp_path / "leak/slices.csv").write_text("\n".join(t) + "\n")
    wrong("train", "inpaint", "--data", tmp_path / "leak", "--out", tmp_path, says=["TOY00", "more than one split"])


def test_run(call, wrong, place, tmp_path):
    "papermill with the profile's values and ours, in the run's folder; misspelt names, failing cells"
    nb = place / "home/nbs/51_inpaint.ipynb"
    notebook(nb, [PARAMETERS, "import os, json, pathlib; pathlib.Path(out, 'got.json').write_text(json.dumps(dict(profile=profile, steps=steps, chs=chs, note=note, data=data, cwd=os.getcwd())))", "print('said by a cell')\nif note == 'fail': raise ValueError('on purpose')"])
    wrong("run", "nonsense", says="no task"); wrong("run", "inpaint", "-p", "stepz=1", "--out", tmp_path, says=["stepz", "known: steps, chs, note"]); wrong("run", "inpaint", "-p", "steps=x", "--out", tmp_path, says="steps='x'")
    wrong("run", "inpaint", "-p", "out=x", "--out", tmp_path, says="--out"); wrong("run", "inpaint", "--profile", "tiny", says="tiny"); wrong("run", "inpaint", "--data", tmp_path / "absent", "--out", tmp_path, says="absent")
    code, out, err = call("run", "inpaint", "--profile", "demo", "-p", "note=hi", "-p", "chs=[4,8]", "--data", place / "slices", "--out", tmp_path, "--name", "one")
    assert code == 0 and "said by a cell" in out, err
    got = json.loads((tmp_path / "one/got.json").read_text())
    assert got == dict(profile="demo", steps=150, chs=[4, 8], note="hi", data=str(place / "slices"), cwd=str(tmp_path / "one")) and (tmp_path / "one/inpaint.ipynb").exists()
    notebook(tmp_path / "nb.ipynb", [PARAMETERS, "from mri_gen.core import write_skipped; write_skipped(out, [dict(subject='S3', file='S3/T1.nii.gz', reason='S3/T1.nii.gz: truncated')])"]); good = nb.read_bytes(); nb.write_bytes((tmp_path / "nb.ipynb").read_bytes())
    code, out, err = call("run", "inpaint", "--data", place / "slices", "--out", tmp_path, "--name", "three")
    assert code == 3 and "done: " in out and err.startswith("mri_gen: done, but 1 file was skipped; the first: S3/T1.nii.gz: truncated") and err.count("\n") == 1; nb.write_bytes(good)
    err = wrong("run", "inpaint", "-p", "note=fail", "--out", tmp_path, "--name", "two", says=["51_inpaint.ipynb: cell [4]", "ValueError: on purpose"])
    assert not (tmp_path / "two/inpaint.ipynb").exists() and "two/inpaint.unfinished.ipynb" in err
    nb.unlink(); wrong("run", "inpaint", "--out", tmp_path, says="no experiment notebook")


# ---------------------------------------------------------------- publish, evaluate, report, doctor

def test_published(place):
    a = place / "home/artifacts/inpaint"
    assert list(json.loads((a / "weights.json").read_text())) == ["unet", "ridge"]
    for f in ("unet.safetensors", "ridge.safetensors", "metrics.json", "comparisons.json", "rows.csv.gz", "training.csv", "training.png", "config.json", "env.json", "model_card.md"): assert (a / f).stat().st_size > 0, f
    assert len(list((a / "figures").glob("*.png"))) >= 3
    from safetensors.numpy import load_file
    assert {v.dtype for v in load_file(a / "unet.safetensors").values()} == {np.dtype(np.float16)}
    card = (a / "model_card.md").read_text()
    for part in ("Not for clinical use", "CC BY-SA 3.0", "3 subjects, 15 slices", "| steps | 5 |", "Limits", "ridge"): assert part in card, part
    assert set(json.loads((a / "metrics.json").read_text())[0]) == set("task method data split cell region convention metric mean lo hi n_subjects n_images".split())


def test_publish_bad_input(wrong, place, tmp_path):
    wrong("publish", "inpaint", tmp_path / "absent", says="no such run folder"); wrong("publish", "nonsense", place / "runs/toy", says="no task")
    (tmp_path / "r").mkdir(); wrong("publish", "inpaint", tmp_path / "r", says="no run")
    shutil.copytree(place / "runs/toy", tmp_path / "half"); (tmp_path / "half/weights.safetensors").unlink(); wrong("publish", "inpaint", tmp_path / "half", says="let it finish")


def test_evaluate(call, wrong, place, tmp_path):
    code, out, err = call("evaluate", "inpaint", "--data", place / "slices", "--out", tmp_path / "m.json", "--device", "cpu")
    assert (code, err) == (0, "") and "| unet |" in out and "region: hole" in out and "3 subjects" in out
    shipped, mine = (json.loads(p.read_text()) for p in (place / "home/artifacts/inpaint/metrics.json", tmp_path / "m.json"))
    key = lambda r: tuple(r[k] for k in ("method", "region", "convention", "metric"))
    assert {key(r): r["mean"] for r in shipped} == {key(r): r["mean"] for r in mine}         # the published numbers are those of the published file
    wrong("evaluate", "inpaint", "--data", place / "slices", "--split", "all", says="use val, dev or train"); wrong("evaluate", "inpaint", "--data", tmp_path / "absent", says="absent")
    wrong("evaluate", "nonsense", says="no task"); (tmp_path / "e").mkdir(); wrong("evaluate", "inpaint", "--data", tmp_path / "e", says="e")


def test_report(call, wrong, place, tmp_path):
    code, out, err = call("report", place / "runs/toy", "--out", tmp_path / "page")
    text = (tmp_path / "page/report.html").read_text()
    assert (code, err) == (0, "") and re.findall(r'(?:src|href)="(?!data:|#)[^"]*"|url\(|@import|https?://', text) == []
    for part in ("worst subjects", "unet", "How each number was measured", "not for clinical use", "data:image/png;base64,", "run inpaint toy"): assert part in text, part
    wrong("report", "--out", tmp_path / "page", says="--force"); wrong("report", tmp_path / "absent", "--out", tmp_path / "q", says="absent")
    assert call("report", "--out", tmp_path / "page", "--force")[0] == 0


def test_doctor(call, wrong, place, monkeypatch):
    code, out, err = call("doctor")
    assert (code, err) == (0, "") and all(w in out for w in ("torch", "device", "inpaint/unet", "free space", "all is well"))
    monkeypatch.setenv("MRI_GEN_DATA", str(place)); code, out, _ = call("doctor")
    assert "slices" in out and "arrays" in out
    w = place / "home/artifacts/inpaint/ridge.safetensors"; raw = w.read_bytes(); w.write_bytes(raw[:100])
    try: wrong("doctor", says=["ridge.safetensors", "truncated"])
    finally: w.write_bytes(raw)


def test_without_shipped_weights(wrong, place, tmp_path, monkeypatch):
    (tmp_path / "nbs").mkdir(); monkeypatch.setenv("MRI_GEN_ROOT", str(tmp_path))
    wrong("predict", "inpaint", place / "in.npy", "--out", tmp_path / "y.npy", says=["no weights are shipped", "mri_gen train inpaint"])
    monkeypatch.setenv("MRI_GEN_ROOT", str(tmp_path / "absent")); wrong("predict", "inpaint", place / "in.npy", "--out", tmp_path / "y.npy", says="MRI_GEN_ROOT")


# ---------------------------------------------------------------- score

def test_score_arrays(call, place, tmp_path):
    x, who = heads(); np.save(tmp_path / "p.npy", np.clip(x + .05 * np.random.default_rng(0).normal(size=x.shape), 0, 1)); (tmp_path / "s.csv").write_text("subject\n" + "\n".join(who) + "\n")
    code, out, err = call("score", tmp_path / "p.npy", place / "truth.npy", "--subjects", tmp_path / "s.csv", "--mask", place / "mask.npy", "--data", "drawn", "--method", "noise")
    assert (code, err) == (0, "") and "n = 8 subjects, 40 images" in out and "region: hole" in out and "noise" in out
    code, out, err = call("score", tmp_path / "p.npy", place / "truth.npy", "--format", "json")
    psnr = next(r for r in json.loads(out) if r["metric"] == "psnr" and r["region"] == "whole")
    from skimage.metrics import peak_signal_noise_ratio
    y = np.load(tmp_path / "p.npy"); assert abs(psnr["mean"] - np.mean([peak_signal_noise_ratio(a, b, data_range=1) for a, b in zip(x, y)])) < 1e-4 and "own subject" in err
    code, out, _ = call("score", tmp_path / "p.npy", place / "truth.npy", "--format", "latex"); assert code == 0 and r"\toprule" in out and "own subject" in out
    np.save(tmp_path / "c.npy", np.stack([x, x, x], 1)); code, out, _ = call("score", tmp_path / "c.npy", tmp_path / "c.npy"); assert code == 0 and "channel 2" in out


def test_score_pictures_and_volumes(call, wrong, tmp_path):
    from PIL import Image
    import nibabel as nib
    x, _ = heads(3)
    for f in ("a", "b"):
        (tmp_path / f).mkdir()
        for i in range(3): Image.fromarray((x[i] * (200 if f == "a" else 255)).astype(np.uint8)).save(tmp_path / f / f"{i}.png")
    code, out, _ = call("score", tmp_path / "a", tmp_path / "b"); assert code == 0 and "3 images" in out
    Image.fromarray((np.random.default_rng(0).random((64, 64, 3)) * 255).astype(np.uint8)).save(tmp_path / "a/0.png"); wrong("score", tmp_path / "a", tmp_path / "b", says="differing")
    (tmp_path / "a/0.png").unlink(); wrong("score", tmp_path / "a", tmp_path / "b", says="0.png: only in")
    v = np.random.default_rng(0).random((12, 14, 16)).astype(np.float32) * 700
    for name, shift in (("t", 0), ("far", 30)): nib.save(nib.Nifti1Image(v, np.array([[2., 0, 0, shift], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])), tmp_path / f"{name}.nii.gz")
    code, out, _ = call("score", tmp_path / "t.nii.gz", tmp_path / "t.nii.gz"); assert code == 0 and "percentile" in out
    wrong("score", tmp_path / "far.nii.gz", tmp_path / "t.nii.gz", says="another grid")
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "t.nii.gz").read_bytes()[:500]); wrong("score", tmp_path / "cut.nii.gz", tmp_path / "t.nii.gz", says="cut.nii.gz")


def test_score_bad_input(wrong, place, tmp_path):
    t = place / "truth.npy"; np.save(tmp_path / "short.npy", np.load(t)[:9]); np.save(tmp_path / "nan.npy", np.load(t) * np.nan); np.save(tmp_path / "big.npy", np.load(t) * 255); np.save(tmp_path / "one.npy", np.ones((64, 64)))
    (tmp_path / "s.csv").write_text("who\na\n"); (tmp_path / "few.csv").write_text("subject\na\n"); (tmp_path / "empty").mkdir(); (tmp_path / "x.txt").write_text("x")
    for f, says in (("short.npy", "same order"), ("nan.npy", "NaN"), ("big.npy", "divide by 255"), ("absent.npy", "no such"), ("empty", "empty folder"), ("x.txt", "not one of")): wrong("score", tmp_path / f, t, says=[f, says])
    wrong("score", t, tmp_path / "nan.npy", says="NaN"); wrong("score", t, t, "--format", "word", says="md, latex or json"); wrong("score", t, t, "--subjects", tmp_path / "s.csv", says="column `subject`")
    wrong("score", t, t, "--subjects", tmp_path / "few.csv", says="1 rows for 40 images"); wrong("score", t, t, "--mask", tmp_path / "one.npy", says="no pixel is missing"); wrong("score", tmp_path / "empty", place / "slices", says="empty folder")


# ---------------------------------------------------------------- generate

@pytest.fixture(scope="module")
def drawer(place, tmp_path_factory):
    "A generator trained for four steps"
    from mri_gen.cli import main
    out = tmp_path_factory.mktemp("drawer")
    small = [w for p in ("steps=4", "batch_size=4", "chs=[8,16]", "emb_dim=16", "val_every=4", "precision=fp32") for w in ("-p", p)]
    assert main(["train", "generate", *small, "--data", place / "slices", "--out", out, "--name", "toy", "--device", "cpu"]) == 0
    return out / "toy"


def test_generate(call, drawer, tmp_path):
    a = ["--num-samples", 5, "--num-inference-steps", 3, "--weights", drawer, "--device", "cpu"]
    code, out, err = call("generate", *a, "--batch-size", 2, "--out", tmp_path / "a")
    assert (code, err) == (0, "") and "images=5/5" in out
    x = np.load(tmp_path / "a/images.npz")["images"]
    assert x.shape == (5, 1, 64, 64) and x.dtype == np.float32 and 0 <= x.min() and x.max() <= 1
    assert sorted(p.name for p in (tmp_path / "a/png").iterdir()) == [f"{i:05d}.png" for i in range(5)]
    assert call("generate", *a, "--batch-size", 5, "--out", tmp_path / "b")[0] == 0
    assert np.abs(np.load(tmp_path / "b/images.npz")["images"] - x).max() <= 1 / 255, "the batch size changes the images"
    code, out, err = call("generate", *a, "--temperature", .7, "--out", tmp_path / "c")
    assert code == 0 and "no effect on ddim at eta 0" in err
    assert np.abs(np.load(tmp_path / "c/images.npz")["images"] - x).max() <= 1 / 255


def test_generate_wrongly(wrong, drawer, tmp_path):
    a = ["generate", "--num-samples", 2, "--num-inference-steps", 2, "--weights", drawer, "--device", "cpu", "--out", tmp_path / "x"]
    wrong(*a, "--scheduler", "euler", says=["euler", "ddim, ddpm, dpm"]); wrong(*a, "--num-inference-steps", 0, says="at least 1"); wrong(*a, "--num-inference-steps", 5000, says="1 to 1000")
    wrong(*a, "--eta", 1, "--scheduler", "ddpm", says="only ddim"); wrong(*a, "--temperature", -1, says="0 to 2")
    (tmp_path / "mine").mkdir(); wrong(*a[:-1], tmp_path / "mine", says="--force"); wrong(*a[:-1], tmp_path / "mine", "--force", says="no folder of generated images")
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------- simulate, demo

def test_simulate(call, wrong, tmp_path):
    code, out, err = call("simulate", tmp_path / "c", "--subjects", 1, "--spacing", 8)
    assert code == 0 and {p.name for p in (tmp_path / "c/SIM001").iterdir()} == {"T1.nii.gz", "T2.nii.gz", "PD.nii.gz"} and (tmp_path / "c/manifest.csv").exists()
    wrong("simulate", tmp_path / "d", "--subjects", 0, says="subjects=0"); wrong("simulate", tmp_path / "d", "--spacing", 99, says="spacing=99"); assert not (tmp_path / "d").exists()


def test_demo_leaves_a_strange_folder_alone(wrong, tmp_path):
    (tmp_path / "mine").mkdir(); (tmp_path / "mine/thesis.txt").write_text("x")
    wrong("demo", "--out", tmp_path / "mine", says="no demo folder")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.slow
@pytest.mark.timeout(2400)   # five minutes on two free cores, more than 900 s on busy ones
def test_demo_twice(call, place, tmp_path, monkeypatch):
    "The whole tour, smaller; a second call refreshes it and simulates and trains nothing"
    from mri_gen import demo, generate, inpaint, sr3d, vqvae
    monkeypatch.setattr(demo, "DEMO", dict(seed=2026, train=3, test=1, spacing=4.0, raw=3, raw_spacing=4.0)); monkeypatch.setitem(demo.LESS, "steps", 5); monkeypatch.setitem(demo.CODES, "steps", 30)
    for task in (inpaint, generate, sr3d): monkeypatch.setitem(task.Config.PROFILES["demo"], "steps", 5)
    monkeypatch.setitem(vqvae.Config.PROFILES["prior_smoke"], "steps", 5)
    for time in (1, 2):
        code, out, err = call("demo", "--out", tmp_path / "demo", "--device", "cpu")
        assert (code, err) == (0, ""), err
        assert "known pixels identical: yes" in out and "the shipped weights" in out and ("there already" in out) == (time == 2) and ("step=5/5" in out) == (time == 1)
    x, y, m = (np.load(tmp_path / f"demo/{n}.npy") for n in ("test_set", "test_set_nogaps", "test_set_mask"))
    assert x.shape == y.shape == (9, 1, 64, 64) and (y[:, :, m] == x[:, :, m]).all()
    text = (tmp_path / "demo/report.html").read_text()
    assert "Trained for seconds" in text and "unet_demo" in text and "simulated_test" in text and "imputation, from raw simulated volumes" in text and "vqvae_demo" in text
    import nibabel as nib
    made, given = nib.load(tmp_path / "demo/completed/T1.nii.gz"), [nib.load(p) for p in tmp_path.glob("demo/prepared/n4/*/T2.nii.gz")]
    assert any(made.shape == g.shape and np.allclose(made.affine, g.affine) for g in given) and 0 <= made.get_fdata().min() < made.get_fdata().max() <= 1 and (tmp_path / "demo/prepared/qc.html").exists()
    with np.load(tmp_path / "demo/codes.npz") as z: assert sorted(z.files) == ["codebook", "codes", "size"] and z["codes"].shape == (12, 84, 28) and z["size"].tolist() == [224, 224]
    small, large = (nib.load(tmp_path / f"demo/{n}.nii.gz") for n in ("small", "large")); assert large.shape == tuple(2 * k for k in small.shape)
    assert np.load(tmp_path / "demo/drawn.npy").shape == (3, 224, 224) and (tmp_path / "demo/codes/figures/drawn.png").exists()
