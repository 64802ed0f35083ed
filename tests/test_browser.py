"""The explorers as a user meets them: JupyterLab started the way `make lab` does, in a headless Chromium; cells run, a control moved by mouse or keyboard, the picture seen to change, nothing asked of the internet.

`make pictures` (pytest tests/test_browser.py --renew) also writes the screenshots, nbs/images/explore_<name>.webp.
"""
import contextlib, io, os, re, shlex, shutil, signal, socket, subprocess, sys, time, urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
IMAGES, KB = ROOT / "nbs" / "images", 1000
pytestmark = pytest.mark.slow


class Server:
    "JupyterLab on a copy of the notebooks, by the command that `make lab` would give, with settings of its own"
    def __init__(self, folder):
        (folder / "nbs").mkdir(); self.log = folder / "server.log"
        for p in ("Makefile", "settings.ini", "setup.py", "constraints.txt"): shutil.copy(ROOT / p, folder)
        for p in (ROOT / "nbs").glob("31_*.ipynb"): shutil.copy(p, folder / "nbs")
        shutil.copytree(ROOT / ".jupyter", folder / ".jupyter")
        with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
        token = os.urandom(16).hex(); self.url = f"http://127.0.0.1:{port}"; self.token = token
        options = f"--ServerApp.open_browser=False --ServerApp.ip=127.0.0.1 --ServerApp.port={port} --ServerApp.port_retries=0 --IdentityProvider.token={token} --MappingKernelManager.cull_idle_timeout=600 --MappingKernelManager.cull_connected=True --ServerApp.shutdown_no_activity_timeout=900"
        env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}      # a make under `make test` would add its own words
        said = subprocess.run(["make", "-n", "lab", f"ARGS={options}"], cwd=folder, capture_output=True, text=True, check=True, env=env).stdout
        command = next((l for l in said.splitlines() if ".venv/bin/jupyter lab" in l), None)
        assert command, said
        own = {f"JUPYTER{k}": str(folder / k.strip("_").lower()) for k in ("_CONFIG_DIR", "_DATA_DIR", "_RUNTIME_DIR", "LAB_SETTINGS_DIR", "LAB_WORKSPACES_DIR")}
        nowhere = {k: "http://127.0.0.1:9" for k in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")} | {k: "127.0.0.1,localhost" for k in ("no_proxy", "NO_PROXY")}      # what Python would ask of the internet fails
        env = os.environ | own | nowhere | {"IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": str(ROOT), "MRI_GEN_ROOT": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
        t0 = time.monotonic()
        with self.log.open("w") as log: self.process = subprocess.Popen(["bash", "-c", command.replace(".venv/bin/jupyter lab", f"{shlex.quote(sys.executable)} -m jupyterlab")], cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        while not self.up():
            if self.process.poll() is not None or time.monotonic() - t0 > 90: self.stop(); pytest.fail(f"JupyterLab does not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(.1)
        self.took = time.monotonic() - t0

    def up(self):
        with contextlib.suppress(OSError): return urllib.request.urlopen(f"{self.url}/api/status?token={self.token}", timeout=5).status == 200

    def stop(self):
        with contextlib.suppress(ProcessLookupError): os.killpg(self.process.pid, signal.SIGTERM)      # it ends its kernels
        try: self.process.wait(20)
        except subprocess.TimeoutExpired: os.killpg(self.process.pid, signal.SIGKILL); self.process.wait()      # kernels see that it is gone


@pytest.fixture(scope="module")
def browser():
    play = pytest.importorskip("playwright.sync_api", reason="playwright needed: pip install playwright")
    if not CHROMIUM: pytest.skip("Chromium needed (on Debian: apt-get install chromium); the explorers stay untested in a browser")
    with play.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"])
        yield b
        b.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory, browser):
    if not shutil.which("make"): pytest.skip("make needed: JupyterLab is started by its command")
    s = Server(tmp_path_factory.mktemp("lab"))
    yield s
    s.stop()


class Lab:
    "A notebook in a page that hears every complaint and every request"
    def __init__(self, page, server, notebook):
        self.page, self.complaints, self.asked = page, [], []
        page.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None); page.on("pageerror", lambda e: self.complaints.append(str(e)))
        page.on("request", lambda r: self.asked.append(r.url)); page.on("websocket", lambda w: self.asked.append(w.url))
        page.goto(f"{server.url}/lab/tree/nbs/{notebook}.ipynb?reset&token={server.token}", timeout=60_000)
        page.locator(".jp-Toolbar-kernelName", has_text="ipykernel").wait_for(timeout=60_000)          # before it has a kernel, it would ask for one
        page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for(timeout=60_000)
        assert not page.locator(".jp-Dialog, .Toastify__toast").count(), "something pops up"
        page.locator(".lm-MenuBar-item", has_text=re.compile("^Run$")).click(); page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()

    def explorer(self, code):
        "That of the cell with this line"
        return Seen(self.page, self.page.locator(".jp-CodeCell", has=self.page.locator(".jp-InputArea-editor", has_text=code)).locator(".widget-vbox", has=self.page.locator("> .widget-image")))

    def finished(self):
        "All cells have run, none with an error"
        prompts = self.page.locator(".jp-CodeCell .jp-InputArea-prompt"); t0 = time.monotonic()
        while not all(re.fullmatch(r"\[\d+\]:", t) for t in prompts.all_text_contents()):
            assert time.monotonic() - t0 < 240 and not self.errors(), f"{self.errors()}, {prompts.all_text_contents()}"
            time.sleep(.2)
        assert not self.errors(), self.errors()

    def errors(self): return self.page.locator('[data-mime-type="application/vnd.jupyter.error"]').all_text_contents()

    def clean(self):
        "Nothing in the console, nothing asked outside the machine, nor what Jupyter would ask for us"
        assert not self.complaints, self.complaints
        hosts = {urlsplit(u).hostname for u in self.asked if not u.startswith(("data:", "blob:"))}; assert hosts == {"127.0.0.1"}, hosts
        assert not [u for u in self.asked if re.search(r"/lab/api/(news|update)", u)]


class Seen:
    "An explorer on the screen"
    def __init__(self, page, box): self.page, self.box, self.image = page, box, box.locator("> .widget-image")

    def there(self, seconds=180): self.image.wait_for(timeout=seconds * 1000); return self

    def pixels(self): return np.asarray(Image.open(io.BytesIO(self.image.screenshot())).convert("RGB")).astype(int)

    def message(self): return self.box.locator("> .widget-html").text_content()

    def control(self, kind, name): return self.box.locator(f".{kind}", has=self.page.locator(".widget-label", has_text=re.compile(f"^{re.escape(name)}$")))

    def handle(self, name): return self.control("widget-hslider", name).locator(".noUi-handle")

    def key(self, name, *keys): self.handle(name).focus(); [self.page.keyboard.press(k) for k in keys]

    def drag(self, name, share):
        h = self.handle(name); h.scroll_into_view_if_needed(); a = h.bounding_box(); b = self.control("widget-hslider", name).locator(".noUi-base").bounding_box()
        self.page.mouse.move(a["x"] + a["width"] / 2, a["y"] + a["height"] / 2); self.page.mouse.down()
        self.page.mouse.move(b["x"] + share * b["width"], a["y"] + a["height"] / 2, steps=6); self.page.mouse.up()

    def choose(self, name, option): self.control("widget-dropdown", name).locator("select").select_option(option)

    def tick(self, name): self.box.locator(".widget-checkbox", has_text=name).locator("input").click()

    def press(self, name): self.box.get_by_role("button", name=name, exact=True).click()

    def type(self, path): f = self.control("widget-text", "file").locator("input"); f.fill(path); f.press("Enter")

    def still(self):
        "Pixels, once they stay what they are"
        a = self.pixels(); t0 = time.monotonic()
        while time.monotonic() - t0 < 20:
            time.sleep(.3); b = self.pixels()
            if a.shape == b.shape and (a == b).all(): return b
            a = b
        raise AssertionError("the picture never comes to rest")

    def changes(self, move, what):
        "After `move` the picture is another one"
        before = self.still(); move(); t0 = time.monotonic()
        while time.monotonic() - t0 < 30:
            now = self.pixels()
            if now.shape != before.shape or (np.abs(now - before).max(-1) > 8).sum() > 30: break
            time.sleep(.1)
        else: raise AssertionError(f"{what}: the same picture; {self.message()}")
        assert "..." not in (m := self.message()) and self.box.locator("> .widget-html span").evaluate("e => getComputedStyle(e).color") != "rgb(176, 0, 32)", m

    def keep(self, name):
        "The screenshot for the documentation, at most 40 kB"
        self.box.locator("input[type=text]").evaluate_all("all => all.filter(e => e.value).forEach(e => e.value = 'artifacts/runs/first-try')")      # nobody's temporary folder
        self.page.mouse.move(2, 2); self.page.evaluate("document.activeElement.blur()"); self.image.scroll_into_view_if_needed(); time.sleep(.5)
        im = Image.open(io.BytesIO(self.box.screenshot())).convert("RGB"); ink = np.argwhere((np.asarray(im) < 250).any(-1)).max(0) + 8; im = im.crop((0, 0, min(im.width, int(ink[1])), min(im.height, int(ink[0]))))
        for quality, share in ((90, 1), (80, 1), (70, 1), (60, 1), (60, .85), (50, .75)):
            b = io.BytesIO(); im.resize((round(im.width * share), round(im.height * share)), Image.Resampling.LANCZOS).save(b, "WEBP", quality=quality, method=6)
            if b.tell() <= 40 * KB: break
        IMAGES.mkdir(exist_ok=True); (IMAGES / f"explore_{name}.webp").write_bytes(b.getvalue())


@pytest.fixture
def lab(server, browser):
    "open(notebook): a `Lab`; afterwards it is asked what it heard"
    with browser.new_context(viewport={"width": 1280, "height": 1000}) as context:
        opened = []
        def open(name): opened.append(Lab(context.new_page(), server, name)); return opened[-1]
        yield open
        for l in opened: l.clean()


EXPLORERS = {  # name -> (line that makes it, moves of a user)
    "volume": ("viewer = view_volume()", [("z, by keyboard", lambda e: e.key("z mm", *["ArrowRight"] * 6)), ("PD", lambda e: e.choose("image", "PD")), ("window, by mouse", lambda e: e.drag("window %", .3))]),
    "inpaint": ("playground = play_inpaint()", [("known pixels", lambda e: e.drag("known part", .3)), ("period", lambda e: e.key("period px", *["ArrowRight"] * 8))]),
    "impute": ("imputer = impute()", [("another slice", lambda e: e.key("slice", "ArrowLeft", "ArrowLeft")), ("PD not there", lambda e: e.tick("PD"))]),
    "codes": ("browser = browse_codes()", [("another code", lambda e: e.key("code", "PageDown")), ("undo", lambda e: e.press("undo")), ("another cell", lambda e: e.drag("row", .6)), ("its code", lambda e: e.key("code", "PageDown"))]),
    "translate": ("translator = translate()", [("blend", lambda e: e.drag("blend", .9)), ("the other direction", lambda e: e.choose("direction", "T2toT1"))]),
    "sharpen": ("sharpener = sharpen()", [("wipe", lambda e: e.drag("wipe", .25)), ("an earlier step", lambda e: e.key("step", "ArrowLeft", "ArrowLeft", "ArrowLeft"))]),
    "run": ("monitor = watch_run", [("an earlier sample", lambda e: e.key("sample", "ArrowLeft", "ArrowLeft"))]),
}


def test_start(lab, server, request):
    "The notebook of `make lab`, which has all of them: how long until a modality is synthesised; then every move changes the picture"
    t0 = time.monotonic(); l = lab("31_start"); imputer = l.explorer("imputer = impute()").there(); assert imputer.still().std() > 20
    print(f"first synthesised modality: {(seconds := server.took + time.monotonic() - t0):.0f} s after the server was started ({server.took:.1f} s of them until it answered)"); assert seconds < 180
    l.finished()
    for name, (code, moves) in EXPLORERS.items():
        e = l.explorer(code).there()
        for what, move in moves: e.changes(lambda: move(e), f"{name}, {what}")
        if request.config.getoption("--renew"): e.keep(name)


def test_wrong_path(lab):
    "Told in the widget, which goes on"
    l = lab("31_explore"); l.finished(); e = l.explorer("viewer = view_volume()").there(); before = e.still(); e.type("/nowhere/T1.nii.gz")
    e.page.wait_for_function("e => e.textContent.includes('no such file')", arg=e.box.locator("> .widget-html").element_handle())
    assert "/nowhere/T1.nii.gz: no such file" in e.message() and "what was open stays" in e.message() and (e.still() == before).all()
    e.changes(lambda: e.key("z mm", *["ArrowLeft"] * 9), "after a wrong path"); assert "T2: voxel" in e.message()
    assert "first-try: running" in l.explorer("monitor = watch_run").message()
