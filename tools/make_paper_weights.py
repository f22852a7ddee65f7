"""Make the trained network of `nbs/000_paper.ipynb`: MCTformer-V2 of the eight classes of `mini`.

    python tools/make_paper_weights.py            # train by the demonstration's recipe (some ten minutes on one core), then pack
    python tools/make_paper_weights.py --run DIR  # only pack the run folder of a V2

The backbone is the embedded one, and the recipe changes it little. So the file keeps, of each weight of the backbone, only what training
added, times 256 as an 8-bit float (`float8_e4m3fn`), and class tokens, positions and patch head as they are, in 16 bits: 1.6 MB in place of 6.5.
`unpack` is the way back, as the notebook has it."""
import argparse
from pathlib import Path
import numpy as np, torch
from safetensors.torch import load_file, save_file
from mctformer_nb.datasets import get_dataset
from mctformer_nb.demo import DEMO_RECIPE
from mctformer_nb.mctformer import build_model, load_run
from mctformer_nb.train import train_classifier
from mctformer_nb.vit import build_vit

NEW = 'cls_token', 'pos_embed_cls', 'pos_embed_pat', 'head.weight', 'head.bias'   # what the backbone does not have, or not so
FACTOR = 256                                                                      # changes of 0.00001 to 1.7 keep three bits or more
BACKBONE = 'mct_tiny_patch8_96'

def train(out, images, epochs, seed):
    "Run folder of a V2 trained on drawn scenes"
    ds, val = (get_dataset('mini', split, n=n, size=96) for split,n in (('train', images), ('val', 100)))
    return train_classifier(ds, val, out, variant='v2', epochs=epochs, seed=seed, **DEMO_RECIPE)

def pack(weights, start):
    "State dict of a V2 and of the backbone it started from -> tensors of the file"
    small = {k: weights[k].half() for k in NEW}
    changed = {k: (w-start[k])*FACTOR for k,w in weights.items() if k in start and k not in NEW and w.is_floating_point()}
    return small | {k: d.to(torch.float8_e4m3fn) if d.ndim>1 else (d/FACTOR).half() for k,d in changed.items() if d.any()}

def unpack(kept, start):
    "The state dict of the backbone, from tensors of the file"
    added = {k: d.float()/FACTOR if d.dtype==torch.float8_e4m3fn else d.float() for k,d in kept.items() if k not in NEW}
    return {k: w+added.get(k, 0) for k,w in start.items()}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--run', type=Path, help='run folder of a V2 with this backbone; none: train one')
    p.add_argument('--images', type=int, default=600)
    p.add_argument('--epochs', type=int, default=12)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path, default=Path('mctformer_nb/data/mini_v2.safetensors'))
    a = p.parse_args()
    model, start = load_run(a.run or train('runs/paper', a.images, a.epochs, a.seed))[0], build_vit(BACKBONE, pretrained=True).state_dict()
    kept = pack({k: v.contiguous() for k,v in model.state_dict().items()}, start)
    save_file({k: v.contiguous() for k,v in kept.items()}, a.out)
    again = build_model(model.num_classes, backbone=BACKBONE).eval(); kept = load_file(a.out)
    whole = unpack(kept, start); same = {k: v for k,v in whole.items() if k in again.state_dict() and k not in NEW}
    again.load_state_dict(same | {k: kept[k].float() for k in NEW})
    ds = get_dataset('mini', 'val', n=32, size=96)
    x = torch.from_numpy(np.stack([ds.image(i) for i in range(32)])).permute(0, 3, 1, 2).float()/127.5 - 1     # (B,H,W,3) -> (B,3,H,W)
    with torch.no_grad(): gaps = [(q-p).abs().max().item()/p.std().item() for p,q in zip(model(x), again(x))]
    print(f'{a.out}: {a.out.stat().st_size/1e6:.2f} MB; class scores differ by at most {100*max(gaps):.1f} % of their standard deviation')

if __name__=='__main__': main()
