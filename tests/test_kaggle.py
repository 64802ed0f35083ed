"""The single-file notebooks for Kaggle, without Kaggle: a tree like theirs, read-only inputs in both of their layouts, a working folder that each session finds empty, and the next session's input made of the last one's output.

Each task's notebook is stopped by its time budget, then by SIGKILL, then runs to the end; the weights must be those of a run that nobody stopped, byte for byte.
"""
import contextlib, json, os, re, shutil, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mri_gen.bundle import MANIFEST, bundle, kernel_metadata, needed, pack, tasks

ROOT = Path(__file__).resolve().parents[1]
SLUGS = tasks()
LAYOUTS = ("{name}", "datasets/someone/{name}", "notebooks/someone/{name}")   # where Kaggle mounts, or has mounted, an input
FEW = {"precision": "fp32", "save_every": 5}   # a checkpoint now and then, even in so short a training


def source(slug): return json.loads((ROOT / "kaggle" / slug / f"{slug}.ipynb").read_text(encoding="utf-8"))


@pytest.mark.parametrize("slug", SLUGS)
def test_up_to_date(slug):
    "Nobody edits these; `make prepare` writes them"
    assert source(slug) == bundle(slug), f"kaggle/{slug} is not what nbs/ and mri_gen/ give now; run `make prepare`"
    assert json.loads((ROOT / "kaggle" / slug / "kernel-metadata.json").read_text()) == kernel_metadata(slug)


@pytest.mark.parametrize("slug", SLUGS)
def test_one_file_with_everything(slug):
    cells = source(slug)["cells"]; code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    files = dict(c.removeprefix("%%writefile {home}/").split("\n", 1) for c in code if c.startswith("%%writefile"))
    assert {k: (ROOT / k).read_text(encoding="utf-8") for k in files} == files and {f"mri_gen/{m}.py" for m in needed(slug)[0]} < set(files)
    assert not any(c.get("outputs") or c.get("execution_count") for c in cells) and sum("parameters" in c["metadata"].get("tags", []) for c in cells) == 1
    assert not [l for c in cells if c["cell_type"] == "markdown" for l in re.findall(r"\]\((?!https?:)[^)]*\)", "".join(c["source"]))], "links to files that are not there"
    assert all(v.strip() for v in files.values()), "a module is empty"


@pytest.fixture(scope="module")
def kaggle(tmp_path_factory):
    "A folder for trees like Kaggle's, and a data set (only the feature network: simulated heads need no data)"
    base = tmp_path_factory.mktemp("kaggle"); pack(None, base / "upload", ["features"])
    return base


def session(base, slug, number, inputs, **params):
    "Popen of one session: the notebook by papermill, from its working folder; inputs {name: folder} are mounted below input/, not to be written to"
    here = base / f"{slug}-{number}"; (here / "working").mkdir(parents=True)
    for k, (name, folder) in enumerate(inputs.items()):
        to = here / "input" / LAYOUTS[(k + number) % len(LAYOUTS)].format(name=name); to.parent.mkdir(parents=True, exist_ok=True); shutil.copytree(folder, to)
    for p in sorted((here / "input").rglob("*"), reverse=True): p.chmod(0o555 if p.is_dir() else 0o444)
    env = {k: v for k, v in os.environ.items() if k not in ("MRI_GEN_DATA", "MRI_GEN_ROOT", "PYTHONPATH")} | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(here)}
    given = {"profile": "smoke", "inputs": here / "input", "working": base / slug / "working", **FEW, **params}; (base / slug / "working").mkdir(parents=True, exist_ok=True)
    words = [w for k, v in given.items() for w in ("-p", k, str(v))]
    return subprocess.Popen([sys.executable, "-m", "papermill", str(ROOT / "kaggle" / slug / f"{slug}.ipynb"), str(here / "executed.ipynb"), "-k", "python3", "--no-progress-bar", "--autosave-cell-every", "0", *words],
                            cwd=base / slug / "working", env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def printed(path): return "\n".join("".join(o.get("text", [])) for c in json.loads(Path(path).read_text())["cells"] for o in c.get("outputs", []))


def leave(base, slug, number):
    "A session ends: its working folder becomes an output, and the next one finds an empty one"
    out = base / f"{slug}-{number}/output"; shutil.move(base / slug / "working", out); return out


def life(base, slug):
    "Three sessions; what went wrong, or ''"
    inputs = {"mri-gen-data": base / "upload"}
    p = session(base, slug, 1, inputs, max_hours=1e-6); text, _ = p.communicate(timeout=300)              # the budget is up after the first step
    if p.returncode: return f"budget: {text[-3000:]}"
    said = printed(base / f"{slug}-1/executed.ipynb")
    if "PAUSED" not in said or "To go on" not in said or not list((base / slug / "working" / slug).glob("PAUSED")): return f"budget: not paused: {said[-2000:]}"
    inputs[f"mri-gen-{slug}"] = leave(base, slug, 1)
    p = session(base, slug, 2, inputs); run = base / slug / "working" / slug; t = time.monotonic()
    first = max((int(q.name[5:]) for q in inputs[f"mri-gen-{slug}"].glob(f"{slug}/checkpoint/step-*")), default=0)
    while p.poll() is None and time.monotonic() - t < 240 and max((int(q.name[5:]) for q in run.glob("checkpoint/step-*")), default=0) <= first: time.sleep(.02)
    os.killpg(p.pid, signal.SIGKILL); p.communicate()
    for q in Path("/proc").glob("[0-9]*"):                                                                # its kernel has a session of its own, and would train on
        with contextlib.suppress(OSError):
            if os.readlink(q / "cwd") == str(base / slug / "working"): os.kill(int(q.name), signal.SIGKILL)
    inputs[f"mri-gen-{slug}-2"] = leave(base, slug, 2)
    p = session(base, slug, 3, inputs); text, _ = p.communicate(timeout=400)
    if p.returncode: return f"last: {text[-3000:]}"
    said = printed(base / f"{slug}-3/executed.ipynb"); run = base / slug / "working" / slug
    if "goes on from" not in said: return f"last: began anew: {said[:2000]}"
    if "DONE" not in said.splitlines()[-1] or not (run / "DONE").exists() or not (run / "metrics.json").exists(): return f"last: {said[-2000:]}"
    return ""


@pytest.mark.slow
def test_life(kaggle):
    "All six tasks, two at a time"
    with ThreadPoolExecutor(2) as pool: ends = dict(zip(SLUGS, pool.map(lambda s: life(kaggle, s), SLUGS)))
    assert not any(ends.values()), ends


@pytest.mark.slow
@pytest.mark.parametrize("slug", SLUGS)
def test_same_bytes_as_one_run(slug, kaggle):
    "What three sessions trained is what `mri_gen train` gives that nobody stopped"
    run = kaggle / slug / "working" / slug
    if not (run / "DONE").exists(): pytest.skip("test_life did not come that far")
    cfg = json.loads((run / "config.json").read_text()); (kaggle / slug / "params.json").write_text(json.dumps(cfg))
    env = {k: v for k, v in os.environ.items() if k != "MRI_GEN_DATA"} | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    p = subprocess.run([sys.executable, "-m", "mri_gen.train", slug, "-p", f"@{kaggle / slug / 'params.json'}", "--out", str(kaggle / slug), "--name", "one", "--threads", "1"], env=env, capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr
    from safetensors.torch import load_file
    a, b = load_file(run / "weights.safetensors"), load_file(kaggle / slug / "one/weights.safetensors")
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a) and (run / "metrics.csv").read_bytes() == (kaggle / slug / "one/metrics.csv").read_bytes()


@pytest.mark.slow
def test_two_processes(kaggle):
    "As on two GPUs: the training runs in processes of its own, whose lines the notebook shows; paused there, paused here"
    p = session(kaggle, "generate", 9, {"mri-gen-data": kaggle / "upload"}, processes=2, max_hours=1e-6, working=kaggle / "two"); text, _ = p.communicate(timeout=300); assert p.returncode == 0, text[-3000:]
    said = printed(kaggle / "generate-9/executed.ipynb")
    assert "PAUSED (generate: paused at step 1 of " in said and re.search(r"^PAUSED step=1 run=", said, re.M) and (kaggle / "two/generate/checkpoint/step-00000001").is_dir(), said[-2000:]


if __name__ == "__main__":
    import tempfile
    base = Path(tempfile.mkdtemp()); pack(None, base / "upload", ["features"]); t = time.monotonic()
    for s in sys.argv[1:] or SLUGS: print(s, life(base, s) or "survived", f"{time.monotonic() - t:.0f} s", base, flush=True)
