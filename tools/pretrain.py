"""Make the embedded backbone: pretrain `mct_tiny_patch8_96` on the drawn pretraining classes.

    python tools/pretrain.py

That is 2000 steps on 12,000 scenes and 8,000 tiles; on one core that was shared with other work they took 66 minutes. The log is kept beside this script.
(The weights in the package were made when a scene held one, two or three objects equally often, with radius 0.22-0.34 of the side.)

It plays the part of ImageNet DeiT: the pretraining scenes show other bodies in other colours than the data set `mini`, and only
image-level labels are used (which bodies and which parts occur in the picture). Three heads learn together and are thrown away afterwards:
one on the class token, one on the output patch tokens, one on the convolutional stem. The two dense heads pool with a smooth maximum
(log-sum-exp): an average over all patches hardly passes a gradient to a part that covers two of them.

Half of each batch are mosaics of four small scenes, and the dense heads pool each quarter by itself. A label still belongs to a whole
(small) picture, but a patch must now say what is in its own quarter: without that, patches of the background carry the class as well.
It also learns faster, as four labelled tiles say more than one scene (mAP of the class token after 500 steps 0.81; 0.66 in an earlier run
without mosaics)."""
import argparse, csv, math, time
from multiprocessing import Pool
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.metrics import average_precision_score
from torch import nn
from mctformer_nb.mini import PRETRAIN, draw_scene
from mctformer_nb.vit import build_vit

BODIES = list(dict.fromkeys(b for b,_,_ in PRETRAIN.values())); PARTS = list(dict.fromkeys(p for _,p,_ in PRETRAIN.values()))
MEAN, STD = (torch.tensor(v).view(3,1,1) for v in ((.485,.456,.406), (.229,.224,.225)))

def attributes(mask):
    "Multi-hot vector of the bodies and parts in a scene"
    y = np.zeros(len(BODIES)+len(PARTS), np.float32)
    for c in np.unique(mask[mask>0]):
        b,p,_ = list(PRETRAIN.values())[c-1]; y[BODIES.index(b)] = y[len(BODIES)+PARTS.index(p)] = 1
    return y

def one(args):
    i, size, kw = args; im,m = draw_scene(i, size, split='pretrain', **kw); return im, attributes(m)

def scenes(n, size, procs, first=0, **kw):
    with Pool(procs) as p: ims,ys = zip(*p.imap(one, [(first+i, size, kw) for i in range(n)], chunksize=64))
    return torch.from_numpy(np.stack(ims)), torch.from_numpy(np.stack(ys))

def normalise(x): return (x.permute(0,3,1,2).float()/255 - MEAN)/STD    # (B,H,W,3) uint8 -> (B,3,H,W)

def augment(x, g):
    "Mirror, colour gain and offset, zoom and shift, per image"
    B = len(x); x = torch.where(torch.rand(B, generator=g).lt(.5)[:,None,None,None], x.flip(-1), x)
    x = x*(1 + .4*(torch.rand(B,3,1,1, generator=g)-.5)) + .4*(torch.rand(B,3,1,1, generator=g)-.5)
    theta = torch.zeros(B,2,3); theta[:,0,0] = theta[:,1,1] = .8 + .4*torch.rand(B, generator=g); theta[:,:,2] = .2*(torch.rand(B,2, generator=g)-.5)
    return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), padding_mode='reflection', align_corners=False)

def mosaic(x, y):
    "Four pictures in one: (4B,3,s,s), (4B,n) -> (B,3,2s,2s), quarters' labels (B,n,2,2)"
    x = x.unflatten(0, (-1,2,2)).permute(0,3,1,4,2,5).flatten(4).flatten(2,3)      # (B,2,2,3,s,s) -> (B,3,2,s,2,s) -> (B,3,2s,2s)
    return x, y.unflatten(0, (-1,2,2)).permute(0,3,1,2)                           # (B,2,2,n) -> (B,n,2,2)

def quarters(f): return f.unflatten(3, (2,-1)).unflatten(2, (2,-1)).transpose(3,4).flatten(4)  # (B,n,h,w) -> (B,n,2,2,h/2*w/2)

def lse(f, sharp=4.): return (sharp*f).logsumexp(-1)/sharp - math.log(f.shape[-1])/sharp    # smooth maximum over the last axis
def pooled(f): return lse(f.flatten(2))                                                          # (B,n,h,w) -> (B,n)

class Heads(nn.Module):
    "The backbone with its three heads; returns logits of the image and two maps of logits"
    def __init__(self, vit, n):
        super().__init__(); self.vit, D = vit, vit.embed_dim
        self.cls, self.patch, self.stem = nn.Linear(D, n), nn.Conv2d(D, n, 3, padding=1), nn.Conv2d(D, n, 3, padding=1)
    def forward(self, x):
        t = self.vit.patch_embed(x); f = self.vit.forward_features(x)
        h = math.isqrt(t.shape[1]); grid = lambda z: z.transpose(1,2).unflatten(2, (h,h))                # (B,M,D) -> (B,D,h,w)
        return self.cls(f[:,0]), self.patch(grid(f[:,1:])), self.stem(grid(t))                          # (B,n), (B,n,h,w), (B,n,h,w)

def losses(out, y, y4=None):
    "Class-token, patch and stem loss; with labels of quarters `y4` (B,n,2,2) the dense heads are pooled per quarter"
    dense = [(pooled(o), y) if y4 is None else (lse(quarters(o)), y4) for o in out[1:]]
    return [F.binary_cross_entropy_with_logits(o, t) for o,t in [(out[0], y), *dense]]

def main(a):
    torch.manual_seed(a.seed); g = torch.Generator().manual_seed(a.seed); start = time.time()
    X,Y = scenes(a.images, a.size, a.procs); n = len(X)-500                                               # the last 500 are held out
    print(f'{len(X)} scenes drawn in {time.time()-start:.0f} s', flush=True)
    tiles = scenes(a.tiles, a.size//2, a.procs, first=10**6, objects=(1,1), scale=(.26,.38)) if a.mosaic else None
    model = Heads(build_vit(a.backbone, pretrained=a.init or False, drop_path=.05), Y.shape[1]).to(memory_format=torch.channels_last)
    opt = torch.optim.AdamW(model.parameters(), lr=a.lr, weight_decay=a.wd)
    rows, start = [], time.time()
    for s in range(1, a.steps+1):
        for q in opt.param_groups: q['lr'] = a.lr*min(1, s/100)*(.5*(1+math.cos(math.pi*s/a.steps))+.01)
        i = torch.randint(0, n, (a.batch//2 if tiles else a.batch,), generator=g); x,y = augment(normalise(X[i]), g), Y[i]
        if tiles:
            j = torch.randint(0, len(tiles[0]), (2*a.batch,), generator=g); x4,y4 = mosaic(augment(normalise(tiles[0][j]), g), tiles[1][j])
            out = model(torch.cat([x, x4])); k = len(x)
            loss = [(p+q)/2 for p,q in zip(losses([o[:k] for o in out], y), losses([o[k:] for o in out], y4.amax((2,3)), y4))]
        else: loss = losses(model(x), y)
        opt.zero_grad(); sum(loss).backward(); nn.utils.clip_grad_norm_(model.parameters(), 1.); opt.step()
        if s%100: continue
        model.eval()
        with torch.no_grad(): out = [torch.cat(o) for o in zip(*[model(normalise(X[j:j+100])) for j in range(n, n+500, 100)])]
        model.train(); mAP = [average_precision_score(Y[n:].numpy(), (o if o.dim()==2 else pooled(o)).numpy(), average='macro') for o in out]
        rows.append([s, *(f'{l.item():.4f}' for l in loss), *(f'{m:.4f}' for m in mAP), round(time.time()-start)]); print(*rows[-1], flush=True)
        save_file({k: v.half().contiguous() if v.is_floating_point() else v for k,v in model.vit.state_dict().items()}, a.out)
        with open(a.log, 'w', newline='') as f: csv.writer(f, lineterminator='\n').writerows([['step','loss_cls','loss_patch','loss_stem','mAP_cls','mAP_patch','mAP_stem','seconds'], *rows])
        if s==a.stop: break

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); A = p.add_argument
    A('--backbone', default='mct_tiny_patch8_96'); A('--size', type=int, default=96); A('--images', type=int, default=12000); A('--steps', type=int, default=2000); A('--stop', type=int, help='end early, the schedule as it is'); A('--init', type=Path); A('--mosaic', action=argparse.BooleanOptionalAction, default=True); A('--tiles', type=int, default=8000)
    A('--batch', type=int, default=32); A('--lr', type=float, default=1.5e-3); A('--wd', type=float, default=.03); A('--seed', type=int, default=0); A('--procs', type=int, default=2)
    A('--out', type=Path, default=Path('mctformer_nb/data/tiny_vit.safetensors')); A('--log', type=Path, default=Path('tools/pretrain_log.csv'))
    main(p.parse_args())
