"""What only a GPU can tell, in one run of some minutes: is everything right there, how fast is it, and what do 60 epochs of the paper's networks give on real photographs.

    bash experiments/gpu.sh --data voc:PATH/VOC2012 --weights vit_small_patch16_224.pth [--out runs/gpu] [--json results/gpu.json]
    python experiments/gpu.py --dry --out runs/gpu_dry     # the same steps on the CPU, a tiny network and drawn scenes: nothing is recorded

`--parts right speed train`. Nothing is fetched and nothing built; every stage of `train` goes on where it stopped.

* right: maps of every rule and kind and one training step, CPU = GPU to 1e-3; half precision; the fused attention kernel is the one that runs; the cells of the notebooks marked `gpu`, where the tools that run notebooks are installed
* speed: `benchmarks/extraction.py`, `benchmarks/train_step.py`, and the speed of one large matrix product in bf16, of which the steps' share is told
* train: V1, V2 and MCTformer+, each with its seeds; pseudo masks from the best of them by the photo's edges; a DeepLab on these, scored on unseen photos"""
import argparse, json, os, subprocess, sys, time
from importlib.util import find_spec
from pathlib import Path
import torch
ROOT = Path(__file__).resolve().parents[1]; sys.path.insert(0, str(ROOT))
from mctformer_nb.attention import KINDS, RULES, localize
from mctformer_nb.crf_masks import make_crf_masks
from mctformer_nb.datasets import get_dataset
from mctformer_nb.deeplab import train_segment
from mctformer_nb.fast_maps import localize_fast
from mctformer_nb.mctformer import MCTformer
from mctformer_nb.runs import load_run, packaged_weights
from mctformer_nb.scores import score_masks, sweep_threshold
from mctformer_nb.seeds import extract_seeds
from mctformer_nb.segment import segment_dataset
from mctformer_nb.tables import new_record, save_records
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
    if a.dry or find_spec('nbclient') is None or find_spec('nbdev') is None: return print('cells marked gpu: not run', '' if a.dry else '(nbclient and nbdev are not installed)')
    subprocess.run([sys.executable, 'tools/nbrun.py', '--check', '--flags', 'gpu', 'nbs/21_attention.ipynb', 'nbs/21a_fast_maps.ipynb'], cwd=ROOT, check=True)

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

def train(a, log):
    data, out = a.data.split(':')[0], a.out; aug, score, val = (get_dataset(a.data, s, **({'n': 12} if a.dry else {})) for s in (('train', 'train', 'val') if a.dry else ('trainaug', 'train', 'val')))
    name = 'mini' if a.dry else 'VOC animals'; best = (-1., None)
    sizes = dict(image_size=96, batch_size=6, epochs=1, aug='light') if a.dry else dict(image_size=224, batch_size=64, epochs=a.epochs, workers=a.workers, cache=True)
    for variant in ('v1', 'v2', 'plus'):
        how = dict(sizes, variant=variant, backbone=a.backbone, pretrained=a.weights or False, device=a.device, lr=a.lr)
        if variant=='plus' and not a.dry: how |= dict(image_size=448, batch_size=32, repeat=2)
        begin = time.time(); run = train_classifier(aug, val, out=out/variant, log=lambda _: None, **how); took = time.time()-begin; model = load_run(run)[0]
        maps = dict(rule='plus', layers=None, scales=(1, .75, 1.25)) if variant=='plus' else {}
        begin = time.time(); extract_seeds(model, score, out/f'{variant}_seeds', device=a.device, batch_size=16, image_size=how['image_size'], **maps); r = sweep_threshold(out/f'{variant}_seeds', score)
        log('gpu: training', variant, f'{name}, train', mIoU=r.best_miou, **{'seconds of training': took, 'seconds of seeds': time.time()-begin, 'photos/s of training': len(aug)*sizes['epochs']/took})
        if r.best_miou>best[0]: best = (r.best_miou, variant, model, dict(image_size=how['image_size'], **maps), r.best_threshold)
    _, variant, model, maps, background = best; begin = time.time()
    extract_seeds(model, aug, out/'seeds', device=a.device, batch_size=16, **maps); make_crf_masks(out/'seeds', aug, out/'masks', background=background, crf='auto', workers=a.workers or 1)
    log('gpu: training', f'masks from {variant}', f'{name}, train', mIoU=score_masks(out/'masks', score).miou, seconds=time.time()-begin); begin = time.time()
    net = dict(backbone='tf_efficientnet_lite0', pretrained=packaged_weights('tf_efficientnet_lite0'), optimizer='adamw', lr=2e-4, head_mult=5, dilation=6, width=256, output_stride=16, batch_size=8, cache=True)
    deeplab = train_segment(out/'masks', aug, out/'deeplab', device=a.device, log=lambda _: None, **net | (dict(epochs=1, crop=64, width=16, batch_size=4) if a.dry else dict(epochs=20, crop=256, workers=a.workers)))
    segment_dataset(deeplab, val, out/'val_masks', scales=(1,) if a.dry else (.75, 1, 1.25), flip=not a.dry, device=a.device, workers=a.workers or 1)
    log('gpu: training', 'segmentation of unseen photos', f'{name}, val', mIoU=score_masks(out/'val_masks', val).miou, seconds=time.time()-begin)

def main(a):
    if a.dry: a.device, a.backbone, a.weights, a.data, a.side, a.workers, a.lr = 'cpu', 'mct_tiny_patch8_96', None, 'mini', 96, 0, 1e-3
    assert a.dry or torch.cuda.is_available(), 'no GPU was found; --dry runs the steps on the CPU'
    assert a.dry or 'train' not in a.parts or a.data, 'give photos: --data voc:PATH'
    log = Log(a); print(torch.cuda.get_device_name() if a.device.startswith('cuda') else 'dry run on the CPU', 'torch', torch.__version__, flush=True)
    for part in a.parts: dict(right=right, speed=speed, train=train)[part](a, log)
    print(f'done in {time.time()-log.start:.0f} s')

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); A = p.add_argument
    A('--data', help='voc:PATH of photographs'); A('--backbone', default='deit_small_patch16_224'); A('--weights', help='of the backbone, a file; without it random'); A('--device', default='cuda')
    A('--out', type=Path, default=Path('runs/gpu')); A('--json', type=Path, default=Path('results/gpu.json')); A('--parts', nargs='+', choices=['right', 'speed', 'train'], default=['right', 'speed', 'train'])
    A('--epochs', type=int, default=60); A('--lr', type=float, default=1e-4); A('--side', type=int, default=448, help='of the images of `right`'); A('--workers', type=int, default=min(12, os.cpu_count() or 1)); A('--dry', action='store_true', help='tiny, on the CPU, nothing is recorded')
    main(p.parse_args())
