"""Recipes beyond the paper on real photographs, each measured once on what `real_photos.py` left behind: its seeds and its pseudo masks.

    python experiments/beyond_photos.py --data voc:PATH/VOC2012 --chain runs/real_photos [--parts edges background regions decoders] [--backbone vit_small_patch14_dinov2 --weights FILE] --json results/beyond_photos.json

edges: the same seeds made into masks without a refinement, by pixel-adaptive refinement (PAR) and by the dense CRF. background: the score that the classifier's evidence chooses, the constant, the best one on the masks of `train`.
regions: masks whose superpixels vote. decoders: DeepLab's LargeFOV and a mask transformer on a frozen ViT whose features are computed once, each with the plain and the clipped loss, on the same pseudo masks; the last step counts, scored is `val`.
Started again, it goes on with what is not recorded yet."""
import argparse, time
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F
from mctformer_nb.clipped_loss import ClippedLoss
from mctformer_nb.core import need, open_mask, set_seed
from mctformer_nb.crf import SEG_CRF
from mctformer_nb.crf_masks import make_crf_masks
from mctformer_nb.datasets import get_dataset
from mctformer_nb.deeplab import SegmentLoss
from mctformer_nb.mask_decoder import segment_network
from mctformer_nb.no_masks import background_costs, choose_background, cost_table
from mctformer_nb.regions import vote_masks
from mctformer_nb.runs import load_run
from mctformer_nb.scores import confusion, iou_fp_fn, score_masks
from mctformer_nb.tables import load_records, new_record, save_records
from mctformer_nb.views import input_spec, square_input

ANIMALS = ['cat', 'dog', 'cow', 'horse', 'sheep', 'person']
SIX = 'mIoU of background and six classes'

def both(r):
    "mIoU of the classes that occur in the truth, and of background and the six animals"
    occur = [v['iou'] for v in r.per_class.values() if v['iou']>0 or v['fn']>0]
    return dict(mIoU=float(np.mean(occur)), **{SIX: float(np.mean([v['iou'] for k,v in r.per_class.items() if k in ('background', *ANIMALS)]))})

def edges(a, train):
    "What an edge refinement is worth: probabilities of the seeds as they are, PAR, the dense CRF"
    for row,crf in {'seeds as probabilities': None, 'PAR': 'par', 'dense CRF': SEG_CRF}.items():
        if a.known(row): continue
        start, out = time.time(), a.out/row.replace(' ', '_')
        make_crf_masks(a.chain/'seeds', train, out, crf=crf, workers=1)
        a.add(row, both(score_masks(out, train)), seconds_a_photo=round((time.time()-start)/len(train), 3))

def background(a, train):
    "What choosing a background without masks costs"
    if a.known('background: best of train'): return
    model = load_run(a.chain/'run')[0]
    found = choose_background(model, train, a.chain/'seeds', size=320).background
    rows = background_costs(a.chain/'seeds', train, dict(evidence=found, constant=.4))
    print(cost_table(rows), flush=True)
    names = dict(oracle='best of train', evidence='evidence of the classifier', constant='the constant 0.4')
    for r in rows: a.add(f'background: {names[r["choice"]]}', dict(mIoU=r['miou']), background=r['threshold'])

def regions(a, train):
    "Superpixels vote on the pseudo masks"
    if a.known('superpixels vote'): return
    r = vote_masks(a.chain/'masks', train, a.out/'voted'); need(not r.bad, a.out/'voted', f'{len(r.bad)} masks are missing: {r.bad[:1]}', 'See above')
    a.add('pseudo masks', both(score_masks(a.chain/'masks', train)))
    a.add('superpixels vote', both(score_masks(a.out/'voted', train)))

DECODERS = {'DeepLab': (dict(decoder='fov', dilation=2, width=256), 'plain'), 'DeepLab, clipped loss': (dict(decoder='fov', dilation=2, width=256), 'clipped'),
            'mask transformer': (dict(decoder='mask'), 'plain'), 'mask transformer, clipped loss': (dict(decoder='mask'), 'clipped')}
RATES = dict(fov=1e-3, mask=3e-4)       # of AdamW for a decoder alone

@torch.no_grad()
def features(a, net, ds, split):
    "Patch features (n,D,h,w) in half precision of all photos, squeezed into a square; kept in a file"
    path = a.out/f'features_{split}.npy'
    if not path.exists():
        found = np.stack([net.backbone(square_input(ds.image(i), a.side, input_spec(net)).to(a.device))[-1][0].half().cpu().numpy() for i in range(len(ds))])
        np.save(path, found)
    return np.load(path, mmap_mode='r')

def cells(mask, grid):
    "A mask on a grid twice as fine as the patches': the nearest pixel counts"
    h, w = 2*grid[0], 2*grid[1]; y, x = ((np.arange(n)+.5)*s/n for n,s in zip((h, w), mask.shape))
    return mask[y.astype(int)[:, None], x.astype(int)]                                     # (H,W) -> (2h,2w)

@torch.no_grad()
def val_score(head, f, val, C, device):
    "Both means on unseen photos"
    total = 0
    for i in range(len(val)):
        t = val.mask(i); p = F.interpolate(head(torch.from_numpy(f[i:i+1].astype(np.float32)).to(device)), t.shape, mode='bilinear', align_corners=False)[0].argmax(0)
        total = total + confusion(p.cpu().numpy().astype(np.uint8), t, C+1)
    r = iou_fp_fn(total); names = ['background', *val.classes]; iou, occur = np.asarray(r['iou']), total.sum(1)>0
    return dict(mIoU=float(np.nanmean(iou[occur])), **{SIX: float(np.mean([iou[names.index(k)] for k in ('background', *ANIMALS)]))})

def decoders(a, train):
    "Two decoders and two losses on the same features and pseudo masks"
    aug, val = get_dataset(a.data, 'trainaug'), get_dataset(a.data, 'val'); C = len(aug.classes)
    vit = dict(backbone=a.backbone, pretrained=a.weights or True); net = segment_network(C, 'mask', **vit).eval().to(a.device)
    f, unseen = features(a, net, aug, 'trainaug'), features(a, net, val, 'val')
    y = torch.from_numpy(np.stack([cells(open_mask(a.chain/'masks'/f'{id}.png'), f.shape[2:]) for id in aug.ids]))           # (n,2h,2w)
    for row,(network,loss) in DECODERS.items():
        if a.known(row): continue
        set_seed(0); head, start = segment_network(C, **network, **dict(vit, pretrained=False)).head.train().to(a.device), time.time()
        opt = torch.optim.AdamW(head.parameters(), RATES[network['decoder']]); curve = torch.optim.lr_scheduler.PolynomialLR(opt, a.steps, .9)
        lossf, order = ClippedLoss(clip_start=a.clip_start) if loss=='clipped' else SegmentLoss(), []
        for step in range(a.steps):
            if len(order)<8: order = torch.randperm(len(y)).tolist()
            i, order = order[:8], order[8:]
            out = F.interpolate(head(torch.from_numpy(f[sorted(i)].astype(np.float32)).to(a.device)), y.shape[1:], mode='bilinear', align_corners=False)
            value = lossf(out, y[sorted(i)].to(a.device)); value.backward(); opt.step(); opt.zero_grad(); curve.step()
            if step%200==0: print(f'{row}: step {step} of {a.steps}, loss {value.item():.3f}, {time.time()-start:.0f} s', flush=True)
        a.add(row, val_score(head.eval(), unseen, val, C, a.device), 'VOC animals, val', steps=a.steps, seconds=round(time.time()-start), **(dict(clip_start=a.clip_start) if loss=='clipped' else {}))

def main(a):
    a.out.mkdir(parents=True, exist_ok=True); torch.set_num_threads(a.threads)
    have = {r['row'] for r in load_records(a.json)} if a.json.is_file() else set()
    a.known = lambda row: row in have
    def add(row, values, dataset='VOC animals, train', **extra):
        print(f'{row:36}', '  '.join(f'{k} {v:.1f}' for k,v in values.items()), extra, flush=True)
        save_records(a.json, [new_record('beyond photos', row, v, m, dataset, seed=0, command='python experiments/beyond_photos.py', **extra) for m,v in values.items()])
    a.add, train = add, get_dataset(a.data, 'train')
    for part in a.parts: PARTS[part](a, train)

PARTS = dict(edges=edges, background=background, regions=regions, decoders=decoders)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); A = p.add_argument
    A('--data', required=True); A('--chain', type=Path, default=Path('runs/real_photos'), help='folder of real_photos.py: run, seeds, masks'); A('--parts', nargs='+', choices=list(PARTS), default=list(PARTS)); A('--threads', type=int, default=1); A('--device', default='cpu', help='of the decoders')
    A('--backbone', default='vit_small_patch14_dinov2'); A('--weights', type=Path); A('--side', type=int, default=322, help='of the square that the ViT sees, pixels'); A('--steps', type=int, default=1200); A('--clip-start', type=float, default=.6)
    A('--out', type=Path, default=Path('runs/beyond_photos')); A('--json', type=Path, default=Path('results/beyond_photos.json'))
    main(p.parse_args())
