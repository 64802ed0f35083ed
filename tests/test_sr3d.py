"Super-resolution through the command line: train both networks, predict in any orientation and odd sizes, evaluate, and what must fail in one line"
import json

import nibabel as nib
import numpy as np
import pytest

from mri_gen.cli import main

FIELDS = ("steps=4", "chs=[8,8]", "emb_dim=8", "side=16", "many=8", "batch_size=2", "crop=24", "log_every=2", "val_every=4", "save_every=2")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Five small heads, a regression trained on them, and a diffusion on top of it"
    d = tmp_path_factory.mktemp("sr3d"); z = np.stack(np.mgrid[-1:1:40j, -1:1:44j, -1:1:36j])
    for k in range(5):
        g = np.random.default_rng(k); r = np.sqrt((z**2).sum(0)); x = np.where(r < .9, 600 + 200 * np.cos(9 * r + k) + g.normal(0, 20, r.shape), 10 + 5 * g.random(r.shape))
        (d / f"heads/P{k}").mkdir(parents=True); nib.save(nib.Nifti1Image(x.astype(np.float32), np.diag([2., 2, 2, 1])), d / f"heads/P{k}/T1.nii.gz")
    for name, more in (("regression", ()), ("diffusion", ("method=diffusion", f"base={d / 'runs/regression'}"))):
        assert main(["train", "sr3d", *(w for f in (*FIELDS, *more) for w in ("-p", f)), "--data", d / "heads", "--out", d / "runs", "--name", name, "--device", "cpu"]) == 0
    x = nib.load(d / "heads/P0/T1.nii.gz").get_fdata()[:38, :42, :34].reshape(19, 2, 21, 2, 17, 2).mean((1, 3, 5)).astype(np.float32)
    turn = np.array([[0, -4., 0, 30], [0, 0, 4., -20], [4., 0, 0, 5], [0, 0, 0, 1]])                                    # not RAS, odd sizes
    nib.save(nib.Nifti1Image(x, turn), d / "low.nii.gz")
    return d


def call(capsys, *words):
    "(exit code, stdout, stderr)"
    capsys.readouterr(); code = main(words); out, err = capsys.readouterr()
    return code, out, err


def words(place, out, *more, run="diffusion"): return ("predict", "sr3d", place / "low.nii.gz", "--out", out, "--weights", place / "runs" / run, "--device", "cpu", *more)


@pytest.mark.parametrize("method", ["diffusion", "regression", "cubic"])
def test_a_volume(place, tmp_path, capsys, method):
    "Twice the voxels, the same field of view and units, and block means that are the input"
    code, out, err = call(capsys, *words(place, tmp_path / "high.nii.gz", "--method", method)); assert code == 0, err
    low, high = nib.load(place / "low.nii.gz"), nib.load(tmp_path / "high.nii.gz"); assert high.shape == tuple(2 * n for n in low.shape) and nib.aff2axcodes(low.affine) == nib.aff2axcodes(high.affine)
    for corner in ((0, 0, 0), (1, 1, 1), (0, 1, 0), (1, 0, 1)):
        at = lambda im: (im.affine @ [*(np.array(im.shape) * corner - .5), 1])[:3]
        assert np.abs(at(low) - at(high)).max() < 1e-3
    assert np.allclose(np.linalg.norm(high.affine[:3, :3], axis=0), 2, atol=1e-3)
    if method != "cubic": s = low.shape; back = high.get_fdata().reshape(s[0], 2, s[1], 2, s[2], 2).mean((1, 3, 5)); assert np.abs(back - low.get_fdata()).max() < 1e-3 * np.ptp(low.get_fdata())


def test_samples_and_factor_4(place, tmp_path, capsys):
    code, out, err = call(capsys, *words(place, tmp_path / "h.nii", "--samples", 3, "--steps", 2)); assert code == 0, err
    mean, sd = nib.load(tmp_path / "h.nii"), nib.load(tmp_path / "h_std.nii"); assert mean.shape == sd.shape and (sd.get_fdata() >= 0).all() and sd.get_fdata().max() > 0 and err.count("\n") >= 3
    code, out, err = call(capsys, *words(place, tmp_path / "x4.nii.gz", "--scale", 4, "--steps", 2)); assert code == 0, err
    assert nib.load(tmp_path / "x4.nii.gz").shape == tuple(4 * n for n in nib.load(place / "low.nii.gz").shape)
    code, *_ = call(capsys, *words(place, tmp_path / "a.nii", "--steps", 2, "--seed", 7)); b = call(capsys, *words(place, tmp_path / "b.nii", "--steps", 2, "--seed", 7, "--tile", 500)); assert code == 0 == b[0]
    assert np.array_equal(nib.load(tmp_path / "a.nii").get_fdata(), nib.load(tmp_path / "b.nii").get_fdata())


@pytest.mark.parametrize("more,says", [(("--scale", 3), "use 2, or 4"), (("--method", "magic"), "use diffusion"), (("--steps", 0), "--steps 0"), (("--samples", 0), "at least 1"), (("--samples", 2, "--method", "cubic"), "only diffusion draws"), (("--tile", 3), "at least 32")])
def test_wrong_words(place, tmp_path, capsys, more, says):
    code, _, err = call(capsys, *words(place, tmp_path / "h.nii.gz", *more)); lines = [line for line in err.strip().splitlines() if "warning" not in line]
    assert code == 1 and len(lines) == 1 and says in lines[0] and not list(tmp_path.iterdir())


def test_wrong_files(place, tmp_path, capsys):
    def wrong(says, *w): code, _, err = call(capsys, *w); assert code == 1 and err.strip().count("\n") == 0 and says in err, (code, err)
    g = np.random.default_rng(0); weights = ("--weights", place / "runs/diffusion", "--device", "cpu")
    for shape, says in (((9, 9), "2-D image"), ((3, 9, 9), "at least 4"), ((9, 9, 9, 2), "4-D image")):
        nib.save(nib.Nifti1Image(g.random(shape).astype(np.float32), np.eye(4)), tmp_path / "x.nii.gz"); wrong(says, "predict", "sr3d", tmp_path / "x.nii.gz", "--out", tmp_path / "y.nii.gz", *weights)
    nib.save(nib.Nifti1Image(np.full((9, 9, 9), np.nan, np.float32), np.eye(4)), tmp_path / "x.nii.gz"); wrong("NaN", "predict", "sr3d", tmp_path / "x.nii.gz", "--out", tmp_path / "y.nii.gz", *weights)
    wrong("name a .nii", *words(place, tmp_path / "y.npy")); wrong("no such file", "predict", "sr3d", tmp_path / "none.nii.gz", "--out", tmp_path / "y.nii.gz", *weights)
    wrong("are of a regression", *words(place, tmp_path / "y.nii.gz", "--method", "diffusion", run="regression"))
    (tmp_path / "z.nii.gz").write_bytes(b"x"); wrong("--force", *words(place, tmp_path / "z.nii.gz")); assert (tmp_path / "z.nii.gz").read_bytes() == b"x"
    wrong("diffusion stands on a regression", "train", "sr3d", *(w for f in (*FIELDS, "method=diffusion", f"base={place / 'runs/diffusion'}") for w in ("-p", f)), "--data", place / "heads", "--out", tmp_path / "runs")
    wrong("needs a folder of NIfTI", "train", "sr3d", "--data", place / "low.nii.gz", "--out", tmp_path / "others")


def test_evaluate(place, tmp_path, capsys):
    code, out, err = call(capsys, "evaluate", "sr3d", "--data", place / "heads", "--weights", place / "runs/diffusion", "--out", tmp_path / "m.json", "--device", "cpu"); assert code == 0, err
    got = json.loads((tmp_path / "m.json").read_text()); assert {r["method"] for r in got} >= {"nearest", "linear", "cubic", "back_projection", "regression", "diffusion", "diffusion_mean"} and {"psnr", "ssim", "nrmse", "lsd"} <= {r["metric"] for r in got}
    db = {r["method"]: r["mean"] for r in got if r["metric"] == "psnr" and r["region"] == "whole"}; assert db["nearest"] < db["cubic"] and db["diffusion"] < db["diffusion_mean"]
    assert {r["n_subjects"] for r in got} == {1}                                                                       # its own training folder: the one of five that was held out


def test_resume_is_exact(place, tmp_path):
    "A diffusion stopped at half its steps ends in the same bytes"
    from mri_gen import sr3d
    from mri_gen.heads import load_heads
    from mri_gen.train import fit
    heads = load_heads(place / "heads", splits=("train", "dev")); params = {k: json.loads(v) for k, v in (f.split("=") for f in FIELDS)}
    for method in ("regression", "diffusion"):
        cfg = sr3d.Config.profile("smoke", **params, method=method, base=str(place / "runs/regression") if method == "diffusion" else "")
        fit(lambda: sr3d.job(cfg, heads), cfg, tmp_path / f"{method}-whole", device="cpu", quiet=True)
        info = fit(lambda: sr3d.job(cfg, heads), cfg, tmp_path / f"{method}-parts", device="cpu", quiet=True, max_hours=0.); assert info["state"] == "PAUSED"
        while info["state"] == "PAUSED": info = fit(lambda: sr3d.job(cfg, heads), cfg, tmp_path / f"{method}-parts", device="cpu", quiet=True, max_hours=0.)
        assert (tmp_path / f"{method}-whole/weights.safetensors").read_bytes() == (tmp_path / f"{method}-parts/weights.safetensors").read_bytes()
