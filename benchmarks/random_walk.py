"""The sparse random walk against repeated squaring of the dense matrix: time, peak extra memory, largest difference.

    python benchmarks/random_walk.py [--sizes 47x63 128x128] [--maps 21] [--steps 256] [--device cpu] [--json results/bench_random_walk.json]

47 x 63 cells are a photo of 500 x 375 pixels. Affinities of smooth random features, radius 5, power 8. Both run in this process by turns: ours, dense, ours. Time is CPU time
of the process on the CPU, so that other programs do not count, and elapsed time on a GPU. Extra memory is the peak of the process during the call minus what it held before. Grids of more
than `--dense-limit` cells are walked by ours only: the eight squarings of 2^8 steps are 70 TFLOP for 128 x 128 cells, and hold 2 GB."""
import argparse, ctypes, datetime, json, os, platform, subprocess, sys, time
from pathlib import Path
import numpy as np, torch

ROOT = Path(__file__).resolve().parents[1]; sys.path.insert(0, str(ROOT))
from mctformer_nb.affinitynet import pair_affinity, pair_offsets
from mctformer_nb.random_walk import random_walk

# ---- the dense version, as PSA has it

def spans(d, n): return slice(max(0, -d), n-max(0, d)), slice(max(0, d), n-max(0, -d))

def dense_transition(affinity, offsets, beta):
    P, h, w = affinity.shape; i = torch.arange(h*w, device=affinity.device).view(h, w)
    W = torch.eye(h*w, device=affinity.device)
    for a,(dy,dx) in zip(affinity**beta, offsets.tolist()):
        (y, y2), (x, x2) = spans(dy, h), spans(dx, w)
        s, t = i[y, x].flatten(), i[y2, x2].flatten(); W[s, t] = W[t, s] = a[y, x].flatten()
    return W.div_(W.sum(0))

def walk_dense(maps, affinity, beta, steps):
    T = dense_transition(affinity, pair_offsets(5), beta)
    for _ in range(steps.bit_length()-1): T = T @ T                                    # steps is a power of two
    return (maps.flatten(1) @ T).view(maps.shape)

# ---- measuring one call

def held(key='VmRSS'): return next(int(l.split()[1])*1024 for l in open('/proc/self/status') if l.startswith(key))

def measure(f, device):
    "(seconds, extra bytes, result)"
    if device.startswith('cuda'):
        torch.cuda.reset_peak_memory_stats(); base = torch.cuda.memory_allocated(); torch.cuda.synchronize(); t = time.perf_counter()
        r = f(); torch.cuda.synchronize(); return time.perf_counter()-t, torch.cuda.max_memory_allocated()-base, r
    ctypes.CDLL('libc.so.6').malloc_trim(0)                                            # freed pages would hide part of the growth
    Path('/proc/self/clear_refs').write_text('5'); base = held(); t = time.process_time() # 5: start the peak (VmHWM) anew
    r = f(); return time.process_time()-t, held('VmHWM')-base, r

def compare(h, w, a):
    g = torch.Generator().manual_seed(0)
    f = torch.nn.functional.interpolate(3*torch.randn(1, 16, h//4+2, w//4+2, generator=g), (h, w), mode='bilinear')  # (1,16,h,w)
    affinity, maps = pair_affinity(f, pair_offsets(5))[0].to(a.device), torch.rand(a.maps, h, w, generator=g).to(a.device)
    for walk in (random_walk, walk_dense): walk(maps[:, :8, :8], affinity[:, :8, :8].clone(), a.beta, 2)                # libraries loaded
    turns = [random_walk] + [walk_dense, random_walk]*(a.repeats if h*w<=a.dense_limit else 0)
    got = [(f is walk_dense, *measure(lambda: f(maps, affinity, a.beta, a.steps), a.device)) for f in turns]
    best = lambda dense, k: min((r[k] for r in got if r[0]==dense), default=None)
    row = dict(cells=f'{h} x {w}', seconds=round(best(False, 1), 3), extra_mb=round(best(False, 2)/2**20, 1))
    if best(True, 1) is None: return row
    p, o = next(r[3] for r in got if r[0]), got[0][3]
    return row | dict(seconds_dense=round(best(True, 1), 2), times_faster=round(best(True, 1)/best(False, 1), 1), extra_mb_dense=round(best(True, 2)/2**20, 1),
                      memory_ratio=round(best(False, 2)/best(True, 2), 4), max_difference=(p-o).abs().max().item())

# ---- the table

def hardware(device):
    if device.startswith('cuda'): return torch.cuda.get_device_name()
    name = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.processor())
    return f'{name}, {torch.get_num_threads()} of {os.cpu_count()} cores'

def records(rows, a):
    git = lambda *c: subprocess.run(['git', *c], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    common = dict(table='benchmark: random walk', dataset=f'random features, {a.maps} maps, {a.steps} steps, torch {torch.__version__}', commit=git('rev-parse', '--short', 'HEAD'), seed=0, hardware=hardware(a.device),
                  command=f"python benchmarks/random_walk.py --sizes {' '.join(a.sizes)} --maps {a.maps} --steps {a.steps} --device {a.device} --repeats {a.repeats}", date=datetime.date.today().isoformat())
    return [dict(common, row=r['cells'], metric=m, value=v) for r in rows for m,v in r.items() if m != 'cells']

def main(a):
    print('cells      seconds dense    ours  times faster   extra MB dense   ours   max difference', flush=True); rows = []
    for s in a.sizes:
        r = compare(*map(int, s.split('x')), a); rows.append(r)
        d = lambda k, spec: format(r[k], spec) if k in r else '-'.rjust(int(spec.split('.')[0]))
        print(f"{r['cells']:10} {d('seconds_dense', '13.2f')} {r['seconds']:7.3f} {d('times_faster', '13.1f')} {d('extra_mb_dense', '16.0f')} {r['extra_mb']:6.0f} {d('max_difference', '16.1e')}", flush=True)
    if a.json: Path(a.json).write_text(json.dumps(records(rows, a), indent=1)+'\n')

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--sizes', nargs='+', default=['47x63', '128x128']); p.add_argument('--maps', type=int, default=21); p.add_argument('--steps', type=int, default=256); p.add_argument('--beta', type=float, default=8)
    p.add_argument('--repeats', type=int, default=1); p.add_argument('--dense-limit', type=int, default=4096); p.add_argument('--device', default='cpu'); p.add_argument('--json')
    a = p.parse_args()
    if a.steps < 1 or a.steps & (a.steps-1): p.error('--steps is a power of two, for the dense version')
    main(a)
