"What several test files share: where things lie, real data or a skip that says so, reference numbers that are renewed only on purpose"
import json, os, subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser):
    parser.addoption("--renew", action="store_true", help="write tests/reference/*.json anew instead of comparing with them (make reference); of test_browser.py: the screenshots of the explorers (make pictures)")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: not in `make check`")


@pytest.fixture(scope="session")
def root():
    "The checkout"
    return ROOT


@pytest.fixture(scope="session")
def mri_data():
    "The folder of real data; skips where there is none"
    folder = os.environ.get("MRI_GEN_DATA")
    if not folder or not Path(folder).is_dir(): pytest.skip("real data needed: set MRI_GEN_DATA to their folder (data/README.md)")
    return Path(folder)


@pytest.fixture(scope="session")
def repository():
    "Relative paths of all files that are tracked, or would be by `git add .`"
    try: r = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True)
    except OSError: pytest.skip("git needed")
    if r.returncode: pytest.skip(f"not a git checkout: {r.stderr.strip()}")
    return sorted({p for p in r.stdout.split("\0") if p and (ROOT / p).is_file()})


@pytest.fixture
def reference(request):
    "check(name, numbers, tolerance): compare a flat dict of numbers with tests/reference/name.json, each within tolerance[key]; with --renew write it"
    def check(name, numbers, tolerance):
        path = ROOT / "tests" / "reference" / f"{name}.json"
        if request.config.getoption("--renew"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({k: round(float(v), 6) for k, v in sorted(numbers.items())}, indent=1) + "\n")
            return
        assert path.exists(), f"{path.name} is missing: `make reference` writes it"
        want = json.loads(path.read_text())
        assert sorted(want) == sorted(numbers), f"{path.name}: other numbers than before; if that is meant, `make reference`"
        off = {k: (want[k], float(numbers[k])) for k in want if not abs(want[k] - float(numbers[k])) <= tolerance[k]}
        assert not off, f"{path.name}: (reference, now) differ by more than the tolerance: {off}; if that is meant, `make reference`"
    return check
