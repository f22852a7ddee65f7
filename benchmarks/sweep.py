"""The threshold sweep: 60 thresholds in one pass over the pixels, against reading and scoring every map again for each threshold.

    python benchmarks/sweep.py [--images 5 10 20] [--json results/bench.json]

Synthetic seeds of 320 x 240 pixels with 1 to 3 of 20 classes, as files (seed .npz, mask .png) and in memory. The plain sweep reads and scores everything once per threshold, as the published
scorer does. Both must give the same confusion matrices."""
import tempfile
from pathlib import Path
import numpy as np
from PIL import Image
from _common import Report, by_turns, compare, parser
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

def one_size(n, a, report):
    with tempfile.TemporaryDirectory() as d:
        ds = Files(Path(d), n, np.random.default_rng(0)); names = ds.classes
        got = by_turns({'files': lambda: sweep_threshold(d, ds), 'files plain': lambda: plain_sweep(lambda: read(ds)), 'files 1': lambda: fixed_threshold(d, ds, .3),
                        'memory': lambda: sweep_threshold(ds.items, names), 'memory plain': lambda: plain_sweep(lambda: ds.items), 'memory 1': lambda: fixed_threshold(ds.items, names, .3)},
                       a.repeats, warm=lambda: (sweep_threshold(d, ds), plain_one(read(ds), .3)))
        for where in ('files', 'memory'):
            r, confs = got[where]['result'], got[f'{where} plain']['result']
            one = fixed_threshold(ds.items, names, .3).confusion
            same = (r.confusion==confs[int(np.argmax(r.miou))]).all() and (one==confs[30]).all()
            assert same, 'the one-pass sweep and the plain loop disagree'
            cost = float(np.median(np.array(got[where]['cpu'])/got[f'{where} 1']['cpu']))
            report.add(f'{n} images, 60 thresholds, {where}', compare(got[f'{where} plain'], got[where]) | {'cost of 60 thresholds over 1': cost, 'largest difference': 0}, {'times faster': 30} if where=='files' and n>=10 else None)

def main(a):
    if a.quick: a.images, a.repeats = [2], 1
    report = Report('benchmark: threshold sweep', a, f'synthetic seeds {W} x {H}')
    for n in a.images: one_size(n, a, report)
    report.save()

if __name__=='__main__':
    p = parser(__doc__, 3); p.add_argument('--images', type=int, nargs='+', default=[5, 10, 20]); main(p.parse_args())
