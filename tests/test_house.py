"The rules of the house (CONTRIBUTING.md), checked: what is generated, who imports whom, what may be committed"
import ast, configparser, json, re, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS = sorted(p for p in (ROOT / "nbs").glob("*.ipynb"))
EXPERIMENTS = [p for p in NBS if re.match(r"5\d_", p.name)]
MIB = 2**20
# what the training entry must not need at import time: it also starts on a bare GPU machine
BARE = {"mri_gen", "torch", "numpy", "pydantic", "safetensors"}
HEAVY = "nibabel scipy skimage SimpleITK matplotlib torchmetrics typer papermill nilearn pandas sklearn PIL IPython monai optuna dask ipywidgets".split()


def cells(path, kind="code"): return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]
def source(cell): return "".join(cell["source"])
def directive(cell, word): return re.search(rf"^#\| *{word}\b *(\S*)", source(cell), re.M)
def ids(paths): return [p.name for p in paths]


def numbers():
    "{module: (number, notebook)} of all notebooks that export"
    out = {}
    for p in NBS:
        for d in filter(None, (directive(c, "default_exp") for c in cells(p))):
            assert d[1] not in out, f"{p.name} and {out[d[1]][1]} both export mri_gen/{d[1]}.py: the second overwrites the first"
            out[d[1]] = int(re.match(r"(\d\d)_", p.name)[1]), p.name
    return out


def imports(tree, top=False):
    "Modules that a syntax tree imports ('mri_gen.core', 'scipy'); `top`: only what runs when it is imported"
    def walk(node):
        for n in ast.iter_child_nodes(node):
            if top and isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)): continue
            yield n
            yield from walk(n)
    for n in walk(tree):
        if isinstance(n, ast.Import): yield from (a.name for a in n.names)
        elif isinstance(n, ast.ImportFrom):
            base = ".".join(filter(None, ["mri_gen" if n.level else "", n.module or ""]))
            yield from (f"{base}.{a.name}" for a in n.names) if base == "mri_gen" else (base,)
        elif isinstance(n, ast.Call) and getattr(n.func, "attr", getattr(n.func, "id", "")) in ("import_module", "__import__"):
            if n.args and isinstance(n.args[0], ast.Constant): yield str(n.args[0].value)


def tree(module): return ast.parse((ROOT / "mri_gen" / f"{module}.py").read_text(encoding="utf-8"))
def inside(names): return {n.split(".")[1] for n in names if n.startswith("mri_gen.")}
def task_of(module, number):
    "The task a module belongs to, or None: 21_inpaint_study belongs to 21_inpaint, the shortest name of its number that it continues"
    if module not in number or not 20 <= (k := number[module][0]) < 30: return None
    return min((m for m, (n, _) in number.items() if n == k and f"{module}_".startswith(f"{m}_")), key=len)
def tasks(): return sorted({task_of(m, numbers()) for m in numbers()} - {None})


def test_every_module_has_its_notebook():
    "nbdev never deletes a module whose notebook is gone or renamed"
    modules = {p.stem for p in (ROOT / "mri_gen").glob("*.py")} - {"__init__", "_modidx"}
    assert modules == set(numbers()), "mri_gen/*.py and the notebooks' default_exp differ; delete the stale module, or run `make prepare`"


def test_one_notebook_one_module_one_name():
    for module, (_, nb) in numbers().items(): assert nb[3:] == f"{module}.ipynb", f"{nb} exports mri_gen/{module}.py"


def test_notebooks_are_numbered():
    assert [p.name for p in NBS if p.name != "index.ipynb" and not re.match(r"\d\d_[a-z0-9_]+\.ipynb$", p.name)] == []


@pytest.mark.parametrize("nb", EXPERIMENTS, ids=ids(EXPERIMENTS))
def test_experiment_notebook(nb):
    tagged = [c for c in cells(nb) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, "exactly one cell tagged `parameters` (papermill puts ours after it; without the tag, its defaults win silently)"
    assert not [c for c in cells(nb) if directive(c, "(export|exporti|exports|default_exp)")], "an experiment exports nothing"
    for n in ast.parse(source(tagged[0])).body:
        literal = isinstance(n, ast.AnnAssign) and n.value is not None
        assert literal, f"line {n.lineno}: a parameter is `name: type = literal  # meaning` (papermill shows type and comment)"
        ast.literal_eval(n.value)
    for c in cells(nb):
        code = "\n".join(line for line in source(c).splitlines() if not line.lstrip().startswith(("%", "!")))
        assert not [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.ClassDef)], "no classes in an experiment: they belong into the library"


def test_import_order():
    "In the order of their file names (05_anatomy before 05_phantom) none imports a later one; tasks (20_generate, 21_inpaint with its 21_inpaint_study) never import each other; so nothing below 30 imports 30 or more"
    number, wrong = numbers(), []
    for m, (k, nb) in number.items():
        for other in inside(imports(tree(m))):
            if other not in number: wrong.append(f"{nb}: mri_gen.{other} has no notebook")
            elif number[other][1] > nb: wrong.append(f"{nb} imports the later {number[other][1]}")
            elif task_of(m, number) and task_of(other, number) not in (None, task_of(m, number)): wrong.append(f"{nb} imports another task, {number[other][1]}")
    assert not wrong, "\n".join(wrong)


def test_import_order_check_sees():
    "The check above would find what it looks for"
    code = "from . import cli\nfrom .report import page\nimport mri_gen.bundle as b\ndef f():\n    from mri_gen.sweep import x\n    import scipy\n    import_module('mri_gen.explore')"
    assert inside(imports(ast.parse(code))) == {"cli", "report", "bundle", "sweep", "explore"}
    assert "scipy" not in set(imports(ast.parse(code), top=True)) and "scipy" in set(imports(ast.parse(code)))
    some = {m: (int(n[:2]), n) for m, n in {"core": "00_core", "generate": "20_generate", "inpaint": "21_inpaint", "inpaint_study": "21_inpaint_study", "inpainting": "21_inpainting"}.items()}
    assert [task_of(m, some) for m in (*some, "torch")] == [None, "generate", "inpaint", "inpaint", "inpainting", None]


@pytest.mark.parametrize("module", "core measure volumes corrupt planes batches datasets layers losses checkpoint train diffusion baselines fills pixels distances slices fillers axial codes patches prior vqnets drawn imputers translators triples unpaired cells experiment lookalikes resolution reversible heads upscale generate inpaint mmgan vqvae cyclegan sr3d".split())
def test_bare_imports_at_the_top(module):
    if module not in numbers(): pytest.skip(f"mri_gen/{module}.py does not exist yet")
    top = {n.split(".")[0] for n in imports(tree(module), top=True)}
    assert sorted(top - BARE - set(sys.stdlib_module_names)) == [], "import it inside the function that needs it"


@pytest.mark.parametrize("module", ["train", *tasks()])
def test_import_is_light(module):
    "Also through what it imports: the entry of torchrun reaches torch, numpy, pydantic, safetensors and nothing heavier"
    if module not in numbers(): pytest.skip(f"mri_gen/{module}.py does not exist yet")
    code = f"import sys; before = set(sys.modules); import torch; import mri_gen.{module}; print(*(m for m in {HEAVY} if m in sys.modules))"
    r = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert r.stdout.split() == [], f"`import mri_gen.{module}` loads these"


def test_sizes(repository):
    size = {p: (ROOT / p).stat().st_size for p in repository}
    assert {p: s for p, s in size.items() if s > 16 * MIB} == {}, "at most 16 MiB a file"
    assert sum(size.values()) <= 60 * MIB, f"{sum(size.values()) / MIB:.1f} MiB tracked, at most 60; largest: {sorted(size, key=size.get)[-5:]}"


@pytest.mark.parametrize("nb", NBS, ids=ids(NBS))
def test_stored_outputs_are_small(nb):
    size = sum(len(json.dumps(c["outputs"], ensure_ascii=False).encode()) for c in cells(nb))
    assert size <= 300 * 1024, f"{size / 1024:.0f} KiB of outputs, at most 300: fewer figures or a lower dpi"


def test_outputs_are_free_of_errors():
    bad = [p.name for p in NBS for c in cells(p) for o in c["outputs"] if o["output_type"] == "error" and "raises-exception" not in c["metadata"].get("tags", [])]
    assert bad == []


def test_no_path_of_a_machine(repository):
    "Home folders, work folders, temporary names: they differ on the next machine, and tell about this one"
    pattern = re.compile(r"(?<![\w.~+/:-])/(?:" + "|".join(["home", "root", "work", "Users"]) + r")/\w|/tmp/tmp\w")
    text = {".py", ".ipynb", ".md", ".ini", ".txt", ".json", ".yml", ".yaml", ".csv", ".cff", ".html", ".toml", ".cfg", ""}
    wrong = []
    for p in repository:
        if Path(p).suffix not in text: continue
        body = (ROOT / p).read_text(encoding="utf-8", errors="ignore")
        wrong += [f"{p}: {body[max(0, m.start() - 30):m.end() + 30]!r}" for m in pattern.finditer(body)]
    assert not wrong, "\n".join(wrong)


def test_no_real_data_in_the_repository(repository):
    "data/ holds a README and small manifests; volumes and arrays stay where the data are"
    assert [p for p in repository if p.startswith("data/") and Path(p).suffix not in (".md", ".csv")] == []
    assert [p for p in repository if p.endswith((".nii", ".nii.gz", ".npy", ".npz", ".tar", ".zip", ".pkl", ".pt", ".pth"))] == []
    assert [p for p in repository if Path(p).name == "__init__.py" and not p.startswith("mri_gen/")] == [], "data/, artifacts/, kaggle/ are no packages"


def test_settings():
    cfg = configparser.ConfigParser(delimiters=["="], interpolation=None)
    cfg.read(ROOT / "settings.ini")
    s = cfg["DEFAULT"]
    assert "tags" in s["allowed_cell_metadata_keys"].split(), "nbdev_clean would strip the `parameters` tag, and papermill would then ignore every parameter"
    assert s["update_pyproject"] == "False" and not (ROOT / "pyproject.toml").exists(), "setup.py is the one source"
    dev = s["dev_requirements"].split()
    assert {"nbdev==2.4.14", "execnb<0.2", "fastcore<2", "ghapi<2"} <= set(dev), "nbdev 2.4.14 breaks with newer ones"


def test_constraints_cover_the_requirements():
    cfg = configparser.ConfigParser(delimiters=["="], interpolation=None)
    cfg.read(ROOT / "settings.ini")
    plain = lambda s: re.split(r"[<>=!~\[]", s)[0].lower().replace("_", "-")
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.!]+", line)] == [], "exact versions only: no paths, no addresses, no local builds"
    wanted = {plain(r) for key in ("requirements", "cluster_requirements", "docs_requirements", "dev_requirements") for r in cfg["DEFAULT"][key].split()}
    assert wanted - {plain(line) for line in lines} == set()
