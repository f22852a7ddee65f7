"""Resident memory (RSS) of this process over a long extraction, and what one photo costs in seconds and bytes.

    python benchmarks/memory.py [--images 10000] [--json results/memory.json]

Ten thousand PNGs of 32 x 32 pixels are written, read, decoded and turned into seed files by a small MCTformer with random weights; RSS is noted every
250 photos. The second part measures one seed file and one mask of a 384 x 384 photo, which the page on robustness scales up to a million photos."""
import argparse, os, sys, tempfile, time
from dataclasses import replace
from pathlib import Path
ROOT = Path(__file__).resolve().parents[1]; sys.path.insert(0, str(ROOT))
import numpy as np, torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from mctformer_nb.core import save_mask, set_seed
from mctformer_nb.datasets import get_dataset
from mctformer_nb.mctformer import MCTformer
from mctformer_nb.seeds import extract_seeds
from mctformer_nb.tables import new_record, save_records

def rss(): return next(int(l.split()[1])/1024 for l in open('/proc/self/status') if l.startswith('VmRSS'))   # MB

def folder(root, n, side):
    "Folder data set of `n` noise photos with three classes"
    (root/'images').mkdir(parents=True); rng = np.random.default_rng(0)
    for i in range(n): Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(root/f'images/p{i:06d}.png')
    (root/'labels.csv').write_text('image,labels\n'+''.join(f'p{i:06d}.png,{"abc"[i%3]}\n' for i in range(n))); (root/'classes.txt').write_text('a\nb\nc\n')
    return get_dataset(f'folder:{root}')

def watched(ds, every):
    "The data set, noting memory every so many photos read"
    notes, seen, get = [], [0], ds.get_image
    def read(id):
        seen[0] += 1
        if seen[0]%every==0: notes.append((seen[0], round(rss(), 1)))
        return get(id)
    return replace(ds, get_image=read), notes

def main(a):
    set_seed(0); torch.set_num_threads(1)
    model = MCTformer(3, 'v2', VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=1, num_classes=0))
    with tempfile.TemporaryDirectory() as d:
        d = Path(d); ds, notes = watched(folder(d/'data', a.images, 32), 250); start = time.time()
        r = extract_seeds(model, ds, d/'seeds', batch_size=32, layers=1, workers=1, device='cpu'); seconds = time.time()-start
        assert r.written==a.images and not r.bad
        seed_bytes = sum(f.stat().st_size for f in (d/'seeds').glob('p*.npz'))/a.images
        large = get_dataset('mini', n=8, size=384); small = MCTformer(8, 'v2', 'deit_small_patch16_224').eval(); t = time.process_time()
        extract_seeds(small, large, d/'large', batch_size=1, workers=1, device='cpu'); one = (time.process_time()-t)/8
        for i,id in enumerate(large.ids): save_mask(d/f'masks/{id}.png', large.mask(i))
        size = lambda kind, ext: float(np.mean([f.stat().st_size for f in (d/kind).glob(f'*.{ext}')]))
        costs = {'CPU seconds a photo': one, 'bytes a seed': size('large', 'npz'), 'bytes a mask': size('masks', 'png')}
    settled = [m for n,m in notes if n>=a.images//5]; n = [n for n,_ in notes if n>=a.images//5]
    slope = float(np.polyfit(n, settled, 1)[0]*1000)
    common = dict(table='memory', seed=0, command=f'python benchmarks/memory.py --images {a.images}')
    rec = [new_record(row=f'{k} photos', value=m, metric='RSS in MB', dataset='noise 32 x 32', **common) for k,m in notes]
    rec += [new_record(row='growth a 1,000 photos', value=slope, metric='MB', dataset='noise 32 x 32', **common)]
    rec += [new_record(row=k, value=v, metric='cost', dataset='drawn 384 x 384, DeiT-S', **common) for k,v in costs.items()]
    print(f'{a.images} photos in {seconds:.0f} s, RSS {notes[0][1]} MB at first, {max(m for _,m in notes)} at most, {slope:+.2f} MB a 1,000 photos; {costs}')
    save_records(a.json, rec)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--images', type=int, default=10000); p.add_argument('--json', default='results/memory.json')
    main(p.parse_args())
