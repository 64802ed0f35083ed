"The README says what is true: its links lead somewhere, its commands and options exist, its Python can be imported"
import ast, importlib, inspect, re, shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [p for p in (ROOT / n for n in ("README.md", "CONTRIBUTING.md", "REFERENCES.md", "kaggle/README.md")) if p.exists()]


def fences(text, language): return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    links = [x.split("#")[0] for x in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:|#", x)]
    assert [x for x in links if not (page.parent / x).exists()] == []
    assert links or page.name != "README.md"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = {t for page in PAGES for t in re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(encoding="utf-8"), re.M)}
    assert {"demo", "test"} <= named and [t for t in sorted(named) if not re.search(rf"^{t}:", makefile, re.M)] == []


def commands():
    "[mri_gen verb ... --option] of all code, fenced or between backticks, without comments"
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for line in [l for f in fences(text, "bash") for l in f.splitlines()] + re.findall(r"`(mri_gen [^`\n]+)`", text):
            if line.startswith("mri_gen "): yield page.name, shlex.split(line, comments=True)[1:]


def test_commands_exist():
    if not (ROOT / "mri_gen" / "cli.py").exists(): pytest.skip("mri_gen/cli.py does not exist yet")
    import typer
    from mri_gen import cli
    app = next(v for v in vars(cli).values() if isinstance(v, typer.Typer) and v.registered_commands and (v.registered_groups or len(v.registered_commands) > 3))
    top, seen = typer.main.get_command(app), 0
    for page, words in commands():
        command, words = top, list(words)
        while hasattr(command, "commands"):
            verb = words.pop(0)
            assert verb in command.commands, f"{page}: mri_gen has no {verb!r}"
            command = command.commands[verb]
            seen += 1
        known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
        used = {w.split("=")[0] for w in words if re.match(r"-{1,2}[a-z]", w)}
        assert used <= known, f"{page}: mri_gen {verb} has no {sorted(used - known)}"
    assert seen


def test_python_of_the_readme():
    for code in fences((ROOT / "README.md").read_text(encoding="utf-8"), "python"):
        for n in ast.walk(ast.parse(code)):
            if not isinstance(n, ast.ImportFrom) or not n.module.startswith("mri_gen"): continue
            module = importlib.import_module(n.module)
            for a in n.names:
                thing = getattr(module, a.name)
                for call in (c for c in ast.walk(ast.parse(code)) if isinstance(c, ast.Call) and getattr(c.func, "id", "") == (a.asname or a.name)):
                    inspect.signature(thing).bind(*call.args, **{k.arg: k.value for k in call.keywords})


def test_slices_of_the_readme_are_taken(tmp_path, monkeypatch):
    import nibabel as nib, numpy as np
    from mri_gen.datasets import check_array
    from mri_gen.phantom import simulate_subject
    code, = (c for c in fences((ROOT / "README.md").read_text(encoding="utf-8"), "python") if "extract_slices" in c)
    monkeypatch.chdir(tmp_path); nib.save(nib.Nifti1Image(*simulate_subject(1, 0, 4.)["images"]["T1"]), "T1.nii.gz"); exec(code, {})
    x = check_array("slices.npy"); assert x.shape[1:] == (1, 64, 64) and x.max() == 1 and .05 < x.mean() < .6
