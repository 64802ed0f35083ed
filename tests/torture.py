"""Kill a training run at random moments, again and again: it must end in the bytes of the run that nobody disturbed.

    python tests/torture.py --kills 60 --seed 0      # score, seeds, where the kills fell; exit code 1 unless all are survived
    python tests/torture.py --tasks --kills 100      # the same for the six real tasks, tiny, on drawn heads, through `train.train_task`
    torchrun --nproc_per_node=2 tests/torture.py --fit FOLDER --steps 5      # the same task in several processes

A round is one run folder: processes train in it, one after the other, and each is killed (SIGKILL, SIGTERM, Ctrl-C, SIGTERM and soon SIGKILL) after a random time, until one reaches `DONE`. A round survives when its weights, last checkpoint
(networks, averages, optimisers, pool), pictures and metrics.csv equal the undisturbed run's, byte for byte; all kills of a round that does not are counted as lost.
The task of our own has what real ones have: two networks that train against each other, one of them twice a step, averaged weights, dropout, BatchNorm, an image pool; fp32 and bf16 by turns.
With --tasks: generator and its autoencoder, inpainting by regression and by WGAN, triples, code book and its prior, two generators with a pool, cubes by regression and by diffusion.
Disks are slow here (each write stops half-way), so that many kills fall into a checkpoint. Processes are forked from one that has imported torch: a kill then costs a tenth of a second.
"""
import argparse, mmap, os, random, shutil, signal, sys, tempfile, time
from collections import Counter
from pathlib import Path

for k in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"): os.environ[k] = "1"

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mri_gen.checkpoint as checkpoint
from mri_gen.core import UserError, generator
from mri_gen.train import Job, TrainConfig, adamw, fit

KINDS = {"SIGKILL": [signal.SIGKILL], "SIGTERM": [signal.SIGTERM], "Ctrl-C": [signal.SIGINT], "SIGTERM, then SIGKILL": [signal.SIGTERM, signal.SIGKILL]}
PLACES = ("before the first step", "in a step", "in a figure or row", "writing a checkpoint", "renaming it", "removing old ones", "at the end")


def config(**changes):
    "32 steps of 8 out of 40 samples: an epoch is 5 steps, and logs, validations and checkpoints fall on different ones"
    return TrainConfig(**{**dict(steps=32, batch_size=8, lr=1e-2, warmup=5, log_every=4, val_every=9, save_every=5, precision="fp32"), **changes})


def job(cfg, dropout=.2, norm=True):
    "A small adversarial task: generator `g`, critic `d` (two updates a step), an image pool"
    x = torch.rand(40, 1, 8, 8, generator=generator(0, "torture"))
    nets = {"g": nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(8, 1, 3, padding=1)),
            "d": nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.SiLU(), nn.Flatten(), nn.Linear(72, 1))}
    state = {"pool": torch.zeros(16, 1, 8, 8)}

    def step(loop, idx):
        real = x[idx]; noisy = real + .2 * loop.draw("noise", 1, 8, 8, normal=True)
        with loop.autocast(): fake = loop.nets["g"](noisy)
        new = loop.gather(fake.float())
        slots = loop.gather(loop.draw("slot")).argsort()                       # distinct slots, the same in every process
        state["pool"][slots + 8 * (loop.step % 2)] = new
        old = loop.share(state["pool"].roll(loop.step, 0)[:8])
        for _ in range(2):
            with loop.autocast(): a, b = loop.nets["d"](real), loop.nets["d"](old)
            ld = (a.float() - 1).square().mean() + b.float().square().mean(); loop.update("d", ld)
        with loop.autocast(): c = loop.nets["d"](fake)
        lg = (fake.float() - real).square().mean() + .1 * (c.float() - 1).square().mean(); loop.update("g", lg)
        return {"loss": lg, "critic": ld}

    return Job(nets, {k: adamw(n, cfg) for k, n in nets.items()}, step, len(x), state=state, meta={"task": "torture"},
               validate=lambda nets: {"mse": (nets["g"](x) - x).square().mean().item()}, preview=lambda nets: (nets["g"](x[:1])[0, 0].clamp(0, 1) * 255).byte().numpy())


def drawn(n=24, size=32):
    "A `SliceSet` of n drawn heads in two contrasts and a third, of 6 subjects, the last for dev"
    import numpy as np
    from mri_gen.datasets import SliceSet
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j]; out, table = [], []
    for i in range(n):
        g = np.random.default_rng(i); r = np.hypot(x / (.7 + .02 * (i % 6)), y / .85); head = (r < 1) * (.5 + .3 * np.cos(7 * r + 3 * x) + .02 * g.random(x.shape))
        out.append([head, (r < 1) * (1 - head), .5 * head + .2 * (r < .5)]); table.append(dict(subject=f"S{i % 6}", site=("x", "y")[i % 2], slice=i // 6, position=("low", "mid", "high")[i // 6 % 3], split="dev" if i % 6 > 3 else "train", plane="sagittal", data="drawn"))
    return SliceSet(np.round(np.clip(out, 0, 1) * 255).astype(np.uint8), table)


def drawn_heads(n=24):
    "A `VolumeSet` of three balls with rings"
    import numpy as np
    from mri_gen.heads import VolumeSet
    from mri_gen.volumes import Volume
    r = [np.linalg.norm(np.stack(np.mgrid[-1:1:n * 1j, -1:1:n * 1j, -1:1:n * 1j]) * np.reshape([1, 1.1 + .1 * i, 1.2], (3, 1, 1, 1)), axis=0) for i in range(3)]
    return VolumeSet([Volume(100 * (v < 1) * (1.2 + np.cos(9 * v)), np.eye(4)) for v in r], [dict(subject=f"S{i}", site="x", split="dev" if i == 2 else "train", data="drawn") for i in range(3)])


COMMON = dict(steps=12, batch_size=4, warmup=3, ema=.9, log_every=3, val_every=5, save_every=4, precision="fp32")
TASKS = {   # run: (slug, profile, settings); RUN:name stands for the undisturbed run of another one
    "generate": ("generate", "smoke", dict(chs=[8, 16], emb_dim=16)), "autoencoder": ("generate", "smoke", dict(space="autoencoder", chs=[8, 16])), "inpaint": ("inpaint", "smoke", dict(chs=[8, 16])), "wgan": ("inpaint", "wgan", dict(chs=[8, 16])),
    "mmgan": ("mmgan", "smoke", dict(chs=[8, 16])), "vqvae": ("vqvae", "smoke", dict(chs=[8, 16], codes=16, kmeans=4, val_images=3)), "prior": ("vqvae", "prior_smoke", dict(width=16, depth=1, val_images=3, autoencoder="RUN:vqvae")),
    "cyclegan": ("cyclegan", "smoke", dict(chs=[8, 16], d_chs=[8, 16], crop=[16, 16], lookalikes=0, pool=6, val_images=3)), "sr3d": ("sr3d", "smoke", dict(chs=[4, 4], emb_dim=8, side=8, many=8, crop=16)), "diffusion": ("sr3d", "smoke", dict(method="diffusion", chs=[4, 4], emb_dim=8, side=8, many=8, crop=16, base="RUN:sr3d"))}


def real_tasks(base, names=None):
    "{run: function that trains it in a folder}; data are made here, once, and what torch loads late is loaded"
    from mri_gen.train import task_module, train_task
    from mri_gen.unpaired import single
    three, out = drawn(), {}; one = type(three)(three.images[:, :1], three.table); large = drawn(24, 64); large = type(one)(large.images[:, :1], large.table)
    data = {"generate": large, "inpaint": large, "mmgan": three, "vqvae": one, "cyclegan": single(three), "sr3d": drawn_heads()}
    for name in names or TASKS:
        slug, profile, params = TASKS[name]; task = task_module(slug); task.load_data = lambda cfg, where, pattern, slug=slug: data[slug]
        params = COMMON | {k: str(base / f"one-{v[4:]}") if str(v).startswith("RUN:") else v for k, v in params.items()}
        out[name] = lambda folder, slug=slug, profile=profile, params=params: train_task(slug, profile, params, out=Path(folder).parent, name=Path(folder).name, device="cpu", threads=1, quiet=True)
        if not any(str(v).startswith("RUN:") for v in TASKS[name][2].values()): j = task.job(task.Config.profile(profile, **params), data[slug], torch.device("cpu")); [n.eval() for n in j.nets.values()]; warm(j)
    return out


@torch.no_grad()
def warm(j):
    if j.validate: j.validate(j.nets)
    if j.preview: j.preview(j.nets)


def toys(base):
    "The task of our own, in fp32 and bf16"
    cfgs = {p: config(precision=p) for p in ("fp32", "bf16")}; job(config())
    return {p: lambda folder, cfg=cfg: fit(lambda: job(cfg), cfg, folder, device="cpu", threads=1, quiet=True) for p, cfg in cfgs.items()}


def result(folder):
    "{file: bytes} of all that must be equal: of checkpoints the last one (which one came before it depends on where the run was paused)"
    folder = Path(folder)
    files = [folder / "weights.safetensors", folder / "metrics.csv", *folder.glob("samples/*"), *max(folder.glob("checkpoint/step-*")).iterdir()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def slow(place, delay):
    "Make the disk slow, and note in `place` what is going on"
    def wrap(module, name, k, before=None):
        inner = getattr(module, name)
        def f(*a, **kw):
            place[0] = k
            if before: before(*a)
            time.sleep(delay); r = inner(*a, **kw); time.sleep(delay); place[0] = 1
            return r
        setattr(module, name, f)
    import mri_gen.train as train
    wrap(checkpoint, "_write", 3, lambda path, raw: path.write_bytes(raw[:len(raw) // 2]))
    wrap(checkpoint.os, "rename", 4); wrap(checkpoint.shutil, "rmtree", 5)
    wrap(train.Log, "add", 2); wrap(train, "_validate", 2); wrap(train, "save_weights", 6)
    inner = train.Loop.train_step
    def step(loop, k): place[0] = 1; return inner(loop, k)
    train.Loop.train_step = step


def child(go, folder, log, place=None, delay=.004):
    "Fork a process that does `go(folder)`, a training; returns its id. Exit code: 0, or 128 + signal"
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)               # not before the child is inside `try`: it must never run on into our code
    pid = os.fork()
    if pid: signal.pthread_sigmask(signal.SIG_UNBLOCK, signals); return pid
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL); signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND); os.dup2(fd, 1); os.dup2(fd, 2)
        if place is not None: slow(place, delay)
        torch.set_num_threads(1); go(folder); code = 0
    except SystemExit as e: code = e.code
    except KeyboardInterrupt: code = 130
    except BaseException:
        import traceback; traceback.print_exc()
    finally:
        sys.stdout.flush(); sys.stderr.flush(); os._exit(code)


def wait(pid):
    "Exit code, or -signal"
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def torture(kills, seed, base, runs=toys, most=99, delay=.004):
    "Survived kills, seeds of the rounds, where the kills fell; `most` kills in a round; `delay`: seconds that each write takes"
    import PIL.Image  # noqa: F401                       torch and PIL load parts of themselves late: once here, not in every child
    runs = runs(base); names = [*runs]; want, took = [], []
    for name in names:
        t = time.monotonic()
        assert wait(child(runs[name], base / f"one-{name}", base / "log", bytearray(1), delay)) == 0, (base / "log").read_text()
        want.append(result(base / f"one-{name}")); took.append(time.monotonic() - t)
    assert all(a != b for i, a in enumerate(want) for b in want[:i]), "the comparison must be able to fail"
    survived = done = paused = 0; seeds, places, kinds, lost, each = [], Counter(), Counter(), [], Counter()
    while done < kills:
        s = seed * 1000 + len(seeds); rng = random.Random(s); seeds.append(s)
        i = s % len(names); folder, here = base / f"round-{s}", 0
        for attempt in range(100):
            place = mmap.mmap(-1, 1); pid = child(runs[names[i]], folder, base / "log", place, delay)
            if done + here < kills and here < most:
                kind = rng.choice(list(KINDS))
                time.sleep(rng.uniform(.05, .8) * took[i]); at = place[0]
                for number in KINDS[kind]:
                    os.kill(pid, number)
                    if len(KINDS[kind]) > 1: time.sleep(rng.uniform(0, .04))
                code = wait(pid)
                if code != 0: here += 1; places[at] += 1; kinds[kind] += 1
                if code not in (0, *(-n for n in KINDS[kind] if n != signal.SIGINT), *(128 + n for n in KINDS[kind] if n != signal.SIGKILL)): lost.append(f"round {s}: {kind} ended in exit code {code}"); break
                if code > 128: paused += 1
                if code == 143 and folder.exists() and not ((folder / "PAUSED").exists() or (folder / "DONE").exists()): lost.append(f"round {s}: {kind} left neither PAUSED nor DONE"); break
            else: code = wait(pid)
            if (folder / "DONE").exists(): break
            if code == 1: break
        if not (folder / "DONE").exists(): lost.append(f"round {s}: never done")
        else:
            got = result(folder); differ = sorted(k for k in want[i].keys() | got.keys() if want[i].get(k) != got.get(k))
            if differ: lost.append(f"round {s}: {names[i]}: other bytes in {', '.join(differ)}")
        done += here; each[names[i]] += here
        if not any(x.startswith(f"round {s}:") for x in lost): survived += here; shutil.rmtree(folder)
    return survived, done, seeds, places, kinds, paused, lost, each


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--kills", type=int, default=60); ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--tasks", nargs="*", choices=list(TASKS), metavar="RUN", help=f"torture real tasks: {', '.join(TASKS)}; without names: all")
    ap.add_argument("--fit", metavar="FOLDER", help="only train there, also under torchrun (no dropout, no BatchNorm)"); ap.add_argument("--steps", type=int, default=5); ap.add_argument("--pause", type=float, default=0, help="seconds a step")
    a = ap.parse_args()
    if a.fit: return one(a)
    t = time.monotonic()
    with tempfile.TemporaryDirectory() as d:
        n = len(a.tasks or TASKS); how = {} if a.tasks is None else dict(runs=lambda base: real_tasks(base, a.tasks), most=max(2, min(4, -(-a.kills // n))), delay=.03)
        survived, done, seeds, places, kinds, paused, lost, each = torture(a.kills, a.seed, Path(d), **how)
        if lost: print((Path(d) / "log").read_text()[-2000:], file=sys.stderr)
    for x in lost: print(x)
    if a.tasks is not None: print("runs: " + ", ".join(f"{k} {n}" for k, n in each.items()))
    print("kills: " + ", ".join(f"{n} {k}" for k, n in sorted(kinds.items())))
    print("fell " + ", ".join(f"{PLACES[k]}: {n}" for k, n in sorted(places.items())) + f"; {paused} stopped in good order")
    print(f"seeds {seeds[0]}-{seeds[-1]}, {time.monotonic() - t:.0f} s")
    print(f"{survived} of {done} kills survived with identical bytes", flush=True)
    return int(survived != done or done < a.kills)


def one(a):
    import torch.distributed as dist
    import mri_gen.train as train
    if int(os.environ.get("WORLD_SIZE", 1)) > 1: dist.init_process_group("gloo")
    rank = int(os.environ.get("RANK", 0)); cfg = config(steps=a.steps, log_every=2, save_every=3)
    def refuse(*_, **__): raise AssertionError(f"rank {rank} writes")
    if rank: train.save_checkpoint = train.save_weights = train.Log.add = train._validate = refuse
    def make():
        j = job(cfg, dropout=0, norm=False); inner = j.step
        def step(loop, idx):
            time.sleep(a.pause); (Path(a.fit) / f"pid-{rank}").write_text(str(os.getpid()))
            return inner(loop, idx)
        j.step = step
        return j
    try: print(fit(make, cfg, a.fit, device="cpu", threads=1)["state"], flush=True)
    except UserError as e: print(e, file=sys.stderr); return 1
    finally:
        if dist.is_initialized(): dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    from mri_gen.train import leave
    leave(main())
