"""Give damaged, absurd and hostile files to everything that reads files: each is read, or refused in one line.

    python tests/fuzz.py --n 5000 --seed 0                 # counts per kind; exit code 1 if anything else happened
    python tests/fuzz.py --replay nifti:17 [--keep DIR]    # one input again, with its traceback; DIR: look at the file

An input is a small valid file (or folder), changed at random: bits, bytes, pieces, ends, and the fields that its format is made of, set to what no sane program writes. It is a pure function of KIND:SEED.
It passes when every reader of its kind either gives a sane result or raises a `UserError` of one short line that names the file, in `SECONDS` of computing (six times that, if it only waits), with at most `MEMORY` more than before (a claim is refused before it is allocated: a refusal that
was a failed allocation counts as a fault), and with nothing written outside the output folder. Anything else - another exception, a signal, a hang, a file too many - is a finding.
Inputs are read in processes forked from one that has imported everything; many in each, and a new one after a finding.
"""
import argparse, collections, contextlib, csv, gzip, hashlib, io, json, os, pickle, random, resource, select, shutil, signal, string, struct, sys, tarfile, tempfile, time, traceback, warnings, zipfile, zlib
from pathlib import Path

for k in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"): os.environ[k] = "1"

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import mri_gen.checkpoint as checkpoint
import mri_gen.core as core
from mri_gen.core import UserError

SECONDS, MEMORY, LINE = 10, 2**30, 1000     # for one input; bytes beyond what the process had; characters of a message
HUGE = [0, 1, -1, 2, 3, 7, 255, 256, -256, 32767, -32768, 65535, 2**31 - 1, -2**31, 2**32 - 1, 2**62, 2**63 - 1, -2**63]
FLOATS = [0., -0., 1., -1., float("nan"), float("inf"), -float("inf"), 1e-45, 1e-30, 3e38, -3e38, 1e300, 1e10]
WORDS = ["", " ", "../evil", "..", "/", "a/b", "{box}/evil", "\0", "\n", "\r\n", "é", "\ufeff", "\u202e", "\ud800", "NaN", "-1", "1e999", "9" * 30, "9" * 5000, "null", "T1.nii.gz", "x" * 300, "x" * 70_000, "%s%n", "$(id)", "~", ".", "*"]


# changes that know nothing of the format ------------------------------------------------------------

def bytes_changed(rng, raw, other=b""):
    "1 to 4 small accidents"
    b = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        n, i = len(b), rng.randrange(max(1, len(b))); j = min(n, i + rng.choice([1, 2, 4, 16, 200, n]))
        what = rng.randrange(9)
        if what == 0 and n: b[i] ^= 1 << rng.randrange(8)
        elif what == 1 and n: b[i] = rng.choice([0, 1, 0x7f, 0x80, 0xff, 10, 34, 44])
        elif what == 2: del b[i:]
        elif what == 3: del b[i:j]
        elif what == 4: b[i:i] = b[i:min(j, i + 5000)]
        elif what == 5 and other: k = rng.randrange(len(other)); b[i:j] = other[k:k + rng.choice([1, 8, 100])]
        elif what == 6: b[i:i] = rng.randbytes(rng.choice([1, 3, 64]))
        elif what == 7: b[i:j] = bytes(j - i)
        elif n >= 4: b[i:i + 4] = struct.pack(rng.choice("<>") + "i", rng.choice([0, -1, 2**31 - 1, -2**31, 65536]))
    return bytes(b)


def text_changed(rng, text, box):
    "Changes of a text with fields, lines and quotes"
    for _ in range(rng.randint(1, 3)):
        lines = text.split("\n"); k = rng.randrange(len(lines)); what = rng.randrange(10)
        word = rng.choice(WORDS).format(box=box) if rng.random() < .9 else str(rng.choice(HUGE + FLOATS))
        if what == 0: lines[k] = word
        elif what == 1: lines.insert(k, lines[k])
        elif what == 2: lines.insert(k, word)
        elif what == 3: del lines[k]
        elif what == 4: rng.shuffle(lines)
        elif what == 5: lines[k] = lines[k].replace(rng.choice(",:[]{}\"' "), rng.choice(["", ";", ",,", "\t", '"', "'", "\0"]))
        elif what == 6 and lines[k]: i = rng.randrange(len(lines[k])); lines[k] = lines[k][:i] + word + lines[k][i:]
        else:
            import re
            parts = re.split(r"([,:\[\]{}\"\s])", lines[k]); i = rng.randrange(len(parts)); parts[i] = word; lines[k] = "".join(parts)
        text = "\n".join(lines)
    return text


def encoded(rng, text):
    "As people save text: mostly UTF-8, sometimes not"
    how = rng.choice(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "latin-1", "utf-32"])
    raw = text.encode(how, "surrogatepass" if how.startswith("utf") else "replace")
    return bytes_changed(rng, raw) if rng.random() < .15 else raw


def value_changed(rng, x, box, deep=0):
    "A JSON-like value with something in it changed"
    odd = lambda: rng.choice([None, True, [], {}, "", [[]], {"a": 1}, 2**70, -1, 0, 1e308, "../evil", 3.5, "x" * 200, [1, 2, 3], *HUGE])
    if isinstance(x, dict) and x and rng.random() < .85:
        x = dict(x); k = rng.choice(list(x)); what = rng.random()
        if what < .2: del x[k]
        elif what < .3: x[rng.choice(WORDS[:-2]).format(box=box) or "new"] = x[k]
        else: x[k] = value_changed(rng, x[k], box, deep + 1)
        return x
    if isinstance(x, list) and x and rng.random() < .85: i = rng.randrange(len(x)); return [*x[:i], value_changed(rng, x[i], box, deep + 1), *x[i + 1:]]
    return odd()


# kinds: prepare() once -> valid files; make(rng, files, box) -> readers, having written the input into box/in -------------

def put(box, name, raw): p = box / "in" / name; p.parent.mkdir(parents=True, exist_ok=True); p.write_bytes(raw); return p


def zeros_deflated(megabytes):
    "A raw deflate stream of so many MiB of zeros, in next to no time: one piece, again and again"
    c = zlib.compressobj(9, zlib.DEFLATED, -15); piece = c.compress(bytes(2**20)) + c.flush(zlib.Z_FULL_FLUSH)
    return piece * megabytes + b"\x03\0"


def prepare_nifti():
    import nibabel as nib
    out, g = {}, np.random.default_rng(0)
    for name, dtype, kind, slope in [("i2", np.int16, nib.Nifti1Image, None), ("f4", np.float32, nib.Nifti1Image, None), ("u1", np.uint8, nib.Nifti2Image, None), ("scaled", np.int16, nib.Nifti1Image, (.5, 10))]:
        a = np.diag([-2., 2, 3, 1]) if name == "i2" else np.array([[0, 0, 2., -9], [1.5, 0, 0, 4], [0, -1.5, 0, 7], [0, 0, 0, 1]])
        im = kind((g.random((7, 6, 5)) * 200).astype(dtype), a); im.header.set_data_dtype(dtype)
        if slope: im.header.set_slope_inter(*slope)
        if name == "u1": im.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"hello"))
        out[name] = im.to_bytes()
    return out


def make_nifti(rng, files, box):
    import nibabel as nib
    from mri_gen.volumes import read_volume, to_nibabel, volume_from, write_volume
    name = rng.choice(list(files)); raw = files[name]
    if rng.random() < .75:
        t = (nib.Nifti2Header if name == "u1" else nib.Nifti1Header).template_dtype; raw = bytearray(raw)
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            field = rng.choice(["dim", "datatype", "bitpix", "vox_offset", "pixdim", "scl_slope", "scl_inter", "qform_code", "sform_code", "quatern_b", "quatern_c", "qoffset_x", "srow_x", "srow_y", "srow_z", "xyzt_units", "sizeof_hdr", "magic", *t.names])
            dt, at = t.fields[field][:2]; base = dt.base; at += base.itemsize * rng.randrange(max(1, int(np.prod(dt.shape))))
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                v = rng.randbytes(base.itemsize) if base.kind == "S" else np.array(rng.choice(FLOATS)).astype(base).tobytes() if base.kind == "f" else np.array(rng.choice([*HUGE, 2, 4, 8, 16, 64, 128, 256, 512, 768, 1024, 1280, 2304, 32])).astype(base).tobytes()
            raw[at:at + len(v)] = v
        raw = bytes(raw)
    else: raw = bytes_changed(rng, raw, files["f4"])
    zipped = rng.random() < .5
    if zipped:
        raw = gzip.compress(raw, 1, mtime=0)
        if rng.random() < .2: raw = bytes_changed(rng, raw)
        if rng.random() < .03: raw = raw + gzip.compress(b"", mtime=0)[:10] + zeros_deflated(512) + bytes(8)         # a second member: a bomb behind the data
    p = put(box, rng.choice(["a.nii.gz", "a.nii.gz", "a.nii"]), raw)
    def roundtrip():
        v = read_volume(p); assert v.data.dtype == np.float32 and np.isfinite(v.data).all() and v.data.min() < v.data.max() and np.isfinite(v.affine).all()
        write_volume(box / "out/b.nii.gz", v.data, v); w = read_volume(box / "out/b.nii.gz")
        assert w.shape == v.shape and np.array_equal(w.data, v.data) and np.allclose(w.affine, v.affine, rtol=1e-4, atol=.05), "not what was written"
    return [roundtrip, lambda: volume_from(str(p)).spacing]


def npy(rng, x, box):
    "The bytes of an .npy file, its header text perhaps changed"
    b = io.BytesIO(); np.save(b, x); raw = b.getvalue(); n = struct.unpack("<H", raw[8:10])[0]; head, data = raw[10:10 + n].decode(), raw[10 + n:]
    what = rng.random()
    if what < .3: return bytes_changed(rng, raw)
    descr = rng.choice(["'<f4'", "'|u1'", "'|O'", "'<U8'", "'|V8'", "'<M8[s]'", "'<c8'", "'>f4'", "'|b1'", "'<f2'", "'<f8'", "'<f16'", "'zz'", "[('a','<f4'),('b','|O')]", "[('a','<f4')]", "''", "None", "1", "'<U0'", "'|V0'", "'<U99999999999'", "('<f4',(2,2))", "[]", "'<i8,<i8'"])
    shape = rng.choice(["(3,8,8)", "()", "(0,)", "(192,)", "(-1,)", "(-3,-8,8)", f"({2**62},4)", f"({2**40},)", f"({2**31},{2**31},{2**31})", "(99999999999999999999,)", "(3.0,8,8)", "('3',)", "3", "(True,8,8)", "(3,8,8,1,1,1,1,1,1,1)", str((1,) * 70), "[3,8,8]", "(1e3,)", "None", "(3,8,8", "(" * 300, "(" * 40_000])
    order = rng.choice(["False", "True", "1", "'yes'", "None", "__import__('os')"])
    if rng.random() < .5: descr = head.split("'descr': ")[1].split(",")[0]
    elif rng.random() < .5: shape = str(x.shape)
    head = rng.choice([f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"] * 5 + [f"{{'descr': {descr}, 'shape': {shape}}}", f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, 'x': 1}}", "{}", "1", "\0", "", "é", "{" * 200, text_changed(rng, head, box)])
    h = head.encode("utf-8", "surrogatepass"); h += b" " * (-len(h) % 64) + b"\n"; v = rng.choice([1, 1, 1, 2, 3, 4, 0])
    return b"\x93NUMPY" + bytes([v, rng.choice([0, 0, 0, 1])]) + (struct.pack("<H", len(h) & 0xffff) if v == 1 else struct.pack("<I", rng.choice([len(h), len(h), len(h), 2**32 - 1]))) + h + (data if rng.random() < .8 else data[:rng.randrange(len(data))])


ARRAYS = lambda: {"f4": np.random.default_rng(0).random((3, 8, 8)).astype(np.float32), "u1": np.random.default_rng(0).integers(0, 255, (3, 1, 8, 8), np.uint8), "f2": np.random.default_rng(0).random((3, 8, 8)).astype(np.float16),
                  "odd": np.array([[[0, np.nan], [1e30, -1]]], np.float32), "bool": np.eye(8, dtype=bool)[None]}


def make_npy(rng, files, box):
    from mri_gen.datasets import check_array, load_slices, read_array, read_slice
    from mri_gen.score import pair_arrays
    p = put(box, "a.npy", npy(rng, files[rng.choice(list(files))], box)); q = put(box, "truth.npy", FINE)
    def checked():
        x = check_array(p, channels=None); assert x.ndim == 4 and x.dtype == np.float32 and np.isfinite(x).all() and 0 <= x.min() <= x.max() <= 1
    return [checked, lambda: np.asarray(read_array(p)).size, lambda: load_slices(p), lambda: read_slice(p), lambda: pair_arrays("npy", p, q, "gray")]


def make_npz(rng, files, box):
    from mri_gen.codes import load_codes
    from mri_gen.datasets import read_array
    from mri_gen.slices import generated_slices
    g, b, what = np.random.default_rng(rng.randrange(9)), io.BytesIO(), rng.random()
    codes = rng.random() < .5
    parts = {"codes": g.integers(0, 16, (2, 4, 4)).astype(np.uint8), "size": np.array([16, 16], np.int32), "codebook": np.array(16, np.int32)} if codes else {"images": g.random((2, 1, 64, 64)).astype(np.float32), "plane": np.array(["axial", "sagittal"])}
    with warnings.catch_warnings(), zipfile.ZipFile(b, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])) as z:
        warnings.simplefilter("ignore")
        for k, x in parts.items():
            raw = io.BytesIO(); np.save(raw, x); raw, name = raw.getvalue(), f"{k}.npy"
            if what < .5 and rng.random() < .6:
                odd = rng.randrange(7)
                if odd == 0: continue
                if odd == 1: name = rng.choice([k, f"../{k}.npy", f"{box}/evil.npy", f"{k}.NPY", "", "images.npy", f"{k}.npy/"])
                if odd == 2: raw = npy(rng, x, box)
                if odd == 3: raw = bytes_changed(rng, raw)
                if odd == 4: x = rng.choice([x.astype(np.float64) * 1e300 if x.dtype.kind != "U" else x.astype("S9"), x[..., None] if x.dtype.kind != "U" else x, np.array(None), x[:0] if x.ndim else x, np.full(x.shape, -5), np.array("text"), np.full(x.shape, 2**62)]); raw = io.BytesIO(); np.save(raw, x, allow_pickle=True); raw = raw.getvalue()
                if odd == 5: z.writestr(name, raw)
                if odd == 6 and rng.random() < .5: name = f"{k}.npy"; raw = bomb(z, name, k); continue
            if name: z.writestr(name, raw)
    raw = b.getvalue()
    if what > .5: raw = bytes_changed(rng, raw, files["f4"].tobytes())
    p = put(box, rng.choice(["a.npz", "a.npz", "images.npz"]), raw)
    return [lambda: load_codes(p), lambda: generated_slices(p), lambda: read_array(p)]


def bomb(z, name, key, megabytes=3000):
    "A member of a few MB that unpacks to 3 GB of zeros, as its header says"
    h = io.BytesIO(); np.lib.format.write_array_header_1_0(h, {"descr": "|u1", "fortran_order": False, "shape": (megabytes, 1024, 1024)}); h = h.getvalue()
    c = zlib.compressobj(9, zlib.DEFLATED, -15); data = c.compress(h) + c.flush(zlib.Z_FULL_FLUSH) + zeros_deflated(megabytes)
    info = zipfile.ZipInfo(name); info.compress_type, info.compress_size, info.file_size, info.CRC = zipfile.ZIP_DEFLATED, len(data), len(h) + megabytes * 2**20, 0
    info.header_offset = z.fp.tell(); z.fp.write(info.FileHeader(False)); z.fp.write(data); z.start_dir = z.fp.tell(); z.filelist.append(info); z.NameToInfo[name] = info; z._didModify = True


def prepare_png():
    from PIL import Image
    out, g = {}, np.random.default_rng(0); x = g.integers(0, 255, (9, 8), np.uint8)
    for name, im in {"L": Image.fromarray(x), "RGB": Image.fromarray(np.stack([x] * 3, -1)), "colour": Image.fromarray(g.integers(0, 255, (9, 8, 3), np.uint8)), "I;16": Image.fromarray(x.astype(np.uint16) * 257), "P": Image.fromarray(x).convert("P"),
                     "1": Image.fromarray(x > 99), "LA": Image.fromarray(x).convert("LA"), "RGBA": Image.fromarray(x).convert("RGBA")}.items(): b = io.BytesIO(); im.save(b, "PNG"); out[name] = b.getvalue()
    for f in ("GIF", "TIFF", "BMP", "JPEG", "PPM", "EPS", "ICO", "TGA", "PCX", "WEBP"):
        with contextlib.suppress(Exception): b = io.BytesIO(); Image.fromarray(x).save(b, f); out[f] = b.getvalue()
    return out


def chunk(kind, data, crc=None): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)


def make_png(rng, files, box):
    from mri_gen.datasets import load_slices, read_png, read_slice
    from mri_gen.download import load_oasis
    name = rng.choice(list(files)); raw = files[name]
    if raw[:4] == b"\x89PNG" and rng.random() < .7:
        parts, i = [], 8
        while i + 8 <= len(raw): n = struct.unpack(">I", raw[i:i + 4])[0]; parts.append([raw[i + 4:i + 8], raw[i + 8:i + 8 + n], None]); i += 12 + n
        for _ in range(rng.randint(1, 3)):
            k, what = rng.randrange(len(parts)), rng.randrange(8)
            if what < 3:
                w, h, *rest = struct.unpack(">IIBBBBB", parts[0][1].ljust(13, b"\0")[:13]); sizes = [0, 1, 8, 9, 9000, 12_000, 20_000, 65_535, 2**20, 2**31 - 1, 2**32 - 1]
                if what == 0: w = rng.choice(sizes); h = rng.choice([h, *sizes])
                if what == 1: rest[rng.randrange(5)] = rng.choice([0, 1, 2, 3, 4, 6, 7, 8, 16, 32, 255])
                if what == 2 and rng.random() < .3: w = h = rng.choice([9000, 15_000, 30_000]); parts[1:] = [[b"IDAT", b"x\xda" + zeros_deflated(w * w // 2**20)[:-2], None], [b"IEND", b"", None]]       # a real image of nothing
                parts[0] = [b"IHDR", struct.pack(">IIBBBBB", w, h, *rest), None]
            elif what == 3: parts[k][1] = bytes_changed(rng, parts[k][1])
            elif what == 4: parts[k][2] = rng.randrange(2**32)
            elif what == 5: del parts[k]; parts = parts or [[b"IEND", b"", None]]
            elif what == 6: parts.insert(k, [rng.choice([b"zTXt", b"iTXt", b"iCCP", b"tEXt", b"acTL", b"fcTL", b"fdAT", b"PLTE", b"tRNS", b"gAMA", b"pHYs", b"eXIf", b"IHDR", b"sBIT"]), rng.choice([b"", rng.randbytes(26), b"key\0\0" + b"x\xda" + zeros_deflated(rng.choice([1, 100])), b"\0" * 40]), None])
            else: rng.shuffle(parts)
        raw = raw[:8] + b"".join(chunk(*c) for c in parts)
    else: raw = bytes_changed(rng, raw, files["L"])
    p = put(box, "slices/keras_png_slices_train/case_001_slice_0.nii.png", raw); put(box, "slices/train/A_0001.png", raw)
    def gray(): x = read_png(p); assert x.ndim == 3 and x.dtype in (np.uint8, np.float32) and np.isfinite(x).all()
    return [gray, lambda: read_png(p, "modalities"), lambda: read_slice(p), lambda: load_slices(box / "in/slices"), lambda: load_oasis(box / "in/slices")]


CSVS = {"slices.csv": "subject,site,slice,position,split\nA,x,3,mid,train\nA,x,4,mid,train\nB,x,3,low,dev\n", "files.csv": "file,subject,site,slice,position,split\ntrain/A_0003.png,A,x,3,mid,train\ntrain/A_0004.png,A,x,4,mid,train\ndev/B_0003.png,B,x,3,low,dev\n",
        "manifest.csv": "subject,site,T1,T2\nA,x,A/T1.nii.gz,A/T2.nii.gz\nB,x,B/T1.nii.gz,B/T2.nii.gz\n", "subjects.csv": "file,subject\na.png,A\nb.png,B\n", "splits.csv": "subject,site,ixi_slices,ixi_hh_t1_2mm\nIXI002,Guys,train,\nIXI012,HH,dev,dev\n",
        "metrics.csv": "step,lr,loss,val_loss\n4,0.001,1.5,\n8,0.0009,1.25,2\n", "skipped.csv": "subject,file,reason\nA,in/A.nii,broken\n"}


def make_csv(rng, files, box):
    from mri_gen import datasets
    from mri_gen.score import subject_names
    from mri_gen.train import Log, TrainConfig
    name = rng.choice(list(CSVS)); raw = encoded(rng, text_changed(rng, CSVS[name], box))
    p = put(box, f"{name.replace('files', 'slices') if name in ('slices.csv', 'files.csv', 'manifest.csv', 'metrics.csv', 'skipped.csv') else name}", raw); d = box / "in"
    def sane(s):
        "Names from a table become names of files: saving must stay inside"
        datasets.save_slices(box / "out/saved", s)
    def cohort():
        for r in datasets.find_volumes(d): assert Path(r["subject"]).name == r["subject"] not in ("", "..") and Path(r["modality"]).name == r["modality"], f"{r} would lead out of an output folder"
    if name == "slices.csv":
        for s, n in (("train", 2), ("dev", 1)): put(box, f"{s}.npy", FINE_PARTS[n])
        return [lambda: sane(datasets.load_slices(d)), lambda: datasets.load_slices(d, "train"), lambda: core.read_rows(p)]
    if name == "files.csv":
        for f in ("train/A_0003.png", "train/A_0004.png", "dev/B_0003.png"): put(box, f, FINE_PNG)
        return [lambda: sane(datasets.load_slices(d)), lambda: sane(datasets.load_slices(d, splits=None))]
    if name == "manifest.csv":
        for f in ("A/T1", "A/T2", "B/T1", "B/T2"): put(box, f"{f}.nii.gz", b"")
        return [cohort, lambda: datasets.find_volumes(d, modalities=["T1", "T2"], skipped=[])]
    if name == "splits.csv": return [lambda: datasets._load_splits.__wrapped__(p)]
    if name == "metrics.csv": return [lambda: Log(d, TrainConfig(), 8, quiet=True).add(12, loss=1.)]
    if name == "skipped.csv": return [lambda: core.write_skipped(box / "out", core.read_skipped(d))]
    return [lambda: subject_names(p, ["a.png", "b.png"], 2), lambda: core.read_rows(p)]


STUDY = "study: s\ntask: inpaint\nprofile: smoke\nparams: {steps: 5, chs: [8, 16]}\nspace:\n  lr: {low: 1e-4, high: 1e-2, log: true}\n  batch_size: [8, 16]\n  beta1,beta2: [[0.9, 0.99], [0.5, 0.9]]\ntrials: 3\nmetric: psnr\ndirection: maximize\n"
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))


def make_yaml(rng, files, box):
    from mri_gen.sweep import read_study
    text, what = STUDY, rng.random()
    if what < .1: text = rng.choice([LAUGHS + STUDY, STUDY + LAUGHS.replace("a:", "params2:", 1), STUDY.replace("params: {steps: 5, chs: [8, 16]}", "params:\n" + "".join("  " + s + "\n" for s in LAUGHS.splitlines())), "a: &a [*a]\n" + STUDY, "params: &p {steps: *p}\n" + STUDY,
                                       STUDY + "extra: !!python/object/apply:os.mkdir ['{box}/evil']\n".replace("{box}", str(box)), "- 1\n- 2\n", "", "[" * 3000, "{" * 3000, "? " * 3000, "- " * 5000, "&a " * 100, "%YAML 9.9\n---\n" + STUDY, STUDY + "---\n" + STUDY, STUDY + "task: mmgan\n", "<<: {a: 1}\n" + STUDY, "? [a, b]\n: 1\n" + STUDY, "? {a: b}\n: 1\n" + STUDY,
                                       STUDY.replace("trials: 3", "trials: 2001-02-03"), STUDY.replace("trials: 3", "trials: 1:30:00"), STUDY.replace("trials: 3", "trials: !!binary aGk="), STUDY.replace("metric: psnr", "metric: !!set {a, b}"), STUDY.replace("low: 1e-4", "low: .nan"), STUDY.replace("[8, 16]", "[.inf]")])
    elif what < .55:
        import yaml
        text = yaml.safe_dump(value_changed(rng, value_changed(rng, yaml.safe_load(STUDY), box), box), allow_unicode=True)
    else: text = text_changed(rng, text, box)
    p = put(box, "study.yaml", encoded(rng, text))
    def study(): s = read_study(p); json.dumps(s.model_dump(mode="json"), default=str); assert len(repr(s)) < 10**6
    return [study]


def make_json(rng, files, box):
    from mri_gen.download import intact
    from mri_gen.inpaint import Config
    deep = rng.choice(["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000, "1" * 5000, '"\\ud800"', "NaN", "[]", "[1]", "1", "null", '""', "{}", "\ufeff{}", '{"steps": 1' + "0" * 400 + "}"])
    name = rng.choice(["params.json", "config.json", "files.json", "weights.json", "data.json", "DONE", "params.json.gz"])
    good = {"params.json": {"params": {"steps": 5, "chs": [8, 16], "lr": 1e-3}}, "config.json": Config.profile("smoke").model_dump(mode="json"), "files.json": {"archive": "a.tar", "md5": "0" * 32, "files": {"a.nii": [3, hashlib.sha256(b"abc").hexdigest()]}},
            "weights.json": {"unet": "unet.safetensors"}, "data.json": {"data": None, "pattern": None}, "DONE": {"step": 5, "seconds": 1., "precision": "fp32"}}
    x = good[name.removesuffix(".gz")]; text = deep if rng.random() < .1 else json.dumps(value_changed(rng, x, box)) if rng.random() < .6 else text_changed(rng, json.dumps(x, indent=1), box)
    raw = encoded(rng, text)
    if name.endswith(".gz"): raw = gzip.compress(raw, 1, mtime=0) if rng.random() < .9 else gzip.compress(b"", mtime=0)[:10] + zeros_deflated(3000) + bytes(8)
    if name.endswith(".gz") and rng.random() < .3: raw = bytes_changed(rng, raw)
    p = put(box, name, raw); d = box / "in"
    if name.startswith("params"): return [lambda: core.read_json(p), lambda: Config.profile("smoke", **core.parse_params([f"@{p}"]))]
    if name == "config.json": return [lambda: core.RunFolder(d).start(Config.profile("smoke"), {})]
    if name == "files.json": put(box, "a.nii", b"abc"); return [lambda: intact(d), lambda: intact(d, "0" * 32, deep=True)]
    if name == "weights.json": return [lambda: shipped(d)]
    if name == "data.json": return [lambda: begun(box)]
    return [lambda: begun(box)]


def shipped(folder):
    "`find_weights` with this folder as artifacts/inpaint"
    inner = checkpoint.artifacts_dir; checkpoint.artifacts_dir = lambda slug="": folder
    try:
        for w in (None, "unet"): p = checkpoint.find_weights("inpaint", w); assert isinstance(p, Path)
    finally: checkpoint.artifacts_dir = inner


def begun(box):
    "A run that is DONE, or only begun, started again"
    from mri_gen.inpaint import Config
    from mri_gen.train import train_task
    d = box / "in"
    if not (d / "data.json").exists(): put(box, "data.json", b'{"data": null, "pattern": null}')
    put(box, "config.json", json.dumps(Config.profile("smoke").model_dump(mode="json")).encode()); put(box, "env.json", b"{}")
    if not (d / "DONE").exists(): put(box, "DONE", b'{"step": 60}')
    train_task("inpaint", "smoke", out=box, name="in", device="cpu", quiet=True)


def prepare_checkpoint():
    "Two checkpoints of the task of torture.py, 5 and 10 steps old"
    import torture
    with tempfile.TemporaryDirectory() as d:
        torture.fit(lambda: torture.job(torture.config()), torture.config(), d, device="cpu", threads=1, quiet=True, max_hours=0)
        torture.fit(lambda: torture.job(torture.config()), torture.config(), d, device="cpu", threads=1, quiet=True, max_hours=0)
        return {str(p.relative_to(d)): p.read_bytes() for p in Path(d).rglob("*") if p.is_file() and p.name != "lock"}


class Evil:
    "A pickle that makes a folder where it must not"
    def __init__(self, box): self.box = box
    def __reduce__(self): return os.mkdir, (str(self.box / "evil"),)


def odd_state(rng, raw, box):
    "state.pt with something else in it"
    state = torch.load(io.BytesIO(raw), weights_only=True); b = io.BytesIO(); what = rng.randrange(10)
    k = rng.choice(list(state))
    if what == 0: state["opts"] = Evil(box)
    elif what == 1: del state[k]
    elif what == 2: state[k] = rng.choice([None, 1, "x", [], {}, torch.zeros(3), 2**70, [1, 2, 3]])
    elif what == 3: state["opts"]["g"] = rng.choice([{}, {"state": {}, "param_groups": []}, None])
    elif what == 4: state["task"]["pool"] = rng.choice([torch.zeros(1), torch.zeros(16, 1, 8, 8, dtype=torch.complex64), "x", torch.zeros(16, 1, 8, 9)])
    elif what == 5: state["task"]["more"] = torch.zeros(2)
    elif what == 6: state["newer"] = {"a": 1}
    elif what == 7: o = state["opts"]["g"]["state"]; o[0] = {n: rng.choice([torch.zeros(1), "x", None]) for n in o.get(0, {"step": 0})}
    elif what == 8: state = rng.choice([[], None, 3, "x", {"opts": 1}, {"opts": {}, "scaler": {}, "task": {}}])
    else: return rng.choice([pickle.dumps({"opts": Evil(box)}, 2), b"\x80\x02.", bytes_changed(rng, raw)])
    torch.save(state, b, _use_new_zipfile_serialization=rng.random() < .9)
    return b.getvalue()


def safetensors_changed(rng, raw, box):
    n = int.from_bytes(raw[:8], "little"); head, data = json.loads(raw[8:8 + n]), raw[8 + n:]
    what = rng.random()
    if what < .2: return bytes_changed(rng, raw)
    if what < .4:
        k = rng.choice([k for k in head if k != "__metadata__"]); t = head[k]; f = rng.choice(["dtype", "shape", "data_offsets"])
        t[f] = rng.choice(["F64", "F8_E4M3", "BOOL", "I64", "U16", "C64", "F4", "ZZ", ""]) if f == "dtype" else rng.choice([[2**40], [-1], [], [2**63], [0], t["shape"][::-1], [*t["shape"], 1]]) if f == "shape" else rng.choice([[0, 2**60], [5, 1], [0, 0], [-1, 4], [0], t["data_offsets"][::-1]])
    elif what < .75 and "mri_gen" in head.get("__metadata__", {}): head["__metadata__"]["mri_gen"] = json.dumps(value_changed(rng, json.loads(head["__metadata__"]["mri_gen"]), box)) if rng.random() < .8 else rng.choice(["", "[]", "null", "[" * 50_000, "1", '{"task": "inpaint"}', '{"task": "inpaint", "method": "unet", "config": {"chs": [1000000, 1000000]}}'])
    elif what < .85: head["__metadata__"] = rng.choice([{}, {"mri_gen": "{}"}, {"x": "y"}])
    else: head = value_changed(rng, head, box)
    h = json.dumps(head).encode(); h += b" " * (-len(h) % 8)
    return struct.pack("<Q", rng.choice([len(h)] * 12 + [0, 2**63, len(h) + 8, 2**40])) + h + data


def make_checkpoint(rng, files, box):
    import torture
    for k, b in files.items(): put(box, f"run/{k}", b)
    run = box / "in/run"; steps = sorted((run / "checkpoint").glob("step-*"))
    for c in rng.sample(steps, rng.randint(1, len(steps))):
        what, f = rng.random(), c / rng.choice(["weights.safetensors", "state.pt", "manifest.json"])
        if what < .25: f.write_bytes(bytes_changed(rng, f.read_bytes(), files["metrics.csv"] if "metrics.csv" in files else b""))
        elif what < .4:
            m = json.loads((c / "manifest.json").read_bytes()); m = rng.choice([value_changed(rng, m, box), m | {"format": rng.choice([2, 99, -1, "x", None, 1.5])}, {"sha256": m["sha256"] | {rng.choice(["../../config.json", "/dev/zero", "/dev/stdin", str(box / "secret"), "more"]): "0" * 64}}, {"sha256": []}, [], None, {"sha256": {}}, {"sha256": {"state.pt": m["sha256"]["state.pt"]}}])
            (c / "manifest.json").write_text(json.dumps(m))
        elif what < .45: f.unlink(); rng.choice([lambda: None, lambda: f.mkdir(), lambda: f.symlink_to("/dev/zero"), lambda: os.mkfifo(f)])()
        else:
            g = c / rng.choice(["weights.safetensors", "state.pt"]); g.write_bytes((safetensors_changed if g.suffix == ".safetensors" else odd_state)(rng, g.read_bytes(), box))
            m = json.loads((c / "manifest.json").read_bytes()); m["sha256"][g.name] = hashlib.sha256(g.read_bytes()).hexdigest(); (c / "manifest.json").write_text(json.dumps(m))
    return [lambda: checkpoint.load_checkpoint(run / "checkpoint"), lambda: torture.fit(lambda: torture.job(torture.config()), torture.config(), run, device="cpu", threads=1, quiet=True, max_hours=0)]


TINY = {"sr3d": dict(chs=(4, 4), emb_dim=8), "inpaint": dict(chs=(8, 16)), "mmgan": dict(chs=(8, 16)), "vqvae": dict(chs=(8, 16)), "cyclegan": dict(chs=(8, 16)), "generate": dict(chs=(8, 16), emb_dim=8)}
LOADERS = {"sr3d": "Upscaler", "inpaint": "Restorer", "mmgan": "Completer", "vqvae": "Tokeniser", "cyclegan": "Converter", "generate": "Generator"}


def prepare_weights():
    from importlib import import_module
    out = {}
    for slug, tiny in TINY.items():
        t = import_module(f"mri_gen.{slug}"); cfg = t.Config.profile("smoke", **tiny); nets = t.build(cfg); method = getattr(cfg, "method", None) or cfg.space
        out[slug] = checkpoint.weights_bytes({k: n.state_dict() for k, n in nets.items()}, {"task": slug, "method": method, "config": cfg.model_dump(mode="json"), "step": 5})
    return out


def make_weights(rng, files, box):
    from importlib import import_module
    slug = rng.choice(list(files)); p = put(box, "w.safetensors", safetensors_changed(rng, files[slug], box)); t = import_module(f"mri_gen.{slug}")
    def load(): kw = {"method": None} if slug == "inpaint" else {}; assert getattr(t, LOADERS[slug])(weights=p, device="cpu", **kw)
    return [lambda: checkpoint.load_weights(p), load]


def make_tar(rng, files, box):
    from mri_gen.download import unpack
    b = io.BytesIO(); names = ["IXI002-Guys-0828-T1.nii.gz", "a/IXI012-HH-1211-T1.nii.gz", "notes.txt"]
    with tarfile.open(fileobj=b, mode="w", format=rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])) as t:
        for n in names:
            m, data = tarfile.TarInfo(n), rng.randbytes(rng.choice([0, 9, 700]))
            if rng.random() < .35:
                m.name = rng.choice(["../evil", "a/../../evil", f"{box}/evil", "..", ".", "/", "files.json", "a", names[0], "a\\..\\evil", "./a//b", "x" * 120, "con\0evil", "..\u2215evil", "a/.", "C:evil", "a/files.json", "IXI.partial", "x.part", "é" * 40][:20])
            if rng.random() < .25: m.type, m.linkname = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, b"Z"]), rng.choice(["../secret", f"{box}/secret", names[0], "/"])
            m.mode = rng.choice([0o644, 0o4755, 0, 0o777]); m.uid = rng.choice([0, 1000, 2**20]); m.mtime = rng.choice([0, 1e9]); m.size = len(data)
            if m.type not in (tarfile.REGTYPE, tarfile.CONTTYPE, b"Z"): data, m.size = b"", 0
            with contextlib.suppress(ValueError): t.addfile(m, io.BytesIO(data))
    raw = b.getvalue()
    if rng.random() < .4: raw = bytes_changed(rng, raw[:rng.choice([512, 1536, len(raw)])])
    if rng.random() < .1: i = rng.randrange(0, max(1, len(raw) - 512), 512); raw = raw[:i + 124] + rng.choice([b"77777777777\0", b"\x80" + bytes(3) + b"\x7f" * 8, b"-0000000001\0", b"\xff" * 12]) + raw[i + 136:]
    p = put(box, "a.tar", raw); return [lambda: unpack(p, box / "out/T1", "0" * 32)]


def make_idx(rng, files, box):
    from mri_gen.download import read_idx
    raw = bytes_changed(rng, struct.pack(">BBBBIII", 0, 0, 8, 3, 2, 5, 4) + bytes(range(40)))
    if rng.random() < .5: raw = struct.pack(">BBBB", 0, 0, rng.choice([8, 9, 11, 14]), n := rng.choice([1, 3, 40, 255])) + b"".join(struct.pack(">I", rng.choice([0, 1, 2, 2**16, 2**32 - 1])) for _ in range(n)) + bytes(40)
    if rng.random() < .5: raw = gzip.compress(raw, 1, mtime=0) + (zeros_deflated(20) if rng.random() < .2 else b"")
    p = put(box, "train-images-idx3-ubyte", raw); return [lambda: read_idx(p)]


KINDS = {"nifti": (prepare_nifti, make_nifti), "npy": (ARRAYS, make_npy), "npz": (ARRAYS, make_npz), "png": (prepare_png, make_png), "csv": (dict, make_csv), "yaml": (dict, make_yaml), "json": (dict, make_json), "checkpoint": (prepare_checkpoint, make_checkpoint),
         "weights": (prepare_weights, make_weights), "tar": (dict, make_tar), "idx": (dict, make_idx)}


# running them ---------------------------------------------------------------------------------------

def constants():
    "Valid files that stand beside the changed one"
    from PIL import Image
    global FINE, FINE_PARTS, FINE_PNG
    def saved(x): b = io.BytesIO(); np.save(b, x); return b.getvalue()
    x = ARRAYS()["f4"]; FINE, FINE_PARTS = saved(x), {n: saved((x[:n, None] * 255).astype(np.uint8)) for n in (1, 2)}
    b = io.BytesIO(); Image.fromarray((x[0] * 255).astype(np.uint8)).save(b, "PNG"); FINE_PNG = b.getvalue()


def status(key): return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))


def cpu(pid):
    "Seconds that a process has computed"
    try: return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()[11:13])) / os.sysconf("SC_CLK_TCK")
    except OSError: return 0


def tree(box): return {p.name for p in box.iterdir()} | {f"../{p.name}" for p in box.parent.iterdir()}


def one(kind, seed, files, box, show=False):
    "(outcome, what happened): accepted, refused, or a finding"
    rng = random.Random(f"{kind}:{seed}"); shutil.rmtree(box, ignore_errors=True)
    for d in ("in", "out"): (box / d).mkdir(parents=True)
    (box / "secret").write_text("secret"); readers = KINDS[kind][1](rng, files, box)
    before, start, accepted = tree(box), status("VmRSS"), 0
    with contextlib.suppress(OSError): Path("/proc/self/clear_refs").write_text("5")
    for k, read in enumerate(readers):
        try:
            with warnings.catch_warnings(): warnings.simplefilter("ignore"); read()
            accepted += 1
        except UserError as e:
            text, c = str(e), e
            if show: print(f"reader {k}: {text}")
            while c is not None:                      # Python's parser calls too many brackets a MemoryError, too
                if isinstance(c, MemoryError) and not any(f.filename.endswith("ast.py") for f in traceback.extract_tb(c.__traceback__)): return "allocated", f"reader {k}: tried to allocate what a header claims: {text[:200]}"
                c = c.__cause__ or c.__context__
            if "\n" in text or not text.isprintable() and any(ord(x) < 32 for x in text): return "message", f"reader {k}: not one line: {text[:300]!r}"
            if len(text) > LINE: return "message", f"reader {k}: {len(text)} characters: {text[:200]!r}"
            if not text.startswith(("parameters: ", "inpaint: no weights are shipped")) and str(box) not in text and not any(p.name in text for p in (box / "in").rglob("*")): return "message", f"reader {k}: names no file: {text[:300]}"
        except BaseException as e:
            if show: traceback.print_exc()
            at = traceback.extract_tb(e.__traceback__); ours = [f for f in at if "mri_gen" in f.filename and "tests" not in f.filename] or at
            return "exception", f"reader {k}: {type(e).__name__}: {' '.join(str(e).split())[:200]} (in {Path(ours[-1].filename).name}:{ours[-1].name}, line {ours[-1].lineno})"
    if tree(box) != before or (box / "secret").read_text() != "secret": return "escaped", f"written outside the output folder: {sorted(tree(box) ^ before)}"
    peak = status("VmHWM") - start
    if peak > MEMORY: return "memory", f"{peak >> 20} MiB"
    return ("accepted" if accepted else "refused"), ""


def child(kind, seeds, files, box, fd):
    "Inputs one after the other, a line for each"
    signal.signal(signal.SIGINT, signal.SIG_DFL); os.setpgid(0, 0)
    null = os.open(os.devnull, os.O_RDWR); [os.dup2(null, k) for k in (0, 1, 2)]
    with contextlib.suppress(ValueError): resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); torch.set_num_threads(1)
    for s in seeds:
        try: got = one(kind, s, files, box)
        except BaseException as e: got = "unreadable", f"{type(e).__name__} in fuzz.py itself: {e}"
        os.write(fd, f"{json.dumps([s, *got])}\n".encode())
    os._exit(0)


def fuzz(kind, seeds, files, base):
    "{seed: (outcome, what happened)}"
    got, seeds, box = {}, list(seeds), base / kind / "box"
    (base / kind).mkdir(parents=True, exist_ok=True)
    while seeds:
        r, w = os.pipe(); pid = os.fork()
        if not pid:
            try: os.close(r); child(kind, seeds, files, box, w)
            except BaseException: os._exit(99)
        os.close(w); buffer, t, used, why = b"", time.monotonic(), 0, None
        while True:
            if not select.select([r], [], [], SECONDS / 4)[0]:
                if cpu(pid) - used < SECONDS and time.monotonic() - t < 6 * SECONDS: continue       # a busy machine is no hang
                why = ("hang", f"more than {SECONDS} s"); os.kill(pid, signal.SIGKILL); break
            b = os.read(r, 65536)
            if not b: break
            buffer += b
            while b"\n" in buffer:
                line, _, buffer = buffer.partition(b"\n"); s, *out = json.loads(line); got[s] = tuple(out); seeds.remove(s); t, used = time.monotonic(), cpu(pid)
        os.close(r); code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if seeds and (why or code): got[seeds.pop(0)] = why or ("died", f"exit code {code}")
    shutil.rmtree(base / kind, ignore_errors=True)
    return got


def run(n, seed, kinds=None, say=print):
    "Counts and findings over all kinds, n inputs in all"
    constants(); kinds = kinds or list(KINDS); counts, findings = {}, []
    with tempfile.TemporaryDirectory() as d:
        for i, kind in enumerate(kinds):
            m = n // len(kinds) + (i < n % len(kinds)); t = time.monotonic(); got = fuzz(kind, range(seed * 10**6, seed * 10**6 + m), KINDS[kind][0](), Path(d))
            c = counts[kind] = collections.Counter(o for o, _ in got.values()); bad = [(kind, s, o, w) for s, (o, w) in sorted(got.items()) if o not in ("accepted", "refused")]; findings += bad
            for k, s, o, w in bad: say(f"FINDING {k}:{s} {o}: {w.replace(d, '')}")
            say(f"{kind:10} {m:5} inputs: {c['accepted']:4} read, {c['refused']:4} refused, {len(bad):3} findings, {time.monotonic() - t:.0f} s", flush=True) if say is print else say(kind)
    return counts, findings


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--n", type=int, default=5000, help="inputs in all"); ap.add_argument("--seed", type=int, default=0); ap.add_argument("--kind", action="append", choices=list(KINDS))
    ap.add_argument("--replay", metavar="KIND:SEED"); ap.add_argument("--keep", metavar="DIR", type=Path)
    a = ap.parse_args()
    if a.replay:
        constants(); kind, _, s = a.replay.partition(":")
        with tempfile.TemporaryDirectory() as d:
            box = (a.keep or Path(d)) / "box"; print(*one(kind, int(s), KINDS[kind][0](), box, show=True)); return 0
    counts, findings = run(a.n, a.seed, a.kind)
    total = sum(sum(c.values()) for c in counts.values())
    print(f"{total} inputs, {len(findings)} findings", flush=True)
    return int(bool(findings))


if __name__ == "__main__": sys.exit(main())
