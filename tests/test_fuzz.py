"What comes from outside, damaged and absurd: a fixed few hundred of the inputs of tests/fuzz.py. Thousands: `python tests/fuzz.py --n 5000`"
import os, pickle, sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fuzz

pytestmark = pytest.mark.slow   # together minutes: `make test`, not `make check`


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_each_input_is_read_or_refused_in_one_line(kind):
    said = []
    counts, findings = fuzz.run(24, 0, [kind], lambda *a, **kw: said.append(a[0]))
    assert not findings and sum(counts[kind].values()) == 24, "\n".join(said)


@pytest.fixture
def box(tmp_path): fuzz.constants(); return tmp_path / "base/box"


@pytest.mark.parametrize("does, outcome", [(lambda p: 1 / 0, "exception"), (lambda p: (_ for _ in ()).throw(fuzz.UserError("broken")), "message"), (lambda p: (p.parents[1] / "evil").mkdir(), "escaped"), (lambda p: (p.parents[2] / "evil").mkdir(), "escaped"),
                                           (lambda p: bytearray(fuzz.MEMORY + 2**28), "memory"), (lambda p: os.kill(os.getpid(), 9), "died"), (lambda p: __import__("time").sleep(60), "hang"), (lambda p: (_ for _ in ()).throw(fuzz.UserError(f"{p}: too large")) if not claim() else 1, "allocated"),
                                           (lambda p: pickle.loads(pickle.dumps(fuzz.Evil(p.parents[1]))), "escaped")], ids=lambda v: v if isinstance(v, str) else "does")   # not the address of a function: workers must agree
def test_it_sees_what_it_looks_for(does, outcome, tmp_path, monkeypatch):
    "Each kind of finding, made on purpose; and the input after it is tried as if nothing had happened"
    def make(rng, files, box): p = fuzz.put(box, "a", b""); return [(lambda: does(p)) if rng.first else lambda: 1]
    class Random(fuzz.random.Random):
        def __init__(self, key): super().__init__(key); self.first = key.endswith(":0")
    monkeypatch.setattr(fuzz.random, "Random", Random); monkeypatch.setattr(fuzz, "SECONDS", 1); monkeypatch.setitem(fuzz.KINDS, "bad", (dict, make))
    got = fuzz.fuzz("bad", [0, 1], {}, tmp_path)
    assert got[0][0] in ((outcome, "exception") if outcome == "memory" else (outcome,)) and got[1] == ("accepted", "")


def claim():
    "As a reader that allocates what a header claims, and says so nicely when it cannot"
    try: return bytearray(2**40)
    except MemoryError: raise fuzz.UserError("a: does not fit into memory") from None


def test_an_input_is_a_function_of_its_number(tmp_path):
    fuzz.constants(); files, got = fuzz.prepare_nifti(), []
    for k in range(2):
        for s in range(5): fuzz.one("nifti", s, files, tmp_path / "base/box"); got.append([p.read_bytes() for p in sorted((tmp_path / "base/box/in").rglob("*")) if p.is_file()])
    assert got[:5] == got[5:]
