"""Faults of the machine, each against whatever writes or reads: full disks, read-only folders, old, new and broken checkpoints, a clock that runs backwards, data that change under a training, no GPU.
What must hold: one line and exit code 1, earlier results intact, nothing half under a final name, and the same command goes on to the same bytes once the fault is mended. Kills are tests/torture.py's, single broken checkpoints tests/test_engine.py's"""
import json, os, re, resource, shutil, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import fuzz, torture
from mri_gen.checkpoint import FORMAT, load_checkpoint
from mri_gen.core import RunFolder, UserError
from mri_gen.datasets import SliceSet, save_slices
from mri_gen.train import fit

pytestmark = pytest.mark.slow   # together minutes: `make test`, not `make check`

CFG = torture.config(steps=12, log_every=4, val_every=5, save_every=3)


def apart(f, limit=None, user=None):
    "(exit code, stdout and stderr together) of f() in a forked process; `limit`: bytes a file may grow to, a real error of the kernel; `user`: as this one"
    r, w = os.pipe(); pid = os.fork()
    if not pid:
        code = 99
        try:
            for k in (1, 2): os.dup2(w, k)
            sys.stdout, sys.stderr = (open(k, "w", buffering=1, closefd=False) for k in (1, 2))
            if limit is not None: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            if user is not None: os.setegid(user); os.seteuid(user)
            torch.set_num_threads(1); code = f() or 0
        except UserError as e: print(f"mri_gen: {e}", file=sys.stderr); code = 1
        except BaseException:
            import traceback; traceback.print_exc()
        finally: sys.stdout.flush(); sys.stderr.flush(); os._exit(code)
    os.close(w); out = b""
    while b := os.read(r, 65536): out += b
    os.close(r)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), out.decode()


def files(folder, but=()): return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file() and p.name not in but} if Path(folder).exists() else {}


def refused(code, out, *words):
    "Exactly one line of ours, and no traceback"
    mine = [line for line in out.splitlines() if line.startswith("mri_gen") and not line.startswith("mri_gen: warning:")]
    assert code == 1 and len(mine) == 1 and "Traceback" not in out and "not foreseen" not in out, (code, out[-1500:])
    for w in words: assert re.search(w, mine[0]), mine[0]


# everything that writes ----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    "Tiny inputs and tiny weights of each task"
    fuzz.constants(); d = tmp_path_factory.mktemp("faults"); g = np.random.default_rng(0); torch.set_num_threads(1)
    for slug, raw in fuzz.prepare_weights().items(): (d / f"{slug}.safetensors").write_bytes(raw)
    x = np.clip(g.random((4, 32, 32)) * .5 + np.hypot(*np.mgrid[-1:1:32j, -1:1:32j]) / 3, 0, 1).astype(np.float32); known = np.ones((32, 32), bool); known[8:12] = False
    np.save(d / "in.npy", x * known); np.save(d / "mask.npy", known); np.save(d / "three.npy", np.stack([x] * 3, 1)); np.save(d / "truth.npy", x)
    import nibabel as nib
    nib.save(nib.Nifti1Image((g.random((24, 24, 24)) * 200).astype(np.float32), np.eye(4)), d / "v.nii.gz")
    (d / "png").mkdir()
    from PIL import Image
    for i in range(2): Image.fromarray((x[i] * 255).astype(np.uint8)).save(d / f"png/{i}.png")
    writing_run(d, d)
    for s in ("S1", "S2"):
        for m in ("T1", "T2", "PD"): (d / f"cohort/{s}").mkdir(parents=True, exist_ok=True); z = np.linalg.norm(np.mgrid[-1:1:24j, -1:1:24j, -1:1:24j] * np.reshape([1.2, 1, 1.1], (3, 1, 1, 1)), axis=0); nib.save(nib.Nifti1Image(((z < .9) * 100 * (2 + np.cos(9 * z) * (1 if m == "PD" else -1)) + g.random(z.shape)).astype(np.float32), np.diag([7., 7, 7, 1])), d / f"cohort/{s}/{m}.nii.gz")
    from mri_gen import cli, cyclegan, inpaint, mmgan, vqvae  # noqa: F401  once here, not in each forked process
    return d


def cli(*words):
    from mri_gen.cli import main
    return main([*map(str, words), "--force"] if words[0] in ("predict", "generate") else [*map(str, words)])


def writing_volume(d, out):
    from mri_gen.volumes import read_volume, write_volume
    v = read_volume(d / "v.nii.gz"); write_volume(out / "o.nii.gz", v.data, v, force=True)


def writing_slices(d, out): save_slices(out / "s", SliceSet(np.load(d / "truth.npy")[:, None], [dict(subject=f"S{i}", split="train" if i < 3 else "dev") for i in range(4)]), force=True)


def writing_run(d, out): fit(lambda: torture.job(CFG), CFG, out / "run", device="cpu", threads=1, quiet=True)


WRITERS = {
    "run": writing_run, "volume": writing_volume, "slices": writing_slices,
    "inpaint": lambda d, o: cli("predict", "inpaint", d / "in.npy", "--mask", d / "mask.npy", "--out", o / "o.npy", "--weights", d / "inpaint.safetensors", "--device", "cpu"),
    "mmgan": lambda d, o: cli("predict", "mmgan", d / "three.npy", "--available", "T2,PD", "--out", o / "o.npy", "--weights", d / "mmgan.safetensors", "--device", "cpu"),
    "codes": lambda d, o: cli("predict", "vqvae", d / "in.npy", "--out", o / "o.npy", "--codes", o / "c.npz", "--weights", d / "vqvae.safetensors", "--device", "cpu"),
    "cyclegan": lambda d, o: cli("predict", "cyclegan", d / "in.npy", "--direction", "T1toT2", "--out", o / "o.npy", "--weights", d / "cyclegan.safetensors", "--device", "cpu"),
    "pngs": lambda d, o: cli("predict", "cyclegan", d / "png", "--direction", "T1toT2", "--out", o / "png", "--weights", d / "cyclegan.safetensors", "--device", "cpu"),
    "cubic": lambda d, o: cli("predict", "sr3d", d / "v.nii.gz", "--method", "cubic", "--out", o / "o.nii.gz"),
    "generate": lambda d, o: cli("generate", "--num-samples", 4, "--num-inference-steps", 2, "--batch-size", 2, "--out", o / "g", "--weights", d / "generate.safetensors", "--device", "cpu"),
    "report": lambda d, o: cli("report", d / "run", "--out", o / "page"),
    "preprocess": lambda d, o: cli("preprocess", d / "cohort", o / "pre", "--no-n4", "--jobs", 1),
    "simulate": lambda d, o: cli("simulate", o / "sim", "--subjects", 1, "--spacing", 8),
}


SLOW = ["report", "preprocess", "simulate"]      # ten seconds each
EACH = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in WRITERS]


def finals(out): return {k: v for k, v in files(out, ("lock", "env.json", "DONE")).items() if ".partial" not in k}


@pytest.fixture(scope="module")
def whole_results(ready, tmp_path_factory):
    "{writer: its files, undisturbed}"
    out = {}
    def of(name):
        if name not in out: d = tmp_path_factory.mktemp("whole"); code, text = apart(lambda: WRITERS[name](ready, d)); assert code == 0, text; out[name] = finals(d)
        return out[name]
    return of


@pytest.mark.parametrize("name", EACH)
def test_a_file_that_cannot_grow(name, ready, whole_results, tmp_path):
    "EFBIG at some byte of some file: the first, a middle one, the last"
    want = whole_results(name); sizes = sorted({len(v) for k, v in want.items() if "/png/" not in k})
    for limit in sorted({0, sizes[-1] // 2, sizes[-1] - 1, *(s - 1 for s in sizes[len(sizes) // 2:][:1])} - {-1}):
        refused(*apart(lambda: WRITERS[name](ready, tmp_path), limit), "cannot be|not writable|File too large")
        left = finals(tmp_path)
        assert all(want.get(k, v) == v or name == "run" for k, v in left.items()), (limit, sorted(left))      # a run grows: what is there is earlier, not half
        assert name == "run" or not [k for k in left if k.split("/")[0] in {w.split("/")[0] for w in want} and name != "codes"], (limit, sorted(left))
    code, text = apart(lambda: WRITERS[name](ready, tmp_path)); assert code == 0, text
    assert finals(tmp_path) == want


@pytest.fixture
def disk():
    "disk(kib): a file system of that size; skips where mounting is not allowed"
    mounted = []
    def make(kib):
        d = Path(tempfile.mkdtemp()); ok = os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(d)], capture_output=True).returncode == 0
        if not ok: d.rmdir(); pytest.skip("mounting needed")
        mounted.append(d); return d
    yield make
    for d in mounted: subprocess.run(["umount", "-l", str(d)]); d.rmdir()


@pytest.mark.parametrize("name", EACH)
def test_a_full_disk(name, ready, whole_results, disk):
    "A small disk on which more and more is free: until there is enough, each attempt ends in one line; then the same bytes"
    want, d = whole_results(name), disk(16_384); need = sum(-(-len(v) // 4096) * 4096 for v in want.values())
    for free in sorted({0, 4096, need // 8, need // 3, need // 2, need * 3 // 4}):
        for p in d.glob("ballast*"): p.unlink()
        room = os.statvfs(d); n = max(0, room.f_bavail * room.f_frsize - free // 4096 * 4096); (d / "ballast").write_bytes(b"x" * n)
        code, text = apart(lambda: WRITERS[name](ready, d / "o")); left = finals(d / "o")
        if code == 0: assert left == want; return                           # a smaller result than counted
        refused(code, text, "No space left on device"); assert name in ("run", "codes") or not [k for k in left if k in want], (free, sorted(left))
    (d / "ballast").unlink(); code, text = apart(lambda: WRITERS[name](ready, d / "o")); assert code == 0, text
    assert finals(d / "o") == want


@pytest.mark.parametrize("name", [n for n in WRITERS if n not in ("run", *SLOW)])
def test_a_full_disk_spares_the_earlier_result(name, ready, tmp_path):
    "With --force: what is to be replaced stays until the new one is whole"
    assert apart(lambda: WRITERS[name](ready, tmp_path))[0] == 0; before = finals(tmp_path)
    refused(*apart(lambda: WRITERS[name](ready, tmp_path), max(map(len, before.values())) - 1)); assert finals(tmp_path) == before
    refused(*apart(lambda: WRITERS[name](ready, tmp_path), 0)); assert finals(tmp_path) == before


@pytest.mark.parametrize("name", EACH)
def test_a_read_only_disk(name, ready, whole_results, disk):
    d = disk(16_384); (d / "o").mkdir(); subprocess.run(["mount", "-o", "remount,ro", str(d)], check=True)
    refused(*apart(lambda: WRITERS[name](ready, d / "o")), "Read-only file system|cannot be written|not writable"); assert files(d) == {}
    subprocess.run(["mount", "-o", "remount,rw", str(d)], check=True)
    code, text = apart(lambda: WRITERS[name](ready, d / "o")); assert code == 0 and finals(d / "o") == whole_results(name), text


@pytest.mark.parametrize("name", EACH)
def test_a_folder_below_a_file(name, ready, tmp_path):
    "What root cannot write to either"
    (tmp_path / "o").write_text("mine"); refused(*apart(lambda: WRITERS[name](ready, tmp_path / "o/p")), "choose another|cannot be"); assert files(tmp_path) == {"o": b"mine"}


# kills ------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_kills_over_all_tasks():
    "Two for each real task, where it has two kinds for both; the long one is `python tests/torture.py --tasks --kills 100`"
    r = subprocess.run([sys.executable, Path(__file__).parent / "torture.py", "--kills", "16", "--seed", "3", "--tasks", *"generate inpaint mmgan vqvae prior cyclegan sr3d diffusion".split()], capture_output=True, text=True, timeout=900)
    assert r.returncode == 0 and "16 of 16 kills survived" in r.stdout and "generate 2, inpaint 2, mmgan 2, vqvae 2, prior 2, cyclegan 2, sr3d 2, diffusion 2" in r.stdout, r.stdout + r.stderr


# checkpoints of other times ---------------------------------------------------------------------------

@pytest.fixture
def paused(tmp_path):
    "A run that stopped after its second checkpoint, and a function that goes on with it, apart"
    class Stop(Exception): pass
    def make(at):
        j = torture.job(CFG); inner = j.step
        def step(loop, idx):
            if loop.step == at: raise Stop
            return inner(loop, idx)
        j.step = step; return j
    torch.set_num_threads(1)
    with pytest.raises(Stop): fit(lambda: make(8), CFG, tmp_path / "a", device="cpu", threads=1, quiet=True)
    return tmp_path / "a"


def on(folder, cfg=CFG): return apart(lambda: fit(lambda: torture.job(cfg), cfg, folder, device="cpu", threads=1, quiet=True) and 0)
def same(folder, want): return {k: v for k, v in finals(folder).items() if not k.startswith("checkpoint/step-00000009")} == {k.removeprefix("run/"): v for k, v in want.items() if not k.startswith("run/checkpoint/step-00000009")}


def test_a_checkpoint_of_a_newer_version(paused, whole_results):
    m = max(paused.glob("checkpoint/step-*")) / "manifest.json"; old = m.read_text(); assert json.loads(old)["format"] == FORMAT
    m.write_text(json.dumps(json.loads(old) | {"format": FORMAT + 1})); before = files(paused, ("lock", "env.json"))
    refused(*on(paused), f"step-00000006: written by a newer version .format {FORMAT + 1}, this one reads {FORMAT}.; update mri_gen"); assert files(paused, ("lock", "env.json")) == before
    m.write_text(json.dumps({k: v for k, v in json.loads(old).items() if k != "format"}))      # as written before there were formats
    assert on(paused)[0] == 0 and same(paused, whole_results("run"))


def seal(c, name, raw):
    (c / name).write_bytes(raw); m = json.loads((c / "manifest.json").read_text()); m["sha256"][name] = fuzz.hashlib.sha256(raw).hexdigest(); (c / "manifest.json").write_text(json.dumps(m))


@pytest.mark.parametrize("part, odd", [("opts", {}), ("opts", None), ("sums", [1]), ("task", {"more": torch.zeros(2)}), ("threads", None), ("opts", {"g": {"state": {}, "param_groups": []}, "d": {}})], ids=str)
def test_a_state_that_this_version_does_not_know(part, odd, paused, whole_results):
    "Sound by its hashes, but not what we write: refused, and nothing is touched"
    c = max(paused.glob("checkpoint/step-*")); old = (c / "state.pt").read_bytes(); state = torch.load(c / "state.pt", weights_only=True); b = fuzz.io.BytesIO()
    torch.save(state | {part: odd}, b); seal(c, "state.pt", b.getvalue()); before = files(paused, ("lock", "env.json"))
    refused(*on(paused), "use the version that wrote it"); assert files(paused, ("lock", "env.json")) == before
    b = fuzz.io.BytesIO(); torch.save(state | {"newer": {"fact": 1}}, b); seal(c, "state.pt", b.getvalue())                # a fact more is no harm
    assert on(paused)[0] == 0 and same(paused, whole_results("run")) and old


def test_another_config(paused, whole_results):
    before = files(paused, ("lock",)); refused(*on(paused, torture.config(**CFG.model_dump() | {"lr": .5, "seed": 3})), "another config .differs: lr, seed.", "choose another --out"); assert files(paused, ("lock",)) == before
    assert on(paused)[0] == 0 and same(paused, whole_results("run"))


def test_all_at_once(paused, whole_results):
    "The newest checkpoint truncated, the disk full, then only truncated: one line, then the right bytes"
    c = max(paused.glob("checkpoint/step-*")); os.truncate(c / "weights.safetensors", 100)
    code, out = apart(lambda: fit(lambda: torture.job(CFG), CFG, paused, device="cpu", threads=1, quiet=True) and 0, 1000); assert code == 1 and "File too large" in out and load_checkpoint_of(paused) == 3, out
    assert on(paused)[0] == 0 and same(paused, whole_results("run"))


def load_checkpoint_of(run):
    import warnings
    with warnings.catch_warnings(): warnings.simplefilter("ignore"); return load_checkpoint(run / "checkpoint")[0]


# the clock, the data, the device -----------------------------------------------------------------------

def test_a_clock_that_runs_backwards(whole_results, tmp_path):
    "An hour back with each look: the same bytes, sane lines; and max_hours, which counts real seconds, still stops"
    now = [2e9]
    def back(): now[0] -= 3600; return now[0]
    def go(hours=None, folder=tmp_path / "run"):
        time.time = back; r = fit(lambda: torture.job(CFG), CFG, folder, device="cpu", threads=1, max_hours=hours); return 0 if r["seconds"] >= 0 and r["state"] == ("DONE" if hours is None else "PAUSED") else 5
    code, out = apart(lambda: go(0., tmp_path / "run")); assert code == 0 and "paused at step 1" in out, out
    code, out = apart(go); assert code == 0, out
    assert finals(tmp_path) == {k: v for k, v in whole_results("run").items()} and all(re.search(r"img/s=\d+ eta=00:\d\d:\d\d", line) for line in out.splitlines()), out


def test_no_module_measures_time_by_the_wall_clock():
    "What is subtracted comes from time.monotonic or perf_counter; the wall clock is for dates, and for what machines tell each other"
    said = {p.name: len(re.findall(r"time\.time\(\)", p.read_text())) for p in (Path(__file__).parents[1] / "mri_gen").glob("*.py")}
    assert {k for k, n in said.items() if n} == {"sweep.py", "sweep_runs.py"}     # a heartbeat that other machines read; the age of a process


def test_no_module_saves_arrays_with_numpy():
    "`numpy.save` writes through C's buffers: on a full disk it may leave a short file and no error. `datasets.save_array` does not"
    assert [p.name for p in sorted((Path(__file__).parents[1] / "mri_gen").glob("*.py")) if re.search(r"np\.save\((?!b, )", p.read_text())] == ["bench.py", "bench_tasks.py"]      # whose files are scratch


def heads(folder):
    from test_cli import heads as drawn
    x, who = drawn(16, 4); save_slices(folder, SliceSet(np.round(x[:, None] * 255).astype(np.uint8), [dict(subject=s, site="", slice=i, split="dev" if s == "TOY03" else "train", plane="sagittal", data="drawn") for i, s in enumerate(who)]))


@pytest.mark.parametrize("how", ["truncated", "overwritten", "deleted"])
def test_data_that_change_during_a_training(how, tmp_path):
    "A mapped file that shrinks kills whoever reads it (SIGBUS). Tasks copy their data before the first step, so what happens to the file afterwards changes nothing; a resume notices, and says so"
    import mri_gen.batches as batches
    from mri_gen.train import train_task
    heads(tmp_path / "data"); params = dict(steps=6, batch_size=4, chs=[8, 16], save_every=3, log_every=3, val_every=6, precision="fp32"); inner = batches.DeviceData.batch
    def go(name, damage=False, hours=None):
        n = [0]
        def batch(self, idx):
            n[0] += 1
            if damage and n[0] == 4:
                p = tmp_path / "data/train.npy"; os.truncate(p, 200) if how == "truncated" else p.unlink() if how == "deleted" else p.write_bytes(bytes(p.stat().st_size))
            return inner(self, idx)
        batches.DeviceData.batch = batch; train_task("inpaint", "smoke", params, tmp_path / "data", out=tmp_path / "runs", name=name, device="cpu", threads=1, quiet=True, max_hours=hours)
    for words in (("one",), ("half", False, 0.), ("a", True)): code, out = apart(lambda: go(*words)); assert code == 0, out
    assert torture.result(tmp_path / "runs/a") == torture.result(tmp_path / "runs/one")
    refused(*apart(lambda: go("half")), "train.npy|slices.csv|begun with"); assert RunFolder(tmp_path / "runs/half").state == "PAUSED"
    shutil.rmtree(tmp_path / "data"); heads(tmp_path / "data"); code, out = apart(lambda: go("half")); assert code == 0, out
    assert torture.result(tmp_path / "runs/half") == torture.result(tmp_path / "runs/one")


def test_no_gpu(paused, whole_results):
    "Asked for and not there: one line; and `auto` goes on without it"
    if torch.cuda.is_available(): pytest.skip("a machine without a GPU needed")
    refused(*apart(lambda: fit(lambda: torture.job(CFG), CFG, paused, device="cuda", quiet=True) and 0), "--device cuda: this machine has 0 CUDA devices; use --device cpu")
    code, out = apart(lambda: fit(lambda: torture.job(CFG), CFG, paused, device="auto", quiet=True) and 0); assert code == 0 and same(paused, whole_results("run")), out
