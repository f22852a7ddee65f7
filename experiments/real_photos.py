"""The whole chain on real photographs from image-level labels alone, on a computer without a GPU:
frozen EfficientNet-Lite0 -> seeds -> masks by the photo's edges -> DeepLab -> masks of unseen photos. With --walk the paper's second half instead: seeds -> CRF labels -> AffinityNet -> random walk -> DeepLab.

    python experiments/real_photos.py --data voc:PATH/VOC2012 [--affinity vit_small_patch14_dinov2 --affinity-weights FILE] --out runs/real_photos [--epochs 20] [--walk] [--stop masks] [--deeplab RUN]

Every stage goes on where it stopped. Seeds and pseudo masks are scored on the photos of `train`, the segmentation on those of `val`. Nothing is chosen on masks of `val`; the
background is the constant 0.4; beside it stands the best one of a sweep on the masks of `train`."""
import argparse, time
from pathlib import Path
import numpy as np
from mctformer_nb.affinitynet import load_affinity, train_affinity
from mctformer_nb.cli import FROZEN_RECIPE
from mctformer_nb.crf import crf_labels
from mctformer_nb.crf_masks import make_crf_masks
from mctformer_nb.datasets import get_dataset
from mctformer_nb.frozen import train_frozen
from mctformer_nb.other_affinity import OtherAffinity, affinity_vit
from mctformer_nb.random_walk import make_masks
from mctformer_nb.runs import load_run, packaged_weights
from mctformer_nb.scores import fixed_threshold, score_masks, score_table, sweep_threshold
from mctformer_nb.self_training import self_trained_seeds
from mctformer_nb.tables import new_record, save_records

ANIMALS = ['cat', 'dog', 'cow', 'horse', 'sheep', 'person']

class Log:
    "Records of the stages, with the seconds each took"
    def __init__(self, a): self.a, self.kind = a, 'affinity of a ViT fine-tuned for saliency' if a.affinity else 'CNN alone'
    def __call__(self, stage, r, split, seconds=None, **extra):
        some = float(np.mean([v['iou'] for k,v in r.per_class.items() if k in ('background', *ANIMALS) and v['iou'] is not None]))
        command = 'python experiments/real_photos.py' + (f' --affinity {self.a.affinity}' if self.a.affinity else '') + ' --walk'*self.a.walk + (f' --affinity-epochs {self.a.affinity_epochs}' if self.a.affinity_epochs else '') + f' --steps {self.a.steps} --background {self.a.background:g}'*self.a.walk
        common = dict(command=command, seed=0, images=r.n_images, **extra, **({} if seconds is None else dict(seconds=round(seconds))))
        occur = float(np.mean([v['iou'] for v in r.per_class.values() if v['iou']>0 or v['fn']>0]))       # a class without a pixel in the truth has only false positives
        values = {'mIoU': r.get('best_miou', r.get('miou')), 'mIoU of background and six classes': some, 'mIoU of classes that occur': occur}
        if self.a.json: save_records(self.a.json, [new_record('real photos', f'{stage}, {self.kind}', v, m, f'VOC animals, {split}', **common) for m,v in values.items()])
        print(f'{stage:40} {split:6} occurring {occur:5.1f} (also predicted: {values["mIoU"]:5.1f})   background + six {some:5.1f}' + ('' if seconds is None else f'   {seconds:.0f} s'), flush=True)

def mistakes(r, aug, command, kind):
    "A record a class: its IoU, in how many photos of the training it is, and what its pixels are most often taken for, in percent of them"
    photos = np.r_[len(aug), aug.targets().sum(0)]
    names, share = ['background', *r.names], 100*r.confusion/np.maximum(r.confusion.sum(1, keepdims=True), 1)
    for i,name in enumerate(names):
        if not r.confusion[i].any(): continue
        wrong = np.where(np.arange(len(names))==i, -1, share[i]); j = int(wrong.argmax())
        yield new_record('photo classes', f'{name}, {kind}', r.per_class[name]['iou'], 'IoU', 'VOC animals, val', seed=0, command=command, photos=int(photos[i]), taken_for=names[j], taken_percent=round(float(wrong[j]), 1))

def walked(a, aug, wanted):
    "Masks of the wanted photos by an AffinityNet that learns from what the CRF is sure of, and its random walk"
    crf_labels(a.out/'seeds', aug, a.out/'labels', workers=a.workers)
    options = dict(FROZEN_RECIPE['affinity'], recipe=FROZEN_RECIPE['affinity']['fit']); options.pop('fit'); options |= dict(epochs=a.affinity_epochs or options['epochs']); options['pretrained'] = packaged_weights(options['backbone'])
    net = load_affinity(train_affinity(a.out/'labels', aug, a.out/'affinity', **options))[0]
    out = a.out/f'walked_{a.steps}_{a.background:g}'
    make_masks(a.out/'seeds', net, wanted, out, background=a.background, steps=a.steps)
    return out

def main(a):
    out, log, start = a.out, Log(a), time.time()
    train, aug, val = (get_dataset(a.data, s) for s in ('train', 'trainaug', 'val'))
    other = OtherAffinity(affinity_vit(a.affinity, a.affinity_weights)) if a.affinity else None
    model = load_run(train_frozen(aug, val, out/'run'))[0]
    print(f'linear layer on frozen features: {time.time()-start:.0f} s', flush=True); start = time.time()
    self_trained_seeds(model, aug, out/'seeds', other)
    log('seeds at background 0.4', fixed_threshold(out/'seeds', train, .4), 'train', time.time()-start)
    r = sweep_threshold(out/'seeds', train); log('seeds at the best background of train', r, 'train', background=r.best_threshold); start = time.time()
    if a.walk: masks = walked(a, aug, train if a.stop=='masks' else aug)
    else: masks = out/'masks'; make_crf_masks(out/'seeds', aug, masks, workers=a.workers)
    name = f', AffinityNet and walk of {a.steps} steps, background {a.background:g}' if a.walk else ''
    r = score_masks(masks, train); log(f'pseudo masks{name}', r, 'train', time.time()-start); print(score_table(r, classes=ANIMALS), flush=True)
    if a.stop=='masks': return
    from mctformer_nb.deeplab import train_segment
    from mctformer_nb.segment import segment_kinds
    start, options = time.time(), dict(FROZEN_RECIPE['segment'], epochs=a.epochs, amp=a.amp)
    run = a.deeplab or train_segment(masks, aug, out/f'deeplab{"_walked" if a.walk else ""}', **options | dict(pretrained=packaged_weights(options['backbone'])))
    ways = {'without CRF': None, 'with CRF': 'auto'}; folders = {way: out/f'val_{way.split()[0]}{"_walked" if a.walk else ""}' for way in ways}
    segment_kinds(run, val, {folders[way]: crf for way,crf in ways.items()}, scales=(.75, 1, 1.25), flip=True, workers=a.workers); took = time.time()-start   # one look for both
    for way,crf in ways.items():
        r = score_masks(folders[way], val); log(f'segmentation, {way}{name}', r, 'val', took)
        if a.json and not crf and not a.walk: save_records(a.json, list(mistakes(r, aug, 'python experiments/real_photos.py', log.kind)))
    print(score_table(r, classes=ANIMALS), flush=True)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); A = p.add_argument
    A('--data', required=True); A('--affinity'); A('--affinity-weights'); A('--out', type=Path, default=Path('runs/real_photos')); A('--epochs', type=int, default=20)
    A('--amp', default='bf16', help='of the segmentation training'); A('--workers', type=int); A('--stop', choices=['masks']); A('--json', type=Path)
    A('--walk', action='store_true', help='masks by AffinityNet and random walk'); A('--steps', type=int, default=26, help='of the walk: 64 of the paper, for photos of 320 instead of 500 pixels, so with 0.41 of the cells'); A('--background', type=float, default=.4, help='of the walk'); A('--affinity-epochs', type=int, help='of AffinityNet, default those of the recipe'); A('--deeplab', type=Path, help='a segmentation network that is trained already, such as that of train_packaged.py')
    main(p.parse_args())
