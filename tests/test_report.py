"The report as a file: one HTML page that asks nobody for anything, whose tables are sorted, whose texts are harmless, on a phone and on paper; damage is named and leaves no page"
import gzip, json, math, os, re, shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from mri_gen import page, records as records_, report
from mri_gen.core import UserError
from mri_gen.metrics import FIELDS, METRICS, compare_all, save_metrics, score_table, summarise

ROOT = Path(__file__).resolve().parents[1]
EVIL = "<img src=x onerror=alert(1)>\"'&</td><script>alert(2)</script>"
VOID = {"meta", "link", "img", "br", "hr", "input", "line", "circle"}


class Parsed(HTMLParser):
    "What a page holds: tags in order, ids, links, pictures, tables as rows of (tag, attributes, text)"
    def __init__(self, text):
        super().__init__(); self.tags, self.ids, self.open, self.tables, self.words = [], [], [], [], []
        self.feed(text); self.close(); assert self.open == [], f"never closed: {self.open}"
    def handle_starttag(self, tag, attrs):
        a = dict(attrs); self.tags.append((tag, a)); self.ids += [a["id"]] if "id" in a else []
        if tag not in VOID: self.open.append(tag)
        if tag == "table": self.tables.append((a, []))
        elif tag == "tr": self.tables[-1][1].append([])
        elif tag in ("td", "th"): self.tables[-1][1][-1].append([tag, a, ""])
    def handle_startendtag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_endtag(self, tag):
        if tag not in VOID: assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"
    def handle_data(self, data):
        self.words.append(data)
        if {"td", "th"} & set(self.open): self.tables[-1][1][-1][-1][2] += data
    def of(self, tag): return [a for t, a in self.tags if t == tag]


def well_made(text):
    "What is true of every page; returns it parsed"
    p = Parsed(text)
    assert len(p.ids) == len(set(p.ids)), sorted(i for i in p.ids if p.ids.count(i) > 1)
    links = [a["href"] for t, a in p.tags if "href" in a]
    assert {h[1:] for h in links if h.startswith("#")} <= set(p.ids) and all(h.startswith(("#", "data:")) for h in links), links
    assert all(a["src"].startswith("data:") for t, a in p.tags if "src" in a) and not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", text)
    assert all("alt" in a for a in p.of("img")) and all(a["alt"].strip() for a in p.of("img")[:-1])      # the last waits in the dialog
    assert not [a for t, a in p.tags if any(k.startswith("on") for k in a)] and len(p.of("script")) == len(p.of("h1")) == 1
    assert all(a.get("class") != "sorts" or is_sorted(rows) for a, rows in p.tables)
    return p


def is_sorted(rows):
    "The column that says it is sorted is; what has no number is last"
    by = next((i for i, (_, a, _) in enumerate(rows[0]) if "aria-sort" in a), None)
    if by is None: return True
    keys = [float(r[by][1]["data-k"]) if "data-k" in r[by][1] else math.inf for r in rows[1:]]; n = sum(k < math.inf for k in keys)
    there = keys[:n][::-1] if rows[0][by][1]["data-now"] == "2" else keys[:n]
    return there == sorted(there) and all(k == math.inf for k in keys[n:])


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    "A checkout with one published task, scored on seven people, one of them with a name that would do harm, and a place for runs; MRI_GEN_ROOT points there"
    home = tmp_path / "home"; folder = home / "artifacts/inpaint"; (folder / "figures").mkdir(parents=True); (home / "nbs").mkdir(); (home / "settings.ini").touch()
    g = np.random.default_rng(0); y = g.random((12, 24, 24)).astype(np.float32); hole = np.zeros((24, 24), bool); hole[::2] = True; who = [f"P{i // 2}" for i in range(11)] + [EVIL]
    made = {m: np.where(hole, np.clip(y + s * g.normal(size=y.shape), 0, 1), y).astype(np.float32) for m, s in {"linear": .2, EVIL: .15, "unet": .1}.items()}
    rows = [r for m, p in made.items() for r in score_table(p, y, who, task="inpaint", method=m, data="drawn", split="val", cell="sagittal", hole=hole)]
    save_metrics(folder / "metrics.json", summarise(rows)); (folder / "comparisons.json").write_text(json.dumps(compare_all(rows, "unet"))); report.write_image_rows(folder / "rows.csv.gz", rows)
    for name, what in {"weights.json": {"unet": "unet.safetensors"}, "networks.json": {"unet": dict(env=dict(python="3.11", packages={"torch": "2"}), done=dict(step=30), config={}, parameters=7, splits={"train": "4 subjects"})}, "about.json": dict(notes=[EVIL])}.items(): (folder / name).write_text(json.dumps(what))
    (folder / "training.csv").write_text("step,loss,val_psnr\n10,1,\n20,.5,21.5\n30,.4,22\n")
    (folder / "study.md").write_text(f"# Side\n\n## Masks\n\n- found {EVIL}\n\n[x](javascript:alert(3)) ![a picture](study_masks.png)\n")
    from PIL import Image
    for name in ("figures/restored.png", "figures/worst_drawn_sagittal.png", "study_masks.png"): Image.fromarray(g.integers(0, 255, (80, 160), np.uint8)).save(folder / name)
    monkeypatch.setenv("MRI_GEN_ROOT", str(home))
    return tmp_path


def run_of(d, name="toy", **files):
    "A run folder with these files"
    folder = d / "runs/inpaint" / name; folder.mkdir(parents=True)
    for f, text in ({"config.json": '{"steps": 5}'} | {k.replace("__", "."): v for k, v in files.items()}).items(): (folder / f).write_text(text)
    return folder


# ---------------------------------------------------------------- the page

@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    "The page over this checkout's own artifacts, parsed"
    old = os.environ.get("MRI_GEN_ROOT"); os.environ["MRI_GEN_ROOT"] = str(ROOT)
    try: path = report.report(tmp_path_factory.mktemp("report") / "all.html")
    finally: os.environ.pop("MRI_GEN_ROOT") if old is None else os.environ.__setitem__("MRI_GEN_ROOT", old)
    return path, well_made(path.read_text(encoding="utf-8"))


def test_everything_published_is_on_the_page(everything):
    path, p = everything; words = " ".join(p.words)
    assert path.stat().st_size <= page.LIMIT
    tasks = [f.parent for f in (ROOT / "artifacts").glob("*/metrics.json")]
    assert sum(a.get("class") == "card" for a in p.of("article")) == len(tasks) and {f"task-{t.name}" for t in tasks} <= set(p.ids) and {"summary", "how", "environment"} <= set(p.ids)
    for t in tasks:
        records = json.loads((t / "metrics.json").read_text()); assert all(m in words for m in {r["method"] for r in records}), t.name
        assert all(h in words for h in re.findall(r"^## (.+)$", (t / "study.md").read_text(), re.M)), t.name
    assert all(f"mri_gen evaluate {t.name}" in words for t in tasks) and "Learning curves" in words and "The worst subjects" in words and "Data, licence, limits" in words


def test_headline_numbers_are_those_of_the_records(everything):
    "The first table of each task starts with the best method, its mean and its interval as in metrics.json"
    _, p = everything
    for a, rows in p.tables:
        if a.get("class") != "sorts" or rows[0][1][2].strip() != "PSNR [dB] ↑" or rows[0][2][2] != "interval, drawn": continue
        shown = [float(r[1][2].split()[0].replace("−", "-")) for r in rows[1:] if r[1][2] != "–"]
        assert shown == sorted(shown, reverse=True) and all(("[" in r[1][2]) == ("[" in rows[1][1][2]) for r in rows[1:] if r[1][2] != "–")
    records = [r for r in json.loads((ROOT / "artifacts/inpaint/metrics.json").read_text()) if (r["metric"], r["region"], r["data"]) == ("psnr", "hole", "ixi_slices")]
    best = max(records, key=lambda r: r["mean"]); text = f"{best['mean']:.2f} [{best['lo']:.2f}, {best['hi']:.2f}]"
    assert any(r[0][2] == best["method"] and r[1][2] == text for _, rows in p.tables for r in rows[1:2] if len(r) > 2)


def test_page_of_one_task_and_runs(shelf):
    runs = [run_of(shelf, "one", metrics__csv="step,lr,loss\n1,.1,3\n2,.1,2\n"), run_of(shelf, "two", metrics__csv="step,lr,loss\n1,.1,4\n2,.1,1\n"), run_of(shelf, "new"), run_of(shelf, "headed", metrics__csv="step,loss\n")]
    text = report.report(shelf / "page", runs).read_text(); p = well_made(text); words = " ".join(p.words)
    for part in ("best simple method", "unet minus <img", "7 subjects", "run one", "this run has only begun", "No figures were logged yet", "2 runs over each other", "found", "Masks", "where each figure ended", "paired tests against unet"): assert part in words, part
    order = lambda html: re.findall(r'<section id="([^"]+)"', html)[1:3]
    assert order(text) == ["task-inpaint", "run-inpaint-one"] and order(report.report(shelf / "first.html", runs, runs_first=True).read_text()) == ["run-inpaint-one", "run-inpaint-two"]
    same = report.report(shelf / "same.html", [runs[0], shelf / "home/artifacts/inpaint", str(runs[0])]).read_text()
    assert same.count('id="task-inpaint"') == same.count('id="run-inpaint-one"') == 1                                                 # named twice, shown once


def test_texts_are_harmless(shelf):
    "Methods, subjects, notes, columns, folders, settings and Markdown that would run, if they were not escaped"
    run = run_of(shelf, "<b>x", config__json=json.dumps({EVIL: EVIL}), DONE=json.dumps({"state": EVIL}), env__json=json.dumps({"python": EVIL}), about__json=json.dumps(dict(title=EVIL, notes=EVIL)), metrics__csv="step,\"<i>loss\"\n1,2\n2,1\n")
    p = well_made(report.report(shelf / "page.html", [run]).read_text()); words = " ".join(p.words)
    assert "onerror=alert(1)" in words and [a for a in p.of("img") if a.get("src") == "x"] == [] and "<i>loss" in words and "javascript" not in " ".join(str(a) for _, a in p.tags)


NUMBER = st.one_of(st.none(), st.floats(-50, 50), st.just(0.))
RECORD = st.tuples(st.sampled_from(["unet", "real", "a, b", EVIL, "x" * 80, "–"]), st.sampled_from(sorted(METRICS)), NUMBER, st.booleans())


@settings(max_examples=60, deadline=None)
@given(st.lists(RECORD, min_size=1, max_size=24, unique_by=lambda r: r[:2]))
def test_any_records_make_a_sorted_table(rows):
    base = dict(task="t", data="d", split="val", cell="all", region="whole", n_subjects=3, n_images=4)
    records = [base | dict(method=m, metric=k, convention="uniform7 range=1" if k == "ssim" else "range=1", mean=v, lo=v - 1 if v is not None and i else None, hi=v + 1 if v is not None and i else None) for m, k, v, i in rows]
    html = report.score_table(records, "unet"); p = Parsed(html)
    (a, table), = p.tables; assert is_sorted(table) and len(table) == 1 + len({r[0] for r in rows}) and p.of("img") == [] and p.of("script") == []
    assert {c[0][2] for c in table[1:]} == {r[0] for r in rows}
    assert sum(c[2] == "–" for r in table[1:] for c in r[1:]) >= sum(v is None for _, _, v, _ in rows)
    lead = report.headline(records); top = report.best_of([r for r in records if r["metric"] == lead])
    assert top is None or all(records_.rank(lead, top["mean"]) <= records_.rank(lead, r["mean"]) for r in records if r["metric"] == lead and r["mean"] is not None and r["method"] != "real")


def test_a_large_page_gets_smaller_pictures(shelf, monkeypatch):
    from PIL import Image
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 1800), np.uint8)).save(shelf / "home/artifacts/inpaint/figures/noise.png")
    big = report.report(shelf / "big.html").read_text(); monkeypatch.setattr(page.page, "__defaults__", (*page.page.__defaults__[:-1], 600e3))
    small = report.report(shelf / "small.html").read_text()
    well_made(small); assert len(small) < 620e3 < len(big) and "as WebP of at most" in small and "as WebP of at most" not in big


def test_nothing_and_little(shelf, monkeypatch):
    empty = shelf / "empty"; empty.mkdir(); (empty / "settings.ini").touch(); (empty / "nbs").mkdir()
    monkeypatch.setenv("MRI_GEN_ROOT", str(empty))
    with pytest.raises(UserError, match="nothing to report"): report.report(shelf / "none.html")
    p = well_made(report.report(shelf / "little.html", [run_of(shelf)]).read_text())       # a run and nothing else
    assert "summary" not in p.ids and "how" not in p.ids and "environment" in p.ids and not (shelf / "none.html").exists()
    well_made(report.report(shelf / "only.html", [shelf / "runs"/"inpaint"]).read_text())    # the folder of the only run


# ---------------------------------------------------------------- damage

HARMS = {"metrics.json": ["{", "[1]", "null", json.dumps([dict.fromkeys(FIELDS, "x")]), "\xff"], "comparisons.json": ["{}", '[{"method": 3}]', "[7]"], "weights.json": ["[]", "{"], "networks.json": ['{"unet": 3}', '{"unet": {"env": {}}}', "[]"],
         "about.json": ["[]", "not json"], "training.csv": ["\x00\x01", "a,b\n1,2\n", "loss,step\n"], "study.md": [], "figures/restored.png": ["no picture", "\x89PNG\r\n"], "study_masks.png": [""], "env.json": ["[]"], "config.json": ["[1]", "{"]}


@pytest.mark.parametrize("name,harm", [(k, h) for k, hs in HARMS.items() for h in hs])
def test_damage_is_one_line_that_names_the_file(shelf, name, harm, capfd):
    from mri_gen.cli import main
    (shelf / "home/artifacts/inpaint" / name).write_text(harm, encoding="latin1")
    assert main(["report", "--out", str(shelf / "x")]) == 1
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and err.startswith("mri_gen: ") and "not foreseen" not in err and f"inpaint/{name}" in err, err
    assert not (shelf / "x/report.html").exists() and not list(shelf.rglob("*.partial"))


@pytest.mark.parametrize("harm", [b"no gzip", b"", gzip.compress(b"a,b\n1,2\n"), gzip.compress(b"data,split,cell,region,method,subject,index,psnr,ssim\nd,val,c,r,m,s,x,1,1\n"), gzip.compress(b"x" * 9999)[:40]])
def test_damaged_image_rows(shelf, harm):
    (shelf / "home/artifacts/inpaint/rows.csv.gz").write_bytes(harm)
    with pytest.raises(UserError, match="rows.csv.gz"): report.report(shelf / "x.html")


def test_what_is_no_run(shelf, capfd):
    from mri_gen.cli import main
    (shelf / "plain").mkdir(); (shelf / "file").write_text("x"); run_of(shelf, "a"); run_of(shelf, "b"); (run_of(shelf, "c") / "weights.safetensors").write_bytes(b"half")
    for words, says in (([shelf / "plain"], "no run"), ([shelf / "file"], "no such folder"), ([shelf / "absent"], "absent"), ([shelf / "runs/inpaint"], "several runs"), ([shelf / "runs/inpaint/c"], "c/weights.safetensors"), (["--out", shelf / "file/x"], "cannot be created")):
        assert main(["report", *map(str, words), *([] if "--out" in words else ["--out", str(shelf / "x")])]) == 1
        err = capfd.readouterr().err; assert err.count("\n") == 1 and says in err and "not foreseen" not in err, err
    assert not (shelf / "x").exists()
    report.report(shelf / "x"); old = (shelf / "x/report.html").read_bytes()
    assert main(["report", "--out", str(shelf / "x")]) == 1 and "--force" in capfd.readouterr().err and (shelf / "x/report.html").read_bytes() == old
    if os.geteuid():
        (shelf / "x").chmod(0o500); assert main(["report", "--out", str(shelf / "x"), "--force"]) == 1 and (shelf / "x/report.html").read_bytes() == old; (shelf / "x").chmod(0o700)


# ---------------------------------------------------------------- in a browser

@pytest.fixture(scope="module")
def browser():
    "Headless Chromium, its requests and errors watched; skips where there is none"
    api = pytest.importorskip("playwright.sync_api", reason="playwright needed: pip install playwright")
    program = next(filter(None, (shutil.which(n) for n in ("chromium", "chromium-browser", "google-chrome"))), None)
    if not program: pytest.skip("Chromium needed")
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking"])
        yield b
        b.close()


@pytest.fixture
def visit(browser, everything):
    "visit(width, script=True) -> the report, opened; nothing may be asked for or go wrong"
    pages, wrong = [], []
    def go(width=1280, script=True, scheme="light"):
        c = browser.new_context(viewport=dict(width=width, height=800), java_script_enabled=script, color_scheme=scheme); pg = c.new_page(); pages.append(c)
        pg.on("request", lambda r: wrong.append(r.url[:80]) if not r.url.startswith(("file:", "data:")) else None); pg.on("pageerror", lambda e: wrong.append(str(e))); pg.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        pg.goto(everything[0].as_uri()); return pg
    yield go
    for c in pages: c.close()
    assert wrong == []


@pytest.mark.slow
def test_sorting(visit):
    pg = visit(); t = pg.locator("#task-inpaint table.sorts").first; names = lambda: t.locator("tbody th").all_inner_texts()
    first = names(); head = t.locator("thead th").nth(3); assert head.get_attribute("aria-sort") is None
    t.locator("thead th").nth(1).click(); worst = names(); assert worst == first[::-1] or worst[0] == first[-1]
    head.locator("button").focus(); pg.keyboard.press("Enter"); by_ssim = names(); assert head.get_attribute("aria-sort") == "descending" and sorted(by_ssim) == sorted(first)
    values = [float(x.split()[0]) for x in t.locator("tbody tr td:nth-child(4)").all_inner_texts()]; assert values == sorted(values, reverse=True)
    t.locator("thead th").nth(0).click(); assert names() == sorted(names(), key=str.lower)


@pytest.mark.slow
def test_pictures_enlarge(visit):
    pg = visit(); b = pg.locator("figure button.frame").nth(2); b.scroll_into_view_if_needed(); small = b.locator("img").bounding_box()["width"]
    b.focus(); pg.keyboard.press("Enter"); big = pg.locator("dialog img"); assert pg.locator("dialog").evaluate("d=>d.open")
    assert big.bounding_box()["width"] > small and big.get_attribute("alt") and big.get_attribute("src") == b.locator("img").get_attribute("src")
    pg.keyboard.press("Escape"); assert not pg.locator("dialog").evaluate("d=>d.open") and b.evaluate("b=>b===document.activeElement")
    b.click(); whole = big.bounding_box()["height"]; pg.locator("dialog button").nth(1).click(); assert big.bounding_box()["height"] > whole
    pg.locator("dialog button").first.click(); assert not pg.locator("dialog").evaluate("d=>d.open")
    closed = pg.locator("details:not([open])").count(); pg.locator(".tools button").click(); assert closed > 5 and pg.locator("details:not([open])").count() == 0


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 390, 768, 1280, 1920])
def test_no_horizontal_scroll(visit, width):
    pg = visit(width)
    for _ in range(2):       # as it opens, and unfolded
        assert pg.evaluate("document.documentElement.scrollWidth") <= width
        pg.evaluate("document.querySelectorAll('details').forEach(d=>d.open=true)")
    sizes = pg.evaluate("[...document.querySelectorAll('p,td,th,li,summary,figcaption,small,caption,button')].filter(e=>e.innerText&&e.offsetParent).map(e=>parseFloat(getComputedStyle(e).fontSize))")
    assert min(sizes) >= 10.5


@pytest.mark.slow
def test_without_script_and_in_the_dark(visit):
    pg = visit(script=False); assert pg.locator("table.sorts").count() > 10 and not pg.locator(".tools").is_visible() and pg.locator("figure img").first.is_visible() and pg.locator("dialog").is_hidden()
    dark = visit(scheme="dark"); shade = lambda pg, what: sum(map(float, re.findall(r"[\d.]+", pg.evaluate(f"getComputedStyle(document.body).{what}"))[:3]))
    assert shade(dark, "backgroundColor") < 150 < shade(dark, "color"); dark.emulate_media(media="print"); assert shade(dark, "backgroundColor") > 700 and shade(dark, "color") < 50


@pytest.mark.slow
def test_on_paper(visit):
    "Nothing is wider than an A4 page with its margins, no figure or table is higher"
    pg = visit(718); pg.emulate_media(media="print")                      # 190 mm at 96 dpi
    boxes = pg.evaluate("[...document.querySelectorAll('table,figure img,svg')].filter(e=>e.checkVisibility()).map(e=>{const b=e.getBoundingClientRect();return [e.tagName,b.right,b.height]})")
    assert boxes and [b for b in boxes if b[1] > 720] == [] and [b for b in boxes if b[0] != "TABLE" and b[2] > 1000] == []
    assert pg.locator("nav.here").first.is_hidden() and pg.locator("th button").first.is_hidden()
    pdf = pg.pdf(format="A4"); assert pdf[:4] == b"%PDF" and 10 < len(re.findall(rb"/Type\s*/Page\b", pdf)) < 60
