"Translation through the command line: train, evaluate, predict on arrays, PNG folders and volumes, and what must fail in one line"
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from mri_gen.cli import main

FIELDS = ("steps=4", "chs=[8,16]", "patch=8", "head=8", "d_chs=[8,16]", "batch_size=2", "crop=[64,64]", "lookalikes=1", "bend=[4,0]", "pool=3", "val_images=2", "log_every=2", "val_every=4", "save_every=2")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with drawn triples of twelve people, and a run trained on them"
    from mri_gen.datasets import SliceSet, save_slices
    d = tmp_path_factory.mktemp("cyclegan"); g = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:96j, -1:1:80j]; r = np.hypot(y / .9, x)
    a = np.cos((4 + 3 * g.random((24, 1, 1))) * r) * .3 + .5; inside = r < .85
    images = np.stack([a * inside, (.95 - a) * inside, .5 * np.ones_like(a) * inside], 1); images = (np.clip(images + .02 * g.random(images.shape), 0, 1) * 255).astype(np.uint8)
    save_slices(d / "triples", SliceSet(images, [dict(subject=f"TOY{i // 2:02d}", site="Guys", slice=i % 2, position=("low", "high")[i % 2], split=("train", "train", "dev", "val")[i // 2 % 4]) for i in range(24)]))
    x = (images[:5, 0] / np.float32(255)).astype(np.float32); np.save(d / "in.npy", x); (d / "png").mkdir()
    for i, v in enumerate(images[:5, 0]): Image.fromarray(v if i else np.stack([v] * 3, -1)).save(d / f"png/Image #{i}.png")          # gray, and one RGB with equal channels
    assert main(["train", "cyclegan", *(w for f in FIELDS for w in ("-p", f)), "--data", d / "triples", "--out", d / "runs", "--name", "toy", "--device", "cpu"]) == 0
    return d


def call(capsys, *words):
    "(exit code, stdout, stderr)"
    capsys.readouterr(); code = main(words); out, err = capsys.readouterr()
    return code, out, err


def wrong(capsys, *words, says):
    code, _, err = call(capsys, *words)
    lines = [line for line in err.strip().splitlines() if "warning" not in line]
    assert code == 1 and len(lines) == 1 and says in lines[0], (code, err)


def words(place, kind, out, direction="T1toT2"): return ("predict", "cyclegan", place / kind, "--direction", direction, "--out", out, "--weights", place / "runs/toy", "--device", "cpu")


@pytest.mark.parametrize("direction", ["T1toT2", "T2toT1"])
def test_arrays(place, tmp_path, capsys, direction):
    code, out, err = call(capsys, *words(place, "in.npy", tmp_path / "y.npy", direction)); assert code == 0, err
    x, y = np.load(place / "in.npy"), np.load(tmp_path / "y.npy")
    assert y.dtype == np.float32 and y.shape == x.shape and 0 <= y.min() and y.max() <= 1 and y.std() > 0
    np.save(tmp_path / "one.npy", x[2:3, None]); code, *_ = call(capsys, *words(tmp_path, "one.npy", tmp_path / "z.npy", direction)[:7], "--weights", place / "runs/toy", "--device", "cpu")
    assert code == 0 and np.array_equal(np.load(tmp_path / "z.npy")[:, 0], y[2:3])           # no neighbour matters
    code, *_ = call(capsys, *words(place, "in.npy", tmp_path / "y.npy", direction), "--sharp", "--force"); assert code == 0 and not np.array_equal(np.load(tmp_path / "y.npy"), y)


def test_png_folder(place, tmp_path, capsys):
    "The same names, 8 bit gray, what arrays give; RGB with equal channels is gray"
    code, out, err = call(capsys, *words(place, "png", tmp_path / "out")); assert code == 0, err
    call(capsys, *words(place, "in.npy", tmp_path / "y.npy")); y = np.load(tmp_path / "y.npy")
    for i in range(5): im = Image.open(tmp_path / f"out/Image #{i}.png"); assert im.mode == "L" and np.abs(np.asarray(im) / 255 - y[i]).max() < .51 / 255
    wrong(capsys, *words(place, "png", tmp_path / "out"), says="--force")
    code, *_ = call(capsys, *words(place, "png", tmp_path / "out"), "--force"); assert code == 0
    wrong(capsys, *words(place, "png", place / "png"), "--force", says="another folder"); (tmp_path / "out/mine.txt").write_text("kept"); wrong(capsys, *words(place, "png", tmp_path / "out"), "--force", says="never replaced")


def test_volume(place, tmp_path, capsys):
    "Any orientation: the result on the input's grid"
    x = np.load(place / "in.npy"); a = np.array([[0, 0, 3., -20], [-2.2, 0, 0, 90], [0, 2.2, 0, -80], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image((x.transpose(1, 2, 0) * 800).astype(np.int16), a), tmp_path / "t1.nii.gz")
    code, out, err = call(capsys, *words(tmp_path, "t1.nii.gz", tmp_path / "t2.nii.gz")[:7], "--weights", place / "runs/toy", "--device", "cpu"); assert code == 0, err
    got = nib.load(tmp_path / "t2.nii.gz"); v = got.get_fdata(); assert got.shape == (96, 80, 5) and np.allclose(got.affine, a) and 0 <= v.min() and v.max() <= 1 and v.std() > 0


def test_one_line_for_each_mistake(place, tmp_path, capsys):
    a = words(place, "in.npy", tmp_path / "y.npy")
    wrong(capsys, *a[:4], "T1toPD", *a[5:], says="T1toT2 or T2toT1"); wrong(capsys, *a[:2], tmp_path / "no.npy", *a[3:], says="no such"); wrong(capsys, *words(place, "in.npy", tmp_path / "y.png"), says=".npy"); wrong(capsys, *words(place, "png", tmp_path / "o")[:2], place / "runs", *a[3:], says="no PNG")
    x = np.load(place / "in.npy"); bad = dict(nan=np.where(np.arange(80) == 3, np.nan, x), big=x * 300, flat=np.zeros_like(x), three=np.stack([x] * 3, 1), text=np.array(["a"]))
    for k, v in bad.items(): np.save(tmp_path / f"{k}.npy", v)
    for k, says in dict(nan="NaN", big="[0,1]", flat="constant", three="channels", text="dtype").items(): wrong(capsys, *a[:2], tmp_path / f"{k}.npy", *a[3:], says=says)
    (tmp_path / "rgb").mkdir(); Image.fromarray((np.random.default_rng(0).random((40, 40, 3)) * 255).astype(np.uint8)).save(tmp_path / "rgb/a.png"); wrong(capsys, *a[:2], tmp_path / "rgb", *a[3:6], tmp_path / "o", *a[7:], says="differing channels")
    assert not (tmp_path / "y.npy").exists() and not (tmp_path / "o").exists()


def test_evaluate(place, tmp_path, capsys):
    code, out, err = call(capsys, "evaluate", "cyclegan", "--data", place / "triples", "--weights", place / "runs/toy", "--out", tmp_path / "m.json", "--device", "cpu"); assert code == 0, err
    got = json.loads((tmp_path / "m.json").read_text())
    assert {r["method"] for r in got} >= {"cyclegan", "identity"} and {r["cell"] for r in got} >= {"T1->T2", "T2->T1"} and {"psnr", "ssim", "mae", "ncc", "gradient_ratio"} <= {r["metric"] for r in got}


def test_two_folders_train_and_score(tmp_path, capsys):
    "The original's layout: a block is held out, its pairs are found, and nothing else is known"
    g = np.random.default_rng(1); y, x = np.mgrid[-1:1:109j, -1:1:91j]; r = np.hypot(y, x * 1.2)
    for m, d, n in (("T1", "Tr1/TrainT1", 10), ("T2", "Tr2/TrainT2", 70)):
        (tmp_path / "set" / d).mkdir(parents=True)
        for i in range(24):
            v = (np.cos((4 + .3 * i) * r + np.sin(3 * x + .2 * i)) * .4 + .5) * (r < .9); Image.fromarray(((v if m == "T1" else (.95 - .8 * v) * (r < .9)) * 255).astype(np.uint8)).save(tmp_path / "set" / d / f"Image #{n + i}.png")
    assert main(["train", "cyclegan", "--profile", "png", *(w for f in FIELDS for w in ("-p", f)), "--data", tmp_path / "set", "--out", tmp_path / "runs", "--name", "toy", "--device", "cpu"]) == 0
    code, out, err = call(capsys, "evaluate", "cyclegan", "--data", tmp_path / "set", "--weights", tmp_path / "runs/toy", "--out", tmp_path / "m.json", "--device", "cpu"); assert code == 0, err
    got = json.loads((tmp_path / "m.json").read_text()); assert {r["n_images"] for r in got} == {6} and {r["method"] for r in got} >= {"png", "lookup", "histogram"}


def test_float_arrays_of_two_contrasts(tmp_path, capsys):
    "T1.npy and T2.npy in [0,1], heads lying on their side: rules fit, and nothing is turned"
    from mri_gen.unpaired import Rules, block_set, pairs, unpair
    g = np.random.default_rng(3); y, x = np.mgrid[-1:1:64j, -1:1:80j]; r = np.hypot(y * 1.2, x); lean = np.sin(2 * x)             # rows are mirrored, columns are not
    t1 = np.stack([(np.cos((4 + .3 * i) * r + lean) * .4 + .5) * (r < .9) for i in range(24)]).astype(np.float32); np.save(tmp_path / "T1.npy", t1); np.save(tmp_path / "T2.npy", np.float32((.95 - .8 * t1) * (r < .9)))
    s = block_set(tmp_path); assert s.images.shape[2:] == (64, 80) and s.table[0]["turned"] == "no" and len(pairs(s.subset(split="val"))) == 6
    train = s.subset(split="train"); rules = Rules.fit(train, trees=False); v = pairs(s.subset(split="val")).float()
    assert np.square(rules("lookup", v, "T1toT2") - v[:, 1]).mean() < np.square(v[:, 0] - v[:, 1]).mean() / 4


def test_mates_of_one_head_are_not_lookalikes(tmp_path):
    from mri_gen.lookalikes import nearest
    from mri_gen.unpaired import Sides, block_set
    y, x = np.mgrid[-1:1:64j, -1:1:80j]; r = np.hypot(y * 1.2, x)
    t1 = np.stack([(np.cos((4 + .3 * i) * r + np.sin(2 * x)) * .4 + .5) * (r < .9) for i in range(24)]).astype(np.float32); np.save(tmp_path / "T1.npy", t1); np.save(tmp_path / "T2.npy", np.float32((.95 - .8 * t1) * (r < .9)))
    s = Sides(block_set(tmp_path).subset(split="train"), matched=False); a = torch.from_numpy(t1[:len(s.x[0])])[:, None].repeat(1, 2, 1, 1)
    assert (s.mates.sum(1) == 1).sum() >= 10
    at = nearest(a, s.kind[0], a, s.kind[1], 2, s.mates); assert not s.mates.gather(1, at).any()


def test_people_of_whom_one_contrast_is_there(place, tmp_path):
    "Volumes of T1 of some and T2 of others: nobody is needed twice, and data/splits.csv is obeyed"
    from mri_gen.unpaired import load_unpaired, unpair
    x = np.load(place / "in.npy"); big = np.repeat(x[:1], 6, 0).transpose(1, 2, 0)
    for who, m in (("A1", "T1"), ("A2", "T1"), ("B1", "T2"), ("B2", "T2"), ("IXI028", "T1"), ("IXI028", "T2")):
        (tmp_path / who).mkdir(exist_ok=True); nib.save(nib.Nifti1Image((big * 800).astype(np.int16), np.diag([2.2, 2.2, 4, 1])), tmp_path / who / f"{m}.nii.gz")
    s = load_unpaired(tmp_path, per_volume=3); got = {(r["subject"], r["modality"]) for r in s.table}
    assert got == {("A1", "T1"), ("A2", "T1"), ("B1", "T2"), ("B2", "T2"), ("IXI028", "T1"), ("IXI028", "T2")} and {r["split"] for r in s.table if r["subject"] == "IXI028"} == {"val"}
    kept = {(r["subject"], r["modality"]) for r in unpair(s, ("train", "val", "dev")).table}; assert kept >= got - {("IXI028", "T1"), ("IXI028", "T2")} and len(kept) == 5


def test_a_paused_run_loses_nothing(place, tmp_path):
    "Interrupted after each step, the same bytes, image pool included"
    from mri_gen.cyclegan import Config, job, load_data
    from mri_gen.train import fit
    cfg = Config.profile("full", steps=4, pool=2, save_every=1, val_images=2, chs=(8, 16), patch=8, head=8, d_chs=(8, 16), batch_size=2, crop=(64, 64), lookalikes=1, bend=(4, 0), warmup=1, whole=.25)
    data = load_data(cfg, place / "triples"); make = lambda: job(cfg, data)
    fit(make, cfg, tmp_path / "a", "cpu", quiet=True); n = 0
    while fit(make, cfg, tmp_path / "b", "cpu", max_hours=1e-9, quiet=True)["state"] != "DONE": n += 1
    assert n and (tmp_path / "a/weights.safetensors").read_bytes() == (tmp_path / "b/weights.safetensors").read_bytes()
