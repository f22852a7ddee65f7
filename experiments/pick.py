"""Sixty photos with labels alone, ten masks corrected (the true ones stand in for a person's), and what that is worth: ten that `mct_pick` chooses beside ten at random.

    python experiments/pick.py [--data mini | --data voc:PATH/VOC2012] [--seeds 0,1,2] [--out runs/pick] [--json results/pick.json]

Three ways from there, each with the commands that `mct_import` prints: pseudo masks alone; ten random ones corrected; ten picked ones corrected. Scored by mIoU on the
photos of the folder that no way corrected, for pseudo masks and for the DeepLab trained on them, and on photos that are in no training."""
import argparse, json, time
from pathlib import Path
import numpy as np
from mctformer_nb import cli, cli_masks, cli_tools
from mctformer_nb.core import need, save_mask
from mctformer_nb.datasets import get_dataset
from mctformer_nb.scores import score_masks, sweep_threshold
from mctformer_nb.tables import new_record, save_records
from photos60 import Truth, draw

def write_folder(ds, ids, root):
    "Photos and a table of labels, as a user has them"
    rows = ['image,labels']
    for id in ids:
        (root/'images').mkdir(parents=True, exist_ok=True); f = root/f'images/{id}.{"png" if ds.name=="mini" else "jpg"}'
        if not f.exists(): ds.image(id).save(f, **({} if ds.name=='mini' else dict(quality=95)))
        rows.append(f'{f.name},' + ';'.join(ds.classes[c] for c in ds.labels(id)))
    (root/'labels.csv').write_text('\n'.join(rows)+'\n')

def run(name, *flags, **options):
    "A command as it is typed"
    argv = [*flags, *(w for k,v in options.items() if v is not None for w in (f'--{k.replace("_", "-")}', str(v)))]
    print('$', name, *argv, flush=True); start = time.time()
    f = next(getattr(m, name) for m in (cli, cli_masks, cli_tools) if hasattr(m, name))
    need(f(argv)==0, name, 'ended with an error', 'See above')
    return time.time()-start

def miou(folder, truth, ids): return score_masks(folder, truth.subset(ids), skip_missing=True).miou

class Hidden(Truth):
    "True masks of a folder's photos, in its classes"
    def subset(self, ids):
        out = Hidden(self.ds, self.folder); out.ids = list(ids)
        return out

def base(a, seed):
    "Folder, seeds and pseudo masks of one seed, and the hidden truth"
    root = a.out/f'seed{seed}'
    if a.data=='mini':
        ds = get_dataset('mini', 'train', n=a.photos, seed=seed); write_folder(ds, ds.ids, root/'photos'); recipe, more = 'quick', dict(image_size=96, layers='all', scales='1,1.5')
    else:
        ds = get_dataset(a.data, 'trainaug'); write_folder(ds, sum(draw(ds, seed, a.photos//3).values(), []), root/'photos'); recipe, more = 'frozen', {}
    d = dict(data=f'folder:{root}/photos')
    run('mct_train', recipe=recipe, out=root/'run', **d); run('mct_seeds', run=root/'run', **more, **d)
    run('mct_masks', seeds=root/'run/seeds', out=root/'run/masks', **d)
    folder = get_dataset(d['data']); return root, folder, Hidden(ds, folder), recipe

def corrected(root, way, ids, folder, truth, recipe, weight, seed):
    "The three commands after a correction -> pseudo masks, network's masks of the same photos, run"
    mine = root/way; (mine/'photos').mkdir(parents=True, exist_ok=True)
    for name in ('images', 'labels.csv'):
        if not (mine/f'photos/{name}').exists(): (mine/f'photos/{name}').symlink_to((root/f'photos/{name}').resolve())
    d = dict(data=f'folder:{mine}/photos'); masks = again = root/'run/masks'; net = mine/'deeplab'
    if ids:
        for id in ids: save_mask(mine/f'photos/masks/{id}.png', truth.mask(id))
        again = mine/'masks_again'                                             # with the background score that fits the corrected masks
        run('mct_score', '--corrected', pred=root/'run/seeds', json=mine/'corrected.json', **d)
        run('mct_masks', seeds=root/'run/seeds', background=mine/'corrected.json', out=again, **d)
    run('mct_segment_train', masks=masks, out=net, recipe=recipe, corrected_weight=weight if ids else None, seed=seed, **d)
    run('mct_segment', run=net, out=mine/'found', split='train', scales=1 if recipe=='quick' else None, **d)
    return again, mine/'found', net

def main(a):
    records = []
    for seed in a.seeds:
        root, folder, truth, recipe = base(a, seed)
        run('mct_pick', n=a.n, seeds=root/'run/seeds', masks=root/'run/masks', data=f'folder:{root}/photos', out=root/'pick')
        ways = dict(none=[], random=sorted(np.random.default_rng(seed).choice(folder.ids, a.n, replace=False).tolist()), picked=(root/'pick/ids.txt').read_text().split())
        others = [id for id in folder.ids if id not in {*ways['random'], *ways['picked']}]
        print(f'seed {seed}: {len(others)} photos that nobody corrects; best background {sweep_threshold(root/"run/seeds", truth).best_threshold:.2f} with all masks')
        for way,ids in ways.items():
            masks, found, net = corrected(root, way, ids, folder, truth, recipe, a.weight, seed)
            scores = {'pseudo masks at the background of the corrected ones': miou(masks, truth, others), 'network': miou(found, truth, others)}
            if a.data=='mini':
                run('mct_segment', run=net, data='mini', split='val', out=root/way/'unseen', scales=1); scores['network, unseen photos'] = score_masks(root/way/'unseen', get_dataset('mini', 'val')).miou
            print(f'seed {seed}, {way}:', ', '.join(f'{k} {v:.1f}' for k,v in scores.items()), flush=True)
            data, command = 'mini, 60 scenes' if a.data=='mini' else 'VOC animals, 60 photos', f'python experiments/pick.py --data {a.data.split(":")[0]}'
            records += [new_record('pick', f'{k}, {way} corrected', v, 'mIoU', data, seed=seed, command=command) for k,v in scores.items()]
    if a.json: save_records(a.json, records)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); A = p.add_argument
    A('--data', default='mini'); A('--photos', type=int, default=60); A('--n', type=int, default=10); A('--weight', type=int, default=5)
    A('--seeds', type=lambda s: [int(v) for v in s.split(',')], default=[0, 1, 2]); A('--out', type=Path, default=Path('runs/pick')); A('--json', type=Path)
    main(p.parse_args())
