"Codes from the command line: there and back bit for bit, new slices, and one clear line for what is wrong"
import os

import numpy as np
import pytest


def drawn(n=24, size=48):
    "Drawn heads: (n,size,size) float32 in [0,1]"
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j]; out = []
    for i in range(n):
        g = np.random.default_rng(i); r = np.hypot((x - .1 * g.normal()) / .75, (y - .05 * g.normal()) / .85)
        out.append(np.clip(1.2 - r, 0, 1) * (.6 + .4 * np.cos((7 + g.random()) * r + 3 * x)) * (r < 1) + .02 * g.random(x.shape))
    return np.clip(out, 0, 1).astype(np.float32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Slices, an autoencoder of a few steps and a prior over its codes"
    from mri_gen.cli import main
    from mri_gen.datasets import SliceSet, save_slices
    d = tmp_path_factory.mktemp("vqvae"); x = drawn(); old = os.environ.pop("MRI_GEN_DATA", None)
    split, position = ("train", "train", "train", "train", "dev", "val"), ("low", "mid", "high")
    save_slices(d / "slices", SliceSet(np.round(x[:, None] * 255).astype(np.uint8), [dict(subject=f"TOY{i % 6}", site="", slice=i, split=split[i % 6], position=position[(i + i // 6) % 3], plane="axial", data="drawn") for i in range(24)]))
    base = ["--data", d / "slices", "--out", d, "--device", "cpu"]; small = lambda *p: [w for v in p for w in ("-p", v)]
    assert main(["train", "vqvae", *small("steps=14", "chs=[8,8]", "codes=16", "precision=fp32", "val_every=14", "save_every=7"), *base, "--name", "ae"]) == 0
    assert main(["train", "vqvae", "--profile", "prior_smoke", *small("steps=4", f"autoencoder={d / 'ae'}", "precision=fp32"), *base, "--name", "prior"]) == 0
    np.save(d / "in.npy", x[:5, None])
    yield d
    if old is not None: os.environ["MRI_GEN_DATA"] = old


@pytest.fixture
def call(place, capfd):
    "call(words...) -> (exit code, stdout, stderr)"
    from mri_gen.cli import main
    def go(*words):
        capfd.readouterr(); code = main([str(w) for w in words]); out, err = capfd.readouterr()
        return code, out, err
    return go


@pytest.fixture
def wrong(call):
    "wrong(words..., says=...): exit code 1, one line that says so"
    def go(*words, says):
        code, out, err = call(*words)
        assert code == 1 and len(err.strip().splitlines()) == 1, (code, err)
        for s in [says] if isinstance(says, str) else says: assert s in err, err
    return go


def test_there_and_back(call, place, tmp_path):
    a = ["--weights", place / "ae", "--device", "cpu"]
    code, out, err = call("predict", "vqvae", place / "in.npy", "--out", tmp_path / "y.npy", "--codes", tmp_path / "c.npz", *a)
    assert (code, err) == (0, "") and "bit/pixel" in out
    y = np.load(tmp_path / "y.npy"); assert y.shape == (5, 1, 48, 48) and y.dtype == np.float32 and 0 <= y.min() and y.max() <= 1
    with np.load(tmp_path / "c.npz") as z: assert sorted(z.files) == ["codebook", "codes", "size"] and z["codes"].shape == (5, 12, 6) and z["codes"].max() < z["codebook"] and z["size"].tolist() == [48, 48]
    assert call("decode", "vqvae", tmp_path / "c.npz", "--out", tmp_path / "z.npy", *a)[0] == 0
    assert (np.load(tmp_path / "z.npy") == y[:, 0]).all()


@pytest.mark.parametrize("shape", [(3, 37, 41), (1, 48, 16)])
def test_odd_sizes(call, place, tmp_path, shape):
    np.save(tmp_path / "odd.npy", np.random.default_rng(0).random(shape).astype(np.float32))
    assert call("predict", "vqvae", tmp_path / "odd.npy", "--out", tmp_path / "y.npy", "--weights", place / "ae", "--device", "cpu")[0] == 0
    assert np.load(tmp_path / "y.npy").shape == shape


def test_samples(call, place, tmp_path):
    a = ["sample", "vqvae", "--weights", place / "prior", "--device", "cpu", "--seed", 3]
    assert call(*a, "--n", 5, "--position", "mid", "--out", tmp_path / "a")[0] == 0
    x = np.load(tmp_path / "a/samples.npy"); assert x.shape == (5, 48, 48) and x.dtype == np.float32 and 0 <= x.min() and x.max() <= 1 and (tmp_path / "a/grid.png").exists()
    assert call(*a, "--n", 2, "--position", "mid", "--temperature", 1, "--out", tmp_path / "b")[0] == 0
    assert (np.load(tmp_path / "b/samples.npy") == x[:2]).all(), "an image depends on how many are drawn"


def test_evaluation_draws(place, tmp_path, monkeypatch):
    "Where a prior is shipped, it is judged by what it draws; too few people for distances of sets are said, not an error"
    import json, shutil
    from mri_gen import report, vqvae
    from mri_gen.checkpoint import load_weights, save_weights
    from mri_gen.core import UserError
    folder = tmp_path / "root/artifacts/vqvae"; folder.mkdir(parents=True); monkeypatch.setenv("MRI_GEN_ROOT", str(tmp_path / "root"))
    for name, run in (("vqvae", "ae"), ("prior", "prior")): shutil.copyfile(place / run / "weights.safetensors", folder / f"{name}.safetensors")
    (folder / "weights.json").write_text(json.dumps({"vqvae": "vqvae.safetensors", "prior": "prior.safetensors"}))
    e = vqvae.evaluate(place / "slices", "val", None, ("block_mean", "vqvae"), device="cpu")
    assert set(e.drawn) == {"low", "mid", "high"} and {r["metric"] for r in e.records if r["cell"] == "drawn"} >= {"position_agreement", "memorised"} and "vqvae, by its prior" in e.rates
    nets, meta = load_weights(folder / "prior.safetensors"); thin = vqvae.slim(nets, meta); assert set(thin[0]) == {"prior"}; before = vqvae.Sampler(None, "cpu")(range(2), "low")
    save_weights(folder / "prior.safetensors", *thin); assert (vqvae.Sampler(None, "cpu")(range(2), "low") == before).all()      # its autoencoder comes from the file beside it
    other, about = load_weights(folder / "vqvae.safetensors"); k = next(iter(other["vqvae"])); other["vqvae"][k] = other["vqvae"][k] + .01; save_weights(folder / "vqvae.safetensors", other, about)
    with pytest.raises(UserError, match="another autoencoder"): vqvae.Sampler(None, "cpu")
    assert set(vqvae.slim(nets, meta)[0]) == {"prior", "autoencoder"}
    records = report.save_evaluation(tmp_path / "e", e, vqvae, "vqvae")
    assert {"samples.png", "usage-vqvae.png", "reconstructions.png"} <= {p.name for p in (tmp_path / "e/figures").iterdir()}
    assert any("classifier is right" in v for v in report.verdicts(records, e.comparisons, "vqvae")) and "right position" in str(report.results(tmp_path / "e", records, e.comparisons, "vqvae"))


def test_bad_input(wrong, place, tmp_path):
    p = lambda x, says: (np.save(tmp_path / "x.npy", x), wrong("predict", "vqvae", tmp_path / "x.npy", "--out", tmp_path / "y.npy", "--weights", place / "ae", says=["x.npy", says]))
    x = drawn(2)
    p(np.where(x > .5, np.nan, x), "NaN"); p(x * 0, "constant"); p(x * 255, "divide by 255"); p(x[:, None].repeat(3, 1), "3 channels"); p(x + 1j, "complex"); p(x[:0], "empty")
    wrong("predict", "vqvae", tmp_path / "none.npy", "--out", tmp_path / "y.npy", says="no such file")
    wrong("predict", "vqvae", place / "in.npy", "--out", tmp_path / "y.png", says=".npy"); wrong("predict", "vqvae", place / "in.npy", "--out", tmp_path / "y.npy", "--codes", tmp_path / "c.txt", says=".npz")
    assert not (tmp_path / "y.npy").exists()


def test_bad_codes(wrong, place, tmp_path):
    f = tmp_path / "c.npz"; go = lambda says: wrong("decode", "vqvae", f, "--out", tmp_path / "y.npy", "--weights", place / "ae", says=["c.npz", says])
    good = dict(codes=np.zeros((2, 12, 6), np.uint8), size=np.array([48, 48]), codebook=np.array(16))
    go("no such file"); f.write_bytes(b"PK\3\4 nothing"); go("no readable"); np.savez(f, **{k: v for k, v in good.items() if k != "size"}); go("no size")
    for k, v, says in (("codes", good["codes"] + 16, "0 to 15"), ("codes", good["codes"][0], "whole numbers"), ("codes", good["codes"] * .5, "whole numbers"), ("codes", good["codes"][:, :5], "need (N,12,6)"), ("codebook", np.array(128), "made with 128 codes"), ("codebook", np.array([]), "codebook is"), ("codebook", np.array(16.5), "codebook is"), ("codebook", np.array([16, 99]), "codebook is"), ("size", np.array([48, 0]), "size is"), ("size", np.array([480, 48]), "need (N,120,6)"), ("codes", np.array([{}], object), "no readable")):
        np.savez(f, **good | {k: v}); go(says)
    np.savez_compressed(f, **good); raw = bytearray(f.read_bytes()); at = raw.index(b"codes.npy") + 20; raw[at:at + 30] = bytes(30); f.write_bytes(raw); go("no readable")
    assert not (tmp_path / "y.npy").exists()


def test_another_autoencoder(place, tmp_path):
    "A prior knows the codes of one autoencoder: it goes on with no other"
    from mri_gen import vqvae
    from mri_gen.checkpoint import load_weights, save_weights
    nets, meta = load_weights(place / "ae/weights.safetensors"); k = next(iter(nets["vqvae"])); nets["vqvae"][k] = nets["vqvae"][k] + .01; save_weights(tmp_path / "other.safetensors", nets, meta)
    jobs = [vqvae.job(c := vqvae.Config.profile("prior_smoke", autoencoder=str(a)), vqvae.load_data(c, place / "slices")) for a in (place / "ae", tmp_path / "other.safetensors")]
    assert jobs[0].meta["trained_on"] != jobs[1].meta["trained_on"] and jobs[0].meta["positions"] == ["high", "low", "mid"]


def test_bad_samples(wrong, place, tmp_path):
    a = ["sample", "vqvae", "--weights", place / "prior", "--device", "cpu", "--out", tmp_path / "s"]
    wrong(*a, "--n", 0, says="--n 0"); wrong(*a, "--position", "top", says="low, mid, high"); wrong(*a, "--temperature", 5, says=".01 to 2"); wrong(*a, "--temperature", "1e-300", says=".01 to 2"); wrong(*a, "--top-k", 0, says="at least 1")
    wrong("sample", "vqvae", "--weights", place / "ae", "--out", tmp_path / "s", says="draws nothing")
    assert not (tmp_path / "s").exists()


def test_resume(place, tmp_path):
    "Codebook and counts are in the checkpoint: 6 (the codebook begins at 2) + 8 steps end in the bytes of 14 in one go"
    from mri_gen import vqvae
    from mri_gen.core import read_rows
    from mri_gen.train import fit
    cfg = vqvae.Config.profile("smoke", steps=14, chs=[8, 8], codes=16, precision="fp32", kmeans=2, val_every=14, save_every=6)
    data = vqvae.load_data(cfg, place / "slices"); make = lambda: vqvae.job(cfg, data)
    class Halt(Exception): pass
    def halting():
        job = make(); inner = job.step
        def step(loop, idx):
            if loop.step == 9: raise Halt
            return inner(loop, idx)
        job.step = step
        return job
    with pytest.raises(Halt): fit(halting, cfg, tmp_path / "b", "cpu", threads=1, quiet=True)
    fit(make, cfg, tmp_path / "b", "cpu", quiet=True); fit(make, cfg, tmp_path / "a", "cpu", threads=1, quiet=True)
    assert (tmp_path / "a/weights.safetensors").read_bytes() == (tmp_path / "b/weights.safetensors").read_bytes()
    last = [[r[k] for k in ("epoch_perplexity", "epoch_active", "moved")] for r in (read_rows(tmp_path / n / "metrics.csv")[-1] for n in "ab")]; assert last[0] == last[1] and float(last[0][0]) > 1


def test_four_pngs_train(call, wrong, tmp_path):
    from PIL import Image
    (tmp_path / "png").mkdir()
    for i, x in enumerate(drawn(4)): Image.fromarray(np.round(x * 255).astype(np.uint8)).save(tmp_path / f"png/{'abcd'[i]}.png")
    go = ("train", "vqvae", "-p", "chs=[8,8]", "-p", "codes=16", "--data", tmp_path / "png", "--out", tmp_path, "--device", "cpu")
    code, out, err = call(*go, "-p", "steps=2"); assert (code, "DONE step=2" in out) == (0, True), err
    for n in "cd": (tmp_path / f"png/{n}.png").unlink()
    wrong(*go, "-p", "steps=3", "--name", "few", says=["no split=dev", "at least three people"])
    assert not (tmp_path / "few/config.json").exists() and not (tmp_path / "few/data.json").exists()
