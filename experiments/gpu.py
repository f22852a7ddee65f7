"""What only a GPU can tell, in one run of some minutes: is everything right there, how fast is it, and what do 60 epochs of the paper's networks give on real photographs.

    bash experiments/gpu.sh --data voc:PATH/VOC2012 --weights vit_small_patch16_224.pth [--out runs/gpu] [--json results/gpu.json]
    python experiments/gpu.py --dry --out runs/gpu_dry     # the same steps on the CPU, a tiny network and drawn scenes: nothing is recorded

`--parts right speed train`. Nothing is fetched and nothing built; every stage of `train` goes on where it stopped.

* right: maps of every rule and kind and one training step, CPU = GPU to 1e-3; half precision; the fused attention kernel is the one that runs. cells: those of notebooks marked `gpu`, beside the trainings
* speed: `benchmarks/extraction.py`, `benchmarks/train_step.py`, and the speed of one large matrix product in bf16, of which the steps' share is told
* train: V1, V2, V2 in a frozen ViT and MCTformer+ side by side, each with its seeds by its own affinity and by that of the frozen ViT; from the best maps of V2 (by the masks of `train`) pseudo masks by the
  photo's edges and a DeepLab, scored on unseen photos; with --masks two decoders and two losses on given pseudo masks. `--parts networks --networks v2 --chain` is one of these jobs"""
import argparse, json, os, subprocess, sys, time
from pathlib import Path
import numpy as np, pandas as pd, torch
ROOT = Path(__file__).resolve().parents[1]; sys.path.insert(0, str(ROOT))
from beyond_photos import both
from mctformer_nb.attention import KINDS, RULES, localize
from mctformer_nb.cli import FROZEN_RECIPE
from mctformer_nb.crf_masks import make_crf_masks
from mctformer_nb.datasets import get_dataset
from mctformer_nb.deeplab import train_segment
from mctformer_nb.fast_maps import localize_fast
from mctformer_nb.mctformer import MCTformer
from mctformer_nb.runs import load_run, packaged_weights
from mctformer_nb.other_affinity import OtherAffinity, affinity_vit
from mctformer_nb.scores import fixed_threshold, score_masks, sweep_threshold
from mctformer_nb.seeds import extract_kinds, extract_seeds, show_seeds
from mctformer_nb.segment import segment_kinds
from mctformer_nb.tables import load_records, new_record, save_records
from mctformer_nb.train import mct_loss, train_classifier
import mctformer_nb.plus                                                       # the variant

COMMAND = 'bash experiments/gpu.sh'

class Log:
    "Prints numbers and keeps them as records"
    def __init__(self, a): self.a, self.start = a, time.time()
    def __call__(self, table, row, dataset, **metrics):
        print(f'[{time.time()-self.start:5.0f} s] {table}: {row:44}', '  '.join(f'{k} {v:.4g}' for k,v in metrics.items()), flush=True)
        if self.a.json and not self.a.dry: save_records(self.a.json, [new_record(table, row, v, k, dataset, seed=0, command=COMMAND, torch=torch.__version__.split('+')[0]) for k,v in metrics.items()])

# ---- right

def relative(want, got): return ((want-got.float().cpu()).abs().max()/want.abs().max().clamp_min(1e-12)).item()

def network(a, drop_path=0.):
    torch.manual_seed(0); model = MCTformer(20, 'v2', a.backbone, drop_path=drop_path)
    with torch.no_grad():
        model.cls_token += .5*torch.randn_like(model.cls_token)                # fresh class tokens are copies of each other
        for b in model.blocks: b.attn.qkv.weight *= 2                          # sharper attention than at the start
    return model

def right(a, log):
    "Raises AssertionError where the GPU does not give what the CPU gives"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    x, y = torch.randn(2, 3, a.side, a.side, generator=torch.Generator().manual_seed(0)), (torch.rand(2, 20, generator=torch.Generator().manual_seed(1))<.1).float()
    cpu, dev = network(a).eval(), network(a).to(a.device).eval(); some = [3, 7]; worst = {}
    for rule in RULES:
        for kind in KINDS:
            want = localize(cpu, x, kind, rule=rule, classes=some)
            for way in ('fused', 'rows'): worst[way] = max(worst.get(way, 0), relative(want, localize_fast(dev, x.to(a.device), kind, rule=rule, classes=some, attention=way)))
    with torch.no_grad(), torch.autocast(torch.device(a.device).type, torch.bfloat16): half = localize_fast(dev, x.to(a.device), classes=some)
    assert half.dtype==torch.float32 and half.isfinite().all()
    def step(model, x, y): model.train().zero_grad(); loss = mct_loss(model(x), y); loss.backward(); return loss.item(), torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])
    (l0, g0), (l1, g1) = step(cpu, x, y), step(dev, x.to(a.device), y.to(a.device))
    q = torch.randn(2, 6, 804, 64, device=a.device, dtype=torch.bfloat16)
    kernel = torch.nn.attention.SDPBackend(torch._fused_sdp_choice(q, q, q)).name
    log('gpu: right', 'CPU and GPU', 'random images', **{f'largest relative difference, {k}': v for k,v in worst.items()}, **{'difference of the loss': abs(l0-l1)/abs(l0), 'relative difference of the gradient': ((g0-g1).norm()/g0.norm()).item(), 'relative difference, bf16': relative(localize(cpu.eval(), x, classes=some), half)})
    print('attention kernel:', kernel); assert kernel!='MATH', 'attention is computed by the plain formula'
    assert max(worst.values())<1e-3 and abs(l0-l1)<1e-3*abs(l0) and (g0-g1).norm()<1e-3*g0.norm()

GPU_NOTEBOOKS = 'nbs/21_attention.ipynb', 'nbs/21a_fast_maps.ipynb'

def cells(a, log):
    "The cells of notebooks marked `gpu`, after all that come before them, in plain Python: no kernel is needed"
    os.environ['MPLBACKEND'] = 'Agg'
    for path in GPU_NOTEBOOKS:
        space, begin = dict(__name__='__main__'), time.time()
        for i,c in enumerate(json.loads((ROOT/path).read_text())['cells']):
            code = ''.join(c['source']); marked = '#| gpu' in code
            if c['cell_type']=='code' and not (marked and a.dry) and not any(w in code for w in ('nbdev_export()', '#| slow', '#| eval: false')): exec(compile(code, f'{path}, cell {i}', 'exec'), space)
        log('gpu: right', f'cells marked gpu: {path}', 'its own', seconds=time.time()-begin)

# ---- speed

def bf16_limit(a, n, repeats=10):
    "TFLOP/s of one product of two n x n matrices in bf16"
    m = torch.randn(n, n, device=a.device, dtype=torch.bfloat16); m @ m; best = float('inf')
    wait = torch.cuda.synchronize if a.device.startswith('cuda') else (lambda: None)
    for _ in range(repeats): wait(); t = time.perf_counter(); m @ m; wait(); best = min(best, time.perf_counter()-t)
    return 2*n**3/best/1e12

def speed(a, log):
    "The benchmarks' own scripts; their rows go to the same file"
    top = bf16_limit(a, 128 if a.dry else 8192); log('gpu: speed', 'product of matrices, bf16', 'random', **{'TFLOP/s': top})
    common = ['--device', a.device, '--threads', '0' if not a.dry else '1', *(['--quick'] if a.dry else ['--json', str(a.json)])]
    jobs = [['extraction.py', '--images', '32', '--sides', '224', '448', '640', '1024', '--batch-size', '8', *(() if a.dry else ('--precision', 'float32', 'bf16', 'fp16'))], *(['train_step.py', '--batch-size', '64', '--memory-batch', '32', '--parts', 'time', 'memory', '--amp', p] for p in ('off', 'bf16'))]
    for job in jobs:
        if subprocess.run([sys.executable, f'benchmarks/{job[0]}', *job[1:], *common], cwd=ROOT).returncode: print('failed:', *job, flush=True)
    if a.dry or not a.json.is_file(): return
    for r in json.loads(a.json.read_text()):
        if r['metric']=='TFLOP/s' and r['table'].startswith('benchmark'): log('gpu: speed', f"share of the limit, {r['row']}", 'random', **{'share of the product in bf16': r['value']/top})

# ---- train

WHOLE = dict(layers=None)                                                      # all blocks
MAPS = dict(v1={'attention': dict(kind='attn', refine=False), 'attention and affinity': dict(kind='attn')},
            v2={'attention': dict(kind='attn', refine=False), 'PatchCAM': dict(kind='patchcam', refine=False), 'attention and affinity': dict(kind='attn'), 'product': dict(kind='fused', refine=False), 'product and affinity': dict(kind='fused')},
            plus={'attention': dict(kind='attn', rule='plus', refine=False, **WHOLE), 'product': dict(kind='fused', rule='plus', refine=False, **WHOLE), 'attention and affinity': dict(kind='attn', rule='plus', **WHOLE), 'product and affinity': dict(kind='fused', rule='plus', **WHOLE)})
NETWORKS = {'v1': dict(variant='v1'), 'v2': dict(variant='v2'), 'plus': dict(variant='plus', image_size=448, batch_size=32, epochs=45),
            'v2, frozen ViT': dict(FROZEN_RECIPE['train'], variant='v2')}

def folder_of(name): return name.replace(', ', '_').replace(' ', '_')

def splits(a):
    return (get_dataset(a.data, s, **({'n': 12} if a.dry else {})) for s in (('train', 'train', 'val') if a.dry else ('trainaug', 'train', 'val')))

def seeds_of(a, log, name, model, score):
    "Every kind of maps on the photos of `train`; the settings of the best, by their masks"
    views = dict(image_size=a.seed_side, batch_size=16, device=a.device, workers=a.workers or 1, precision='bf16' if a.device.startswith('cuda') else 'float32')
    folders = {a.out/f'{folder_of(name)}_seeds'/k.replace(' ', '_'): (k, how) for k,how in MAPS[model.variant].items()}; begin = time.time()
    extract_kinds(model, score, {f: how for f,(_,how) in folders.items()}, **views); took, best = time.time()-begin, (-1, None, None)
    if a.affinity:
        other = OtherAffinity(affinity_vit(a.backbone, a.weights))
        more = {f.with_name(f.name+'_other'): (f'{k}, affinity of the frozen ViT', how) for f,(k,how) in folders.items() if not how.get('refine', True)}
        for f,(_,how) in more.items(): extract_seeds(model, score, f, **how, affinity=other, **views)
        folders |= more
    for f,(k,how) in folders.items():
        r, at = sweep_threshold(f, score), fixed_threshold(f, score, .4)
        log('gpu: seeds', f'{name}: {k}', a.photos('train'), **both(r), background=r.best_threshold, **{f'{m} at background 0.4': v for m,v in both(at).items()})
        if both(r)['mIoU']>best[0]: best = both(r)['mIoU'], k, dict(how, affinity=other) if k.endswith('frozen ViT') else how
    show_seeds(score, next(f for f,(k,_) in folders.items() if k==best[1]), n=8).savefig(a.out/f'{folder_of(name)}.png', bbox_inches='tight')   # photos: to look at, not to publish
    log('gpu: seeds', f'{name}: all kinds', a.photos('train'), **{'photos/s of seeds, all own kinds': len(score)/took})
    return best[1:], views

def chain(a, log, name, model, best, views, data):
    "Pseudo masks and a segmentation network from the best kind of maps, background 0.4"
    (kind, how), (aug, score, val), out = best, data, a.out/f'{folder_of(name)}_chain'; begin = time.time()
    extract_seeds(model, aug, out/'seeds', **how, **views); make_crf_masks(out/'seeds', aug, out/'masks', background=.4, crf='auto', workers=a.workers or 1)
    log('gpu: chain', f'{name}: masks from {kind}', a.photos('train'), **both(score_masks(out/'masks', score)), seconds=time.time()-begin); begin = time.time()
    net = FROZEN_RECIPE['segment'] | dict(pretrained=packaged_weights('tf_efficientnet_lite0')) | (dict(epochs=1, crop=64, width=16, batch_size=4) if a.dry else {})
    deeplab = train_segment(out/'masks', aug, out/'deeplab', device=a.device, log=lambda _: None, workers=a.workers, **net)
    ways = {'': None, ', CRF': 'auto'}; folders = {w: out/f'val{w[2:]}' for w in ways}
    segment_kinds(deeplab, val, {folders[w]: crf for w,crf in ways.items()}, scales=(1,) if a.dry else (.75, 1, 1.25), flip=not a.dry, device=a.device, workers=a.workers or 1)
    for w in ways: log('gpu: chain', f'{name}: segmentation{w}', a.photos('val'), **both(score_masks(folders[w], val)), seconds=time.time()-begin)

def networks(a, log):
    "One classifier after another, each with its seeds; then the second half from the best maps of the last"
    data = aug, score, val = tuple(splits(a))
    for name in a.networks:
        how = dict(image_size=224, batch_size=64, epochs=a.epochs, aug='reference', valid_aug='squash') | NETWORKS[name] | dict(backbone=a.backbone)
        how |= dict(image_size=96, batch_size=6, epochs=1, per_step=True) if a.dry else {}; begin = time.time()
        run = train_classifier(aug, val, out=a.out/folder_of(name), pretrained=a.weights or False, device=a.device, workers=a.workers, cache=True, amp='bf16' if a.device.startswith('cuda') else 'off', log=lambda _: None, **how)
        took, model = time.time()-begin, load_run(run)[0]; row = pd.read_csv(run/'history.csv').iloc[-1]
        log('gpu: training', name, a.photos('trainaug'), **{'mAP of val': row.map_cls, 'seconds': took, 'photos/s': len(aug)*how['epochs']/took})
        best, views = seeds_of(a, log, name, model, score)
    if a.chain: chain(a, log, name, model, best, views, data)

def train(a, log):
    "The networks side by side, because photos are prepared by processors and one network does not fill a GPU; each job has a log of its own"
    me = [sys.executable, __file__, '--data', a.data, '--backbone', a.backbone, '--device', a.device, '--out', str(a.out), '--epochs', str(a.epochs), '--workers', str(a.workers//4), *(['--weights', a.weights] if a.weights else []), *(['--dry'] if a.dry else [])]
    jobs = {folder_of(n): [*me, '--parts', 'networks', '--networks', n, *(['--chain'] if n=='v2' else [])] for n in NETWORKS}   # the paper's second half from V2's maps alone: its CRF takes all processors for a minute
    if a.masks and not a.dry: jobs['decoders'] = [sys.executable, str(ROOT/'experiments/beyond_photos.py'), '--data', a.data, '--chain', a.masks, '--parts', 'decoders', '--backbone', a.backbone, '--weights', a.weights, '--device', a.device, '--steps', str(a.steps), '--out', str(a.out/'decoders')]
    if not a.dry: jobs['cells'] = [*me, '--parts', 'cells']
    a.out.mkdir(parents=True, exist_ok=True); files = {k: a.out/f'{k}.json' for k in jobs}
    running = {k: subprocess.Popen([*job, *([] if a.dry else ['--json', str(files[k])])], stdout=open(a.out/f'{k}.log', 'w'), stderr=subprocess.STDOUT, env=dict(os.environ, OMP_NUM_THREADS='1')) for k,job in jobs.items()}
    done = {k: p.wait() for k,p in running.items()}
    for k,rc in done.items():
        print(f'---- {k}: ' + ('done' if not rc else f'failed ({rc})'), *[l for l in (a.out/f'{k}.log').read_text(errors='replace').split('\n')[-40:] if l and '\r' not in l], sep='\n', flush=True)
        if files[k].is_file() and a.json and not a.dry: save_records(a.json, load_records(files[k]))
    assert not any(done.values()), f'failed: {[k for k,rc in done.items() if rc]}, see {a.out}/*.log'

def main(a):
    if a.dry: a.device, a.backbone, a.weights, a.data, a.side, a.workers, a.seed_side, a.affinity = a.device or 'cpu', 'mct_tiny_patch8_96', None, 'mini', 96, 0, 96, False
    a.device = a.device or 'cuda'
    assert a.device=='cpu' or torch.cuda.is_available(), 'no GPU was found; --dry runs the steps on the CPU'
    assert a.dry or not {'train', 'networks'} & {*a.parts} or a.data, 'give photos: --data voc:PATH'
    a.photos = lambda split: f'{"mini" if a.dry else "VOC animals"}, {split}'
    log = Log(a); print(torch.cuda.get_device_name() if a.device.startswith('cuda') else 'dry run on the CPU', 'torch', torch.__version__, flush=True)
    for part in a.parts: dict(right=right, speed=speed, train=train, networks=networks, cells=cells)[part](a, log)
    print(f'done in {time.time()-log.start:.0f} s')

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); A = p.add_argument
    A('--data', help='voc:PATH of photographs'); A('--backbone', default='deit_small_patch16_224'); A('--weights', help='of the backbone, a file; without it random'); A('--device', help='default cuda, with --dry cpu')
    A('--out', type=Path, default=Path('runs/gpu')); A('--json', type=Path, default=Path('results/gpu.json')); A('--parts', nargs='+', choices=['right', 'cells', 'speed', 'train', 'networks'], default=['right', 'speed', 'train'])
    A('--epochs', type=int, default=60); A('--steps', type=int, default=3000, help='of the decoders'); A('--networks', nargs='+', choices=[*NETWORKS], default=['v2']); A('--chain', action='store_true', help='masks and a segmentation network from the last one'); A('--masks', help='folder with masks/ of trainaug: decoders learn from them'); A('--no-affinity', dest='affinity', action='store_false', help='no affinity of the frozen ViT')
    A('--seed-side', type=int, default=322, help='shorter side of photos for seeds'); A('--side', type=int, default=448, help='of the images of `right`'); A('--workers', type=int, default=min(12, os.cpu_count() or 1)); A('--dry', action='store_true', help='tiny, on the CPU, nothing is recorded')
    main(p.parse_args())
