"""Map extraction, `localize` against a plain version that keeps all attention probabilities: time, peak extra memory, largest difference.

    python benchmarks/extraction.py [--sizes 640 1024] [--device cpu] [--json results/bench_extraction.json]

DeiT-S with random weights, 20 classes, V2, fused over 3 layers and refined by the affinity of all 12. Each measurement runs in a fresh process.
Extra memory is the peak of the process during the call minus what it held before (model and image): resident memory on the CPU (Linux),
allocated memory on a GPU. The plain version at 1024 x 1024 needs about 6 GB."""
import argparse, ctypes, datetime, json, os, platform, subprocess, sys, tempfile, time
from pathlib import Path
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
C, K = 20, 3

# ---- the plain version, from the formulas: every layer's (B,H,N,N) probabilities are kept

def block_plain(b, t):
    "One transformer block and its attention probabilities"
    B, N, D = t.shape; H = b.attn.num_heads
    q, k, v = b.attn.qkv(b.norm1(t)).reshape(B, N, 3, H, D//H).permute(2, 0, 3, 1, 4) # (B,H,N,d) each
    a = (q @ k.transpose(-2, -1) * (D//H)**-.5).softmax(-1)
    t = t + b.attn.proj((a @ v).transpose(1, 2).reshape(B, N, D))
    return t + b.mlp(b.norm2(t)), a

def localize_plain(model, x):
    t, (h, w) = model.tokens(x); attns = []
    for b in model.blocks: t, a = block_plain(b, t); attns.append(a)
    f = model.head(t[:, C:].transpose(1, 2).unflatten(2, (h, w))).relu()               # PatchCAM (B,C,h,w)
    attns = [a.mean(1) for a in attns]                                                 # heads averaged: (B,N,N) each
    m = sum(a[:, :C, C:] for a in attns[-K:]).unflatten(2, (h, w)) * f                 # Eq. 2 and 6
    return (m.flatten(2) @ sum(a[:, C:, C:] for a in attns).transpose(1, 2)).unflatten(2, (h, w)) # Eq. 7

# ---- measuring one call in this process

def held(key='VmRSS'): return next(int(l.split()[1])*1024 for l in open('/proc/self/status') if l.startswith(key))

def extra_memory(f, device):
    "Bytes by which the peak during f() exceeds what was held before"
    if device.startswith('cuda'):
        torch.cuda.reset_peak_memory_stats(); base = torch.cuda.memory_allocated(); f(); return torch.cuda.max_memory_allocated()-base
    ctypes.CDLL('libc.so.6').malloc_trim(0)                                            # freed pages would hide part of the growth
    Path('/proc/self/clear_refs').write_text('5'); base = held(); f()                  # 5: start the peak (VmHWM) anew
    return held('VmHWM')-base

@torch.no_grad()
def child(a):
    sys.path.insert(0, str(ROOT))
    from mctformer_nb.attention import localize
    from mctformer_nb.mctformer import MCTformer
    torch.manual_seed(0); model = MCTformer(C, 'v2', 'deit_small_patch16_224').to(a.device).eval()
    model.cls_token.data += .5*torch.randn_like(model.cls_token)                       # fresh class tokens are copies of each other
    for b in model.blocks: b.attn.qkv.weight.data *= 4                                 # sharper attention than at the start
    x = torch.randn(1, 3, a.size, a.size, device=a.device)
    run = lambda x=x: (localize if a.child == 'ours' else localize_plain)(model, x)
    run(x[..., :64, :64])                                                              # libraries and kernels loaded
    mem = extra_memory(run, a.device); times = []
    for _ in range(a.repeats):
        t = time.perf_counter(); maps = run().cpu(); times.append(time.perf_counter()-t)
    torch.save(dict(mem=mem, seconds=min(times), maps=maps), a.out)

# ---- the table

def measure(size, which, a):
    with tempfile.TemporaryDirectory() as d:
        cmd = [sys.executable, __file__, '--child', which, '--size', str(size), '--out', f'{d}/r.pt', '--device', a.device, '--repeats', str(a.repeats)]
        subprocess.run(cmd, check=True); return torch.load(f'{d}/r.pt')

def hardware(device):
    if device.startswith('cuda'): return torch.cuda.get_device_name()
    name = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.processor())
    return f'{name}, {torch.get_num_threads()} of {os.cpu_count()} cores'

def records(rows, a):
    git = lambda *c: subprocess.run(['git', *c], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    common = dict(table='benchmark: map extraction', dataset=f'random image, torch {torch.__version__}', commit=git('rev-parse', '--short', 'HEAD'), seed=0, hardware=hardware(a.device),
                  command=f"python benchmarks/extraction.py --sizes {' '.join(map(str, a.sizes))} --device {a.device} --repeats {a.repeats}", date=datetime.date.today().isoformat())
    return [dict(common, row=f'{r["size"]} x {r["size"]}', metric=m, value=v) for r in rows for m,v in r.items() if m != 'size']

def main(a):
    print('side  seconds plain  ours  ratio   extra MB plain   ours  ratio   max difference / max', flush=True); rows = []
    for s in a.sizes:
        p, o = measure(s, 'plain', a), measure(s, 'ours', a)
        err = ((p['maps']-o['maps']).abs().max()/p['maps'].abs().max()).item()
        rows.append(dict(size=s, seconds_plain=round(p['seconds'], 3), seconds=round(o['seconds'], 3), time_ratio=round(o['seconds']/p['seconds'], 4),
                         extra_mb_plain=round(p['mem']/2**20, 1), extra_mb=round(o['mem']/2**20, 1), memory_ratio=round(o['mem']/p['mem'], 4), max_relative_difference=err))
        r = rows[-1]
        print(f"{s:4d} {r['seconds_plain']:14.2f} {r['seconds']:5.2f} {r['time_ratio']:6.2f} {r['extra_mb_plain']:16.0f} {r['extra_mb']:6.0f}   1/{1/r['memory_ratio']:.1f}   {err:.1e}", flush=True)
    if a.json: Path(a.json).write_text(json.dumps(records(rows, a), indent=1)+'\n')

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--sizes', type=int, nargs='+', default=[640, 1024]); p.add_argument('--device', default='cpu'); p.add_argument('--repeats', type=int, default=1); p.add_argument('--json')
    p.add_argument('--child', help=argparse.SUPPRESS); p.add_argument('--size', type=int, help=argparse.SUPPRESS); p.add_argument('--out', help=argparse.SUPPRESS)
    a = p.parse_args(); child(a) if a.child else main(a)
