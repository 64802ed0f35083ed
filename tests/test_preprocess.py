"Preprocessing end to end: the command line, a cohort with every kind of broken file, kill -9 in the middle, a dask cluster, known motion on a real patient"
import hashlib, json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow   # together minutes: `make test`, not `make check`

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("-p", "size=64", "-p", "pixel=4")


def command(*words, **kw):
    "Arguments and environment of `mri_gen WORDS` in a process of its own"
    return dict(args=[sys.executable, "-m", "mri_gen.cli", *map(str, words)], cwd=ROOT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}) | kw


def run(*words): return subprocess.run(**command(*words, capture_output=True))


def digest(folder): return {p.relative_to(folder).as_posix(): hashlib.md5(p.read_bytes()).hexdigest() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    "Four simulated subjects of coarse voxels"
    from mri_gen.phantom import simulate_cohort
    return simulate_cohort(tmp_path_factory.mktemp("raw") / "cohort", subjects=4, seed=21, spacing=4.)


@pytest.fixture(scope="module")
def done(raw):
    "The same cohort, preprocessed without interruption"
    from mri_gen.preprocess import preprocess
    return preprocess(raw, raw.parent / "done", jobs=2, say=lambda t: None, size=64, pixel=4)[0]


@pytest.mark.slow
def test_layout(done):
    "What DESIGN section 4 promises, with relative paths"
    import csv
    from mri_gen.align import read_transform
    from mri_gen.datasets import find_volumes, load_slices
    rows = list(csv.DictReader(open(done / "manifest.csv")))
    assert [r["subject"] for r in rows] == [f"SIM{i:03d}" for i in range(1, 5)]
    for r in rows:
        for m in ("T1", "T2", "PD"): assert (done / r[m]).is_file() and not Path(r[m]).is_absolute() and (done / f"registered/{r['subject']}/{m}.nii.gz").is_file()
        assert np.allclose(read_transform(done / f"transforms/{r['subject']}/T2_to_PD.tfm"), np.eye(4)), "T2 and PD come from one scan"
    assert len(find_volumes(done)) == 12 and len(find_volumes(done / "registered")) == 12
    a, b = (load_slices(done / "slices" / n) for n in ("baseline", "optimized_n4"))
    assert a.images.shape == b.images.shape and a.images.shape[1:] == (3, 64, 64) and a.table == b.table and {"train", "val"} <= {r["split"] for r in a.table}
    assert "light" in rows[0] and not (done / "parts").exists() and not (done / "lock").exists()


@pytest.mark.slow
def test_registration_finds_the_true_motion(raw, done):
    "Voxels of 4 mm: a fraction of one"
    from mri_gen.align import distance_mm, points_in, read_transform
    from mri_gen.volumes import read_volume
    for s in sorted(p.name for p in (raw / "truth").iterdir()):
        b = read_volume(raw / f"truth/{s}/brain.nii.gz"); d = distance_mm(read_transform(done / f"transforms/{s}/T1_to_PD.tfm"), read_transform(raw / f"truth/{s}/T1_to_PD.tfm"), points_in(b.data > .5, b.affine))
        assert d.mean() < 1 and d.max() < 2, (s, d.mean(), d.max())


@pytest.mark.slow
def test_n4_removes_the_field(raw, done):
    "registered / n4 is the field that was taken out; T2 and PD have the same"
    from mri_gen.bias import field_error
    from mri_gen.volumes import read_volume
    for s in ("SIM001", "SIM002"):
        brain = read_volume(raw / f"truth/{s}/brain.nii.gz").data > .9; true = np.log(read_volume(raw / f"truth/{s}/bias_PD.nii.gz").data)
        log = {m: np.log(np.maximum(read_volume(done / f"registered/{s}/{m}.nii.gz").data, 1e-3) / np.maximum(read_volume(done / f"n4/{s}/{m}.nii.gz").data, 1e-3)) for m in ("T2", "PD")}
        e = field_error(log["PD"], true, brain); assert e["correlation"] > .7 and e["rmse"] < .06 and np.abs(log["T2"] - log["PD"])[brain].max() < 1e-3


@pytest.mark.slow
def test_page_stands_alone(done):
    html = (done / "qc.html").read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!data:|#|qc/)[^"]*"', html) == [] and "://" not in html and html.count("<article") == 4
    for ref in re.findall(r'href="(qc/[^"]+)"', html): assert (done / ref).is_file()


def broken(raw, out):
    "Ten subjects: four whole ones, six that cannot be used, each for another reason"
    import nibabel as nib
    shutil.copytree(raw, out, ignore=shutil.ignore_patterns("truth", "manifest.csv"))
    def copy(name): shutil.copytree(raw / "SIM001", out / name); return out / name / "T1.nii.gz"
    p = copy("BAD1"); p.write_bytes(p.read_bytes()[:3000])
    p = copy("BAD2"); im = nib.load(p); x = im.get_fdata(); x[5, 5, 5] = np.nan; nib.save(nib.Nifti1Image(x.astype("f4"), im.affine), p)
    copy("BAD3").unlink()
    p = copy("BAD4"); im = nib.load(p); nib.save(nib.Nifti1Image(np.full(im.shape, 7, np.int16), im.affine), p)
    p = copy("BAD5"); p.write_bytes(b"")
    p = copy("BAD6"); im = nib.load(p); nib.save(nib.Nifti1Image(np.stack([im.get_fdata()] * 2, -1).astype("f4"), im.affine), p)
    return out


@pytest.mark.slow
def test_broken_subjects_are_skipped(raw, done, tmp_path):
    "The others finish, with the bytes they have anyway; page, list and exit code say what is missing"
    r = run("preprocess", broken(raw, tmp_path / "in"), tmp_path / "out", "--jobs", 2, *SMALL)
    assert r.returncode == 3, r.stderr
    assert len(r.stderr.strip().splitlines()) == 1 and "6 files were skipped" in r.stderr
    from mri_gen.core import read_skipped
    assert sorted(x["subject"] for x in read_skipped(tmp_path / "out")) == [f"BAD{i}" for i in range(1, 7)]
    html = (tmp_path / "out/qc.html").read_text(encoding="utf-8")
    assert all(f"BAD{i}" in html for i in range(1, 7)) and html.count("<article") == 4
    for d in ("transforms", "n4"):
        for s in ("SIM001", "SIM003"): assert digest(tmp_path / "out" / d / s) == digest(done / d / s)


@pytest.mark.slow
def test_killed_and_started_again(raw, done, tmp_path):
    "SIGKILL after the first subject: each subject once, the bytes of the uninterrupted run"
    words = ("preprocess", raw, tmp_path / "out", "--jobs", 1, *SMALL)
    p = subprocess.Popen(**command(*words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    for line in p.stdout:
        if line.startswith("subject="): break
    first = line.split()[0].split("=")[1]; time.sleep(1); p.send_signal(signal.SIGKILL); p.wait(); p.stdout.close()
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial/qc" / first / "facts.json").is_file()
    r = run(*words); assert r.returncode == 0, r.stderr
    assert f"subject={first} " not in r.stdout and len(re.findall("^subject=", r.stdout, re.M)) <= 3 and "there already" in r.stdout
    a, b = digest(done), digest(tmp_path / "out"); assert sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k)) == []
    again = run(*words); assert again.returncode == 1 and "--force" in again.stderr and digest(tmp_path / "out") == b


@pytest.mark.parametrize("words, say", [
    (("NOWHERE", "out"), "no such folder"), (("RAW", "out", "--fixed", "FLAIR"), "no FLAIR"), (("RAW", "out", "--modality", "T1", "--modality", "X", "--fixed", "T1"), "no subject has"),
    (("RAW", "out", "-p", "kind=elastic"), "kind='elastic'"), (("RAW", "out", "-p", "sise=3"), "known: fixed"), (("RAW", "out", "--pattern", "{modality}.nii.gz"), "needs {subject}"),
    (("RAW", "full"), "--force"), (("RAW", "full", "--force"), "never replaced"), (("RAW", "out", "--jobs", "0"), "--jobs")])
def test_one_clear_line(raw, tmp_path, words, say):
    (tmp_path / "full").mkdir(); (tmp_path / "full/thesis.txt").write_text("years")
    swap = {"RAW": raw, "NOWHERE": tmp_path / "nowhere", "out": tmp_path / "out", "full": tmp_path / "full"}
    r = run("preprocess", *[swap.get(w, w) for w in words])
    assert r.returncode in (1, 2) and say in r.stderr and len(r.stderr.strip().splitlines()) == 1, r.stderr
    assert not (tmp_path / "out").exists() and (tmp_path / "full/thesis.txt").read_text() == "years"


@pytest.mark.slow
def test_dask_cluster(raw, done, tmp_path):
    "Two workers of a local cluster: the same bytes"
    distributed = pytest.importorskip("dask.distributed", reason="the extra [cluster] is not installed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        r = run("preprocess", raw, tmp_path / "out", "--dask", cluster.scheduler_address, *SMALL)
    assert r.returncode == 0, r.stderr
    assert digest(tmp_path / "out") == digest(done)


def test_dask_without_a_scheduler(raw, tmp_path):
    r = run("preprocess", raw, tmp_path / "out", "--dask", "nowhere")
    assert r.returncode == 1 and "--dask" in r.stderr and len(r.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("k", range(3))
def test_known_motion_on_a_real_patient(mri_data, k):
    "A random rigid motion in the header of the moving volume comes out again (Lesjak et al. 2017, CC BY)"
    from mri_gen.align import distance_mm, head_mask, points_in, read_transform, register
    from mri_gen.anatomy import rotation
    from mri_gen.volumes import Volume, read_volume
    folder = mri_data / "native_multicontrast/patient04"
    if not folder.is_dir(): pytest.skip("native_multicontrast/patient04 needed")
    m = ("T1W", "T2W", "T1W")[k]; r = np.random.default_rng(k); fixed, moving = read_volume(folder / "FLAIR.nii.gz"), read_volume(folder / f"{m}.nii.gz")
    head = head_mask(fixed); p = points_in(head, fixed.affine); c = p.mean(0); unit = lambda: (lambda v: v / np.linalg.norm(v))(r.normal(size=3))
    e = np.eye(4); e[:3, :3] = rotation(unit() * 10 * r.random()); e[:3, 3] = unit() * 10 * r.random() + c - e[:3, :3] @ c
    found = register(fixed, Volume(moving.data, e @ moving.affine), mask=head)
    assert distance_mm(found, e @ read_transform(folder / f"{m}_to_FLAIR.txt"), p).mean() < .7
