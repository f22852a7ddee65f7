"""The threshold sweep: 60 thresholds in one pass against one threshold, and against reading every map again for each threshold.

    python benchmarks/sweep.py [--images 40] [--repeats 5] [--json results/bench_sweep.json]

Synthetic seeds of 320 x 240 pixels with 1 to 3 of 20 classes, as files (seed .npz, mask .png) and in memory. The variants take turns, so that a busy
machine slows all of them alike; medians of the repeats and their ratios are printed. The plain sweep reads and scores everything once per threshold, as the
published scorer does; it is timed once. All variants must give the same confusion matrix."""
import argparse, datetime, json, os, platform, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]; sys.path.insert(0, str(ROOT))
from mctformer_nb.scores import confusion, fixed_threshold, sweep_threshold

C, H, W, THRESHOLDS = 20, 240, 320, np.arange(60)/100

# ---- synthetic seeds

def make(rng):
    "Smooth bumps, one a class, with noise; the mask has the bumps' cores and an ignored rim"
    classes = np.sort(rng.choice(C, rng.integers(1, 4), replace=False)); y, x = np.mgrid[:H,:W]
    mask, maps = np.zeros((H,W), np.uint8), []
    for c in classes:
        d = np.hypot((y-rng.uniform(0,H))/rng.uniform(30,90), (x-rng.uniform(0,W))/rng.uniform(30,120))
        mask[d<1] = c+1; mask[abs(d-1)<.05] = 255
        m = np.exp(-d**2*rng.uniform(.3,1)) + .05*rng.random((H,W)); maps.append((m-m.min())/(m.max()-m.min()))
    return classes, np.stack(maps).astype(np.float16), mask

class Files:
    "What a sweep needs of a data set"
    classes = [f'class {i}' for i in range(C)]
    def __init__(self, folder, n, rng):
        self.folder, self.ids, self.items = folder, [f'{i:04}' for i in range(n)], [make(rng) for _ in range(n)]
        for id,(c,m,y) in zip(self.ids, self.items): np.savez_compressed(folder/f'{id}.npz', classes=c, maps=m); Image.fromarray(y).save(folder/f'{id}.png')
    def mask(self, i): return np.asarray(Image.open(self.folder/f'{self.ids[i]}.png'))

# ---- the plain version: everything again for each threshold

def plain_one(items, t):
    conf = np.zeros((C+1,C+1), np.int64)
    for classes,maps,mask in items:
        stack = np.concatenate([np.full((1,*mask.shape), t), maps])                    # (1+k,H,W), background first
        conf += confusion(np.concatenate([[0], classes+1])[stack.argmax(0)], mask, C+1)
    return conf

def read(ds):
    for i,id in enumerate(ds.ids):
        f = np.load(ds.folder/f'{id}.npz'); yield f['classes'], f['maps'], ds.mask(i)

def plain_sweep(items): return np.stack([plain_one(items(), t) for t in THRESHOLDS])

# ---- the table

def cpu():
    try: name = next(l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name'))
    except (OSError, StopIteration): name = platform.processor() or platform.machine()
    return f'{name}, {len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()} cores'

def commit():
    r = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True)
    return r.stdout.strip() or None

def clock(f): t = time.perf_counter(); r = f(); return time.perf_counter()-t, r

def main():
    p = argparse.ArgumentParser(); p.add_argument('--images', type=int, default=40); p.add_argument('--repeats', type=int, default=5); p.add_argument('--json', type=Path)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as d:
        ds = Files(Path(d), a.images, np.random.default_rng(0)); names = ds.classes
        variants = {'files: one pass, 60 thresholds': lambda: sweep_threshold(d, ds), 'files: one pass, 1 threshold': lambda: fixed_threshold(d, ds, .3),
                    'files: plain, 1 threshold': lambda: plain_one(read(ds), .3), 'memory: one pass, 60 thresholds': lambda: sweep_threshold(ds.items, names),
                    'memory: one pass, 1 threshold': lambda: fixed_threshold(ds.items, names, .3), 'memory: plain, 1 threshold': lambda: plain_one(ds.items, .3)}
        times = {k: [] for k in variants}
        for _ in range(a.repeats+1):
            for k,f in variants.items(): times[k].append(clock(f)[0])
        med = {k: float(np.median(v[1:])) for k,v in times.items()}                     # the first round warms up
        med['files: plain, 60 thresholds'], confs = clock(lambda: plain_sweep(lambda: read(ds)))
        med['memory: plain, 60 thresholds'], again = clock(lambda: plain_sweep(lambda: ds.items))
        r = sweep_threshold(d, ds)
    same = bool((confs == again).all() and (r.confusion == confs[int(np.argmax(r.miou))]).all() and all((fixed_threshold(ds.items, names, t).confusion == c).all() for t,c in zip(THRESHOLDS[::10], confs[::10])))
    assert same, 'the one-pass sweep and the plain loop disagree'
    for k,v in med.items(): print(f'{k:<34}{1000*v/a.images:>10.2f} ms an image')
    ratios = {}
    for w in ('files','memory'):
        ours = med[f'{w}: one pass, 60 thresholds']
        ratios |= {f'{w}: 60 thresholds / 1 threshold': ours/med[f'{w}: one pass, 1 threshold'], f'{w}: 60 thresholds / plain 1 threshold': ours/med[f'{w}: plain, 1 threshold'],
                   f'{w}: plain 60 thresholds / one pass': med[f'{w}: plain, 60 thresholds']/ours}
    print(); [print(f'{k:<42}{v:>8.2f}') for k,v in ratios.items()]
    print(f'the sweep costs at most twice one threshold: {"yes" if max(ratios[k] for k in ratios if k.endswith("/ 1 threshold")) <= 2 else "NO"}; same confusion matrices: {"yes" if same else "NO"}')
    if a.json:
        about = dict(table='bench_sweep', dataset=f'synthetic, {a.images} images {W} x {H}', commit=commit(), seed=0, hardware=cpu(),
                     command=' '.join(['python benchmarks/sweep.py', *sys.argv[1:]]), date=datetime.date.today().isoformat())
        recs = [about | dict(row=k, value=round(v, 6), metric='seconds') for k,v in med.items()] + [about | dict(row=k, value=round(v, 3), metric='ratio') for k,v in ratios.items()]
        a.json.parent.mkdir(parents=True, exist_ok=True); a.json.write_text(json.dumps(recs, indent=1)+'\n')

if __name__=='__main__': main()
