"""The dense CRF: only the classes present against all 21, and label files of a data set with 1 and more processes. All ratios from one run.

    python benchmarks/crf.py [--width 500 --height 375] [--photos 6] [--workers 1 2] [--json results/bench_crf.json]

Drawn scenes at the size of a VOC photo, seeds of k random classes, 10 iterations with PSA's parameters. Interleaved repeats, the smallest time counts."""
import argparse, datetime, json, os, platform, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]; sys.path.insert(0, str(ROOT))
from mctformer_nb.crf import crf_labels, dense_crf
from mctformer_nb.datasets import Dataset
from mctformer_nb.mini import draw_scene

def photo(i, w, h): return np.asarray(Image.fromarray(draw_scene(i, size=max(w, h))[0]).crop((0, 0, w, h)))

def blobs(i, k, w, h):
    "Background and k soft discs (k+1,H,W)"
    rng, (y, x) = np.random.default_rng(i), np.mgrid[:h, :w]
    maps = np.stack([np.exp(-(((x-rng.uniform(0, w))**2+(y-rng.uniform(0, h))**2)/rng.uniform(.15, .3)**2/w**2)) for _ in range(k)])
    return np.concatenate([(1-maps.max(0, keepdims=True)), maps]).astype(np.float32)

def timed(f): t = time.perf_counter(); out = f(); return time.perf_counter()-t, out

def classes_present(a):
    "Seconds with k+1 rows, and with 21 rows that are all above the floor"
    image, rows = photo(0, a.width, a.height), []
    probs = {k: blobs(0, k, a.width, a.height) for k in a.classes}
    full = {k: np.maximum(np.concatenate([p, np.zeros((20-k, *p.shape[1:]), np.float32)]), 1.01e-5) for k,p in probs.items()}     # (21,H,W)
    best = {}
    for _ in range(a.repeats):
        for k in a.classes:
            for name,p in (('present', probs[k]), ('all', full[k])):
                t, out = timed(lambda: dense_crf(image, p)); best[k, name] = min(best.get((k, name), (9e9,))[0], t), out
    print('rows  seconds  of 21 rows  ratio  rows/21   largest difference', flush=True)
    for k in a.classes:
        (t, o), (T, O) = best[k, 'present'], best[k, 'all']; err = float(abs(O[:k+1]-o).max())
        rows.append(dict(row=f'{k+1} of 21 rows, {a.width} x {a.height}', seconds=round(t, 3), seconds_all=round(T, 3), time_ratio=round(t/T, 4), max_difference=err))
        print(f'{k+1:4d} {t:8.2f} {T:11.2f} {t/T:6.2f} {(k+1)/21:8.2f}   {err:.1e}', flush=True)
    return rows

def _image(a, id): return Image.fromarray(photo(int(id), a.width, a.height))

def data_set(a): return Dataset('drawn', [str(i) for i in range(20)], [str(i) for i in range(a.photos)], 'all', lambda id: _image(a, id), lambda id: (a.width, a.height), lambda id: [0, 1])

def processes(a):
    "Seconds of `crf_labels` over a few photos with each number of processes, started afresh each time"
    ds, best = data_set(a), {}; images = {id: ds.image(id) for id in ds.ids}; ds.get_image = images.__getitem__
    with tempfile.TemporaryDirectory() as d:
        for id in ds.ids: np.savez(f'{d}/{id}.npz', classes=np.array([0, 1]), maps=blobs(int(id), 2, a.width, a.height)[1:].astype(np.float16))
        for _ in range(a.repeats):
            for n in a.workers:
                r = crf_labels(d, ds, f'{d}/labels', workers=n, overwrite=True); assert not r.bad, r.bad
                best[n] = min(best.get(n, 9e9), r.seconds)
    print('\nprocesses  seconds a photo  speed-up', flush=True)
    for n in a.workers: print(f'{n:9d} {best[n]/a.photos:16.2f} {best[a.workers[0]]/best[n]:9.2f}', flush=True)
    return [dict(row=f'{n} process{"es" if n>1 else ""}, {a.photos} photos', seconds_per_photo=round(best[n]/a.photos, 3), speedup=round(best[a.workers[0]]/best[n], 3)) for n in a.workers]

def hardware():
    name = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.processor())
    return f'{name}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores'

def records(rows, a):
    git = lambda *c: subprocess.run(['git', *c], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    options = ' '.join([f'--width {a.width} --height {a.height} --photos {a.photos} --repeats {a.repeats}', '--classes', *map(str, a.classes), '--workers', *map(str, a.workers)])
    common = dict(table='benchmark: dense CRF', dataset='drawn scenes', commit=git('rev-parse', '--short', 'HEAD'), seed=0, hardware=hardware(),
                  command=f'python benchmarks/crf.py {options}', date=datetime.date.today().isoformat())
    return [dict(common, row=r['row'], metric=m, value=v) for r in rows for m,v in r.items() if m!='row']

def main(a):
    rows = classes_present(a) + processes(a)
    if a.json: Path(a.json).write_text(json.dumps(records(rows, a), indent=1)+'\n')

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--width', type=int, default=500); p.add_argument('--height', type=int, default=375); p.add_argument('--classes', type=int, nargs='+', default=[1, 2, 3, 6])
    p.add_argument('--photos', type=int, default=6); p.add_argument('--workers', type=int, nargs='+', default=[1, 2]); p.add_argument('--repeats', type=int, default=2); p.add_argument('--json')
    main(p.parse_args())
