"""What it is worth to choose which masks are corrected: sixty photos with labels alone, ten of their pseudo masks corrected (true masks stand in for a person's),
the ten that `mct_pick` chooses beside five times ten at random.

    python experiments/pick.py [--data mini | --data voc:PATH/VOC2012] [--seeds 11,12,13] [--steps 120] [--out runs/pick] [--json results/pick.json]

Scored by the mIoU of all sixty masks, corrected and pseudo ones together. With --steps also by a DeepLab of that many steps, trained as `mct_import` says: without a correction,
with the ten picked and with the first random ten, on the photos of the folder that are in neither ten. For mini the classifier is the one in the package, which has seen
other scenes; for photographs it is trained on the sixty."""
import argparse
from pathlib import Path
import numpy as np, torch
from safetensors.torch import load_file
import mctformer_nb
from mctformer_nb import cli, cli_masks
from mctformer_nb.core import need, open_mask, save_mask
from mctformer_nb.datasets import get_dataset
from mctformer_nb.mctformer import build_model, save_run
from mctformer_nb.pick import find_doubts, pick
from mctformer_nb.scores import score_masks
from mctformer_nb.tables import new_record, save_records
from mctformer_nb.vit import build_vit
from photos60 import Truth, draw

def write_folder(ds, ids, root):
    "Photos, a table of labels and the order of the classes, as a user has them"
    rows, end, how = (['image,labels'], 'png', {}) if ds.name=='mini' else (['image,labels'], 'jpg', dict(quality=95))
    for id in ids:
        f = root/f'images/{id}.{end}'; f.parent.mkdir(parents=True, exist_ok=True)
        if not f.exists(): ds.image(id).save(f, **how)
        rows.append(f'{f.name},' + ';'.join(ds.classes[c] for c in ds.labels(id)))
    used = {c for id in ids for c in ds.labels(id)}
    (root/'labels.csv').write_text('\n'.join(rows)+'\n'); (root/'classes.txt').write_text('\n'.join(c for i,c in enumerate(ds.classes) if i in used)+'\n')

def packaged_classifier():
    "MCTformer-V2 of the eight drawn classes, from the file that keeps what training changed"
    kept, start = load_file(Path(mctformer_nb.__file__).parent/'data'/'mini_v2.safetensors'), build_vit('mct_tiny_patch8_96', pretrained=True).state_dict()
    model = build_model(8, backbone='mct_tiny_patch8_96').eval()
    change = {k: v.float()/256 if v.dtype==torch.float8_e4m3fn else v.float() for k,v in kept.items()}
    own = 'cls_token', 'pos_embed_cls', 'pos_embed_pat', 'head.weight', 'head.bias'
    model.load_state_dict({k: change[k] if k in own else start[k]+change.get(k, 0) for k in model.state_dict()})
    return model

def run(name, *flags, **options):
    "A command as it is typed"
    argv = [*flags, *(w for k,v in options.items() if v is not None for w in (f'--{k.replace("_", "-")}', str(v)))]
    print('$', name, *argv, flush=True)
    need(getattr(cli, name, getattr(cli_masks, name, None))(argv)==0, name, 'ended with an error', 'See above')

class Hidden(Truth):
    "True masks of a folder's photos, in its classes"
    def subset(self, ids): out = Hidden(self.ds, self.folder); out.ids = list(ids); return out

def base(a, seed):
    "Folder, seeds and pseudo masks of one seed -> its place, the folder, the hidden truth"
    root = a.out/f'seed{seed}'; d = dict(data=f'folder:{root}/photos')
    if a.data=='mini':
        ds = get_dataset('mini', 'train', n=a.photos, seed=seed); write_folder(ds, ds.ids, root/'photos')
        save_run(packaged_classifier(), root/'run', classes=ds.classes, image_size=96); more = dict(layers='all', scales='1,1.5')
    else:
        ds = get_dataset(a.data, 'trainaug'); write_folder(ds, sum(draw(ds, seed, a.photos//3).values(), []), root/'photos')
        run('mct_train', recipe='frozen', out=root/'run', **d); more = {}
    run('mct_seeds', run=root/'run', **more, **d); run('mct_masks', seeds=root/'run/seeds', out=root/'run/masks', workers=1, **d)
    folder = get_dataset(d['data']); return root, folder, Hidden(ds, folder)

def network(a, root, name, ids, truth, others):
    "mIoU on `others` of a DeepLab trained on pseudo masks and the corrected ones of `ids`"
    mine = root/name; (mine/'photos').mkdir(parents=True, exist_ok=True); d = dict(data=f'folder:{mine}/photos', split='train')
    for part in ('images', 'labels.csv', 'classes.txt'):
        if not (mine/f'photos/{part}').exists(): (mine/f'photos/{part}').symlink_to((root/f'photos/{part}').resolve())
    for id in ids: save_mask(mine/f'photos/masks/{id}.png', truth.mask(id))
    photos = len(truth.ids) + (a.weight-1)*len(ids); epochs = round(a.steps/(photos//8))
    run('mct_segment_train', masks=root/'run/masks', out=mine/'deeplab', recipe='quick' if a.data=='mini' else 'frozen', epochs=epochs, corrected_weight=a.weight if ids else None, **d)
    run('mct_segment', '--flip', '--no-crf', run=mine/'deeplab', out=mine/'found', scales=1, **d)
    return score_masks(mine/'found', truth.subset(others)).miou

def main(a):
    data = f'mini, {a.photos} scenes' if a.data=='mini' else f'VOC animals, {a.photos} photos'
    for seed in a.seeds:
        root, folder, truth = base(a, seed); pseudo = {id: open_mask(root/f'run/masks/{id}.png') for id in folder.ids}
        picked = [d.id for d in pick(find_doubts(root/'run/seeds', root/'run/masks', folder), a.n)]
        tens = [np.random.default_rng(k).choice(folder.ids, a.n, replace=False).tolist() for k in range(5)]
        def after(ids): return score_masks({id: truth.mask(id) if id in ids else m for id,m in pseudo.items()}, truth).miou
        random = [after(ids) for ids in tens]; more = dict(least=min(random), most=max(random))
        found = [('mIoU of all masks', way, v, extra) for way,v,extra in (('nothing corrected', after([]), {}), ('ten picked', after(picked), {}), ('ten at random, mean of five', np.mean(random), more))]
        if a.steps:
            others = [id for id in folder.ids if id not in {*picked, *tens[0]}]
            found += [('mIoU of the network on the others', way, network(a, root, way.replace(' ', '_'), ids, truth, others), dict(steps=a.steps)) for way,ids in (('nothing corrected', []), ('ten picked', picked), ('ten at random', tens[0]))]
        for metric,way,v,extra in found: print(f'seed {seed}: {metric}, {way}: {v:.1f}', *(f'{k} {x:.1f}' for k,x in extra.items()), flush=True)
        command = f'python experiments/pick.py --data {a.data.split(":")[0]}' + f' --steps {a.steps}'*bool(a.steps)
        if a.json: save_records(a.json, [new_record('pick', way, v, metric, data, seed=seed, command=command, **extra) for metric,way,v,extra in found])

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); A = p.add_argument
    A('--data', default='mini'); A('--photos', type=int, default=60); A('--n', type=int, default=10); A('--weight', type=int, default=5); A('--steps', type=int, default=0)
    A('--seeds', type=lambda s: [int(v) for v in s.split(',')], default=[11, 12, 13]); A('--out', type=Path, default=Path('runs/pick')); A('--json', type=Path)
    main(p.parse_args())
