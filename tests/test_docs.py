"The documentation site: built without a warning, no dead link, nothing from outside, each public symbol with signature, parameters and an example"
import importlib, json, re
from html import unescape

import pytest

from mri_gen import docs, docs_site

pytestmark = pytest.mark.slow
NAMES = [s for s, nb in docs.notebooks().items() if nb.module]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "Built once, strictly: a warning of MkDocs is an error"
    return docs_site.build(tmp_path_factory.mktemp("docs"))


@pytest.fixture(scope="module")
def symbols(site):
    "{(notebook, symbol): its part of the page, HTML}"
    out = {}
    for stem in NAMES:
        parts = re.split(r'<h3 class="[^"]*\bsymbol\b[^"]*" id="([^"]+)"', (site / f"notebooks/{stem}.html").read_text(encoding="utf-8"))
        out |= {(stem, name): part.split("<h2", 1)[0] for name, part in zip(parts[1::2], parts[2::2])}
    return out


def test_every_link_leads_somewhere_and_nothing_comes_from_outside(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 100 and docs_site.problems(site) == []
    assert (site / "assets/math.ttf").stat().st_size > 1e5, "formulas need their font"


def test_every_notebook_and_every_written_page_is_there(site, root):
    assert [s for s in docs.notebooks() if s != "index" and not (site / f"notebooks/{s}.html").exists()] == []
    assert [p for p in (root / "docs").rglob("*.md") if not (site / p.relative_to(root / "docs").with_suffix(".html")).exists()] == []


def test_search_finds_symbols_and_prose(site):
    found = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))["docs"]
    where = {d["location"]: d["text"] for d in found}
    assert len(where) > 1500 and "notebooks/11_losses.html#psnr_loss" in where and any("bias field" in t for t in where.values())
    assert (site / "search/search_index.js").exists(), "from a folder, without a server, the index is read as a script"


def test_every_public_symbol_has_its_signature_table(symbols):
    wanted = [(s, n) for s in NAMES for n in docs.notebooks()[s].names]
    assert [k for k in wanted if k not in symbols] == []
    wrong = []
    for stem, name in wanted:
        part, nb = symbols[stem, name], docs.notebooks()[stem]; node = nb.defined[name][1]
        if 'class="signature highlight"' not in part: wrong.append(f"{stem}.{name}: no signature")
        rows = docs.parameters(getattr(importlib.import_module(f"mri_gen.{nb.module}"), name), node)
        shown = {unescape(x) for x in re.findall(r"<td><code>([^<]+)</code></td>", part)}
        wrong += [f"{stem}.{name}: no row for {r[0]}" for r in rows if r[0] not in shown]
        if not rows and hasattr(node, "args") and "No parameters" not in part: wrong.append(f"{stem}.{name}: no table")
    assert wrong == []


def test_every_public_symbol_has_an_example(symbols):
    kinds = {}
    for stem, name in symbols: kinds.setdefault((docs.example(docs.notebooks()[stem].module, name) or ["none"])[0], []).append(f"{stem}.{name}")
    assert kinds.get("none", []) == []
    assert [k for k, part in symbols.items() if "Example: " not in part] == []
    assert len(kinds["through"]) < .45 * len(symbols), "most are shown at work themselves, not only through what calls them"


def test_formulas_are_drawn(site):
    text = (site / "background/mathematics.html").read_text(encoding="utf-8")
    assert text.count("<math ") > 100 and "$" not in re.sub(r"<(script|pre|code|math)\b.*?</\1>", "", text, flags=re.S)


def test_numbers_are_those_of_the_artifacts(site, root):
    r = next(r for r in json.loads((root / "artifacts/mmgan/metrics.json").read_text()) if (r["metric"], r["method"], r["cell"], r["region"]) == ("psnr", "unet", "all", "whole"))
    assert f"{r['mean']:.2f} dB [{r['lo']:.2f}, {r['hi']:.2f}]" in (site / "background/claim.html").read_text(encoding="utf-8")


def test_a_dead_link_or_an_unknown_word_stops_the_build(tmp_path, monkeypatch, root):
    monkeypatch.setattr(docs_site, "write_pages", lambda out: (out.mkdir(parents=True), (out / "index.md").write_text("# x\n\n[dead](nowhere.md)\n")))
    monkeypatch.setattr(docs_site, "navigation", dict)
    with pytest.raises(docs_site.UserError, match="nowhere.md"): docs_site.build(tmp_path)
    with pytest.raises(docs_site.UserError, match="unknown"): docs_site.filled("{{ nmber mmgan psnr }}", "a.md")
