"""The whole chain on real photos, from a trained classifier to masks of new ones: seeds -> CRF labels -> AffinityNet -> walk -> pseudo masks -> DeepLab.

    python experiments/voc_animals.py --data voc:PATH/VOC2012 --run runs/voc_v2 --cnn efficientnet_lite0.pth --out runs/voc_chain

Made for a computer without a GPU: EfficientNet-Lite0 as backbone, photos at 192 pixels, the first --images photos of `train` and then of `trainaug`. Every stage
goes on where it stopped. Scores of seeds and pseudo masks are those of the photos of `train`, scores of the segmentation those of `val`."""
import argparse
from pathlib import Path
import numpy as np
from mctformer_nb.affinitynet import load_affinity, train_affinity
from mctformer_nb.crf import crf_labels
from mctformer_nb.datasets import get_dataset
from mctformer_nb.deeplab import train_segment
from mctformer_nb.random_walk import make_masks
from mctformer_nb.runs import load_run
from mctformer_nb.scores import score_masks, score_table, sweep_threshold
from mctformer_nb.seeds import extract_seeds, show_seeds
from mctformer_nb.segment import segment_dataset, show_masks
from mctformer_nb.tables import new_record, save_records

ANIMALS = ['cat', 'dog', 'cow', 'horse', 'sheep', 'person']
FREEZE = {f'backbone.net.{n}': 0 for n in ('conv_stem', 'blocks.0', 'blocks.1')}
MAPS = {', its PatchCAM alone': dict(kind='patchcam', refine=False), ', its attention alone': dict(kind='attn', refine=False), ', its attention alone + PatchAffinity': dict(kind='attn', refine=True),
        ' (Attention + PatchCAM)': dict(kind='fused', refine=False), ' (Attention + PatchCAM + PatchAffinity)': dict(kind='fused', refine=True),
        ' (Attention + PatchCAM, all layers)': dict(kind='fused', refine=False, layers=None)}

def record(a, table, row, r, metric='mIoU', split='train', **extra):
    "Two records: the mean over all classes that occur, and over background and the six frequent ones"
    some = [v['iou'] for k,v in r.per_class.items() if k in ('background', *ANIMALS)]
    values = {metric: r.best_miou if 'best_miou' in r else r.miou, f'{metric} of background and six classes': float(np.nanmean(some))}
    command = f'python experiments/voc_animals.py --images {a.images} --epochs {a.epochs}' + (f' --background {a.background}' if a.background else '')
    records = [new_record(table, row, v, m, f'VOC animals, {split}', seed=0, command=command, images=r.n_images, **extra) for m,v in values.items()]
    if a.json: save_records(a.json, records)
    print(f'{row:50}', *(f'{m} {v:5.1f} ' for m,v in values.items()), flush=True)

def main(a):
    out, model = a.out, load_run(a.run)[0]
    train, aug, val = (get_dataset(a.data, s) for s in ('train', 'trainaug', 'val'))
    ids = [*train.ids, *(i for i in aug.ids if i not in set(train.ids))][:a.images]
    ds = aug.subset([i for i in ids if i in set(aug.ids)]) if set(train.ids) <= set(aug.ids) else aug.subset(ids)
    best = (-1, None, None)
    for name,kw in MAPS.items():
        seeds = out/'maps'/name.replace(' ', '').replace('+', '_').replace(',', '_')
        extract_seeds(model, train, seeds, image_size=a.image_size, batch_size=8, **kw); r = sweep_threshold(seeds, train)
        record(a, '5', f'MCTformer-V2{name}', r, threshold=r.best_threshold)
        if r.best_miou > best[0]: best = (r.best_miou, name, r.best_threshold)
    print(f'seeds of the chain: {best[1]}, background {best[2]:.2f}', flush=True)
    extract_seeds(model, ds, out/'seeds', image_size=a.image_size, batch_size=8, **MAPS[best[1]])
    sweep = sweep_threshold(out/'seeds', train); record(a, '1', 'MCTformer (Ours)', sweep, 'seed mIoU', maps=best[1])
    low, high = a.alphas
    print(crf_labels(out/'seeds', ds, out/'labels', alphas=(low, high), workers=a.workers), flush=True)
    net = load_affinity(train_affinity(out/'labels', ds, out/'affinity', epochs=3, backbone='efficientnet_lite0', pretrained=a.cnn, recipe='momentum', crop=a.image_size, lr=.003, lr_mult=FREEZE, frozen_stride=0))[0]
    make_masks(out/'seeds', net, ds, out/'masks', background=a.background or sweep.best_threshold, beta=a.beta)
    record(a, '1', 'MCTformer (Ours)', score_masks(out/'masks', train), 'mask mIoU', maps=best[1])
    run = train_segment(out/'masks', ds, out/'deeplab', epochs=a.epochs, backbone='efficientnet_lite0', pretrained=a.cnn, crop=a.image_size, image_size=a.image_size, batch_size=8, optimizer='adamw', lr=4e-4, head_mult=4, lr_mult=FREEZE, dilation=6, cache=True)
    for name,crf in (('without CRF', None), ('with CRF', 'default')):
        masks = out/f'val_{name.split()[0]}'
        segment_dataset(run, val, masks, scales=(.75, 1, 1.25), **({} if crf else dict(crf=None)), workers=a.workers)
        r = score_masks(masks, val); record(a, '2', f'MCTformer (Ours), {name}', r, 'val mIoU', split='val'); print(score_table(r, classes=ANIMALS), flush=True)
    (out/'figures').mkdir(exist_ok=True)
    show_seeds(ds, out/'seeds', n=8).savefig(out/'figures'/'seeds.png'); show_masks(train, out/'masks', n=8).savefig(out/'figures'/'masks.png'); show_masks(val, out/'val_with', n=8).savefig(out/'figures'/'val.png')

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); A = p.add_argument
    A('--data', required=True); A('--run', type=Path, required=True); A('--cnn', required=True, help='weights of efficientnet_lite0'); A('--out', type=Path, default=Path('runs/voc_chain'))
    A('--images', type=int, default=600); A('--epochs', type=int, default=8); A('--image-size', type=int, default=192); A('--alphas', type=float, nargs=2, default=(1, 12)); A('--beta', type=float, default=16, help='of the walk: this AffinityNet, trained for three epochs, is less sure of borders than that of the paper'); A('--background', type=float, help='of the walk, default the best one of the seeds'); A('--workers', type=int, default=1)
    A('--json', type=Path, default=Path('results/voc_animals.json'))
    main(p.parse_args())
