"""Retraining that distrusts its labels, on the drawn data set: a mask transformer beside DeepLab, and the clipped loss beside the plain one.

    python experiments/retraining.py [--seeds 0 1 2] [--parts planted pseudo] [--fine-tune] [--out runs/retraining] [--json results/retraining.json]

`planted`: in the true masks every object is given the name of another class with probability 0.3. `pseudo`: masks that a classifier made of image labels (V2's patch head on the frozen ViT,
its maps, the edges of the scene), the same for all networks. The encoder, half of the embedded ViT, is frozen and its features are computed once, which a slow computer can do; with `--fine-tune` all of it is trained by `train_segment`, from crops at random scales.
The last step counts, nothing is chosen on masks; scored are scenes that no training has seen. Started again, it goes on with what is not recorded yet."""
import argparse, csv, time
from functools import partial
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F
from mctformer_nb.clipped_loss import ClippedLoss, label_entropy, wrong_labels
from mctformer_nb.core import open_mask, save_mask, set_seed
from mctformer_nb.crf_masks import make_crf_masks
from mctformer_nb.datasets import get_dataset
from mctformer_nb.deeplab import SegmentLoss, train_segment
from mctformer_nb.mask_decoder import segment_network
from mctformer_nb.mctformer import MCTformer
from mctformer_nb.scores import confusion, iou_fp_fn, score_masks
from mctformer_nb.seeds import extract_seeds
from mctformer_nb.tables import load_records, new_record, save_records
from mctformer_nb.views import to_input

VIT = dict(backbone='mct_tiny_patch8_96', pretrained=True, taps=(2,))
FINE = dict(VIT, crop=64, batch_size=8, optimizer='adamw', lr=3e-4, head_mult=3, cache=True)       # for `train_segment`
DEEPLAB, MASK = dict(decoder='fov', dilation=2, width=96), dict(decoder='mask')
RATES = dict(fov=2e-3, mask=1e-3)                                                                   # of AdamW for a decoder alone
NETWORKS = {'DeepLab': (DEEPLAB, 'plain'), 'DeepLab, clipped loss': (DEEPLAB, 'clipped'), 'mask transformer': (MASK, 'plain'), 'mask transformer, clipped loss': (MASK, 'clipped')}
log = partial(print, flush=True)

def planted_masks(ds, out, seed):
    rng = np.random.default_rng(seed)
    for id in ds.ids:
        wrong = wrong_labels(ds.mask(id), len(ds.classes), .3, rng)                      # drawn also for those that exist: the numbers stay in step
        if not (out/f'{id}.png').exists(): save_mask(out/f'{id}.png', wrong)

def pseudo_masks(ds, out, seed):
    "Masks from image labels: MCTformer-V2's patch head on the frozen ViT, its maps refined by the ViT's attention, the edges of the scene"
    if all((out/'masks'/f'{id}.png').exists() for id in ds.ids): return
    set_seed(seed); model = MCTformer(len(ds.classes), 'v2', VIT['backbone'], pretrained=True).eval()
    with torch.no_grad(): x = torch.cat([model.forward_features(to_input(ds.image(i), 8))[1] for i in range(len(ds))])        # (n,D,12,12)
    y, opt = torch.tensor(ds.targets()), torch.optim.AdamW(model.head.parameters(), 3e-3, weight_decay=.05)
    for step in range(300):
        i = torch.randperm(len(y))[:32]
        F.multilabel_soft_margin_loss(model.head(x[i]).mean((2, 3)), y[i]).backward(); opt.step(); opt.zero_grad()
    extract_seeds(model, ds, out/'seeds', kind='patchcam', scales=(1,), batch_size=16)
    make_crf_masks(out/'seeds', ds, out/'masks', workers=1)

class Frozen:
    "Features of scenes, computed once, and decoders trained on them"
    def __init__(self, ds, val):
        self.net = segment_network(len(ds.classes), **MASK, **VIT).eval()
        self.train, self.unseen = self.features(ds), self.features(val)
        self.answers = [val.mask(i) for i in range(len(val))]
    @torch.no_grad()
    def features(self, ds):
        x = torch.cat([to_input(ds.image(i), 8) for i in range(len(ds))])               # (n,3,96,96)
        return torch.cat([self.net.backbone(b)[-1] for b in x.split(16)])               # (n,D,12,12)
    @torch.no_grad()
    def miou(self, head):
        found = [F.interpolate(head(f[None]), (96, 96), mode='bilinear', align_corners=False)[0].argmax(0).numpy() for f in self.unseen]
        return float(iou_fp_fn(sum(confusion(p, t, 9) for p,t in zip(found, self.answers)))['miou'])
    def fit(self, network, loss, masks, seed, a):
        "mIoU of unseen scenes, every sixth of the training"
        set_seed(seed); head = segment_network(8, **network, **VIT | dict(pretrained=False)).head.train()
        opt = torch.optim.AdamW(head.parameters(), RATES[network['decoder']]); curve = torch.optim.lr_scheduler.PolynomialLR(opt, a.steps, .9)
        y, f, found = torch.from_numpy(np.stack(masks))[:, 2::4, 2::4], ClippedLoss(clip_start=a.clip_start) if loss=='clipped' else SegmentLoss(), []       # masks (n,24,24)
        for step in range(a.steps):
            i = torch.randperm(len(y))[:8]
            f(head(self.train[i]), y[i]).backward(); opt.step(); opt.zero_grad(); curve.step()
            if (step+1) % (a.steps//6)==0: found.append(self.miou(head.eval())); head.train()
        return found

def fine_tuned(row, folder, ds, val, out, seed, a):
    network, loss = NETWORKS[row]
    options = {**FINE, **network, 'loss': loss} | (dict(clip_start=a.clip_start) if loss=='clipped' else {})
    run = train_segment(folder, ds, out, valid=val, epochs=a.epochs, seed=seed, log=log, **options)
    return [float(r['miou']) for r in csv.DictReader(open(run/'history.csv'))]

def main(a):
    ds, val = get_dataset('mini', 'train', n=a.scenes, size=96), get_dataset('mini', 'val', n=a.unseen, size=96)
    frozen, known = None if a.fine_tune else Frozen(ds, val), {(r['row'], r['seed']) for r in (load_records(a.json) if a.json and a.json.exists() else [])}
    for part in a.parts:
        for seed in a.seeds:
            folder = dict(planted=a.out/f'planted{seed}', pseudo=a.out/f'classifier{seed}'/'masks')[part]
            planted_masks(ds, folder, seed) if part=='planted' else pseudo_masks(ds, folder.parent, seed)
            masks = [open_mask(folder/f'{id}.png') for id in ds.ids]; quality = float(score_masks(folder, ds).miou)
            log(f'{part} {seed}: the masks score {quality:.1f}, entropy of their labels {label_entropy(masks):.2f}')
            for row in a.rows:
                name, start = f'{row}, {part}' + ', fine-tuned'*a.fine_tune, time.time()
                if (name, seed) in known: continue
                found = fine_tuned(row, folder, ds, val, a.out/f'{part}{seed}_{row.replace(", ", "_").replace(" ", "_")}', seed, a) if a.fine_tune else frozen.fit(*NETWORKS[row], masks, seed, a)
                log(f'seed {seed}  {name:48}', *(f'{v:5.1f}' for v in found), f'  {time.time()-start:.0f} s')
                if not a.json: continue
                extra = dict(scenes=a.scenes, **({'epochs': a.epochs} if a.fine_tune else {'steps': a.steps}), **({'clip_start': a.clip_start} if 'clipped' in row else {}))
                records = [new_record('retraining', name, v, m, 'mini', seed=seed, command=a.command, **extra) for m,v in (('mIoU', found[-1]), ('mIoU, best of the scored masks', max(found)))]
                save_records(a.json, records + [new_record('retraining', f'{part} masks', quality, 'mask mIoU', 'mini', seed=seed, command=a.command, scenes=a.scenes)])

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); A = p.add_argument
    A('--seeds', type=int, nargs='+', default=[0, 1, 2]); A('--parts', nargs='+', default=['planted', 'pseudo'], choices=['planted', 'pseudo']); A('--rows', nargs='+', default=list(NETWORKS), choices=list(NETWORKS))
    A('--scenes', type=int, default=128); A('--unseen', type=int, default=64); A('--steps', type=int, default=480)
    A('--fine-tune', action='store_true'); A('--epochs', type=int, default=16, help='with --fine-tune'); A('--clip-start', type=float, default=.6); A('--out', type=Path, default=Path('runs/retraining')); A('--json', type=Path)
    a = p.parse_args(); a.command = f'python experiments/retraining.py --parts {" ".join(a.parts)} --seeds {" ".join(map(str, a.seeds))}' + ' --fine-tune'*a.fine_tune
    main(a)
