"""Tables 4 to 7 and Figures 4, 5 and 6 of the paper: trains what is missing, reuses what is there, writes records and pictures.

    python experiments/reproduce.py [--data mini] [--tables 4 5 6 7 fig6 pictures] [--seeds 0 1 2] [--out runs/mini_maps] [--json results/mini_tables.json]

On the drawn data set (`--data mini`, the default) it starts from the folder of `experiments/mini_maps.py`, which measures the rows of Tables 1, 2 and 5 that are MCTformer's own,
and runs that first where it has not been. On other data (`--data voc:PATH/VOC2012 --weights deit_small.pth --resnet38 res38_cls.pth`) every run uses the settings of the paper, and a GPU is needed.
Stopped at any time and started again, it goes on where it was."""
import argparse, csv, time
from functools import partial
from pathlib import Path
import numpy as np, torch
from matplotlib.figure import Figure
from mctformer_nb.artifacts import load_seed, save_seed
from mctformer_nb.complexity import complexity
from mctformer_nb.core import atomic_path, colorize, open_mask, overlay
from mctformer_nb.datasets import get_dataset
from mctformer_nb.demo import DEMO_RECIPE, DEMO_SECOND, DEMO_SEEDS, run_demo
from mctformer_nb.mctformer import MCTformer
from mctformer_nb.pipeline import masks_to_segmentation, seeds_to_masks
from mctformer_nb.resnet38 import resnet38_complexity
from mctformer_nb.runs import load_run
from mctformer_nb.scores import score_masks, sweep_threshold
from mctformer_nb.seeds import extract_seeds
from mctformer_nb.tables import PAPER, new_record, save_records
from mctformer_nb.train import train_classifier

MODELS = dict(v1=dict(variant='v1'), v2=dict(variant='v2'), v1_max=dict(variant='v1', score='max'), v1_fc=dict(variant='v1', score='fc'), tscam=dict(variant='tscam'))
MAPS = { # row of Tables 5 and 6 -> model, options of `extract_seeds`
    'TS-CAM': ('tscam', dict(kind='tscam', refine=False)), 'TS-CAM*': ('tscam', dict(kind='tscam*', refine=False)),
    'MCTformer-V1 (Attention)': ('v1', dict(kind='attn', refine=False)), 'MCTformer-V1 (Attention + PatchAffinity)': ('v1', dict(kind='attn', refine=True)),
    'MCTformer-V2 (Attention)': ('v2', dict(kind='attn', refine=False)), 'MCTformer-V2 (PatchCAM)': ('v2', dict(kind='patchcam', refine=False)),
    'MCTformer-V2 (Attention + PatchCAM)': ('v2', dict(kind='fused', refine=False)), 'MCTformer-V2 (Attention + PatchCAM + PatchAffinity)': ('v2', dict(kind='fused', refine=True))}
SCORES = {'Fully-connected': 'v1_fc', 'Max-pooling': 'v1_max', 'Average-pooling': 'v1'} # rows of Table 7
log = partial(print, flush=True)

def short(row): return ''.join(c if c.isalnum() else '_' for c in row.replace('*', 'star')).strip('_')

class Setting:
    "Data and options of one `--data`: those of the demonstration on `mini`, those of the paper elsewhere"
    def __init__(self, a):
        self.a, self.mini = a, a.data=='mini'
        if self.mini:
            self.train, self.val = get_dataset('mini', 'train', n=600, size=96), get_dataset('mini', 'val', n=100, size=96)
            self.scored, self.part = self.train.subset(self.train.ids[:200]), self.train.subset(self.train.ids[:240])
            self.judge = self.part
            self.recipe, self.seeds, self.second, self.depth = dict(DEMO_RECIPE, epochs=12), DEMO_SEEDS, DEMO_SECOND, 6
        else:
            self.train, self.val, self.scored = get_dataset(a.data, 'trainaug'), get_dataset(a.data, 'val'), get_dataset(a.data, 'train')
            self.part, self.judge, self.depth = self.train, self.scored, 12
            self.recipe, self.seeds, self.second = dict(pretrained=a.weights or True), dict(layers=3), dict(affinity=dict(pretrained=a.resnet38), walk={}, train=dict(pretrained=a.resnet38), infer={})

    def name(self, table): return 'mini' if self.mini else PAPER[table if table in PAPER else '5']['dataset']  # as records name the data: Figure 6 is of Table 5's

    def run(self, name, seed): # run folder of a model, trained if need be
        return train_classifier(self.train, self.val, self.a.out/f'seed{seed}'/'runs'/name, seed=seed, log=log, **{**self.recipe, **MODELS[name]})

    def maps(self, name, options, seed, folder, ds, judge=None): # seeds of `ds` -> result of the sweep on `judge`
        extract_seeds(load_run(self.run(name, seed))[0], ds, self.a.out/f'seed{seed}'/folder, **{**self.seeds, **options})
        return sweep_threshold(self.a.out/f'seed{seed}'/folder, judge or ds)

def record(s, table, row, seed, r, metrics=('mIoU', 'FP', 'FN')):
    i = int(np.argmin(abs(r.thresholds-r.best_threshold)))
    values = dict(mIoU=r.miou[i], FP=r.fp[i], FN=r.fn[i])
    save_records(s.a.json, [new_record(table, row, values[m], m, s.name(table), seed=seed, command=s.a.command, threshold=float(r.best_threshold)) for m in metrics])
    log(f'seed {seed}  table {table}  {row:50} ' + '  '.join(f'{m} {values[m]:.1f}' for m in metrics))

def table4(s, seed):
    "Parameters and multiply-adds; chance and data play no part"
    if seed!=s.a.seeds[0]: return
    with torch.device('meta'): ours = {f'MCTformer-{v.upper()}': complexity(MCTformer(20, v)) for v in ('v1', 'v2')}
    cnn = resnet38_complexity()
    for row,c in (('ResNet38', dict(params=cnn['trained'], macs=cnn['macs'])), *ours.items()):      # the paper's count of ResNet38 leaves out what is frozen
        values = {'parameters (M)': c['params']/1e6, 'MACs (G)': c['macs']/1e9}
        save_records(s.a.json, [new_record('4', row, v, m, PAPER['4']['dataset'], seed=None, command='python experiments/reproduce.py --tables 4') for m,v in values.items()])
        log('table 4', row, values)

def table5(s, seed):
    "Every kind of map. On `mini` the rows of MCTformer are those of `mini_maps.py`"
    for row,(model,options) in MAPS.items():
        if s.mini and model!='tscam': continue
        record(s, '5', row, seed, s.maps(model, options, seed, Path('tables')/'maps'/short(row), s.scored))

def level(s, sweep, seeds, out, target):
    "Copies of seeds to such a power that their best background score becomes `target`; returns their folder. The order of pixels stays"
    power = float(np.log(target)/np.log(sweep.best_threshold)) if sweep.best_threshold>0 else 1.
    for id in s.part.ids:
        if not (out/f'{id}.npz').exists(): classes, maps = load_seed(seeds/f'{id}.npz'); save_seed(out/f'{id}.npz', classes, maps.astype(np.float32)**power)
    return out

def table6(s, seed):
    """The second half of the paper from each kind of map: seeds -> CRF labels -> AffinityNet -> walk -> DeepLab -> unseen photos.
    Its constants suit maps with one best background score. On photos the walk gets that of each kind of map; on `mini`, where maps differ tenfold in it, the others are first brought to that of V2's"""
    best, root = list(MAPS)[-1], s.a.out/f'seed{seed}'
    target = s.mini and float(sweep_threshold(root/'second'/'seeds', s.part).best_threshold)
    for row in ('TS-CAM*', *list(MAPS)[2:4], *list(MAPS)[6:]):
        model, options = MAPS[row]; out = root/'tables'/'segmentation'/short(row)
        if s.mini and row==best: mask, miou = (score_masks(root/'second'/m, d).miou for m,d in (('masks', s.part), ('segmentation/masks', s.val)))   # the demonstration's own
        else:
            sweep = s.maps(model, options, seed, Path('tables')/'segmentation'/short(row)/'seeds', s.part, s.judge)
            walk = dict(s.second['walk']); background = walk.pop('background', float(sweep.best_threshold))
            seeds = level(s, sweep, out/'seeds', out/'level', target) if s.mini else out/'seeds'
            m = seeds_to_masks(seeds, s.part, out, background, affinity=dict(s.second['affinity'], seed=seed), walk=walk, log=lambda *a: None)
            mask = score_masks(m.masks, s.judge).miou
            miou = masks_to_segmentation(m.masks, s.part, s.val, out/'segmentation', dict(s.second['train'], seed=seed), s.second['infer'], log=lambda *a: None).miou
        save_records(s.a.json, [new_record('6', row, float(v), metric, s.name('6'), seed=seed, command=s.a.command) for metric,v in (('mask mIoU', mask), ('mIoU', miou))])
        log(f'seed {seed}  table 6  {row:50} mask {float(mask):.1f}  mIoU {float(miou):.1f}')

def table7(s, seed):
    "Class scores of V1 by a linear layer, the maximum and the average; attention alone"
    for row,model in SCORES.items():
        record(s, '7', row, seed, s.maps(model, dict(kind='attn', refine=False), seed, Path('tables')/'maps'/model, s.scored), ('mIoU',))
        last = list(csv.DictReader(open(s.run(model, seed)/'history.csv')))[-1]
        save_records(s.a.json, [new_record('7', row, float(last['map_cls']), 'validation mAP', s.name('7'), seed=seed, command=s.a.command)])

def fig6(s, seed):
    "V1's attention from the last K blocks"
    for k in range(1, s.depth+1):
        record(s, 'Figure 6', f'K={k}', seed, s.maps('v1', dict(kind='attn', refine=False, layers=k), seed, Path('tables')/'maps'/f'layers{k}', s.scored))

def pictures(s, seed):
    "Figures 4 and 5, of the first seed only"
    if seed!=s.a.seeds[0] or not s.mini: return
    folder = s.a.json.parent/'figures'; folder.mkdir(parents=True, exist_ok=True); root = s.a.out/f'seed{seed}'
    some = [i for i in range(len(s.scored)) if len(s.scored.labels(i))>1][:6]
    columns = {'image': None, 'TS-CAM': 'tables/maps/TS_CAM', 'V1-attn': 'seeds/V1_attn', 'V1-attn-refined': 'seeds/V1_attn_affinity', 'V2-attn': 'seeds/V2_attn', 'V2-PatchCAM': 'seeds/V2_patchcam',
               'V2-fused': 'seeds/V2_fused', 'V2-fused-refined': 'seeds/V2_fused_affinity', 'ground truth': 'mask'}
    fig = Figure(figsize=(1.2*len(columns), 1.27*len(some)), dpi=80, layout='constrained'); axs = fig.subplots(len(some), len(columns))
    for i,row in zip(some, axs):
        c, im = int(s.scored.labels(i)[0]), s.scored.image(i); row[0].set_ylabel(s.scored.classes[c], fontsize=9)
        for ax,where in zip(row, columns.values()):
            if where=='mask': ax.imshow(np.where(s.scored.mask(i)[..., None]==c+1, colorize(s.scored.mask(i)), 0)); continue
            ax.imshow(im, alpha=1 if where is None else .5)
            if where is not None: classes, maps = load_seed(root/where/f'{s.scored.ids[i]}.npz'); ax.imshow(maps[list(classes).index(c)].astype(np.float32), cmap='jet', alpha=.6, vmin=0, vmax=1)
    for n,(ax,t) in enumerate(zip(axs[0], columns)): ax.set_title(f'({"abcdefghi"[n]}) {t}', fontsize=7)
    save(fig, axs, folder/'figure5.png')
    rows = {'image': None, 'ground truth': None, 'ours': root/'second'/'segmentation'/'masks', 'fully supervised': root/'second'/'supervised'/'masks'}
    fig = Figure(figsize=(8*1.3, len(rows)*1.33), dpi=80, layout='constrained'); axs = fig.subplots(len(rows), 8)
    for i,column in enumerate(axs.T):
        id = s.val.ids[i]; masks = [None, s.val.mask(i), *(open_mask(f/f'{id}.png') for f in list(rows.values())[2:])]
        for ax,m in zip(column, masks): ax.imshow(s.val.image(i) if m is None else overlay(s.val.image(i), m))
    for ax,t in zip(axs[:, 0], rows): ax.set_ylabel(t, fontsize=9)
    save(fig, axs, folder/'figure4.png')

def save(fig, axs, path):
    from PIL import Image
    import io
    for ax in axs.flat: ax.set(xticks=[], yticks=[])
    raw = io.BytesIO(); fig.savefig(raw, format='png')
    with atomic_path(path) as p: Image.open(raw).convert('RGB').quantize(160).save(p, format='png', optimize=True)      # a third of the size
    log(path)

def main(a):
    s = Setting(a)
    for name in a.tables:
        for seed in a.seeds:
            start = time.time()
            if s.mini and name!='4' and not (a.out/f'seed{seed}'/'metrics.json').exists(): run_demo(a.out/f'seed{seed}', seed=seed, log=lambda *b: None)
            {'4': table4, '5': table5, '6': table6, '7': table7, 'fig6': fig6, 'pictures': pictures}[name](s, seed)
            log(f'{name}, seed {seed}: {time.time()-start:.0f} s')

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); A = p.add_argument
    A('--data', default='mini'); A('--weights', help='weight file of DeiT-S, where the hub cannot be reached'); A('--resnet38', help='weight file of ResNet38, for Table 6 on photos'); A('--tables', nargs='+', default=['4', 'fig6', '5', 'pictures', '7', '6'], choices=['4', '5', '6', '7', 'fig6', 'pictures'])
    A('--seeds', type=int, nargs='+', default=[0, 1, 2]); A('--out', type=Path, default=Path('runs/mini_maps')); A('--json', type=Path, default=Path('results/mini_tables.json'))
    a = p.parse_args(); a.command = f'python experiments/reproduce.py --data {a.data if a.data=="mini" else "voc:PATH"} --tables {" ".join(a.tables)} --seeds {" ".join(map(str, a.seeds))}'
    if a.data!='mini' and '6' in a.tables and not a.resnet38: p.error('--resnet38: Table 6 on photos needs the weight file of ResNet38')
    if a.data!='mini' and a.json==Path('results/mini_tables.json'): a.json = Path('results')/f'{a.data.split(":")[0]}_tables.json'
    if a.data!='mini' and a.out==Path('runs/mini_maps'): a.out = Path('runs')/f'{a.data.split(":")[0]}_tables'
    main(a)
