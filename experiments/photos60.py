"""A new user's folder: 60 photos of VOC 2012 (20 cat, 20 cow, 20 horse, each the only label of its photo) without masks, and the commands of the README. The true masks only score.

    python experiments/photos60.py --data voc:PATH/VOC2012 [--affinity vit_small_patch14_dinov2 --affinity-weights FILE] [--draws 3] --out runs/photos60
    python experiments/photos60.py --data voc:PATH/VOC2012 --tokens [--affinity-weights FILE] --draws 1       # the paper's idea: class tokens in the frozen ViT itself

Prints seconds and mIoU (background and the three classes) of seeds at a background of 0.4 and of masks, for three draws, and an ellipse in the middle of each photo to compare with;
draws a figure of each draw: DRAW/masks.png, with the IoU of the class above each mask."""
import argparse, time
from pathlib import Path
import numpy as np
from mctformer_nb import cli, cli_masks
from mctformer_nb.core import atomic_path, need, new_figure, open_mask, overlay
from mctformer_nb.datasets import get_dataset
from mctformer_nb.scores import fixed_threshold, score_masks, sweep_threshold
from mctformer_nb.tables import new_record, save_records

CLASSES = 'cat', 'cow', 'horse'

def draw(ds, seed, n=20):
    "Ids of `n` photos of each class, which is their only label"
    only = {c: [id for id in ds.ids if ds.labels(id).tolist() == [ds.classes.index(c)]] for c in CLASSES}
    rng = np.random.RandomState(seed)
    return {c: sorted(rng.choice(ids, n, replace=False).tolist()) for c,ids in only.items()}

def write_folder(ds, chosen, root):
    "The folder as a user has it: photos and a table of labels"
    (root/'images').mkdir(parents=True, exist_ok=True); rows = ['image,labels']
    for c,ids in chosen.items():
        for id in ids:
            if not (root/f'images/{id}.jpg').exists(): ds.image(id).save(root/f'images/{id}.jpg', quality=95)
            rows.append(f'{id}.jpg,{c}')
    (root/'labels.csv').write_text('\n'.join(rows)+'\n')

class Truth:
    "The hidden masks, in the classes of the folder"
    def __init__(self, ds, folder): self.ds, self.folder, self.ids, self.classes, self.name, self.split = ds, folder, folder.ids, folder.classes, 'hidden truth', 'all'
    def __len__(self): return len(self.ids)
    def labels(self, i): return self.folder.labels(i)
    def mask(self, i):
        m, out = self.ds.mask(self.ids[i] if isinstance(i, int) else i), None
        out = np.where(m==255, 255, 0).astype(np.uint8)
        for j,c in enumerate(self.classes): out[m==self.ds.classes.index(c)+1] = j+1
        return out

def ellipse(folder, truth):
    "An ellipse in the middle of each photo, of its class"
    for i,id in enumerate(folder.ids):
        w, h = folder.size(id); y, x = np.mgrid[:h, :w]
        yield np.where(((x+.5)/w-.5)**2+((y+.5)/h-.5)**2 < .35**2, folder.labels(id)[0]+1, 0).astype(np.uint8), truth.mask(i)

def run(name, **options):
    "A command as it is typed"
    argv = [w for k,v in options.items() if v is not None for w in (f'--{k.replace("_", "-")}', *(() if v is True else (str(v),)))]
    print('$', name, *argv, flush=True); start = time.time()
    need(getattr(cli, name, getattr(cli_masks, name, None))(argv) == 0, name, 'ended with an error', 'See above')
    return time.time()-start

V2_MAPS = {'its attention': dict(kind='attn', no_refine=True), 'its PatchCAM': dict(kind='patchcam', no_refine=True), 'their product': dict(kind='fused', no_refine=True),
           'its attention and affinity': dict(kind='attn'), 'the product and affinity': dict(kind='fused'), 'heads weighed by what was learnt': dict(kind='heads')}
PLUS_MAPS = {'MCTformer+, its attention': dict(kind='attn', no_refine=True, rule='plus'), 'MCTformer+, its attention and affinity': dict(kind='attn', rule='plus'),
             'MCTformer+, the product and affinity': dict(kind='fused', rule='plus'), 'MCTformer+, heads weighed by what was learnt': dict(kind='heads')}

def tokens(a, ds):
    "Class tokens of a frozen ViT-S, as MCTformer-V2 and as MCTformer+; maps of its last two blocks, or of all heads as adaptive attention fusion weighs them"
    for seed in range(a.draws):
        root = a.out/f'draw{seed}'; write_folder(ds, draw(ds, seed), root)
        common = dict(data=f'folder:{root}'); folder = get_dataset(common['data']); truth = Truth(ds, folder)
        for variant,maps in dict(v2=V2_MAPS, plus=PLUS_MAPS).items():
            out = a.out/f'draw{seed}_{variant}'
            seconds = run('mct_train', recipe='frozen', variant=variant, pretrained=a.affinity_weights, out=out/'run', **common)
            for i,(name,how) in enumerate(maps.items()):
                layers = None if how['kind']=='heads' else 2                      # those of all blocks are weighed
                run('mct_seeds', run=out/'run', out=out/f'seeds{i}', layers=layers, image_size=224, **how, **common)
                best, fixed = sweep_threshold(out/f'seeds{i}', truth), fixed_threshold(out/f'seeds{i}', truth, .4)
                yield [new_record('photos60 tokens', name, v, m, 'VOC animals, 60 photos', seed=seed, command='python experiments/photos60.py --tokens', seconds=round(seconds))
                       for m,v in (('mIoU', best.best_miou), ('mIoU at background 0.4', fixed.miou))]
                print(f'draw {seed}, {name}: {best.best_miou:.1f} at {best.best_threshold}, {fixed.miou:.1f} at 0.4', flush=True)

def picture(folder, truth, masks, path, n=9):
    "Every few photos: the photo, its mask with its mIoU, the hidden truth. It shows photos of VOC: to look at, not to publish"
    fig = new_figure((1.8*n, 5.6), 90); axes = fig.subplots(3, n)
    for column,i in zip(axes.T, range(0, len(folder), len(folder)//n)):
        image, m, t = folder.image(i), open_mask(masks/f'{folder.ids[i]}.png'), truth.mask(i)
        for ax,what in zip(column, (image, overlay(image, m), overlay(image, t))): ax.imshow(what); ax.set_axis_off()
        k = folder.labels(i)[0]+1; seen = t!=255; both = (m==k) & (t==k); column[1].set_title(f'{100*both.sum()/max(1, (((m==k) | (t==k)) & seen).sum()):.0f}', fontsize=9)
        column[0].set_title(folder.classes[k-1], fontsize=9)
    with atomic_path(path) as p: fig.savefig(p, format='png', bbox_inches='tight')

def main(a):
    ds, records = get_dataset(a.data, 'trainaug'), []
    if a.tokens:
        for found in tokens(a, ds): a.json and save_records(a.json, found)
        return
    for seed in range(a.draws):
        root = a.out/f'draw{seed}'; write_folder(ds, draw(ds, seed), root)
        folder = get_dataset(f'folder:{root}'); truth = Truth(ds, folder)
        common, out = dict(data=f'folder:{root}'), a.out/f'draw{seed}_{"vit" if a.affinity else "cnn"}'
        seconds = run('mct_train', recipe='frozen', out=out/'run', **common)
        seconds += run('mct_seeds', run=out/'run', out=out/'seeds', affinity=a.affinity, affinity_weights=a.affinity_weights, **common)
        seconds += run('mct_masks', seeds=out/'seeds', out=out/'masks', **common)
        found = dict(ellipse=score_masks(ellipse(folder, truth), folder).miou, seeds=fixed_threshold(out/'seeds', truth, .4).miou, masks=score_masks(out/'masks', truth).miou)
        picture(folder, truth, out/'masks', out/'masks.png')
        print(f'draw {seed}: {seconds:.0f} s,', ', '.join(f'{k} {v:.1f}' for k,v in found.items()), flush=True)
        kind = 'affinity of a ViT fine-tuned for saliency' if a.affinity else 'only what the package ships'
        command = 'python experiments/photos60.py' + (' --affinity ' + a.affinity if a.affinity else '')
        records += [new_record('photos60', f'{k}, {kind}', v, 'mIoU', 'VOC animals, 60 photos', seed=seed, command=command, seconds=round(seconds)) for k,v in found.items()]
    if a.json: save_records(a.json, records)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); A = p.add_argument
    A('--data', required=True); A('--affinity'); A('--affinity-weights'); A('--tokens', action='store_true'); A('--draws', type=int, default=3); A('--out', type=Path, default=Path('runs/photos60')); A('--json', type=Path)
    main(p.parse_args())
