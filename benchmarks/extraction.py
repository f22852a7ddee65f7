"""Localization maps, fused and refined, two views a photo: `extract_seeds` and `localize` against the published way to make them.

    python benchmarks/extraction.py [--images 32] [--sides 224 448 640 1024] [--device cpu] [--threads 1] [--json results/bench.json]

The plain version is written from the formulas: one photo and one view at a time, the attention probabilities of all layers kept and stacked, maps of all 20 classes, each enlarged to the
photo, the sum of the views stretched to [0, 1] for the classes of the label, saved uncompressed. DeiT-S with random weights. The data set has drawn photos of 448 x 448 pixels with 1 to 3 labels.
The plain version at 1024 x 1024 needs 10 GB."""
import tempfile
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F
from PIL import Image
from _common import Report, by_turns, compare, difference, parser, ratio
from mctformer_nb.artifacts import load_seed
from mctformer_nb.attention import minmax
from mctformer_nb.datasets import Dataset
from mctformer_nb.fast_maps import localize_fast
from mctformer_nb.mctformer import MCTformer
from mctformer_nb.mini import draw_scene
from mctformer_nb.seeds import extract_seeds
from mctformer_nb.views import to_input

C, K = 20, 3

def make_model(device, C=C):
    torch.manual_seed(0); model = MCTformer(C, 'v2', 'deit_small_patch16_224').to(device).eval()
    with torch.no_grad():
        model.cls_token += .5*torch.randn_like(model.cls_token)            # fresh class tokens are copies of each other
        for b in model.blocks: b.attn.qkv.weight *= 4                      # sharper attention than at the start
    return model

# ---- the plain version

def block_plain(b, t):
    "One transformer block and its attention probabilities"
    B, N, D = t.shape; H = b.attn.num_heads
    q, k, v = b.attn.qkv(b.norm1(t)).reshape(B, N, 3, H, D//H).permute(2, 0, 3, 1, 4) # (B,H,N,d) each
    a = (q @ k.transpose(-2, -1) * (D//H)**-.5).softmax(-1)
    t = t + b.attn.proj((a @ v).transpose(1, 2).reshape(B, N, D))
    return t + b.mlp(b.norm2(t)), a

def localize_plain(model, x):
    t, (h, w) = model.tokens(x); attns, C = [], model.num_classes
    for b in model.blocks: t, a = block_plain(b, t); attns.append(a)
    f = model.head(t[:, C:].transpose(1, 2).unflatten(2, (h, w))).relu()               # PatchCAM (B,C,h,w)
    A = torch.stack(attns).mean(2)                                                     # (L,B,H,N,N) -> (L,B,N,N)
    m = A[-K:, :, :C, C:].sum(0).unflatten(2, (h, w)) * f                              # Eq. 2 and 6
    return (m.flatten(2) @ A[:, :, C:, C:].sum(0).transpose(1, 2)).unflatten(2, (h, w)) # Eq. 7

@torch.no_grad()
def extract_plain(model, ds, out, device):
    for i,id in enumerate(ds.ids):
        x, size = to_input(ds.image(i), 16).to(device), ds.image(i).size[::-1]
        views = [F.interpolate(localize_plain(model, v), size, mode='bilinear', align_corners=False)[0] for v in (x, x.flip(-1))] # (C,H,W) each
        total = views[0] + views[1].flip(-1)
        np.save(f'{out}/{id}.npy', {int(c): minmax(total[c]).cpu().numpy() for c in ds.labels(i)})

# ---- what is compared

def photos(folder, n, side):
    "Drawn photos on disk, 1 to 3 of 20 labels each"
    rng = np.random.default_rng(0); ids = [f'{i:03}' for i in range(n)]; labels = {id: np.sort(rng.choice(C, rng.integers(1, 4), replace=False)) for id in ids}
    for i,id in enumerate(ids): Image.fromarray(draw_scene(i, size=side)[0]).save(f'{folder}/{id}.jpg', quality=92)
    return Dataset('drawn', [str(i) for i in range(C)], ids, 'all', lambda id: Image.open(f'{folder}/{id}.jpg').convert('RGB'), lambda id: (side, side), labels.__getitem__)

def data_set(a, model, report, side):
    "Photos a second, `--repeats` rounds over equal parts of the data set"
    with tempfile.TemporaryDirectory() as d:
        ds = photos(d, a.images, side); n = max(1, a.images//a.repeats); parts = [ds.subset(ds.ids[i:i+n]) for i in range(0, n*a.repeats, n)]; turn = dict.fromkeys(('plain', *a.precision), -1)
        def part(k): turn[k] += 1; return parts[turn[k]%len(parts)]
        seeds = lambda p: extract_seeds(model, part(p), f'{d}/{p}', batch_size=a.batch_size, device=a.device, **({} if p=='float32' else dict(precision=p)))
        for f in (lambda: localize_plain(model, torch.randn(1, 3, 64, 64, device=a.device)), lambda: localize_fast(model, torch.randn(1, 3, 64, 64, device=a.device))):
            with torch.no_grad(): f()
        got = by_turns({'plain': lambda: extract_plain(model, part('plain'), d, a.device), **{p: (lambda p=p: seeds(p)) for p in a.precision}}, a.repeats, a.device, warm=lambda: None)
        for p in a.precision:
            err = max(abs(m.astype(np.float32) - np.load(f'{d}/{id}.npy', allow_pickle=True).item()[int(c)]).max() for part in parts for id in part.ids for c,m in zip(*load_seed(f'{d}/{p}/{id}.npz')))
            row = compare(got['plain'], got[p]); rate = {f'photos/s{x}': n/row[f'seconds{x}'] for x in (' plain', '')}
            report.add(f'{n*a.repeats} photos {side} x {side}, {p}', row | rate | {'largest difference of [0,1] maps': float(err)}, {'times faster': 2} if side==448 else None)

@torch.no_grad()
def one_view(a, model, report, side, plain=True):
    "One photo, one view, two classes"
    x = torch.randn(1, 3, side, side, device=a.device, generator=torch.Generator(a.device).manual_seed(0)); some = [3, 7]; repeats = a.repeats if side<1000 else max(1, a.repeats//2)
    fs = dict(forward=lambda: model(x), ours=lambda: localize_fast(model, x, classes=some), fused=lambda: localize_fast(model, x, classes=some, attention='fused')) | (dict(plain=lambda: localize_plain(model, x)[:, some]) if plain else {})
    g = by_turns(fs, repeats, a.device, warm=(lambda: [localize_fast(model, x[..., :64, :64]), localize_plain(model, x[..., :64, :64])]) if side>600 else None)
    row = compare(g['plain'], g['ours']) if plain else {'seconds': sorted(g['ours']['cpu'])[repeats//2]}
    row |= {'seconds, fused attention': sorted(g['fused']['cpu'])[repeats//2], 'seconds, forward pass alone': sorted(g['forward']['cpu'])[repeats//2], 'extra MB, fused attention': sorted(g['fused']['mem'])[repeats//2]/2**20}
    if plain: row |= {'times faster if maps cost nothing': ratio(g['plain'], g['forward']), 'largest relative difference': difference(g['plain']['result'], g['ours']['result'])}
    report.add(f'one view {side} x {side}', row | {'tokens': (side//16)**2+model.num_classes}, {'times faster': 2, 'times less memory': 15} if side==1024 else None)

@torch.no_grad()
def by_classes(a, report, side):
    "How the cost of maps grows with the classes of the model"
    x = torch.randn(1, 3, side, side, device=a.device); models = {n: make_model(a.device, n) for n in (1, 20, 80)}
    g = by_turns({n: (lambda n=n: localize_fast(models[n], x, classes=[0])) for n in models} | {f'all {n}': (lambda n=n: localize_fast(models[n], x)) for n in models}, a.repeats, a.device)
    for n in models: report.add(f'model of {n} classes, {side} x {side}', {'seconds': sorted(g[n]['cpu'])[a.repeats//2], 'seconds, maps of all classes': sorted(g[f'all {n}']['cpu'])[a.repeats//2]})

def main(a):
    a.precision = a.precision or (['float32', 'bf16', 'fp16'] if a.device.startswith('cuda') else ['float32', 'int8'])
    if a.quick: a.images, a.sides, a.repeats = 2, [64], 1
    report = Report('benchmark: map extraction', a, 'drawn photos, random images'); model = make_model(a.device)
    if a.images: data_set(a, model, report, 64 if a.quick else 448)
    for s in a.sides: one_view(a, model, report, s, s<=a.plain_limit)
    if a.sides: by_classes(a, report, 64 if a.quick else 224)
    report.save()

if __name__ == '__main__':
    p = parser(__doc__, 4); A = p.add_argument
    A('--images', type=int, default=32); A('--batch-size', type=int, default=2); A('--sides', type=int, nargs='*', default=[224, 320, 448, 640, 1024]); A('--plain-limit', type=int, default=1024)
    A('--precision', nargs='+', help='of the data set, default float32 and what the device has')
    main(p.parse_args())
