"""Retraining that distrusts its labels, on the drawn data set: a mask transformer beside DeepLab, and the clipped loss beside the plain one.

    python experiments/retraining.py [--seeds 0 1 2] [--parts planted pseudo] [--classifiers 3] [--out runs/retraining] [--json results/retraining.json]

`planted`: in the true masks every object is given the name of another class with probability 0.3. `pseudo`: masks that a classifier made of image labels (V2, its maps, the edges of the scene),
the same for all networks. The last epoch counts, nothing is chosen on masks; scored are scenes that no training has seen. Started again, it goes on where it stopped."""
import argparse, csv, time
from functools import partial
from pathlib import Path
import numpy as np
from mctformer_nb.clipped_loss import label_entropy, wrong_labels
from mctformer_nb.core import open_mask, save_mask
from mctformer_nb.crf_masks import make_crf_masks
from mctformer_nb.datasets import get_dataset
from mctformer_nb.deeplab import train_segment
from mctformer_nb.demo import DEMO_RECIPE, DEMO_SEEDS
from mctformer_nb.runs import load_run
from mctformer_nb.scores import score_masks
from mctformer_nb.seeds import extract_seeds
from mctformer_nb.tables import new_record, save_records
from mctformer_nb.train import train_classifier

TRAIN = dict(backbone='mct_tiny_patch8_96', pretrained=True, taps=(2,), crop=64, batch_size=8, optimizer='adamw', lr=3e-4, head_mult=3, cache=True)
CLIPPED = dict(loss='clipped', clip_start=.6)                # a quarter of the crop: windows of 16 pixels
NETWORKS = { # row -> options of `train_segment`
    'DeepLab': dict(decoder='fov', dilation=2, width=128), 'mask transformer': dict(decoder='mask'),
    'DeepLab, clipped loss': dict(decoder='fov', dilation=2, width=128, **CLIPPED), 'mask transformer, clipped loss': dict(decoder='mask', **CLIPPED)}
ROWS = dict(planted=('mask transformer', 'mask transformer, clipped loss', 'DeepLab', 'DeepLab, clipped loss'), pseudo=('DeepLab', 'mask transformer', 'mask transformer, clipped loss'), truth=('mask transformer',))
log = partial(print, flush=True)

def planted_masks(ds, out, seed):
    rng = np.random.default_rng(seed)
    for id in ds.ids:
        wrong = wrong_labels(ds.mask(id), len(ds.classes), .3, rng)                      # drawn also for those that exist: the numbers stay in step
        if not (out/f'{id}.png').exists(): save_mask(out/f'{id}.png', wrong)

def pseudo_masks(ds, out, seed, epochs):
    run = train_classifier(ds, None, out/'v2', variant='v2', seed=seed, log=log, **dict(DEMO_RECIPE, epochs=epochs, batch_size=16))
    extract_seeds(load_run(run)[0], ds, out/'seeds', **DEMO_SEEDS)
    make_crf_masks(out/'seeds', ds, out/'masks', background=.25, workers=1)

def main(a):
    ds, val = get_dataset('mini', 'train', n=a.scenes, size=96), get_dataset('mini', 'val', n=a.unseen, size=96)
    for part in a.parts:
        for seed in a.seeds:
            classifier = seed % a.classifiers
            folder = dict(planted=a.out/f'planted{seed}', pseudo=a.out/f'classifier{classifier}'/'masks', truth=None)[part]
            if part=='planted': planted_masks(ds, folder, seed)
            if part=='pseudo': pseudo_masks(ds, folder.parent, classifier, a.classifier_epochs)
            if folder:
                quality, entropy = score_masks(folder, ds).miou, label_entropy([open_mask(folder/f'{id}.png') for id in ds.ids])
                log(f'{part} {seed}: the masks score {quality:.1f}, entropy of their labels {entropy:.2f}')
            for row in a.rows or ROWS[part]:
                start, options = time.time(), {**TRAIN, **NETWORKS[row]} | (dict(clip_start=a.clip_start) if a.clip_start and 'clipped' in row else {})
                run = train_segment(folder, ds, a.out/f'{part}{seed}_{row.replace(", ", "_").replace(" ", "_")}{a.tag}', valid=val, epochs=a.epochs, seed=seed, log=log, **options)
                last = list(csv.DictReader(open(run/'history.csv')))
                miou, best = float(last[-1]['miou']), max(float(r['miou']) for r in last)
                log(f'{part} seed {seed}  {row:32} mIoU {miou:.1f}, best epoch {best:.1f}  {time.time()-start:.0f} s')
                if not a.json: continue
                extra = dict(epochs=a.epochs, scenes=a.scenes, seconds=round(sum(float(r['seconds']) for r in last)), **({'classifier': classifier} if part=='pseudo' else {}), **({'clip_start': options['clip_start']} if 'clipped' in row else {}))
                records = [new_record('retraining', f'{row}, {part}', v, m, 'mini', seed=seed, command=a.command, **extra) for m,v in (('mIoU', miou), ('mIoU, best epoch on the scored masks', best))]
                if folder: records.append(new_record('retraining', f'{part} masks', float(quality), 'mask mIoU', 'mini', seed=classifier if part=='pseudo' else seed, command=a.command, scenes=a.scenes))
                save_records(a.json, records)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); A = p.add_argument
    A('--seeds', type=int, nargs='+', default=[0, 1, 2]); A('--parts', nargs='+', default=['planted', 'pseudo'], choices=list(ROWS)); A('--rows', nargs='+', choices=list(NETWORKS))
    A('--scenes', type=int, default=128); A('--unseen', type=int, default=48); A('--epochs', type=int, default=16); A('--classifiers', type=int, default=3, help='seeds of the classifier that makes pseudo masks'); A('--classifier-epochs', type=int, default=12)
    A('--clip-start', type=float); A('--tag', default='', help='appended to the names of run folders'); A('--out', type=Path, default=Path('runs/retraining')); A('--json', type=Path)
    a = p.parse_args(); a.command = f'python experiments/retraining.py --parts {" ".join(a.parts)} --seeds {" ".join(map(str, a.seeds))}' + f' --classifiers {a.classifiers}'*('pseudo' in a.parts)
    main(a)
