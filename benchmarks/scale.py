"""Very many photos: one file a photo against shards, from the list of files to the score.

    python benchmarks/scale.py [--parts quality plan both all] [--photos 100000] [--old 5000] [--shard-size 2000] [--threads 1] [--json results/scale.json]

Small drawn photos with masks, many copies of a few scenes, each a file of its own; a tiny network with random weights, so that what is left is the cost of everything else. `before` lists a folder,
opens every header, writes a seed at photo size for every photo and reads them all to score them. `after` makes a manifest, and each shard keeps its maps at the patch grid and counts its
pixels. Both run on the first `--old` photos, so their seconds are of the same photos; `after` goes on to all of them, and notes its memory at each shard."""
import os, shutil, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np, torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from _common import Report, held, parser
from mctformer_nb.core import set_seed
from mctformer_nb.datasets import get_dataset
from mctformer_nb.manifest import make_manifest
from mctformer_nb.mctformer import MCTformer
from mctformer_nb.mini import draw_scene, mini_classes
from mctformer_nb.scores import sweep_threshold
from mctformer_nb.seeds import extract_seeds, plan_batches
from mctformer_nb.shards import CountScores, SeedJob, Shards, added_scores, run_job
import mctformer_nb.shards as shards_room

SIDE, SCENES = 32, 200

def tiny():
    set_seed(0); model = MCTformer(len(mini_classes()), 'v2', VisionTransformer(img_size=SIDE, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)).eval()
    with torch.no_grad(): model.cls_token += torch.randn_like(model.cls_token)
    return model

def draw(root, n, name):
    "A folder of `n` photos and masks"
    names, scenes, rows = mini_classes(), root/'scenes', ['image,labels']; scenes.mkdir(exist_ok=True); told = []
    for i in range(SCENES):
        im, mask = draw_scene(i, size=SIDE); told.append(';'.join(names[c-1] for c in np.unique(mask) if c))
        if not (scenes/f'{i}.png').exists(): Image.fromarray(im).save(scenes/f'{i}.png'); Image.fromarray(mask).save(scenes/f'm{i}.png')
    blobs = [((scenes/f'{i}.png').read_bytes(), (scenes/f'm{i}.png').read_bytes()) for i in range(SCENES)]
    for d in ('images', 'masks'): (root/name/d).mkdir(parents=True)
    for i in range(n):
        im, mask = blobs[i%SCENES]; id = f'{i:07d}.png'; (root/name/'images'/id).write_bytes(im); (root/name/'masks'/id).write_bytes(mask); rows.append(f'{id},{told[i%SCENES]}')
    (root/name/'labels.csv').write_text('\n'.join(rows)); (root/name/'classes.txt').write_text('\n'.join(names))
    return f'folder:{root/name}'

def trained():
    "MCTformer with the packaged backbone, whose patch head alone learns from drawn scenes, for some seconds"
    from mctformer_nb.views import to_input
    set_seed(0); ds = get_dataset('mini', n=192, size=96); model = MCTformer(len(ds.classes), 'v2', 'mct_tiny_patch8_96', pretrained=True).eval()
    with torch.no_grad(): feats = torch.cat([model.forward_features(torch.cat([to_input(ds.image(j), 8) for j in range(i, i+32)]))[1] for i in range(0, 192, 32)])
    y, opt = torch.tensor(ds.targets()), torch.optim.AdamW(model.head.parameters(), 3e-3, weight_decay=.05)
    for _ in range(120):
        idx = torch.randperm(len(y))[:64]; loss = torch.nn.functional.multilabel_soft_margin_loss(model.head(feats[idx]).mean((2, 3)), y[idx]); opt.zero_grad(); loss.backward(); opt.step()
    return model

def quality(a, report, root):
    "What few bits change: scenes of `mini` that were not trained on, one and two scales"
    ds, model, wide = get_dataset('mini', 'val', n=8 if a.quick else a.scenes, size=96), trained(), dict(kind='patchcam')
    for scales in ((1.,), (1., 1.5)):
        name = f'{len(scales)} scale{"s"*(len(scales)>1)}'; extract_seeds(model, ds, root/f'q{name}', scales=scales, device='cpu', **wide); plain = sweep_threshold(root/f'q{name}', ds)
        for form in ('uint8', 'float16'):
            run_job(SeedJob(model, Shards(ds), root/f'q{name}{form}', wide, dict(scales=scales, device='cpu'), form=form)); s = sweep_threshold(root/f'q{name}{form}', ds)
            report.add(f'{form}, {name}, {len(ds)} scenes of mini', {'mIoU plain': plain.best_miou, 'mIoU': s.best_miou, 'change of mIoU': s.best_miou-plain.best_miou, 'largest change at any threshold': abs(s.miou-plain.miou).max()})

def timed(f): t, c = time.perf_counter(), time.process_time(); r = f(); return r, time.perf_counter()-t, time.process_time()-c
def on_disk(folder): files = [p for p in Path(folder).rglob('*')]; return {'files and folders': len(files), 'MB on disk': sum(p.stat().st_blocks*512 for p in files)/2**20, 'MB': sum(p.stat().st_size for p in files)/2**20}
OPTIONS = dict(batch_size=64, device='cpu', workers=2)

def job(data, out, size, **kw): return SeedJob(tiny(), Shards(data, size=size), out, dict(layers=2), dict(OPTIONS), **dict(form='uint8', score=True) | kw)

def before(a, report, spec, n):
    out = Path(spec.partition(':')[2])/'../old'
    ds, listed, _ = timed(lambda: get_dataset(spec)); (_, planned, _) = timed(lambda: plan_batches(ds, 8))
    r, t, c = timed(lambda: extract_seeds(tiny(), ds, out, layers=2, **OPTIONS)); s, ts, cs = timed(lambda: sweep_threshold(out, ds)); per = 1000/n
    report.add(f'before, {n} photos', {'seconds before the first batch': listed+planned, 'seconds a thousand, seeds': t*per, 'CPU seconds a thousand, seeds': c*per, 'seconds a thousand, scores': ts*per, 'CPU seconds a thousand, scores': cs*per, **on_disk(out), 'mIoU': s.best_miou})
    shutil.rmtree(out); return s

def after(a, report, spec, n, root, old=None):
    m, t, c = timed(lambda: make_manifest(spec, root/f'{n}.parquet', workers=1)); data, per = f'manifest:{m.path}', 1000/n
    def plan(): s = Shards(data, size=a.shard_size); return plan_batches(s.dataset(0), 8)
    _, first, _ = timed(plan); seen = []; plain = shards_room.seeds_of_shard
    def watched(*args): r = plain(*args); seen.append((len(seen)+1, held()/2**20)); return r
    shards_room.seeds_of_shard = watched
    try: (r, ts, cs) = timed(lambda: run_job(job(data, root/f'new{n}', a.shard_size)))
    finally: shards_room.seeds_of_shard = plain
    s = added_scores(CountScores(root/f'new{n}'), Shards(data, size=a.shard_size)); row = {'seconds a thousand, manifest': t*per, 'KB a thousand, manifest': Path(m.path).stat().st_size/1024*per, 'seconds before the first batch': first, 'seconds a thousand, seeds and scores': ts*per, 'CPU seconds a thousand, seeds and scores': cs*per, **on_disk(root/f'new{n}'), 'mIoU': s.best_miou}
    if old: row |= {'mIoU of the maps at the patch grid': sweep_threshold(root/f'new{n}', get_dataset(spec)).best_miou}; assert s.best_miou==old.best_miou and (a.quick or abs(row['mIoU of the maps at the patch grid']-old.best_miou)<.05)
    report.add(f'after, {n} photos', row); assert r.written==n and s.n_images==n
    for k,mb in seen[::max(1, len(seen)//20)]: report.add(f'memory after {min(n, k*a.shard_size)} of {n} photos', {'MB held': mb})
    return data

def plan(a, report, root):
    "From a manifest to the first batch: no photo is opened, so the rows alone are written"
    import json, pyarrow as pa, pyarrow.parquet as pq
    from mctformer_nb.manifest import ROWS, PhotoRow, manifest_schema
    n, schema = 300 if a.quick else 100_000, manifest_schema(); about = dict(version=1, classes=mini_classes(), notes=[], binary=False, colours=[], source='', splits=dict(train=[0, n]), has_masks=False)
    with pq.ParquetWriter(root/'rows.parquet', schema) as w:
        for i in range(0, n, ROWS): w.write_table(pa.Table.from_pylist([vars(PhotoRow(f'{j:07d}', f'photos/{j:07d}.jpg', 500, 375-j%3*75, [j%8])) for j in range(i, min(n, i+ROWS))], schema))
        w.add_key_value_metadata(dict(mctformer_nb=json.dumps(about)))
    data = f'manifest:{root}/rows.parquet'
    def shard(): return plan_batches(Shards(data, size=a.shard_size).dataset(0), 16)
    def whole(): return plan_batches(get_dataset(data), 16)
    for what,f in (('shards', shard), ('all photos at once', whole)): (b, bad), t, c = timed(f); assert b and not bad; report.add(f'plan of {n} photos, {what}', {'seconds before the first batch': t, 'CPU seconds before the first batch': c})

def workers(a, report, data, n, root, w):
    "Seconds of `w` processes that claim shards of the same job; their start is left out"
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore'); out = root/f'workers{w}'
    ps = [subprocess.Popen([sys.executable, __file__, '--worker', data, str(out), str(a.shard_size), str(r), str(w)], env=env, stdout=subprocess.PIPE, text=True) for r in range(w)]
    said = [p.communicate()[0].split()[-3:] for p in ps]; assert not any(p.returncode for p in ps)
    begin, end = min(float(s[0]) for s in said), max(float(s[1]) for s in said)
    report.add(f'{w} worker{"s"*(w>1)}, {n} photos', {'seconds a thousand': (end-begin)*1000/n, 'photos a second': n/(end-begin), 'CPU seconds a thousand': sum(float(s[2]) for s in said)*1000/n})
    return {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}

def worker(data, out, size, turn, of):
    "One of several: waits until all have loaded, so that the clock runs for the work alone"
    torch.set_num_threads(1); j = job(data, out, int(size)); Path(out).mkdir(exist_ok=True); (Path(out)/f'.ready{turn}').mkdir()
    while not all((Path(out)/f'.ready{t}').exists() for t in range(int(of))): time.sleep(.05)
    t, c = time.time(), time.process_time(); run_job(j, int(turn), int(of)); print(t, time.time(), time.process_time()-c)

def main(a):
    if a.quick: a.photos, a.old, a.shard_size = 60, 40, 20
    report = Report('benchmark: scale', a, f'drawn photos of {SIDE} x {SIDE} pixels, {SCENES} scenes, tiny network')
    with tempfile.TemporaryDirectory() as d:
        root = Path(d)
        if 'quality' in a.parts: quality(a, report, root)
        if 'plan' in a.parts: plan(a, report, root)
        if 'both' in a.parts:
            spec = draw(root, a.old, 'old_photos'); s = before(a, report, spec, a.old); data = after(a, report, spec, a.old, root, s)
            files = [workers(a, report, data, a.old, root, w) for w in (1, 2)]; assert files[0]==files[1]                     # byte for byte
        if 'all' in a.parts: after(a, report, draw(root, a.photos, 'all_photos'), a.photos, root)
    report.save()

if __name__ == '__main__':
    if sys.argv[1:2]==['--worker']: worker(*sys.argv[2:]); sys.exit()
    p = parser(__doc__, 1); A = p.add_argument
    A('--photos', type=int, default=100_000); A('--old', type=int, default=5000, help='of these, in both ways'); A('--shard-size', type=int, default=2000); A('--scenes', type=int, default=200, help='of mini, for the quality')
    A('--parts', nargs='+', default=['quality', 'plan', 'both', 'all'], choices=['quality', 'plan', 'both', 'all'])
    main(p.parse_args())
