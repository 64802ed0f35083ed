"The engine under fire (12_checkpoint, 13_train): kills, broken files, full disks, many processes, precision. Single pieces are tested in the notebooks; the task is tests/torture.py's"
import hashlib, json, os, pickle, shutil, signal, subprocess, sys, tempfile, threading, time, types, warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import mri_gen.checkpoint as checkpoint
import mri_gen.core as core
import mri_gen.train as train
from mri_gen.checkpoint import flatten, load_checkpoint, load_weights
from mri_gen.core import RunFolder, UserError
from mri_gen.batches import indices
from mri_gen.datasets import SliceSet, check_array, read_array, save_slices
from mri_gen.train import Job, TrainConfig, fit

sys.path.insert(0, str(Path(__file__).parent))
import torture

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
CFG = torture.config()


class Crash(Exception): pass


def job(cfg, at=None, act=None):
    "The torture task; before step `at`, `act(loop)` happens (default: a crash)"
    j = torture.job(cfg); inner = j.step
    def step(loop, idx):
        if loop.step == at:
            if act is None: raise Crash
            act(loop)
        return inner(loop, idx)
    j.step = step
    return j


def go(folder, cfg=CFG, at=None, act=None, **kw): return fit(lambda: job(cfg, at, act), cfg, folder, **{"device": "cpu", "threads": 1, "quiet": True, **kw})


def crashed(folder, at=18, cfg=CFG):
    with pytest.raises(Crash): go(folder, cfg, at)
    return folder


@pytest.fixture(autouse=True)
def same_threads():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "{file: bytes} of the run that nobody disturbed"
    d = tmp_path_factory.mktemp("one"); torch.set_num_threads(1)
    assert go(d)["state"] == "DONE"
    return torture.result(d)


def differ(a, b): return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))


# resume ------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_torture():
    "A fixed small set of kills; the long one is `python tests/torture.py --kills 60 --seed 0`"
    r = subprocess.run([sys.executable, ROOT / "tests/torture.py", "--kills", "8", "--seed", "7"], capture_output=True, text=True, env=ENV, timeout=300)
    assert r.returncode == 0 and "8 of 8 kills survived" in r.stdout, r.stdout + r.stderr


def flip(p): b = bytearray(p.read_bytes()); b[len(b) // 2] ^= 1; p.write_bytes(b)
BREAK = {
    "flipped bit": lambda c: flip(c / "weights.safetensors"), "truncated": lambda c: os.truncate(c / "state.pt", 100), "empty": lambda c: (c / "state.pt").write_bytes(b""),
    "missing file": lambda c: (c / "weights.safetensors").unlink(), "no manifest": lambda c: (c / "manifest.json").unlink(), "empty folder": lambda c: (shutil.rmtree(c), c.mkdir()),
    "manifest of nothing": lambda c: (c / "manifest.json").write_text('{"sha256": {}}')}


@pytest.mark.parametrize("how", BREAK)
def test_a_broken_checkpoint_falls_back(how, tmp_path, undisturbed):
    d = crashed(tmp_path / "a"); BREAK[how](d / "checkpoint/step-00000015")
    with pytest.warns(UserWarning, match="step-00000015: broken checkpoint"): go(d)
    assert differ(torture.result(d), undisturbed) == []


def test_all_broken_is_an_error_and_nothing_is_touched(tmp_path):
    d = crashed(tmp_path / "a")
    for p in d.glob("checkpoint/step-*"): flip(p / "state.pt")
    tree = lambda: {str(p): p.read_bytes() for p in d.rglob("*") if p.is_file() and p.name != "lock"}
    before = tree()
    with pytest.warns(UserWarning), pytest.raises(UserError, match="step-00000015, step-00000010.*nothing was overwritten"): go(d)
    assert tree() == before


def test_a_checkpoint_without_the_newer_facts_still_resumes(tmp_path, undisturbed):
    d = crashed(tmp_path / "a"); c = max(d.glob("checkpoint/step-*"))
    state = torch.load(c / "state.pt", weights_only=True)
    for k in ("device", "precision", "samples"): del state[k]
    torch.save(state, c / "state.pt"); seal(c)
    go(d); assert differ(torture.result(d), undisturbed) == []


def seal(c):
    "A manifest that fits"
    (c / "manifest.json").write_text(json.dumps({"sha256": {n: hashlib.sha256((c / n).read_bytes()).hexdigest() for n in ("weights.safetensors", "state.pt")}}))


def test_max_hours_stops_before_the_limit(tmp_path, undisturbed):
    d, limit, t = tmp_path / "a", 1.2, time.monotonic()
    slow = lambda: torture.job(CFG)
    def make():
        j = slow(); inner = j.step
        def step(loop, idx): time.sleep(.1); return inner(loop, idx)
        j.step = step
        return j
    r = fit(make, CFG, d, device="cpu", threads=1, quiet=True, max_hours=limit / 3600)
    assert r["state"] == "PAUSED" == RunFolder(d).state and 0 < r["step"] < CFG.steps and time.monotonic() - t < limit + .3      # the last checkpoint included
    assert go(d, max_hours=0)["step"] == r["step"] + 1                     # no time at all: still one step a call
    assert go(d)["state"] == "DONE" and not (d / "PAUSED").exists()
    assert differ(torture.result(d), undisturbed) == []


def test_a_signal_in_the_last_step_ends_the_program_and_the_run_is_done(tmp_path, undisturbed):
    with pytest.raises(SystemExit) as e: go(tmp_path, at=CFG.steps - 1, act=lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert e.value.code == 143 and RunFolder(tmp_path).state == "DONE" and differ(torture.result(tmp_path), undisturbed) == []


def test_in_another_thread(tmp_path, undisturbed):
    "No handler can be set there; training works, and the main thread's handlers stay"
    before, out = signal.getsignal(signal.SIGINT), []
    t = threading.Thread(target=lambda: out.append(go(tmp_path)["state"])); t.start(); t.join()
    assert out == ["DONE"] and signal.getsignal(signal.SIGINT) is before and differ(torture.result(tmp_path), undisturbed) == []


@pytest.mark.slow
def test_interrupting_the_kernel(tmp_path):
    from jupyter_client.manager import start_new_kernel
    km, kc = start_new_kernel(kernel_name="python3", env=ENV)
    try:
        code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\nimport torture; torture.fit(lambda: torture.job(torture.config(steps=100000)), torture.config(steps=100000), {str(tmp_path)!r}, device='cpu', threads=1, quiet=True)"
        msg = kc.execute(code)
        for _ in range(600):
            if any(tmp_path.glob("checkpoint/step-*")): break
            time.sleep(.1)
        km.interrupt_kernel()
        while (r := kc.get_shell_msg(timeout=30))["parent_header"].get("msg_id") != msg: pass
        assert r["content"].get("ename") == "KeyboardInterrupt" and RunFolder(tmp_path).state == "PAUSED"
        for _ in range(50):                                          # what reaches a kernel while it clears its queue is aborted
            if (r := kc.execute_interactive("1 + 1", timeout=30))["content"]["status"] != "aborted": break
            time.sleep(.1)
        assert r["content"]["status"] == "ok"                        # the kernel lives
    finally: kc.stop_channels(); km.shutdown_kernel(now=True)


def test_threads_are_those_of_the_first_run(tmp_path):
    go(tmp_path, threads=2, max_hours=0); torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error"); go(tmp_path, threads=None, max_hours=0)
    assert torch.get_num_threads() == 2 == json.loads((tmp_path / "env.json").read_text())["threads"]
    with pytest.warns(UserWarning, match="begun with threads=2, goes on with 1"): go(tmp_path, threads=1, max_hours=0)


def test_each_group_keeps_its_own_learning_rate(tmp_path):
    def make():
        j = torture.job(CFG); a, b = j.nets["g"][0].parameters()
        j.opts["g"] = torch.optim.AdamW([{"params": [a]}, {"params": [b], "lr": 1e-4}], CFG.lr); inner = j.step
        def step(loop, idx): seen.append([g["lr"] for g in j.opts["g"].param_groups]); return inner(loop, idx)
        j.step = step
        return j
    seen = []; fit(make, CFG, tmp_path, device="cpu", max_hours=0, quiet=True); fit(make, CFG, tmp_path, device="cpu", quiet=True)
    assert seen == [[lr * train.lr_factor(s, CFG) for lr in (CFG.lr, 1e-4)] for s in range(CFG.steps)]


# the disk ----------------------------------------------------------------------------------------

def full_writes(monkeypatch, module): monkeypatch.setattr(module, "open", lambda path, mode="r", **kw: open("/dev/full" if "w" in mode else path, mode, **kw), raising=False)


def full_path(monkeypatch, method, suffix):
    inner = getattr(Path, method)
    def f(self, *a, **kw):
        if suffix not in self.name: return inner(self, *a, **kw)
        raise OSError(28, os.strerror(28))
    monkeypatch.setattr(Path, method, f)


FULL = {"checkpoint": lambda m: full_writes(m, checkpoint), "metrics.csv": lambda m: full_writes(m, core),
        "weights": lambda m: full_path(m, "write_bytes", "weights.safetensors.partial"), "DONE": lambda m: full_path(m, "write_text", "DONE")}


@pytest.mark.parametrize("where", FULL)
def test_a_full_disk(where, tmp_path, undisturbed, monkeypatch):
    if not Path("/dev/full").exists(): pytest.skip("/dev/full needed")
    d = crashed(tmp_path / "a"); before = load_checkpoint(d / "checkpoint")[0]
    with monkeypatch.context() as m:
        FULL[where](m)
        with pytest.raises(UserError, match="No space left on device"): go(d)
    assert RunFolder(d).state == "running" and load_checkpoint(d / "checkpoint")[0] >= before and not list(d.rglob("*.partial")) and not (d / "checkpoint/writing").exists()
    assert go(d)["state"] == "DONE" and differ(torture.result(d), undisturbed) == []


@pytest.fixture
def nobody():
    "A folder of ours that we may read but not write"
    d = Path(tempfile.mkdtemp()); me = os.geteuid()
    def drop():
        for p in [d, *d.rglob("*")]: p.chmod(0o555 if p.is_dir() else 0o444)
        if me == 0: os.seteuid(65534)
    yield d, drop
    os.seteuid(me)
    for p in [d, *d.rglob("*")]: p.chmod(0o755 if p.is_dir() else 0o644)
    shutil.rmtree(d)


def test_a_read_only_folder(nobody):
    d, drop = nobody; crashed(d / "a"); (d / "b").mkdir(); drop()
    for run in ("a", "b", "new"):
        with pytest.raises(UserError, match="choose another --out"): go(d / run)
    with pytest.raises(UserError, match="Permission denied.*earlier ones are intact"): checkpoint.save_checkpoint(d / "a/checkpoint", 99, {}, {})
    assert load_checkpoint(d / "a/checkpoint")[0] == 15


# not finite ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("what", ["loss", "figure", "gradient"])
def test_not_finite_names_the_step_and_never_reaches_a_checkpoint(what, precision, tmp_path):
    "In the step before a checkpoint, so that nothing but the check itself can see it"
    cfg = torture.config(precision=precision, log_every=100, grad_clip=0); at = 2 * cfg.save_every - 1
    def make():
        j = torture.job(cfg); inner = j.step
        def step(loop, idx):
            out = inner(loop, idx)
            if loop.step == at:
                w = loop.nets["g"][0].weight
                if what == "loss": loop.update("g", w.sum() / 0)
                if what == "gradient": loop.update("g", (w - w.detach()).square().sum().sqrt())      # loss 0, gradient 0/0
                if what == "figure": out["figure"] = torch.tensor(float("inf"))
            return out
        j.step = step
        return j
    with pytest.raises(UserError) as e: fit(make, cfg, tmp_path, device="cpu", quiet=True)
    assert f"step {at} (0-based), samples {indices(cfg.seed, at, cfg.batch_size, 40).tolist()}" in str(e.value) and "last good checkpoint is kept" in str(e.value)
    assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == [f"step-{cfg.save_every:08d}"]
    assert all(torch.isfinite(v).all() for v in flatten(load_checkpoint(tmp_path / "checkpoint")[1]).values())


# files that could not be read ----------------------------------------------------------------------

LOST = [dict(subject="S3", file="in/S3/T1.nii.gz", reason="in/S3/T1.nii.gz: truncated; copy it again"), dict(subject="S5", file="in/S5/T1.nii.gz", reason="empty")]


@pytest.fixture
def toy(monkeypatch):
    "A task `toy` whose data lacked LOST"
    task = types.ModuleType("mri_gen.toy"); task.lost = LOST
    class Config(TrainConfig): PROFILES = {"smoke": CFG.model_dump()}
    task.Config, task.job = Config, lambda cfg, data, device: torture.job(cfg)
    task.load_data = lambda cfg, data, pattern: SliceSet(np.zeros((1, 1, 8, 8), np.uint8), [dict(subject="S1", split="train")], task.lost)
    monkeypatch.setitem(sys.modules, "mri_gen.toy", task)
    return task


def test_skipped_files_are_listed_and_the_exit_code_says_so(toy, tmp_path, capsys):
    "Also when the finished run is started again: it was trained without them, however often one asks"
    for _ in range(2):
        assert train.main(["toy", "--out", str(tmp_path), "--name", "a", "--device", "cpu", "--threads", "1"]) == 3
        out, err = capsys.readouterr()
        assert out.splitlines()[-1] == f"DONE step={CFG.steps} skipped=2 run={tmp_path / 'a'}"
        assert err == f"mri_gen.train: done, but 2 files were skipped; the first: in/S3/T1.nii.gz: truncated; copy it again (all: {tmp_path / 'a/skipped.csv'})\n"
    assert core.read_skipped(tmp_path / "a") == LOST


def test_a_list_of_skipped_files_is_that_of_the_last_start(toy, tmp_path, capsys):
    words = ["toy", "--out", str(tmp_path), "--name", "a", "--device", "cpu", "--threads", "1"]
    assert train.main([*words, "--max-hours", "0"]) == 3 and "PAUSED step=1 skipped=2" in capsys.readouterr().out
    toy.lost = []                                                          # mended, and of no consequence for the samples
    assert train.main(words) == 0 and not (tmp_path / "a/skipped.csv").exists() and "skipped=" not in capsys.readouterr().out


def test_a_checkpoint_of_another_architecture(tmp_path):
    d = crashed(tmp_path / "a")
    def make():
        j = torture.job(CFG); k = next(iter(j.nets)); j.nets[k] = torch.nn.Sequential(j.nets[k], torch.nn.Conv2d(1, 1, 1))
        return j
    with pytest.raises(UserError, match="a/checkpoint: the weights do not fit: .* is missing there"): fit(make, CFG, d, device="cpu", threads=1, quiet=True)


# many processes -----------------------------------------------------------------------------------

def torchrun(*words, n=2): return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", f"--master_port={29500 + os.getpid() % 2000}", *map(str, words)]


def largest(a, b): return max((a[k].float() - b[k].float()).abs().max().item() for k in a.keys() | b.keys())


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_it_resumes_in_other_numbers(tmp_path):
    "1 process, then 2 of which one is killed, then 1: as if nothing had happened, to 1e-5 (sums in another order, 12 steps of two networks that train against each other)"
    one, d, steps = tmp_path / "one", tmp_path / "a", 12
    cfg = torture.config(steps=steps, log_every=2, save_every=3); plain = lambda: torture.job(cfg, dropout=0, norm=False)
    assert fit(plain, cfg, one, device="cpu", threads=1, quiet=True)["state"] == "DONE"
    assert fit(plain, cfg, d, device="cpu", threads=1, quiet=True, max_hours=0)["step"] == 1
    p = subprocess.Popen(torchrun(ROOT / "tests/torture.py", "--fit", d, "--steps", steps, "--pause", .3), env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for _ in range(600):
            if (d / "checkpoint/step-00000006").exists() or p.poll() is not None: break
            time.sleep(.05)
        with pytest.raises(UserError, match=f"process {(d / 'pid-0').read_text()} is writing here"): fit(plain, cfg, d, device="cpu")
        os.kill(int((d / "pid-1").read_text()), signal.SIGKILL)
        out = p.communicate(timeout=60)[0]; assert p.returncode != 0, out
    finally: p.kill(); p.wait()
    assert RunFolder(d).state == "running" and "rank 1 writes" not in out, out
    assert fit(plain, cfg, d, device="cpu", threads=1, quiet=True)["state"] == "DONE"
    (_, wa, sa), (_, wb, sb) = (load_checkpoint(x / "checkpoint") for x in (one, d))
    assert largest(flatten(wa), flatten(wb)) < 1e-5 and largest(sa["task"], sb["task"]) < 1e-5
    rows = [np.genfromtxt(x / "metrics.csv", delimiter=",", skip_header=1) for x in (one, d)]
    np.testing.assert_allclose(*rows, rtol=1e-4)


@pytest.mark.slow
def test_torchrun_equals_one_process(tmp_path):
    """The command of the README, 5 steps: what the networks do agrees to 1e-5. (Weights to 1e-3: where a gradient is zero but for rounding, as for a bias before a norm, Adam makes steps of the noise)"""
    from test_cli import heads
    from mri_gen.inpaint import Config, build
    x, who = heads(24, 8)
    save_slices(tmp_path / "slices", SliceSet(np.round(x[:, None] * 255).astype(np.uint8), [dict(subject=s, site="", slice=i, split="dev" if s > "TOY05" else "train", plane="sagittal", data="drawn") for i, s in enumerate(who)]))
    words = ["inpaint", "-p", "steps=5", "-p", "batch_size=8", "-p", "chs=[8,16]", "-p", "precision=fp32", "--data", str(tmp_path / "slices"), "--out", str(tmp_path), "--device", "cpu", "--threads", "1"]
    assert train.main([*words, "--name", "one"]) == 0
    r = subprocess.run(torchrun("-m", "mri_gen.train", *words, "--name", "two"), env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0 and r.stdout.count("DONE step=5") == 1, r.stdout + r.stderr
    (one, meta), (two, _) = (load_weights(tmp_path / n / "weights.safetensors") for n in ("one", "two"))
    assert largest(one["unet"], two["unet"]) < 1e-3
    net, y = build(Config.check(**meta["config"]))["unet"].eval(), []
    for w in (one, two):
        net.load_state_dict(w["unet"])
        with torch.no_grad(): y.append(net(torch.from_numpy(x[:4, None]), torch.ones(4, 1, 64, 64)))
    assert (y[0] - y[1]).abs().max() < 1e-5
    rows = [np.genfromtxt(tmp_path / n / "metrics.csv", delimiter=",", skip_header=1) for n in ("one", "two")]
    np.testing.assert_allclose(*rows, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("slug", ["generate", "mmgan", "vqvae", "cyclegan", "sr3d"])
def test_torchrun_equals_one_process_for_every_task(slug, tmp_path):
    "Simulated heads, 4 steps: figures to 1e-4, weights to 1e-3. Only the last phase of vqvae and cyclegan, on whole slices (`whole`), shares them out by another rule, which its description says"
    words = [slug, *(w for k, v in dict(steps=4, warmup=0, log_every=1, val_every=4, precision="fp32", **({"whole": 0} if slug in ("vqvae", "cyclegan") else {})).items() for w in ("-p", f"{k}={v}")), "--out", str(tmp_path), "--device", "cpu", "--threads", "1"]
    env = {k: v for k, v in ENV.items() if k != "MRI_GEN_DATA"}
    for name, run in (("one", [sys.executable]), ("two", torchrun())):
        r = subprocess.run([*run, "-m", "mri_gen.train", *words, "--name", name], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300); assert r.returncode == 0, r.stdout + r.stderr
    one, two = (flatten(load_weights(tmp_path / n / "weights.safetensors")[0]) for n in ("one", "two"))
    assert largest(one, two) < 1e-3
    np.testing.assert_allclose(*(np.genfromtxt(tmp_path / n / "metrics.csv", delimiter=",", skip_header=1) for n in ("one", "two")), rtol=1e-4)


def test_a_batch_that_cannot_be_shared(monkeypatch, tmp_path):
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True); monkeypatch.setattr(train.dist, "get_rank", lambda: 0); monkeypatch.setattr(train.dist, "get_world_size", lambda: 3)
    with pytest.raises(UserError, match="batch_size=8 cannot be shared by 3"): go(tmp_path)


# precision ----------------------------------------------------------------------------------------

def test_a_t4_gets_fp16_although_it_claims_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    for capability, want in (((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: capability)
        assert core.has_bf16("cuda") is (want == "bf16") and core.pick_precision("auto", torch.device("cuda")) == want
    for has, want in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has, raising=False)
        assert core.pick_precision("auto", "cpu") == want


@pytest.fixture
def fp16(monkeypatch):
    "What a T4 does, on this processor: float16 and a loss scaler"
    monkeypatch.setattr(train, "pick_precision", lambda name, device: "fp16")


def test_fp16_resumes_with_its_scaler(fp16, tmp_path):
    big = lambda loop: setattr(loop, "scaler", type(loop.scaler)("cpu", init_scale=2.**40)) or loop.scaler.scale(torch.ones(1))    # overflows: the scaler halves and skips
    go(tmp_path / "one", at=3, act=big); _, _, s = load_checkpoint(tmp_path / "one/checkpoint")
    assert 1 < s["scaler"]["scale"] < 2**40 and json.loads((tmp_path / "one/DONE").read_text())["precision"] == "fp16"
    for at in (18, 23):
        with pytest.raises(Crash): fit(lambda: job_twice(CFG, big, at), CFG, tmp_path / "a", device="cpu", threads=1, quiet=True)
    go(tmp_path / "a"); assert differ(torture.result(tmp_path / "a"), torture.result(tmp_path / "one")) == []


def job_twice(cfg, act, crash):
    j = job(cfg, 3, act); inner = j.step
    def step(loop, idx):
        if loop.step == crash: raise Crash
        return inner(loop, idx)
    j.step = step
    return j


def test_fp16_that_overflows_for_ever_is_an_error(fp16, tmp_path):
    def make():
        j = torture.job(CFG); j.step = lambda loop, idx: loop.update("g", (w := loop.nets["g"][0].weight).sum() + (w - w.detach()).square().sum().sqrt()) or {"loss": torch.zeros(())}
        return j
    with pytest.raises(UserError, match="fp16 gradients overflow again and again"): fit(make, torture.config(save_every=100, log_every=32, val_every=100), tmp_path, device="cpu", quiet=True)


def test_precision_changes_with_a_warning(tmp_path, monkeypatch):
    "As when a run that began on one machine goes on, with precision=auto, on another"
    cfg = torture.config(precision="auto")
    monkeypatch.setattr(train, "pick_precision", lambda *_: "fp32"); go(tmp_path, cfg, max_hours=0)
    monkeypatch.setattr(train, "pick_precision", lambda *_: "fp16")
    with pytest.warns(UserWarning, match="begun with precision=fp32, goes on with fp16"): go(tmp_path, cfg)


def test_two_precisions_in_one_process(tmp_path, undisturbed):
    go(tmp_path / "bf16", torture.config(precision="bf16")); go(tmp_path / "fp32")
    assert differ(torture.result(tmp_path / "fp32"), undisturbed) == [] and differ(torture.result(tmp_path / "bf16"), undisturbed) != []
    assert {v.dtype for v in flatten(load_checkpoint(tmp_path / "bf16/checkpoint")[1]).values() if v.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("changes", [dict(channels_last=True), dict(ema=0), dict(grad_clip=0), dict(compile=True)], ids=str)
def test_resume_with_other_settings(changes, tmp_path, monkeypatch, undisturbed):
    "Also: names of parameters are the same with `torch.compile` (here without its code generator, which takes minutes)"
    inner = torch.compile; monkeypatch.setattr(torch, "compile", lambda n: inner(n, backend="eager"))
    cfg = torture.config(**changes)
    go(tmp_path / "one", cfg); crashed(tmp_path / "a", cfg=cfg); go(tmp_path / "a", cfg)
    assert differ(torture.result(tmp_path / "one"), torture.result(tmp_path / "a")) == []
    names = {k for k in flatten(load_checkpoint(tmp_path / "a/checkpoint")[1]) if not k.startswith("ema")}
    assert names == {f"{n}/{k}" for n, net in torture.job(cfg).nets.items() for k in net.state_dict()}


# no pickle is ever executed -----------------------------------------------------------------------

@pytest.fixture
def evil(tmp_path):
    "(object whose unpickling makes a folder, that folder)"
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "pwned"),)
    return Evil(), tmp_path / "pwned"


def test_a_malicious_checkpoint_is_refused(evil, tmp_path, undisturbed):
    e, pwned = evil
    pickle.loads(pickle.dumps(e)); assert pwned.exists(); pwned.rmdir()                          # it would
    d = crashed(tmp_path / "a"); c = max(d.glob("checkpoint/step-*"))
    for raw in (lambda p: p.write_bytes(pickle.dumps({"opts": e}, 2)), lambda p: torch.save({"opts": e}, p), lambda p: torch.save({"opts": e}, p, _use_new_zipfile_serialization=False)):
        raw(c / "state.pt"); seal(c)
        with pytest.warns(UserWarning, match="broken checkpoint"): assert load_checkpoint(d / "checkpoint")[0] == 10
    with pytest.warns(UserWarning, match="broken checkpoint"): go(d)
    assert not pwned.exists() and differ(torture.result(d), undisturbed) == []


def test_malicious_arrays_and_weights_are_refused(evil, tmp_path):
    e, pwned = evil; a = np.empty(1, object); a[0] = e
    np.save(tmp_path / "a.npy", a, allow_pickle=True); np.savez(tmp_path / "b.npz", images=a); (tmp_path / "c.npy").write_bytes(pickle.dumps(e))
    (tmp_path / "d.npy").write_bytes((tmp_path / "b.npz").read_bytes()); (tmp_path / "w.safetensors").write_bytes(pickle.dumps(e)); torch.save(e, tmp_path / "v.safetensors")
    for f in ("a.npy", "b.npz", "c.npy", "d.npy"):
        for read in (read_array, check_array):
            with pytest.raises(UserError, match=f.replace(".", r"\.")): read(tmp_path / f)
    for f in ("w.safetensors", "v.safetensors"):
        with pytest.raises(UserError, match="not a safetensors file"): load_weights(tmp_path / f)
    assert not pwned.exists()
