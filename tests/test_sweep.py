"The search (33_sweep) killed, shared and misled. Single pieces are tested in the notebook"
import csv, json, os, re, signal, sys, time, types
from pathlib import Path

import pytest
import torch

import mri_gen.sweep as sweep
import mri_gen.train as train
from mri_gen.core import UserError, environment
from mri_gen.train import Job, TrainConfig, adamw

POISON = .0041
STUDY = """
task: toysearch
space:
  lr: {low: 1e-3, high: 1, log: true}
  beta1,beta2: [[0.7, 0.9], [0.9, 0.999]]
  chs: [[4], [8, 4]]
trials: 4
metric: [error, other]
direction: minimize
params: {steps: 16}
"""


class Config(TrainConfig):
    PROFILES = {"full": dict(steps=12, batch_size=4, warmup=0, log_every=8, val_every=8, save_every=5, precision="fp32", grad_clip=0.)}
    chs: tuple[int, ...] = (4,)
    pause: float = 0
    poison: float = 0     # a learning rate above it diverges


def job(cfg, data, device):
    x = torch.linspace(-1, 1, 16)[:, None]; y = (3 * x).sin()
    net = torch.nn.Sequential(torch.nn.Linear(1, cfg.chs[0]), torch.nn.Tanh(), *(torch.nn.Linear(a, b) for a, b in zip(cfg.chs, [*cfg.chs[1:], 1])))
    def step(loop, idx):
        time.sleep(float(os.environ.get("TOY_PAUSE", 0)))
        loss = (loop.nets["net"](x[idx]) - y[idx]).square().mean()
        if cfg.poison and cfg.lr > cfg.poison: loss = loss * float("nan")
        loop.update("net", loss)
        return {"loss": loss}
    error = lambda nets: (nets["net"](x) - y).square().mean().item()
    return Job({"net": net}, {"net": adamw(net, cfg)}, step, len(x), validate=lambda nets: {"error": error(nets), "other": 2 * error(nets)})


sys.modules["mri_gen.toysearch"] = types.SimpleNamespace(Config=Config, load_data=lambda *_: None, job=job)


def go(file, **kw): return sweep.sweep(file, say=lambda _: None, device="cpu", threads=1, **kw)


def written(d, name="search", **changes):
    "A study's file in `d`, its runs below `d`"
    d.mkdir(exist_ok=True, parents=True); text = STUDY + f"out: {d}\n"
    for k, v in changes.items(): text = re.sub(rf"^{k}: .*\n", "", text, flags=re.M) + (f"{k}: {v}\n" if v is not None else "")
    (d / f"{name}.yaml").write_text(text); return d / f"{name}.yaml"


def result(folder):
    "All that must be equal: trials, and the winner (whose file names another folder)"
    best = json.loads((folder / "best.json").read_text()); best.pop("file_sha256")
    return (folder / "search.csv").read_bytes(), best, (folder / "search.png").read_bytes()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    now = environment()                                                # asks git each time
    with pytest.MonkeyPatch.context() as m: m.setattr(train, "environment", lambda device: now); yield
    torch.set_num_threads(n)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder, counts, best = go(written(tmp_path_factory.mktemp("one")))
    assert counts == {"done": 4}
    return result(folder)


def process(file, pause=0.):
    "The search in a process of its own, forked (imports cost seconds); its lines are in FILE.PID"
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        os.environ["TOY_PAUSE"] = str(pause)
        with open(f"{file}.{os.getpid()}", "w") as f: sweep.sweep(file, device="cpu", threads=1, say=lambda x: print(x, file=f, flush=True))
        code = 0
    except BaseException: import traceback; traceback.print_exc()
    finally: sys.stdout.flush(); sys.stderr.flush(); os._exit(code)


def wait(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def until(condition, seconds=60):
    t = time.time()
    while not condition():
        assert time.time() - t < seconds, "nothing happens"
        time.sleep(.01)


# killed -------------------------------------------------------------------------------------------

def test_killed_in_the_middle_of_a_trial(tmp_path, undisturbed):
    "Trial 2 is taken up under its number, from its checkpoint; trials, winner and picture are those of the undisturbed search"
    file = written(tmp_path); folder = tmp_path / "search"; p = process(file, pause=.05)
    try: until(lambda: (folder / "trial-0001/checkpoint/step-00000010").exists())
    finally: os.kill(p, signal.SIGKILL); assert wait(p) == -signal.SIGKILL
    assert not (folder / "trial-0001/DONE").exists() and (folder / "trial-0000/DONE").exists()
    done, made = (folder / "trial-0000/DONE").read_bytes(), []
    inner = job
    def counted(cfg, *a):
        j = inner(cfg, *a); step = j.step
        def f(loop, idx): made.append(loop.step); return step(loop, idx)
        j.step = f
        return j
    sys.modules["mri_gen.toysearch"].job = counted
    try: assert go(file)[1] == {"done": 4}
    finally: sys.modules["mri_gen.toysearch"].job = inner
    assert made[0] in (10, 15) and (folder / "trial-0000/DONE").read_bytes() == done
    assert result(folder) == undisturbed and len(list(folder.glob("trial-*"))) == 4


@pytest.mark.parametrize("where", ["ask", "suggest", "train", "tell"])
def test_dead_at_every_stage(where, tmp_path, undisturbed, monkeypatch):
    "The process ends before optuna's number is used, with half of the draws, before the training, and between its end and the database"
    class Dead(BaseException): pass
    file = written(tmp_path)
    with monkeypatch.context() as m:
        if where == "ask": import optuna; inner = optuna.Study.ask; m.setattr(optuna.Study, "ask", lambda self: (inner(self), (_ for _ in ()).throw(Dead)))
        if where == "suggest": import optuna; m.setattr(optuna.trial.Trial, "suggest_categorical", lambda *a: (_ for _ in ()).throw(Dead))
        if where == "train": m.setattr(sweep, "train_task", lambda *a, **k: (_ for _ in ()).throw(Dead))
        if where == "tell": m.setattr(sweep, "_tell", lambda *a: (_ for _ in ()).throw(Dead))
        with pytest.raises(Dead): go(file)
    assert go(file)[1] == {"done": 4} and result(tmp_path / "search") == undisturbed


def test_out_of_time_and_finished(tmp_path, undisturbed, monkeypatch):
    file = written(tmp_path)
    folder, counts, best = go(file, max_hours=0)
    assert counts == {"open": 1} and best is None and (folder / "trial-0000/PAUSED").exists()
    with pytest.raises(UserError, match="no such file"): sweep.apply(folder)
    assert go(file)[1] == {"done": 4} and result(folder) == undisturbed
    monkeypatch.setattr(sweep, "train_task", None)
    t = time.monotonic(); assert go(file)[1] == {"done": 4} and time.monotonic() - t < 5


# shared -------------------------------------------------------------------------------------------

def test_two_processes_share_the_work(tmp_path, undisturbed):
    "Each trial is trained once, by one of them; the results are those of one process"
    file = written(tmp_path); ps = [process(file, pause=.03) for _ in range(2)]
    assert [wait(p) for p in ps] == [0, 0]
    who = [[int(n) for n in re.findall(r"^trial-(\d+)", Path(f"{file}.{p}").read_text(), re.M)] for p in ps]
    assert sorted(who[0] + who[1]) == [0, 1, 2, 3] and all(who), who
    assert result(tmp_path / "search") == undisturbed


def test_a_result_told_between_the_look_and_the_claim(tmp_path, monkeypatch):
    "The list of trials is a moment old: one that has finished since is passed over"
    study = sweep.read_study(written(tmp_path, trials=2)); folder = sweep.study_folder(study); folder.mkdir(); found = sweep.open_study(study, folder)
    trial, lock = sweep.claim(study, found, folder); before = found.get_trials()
    sweep._tell(found, trial, 1., ""); lock.close()
    monkeypatch.setattr(found, "get_trials", lambda deepcopy: before)
    assert sweep.claim(study, found, folder)[0].number == 1


def test_machines_that_share_only_the_database(tmp_path, undisturbed):
    "What another folder works at is left alone while its heart beats, and taken up when it has stopped"
    import optuna
    url = f"sqlite:///{tmp_path / 'shared.db'}"; a, b = (written(tmp_path / n, storage=url) for n in "ab")
    study = sweep.read_study(a); folder = sweep.study_folder(study); found = sweep.open_study(study, folder)
    trial, lock = sweep.claim(study, found, folder); lock.close()
    with sweep.beating(trial): pass
    folder, counts, _ = go(b)
    assert counts == {"done": 3, "open": 1} and not (folder / "trial-0000").exists()
    with pytest.raises(UserError, match="1 of 4 trials are not done"): sweep.publish_search(folder, "toysearch")
    trial.set_user_attr("beat", time.time() - 2 * sweep.DEAD)
    assert go(b)[1] == {"done": 4} and result(folder) == undisturbed
    assert go(a)[1] == {"done": 4} and result(tmp_path / "a/search") == undisturbed       # nothing left to do: the results are there as well
    sweep._tell(found, trial, 99., ""); sweep._tell(found, trial, None, "late")            # the first machine wakes up: too late
    assert go(a)[2] == undisturbed[1] | {"file_sha256": go(a)[2]["file_sha256"]}


def test_more_trials_than_asked_for_are_never_trained(tmp_path):
    "Two machines took the last number at once: the surplus one waits until `trials` is raised"
    file = written(tmp_path, trials=2); go(file)
    study = sweep.read_study(file); found = sweep.open_study(study, tmp_path / "search"); found.ask()
    assert go(file)[1] == {"done": 2} and not (tmp_path / "search/trial-0002").exists()
    assert go(written(tmp_path, trials=3))[1] == {"done": 3}


# misled -------------------------------------------------------------------------------------------

def test_diverged_trials_are_recorded_and_the_search_goes_on(tmp_path):
    folder, counts, best = go(written(tmp_path, params=f"{{poison: {POISON}}}"))
    table = list(csv.DictReader(open(folder / "search.csv")))
    lost = [float(r["lr"]) > POISON for r in table]
    assert 0 < sum(lost) < 4 and [r["state"] == "lost" for r in table] == lost and counts == {"done": 4 - sum(lost), "lost": sum(lost)}
    assert all(bool(re.match("loss or gradient not finite at step 0", r["reason"])) == x and bool(r["value"]) != x for r, x in zip(table, lost))
    assert best["lost"] == sum(lost) and best["params"]["lr"] < POISON
    assert go(tmp_path / "search.yaml")[1] == counts              # lost is lost: not tried again
    with pytest.raises(UserError, match="all 4 trials were lost; the first: loss or gradient"): go(written(tmp_path, "none", params="{poison: 1e-9}"))


def test_the_space_is_drawn_as_written(tmp_path, undisturbed):
    study = sweep.read_study(written(tmp_path)); table = list(csv.DictReader(undisturbed[0].decode().splitlines()))
    for r in table:
        d = sweep.draw(study.space, 0, int(r["trial"]))
        assert float(r["lr"]) == d["lr"] and [float(r["beta1"]), float(r["beta2"])] == d["beta1,beta2"] and json.loads(r["chs"]) == d["chs"]
    values = [float(r["value"]) for r in table]; best = undisturbed[1]
    assert best["value"] == min(values) and best["trial"] == values.index(min(values)) and best["split"] == "dev"
    assert best["config"]["lr"] == best["params"]["lr"] and tuple(best["config"]["chs"]) == tuple(best["params"]["chs"]) and set(best["params"]) == {"lr", "beta1", "beta2", "chs"}


def test_the_mean_of_several_figures_and_the_best_validation(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss,val_error,val_other\n6,1,4,8\n9,1,,\n12,1,5,10\n")
    figure = lambda **kw: sweep.figure_of(sweep.read_study(written(tmp_path, **kw)), tmp_path)
    assert figure() == 7.5 and figure(use="best") == 6 and figure(use="best", direction="maximize") == 7.5 and figure(metric="val_other") == 10
    with pytest.raises(UserError, match="metric psnr: the runs log no such figure; known: error, other"): figure(metric="psnr")


def test_other_settings_under_the_same_name(tmp_path):
    go(written(tmp_path, trials=1))
    with pytest.raises(UserError, match=r"begun with other settings \(differs: params, seed\)"): go(written(tmp_path, trials=1, seed=5, params="{steps: 12}"))


BAD = {"not YAML": ("trials: 4", "trials: [", "line"), "misspelt key": ("trials: 4", "trails: 6", "known: study, task"), "text": ("trials: 4", "trials: many", "trials='many'"), "none": ("trials: 4", "trials: 0", "greater than or equal to 1"),
       "no such setting": ("  chs:", "  chz:", "known: seed"), "bad choice": ("[8, 4]]", "[eight]]", "chs.0"), "out of bounds": ("[0.9, 0.999]", "[0.9, 1.5]", "beta2=1.5"), "low above high": ("low: 1e-3", "low: 5", "low must lie below high"),
       "bad key in a range": ("log: true", "lgo: true", "known: low, high, log, int"), "scalar": ("  chs: [[4], [8, 4]]", "  chs: 4", "chs: give a list of choices"), "pairs of one": ("[0.9, 0.999]", "[0.9]", "lists of 2 values each"),
       "twice in the space": ("  chs: [[4], [8, 4]]", "  beta1: [0.1]", "beta1 twice"), "also fixed": ("{steps: 16}", "{lr: 1}", "lr: stands in params and in space"), "bad fixed": ("{steps: 16}", "{steps: 0}", "steps=0"), "no task": ("toysearch", "toothpick", "is no task"),
       "no profile": ("trials: 4", "trials: 4\nprofile: huge", "use full"), "no way": ("minimize", "downhill", "maximize"), "twice in the file": ("trials: 4", "trials: 4\ntrials: 7", "line"), "password": ("trials: 4", "trials: 4\nstorage: mysql://u:pw@h/d", "keep the password out"),
       "empty space": (STUDY[STUDY.index("  lr"):STUDY.index("trials")], "", "space"), "a folder as name": ("trials: 4", "trials: 4\nstudy: ../up", "study='../up'"), "sampler": ("trials: 4", "trials: 4\nsampler: grid", "sampler='grid'"), "metric": ("[error, other]", "[]", "metric")}


@pytest.mark.parametrize("what", BAD)
def test_bad_files(what, tmp_path):
    old, new, part = BAD[what]; assert STUDY.count(old) == 1
    f = tmp_path / "s.yaml"; f.write_text(STUDY.replace(old, new))
    with pytest.raises(UserError) as e: sweep.read_study(f)
    assert part in str(e.value) and str(e.value).startswith(f"{f}: ") and "\n" not in str(e.value), str(e.value)


@pytest.mark.parametrize("text", [b"", b"- 1\n- 2\n", b"hello", b"\xff\xfe\x00", b"{1: 2}"])
def test_files_that_are_no_study(text, tmp_path):
    (tmp_path / "s.yaml").write_bytes(text)
    with pytest.raises(UserError) as e: sweep.read_study(tmp_path / "s.yaml")
    assert "s.yaml: " in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(UserError, match="no such file"): sweep.read_study(tmp_path / "none.yaml")


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////nowhere/at/all.db", "oracle://h/d", "postgresql://me:${PW}@127.0.0.1:9/d"])
def test_storage_that_cannot_be_opened(url, tmp_path, monkeypatch):
    monkeypatch.setenv("PW", "secret")
    with pytest.raises(UserError, match="cannot be opened") as e: go(written(tmp_path, storage=url))
    assert "secret" not in str(e.value) and "\n" not in str(e.value)


def test_command_line(tmp_path, capfd, monkeypatch):
    from mri_gen.cli import main
    file = written(tmp_path, trials=2, out=None); (tmp_path / "home/nbs").mkdir(parents=True); (tmp_path / "home/settings.ini").touch()
    monkeypatch.setenv("MRI_GEN_ROOT", str(tmp_path / "home"))
    assert main(["sweep", file, "--device", "cpu", "--publish"]) == 0
    out = capfd.readouterr().out; folder = tmp_path / "home/artifacts/runs/toysearch/search"
    assert "2 done" in out and f"-p @{folder / 'best.json'}" in out and (tmp_path / "home/artifacts/toysearch/search.json").read_bytes() == (folder / "best.json").read_bytes()
    assert main(["sweep", tmp_path / "none.yaml"]) == 1 and "no such file" in capfd.readouterr().err
    assert main(["train", "toysearch", "--profile", "full", "-p", f"@{folder / 'best.json'}", "-p", "steps=6", "--device", "cpu", "--out", tmp_path / "final"]) == 0
    cfg = json.loads((tmp_path / "final/full-s0/config.json").read_text())
    assert cfg["steps"] == 6 and {k: cfg[k] for k in sweep.apply(folder)} == sweep.apply(folder)

