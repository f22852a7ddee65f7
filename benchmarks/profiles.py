"""Where the time of a training step and of map extraction goes, by kind of operation: this library beside the plain version, and how near the matrix products come to what the processor can do.

    python benchmarks/profiles.py [--batch-size 16] [--threads 1] [--json results/bench.json]

Seconds are those torch's profiler gives to the operations themselves, of one call after two others. The limit of a processor is taken as the speed of one product of two matrices of 2048 x 2048."""
import time
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from _common import Report, parser
from extraction import localize_plain, make_model as extraction_model
from mctformer_nb.fast_maps import localize_fast
from train_step import as_timm, images, make_model, step

KINDS = {'linear layers': ('aten::mm', 'aten::addmm'), 'attention': ('aten::bmm', 'aten::baddbmm', 'aten::_softmax', 'aten::_softmax_backward_data', 'aten::_scaled_dot'), 'GELU': ('aten::gelu',), 'LayerNorm': ('aten::native_layer_norm',),
         'convolutions': ('aten::mkldnn_convolution', 'aten::convolution_backward', 'aten::_slow_conv', 'aten::slow_conv', 'aten::thnn_conv')}

def kind(name): return next((k for k,starts in KINDS.items() if any(name==s or name.startswith(s+'_') or s in ('aten::_scaled_dot', 'aten::gelu', 'aten::native_layer_norm') and name.startswith(s) for s in starts)), 'sums, copies, optimiser and the rest')

def seconds_by_kind(f):
    "Seconds of one call by kind of operation"
    for _ in range(2): f()
    with profile(activities=[ProfilerActivity.CPU]) as p: f()
    found = dict.fromkeys([*KINDS, 'sums, copies, optimiser and the rest'], 0.)
    for e in p.key_averages(): found[kind(e.key)] += e.self_cpu_time_total/1e6
    return found

def linear_flops(f):
    "Operations (two a multiply-add) in linear layers of one call"
    with FlopCounterMode(display=False) as counter: f()
    return sum(v for op,v in counter.get_flop_counts()['Global'].items() if str(op) in ('aten.mm', 'aten.addmm'))

def limit(n=2048, repeats=5):
    "GFLOP/s of one large matrix product"
    a, b = torch.randn(n, n), torch.randn(n, n); a @ b; best = float('inf')
    for _ in range(repeats): t = time.process_time(); a @ b; best = min(best, time.process_time()-t)
    return 2*n**3/best/1e9

def main(a):
    if a.quick: a.batch_size, train, side, n = 2, 64, 64, 128
    else: train, side, n = 224, 448, 2048
    report = Report('benchmark: profile', a, 'random images')
    top = limit(n); report.add(f'product of {n} x {n} matrices', {'GFLOP/s': top})
    x, y = images(a.batch_size, train, 'cpu'); models = {True: as_timm(make_model('cpu')), False: make_model('cpu')}; opts = {k: torch.optim.AdamW(m.parameters(), lr=1e-5) for k,m in models.items()}; view = torch.randn(1, 3, side, side); maps = extraction_model('cpu')
    def maps_of(f):
        with torch.no_grad(): return f()
    calls = {f'training step {train} x {train}, batch {a.batch_size}': lambda plain: step(models[plain], opts[plain], x, y, plain, 'off', 'cpu'),
             f'one view {side} x {side}': lambda plain: maps_of(lambda: localize_plain(maps, view)[:, [3, 7]] if plain else localize_fast(maps, view, classes=[3, 7]))}
    for name,f in calls.items():
        for plain in (True, False):
            s = seconds_by_kind(lambda: f(plain)); reached = linear_flops(lambda: f(plain))/max(s['linear layers'], 1e-9)/1e9
            report.add(f'{name}, {"plain" if plain else "ours"}', {f'seconds, {k}': v for k,v in s.items()} | {'seconds': sum(s.values()), 'GFLOP/s in linear layers': reached, 'share of the limit': reached/top})
    report.save()

if __name__ == '__main__':
    p = parser(__doc__, 1); p.add_argument('--batch-size', type=int, default=16); main(p.parse_args())
