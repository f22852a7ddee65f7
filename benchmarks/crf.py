"""The dense CRF: `crf_labels` over the classes present and on several processes against one process and all 21 classes; how the cost grows with classes, and that of PAR in its place.

    python benchmarks/crf.py [--photos 24] [--width 320 --height 240] [--workers 1 2] [--classes 1 2 3 5 20] [--json results/bench.json]

Drawn scenes of the size of the VOC animals (1,483 photos of PASCAL VOC 2012, at most 320 pixels), with as many labels a photo as those have; seeds are soft discs; two CRFs a photo (a low and a high
background), 10 iterations each with PSA's parameters. Several processes are timed by elapsed time, so cores in use by others make them slower. Their start (imports in\neach) costs the same for few photos and for ten thousand; it is measured by itself, with photos of 16 x 16 pixels."""
import tempfile
from pathlib import Path
import numpy as np
from PIL import Image
from _common import Report, by_turns, compare, parser
from mctformer_nb.artifacts import load_crf_label, save_crf_label
from mctformer_nb.crf import REFERENCE_ALPHAS, add_background, crf_labels, dense_crf
from mctformer_nb.datasets import Dataset
from mctformer_nb.mini import draw_scene
from mctformer_nb.par import par

C, LABELS = 20, {1: 641, 2: 654, 3: 149, 4: 31, 5: 8}                                   # photos of the VOC animals by number of labels

def photo(i, w, h): return np.asarray(Image.fromarray(draw_scene(i, size=max(w, h))[0]).crop((0, 0, w, h)))

def blobs(i, k, w, h):
    "k soft discs (k,H,W)"
    rng, (y, x) = np.random.default_rng(i), np.mgrid[:h, :w]
    return np.stack([np.exp(-(((x-rng.uniform(0, w))**2+(y-rng.uniform(0, h))**2)/rng.uniform(.15, .3)**2/w**2)) for _ in range(k)]).astype(np.float16)

def full(classes, maps, alpha):
    "All 21 rows, with the smallest probability where a class is absent"
    p = np.full((C+1, *maps.shape[1:]), 1.01e-5, np.float32); p[[0, *(classes+1)]] = np.maximum(add_background(maps, alpha), 1.01e-5); return p

def plain(ds, seeds, out):
    out.mkdir(exist_ok=True)
    for id in ds.ids:
        with np.load(seeds/f'{id}.npz') as f: classes, maps = f['classes'], f['maps']
        low, high = (dense_crf(ds.image(id), full(classes, maps, a)) for a in REFERENCE_ALPHAS)
        keep = [0, *(classes+1)]; save_crf_label(out/f'{id}.npz', classes, low[keep], high[keep])

def make(a, folder, n, w, h):
    "A data set and its seeds, as many labels a photo as the VOC animals have"
    k = np.array([k for k,m in LABELS.items() for _ in range(m)])[np.linspace(0, sum(LABELS.values())-1, n).round().astype(int)]   # the same shares
    images = {str(i): Image.fromarray(photo(i, w, h)) for i in range(n)}; folder.mkdir(parents=True)
    for i in range(n): np.savez(folder/f'{i}.npz', classes=np.sort(np.random.default_rng(i).permutation(C)[:k[i]]).astype(np.int64), maps=blobs(i, k[i], w, h))
    return Dataset('drawn', [str(i) for i in range(C)], list(images), 'all', images.__getitem__, lambda id: (w, h), lambda id: list(range(k[int(id)])))

def data_set(a, report):
    with tempfile.TemporaryDirectory() as d:
        d = Path(d); ds, tiny = make(a, d/'seeds', a.photos, a.width, a.height), make(a, d/'tiny', 2*max(a.workers), 16, 16)
        ours = lambda ds, seeds, w: crf_labels(d/seeds, ds, d/f'{seeds}{w}', workers=w, overwrite=True)
        g = by_turns({0: lambda: plain(ds, d/'seeds', d/'plain')} | {w: (lambda w=w: ours(ds, 'seeds', w)) for w in a.workers} | {f'start {w}': (lambda w=w: ours(tiny, 'tiny', w)) for w in a.workers}, a.repeats, warm=lambda: None)
        pairs = [(load_crf_label(d/'plain'/f'{id}.npz'), load_crf_label(d/f'seeds{w}'/f'{id}.npz')) for id in ds.ids for w in a.workers]
        err = float(max(abs(p.astype(np.float32)-q).max() for x,y in pairs for p,q in zip(x[1:], y[1:])))
        agree = float(np.mean([(p.argmax(0)==q.argmax(0)).mean() for x,y in pairs for p,q in zip(x[1:], y[1:])]))
    for w in a.workers:
        row, med = compare(g[0], g[w], wall=w>1), lambda k: float(np.median(g[k]['wall' if w>1 else 'cpu']))
        row |= {'seconds to start': med(f'start {w}'), 'times faster, once started': med(0)/(med(w)-med(f'start {w}')), 'largest difference': err, 'same label': 100*agree}
        report.add(f'{a.photos} photos, {w} process{"es"*(w>1)}', row, {'times faster, once started': 4} if w==2 else None)

def by_classes(a, report):
    image = photo(0, a.width, a.height); p = {k: add_background(blobs(0, k, a.width, a.height), 1) for k in a.classes}
    jobs = {(k, f): (lambda k=k, f=f: f(image, p[k])) for k in a.classes for f in (dense_crf, par)}
    g, cpu = by_turns(jobs, a.repeats, warm=lambda: None), lambda *key: float(np.median(g[key]['cpu']))
    for k in a.classes: report.add(f'{k} classes and background, {a.width} x {a.height}', {'seconds': cpu(k, dense_crf), 'seconds, PAR': cpu(k, par)})

def main(a):
    if a.quick: a.photos, a.width, a.height, a.repeats, a.classes, a.workers = 3, 48, 32, 1, [1, 3], [1]
    report = Report('benchmark: dense CRF', a, f'drawn scenes {a.width} x {a.height}')
    data_set(a, report); by_classes(a, report); report.save()

if __name__ == '__main__':
    p = parser(__doc__, 3); A = p.add_argument
    A('--width', type=int, default=320); A('--height', type=int, default=240); A('--classes', type=int, nargs='+', default=[1, 2, 3, 5, 10, 20])
    A('--photos', type=int, default=24); A('--workers', type=int, nargs='+', default=[1, 2])
    main(p.parse_args())
