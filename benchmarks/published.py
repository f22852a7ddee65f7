"""This library beside the published code itself: the same weights, photos and threads, taking turns in one process.

    git clone https://github.com/xulianuwa/MCTformer && git -C MCTformer checkout 9606597
    python benchmarks/published.py --clone MCTformer [--threads 1] [--parts maps photos step frozen] [--json results/bench.json]

Nothing is fetched and nothing of the clone is changed: its modules are imported as they are. `cv2`, which it needs only to draw, may be missing. Results have to be equal before anything is timed.

* `maps`: one photo of 448 x 448, maps fused and refined; the published code makes those of all 20 classes, ours the 2 of the label
* `photos`: from files to files, both views of a photo, by the published `generate_attention_maps_ms` (no pictures drawn, no worker processes) and by `extract_seeds`, at every precision
* `step`: a training step of V2, loss, backward pass and AdamW as in the published `train_one_epoch`; drop path 0.1 in both; ours also in 16 bits where the processor has them
* `frozen`: photos a second of the frozen recipe, from files to a run folder, beside those of training every layer, of which only the steps are counted

The bound of arithmetic is the speed of one product of two large matrices, measured in every round; operations are those of the network without softmax, norms and sums.
Without a clone, `--quick` runs against a stand-in written from the formulas."""
import contextlib, importlib, io, os, statistics, sys, tempfile, types, warnings
from argparse import Namespace
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F
from PIL import Image
from _common import Report, by_turns, compare, difference, parser
from extraction import C, K, block_plain, extract_plain, photos
from mctformer_nb.artifacts import load_seed
from mctformer_nb.checkpoints import load_reference
from mctformer_nb.fast_maps import choose_precision, localize_fast
from mctformer_nb.frozen import frozen_network, frozen_precision, train_frozen
from mctformer_nb.mctformer import MCTformer
from mctformer_nb.seeds import extract_seeds
from mctformer_nb.learner import param_groups
from mctformer_nb.train import mct_loss, one_pass_adamw
from mctformer_nb.views import REFERENCE_VIEWS

NAME = 'deit_small_MCTformerV2_patch16_224'

# ---- the published code

class StandIn(MCTformer):
    "What the published model answers, from the plain formulas"
    def forward(self, x, return_att=False, n_layers=12, attention_type='fused'):
        t, (h, w) = self.tokens(x); attns = []
        for b in self.blocks: t, a = block_plain(b, t); attns.append(a)
        f = self.head(t[:, C:].transpose(1, 2).unflatten(2, (h, w))); A = torch.stack(attns).mean(2)   # (B,C,h,w), (L,B,N,N)
        if not return_att: return t[:, :C].mean(-1), f.mean((-2, -1))
        return t[:, :C].mean(-1), A[-n_layers:].sum(0)[:, :C, C:].unflatten(2, (h, w))*f.relu(), A[:, :, C:, C:]

def open_clone(folder):
    "Its modules, or None: the names `models`, `datasets`, `engine` and `utils` are its own"
    if folder is None: return None
    sys.path.insert(0, str(folder)); sys.modules.setdefault('cv2', types.ModuleType('cv2')); Image.CUBIC = Image.BICUBIC  # its name in Pillow until 2023
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                                    # names of timm that are old, and still there
        return Namespace(**{n: importlib.import_module(n) for n in ('models', 'datasets', 'engine')})

def published_model(code, drop_path=.1):
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()): model = StandIn(C, 'v2', 'deit_small_patch16_224', drop_path=drop_path, pos_rule='reference') if code is None else getattr(code.models, NAME)(num_classes=C, drop_path_rate=drop_path)
    with torch.no_grad():
        for b in model.blocks: b.attn.qkv.weight *= 4                      # sharper attention than at the start
    return model

def ours_of(model):
    "The same network in this library"
    if not isinstance(model, StandIn): return load_reference(model.state_dict())
    ours = MCTformer(C, 'v2', 'deit_small_patch16_224', pos_rule='reference'); ours.load_state_dict(model.state_dict()); return ours.eval()

def published_maps(model, x):
    "Maps of a view as the published code makes them: every class, refined"
    _, cams, patch = model(x, return_att=True, n_layers=K, attention_type='fused')                     # (B,C,h,w), (L,B,M,M)
    return torch.matmul(patch.sum(0)[:, None], cams.flatten(2)[..., None]).reshape(cams.shape)         # Eq. 7, a product a class

@contextlib.contextmanager
def inside(folder):
    was = os.getcwd(); os.chdir(folder)
    try: yield
    finally: os.chdir(was)

def published_photos(code, model, root, ds, out):
    "Files to files by the published generator"
    if code is None: return extract_plain(model, ds, out, 'cpu')
    (root/'train_aug_id.txt').write_text('\n'.join(ds.ids)+'\n')
    how = Namespace(data_set='VOC12MS', img_list=str(root), data_path=str(root), scales=[1.], input_size=224, gen_attention_maps=True, attention_dir=None, cam_npy_dir=str(out), patch_size=16,
                    model=NAME, layer_index=K, attention_type='fused', patch_attn_refine=True, nb_classes=C, visualize_cls_attn=True, out_crf=None)
    with inside(root), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')                                    # autocast for a GPU that is not there
        data, _ = code.datasets.build_dataset(is_train=False, args=how, gen_attn=True)
        code.engine.generate_attention_maps_ms(torch.utils.data.DataLoader(data, batch_size=1), model, torch.device('cpu'), how)

# ---- bounds

def gflop(side, D=384, L=12, p=16):
    "Operations of a forward pass (two a multiply-add), in 10^9: linear layers, products of attention, patch embedding, patch head"
    M = (side//p)**2; N = M+C
    return 2*(L*(12*D*D*N+2*N*N*D) + M*3*p*p*D + M*9*D*C)/1e9

def conv_gflop(net, side):
    "Operations of the convolutions of a network for one photo, in 10^9"
    found, count = [], lambda m, _, out: found.append(2*out[0].numel()*m.weight[0].numel())            # (D,h,w) numbers, each from weights (D',k,k)
    hooks = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    with torch.no_grad(): net(torch.zeros(1, 3, side, side))
    for h in hooks: h.remove()
    return sum(found)/1e9

def product(n): a, b = torch.randn(n, n), torch.randn(n, n); return lambda: a@b

def row_of(plain, ours, top, work, n=None):
    "Metrics of a row: ratio and spread, and how near `work` (GFLOP) comes to the speed of one large product, `top` (its turns, GFLOP)"
    ratios = sorted(p/max(o, 1e-9) for p,o in zip(plain['cpu'], ours['cpu'])); row = compare(plain, ours)
    turns, size = top; speed = size/min(turns['cpu'])
    row |= {'times faster, least': ratios[0], 'times faster, most': ratios[-1], 'GFLOP/s of one product': speed, 'seconds at that speed': work/speed, 'share of the bound': work/speed/row['seconds'], 'share of the bound, plain': work/speed/row['seconds plain']}
    return row | ({f'images/s{x}': n/row[f'seconds{x}'] for x in (' plain', '')} if n else {})

# ---- what is compared

def threads():
    "Threads, and the instructions that decide how fast a product of matrices can be"
    has = lambda name: getattr(torch.cpu, name, lambda: False)()
    kind = 'AMX' if has('_is_amx_tile_supported') else 'AVX512-BF16' if has('_is_avx512_bf16_supported') else torch.backends.cpu.get_cpu_capability()
    return f'{torch.get_num_threads()} thread{"s"*(torch.get_num_threads()>1)}, {kind}'

@torch.no_grad()
def maps(a, report, code, side):
    model = published_model(code).eval(); ours = ours_of(model); x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)); some = [3, 7]; n = a.product
    err = difference(published_maps(model, x)[:, some], localize_fast(ours, x, classes=some)); assert err<1e-5, f'maps differ by {err}'
    g = by_turns(dict(plain=lambda: published_maps(model, x), ours=lambda: localize_fast(ours, x, classes=some), network=lambda: ours(x), top=product(n)), a.repeats)
    row = row_of(g['plain'], g['ours'], (g['top'], 2*n**3/1e9), gflop(side)) | {'seconds, forward pass alone': statistics.median(g['network']['cpu']), 'largest relative difference': err}
    report.add(f'one view {side} x {side}, {threads()}', row, {'times faster': 1.5}, bound='arithmetic')

def whole(a, report, code, side):
    "Files to files; every round has its own photos"
    model = published_model(code).eval(); ours = ours_of(model); n = a.product
    with tempfile.TemporaryDirectory() as d:
        d = Path(d); root = d/'voc'; (root/'JPEGImages').mkdir(parents=True); (root/'voc12').mkdir()
        ds = photos(root/'JPEGImages', a.photos*a.repeats, side); parts = [ds.subset(ds.ids[i:i+a.photos]) for i in range(0, len(ds), a.photos)]
        np.save(root/'voc12/cls_labels.npy', {id: np.isin(np.arange(C), ds.labels(i)).astype(np.float32) for i,id in enumerate(ds.ids)})
        fast = choose_precision(ours, torch.randn(1, 3, side, side)); wanted = list(dict.fromkeys([*a.precision, fast])); turn = dict.fromkeys(['plain', *wanted], -1)
        for p in turn: (d/p).mkdir()
        def part(k): turn[k] += 1; return parts[turn[k]%len(parts)]
        def seeds(p): return extract_seeds(ours, part(p), d/p, batch_size=a.batch, device='cpu', workers=2, precision=p, **REFERENCE_VIEWS)
        calls = dict(plain=lambda: published_photos(code, model, root, part('plain'), d/'plain')) | {p: (lambda p=p: seeds(p)) for p in wanted} | dict(top=product(n))
        g = by_turns(calls, a.repeats, warm=lambda: [localize_fast(ours, torch.randn(2, 3, side, side)), calls['top']()])
        for p in wanted:
            err = max(abs(m.astype(np.float32)-np.load(d/f'plain/{id}.npy', allow_pickle=True).item()[int(c)]).max() for id in ds.ids for c,m in zip(*load_seed(d/p/f'{id}.npz')))
            if p=='float32': assert err<1e-3, f'seeds differ by {err}'      # half precision in the files
            row = row_of(g['plain'], g[p], (g['top'], 2*n**3/1e9), 2*a.photos*gflop(side), a.photos) | {'largest difference of [0,1] maps': float(err)}
            report.add(f'photos {side} x {side}, files to files, {p}, {threads()}', row, {'times faster': 1.5 if p=='float32' else 2.5}, bound='arithmetic', chosen=p==fast)

def step(a, report, code, side):
    x = torch.randn(a.batch_size, 3, side, side, generator=torch.Generator().manual_seed(0)); y = (torch.rand(a.batch_size, C, generator=torch.Generator().manual_seed(0))<.1).float(); n = a.product
    model = published_model(code).train(); ours = ours_of(model).train(); lr = 5e-4*a.batch_size/512
    decay = [p for p in model.parameters() if p.ndim>1], [p for p in model.parameters() if p.ndim<=1]
    opts = dict(plain=torch.optim.AdamW([dict(params=decay[0]), dict(params=decay[1], weight_decay=0.)], lr, weight_decay=.05), ours=ours_optimiser(ours, lr))
    with torch.no_grad(): err = max(difference(p, o) for p,o in zip(model.eval()(x), ours.eval()(x)))
    assert err<1e-5, f'scores differ by {err}'
    model.train(), ours.train(); half = ours_of(model).train(); half_opt = ours_optimiser(half, lr)
    def bf16():
        with torch.autocast('cpu', torch.bfloat16): loss = mct_loss(half(x), y)
        half_opt.zero_grad(); loss.backward(); half_opt.step(); loss.item()
    def plain():
        out = model(x); loss = sum(F.multilabel_soft_margin_loss(o, y) for o in out); loss.item(); opts['plain'].zero_grad(); loss.backward(); opts['plain'].step()
    def mine(): loss = mct_loss(ours(x), y); opts['ours'].zero_grad(); loss.backward(); opts['ours'].step(); loss.item()
    g = by_turns(dict(plain=plain, ours=mine, top=product(n)) | (dict(bf16=bf16) if frozen_precision()=='bf16' or a.quick else {}), a.repeats)
    for kind,target in dict(ours=1.3, bf16=2.).items():
        if kind not in g: continue                                             # 16 bits are emulated elsewhere, and slow
        row = row_of(g['plain'], g[kind], (g['top'], 2*n**3/1e9), 3*a.batch_size*gflop(side), a.batch_size) | ({'largest relative difference': err} if kind=='ours' else {})
        report.add(f'training step {side} x {side}, batch {a.batch_size}{", bf16" if kind=="bf16" else ""}, {threads()}', row, {'times faster': target}, bound='arithmetic')

def ours_optimiser(model, lr): return one_pass_adamw(param_groups(model, .05), lr)

def frozen(a, report, code, side):
    "Features once, both mirror images, and the linear layer with its cross-validation, beside steps of full training"
    ours = MCTformer(C, 'v2', 'deit_small_patch16_224').train(); opt = ours_optimiser(ours, 1e-4); few = min(4, a.batch_size); x = torch.randn(few, 3, side, side); y = (torch.rand(few, C)<.1).float(); count = 12 if a.quick else a.frozen_photos
    def full(): loss = mct_loss(ours(x), y); opt.zero_grad(); loss.backward(); opt.step()
    with tempfile.TemporaryDirectory() as d:
        ds = photos(d, count, 448); turn = iter(range(100))
        g = by_turns(dict(full=full, ours=lambda: train_frozen(ds, out=f'{d}/{next(turn)}', device='cpu', log=lambda _: None), top=product(a.product)), a.repeats, warm=full)
    seconds = {k: statistics.median(g[k]['cpu']) for k in ('full', 'ours')}; each, elapsed = (sorted(f/few/(o/count) for f,o in zip(g['full'][k], g['ours'][k])) for k in ('cpu', 'wall'))
    speed = 2*a.product**3/1e9/min(g['top']['cpu']); work = dict(full=3*few*gflop(side), ours=2*count*conv_gflop(frozen_network(), 320)); share = {k: work[k]/speed/seconds[k] for k in work}
    row = {'times faster': statistics.median(each), 'times faster, elapsed': statistics.median(elapsed), 'times faster, least': each[0], 'times faster, most': each[-1], 'images/s plain': few/seconds['full'], 'images/s': count/seconds['ours'],
           'passes over the photos, full training': 60, 'times faster, whole recipe': 60*statistics.median(each), 'GFLOP/s of one product': speed, 'share of the bound': share['ours'], 'share of the bound, plain': share['full']}
    report.add(f'frozen recipe beside full training, {threads()}', row, {'times faster': 10}, bound='arithmetic')

def main(a):
    assert a.clone or a.quick, 'give the published code: --clone FOLDER'
    if a.clone: sys.argv = ['MCTformer' if v==str(a.clone) else v for v in sys.argv]; code = open_clone(a.clone.resolve())
    else: code = None
    a.product = 2048
    if a.quick: a.photos, a.repeats, a.batch_size, a.product = 2, 1, 2, 128
    report = Report('benchmark: published code', a, 'drawn photos, random images')
    small = 64 if a.quick else None
    for part in a.parts: dict(maps=lambda: maps(a, report, code, small or 448), photos=lambda: whole(a, report, code, small or 448), step=lambda: step(a, report, code, small or 224), frozen=lambda: frozen(a, report, code, small or 224))[part]()
    report.save()

if __name__ == '__main__':
    p = parser(__doc__, 5); A = p.add_argument
    A('--clone', type=Path, help='folder of the published code, at commit 9606597'); A('--parts', nargs='+', choices=['maps', 'photos', 'step', 'frozen'], default=['maps', 'photos', 'step', 'frozen'])
    A('--photos', type=int, default=4, help='a round'); A('--frozen-photos', type=int, default=96); A('--batch', type=int, default=2, help='photos extract_seeds takes together'); A('--batch-size', type=int, default=16, help='of the training step')
    A('--precision', nargs='+', default=['float32', 'int8'])
    main(p.parse_args())
