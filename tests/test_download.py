"The download (nbs/06_download) against every fault we could think of, played by a server on this machine: the right bytes in the end, or one clear error and nothing lost"
import contextlib, errno, hashlib, io, multiprocessing, tarfile, threading, time
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from mri_gen import download as D
from mri_gen.core import UserError

BLOB = np.random.default_rng(0).bytes(300_000)
MD5 = hashlib.md5(BLOB).hexdigest()


def tar_of(*entries):
    "A tar file from (name, bytes), or (name, type, link)"
    f = io.BytesIO()
    with tarfile.open(fileobj=f, mode="w") as tar:
        for name, x, *link in entries:
            m = tarfile.TarInfo(name)
            if link: m.type, m.linkname = x, link[0]; tar.addfile(m)
            else: m.size = len(x); tar.addfile(m, io.BytesIO(x))
    return f.getvalue()


class Server:
    """Serves `files`; each GET takes the next dict of `faults` (the last one stays):
    status, drop (bytes until the connection is closed), ranges=False, shift (of Content-Range), lie (added to Content-Length), flip (index of a wrong byte), chunk and pause (slow), length=False, type"""
    def __init__(self, files, *faults, limit=60, head=True):
        self.files, self.faults, self.limit, self.head, self.log = files, list(faults) or [{}], limit, head, []

    def __enter__(self):
        outer = self
        class Handler(BaseHTTPRequestHandler):
            timeout = 5
            def log_message(self, *_): pass
            def do_HEAD(self): outer.answer(self, {} if outer.head else dict(status=501))
            def do_GET(self): outer.answer(self, outer.faults.pop(0) if len(outer.faults) > 1 else outer.faults[0])
        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.http.timeout, self.stop, self.busy = .02, threading.Event(), threading.Lock()
        self.base = f"http://127.0.0.1:{self.http.server_port}/"
        self.thread = threading.Thread(target=self.serve, daemon=True); self.thread.start()
        return self

    def serve(self):
        end = time.monotonic() + 30
        while len(self.log) < self.limit and time.monotonic() < end and not self.stop.is_set(): self.http.handle_request()

    def __exit__(self, *_): self.stop.set(); self.thread.join(5); self.http.server_close()

    def answer(self, h, fault):
        "One answer; logs (method, first byte asked for, bytes sent)"
        with self.busy: self._answer(h, fault)

    def _answer(self, h, fault):
        data, asked = self.files.get(h.path[1:]), int(h.headers.get("Range", "bytes=0-")[6:-1])
        at, sent = asked if fault.get("ranges", True) else 0, 0
        try:
            if "status" in fault or data is None: return h.send_error(fault.get("status", 404))
            if at and at >= len(data): return h.send_error(416)
            if "flip" in fault: data = data[:fault["flip"]] + bytes([data[fault["flip"]] ^ 1]) + data[fault["flip"] + 1:]
            h.send_response(206 if at else 200); h.send_header("Content-Type", fault.get("type", "application/x-tar"))
            if fault.get("length", True): h.send_header("Content-Length", str(len(data) - at + fault.get("lie", 0)))
            if at: h.send_header("Content-Range", f"bytes {at + fault.get('shift', 0)}-{len(data) - 1}/{len(data) + fault.get('lie', 0)}")
            h.end_headers()
            if h.command == "HEAD": return
            body = data[at:][:fault.get("drop", len(data))]
            for i in range(0, len(body), fault.get("chunk", 2**20)):
                h.wfile.write(body[i:i + fault.get("chunk", 2**20)]); sent += fault.get("chunk", len(body)); time.sleep(fault.get("pause", 0))
        except OSError: pass                                                 # the client has gone
        finally: self.log.append((h.command, asked, sent)); h.close_connection = True

    @property
    def gets(self):
        with self.busy: return [at for m, at, _ in self.log if m == "GET"]       # an answer is logged a moment after its last byte has arrived


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch): monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def fetch(tmp_path):
    "fetch(server, ...) -> the bytes of tmp_path/x, after which nothing else lies there; quick in everything"
    def go(server, **kw):
        p = D.fetch([server.base + "x"], tmp_path / "x", kw.pop("md5", MD5), **(dict(tries=4, wait=.001, timeout=5.) | kw))
        assert sorted(q.name for q in tmp_path.iterdir()) == ["x"]
        return p.read_bytes()
    return go


def fails(call, *says):
    with pytest.raises(UserError) as e: call()
    text = str(e.value)
    assert "\n" not in text and [s for s in says if s not in text] == [], text
    return text


# ---- one file: the right bytes

def test_served_well(fetch):
    with Server({"x": BLOB}) as s: assert fetch(s) == BLOB
    assert s.gets == [0]


def test_drops_midway_several_times_and_no_byte_comes_twice(fetch):
    with Server({"x": BLOB}, dict(drop=50_000), dict(drop=1), dict(drop=100_000), dict(drop=0), dict(drop=7), {}) as s: assert fetch(s) == BLOB
    assert s.gets == [0, 50_000, 50_001, 150_001, 150_001, 150_008]


def test_many_drops_are_not_a_reason_to_give_up(fetch):
    with Server({"x": BLOB}, dict(drop=10_000)) as s: assert fetch(s, tries=2) == BLOB
    assert len(s.gets) == 30


@pytest.mark.parametrize("length", [True, False])
def test_ignores_range(fetch, length):
    "Also without a Content-Length, where the end and a drop look alike"
    with Server({"x": BLOB}, dict(drop=200_000, ranges=False, length=length), dict(drop=100_000, ranges=False, length=length), dict(ranges=False, length=length)) as s: assert fetch(s) == BLOB
    assert s.gets == [0, 200_000, 200_000]                                   # the second, shorter answer did not shorten what was there


def test_no_length_and_drops(fetch):
    with Server({"x": BLOB}, dict(drop=50_000, length=False), dict(drop=50_000, length=False), dict(length=False)) as s: assert fetch(s) == BLOB
    assert s.gets == [0, 50_000, 100_000]


def test_a_content_range_that_does_not_fit(fetch):
    with Server({"x": BLOB}, dict(drop=50_000), dict(shift=10), {}) as s: assert fetch(s) == BLOB
    assert s.gets == [0, 50_000, 0]


def test_promises_more_than_it_has(fetch):
    with Server({"x": BLOB}, dict(lie=1000)) as s: assert fetch(s) == BLOB


def test_slow_with_progress(fetch, capsys, monkeypatch):
    monkeypatch.setattr(D, "INTERVAL", .05)
    with Server({"x": BLOB}, dict(chunk=10_000, pause=.01)) as s: assert fetch(s) == BLOB
    lines = [l for l in capsys.readouterr().out.splitlines() if l.startswith("download x: ")]
    assert 2 <= len(lines) <= 15 and "/0.3 MB speed=" in lines[0] and " eta=00:00:0" in lines[0]


def test_stalls(fetch):
    with Server({"x": BLOB}, dict(chunk=100_000, pause=.3), {}) as s: assert fetch(s, timeout=.2, tries=20, wait=.02) == BLOB
    assert s.gets[0] == 0 and set(s.gets[1:]) == {100_000}                   # also those it only came to when nobody waited any more


def test_busy_for_a_while(fetch):
    with Server({"x": BLOB}, dict(status=503), dict(status=429), dict(drop=9), dict(status=500), {}) as s: assert fetch(s) == BLOB
    assert s.gets == [0, 0, 0, 9, 9]


def test_a_wrong_byte_in_one_piece_of_several(fetch, capsys):
    with Server({"x": BLOB}, dict(drop=50_000, flip=7), {}) as s: assert fetch(s) == BLOB
    assert s.gets == [0, 50_000, 0] and "once more from the start" in capsys.readouterr().out


@pytest.mark.parametrize("junk", [b"?" * 99, BLOB[:100_000], BLOB, BLOB + b"more", b"?" * 400_000])
def test_whatever_lies_there_from_before(fetch, tmp_path, junk):
    (tmp_path / "x.part").write_bytes(junk)
    with Server({"x": BLOB}) as s: assert fetch(s) == BLOB
    assert s.gets == [len(junk)] + [0] * (junk != BLOB[:len(junk)])


def test_the_next_address(tmp_path):
    with Server({"x": BLOB}) as s:
        assert D.fetch([s.base + "gone", "https://" + s.base[7:] + "x", s.base + "x"], tmp_path / "x", MD5, wait=.001, timeout=2).read_bytes() == BLOB


# ---- one file: a clear error, and nothing lost

def test_not_there(fetch, tmp_path):
    with Server({}) as s: fails(lambda: fetch(s), "x: ", "HTTP 404 Not Found", "check the address")
    assert s.gets == [0] and list(tmp_path.iterdir()) == []


def test_nobody_answers(fetch, tmp_path):
    with Server({}) as s: pass                                               # its port is closed now
    fails(lambda: fetch(s), "Connection refused", "call again")
    assert list(tmp_path.iterdir()) == []


def test_gives_up_and_goes_on_next_time(fetch, tmp_path):
    with Server({"x": BLOB}, dict(drop=120_000), dict(drop=0)) as s: fails(lambda: fetch(s), "connection closed after 120000 of 300000 bytes", "120.0 kB are kept", "call again to go on")
    assert len(s.gets) == 5 and (tmp_path / "x.part").read_bytes() == BLOB[:120_000]
    with Server({"x": BLOB}) as s: assert fetch(s) == BLOB
    assert s.gets == [120_000]


def test_forbidden_in_the_middle(fetch, tmp_path):
    with Server({"x": BLOB}, dict(drop=120_000), dict(status=403)) as s: fails(lambda: fetch(s), "HTTP 403", "120.0 kB are kept")
    with Server({"x": BLOB}) as s: assert fetch(s) == BLOB and s.gets == [120_000]


def test_a_wrong_byte(fetch, tmp_path):
    with Server({"x": BLOB}, dict(flip=123_456)) as s: fails(lambda: fetch(s), f"expected {MD5}", "x.wrong", "call again to fetch it anew")
    assert s.gets == [0] and [p.name for p in tmp_path.iterdir()] == ["x.wrong"]
    with Server({"x": BLOB}) as s: assert fetch(s) == BLOB                   # and the wrong one is gone


def test_a_wrong_byte_each_time(fetch, tmp_path):
    with Server({"x": BLOB}, dict(drop=50_000), dict(flip=200_000)) as s: fails(lambda: fetch(s), "its MD5 is")
    assert s.gets == [0, 50_000, 0] and [p.name for p in tmp_path.iterdir()] == ["x.wrong"]


def test_promises_less_than_it_has(fetch, tmp_path):
    with Server({"x": BLOB}, dict(lie=-1000)) as s: fails(lambda: fetch(s), "its MD5 is")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("page", [dict(type="text/html"), dict(ranges=False), dict(ranges=False, length=False)])
def test_a_login_page_does_not_eat_the_partial(fetch, tmp_path, page):
    with Server({"x": BLOB}, dict(drop=250_000), dict(drop=0)) as s: fails(lambda: fetch(s), "250.0 kB are kept")
    with Server({"x": b"please log in"}, page) as s: fails(lambda: fetch(s), "250.0 kB are kept", "instead of the file" if "type" in page else "delete that if it is not a part of this file")
    assert (tmp_path / "x.part").read_bytes() == BLOB[:250_000]
    with Server({"x": BLOB}) as s: assert fetch(s) == BLOB and s.gets == [250_000]


def full_after(monkeypatch, room):
    "The disk of mri_gen.download takes `room` more bytes"
    left = [room]
    def fake(path, mode="r", *a, **k):
        f = open(path, mode, *a, **k)
        if "r+" not in mode and "w" not in mode: return f
        class Full:
            def __getattr__(self, name): return getattr(f, name)
            def __enter__(self): return self
            def __exit__(self, *_): f.close()
            def write(self, b):
                f.write(b[:left[0]]); f.flush()
                if len(b) > left[0]: left[0] = 0; raise OSError(errno.ENOSPC, "No space left on device")
                left[0] -= len(b)
        return Full()
    monkeypatch.setattr(D, "open", fake, raising=False)


def test_the_disk_fills(fetch, tmp_path, monkeypatch):
    with monkeypatch.context() as m, Server({"x": BLOB}, dict(chunk=50_000, pause=.002)) as s:
        full_after(m, 130_000)
        fails(lambda: fetch(s), "x.part: cannot be written (No space left on device)", "130.0 kB are kept", "call again")
    assert s.gets == [0] and (tmp_path / "x.part").read_bytes() == BLOB[:130_000]
    with Server({"x": BLOB}) as s: assert fetch(s) == BLOB and s.gets == [130_000]


def test_the_disk_really_refuses(fetch, tmp_path):
    "The operating system's own refusal: a limit on the size of files"
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Server({"x": BLOB}) as s:
        resource.setrlimit(resource.RLIMIT_FSIZE, (99_000, hard))
        try: text = fails(lambda: fetch(s), "x.part: cannot be written (File too large)", "call again")
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "99.0 kB are kept" in text and (tmp_path / "x.part").read_bytes() == BLOB[:99_000]


def test_no_room_is_seen_before_the_first_byte(fetch, tmp_path, monkeypatch):
    usage = lambda free: lambda p: type("U", (), dict(free=free))
    monkeypatch.setattr(D.shutil, "disk_usage", usage(D.SPARE + 299_999))
    with Server({"x": BLOB}) as s: fails(lambda: fetch(s), "needs 67.4 MB, but only 67.4 MB are free", "free space or choose another --out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x.part").write_bytes(BLOB[:1])                              # one byte is there: the rest fits
    with Server({"x": BLOB}) as s: assert fetch(s) == BLOB


def test_killed_in_the_middle(fetch, tmp_path):
    with Server({"x": BLOB}, dict(chunk=5_000, pause=.02)) as s:
        p = multiprocessing.get_context("fork").Process(target=D.fetch, args=([s.base + "x"], tmp_path / "x", MD5)); p.start()
        end = time.monotonic() + 20
        while D.size_of(tmp_path / "x.part") < 20_000 and time.monotonic() < end: time.sleep(.005)
        p.kill(); p.join()
    have = D.size_of(tmp_path / "x.part")
    assert 20_000 <= have < 300_000 and [q.name for q in tmp_path.iterdir()] == ["x.part"]
    with Server({"x": BLOB}) as s: assert fetch(s) == BLOB and s.gets == [have]


def test_any_mixture_of_faults(tmp_path):
    "40 random servers: never a wrong file, never a partial that a good server cannot complete"
    done = 0
    for seed in range(40):
        rng, x = np.random.default_rng(seed), tmp_path / f"{seed}" / "x"
        x.parent.mkdir()
        if rng.random() < .3: (x.parent / "x.part").write_bytes(BLOB[:rng.integers(1, 300_000)] if rng.random() < .6 else rng.bytes(rng.integers(1, 400_000)))
        faults = [{k: v for k, v in dict(drop=int(rng.integers(0, 300_001)), ranges=False, shift=int(rng.integers(-5, 6)), lie=int(rng.integers(-9, 10)), flip=int(rng.integers(0, 300_000)),
                                         length=False, status=int(rng.choice([408, 429, 500, 503, 404])), type="text/html").items() if rng.random() < (.6 if k == "drop" else .12)} for _ in range(6)]
        with Server({"x": BLOB}, *faults, {}) as s:
            with contextlib.suppress(UserError): D.fetch([s.base + "x"], x, MD5, tries=3, wait=.0005, timeout=2); done += 1
        assert not x.exists() or x.read_bytes() == BLOB, (seed, faults)
        if not x.exists():
            with Server({"x": BLOB}) as s: assert D.fetch([s.base + "x"], x, MD5, tries=3, wait=.0005, timeout=2).read_bytes() == BLOB, (seed, faults)
        assert {p.name for p in x.parent.iterdir()} == {"x"}, (seed, faults)
    assert done > 15


# ---- archives

VOLUMES = {"T1": [("IXI002-Guys-0828-T1.nii.gz", b"one" * 9_000), ("IXI012-HH-1211-T1.nii.gz", b"two" * 9_000)], "T2": [("./IXI002-Guys-0828-T2.nii.gz", b"three" * 9_000)], "PD": [("IXI012-HH-1211-PD.nii.gz", b"four" * 9_000)]}


@pytest.fixture
def ixi(tmp_path, monkeypatch):
    "ixi(server, modalities=...) downloads small archives laid out as IXI's into tmp_path/ixi; ixi.tars are they"
    def go(server, modalities=("T1", "T2"), **kw): return D.download_ixi(tmp_path / "ixi", modalities, server.base, **(dict(tries=3, wait=.001, timeout=5.) | kw))
    go.tars = {f"IXI-{m}.tar": tar_of(*v) for m, v in VOLUMES.items()}
    go.out = tmp_path / "ixi"
    go.publish = lambda: [monkeypatch.setitem(D.IXI_MD5, m, hashlib.md5(go.tars[f"IXI-{m}.tar"]).hexdigest()) for m in VOLUMES]
    go.publish()
    return go


def listing(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != ".lock")


def test_ixi_published_sums():
    "As in torchio (src/torchio/datasets/ixi.py)"
    assert D.IXI_MD5 == dict(T1="34901a0593b41dd19c1a1f746eac2d58", T2="e3140d78730ecdd32ba92da48c0a9aaa", PD="88ecd9d1fa33cb4a2278183b42ffd749")
    assert D.IXI_PLACE == "biomedic.doc.ic.ac.uk/brain-development/downloads/IXI/"


def test_ixi_and_again(ixi, capsys):
    want = ["T1/IXI002-Guys-0828-T1.nii.gz", "T1/IXI012-HH-1211-T1.nii.gz", "T1/files.json", "T2/IXI002-Guys-0828-T2.nii.gz", "T2/files.json", "manifest.csv"]
    with Server(ixi.tars, dict(drop=20_000)) as s:
        ixi(s); n = len(s.log)
        assert listing(ixi.out) == want and (ixi.out / want[1]).read_bytes() == b"two" * 9_000
        assert (ixi.out / "manifest.csv").read_text() == f"subject,site,T1,T2\nIXI002,Guys,{want[0]},{want[3]}\nIXI012,HH,{want[1]},\n"
        ixi(s); assert len(s.log) == n and listing(ixi.out) == want          # nothing was asked, nothing changed
        ixi(s, ["PD"]); assert s.gets[-1] == 40_000 and (ixi.out / "manifest.csv").read_text().startswith("subject,site,T1,T2,PD\n")
    assert "CC BY-SA 3.0" in capsys.readouterr().out
    D.ixi(["T1"], ixi.out, "http://127.0.0.1:9/")                            # all there: no server is needed
    assert "T1 2, T2 1, PD 1 volumes of 2 subjects, 0 with all of these" in capsys.readouterr().out


def test_one_modality_fails_the_others_stay(ixi):
    with Server({k: v for k, v in ixi.tars.items() if "T2" not in k}) as s: fails(lambda: ixi(s), "IXI-T2.tar", "HTTP 404")
    assert listing(ixi.out) == ["T1/IXI002-Guys-0828-T1.nii.gz", "T1/IXI012-HH-1211-T1.nii.gz", "T1/files.json"]
    with Server(ixi.tars) as s: ixi(s); assert len(s.gets) == 1


def test_bad_modality(ixi):
    with Server(ixi.tars) as s: fails(lambda: ixi(s, ["T1", "MRA"]), "--modality MRA", "use T1, T2, PD"); assert s.log == []


@pytest.mark.parametrize("head", [True, False])
def test_room_for_all_before_the_first_byte(ixi, monkeypatch, head):
    "Where the server answers HEAD, the second archive is counted before the first is fetched"
    monkeypatch.setattr(D.shutil, "disk_usage", lambda p: type("U", (), dict(free=D.SPARE + 2 * len(ixi.tars["IXI-T1.tar"]) + 10_000)))
    with Server(ixi.tars, head=head) as s: fails(lambda: ixi(s), "and unpacking", "free space or choose another --out") if head else ixi(s)
    assert s.gets == [] if head else len(s.gets) == 2


def test_the_disk_fills_while_unpacking(ixi, monkeypatch):
    with monkeypatch.context() as m, Server(ixi.tars) as s:
        full_after(m, len(ixi.tars["IXI-T1.tar"]) + 30_000)
        fails(lambda: ixi(s, ["T1"]), "No space left on device", "IXI-T1.tar is kept")
    assert listing(ixi.out) == ["IXI-T1.tar"]
    with Server(ixi.tars) as s: ixi(s, ["T1"]); assert s.log == []           # not fetched again
    assert "T1/files.json" in listing(ixi.out) and "IXI-T1.tar" not in listing(ixi.out)


def test_killed_while_unpacking(ixi, monkeypatch):
    "What a killed process leaves behind is not taken for volumes, and makes room for the whole"
    from mri_gen.datasets import find_volumes
    half = ixi.out / "T1.partial"; half.mkdir(parents=True)
    (half / "IXI002-Guys-0828-T1.nii.gz.part").write_bytes(b"on")
    with pytest.raises(UserError): find_volumes(ixi.out)
    with Server(ixi.tars) as s: ixi(s, ["T1"])
    assert not half.exists() and (ixi.out / "T1/IXI002-Guys-0828-T1.nii.gz").read_bytes() == b"one" * 9_000


def test_interrupted_while_unpacking(ixi, monkeypatch):
    with monkeypatch.context() as m, Server(ixi.tars) as s:
        m.setattr(D, "_copy", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): ixi(s, ["T1"])
    assert listing(ixi.out) == ["IXI-T1.tar"] and not (ixi.out / "T1").exists()


def test_an_archive_fetched_by_other_means(ixi):
    ixi.out.mkdir(); (ixi.out / "IXI-T1.tar").write_bytes(ixi.tars["IXI-T1.tar"])
    with Server({}) as s: ixi(s, ["T1"], keep=True); assert s.log == []
    assert (ixi.out / "IXI-T1.tar").exists()
    (ixi.out / "IXI-T2.tar").write_bytes(ixi.tars["IXI-T2.tar"][:999])
    with Server({}) as s: fails(lambda: ixi(s, ["T2"]), "IXI-T2.tar: its MD5 is not", "rename it to IXI-T2.tar.part")
    (ixi.out / "IXI-T2.tar").rename(ixi.out / "IXI-T2.tar.part")
    with Server(ixi.tars) as s: ixi(s, ["T2"]); assert s.gets == [999]


def test_a_folder_that_is_not_ours_or_was_changed(ixi):
    (ixi.out / "T1").mkdir(parents=True); (ixi.out / "T1/mine.nii.gz").write_bytes(b"mine")
    with Server(ixi.tars) as s:
        fails(lambda: ixi(s, ["T1"]), "was not made by this command", "move it away"); assert s.log == []
        ixi(s, ["T2"]); (ixi.out / "T2/IXI002-Guys-0828-T2.nii.gz").write_bytes(b"short"); n = len(s.log)
        fails(lambda: ixi(s, ["T2"]), "1 files are missing or changed (first: IXI002-Guys-0828-T2.nii.gz)"); assert len(s.log) == n
    assert (ixi.out / "T1/mine.nii.gz").read_bytes() == b"mine"


def test_two_at_once(ixi):
    with D._alone(ixi.out), Server(ixi.tars) as s: fails(lambda: ixi(s), "another download is writing here"); assert s.log == []
    with Server(ixi.tars) as s: ixi(s)                                        # the lock file alone blocks nobody


def test_read_only_folder(ixi, monkeypatch):
    def no(path, *a, **k): raise PermissionError(errno.EACCES, "Permission denied", str(path))
    monkeypatch.setattr(D, "open", no, raising=False)                        # chmod does not stop root
    with Server(ixi.tars) as s: fails(lambda: ixi(s), "cannot be written (Permission denied)", "choose another --out"); assert s.log == []


def test_out_is_a_file(ixi):
    ixi.out.write_text("mine")
    with Server(ixi.tars) as s: fails(lambda: ixi(s), "choose another --out")
    assert ixi.out.read_text() == "mine"


EVIL = {"up": ("../evil", b"!"), "deep up": ("a/../../evil", b"!"), "absolute": ("{tmp}/evil", b"!"), "symlink": ("evil", tarfile.SYMTYPE, "{tmp}"), "harmless symlink": ("link", tarfile.SYMTYPE, "IXI002-Guys-0828-T1.nii.gz"),
        "hard link": ("evil", tarfile.LNKTYPE, "../secret"), "device": ("evil", tarfile.CHRTYPE, ""), "block device": ("evil", tarfile.BLKTYPE, ""), "fifo": ("evil", tarfile.FIFOTYPE, ""),
        "twice": ("./IXI002-Guys-0828-T1.nii.gz", b"!"), "our list": ("files.json", b"{}")}


@pytest.mark.parametrize("kind", EVIL)
@pytest.mark.parametrize("second_opinion", [True, False])
def test_archives_that_want_out(ixi, tmp_path, monkeypatch, kind, second_opinion):
    "With Python's own filter and without it: refused as a whole, nothing written"
    if not second_opinion: monkeypatch.delattr(tarfile, "data_filter", raising=False)
    (tmp_path / "secret").write_text("secret")
    evil = [x.format(tmp=tmp_path) if isinstance(x, str) else x for x in EVIL[kind]]
    ixi.tars["IXI-T1.tar"] = tar_of(VOLUMES["T1"][0], evil, ("evil/inside", b"!")); ixi.publish()
    with Server(ixi.tars) as s: fails(lambda: ixi(s, ["T1"]), "IXI-T1.tar: entry", "not unpacked")
    assert listing(tmp_path) == ["ixi/IXI-T1.tar", "secret"] and (tmp_path / "secret").read_text() == "secret" and not (ixi.out / "T1.partial").exists()


@pytest.mark.parametrize("data, says", [(b"no archive at all", "not a readable tar file"), (b"", "not a readable tar file"), (tar_of(*VOLUMES["T1"])[:30_000], "not a readable tar file"), (tar_of(), "no file in it"),
                                        (tar_of(("notes.txt", b"hello")), "no volume with a name like IXI002")])
def test_archives_that_are_none(ixi, data, says):
    "Whose MD5 is nevertheless the published one"
    ixi.tars["IXI-T1.tar"] = data; ixi.publish(); ixi.out.mkdir(); (ixi.out / "IXI-T1.tar").write_bytes(data)
    with Server(ixi.tars) as s: fails(lambda: ixi(s, ["T1"]), says)
    assert not (ixi.out / "manifest.csv").exists()


def test_a_huge_claim(ixi, monkeypatch):
    "An entry that claims a terabyte: refused for want of space or of content, before anything is written"
    m = tarfile.TarInfo("IXI002-Guys-0828-T1.nii.gz"); m.size = 2**50
    ixi.tars["IXI-T1.tar"] = m.tobuf() + bytes(20_000); ixi.publish()
    with Server(ixi.tars) as s: fails(lambda: ixi(s, ["T1"]), "IXI-T1.tar")
    assert listing(ixi.out) == ["IXI-T1.tar"]
