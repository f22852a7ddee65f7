"""What the benchmark scripts share: variants that take turns in one process, the time and memory of each, and the records in results/bench.json.

Ours and the plain version run one after the other, round after round, so that a busy or throttled machine slows both alike; each round gives one ratio and
the median counts. On the CPU the ratio is that of the process's CPU time, which other programs hardly change, and elapsed time stands beside it. On a GPU (`--device cuda`)
both are the time between two CUDA events. Extra memory is the peak during the call minus what was held before: resident memory on the CPU (Linux), allocated memory on a GPU."""
import argparse, ctypes, re, statistics, sys, time
from pathlib import Path
import torch

ROOT = Path(__file__).resolve().parents[1]; sys.path.insert(0, str(ROOT))
from mctformer_nb.tables import hardware, new_record, save_records

def parser(doc, repeats=5):
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter); A = p.add_argument
    A('--device', default='cpu', help='cpu or cuda'); A('--threads', type=int, default=1, help='of torch; every variant has the same')
    A('--repeats', type=int, default=repeats, help='rounds'); A('--json', type=Path, help='add records to this file'); A('--quick', action='store_true', help='tiny sizes, to see that it runs')
    return p

def held(key='VmRSS'): return next(int(l.split()[1])*1024 for l in open('/proc/self/status') if l.startswith(key))

def measure(f, device='cpu'):
    "(CPU seconds, elapsed seconds, extra bytes, result) of one call; on a GPU the first two are both the GPU's"
    if device.startswith('cuda'):
        torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats(); base = torch.cuda.memory_allocated(); a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record(); r = f(); b.record(); torch.cuda.synchronize(); s = a.elapsed_time(b)/1000
        return s, s, torch.cuda.max_memory_allocated()-base, r
    linux = sys.platform=='linux'
    if linux: ctypes.CDLL('libc.so.6').malloc_trim(0); Path('/proc/self/clear_refs').write_text('5'); base = held()   # freed pages given back; 5: start the peak (VmHWM) anew
    t, c = time.perf_counter(), time.process_time(); r = f(); c, t = time.process_time()-c, time.perf_counter()-t
    return c, t, held('VmHWM')-base if linux else float('nan'), r

def by_turns(variants, repeats, device='cpu', warm=None):
    "{name: function} -> {name: dict(cpu, wall, mem: lists over rounds; result: of the last)}; `warm` is called first, or every function once if it is None"
    for f in variants.values() if warm is None else [warm]: f()
    got = {k: dict(cpu=[], wall=[], mem=[], result=None) for k in variants}
    for _ in range(repeats):
        for k,f in variants.items():
            got[k]['result'] = None; *numbers, got[k]['result'] = measure(f, device)
            for n,v in zip(('cpu', 'wall', 'mem'), numbers): got[k][n].append(v)
    return got

def ratio(plain, ours, key='cpu'): return statistics.median(p/max(o, 1e-9) for p,o in zip(plain[key], ours[key]))

def compare(plain, ours, wall=False):
    "Metrics of one row: plain over ours, above 1 where ours is better; `wall`: several processes, so elapsed time counts"
    med, key = statistics.median, 'wall' if wall else 'cpu'
    row = {'times faster': ratio(plain, ours, key), 'times faster, elapsed': ratio(plain, ours, 'wall'), 'seconds plain': med(plain[key]), 'seconds': med(ours[key])}
    mb = lambda g: med(g['mem'])/2**20
    if not wall and mb(plain)==mb(plain): row |= {'extra MB plain': mb(plain), 'extra MB': mb(ours), 'times less memory': mb(plain)/max(mb(ours), .1)}
    return row

def difference(plain, ours): return ((plain-ours).abs().max()/plain.abs().max()).item()

class Report:
    "Prints rows as they are measured and keeps them for the records file"
    def __init__(self, table, args, dataset, seed=0):
        self.table, self.args, self.dataset, self.seed, self.rows = table, args, dataset, seed, []
        if args.threads: torch.set_num_threads(args.threads)
        print(f'{table} ({hardware()}, {torch.get_num_threads()} thread{"s"*(torch.get_num_threads()>1)}; {dataset})', flush=True)
    def add(self, row, metrics, target=None, **notes):
        "One row; `target` {metric: least value} of what was hoped for; `notes` go into every record of the row, such as what bounds it"
        print(f'  {row:44}', '  '.join(f'{k} {v:.3g}' for k,v in metrics.items()), *(f'  [{k} {v}: {"reached" if metrics[k]>=v else "MISSED"}]' for k,v in (target or {}).items()), flush=True)
        self.rows.append((row, metrics, target or {}, notes))
    def save(self):
        a = self.args
        if not a.json or a.quick: return
        command = re.sub(r' --(json|out) \S+', '', 'python benchmarks/' + ' '.join([Path(sys.argv[0]).name, *sys.argv[1:]]))   # where the records went says nothing of them
        extra = lambda target, m: dict(threads=torch.get_num_threads(), torch=torch.__version__.split('+')[0], rounds=a.repeats, **({'target': target[m]} if m in target else {}))
        save_records(a.json, [new_record(self.table, row, float(f'{v:.4g}'), m, self.dataset, self.seed, command, **extra(target, m), **notes) for row,ms,target,notes in self.rows for m,v in ms.items()])
