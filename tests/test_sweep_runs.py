"Sweeps of an experiment notebook (33_sweep_runs) killed, shared, starved and misled. Single pieces are tested in the notebook"
import csv, fcntl, json, os, random, re, shutil, signal, sys, time
from pathlib import Path

import pytest

import mri_gen.sweep_runs as sweep_runs
from mri_gen.cli import main
from mri_gen.core import UserError
from test_cli import notebook
from test_sweep import until, wait

pytestmark = pytest.mark.slow   # together minutes: `make test`, not `make check`

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS = '''profile: str = "smoke"  # size
data: str = ""          # where slices are
out: str = ""           # run folder
lr: float = 3.0e-4      # learning rate
seed: int = 0
pause: float = 0.0      # seconds
note: str = ""          # anything'''
FILE = """
task: inpaint
grid: {lr: [1e-3, 3e-3, 1e-2, 3e-2], seed: [0, 1]}
params: {pause: 0.3}
jobs: 2
"""
# In place of `mri_gen run`, which needs seconds to start a kernel. `count.txt` says what happened; from "end" on, a SIGTERM changes nothing, as with `mri_gen run` once the last cell has ended
QUICK = """
import json, os, signal, sys, time
words = sys.argv[1:]; get = lambda k: words[words.index(k) + 1]; p = {k: json.loads(v) for k, v in (w.split("=", 1) for o, w in zip(words, words[1:]) if o == "-p")}
run = os.path.join(get("--out"), get("--name"))
def say(what):
    with open(os.path.join(get("--out"), "count.txt"), "a") as f: f.write(f"{what} {get('--name')} {time.monotonic()}\\n")
if p.get("note") == "deaf": signal.signal(signal.SIGTERM, signal.SIG_IGN)
say("begin"); time.sleep(p.get("pause", 0))
if p.get("note") == "fail": raise ValueError("on purpose")
if p.get("note") == "kill": os.kill(os.getpid(), signal.SIGKILL)
if p.get("note") == "big": x = bytearray(400 << 20); x[::4096] = b"1" * len(x[::4096]); time.sleep(2.5)
signal.signal(signal.SIGTERM, signal.SIG_IGN); say("end")
open(os.path.join(run, "nb"), "w").write("{}"); os.replace(os.path.join(run, "nb"), os.path.join(run, "inpaint.ipynb"))
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A checkout with an experiment notebook that only counts"
    d = tmp_path / "home"; (d / "nbs").mkdir(parents=True); shutil.copy(ROOT / "settings.ini", d); (d / "data").mkdir(); (d / "quick.py").write_text(QUICK)
    notebook(d / "nbs/51_inpaint.ipynb", [PARAMETERS, "import os, time\nwith open(os.path.join(os.path.dirname(out), 'count.txt'), 'a') as f: print('begin', os.path.basename(out), time.monotonic(), file=f)\ntime.sleep(pause)\nif note == 'fail': raise ValueError('on purpose')", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwith open(os.path.join(os.path.dirname(out), 'count.txt'), 'a') as f: print('end', os.path.basename(out), time.monotonic(), file=f)"])
    monkeypatch.setenv("MRI_GEN_ROOT", str(d)); monkeypatch.delenv("MRI_GEN_DATA", raising=False); monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sweep_runs, "PROGRAM", (sys.executable, "-S", str(d / "quick.py")))
    return d


def written(home, name="toy", **changes):
    text = FILE
    for k, v in changes.items(): text = re.sub(rf"^{k}: .*\n", "", text, flags=re.M) + (f"{k}: {v}\n" if v is not None else "")
    (home / f"{name}.yaml").write_text(text); return home / f"{name}.yaml"


def go(file, **kw): return sweep_runs.sweep_runs(file, **{"say": lambda _: None} | kw)
def folder_of(home, name="toy"): return home / f"artifacts/runs/inpaint/{name}"
def table(folder): return list(csv.DictReader(open(folder / "runs.csv")))
def states(folder): return [r["state"] for r in table(folder)]


def counted(folder, what="end"):
    "{name: how often}"
    lines = [line.split() for line in (folder / "count.txt").read_text().splitlines()] if (folder / "count.txt").exists() else []
    return {n: sum(x[:2] == [what, n] for x in lines) for n in dict.fromkeys(x[1] for x in lines)}


def together(folder):
    "The most that were at work at the same time"
    lines = sorted((float(x[2]), 1 if x[0] == "begin" else -1) for x in (line.split() for line in (folder / "count.txt").read_text().splitlines()))
    return max(sum(s for _, s in lines[:i]) for i in range(len(lines) + 1))


def process(file, **kw):
    "The sweep in a process of its own, forked (imports cost seconds); its lines are in FILE.PID"
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        with open(f"{file}.{os.getpid()}", "w") as f: go(file, say=lambda x: print(x, file=f, flush=True), **kw)
        code = 0
    except SystemExit as e: code = e.code
    except KeyboardInterrupt: code = 130
    except BaseException: import traceback; traceback.print_exc()
    finally: sys.stdout.flush(); sys.stderr.flush(); os._exit(code)


def killed_until_done(file, folder, patience, least, seed=0):
    "SIGKILL to the sweep at a random time after it has begun a run, `least` times at most; returns how often"
    draw, kills, begun = random.Random(seed), 0, lambda: sum(counted(folder, "begin").values())
    while True:
        before, p, end = begun(), process(file), None
        while end is None or kills == least or time.time() < end:
            got, status = os.waitpid(p, os.WNOHANG)
            if got: assert os.waitstatus_to_exitcode(status) == 0; return kills
            if end is None and begun() > before: end = time.time() + draw.uniform(0, patience)
            time.sleep(.01)
        os.kill(p, signal.SIGKILL); wait(p); kills += 1


# killed -------------------------------------------------------------------------------------------

def test_two_at_a_time(home):
    folder, rows = go(written(home))
    assert counted(folder) == {r["run"]: 1 for r in rows} and len(rows) == 8 and states(folder) == ["done"] * 8 and together(folder) == 2
    assert (folder / "runs.md").read_text().count("| done |") == 8 and [r["run"] for r in rows[:2]] == ["lr=0.001_seed=0", "lr=0.001_seed=1"]


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random(home, seed):
    "Eight runs, two at a time, the sweep killed again and again: each is done exactly once"
    file = written(home, params="{pause: 0.4}"); folder = folder_of(home)
    assert killed_until_done(file, folder, .6, 5, seed) >= 2
    assert counted(folder) == dict.fromkeys(counted(folder), 1) and len(counted(folder)) == 8 and states(folder) == ["done"] * 8
    assert max(counted(folder, "begin").values()) > 1                      # some were cut off and began again


def test_a_run_that_outlives_its_sweep_is_waited_for(home):
    "Where nobody tells it to stop, it goes on; the lock of its log says so"
    file = written(home, params="{pause: 1.5, note: deaf}", grid="{seed: [0, 1]}"); folder = folder_of(home); p = process(file)
    until(lambda: sum(counted(folder, "begin").values()) == 2); os.kill(p, signal.SIGKILL); wait(p); lines = []
    go(file, say=lines.append)
    assert counted(folder, "begin") == counted(folder) == {"seed=0": 1, "seed=1": 1} and states(folder) == ["done"] * 2 and sum("another process is at it" in x for x in lines) == 2


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped(home, number, code):
    file = written(home, params="{pause: 1.0}"); folder = folder_of(home); p = process(file)
    until(lambda: sum(counted(folder, "begin").values()) == 2); os.kill(p, number); assert wait(p) == code
    assert states(folder) == ["open"] * 8 and counted(folder) == dict.fromkeys(counted(folder), 0) and "stopped after" in Path(f"{file}.{p}").read_text()
    assert {r["state"] for r in go(written(home, params="{pause: 1.0}", jobs=8))[1]} == {"done"} and set(counted(folder).values()) == {1}


def test_two_sweeps_of_one_file(home):
    file = written(home); folder = folder_of(home); ps = [process(file), process(file)]
    assert [wait(p) for p in ps] == [0, 0] and counted(folder, "begin") == counted(folder) == dict.fromkeys(counted(folder), 1) and states(folder) == ["done"] * 8


def test_a_stopped_clock(home):
    folder, rows = go(written(home, params="{pause: 30}"), max_hours=1.5 / 3600)
    assert {r["state"] for r in rows} == {"open"} and sum(counted(folder, "begin").values()) == 2
    with open(folder / rows[0]["run"] / "log.txt") as f: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)                # nobody is left


# failed -------------------------------------------------------------------------------------------

def test_failures_are_kept(home, capfd):
    file = written(home, grid="{seed: [0, 1]}", runs="[{note: fail}, {note: kill}, {note: well}]")
    assert main(["sweep", file]) == 3
    out, err = capfd.readouterr(); folder = folder_of(home); rows = table(folder)
    assert [r["state"] for r in rows] == ["failed"] * 4 + ["done"] * 2 and rows[0]["error"] == "ValueError: on purpose" and rows[2]["error"] == "killed by signal 9 (too little memory?)"
    assert "Traceback" in (folder / rows[0]["run"] / "error.txt").read_text() and out.count("failed after") == 4
    assert err.startswith("mri_gen: done, but 4 of 6 runs failed; the first: note=fail_seed=0: ValueError: on purpose") and err.count("\n") == 1
    assert main(["sweep", file]) == 3 and set(counted(folder, "begin").values()) == {1}                               # not again
    assert main(["sweep", file, "--retry"]) == 3 and counted(folder, "begin") == {r["run"]: 1 + (r["state"] == "failed") for r in rows}
    (home / "quick.py").write_text(QUICK.replace('"fail"', '"never"').replace('"kill"', '"never"'))
    assert main(["sweep", file, "--retry"]) == 0 and states(folder) == ["done"] * 6 and not list(folder.glob("*/error.txt")) and {r["error"] for r in table(folder)} == {""}


def test_nothing_starts_before_all_is_checked(home, capfd):
    for change, part in (("{lrr: [1e-3]}", "grid: lrr: no parameter of 51_inpaint.ipynb; known: lr, seed, pause, note"), ("{lr: ['1e-4']}", "lr='1e-4': a text, and float is meant; take the quotes away"), ("{lr: [1e-3, fast]}", "lr='fast'"), ("{lr: [1e-3, -1]}", "lr=-1"), ("{pause: [long]}", "pause='long': 51_inpaint.ipynb takes float"), ("{lr: [1e-3, 0.001]}", "twice"), ("{out: [a]}", "out is the same")):
        assert main(["sweep", written(home, grid=change, params=None)]) == 1
        err = capfd.readouterr().err; assert part in err and err.startswith("mri_gen: ") and err.count("\n") == 1, err
    assert not (home / "artifacts").exists()
    for words, part in ((["--publish"], "--publish: belongs to a search"), (["--pattern", "x"], "--data"), (["--data", "nowhere"], "nowhere"), (["--jobs", "0"], "jobs=0"), (["--memory", "-1"], "memory=-1"), (["--device", "cuda:77"], "CUDA devices")):
        assert main(["sweep", written(home), *words]) == 1 and part in capfd.readouterr().err
    assert main(["sweep", written(home, grid=None, params=None, jobs=None, space="{lr: [1]}", trials=1, metric="x"), "--jobs", "2"]) == 1 and "--jobs: belongs to runs of a notebook" in capfd.readouterr().err
    assert not (home / "artifacts").exists()


# starved ------------------------------------------------------------------------------------------

def test_memory_limits_how_many(home):
    lines = []; folder, _ = go(written(home, grid="{seed: [0, 1, 2]}", memory=1, memory_per_run=.6, jobs=3), say=lines.append)
    assert together(folder) == 1 and lines[1] == "memory: a run takes about 0.6 GiB; 1 at a time fit"
    folder, _ = go(written(home, "wide", grid="{seed: [0, 1, 2]}", params="{pause: 1.5}", memory=2, memory_per_run=.6, jobs=3)); assert together(folder) == 3
    folder, _ = go(written(home, "huge", grid="{seed: [0, 1]}", memory_per_run=10**6)); assert together(folder) == 1                    # more than the machine has: alone they may


def test_memory_is_learned(home):
    "The first one is taken to need all; it needs less, and then two fit"
    folder, rows = go(written(home, grid="{seed: [0, 1, 2]}", params="{note: big}", memory=1, memory_per_run=1, jobs=3))
    assert together(folder) == 2 and all(.39 < r["gib"] < .5 for r in rows), rows


# the real thing -----------------------------------------------------------------------------------

@pytest.fixture
def papermill(home, monkeypatch): monkeypatch.setattr(sweep_runs, "PROGRAM", (sys.executable, "-m", "mri_gen.cli")); return home


@pytest.mark.slow
def test_papermill_killed_and_resumed(papermill):
    "Eight runs by papermill, two at a time, the sweep killed: each is done exactly once"
    file = written(papermill); folder = folder_of(papermill)
    assert killed_until_done(file, folder, 6, 2) >= 1
    rows = table(folder); assert counted(folder) == {r["run"]: 1 for r in rows} and [r["state"] for r in rows] == ["done"] * 8
    nb = json.loads((folder / rows[3]["run"] / "inpaint.ipynb").read_text()); assert nb["metadata"]["papermill"]["parameters"]["lr"] == .003 and nb["metadata"]["papermill"]["parameters"]["seed"] == 1


@pytest.mark.slow
def test_papermill_fails_and_pauses(papermill):
    "A failing cell leaves its traceback; a training that is told to stop leaves a checkpoint and goes on from it"
    cells = [PARAMETERS, "if note == 'fail': raise ValueError('on purpose')", '''import time, torch
from mri_gen.inpaint import Config
from mri_gen.train import Job, adamw, fit
def job():
    net = torch.nn.Linear(1, 1)
    def step(loop, idx): time.sleep(.1); x = loop.nets["net"](idx[:, None].float()).square().mean(); loop.update("net", x); return {"loss": x}
    return Job({"net": net}, {"net": adamw(net, cfg)}, step, 8)
cfg = Config.profile("smoke", steps=60, batch_size=2, log_every=10, val_every=60, save_every=60, precision="fp32", ema=0.)
print(fit(job, cfg, out, device="cpu")["state"])''']
    notebook(papermill / "nbs/51_inpaint.ipynb", cells); file = written(papermill, grid=None, params=None, runs="[{note: fail}, {note: well}]"); folder = folder_of(papermill); p = process(file)
    log = folder / "note=well/log.txt"
    until(lambda: log.exists() and "step=10/60" in log.read_text() and (folder / "note=fail/error.txt").exists(), 120); os.kill(p, signal.SIGTERM); assert wait(p) == 143
    assert "ValueError: on purpose" in (folder / "note=fail/error.txt").read_text() and "on purpose" in table(folder)[0]["error"] and states(folder) == ["failed", "open"]
    assert 0 < json.loads((folder / "note=well/PAUSED").read_text())["step"] < 60
    _, rows = go(file); assert [r["state"] for r in rows] == ["failed", "done"] and rows[1]["gib"] > .1 and json.loads((folder / "note=well/DONE").read_text())["step"] == 60


# the table ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("slug", ["generate", "inpaint", "mmgan", "vqvae", "cyclegan", "sr3d"])
def test_headline_figures_of_every_task(slug):
    "What is shipped, read as if it were a run"
    from mri_gen.metrics import load_metrics
    from mri_gen.train import task_module
    folder = ROOT / "artifacts" / slug; study = sweep_runs.Runs.check(study="x", task=slug); run = sweep_runs.Run("x", folder, {}, {}, task_module(slug).Config.profile("full"), {})
    got = sweep_runs.figures_of(run, study); known = {r["mean"] for r in load_metrics(folder / "metrics.json")}
    assert got and set(got.values()) <= known and all(k.split()[0] in (("psnr", "ssim") if slug != "generate" else ("kernel_distance", "kernel_ratio", "frechet_distance", "density", "coverage", "intensity_distance", "spectrum_distance", "memorised", "memorised_features")) for k in got), got
    with pytest.raises(UserError, match="metric: dice: x measured no such thing"): sweep_runs.figures_of(run, study.model_copy(update=dict(metric=["dice"])))
