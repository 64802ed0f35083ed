"Imputation through the command line: train, evaluate, predict on arrays and volumes, and what must fail in one line"
import nibabel as nib
import numpy as np
import pytest

from mri_gen.cli import main

FIELDS = ("steps=4", "chs=[8,16]", "patch=8", "crop=[0,0]", "val_images=2", "log_every=2", "val_every=4", "save_every=2")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with drawn triples of twelve people, and a run trained on them"
    from mri_gen.datasets import SliceSet, save_slices
    d = tmp_path_factory.mktemp("mmgan"); g = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:96j, -1:1:96j]; r = np.hypot(y / .9, x)
    a, b = (np.cos((4 + 3 * g.random((24, 1, 1))) * r + k) * .4 + .5 for k in (0, 1)); inside = r < .85
    images = np.stack([a * inside, b * inside, (a + b) / 2 * inside], 1); images = (np.clip(images + .02 * g.random(images.shape), 0, 1) * 255).astype(np.uint8)
    save_slices(d / "triples", SliceSet(images, [dict(subject=f"TOY{i // 2:02d}", site="Guys", slice=i % 2, position=("low", "high")[i % 2], split=("train", "train", "dev", "val")[i // 2 % 4]) for i in range(24)]))
    np.save(d / "in.npy", (images[:6] / np.float32(255)).astype(np.float32))
    assert main(["train", "mmgan", *(w for f in FIELDS for w in ("-p", f)), "--data", d / "triples", "--out", d / "runs", "--name", "toy", "--device", "cpu"]) == 0
    return d


def call(capsys, *words):
    "(exit code, stdout, stderr)"
    capsys.readouterr(); code = main(words); out, err = capsys.readouterr()
    return code, out, err


def wrong(capsys, *words, says):
    code, _, err = call(capsys, *words)
    lines = [line for line in err.strip().splitlines() if "warning" not in line]
    assert code == 1 and len(lines) == 1 and says in lines[0], (code, err)


@pytest.mark.parametrize("available", ["T1", "T2", "PD", "T1,T2", "T1,PD", "T2,PD"])
def test_available_channels_bit_for_bit(place, tmp_path, capsys, available):
    code, out, err = call(capsys, "predict", "mmgan", place / "in.npy", "--available", available, "--out", tmp_path / "y.npy", "--weights", place / "runs/toy", "--device", "cpu")
    assert code == 0, err
    x, y = np.load(place / "in.npy"), np.load(tmp_path / "y.npy")
    assert y.dtype == np.float32 and y.shape == x.shape and y.min() >= 0 and y.max() <= 1
    for c, m in enumerate(("T1", "T2", "PD")): assert (y[:, c].tobytes() == x[:, c].tobytes()) == (m in available.split(","))


@pytest.mark.slow
def test_volumes(place, tmp_path, capsys):
    "Any orientation: the result on the inputs' grid"
    x = np.load(place / "in.npy"); a = np.array([[0, 0, 3., -20], [-2.2, 0, 0, 90], [0, 2.2, 0, -80], [0, 0, 0, 1]])      # rows to the back, columns up, slices to the right
    for c, m in ((1, "t2"), (2, "pd")): nib.save(nib.Nifti1Image((x[:6, c].transpose(1, 2, 0) * 800).astype(np.int16), a), tmp_path / f"{m}.nii.gz")
    words = ("predict", "mmgan", "--t2", tmp_path / "t2.nii.gz", "--pd", tmp_path / "pd.nii.gz", "--out", tmp_path / "out", "--spread", "--weights", place / "runs/toy", "--device", "cpu")
    code, out, err = call(capsys, *words); assert code == 0, err
    got = nib.load(tmp_path / "out/T1.nii.gz"); v = got.get_fdata()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["T1.nii.gz", "T1_spread.nii.gz"]
    assert got.shape == (96, 96, 6) and np.allclose(got.affine, a) and v.min() >= 0 and v.max() <= 1 and v.std() > 0
    wrong(capsys, *words, says="--force"); wrong(capsys, *words[:6], "--out", tmp_path / "new.nii.gz", says="name one")
    wrong(capsys, *words[:6], "--out", tmp_path, "--force", says="never replaced"); assert (tmp_path / "t2.nii.gz").exists()   # the folder of the inputs
    nib.save(nib.Nifti1Image((x[:6, 2].transpose(1, 2, 0) * 800).astype(np.int16), a + np.diag([0, .5, 0, 0])), tmp_path / "pd.nii.gz")
    wrong(capsys, *words[:-4], "--force", "--weights", place / "runs/toy", says="another grid")


def test_one_line_for_each_mistake(place, tmp_path, capsys):
    a = ("predict", "mmgan", place / "in.npy", "--out", tmp_path / "y.npy", "--weights", place / "runs/toy", "--device", "cpu")
    wrong(capsys, *a, says="--available"); wrong(capsys, *a, "--available", "T1,T2,PD", says="nothing is missing"); wrong(capsys, *a, "--available", "FLAIR", says="no modality")
    wrong(capsys, "predict", "mmgan", "--out", tmp_path / "y.npy", says="either IN.npy"); wrong(capsys, "predict", "mmgan", place / "in.npy", "--available", "T1", says="--out")
    wrong(capsys, "predict", "mmgan", tmp_path / "no.npy", "--available", "T1", "--out", tmp_path / "y.npy", says="no such file")
    x = np.load(place / "in.npy"); bad = dict(two=x[:, :2], nan=np.where(np.arange(96) == 3, np.nan, x), big=x * 300, flat=np.zeros_like(x), text=np.array(["a"]))
    for k, v in bad.items(): np.save(tmp_path / f"{k}.npy", v)
    for k, says in dict(two="(N,3,H,W)", nan="NaN", big="[0,1]", flat="constant", text="(N,3,H,W)").items(): wrong(capsys, "predict", "mmgan", tmp_path / f"{k}.npy", *a[3:], "--available", "T1", says=says)
    np.save(tmp_path / "gray.npy", x[:, 0]); wrong(capsys, "train", "mmgan", "--data", tmp_path / "gray.npy", "--out", tmp_path / "r", says="three channels")
    assert not (tmp_path / "y.npy").exists()


@pytest.mark.slow
def test_evaluate(place, tmp_path, capsys):
    "The toy network, zeros; every cell in the records"
    code, out, err = call(capsys, "evaluate", "mmgan", "--data", place / "triples", "--weights", place / "runs/toy", "--out", tmp_path / "m.json", "--device", "cpu")
    assert code == 0, err
    import json
    got = json.loads((tmp_path / "m.json").read_text())
    assert {r["method"] for r in got} >= {"unet", "zero"} and {r["cell"] for r in got} >= {"all", "T2,PD->T1", "T1->PD"} and {r["n_subjects"] for r in got} <= {1, 2, 3}


@pytest.mark.slow
def test_a_paused_run_loses_nothing(place, tmp_path):
    "Interrupted after each step, the same bytes"
    from mri_gen.mmgan import Config, job, load_data
    from mri_gen.train import fit
    cfg = Config.profile("gan", **{k: v for k, v in (("steps", 4), ("chs", (8, 16)), ("patch", 8), ("d_chs", (8, 16)), ("crop", (64, 80)), ("val_images", 2), ("save_every", 1), ("warmup", 1), ("curriculum", "four_phases"))})
    data = load_data(cfg, place / "triples"); make = lambda: job(cfg, data)
    fit(make, cfg, tmp_path / "a", "cpu", quiet=True); n = 0
    while fit(make, cfg, tmp_path / "b", "cpu", max_hours=1e-9, quiet=True)["state"] != "DONE": n += 1
    assert n and (tmp_path / "a/weights.safetensors").read_bytes() == (tmp_path / "b/weights.safetensors").read_bytes()
