"""How far measured numbers stay from the limits that notebooks and tests assert, under the instructions and threads of other processors.

    python tools/margins.py --out margins                 # runs all, setting by setting; run again, it goes on
    python tools/margins.py --out margins default avx2    # these settings only
    python tools/margins.py --out margins --table         # only the table: limits that lie within three spreads of what was measured

Every comparison of an `assert` and every `allclose`, `assert_close` and `test_close` that sees a fraction is noted with both sides; `distance` is how far it is inside its limit,
`spread` how much that differs between settings. A comparison that fails is noted like any other, and the notebook or test fails as ever."""
import argparse, ast, json, os, subprocess, sys, time
from collections import defaultdict
from pathlib import Path

ROOT, NOTE, SHIFT = Path(__file__).resolve().parents[1], 'MCT_MARGINS', 'MCT_SEED_SHIFT'  # environment variables: file for notes, what is added to seeds
LESS, MORE = (ast.Lt, ast.LtE), (ast.Gt, ast.GtE)

# ---- in the process that runs asserts

def numbers(v):
    "`v` as a flat float64 array, None where it is none"
    import numpy as np
    if hasattr(v, 'detach'): v = v.detach().cpu().float().numpy() if v.is_floating_point() else v.detach().cpu().numpy()
    try: a = np.asarray(v)
    except Exception: return None
    return a.astype(np.float64).ravel() if a.dtype.kind in 'fiub' and a.size else None

def note(where, low, high):
    "Write one comparison `low < high`: the pair that is nearest to failing"
    import numpy as np
    a, b = numbers(low), numbers(high)
    if a is None or b is None or (a.size!=b.size and 1 not in (a.size, b.size)) or (np.asarray(a%1==0).all() and np.asarray(b%1==0).all()): return
    k = int(np.argmin(b-a)); pick = lambda v: float(v[k if v.size>1 else 0])
    with open(os.environ[NOTE], 'a', encoding='utf-8') as f: f.write(json.dumps([where, pick(a), pick(b)])+'\n')

def compared(where, ops, *values):
    "What a chain of < and > gives, each step noted"
    import operator
    out = True
    for op,a,b in zip(ops, values, values[1:]):
        note(where, *((a, b) if op in ('lt', 'le') else (b, a)))
        step = getattr(operator, op)(a, b); out = step if out is True else out and step
    return out

class Wrap(ast.NodeTransformer):
    "Comparisons of asserts become calls of `compared`"
    def visit_Assert(self, node):
        class Inner(ast.NodeTransformer):
            def visit_Compare(self, n):
                self.generic_visit(n)
                if not all(isinstance(o, LESS+MORE) for o in n.ops): return n
                where = ast.Constant(ast.unparse(node)[:160]); ops = ast.Constant(tuple({'Lt': 'lt', 'LtE': 'le', 'Gt': 'gt', 'GtE': 'ge'}[type(o).__name__] for o in n.ops))
                return ast.Call(ast.Name('__compared__', ast.Load()), [where, ops, n.left, *n.comparators], [])
        return ast.fix_missing_locations(ast.copy_location(ast.Assert(Inner().visit(node.test), node.msg), node))

def watch():
    "Note `allclose` and its kin, too: 1 is the limit. Shift torch's seeds where the setting says so"
    import builtins, numpy as np, torch, fastcore.test as ft
    builtins.__compared__ = compared
    seed, shift = torch.manual_seed, int(os.environ.get(SHIFT, 0))
    if shift: torch.manual_seed = lambda s: seed(s+shift)
    def excess(a, b, rtol, atol):
        a, b = numbers(a), numbers(b)
        if a is None or b is None or a.size!=b.size: return None
        with np.errstate(all='ignore'): return float(np.nanmax(np.abs(a-b)/np.maximum(atol+rtol*np.abs(b), 1e-300), initial=0))
    def wrap(mod, name, rtol, atol):
        old = getattr(mod, name)
        def new(a, b, *args, **kw):
            r, t = (*args[:2], *(None, None))[:2] if name!='test_close' else (0, args[0] if args else kw.get('eps', atol))
            r, t = kw.get('rtol', r), kw.get('atol', t)
            if name=='assert_close' and r is None: half = getattr(a, 'dtype', None) in (torch.float16, torch.bfloat16); r, t = (1.6e-2 if half else 1.3e-6), 1e-5
            ratio = excess(a, b, rtol if r is None else r, atol if t is None else t); frame = sys._getframe(1)
            if ratio is not None: note(f'{name} in {frame.f_code.co_name}:{frame.f_lineno}', ratio+1e-12, 1.)
            return old(a, b, *args, **kw)
        setattr(mod, name, new)
    wrap(torch, 'allclose', 1e-5, 1e-8); wrap(np, 'allclose', 1e-5, 1e-8); wrap(torch.testing, 'assert_close', 1.3e-6, 1e-5); wrap(ft, 'test_close', 0, 1e-5)

def pytest_configure(config):
    "As a plugin of pytest: `-p margins`"
    watch(); import _pytest.assertion.rewrite as rw
    old = rw.rewrite_asserts
    def new(mod, source, path=None, config=None):
        if path and Path(path).parent==ROOT/'tests': Wrap().visit(mod)
        return old(mod, source, path, config)
    rw.rewrite_asserts = new

# ---- what runs them

STARTUP = """import os, sys; sys.path.insert(0, {tools!r})
os.environ[{note!r}] = {folder!r}+'/nb_'+os.environ['NOTEBOOK']+'.jsonl'
import margins; margins.watch(); get_ipython().ast_transformers.append(margins.Wrap())"""
NEW = "import sys; sys.path.insert(0, {tools!r}); import margins; margins.notebooks({names!r}, {setting!r}, {folder!r})"
LOG = lambda out, setting, kind, name: out/setting/f'{kind}_{name}.txt'

def keep(log, ok, seconds, text):
    "What a notebook or a test file ended with, in its log: `ok` or `FAILED` first"
    how = f'{"ok" if ok else "FAILED"} {seconds:.0f} s'; tmp = log.with_suffix('.tmp')
    tmp.write_text(f'{how}\n{text}', encoding='utf-8'); tmp.replace(log); print(f'{log.parent.name:8} {how:12} {log.stem}', flush=True)

def notebooks(names, setting, folder):
    "In a process that has the setting: notebooks one after the other, with a log and a file of notes each"
    sys.path.insert(0, str(ROOT/'tools')); import nbrun
    from nbdev.config import get_config
    flags, ctx, startup = set(get_config().tst_flags.split()), nbrun.warm_processes(), STARTUP.format(tools=str(ROOT/'tools'), note=NOTE, folder=folder)
    for n in names:
        (Path(folder)/f'nb_{n}.jsonl').write_text(''); _, seconds, err = nbrun.check(ROOT/f'nbs/{n}.ipynb', flags, 3600, ctx, startup)
        keep(Path(folder)/f'nb_{n}.txt', not err, seconds, err)

def run(kind, name, setting, env, out, others=()):
    "One notebook or test file under one setting, and of notebooks `others`, too: did all hold, and what was printed. What is in `out` already is not run again"
    log = LOG(out, setting, kind, name); log.parent.mkdir(parents=True, exist_ok=True)
    env = env | {'PYTHONDONTWRITEBYTECODE': '1', 'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT/"tools"}'}
    if kind=='nb' and not log.is_file():
        names = [n for n in [name, *(o for o in others if o!=name)] if not LOG(out, setting, kind, n).is_file()]
        subprocess.run([sys.executable, '-c', NEW.format(tools=str(ROOT/'tools'), names=names, setting=setting, folder=str(log.parent))], env=env, cwd=ROOT, check=True)
    elif not log.is_file():
        notes = log.with_suffix('.jsonl'); notes.write_text(''); start = time.time()
        cmd = ['-m', 'pytest', '-n', '0', '-q', '-p', 'no:cacheprovider', '-p', 'margins', f'tests/test_{name}.py', '-k', 'not killed']
        r = subprocess.run([sys.executable, *cmd], env=env | {NOTE: str(notes)}, cwd=ROOT, capture_output=True, text=True)
        keep(log, not r.returncode, time.time()-start, f'{r.stdout[-6000:]}\n{r.stderr[-6000:]}')
    said = log.read_text(encoding='utf-8')
    return said.startswith('ok'), said

def tight(out, times=3):
    "Limits nearer than `times` spreads: (distance in spreads, file, assertion, distance, spread, both sides by setting), nearest first; and the number of all comparisons"
    seen = defaultdict(dict)
    for f in sorted(out.glob('*/*.jsonl')):
        if not f.with_suffix('.txt').is_file() or 'properties' in f.stem: continue        # random examples have no partner under another setting
        count = defaultdict(int)
        for line in f.read_text(encoding='utf-8').splitlines():
            where, a, b = json.loads(line); key = f.stem, where, count[where]; count[where] += 1; seen[key][f.parent.name] = a, b
    rows = []
    for (file, where, k), by in seen.items():
        gaps = [b-a for a,b in by.values()]; spread = max(gaps)-min(gaps)
        if spread and 0<min(gaps)<times*spread: rows.append((min(gaps)/spread, file, where, min(gaps), spread, by))
    return sorted(rows, key=lambda r: r[:3]), len(seen)

def show(out):
    "Print what is tight"
    rows, n = tight(out)
    for r in rows: print(f'{r[0]:5.1f} spreads  {r[1]}: {r[2]}\n               distance {r[3]:.3g}, spread {r[4]:.3g}; '+', '.join(f'{s} {a:.4g} < {b:.4g}' for s,(a,b) in r[5].items()))
    print(f'{n} comparisons, {len(rows)} tight')

if __name__=='__main__':
    sys.path.insert(0, str(ROOT/'tests')); from test_processors import FREE, NOTEBOOKS, SETTINGS, TESTS, here
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('settings', nargs='*', default=list(SETTINGS)); p.add_argument('--out', type=Path, required=True); p.add_argument('--table', action='store_true')
    p.add_argument('--only', default='', help='these notebooks and tests only, separated by commas')
    a = p.parse_args(); a.out = a.out.resolve(); only = set(filter(None, a.only.split(',')))
    for s in [] if a.table else a.settings:
        env, nbs, tests = here(s), *([n for n in names if not only or n in only] for names in (NOTEBOOKS, TESTS)); nbs = [n for n in nbs if s!='seeds' or n in FREE]
        for kind,names in (('nb', nbs), ('test', tests)):
            for n in names: run(kind, n, s, env, a.out, nbs)
    show(a.out)
