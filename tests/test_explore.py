"Explorers without a browser: a control moves and the picture changes; what is wrong is said in the widget and changes nothing; files of one's own"
import asyncio

import nibabel as nib
import numpy as np
import pytest

from mri_gen import explore, explore_models
from mri_gen.core import UserError

LPS = np.diag([-4., -4., 4., 1.])


def ball(n=(40, 44, 32), seed=0, shells=(.2, .9, .5)):
    "A head of three shells, smooth noise in it"
    g = np.random.default_rng(seed); p = np.stack(np.meshgrid(*(np.linspace(-1.2, 1.2, k) for k in n), indexing="ij")); r = np.sqrt((p ** 2).sum(0))
    return (np.select([r < .5, r < .8, r < 1], shells[::-1], 0) * (1 + .2 * np.sin(6 * p[0]) * np.cos(5 * p[1])) + .01 * g.random(n)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A person's T1, T2 and PD as files, an array of slices, a mask"
    d = tmp_path_factory.mktemp("person")
    for k, (m, shells) in enumerate({"T1": (.9, .6, .3), "T2": (.3, .5, .9), "PD": (.5, .7, .8)}.items()): nib.save(nib.Nifti1Image(500 * ball(seed=k, shells=shells), LPS), d / f"{m}.nii.gz")
    np.save(d / "slices.npy", np.moveaxis(ball((64, 64, 16)), 2, 0)[3:13:2].clip(0, 1)); np.save(d / "mask.npy", ball((40, 44, 32)) > .5); np.save(d / "small.npy", ball((9, 9, 9)))
    np.save(d / "triples.npy", np.stack([np.moveaxis(ball((64, 64, 16), shells=s), 2, 0)[5:11:2].clip(0, 1) for s in ((.9, .6, .3), (.3, .5, .9), (.5, .7, .8))], 1))
    return d


def moves(e, name, value):
    "Set a control: the picture must change, nothing may be wrong"
    old = e.image.value; e.controls[name].value = value
    assert not e.wrong, e.wrong
    assert e.image.value != old and e.image.value[:4] == b"\x89PNG", f"{name}={value}: the same picture"
    return e.took


def stays(e, name, value, *words):
    "Set a control to something impossible: said in the widget, and the picture and the other values stay"
    old, values = e.image.value, {k: v for k, v in e.values.items() if k != name}; e.controls[name].value = value
    assert all(w in e.wrong for w in words), e.wrong
    assert e.wrong.split("<")[0][:40] in e.message.value and e.image.value == old and {k: v for k, v in e.values.items() if k != name} == values


def again(e, name, a, b):
    "Answers to what was seen before are kept: quick"
    for v in (a, b): e.controls[name].value = v
    assert moves(e, name, a) < 2000 and moves(e, name, b) < 2000      # 300 ms on two cores of one's own


def test_viewer(folder):
    e = explore.view_volume(folder, overlay=folder / "mask.npy", solid=False)
    assert e.wrong == "" and e.controls["image"].options == ("PD", "T1", "T2")
    moves(e, "z", e.values["z"] + 8); moves(e, "window", 60); moves(e, "overlay", .8); moves(e, "image", "T2"); again(e, "level", 30, 70)
    stays(e, "file", str(folder / "T9.nii.gz"), "T9.nii.gz: no such file", "stays"); assert e.values["image"] == "T2"
    (folder / "broken.nii.gz").write_bytes(b"no volume"); stays(e, "file", str(folder / "broken.nii.gz"), "not a NIfTI"); (folder / "broken.nii.gz").unlink()
    moves(e, "file", str(folder / "T1.nii.gz")); assert e.controls["image"].options == ("T1",)
    assert "9x9x9 for a volume of 40x44x32" in explore.view_volume(folder, overlay=folder / "small.npy", solid=False).wrong


def test_viewer_says_where_the_cursor_is(folder):
    "A file in LPS: the place in mm names the voxel that holds it, in RAS+"
    x = np.zeros((20, 24, 16), np.float32); x[4, 6, 9] = 7; x[0] = 1; nib.save(nib.Nifti1Image(x, LPS), folder / "dot.nii.gz"); e = explore.view_volume(folder / "dot.nii.gz", solid=False); (folder / "dot.nii.gz").unlink()
    for n, v in zip("xyz", (-16., -24., 36.)): e.controls[n].value = v
    assert "voxel 15, 17, 9 (RAS+), 7;" in e.message.value


def test_nothing_to_open_is_said(folder):
    for make in (explore.view_volume, explore.watch_run, explore_models.play_inpaint, explore_models.impute, explore_models.browse_codes, explore_models.translate, explore_models.sharpen):
        e = make("nowhere<b>"); assert "nowhere<b>" in e.wrong and "nowhere&lt;b&gt;" in e.message.value and e.image.value == b""
    assert "is called T1 or T2" in explore_models.translate({"flair": ball()}).wrong


def test_other_errors_do_not_escape():
    def draw(e, d, a): return [[explore.Panel(np.zeros((2, 3)) / 1 if a < 2 else [][0])]], "fine"
    e = explore.Explorer({"a": explore.slider(0, 0, 3)}, lambda e, s: 1, draw); old = e.image.value
    e.controls["a"].value = 2; assert e.wrong.startswith("IndexError") and e.image.value == old
    e.controls["a"].value = 1; assert not e.wrong and "fine" in e.message.value


def test_playground(folder):
    e = explore_models.play_inpaint(folder / "slices.npy", ("harmonic", "unet")); assert e.wrong == ""
    moves(e, "slice", 1); moves(e, "period", 8.); moves(e, "noise", .05); moves(e, "mask", "blocks"); moves(e, "mask", "test"); moves(e, "mask", "stripes"); again(e, "known", .3, .6); moves(e, "methods", ("linear",))
    stays(e, "methods", (), "at least one method"); e.controls["methods"].value = ("linear",); stays(e, "file", str(folder / "triples.npy"), "3 channels; expected 1")


def test_imputer(folder):
    e = explore_models.impute(folder); assert e.wrong == ""
    moves(e, "slice", e.values["slice"] + 1); moves(e, "PD", False); assert e.message.value.count("expected and true") == 2
    stays(e, "T2", False, "at least one"); moves(e, "T1", True); e.controls["T2"].value = True; stays(e, "PD", True, "all three"); e.controls["PD"].value = False; again(e, "slice", 3, 4)
    e.controls["file"].value = str(folder / "triples.npy"); assert not e.wrong and e.controls["slice"].max == 2
    e = explore_models.impute({m: folder / f"{m}.nii.gz" for m in ("T2", "PD")}); assert not e.wrong and e.controls["T1"].disabled and "expected and true" not in e.message.value
    other = nib.Nifti1Image(ball((30, 30, 30)), LPS); assert "another grid" in explore_models.impute({"T1": folder / "T1.nii.gz", "T2": other}).wrong


def test_codebook_browser(folder):
    e = explore_models.browse_codes(folder / "slices.npy"); assert e.wrong == "" and "prior knows slices of 28x28 cells" in e.message.value
    moves(e, "slice", 1); moves(e, "level", 1); moves(e, "row", 3); moves(e, "column", 3); plain = e.values["code"]; moves(e, "code", (plain + 7) % 512); moves(e, "row", 4); moves(e, "row", 3); assert e.values["code"] == (plain + 7) % 512
    old = e.image.value; e.controls["draw slice"].click(); assert "28x28" in e.wrong and e.image.value == old
    e.controls["undo"].click(); assert e.values["code"] == plain and e.image.value != old and not e.wrong
    np.save(folder / "thin.npy", np.random.rand(2, 8, 64).astype(np.float32)); stays(e, "file", str(folder / "thin.npy"), "at least 16x16")


def test_style_transfer(folder):
    e = explore_models.translate(folder); assert e.wrong == ""
    moves(e, "blend", .9); moves(e, "slice", 2); moves(e, "sharp", True); moves(e, "direction", "T2toT1"); again(e, "slice", 3, 4)
    e = explore_models.translate({"T1": folder / "T1.nii.gz"}); assert not e.wrong and e.controls["direction"].options == ("T1toT2",); moves(e, "blend", .1)


def test_super_resolution(folder):
    e = explore_models.sharpen(folder / "T1.nii.gz", side=24, draws=2, steps=2); assert e.wrong == "", e.wrong
    moves(e, "wipe", .2); moves(e, "step", 0); moves(e, "plane", "coronal"); moves(e, "right", "regression"); again(e, "slice", 5, 8)
    np.save(folder / "flat.npy", ball((30, 30, 6))); stays(e, "file", str(folder / "flat.npy"), "at least 8")
    e = explore_models.sharpen(folder / "T1.nii.gz", lose=False, side=32, draws=1, steps=2); assert not e.wrong and e.data[3].tolist() == [2., 2., 2.]


def test_monitor(tmp_path):
    def grow(n):
        (tmp_path / "samples").mkdir(exist_ok=True); (tmp_path / "config.json").write_text('{"steps": 100}')
        (tmp_path / "metrics.csv").write_text("step,loss,dev_psnr\n" + "".join(f"{s},{1 / (s + 1):.5f},{20 + s / 10}\n" for s in range(0, n, 5)) + "95,")      # a line half written
        explore.Image.fromarray(np.full((8, 20), n, np.uint8)).save(tmp_path / f"samples/step-{n:08d}.png")
    grow(20)
    async def live():
        e = explore.watch_run(tmp_path, every=.02); assert "step 15 of 100" in e.message.value and not e.wrong; old = e.image.value
        grow(60); await asyncio.sleep(1.5); assert "step 55 of 100" in e.message.value and e.image.value != old and e.values["sample"] == 1
        e.close(); await asyncio.sleep(.1); assert e.task.done()
        return e
    asyncio.run(live())
    e = explore.watch_run(tmp_path, every=0); moves(e, "sample", 0); moves(e, "columns", ("loss",)); moves(e, "log", True); grow(80); e.controls["look again"].click(); assert e.values["sample"] == 0 and e.controls["sample"].max == 2
    (tmp_path / "PAUSED").write_text("{}"); e.controls["look again"].click(); assert "PAUSED" in e.message.value; stays(e, "file", str(tmp_path / "samples"), "no run")


def test_singly_gives_the_chunk_back():
    from mri_gen import mmgan
    with pytest.raises(UserError), explore_models.singly(mmgan): raise UserError("x")
    assert mmgan.CHUNK == 4


def test_stored_notebooks_show_pictures(root):
    "A widget without its kernel shows an error, and its state is megabytes: `make prepare` takes both away"
    import json
    for p in sorted((root / "nbs").glob("31_*.ipynb")):
        nb = json.loads(p.read_text(encoding="utf-8")); shown = [o["data"] for c in nb["cells"] for o in c.get("outputs", []) if "Explorer" in "".join(o.get("data", {}).get("text/plain", ""))]
        assert shown and all("image/png" in d for d in shown), p.name
        assert "widgets" not in nb["metadata"] and not any("widget-view" in k for d in shown for k in d), f"{p.name}: run `make prepare`"
