"""The sparse random walk against repeated squaring of the dense matrix.

    python benchmarks/random_walk.py [--sizes 24x32 47x63 128x128] [--maps 21] [--steps 256] [--device cpu] [--json results/bench.json]

47 x 63 cells are a photo of 500 x 375 pixels. Affinities of smooth random features, radius 5, power 8. Grids of more than `--dense-limit` cells are walked by ours only: the eight squarings of
2^8 steps are 70 TFLOP for 128 x 128 cells, and hold 2 GB."""
import torch
from _common import Report, by_turns, compare, parser
from mctformer_nb.pairs import pair_affinity, pair_offsets
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

def one_size(h, w, a, report):
    g = torch.Generator().manual_seed(0)
    f = torch.nn.functional.interpolate(3*torch.randn(1, 16, h//4+2, w//4+2, generator=g), (h, w), mode='bilinear')  # (1,16,h,w)
    affinity, maps = pair_affinity(f, pair_offsets(5))[0].to(a.device), torch.rand(a.maps, h, w, generator=g).to(a.device)
    both = {'ours': random_walk} | ({'plain': walk_dense} if h*w<=a.dense_limit else {})
    warm = lambda: [walk(maps[:, :8, :8], affinity[:, :8, :8].clone(), a.beta, 2) for walk in (random_walk, walk_dense)]  # libraries loaded
    got = by_turns({k: (lambda walk=walk: walk(maps, affinity, a.beta, a.steps)) for k,walk in both.items()}, a.repeats, a.device, warm)
    row = {'seconds': sorted(got['ours']['cpu'])[a.repeats//2], 'extra MB': sorted(got['ours']['mem'])[a.repeats//2]/2**20, 'cells': h*w}
    if 'plain' in got: row |= compare(got['plain'], got['ours']) | {'largest difference': (got['plain']['result']-got['ours']['result']).abs().max().item()}
    report.add(f'{h} x {w} cells, {a.steps} steps', row, {'times faster': 20} if (h, w, a.steps)==(47, 63, 256) else None)

def main(a):
    if a.quick: a.sizes, a.repeats = ['8x10'], 1
    torch.set_flush_denormal(True)                                                     # for both: products of tiny numbers would make the dense version ten times slower
    report = Report('benchmark: random walk', a, f'random features, {a.maps} maps')
    for s in a.sizes: one_size(*map(int, s.split('x')), a, report)
    report.save()

if __name__ == '__main__':
    p = parser(__doc__, 3); A = p.add_argument
    A('--sizes', nargs='+', default=['24x32', '36x48', '47x63', '94x126', '128x128']); A('--maps', type=int, default=21); A('--steps', type=int, default=256); A('--beta', type=float, default=8)
    A('--dense-limit', type=int, default=4096)
    a = p.parse_args()
    if a.steps < 1 or a.steps & (a.steps-1): p.error('--steps is a power of two, for the dense version')
    main(a)
