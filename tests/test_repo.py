"The repository's own rules: what CONTRIBUTING.md asks of notebooks, modules and files"
import ast, builtins, importlib, inspect, json, re, subprocess, sys, warnings
from configparser import ConfigParser
from functools import cached_property, lru_cache
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
CFG = ConfigParser(delimiters=['=']); CFG.read(ROOT/'settings.ini', encoding='utf-8'); CFG = CFG['DEFAULT']
PKG = CFG['lib_path']; LIB = ROOT/PKG; NBS = ROOT/CFG['nbs_path']
MAX_LINES, MAX_CELLS, KB, HARD_KB, MAX_MB = 25, 80, 300, 400, 8
MORE_CELLS = {'60_cli.ipynb': 103} # the commands, one after the other: looked up, not read through

# ---- notebooks as this file sees them

class Notebook:
    "Cells of notebook `path`, with what nbdev's directives say about them"
    def __init__(self, path):
        self.path = path; self.raw = path.read_bytes(); self.cells = json.loads(self.raw)['cells']
        for c in self.cells: c['source'] = ''.join(c['source'])
    def __repr__(self): return self.path.relative_to(NBS).as_posix()
    def code(self): return [c for c in self.cells if c['cell_type']=='code']
    def exported(self): return [c['source'] for c in self.code() if has(c['source'], r'exports?|exporti')]
    @cached_property
    def module(self):
        found = [m for c in self.code() for m in re.findall(r'^#\|\s*default_exp\s+(\S+)', c['source'], re.M)]
        assert len(found)<=1, f'{self}: more than one default_exp'
        return found[0] if found else None

def has(src, directive): return bool(re.search(rf'^#\|\s*(?:{directive})\s*$', src, re.M))

def parse(src):
    "Syntax tree of a cell, magics and shell lines left out; None for a cell that is another language's (`%%bash`)"
    if src.lstrip().startswith('%%'): return None
    return ast.parse(re.sub(r'^(\s*)[!%].*$', r'\1pass', src, flags=re.M))

def own_imports(tree):
    "Names of this package's modules that `tree` imports, also inside functions"
    for n in ast.walk(tree):
        if isinstance(n, ast.Import): yield from (a.name.split('.')[1] for a in n.names if a.name.startswith(PKG+'.'))
        elif isinstance(n, ast.ImportFrom):
            mod = (n.module or '').split('.')
            if mod[0]==PKG: yield from [mod[1]] if mod[1:] else (a.name for a in n.names)

NOTEBOOKS = [Notebook(p) for p in sorted(NBS.rglob('*.ipynb')) if not re.search(r'/[._]', p.relative_to(NBS.parent).as_posix())]
MODULES = [nb for nb in NOTEBOOKS if nb.module] # in file-name order, which is the reading order
ORDER = {nb.module:i for i,nb in enumerate(MODULES)}
each_notebook = pytest.mark.parametrize('nb', NOTEBOOKS, ids=repr)
each_module = pytest.mark.parametrize('nb', MODULES, ids=repr)

# ---- modules and imports

def test_modules_are_the_notebooks():
    found = {p.relative_to(LIB).with_suffix('').as_posix().replace('/', '.') for p in LIB.rglob('*.py')} - {'__init__', '_modidx'}
    assert MODULES and len(ORDER)==len(MODULES), 'two notebooks export to one module'
    assert found==set(ORDER)

@each_module
def test_imports_point_backwards(nb):
    for c in nb.code():
        if (tree := parse(c['source'])) is None: continue
        wrong = {m for m in own_imports(tree) if ORDER.get(m, -1)>=ORDER[nb.module]}
        assert not wrong, f'imports {wrong}, which this or a later notebook exports'

STDLIB = set(sys.stdlib_module_names)
DISTS = dict(PIL='pillow', cv2='opencv-python-headless', yaml='pyyaml', sklearn='scikit-learn', skimage='scikit-image', pydensecrf='pydensecrf2', mpl_toolkits='matplotlib', dateutil='python-dateutil')

def requirement_names(extras=True):
    text = ' '.join(v for k,v in CFG.items() if k=='requirements' or extras and k.endswith('_requirements') and k!='dev_requirements')
    return {re.match(r'[\w.-]+', r)[0].lower() for r in text.replace('"', '').split()}

@each_module
def test_imports_are_required(nb):
    tree = ast.parse((LIB/f'{nb.module}.py').read_text(encoding='utf-8')); names = set()
    for n in ast.walk(tree):
        if isinstance(n, ast.Import): names |= {a.name.split('.')[0] for a in n.names}
        elif isinstance(n, ast.ImportFrom) and not n.level: names.add(n.module.split('.')[0])
    missing = {DISTS.get(n, n).lower() for n in names-STDLIB-{PKG}} - requirement_names()
    assert not missing, f'not among the requirements in settings.ini: {missing}'

HEAVY = dict(core=('torch', 'fastai'), scores=('torch', 'fastai'), cli=('torch', 'fastai'), mini=('torch', 'fastai'), attention=('fastai',), mctformer=('fastai',))

@pytest.mark.parametrize('mod', HEAVY)
def test_light_imports(mod):
    if mod not in ORDER: pytest.fail(f'no notebook exports {mod}')
    code = f'import sys, {PKG}.{mod}; print(*[m for m in {HEAVY[mod]} if m in sys.modules])'
    r = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    assert not r.stdout.split(), f'{PKG}.{mod} loads {r.stdout.strip()}'

def test_the_door_is_light():
    "`import mctformer_nb as mct` loads nothing, and each of its names comes from the room that has it, when it is first used"
    code = f"""import sys, {PKG} as mct
assert not {{'torch', 'fastai', 'timm', 'numpy'}} & set(sys.modules), 'the door is heavy'
assert set(mct.__all__) <= set(dir(mct))
for name in mct.__all__: assert callable(getattr(mct, name)), name
from {PKG} import *
assert MCTformer is mct.MCTformer
try: mct.nothing
except AttributeError as e: print(str(e)[:60])"""
    r = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    assert "no attribute 'nothing'" in r.stdout
    mct = importlib.import_module(PKG)
    homes = {name: getattr(mct, name).__module__ for name in mct.__all__}
    assert all(m.startswith(f'{PKG}.') and m.split('.')[1] in ORDER for m in homes.values()), homes

@pytest.mark.skipif('all' not in ORDER, reason='no notebook exports `all`')
def test_all_has_everything():
    "`from mctformer_nb.all import *` gives every public name of its rooms and of the door, and no name stands for two things"
    every, door = importlib.import_module(f'{PKG}.all'), importlib.import_module(PKG)
    rooms = [importlib.import_module(f'{PKG}.{n.module.split(".")[-1]}') for n in ast.parse((LIB/'all.py').read_text(encoding='utf-8')).body if isinstance(n, ast.ImportFrom) and any(a.name=='*' for a in n.names)]
    meant = {**{k: {id(getattr(door, k))} for k in door.__all__}}
    for room in rooms:
        for k in room.__all__: meant.setdefault(k, set()).add(id(getattr(room, k)))
    assert len(rooms)>20 and not (lost := meant.keys()-set(every.__all__)), lost
    wrong = sorted(k for k,ids in meant.items() if ids!={id(getattr(every, k))})
    assert not wrong, f'two things have the name {", ".join(wrong)}'
    assert not [k for k in every.__all__ if k.startswith('_')]

# ---- the form of notebooks

@each_notebook
def test_opening(nb):
    first = nb.cells[0]
    assert first['cell_type']=='markdown' and re.match(r'# \S.*\n+> \S', first['source']), 'starts with an H1 and a > subtitle'
    if nb.module: assert re.search(r'^#\|\s*default_exp', nb.code()[0]['source'], re.M), 'the first code cell has the default_exp'

@each_notebook
def test_size_and_ids(nb):
    ids = [c.get('id') for c in nb.cells]
    assert all(ids) and len(set(ids))==len(ids), 'a cell id is missing or used twice'
    assert len(nb.cells)<=MORE_CELLS.get(str(nb).split('/')[-1], MAX_CELLS)
    kb = len(nb.raw)/1000
    if kb>KB: warnings.warn(f'{nb}: {kb:.0f} KB, the aim is {KB}')
    assert kb<=HARD_KB

@each_notebook
def test_figures_are_shown(nb):
    "A figure whose output is its name alone, `<Figure size ...>`, shows a reader nothing"
    named = [o['data'] for c in nb.code() for o in c.get('outputs', []) if ''.join(o.get('data', {}).get('text/plain', '')).startswith(('<Figure ', '<PIL.', '<Axes'))]
    assert not [d['text/plain'] for d in named if not any(k.startswith('image/') for k in d)]

@each_module
def test_last_cell_exports(nb):
    src = nb.code()[-1]['source']
    assert nb.cells[-1]['cell_type']=='code' and has(src, 'hide') and 'nbdev.nbdev_export()' in src

def imported(tree):
    "Names that the imports in `tree` bind"
    for n in ast.walk(tree):
        if not isinstance(n, (ast.Import, ast.ImportFrom)): continue
        for a in n.names:
            if a.name=='*': mod = importlib.import_module(n.module); yield from getattr(mod, '__all__', None) or dir(mod)
            else: yield a.asname or a.name.split('.')[0]

@each_notebook
def test_cells_with_imports_need_no_other_cells(nb):
    "The site's build runs exported cells and cells with imports, no others: so the latter must not lean on unexported code"
    known, wrong = set(dir(builtins)) | {'get_ipython', '__name__', '__file__'}, []
    for c in nb.code():
        if 'nbdev_export()' in c['source'] or (tree := parse(c['source'])) is None: continue
        imports, exports = set(imported(tree)), has(c['source'], r'exports?|exporti')
        if not (imports or exports): continue
        stored = lambda t: {n.id for n in ast.walk(t) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        local = stored(tree) | {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)} | {n.name for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler)}
        for n in tree.body: known |= {n.name} if hasattr(n, 'name') else stored(n) # a function's own variables stay its own
        known |= imports
        lost = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} - known - local
        if lost and not exports: wrong.append(f"needs {', '.join(sorted(lost))}:\n{c['source']}")
    assert not wrong, 'imports belong in a cell of their own\n' + '\n---\n'.join(wrong)

@pytest.mark.parametrize('nb', [nb for nb in NOTEBOOKS if repr(nb).startswith('tutorials/')], ids=repr)
def test_tutorials_open_in_colab(nb):
    "A link to the notebook's own file, as text, since the site fetches nothing; and a first code cell that installs the package there and nowhere else"
    address = f'https://colab.research.google.com/github/{CFG["user"]}/{CFG["repo"]}/blob/{CFG["branch"]}/{CFG["nbs_path"]}/{nb!r}'
    assert f'[Open in Colab]({address})' in nb.cells[0]['source'] and nb.cells[0]['source'].count('colab.')==1
    first = nb.code()[0]; assert first['source'].splitlines()==['#| hide', '#| eval: false', f'![ -e /content ] && pip install -q git+{CFG["git_url"]}  # in Colab'] and not first['outputs']

@each_notebook
def test_only_modules_export(nb):
    assert nb.module or not nb.exported(), 'exports without a default_exp'

def names_bound(node):
    "Public names that top-level statement `node` binds, as one group; `@patch` methods count by their own name"
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): names = [node.name]
    elif isinstance(node, ast.Assign): names = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name): names = [node.target.id]
    else: names = []
    return [n for n in names if not n.startswith('_')]

def has_module_class(nb, tree):
    "Does the cell define an `nn.Module`? Those may be longer"
    import torch
    mod = importlib.import_module(f'{PKG}.{nb.module}')
    return any(isinstance(n, ast.ClassDef) and issubclass(getattr(mod, n.name), torch.nn.Module) for n in tree.body)

# Functions that hold a stage's read, compute and write side by side, and tables of options; lines they have: may shrink, not grow.
LONGER = dict(train_frozen=39, SEED_ARGS=43, mct_seeds=33, mct_score=27, mct_masks=40)

@each_module
def test_exported_cells(nb):
    wrong = []
    for src in nb.exported():
        tree = parse(src); lines = [l for l in src.splitlines() if l.strip() and not l.startswith('#|')]
        groups = [g for g in map(names_bound, tree.body) if g]; imports = any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in tree.body)
        what = groups[0][0] if groups else lines[0] if lines else 'an empty cell'
        if len(groups)>1: wrong.append(f'{what}: {len(groups)} public symbols in a cell')
        if groups and imports: wrong.append(f'{what}: imports belong in a cell of their own')
        if len(lines)>LONGER.get(what, MAX_LINES) and not all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in tree.body) and not has_module_class(nb, tree): wrong.append(f'{what}: {len(lines)} lines')
    assert not wrong, '\n'.join(wrong)

# ---- how exported code reads: the figures of tools/house.py

sys.path.insert(0, str(ROOT/'tools'))
import house

@each_module
def test_lines(nb):
    "At most 120 characters; one statement a line, where `if x: y` and `def f(x): return y` are one"
    wrong = []
    for src in nb.exported():
        lines = src.splitlines(); starts = [n.lineno for n in ast.walk(parse(src)) if isinstance(n, ast.stmt)]
        wrong += [f'{len(l)} characters: {l.strip()[:60]} ...' for l in house.code_lines(src) if len(l)>120]
        wrong += [f'{starts.count(k)} statements: {lines[k-1].strip()}' for k in sorted(set(starts)) if starts.count(k)>2]
        if house.semicolons(src): wrong += [f'a semicolon: {l.strip()}' for l in lines if ';' in l]
    assert not wrong, '\n'.join(wrong)

@each_module
def test_parameters(nb):
    "What takes more than 8 is told by a dataclass, or by documented **options"
    wrong = [f'{name}: {house.parameters(f)} parameters' for src in nb.exported() for name,f in house.public_functions(parse(src)) if house.parameters(f)>8]
    assert not wrong, '\n'.join(wrong)

@each_module
def test_no_private_names_of_other_modules(nb):
    wrong = [k for src in nb.exported() for k in house.private_imports(parse(src), nb.module)]
    assert not wrong, 'make them public, or do without: ' + ', '.join(wrong)

def test_figures_of_the_house():
    "No figure gets worse. The first five are rules; the rest is where the package stands, to be moved in the good direction only"
    r = house.measure()
    most = dict(long_lines=0, semicolons=0, most_parameters=8, private_per_public=.5, raise_per_100=3, cell_median=9, cells_over_25=len(LONGER))
    least = dict(asserts_per_cell=2, examples=96, science=65)
    wrong = {k: r[k] for k,v in most.items() if r[k]>v} | {k: r[k] for k,v in least.items() if r[k]<v}
    assert not wrong and not r['private_imports'], f'{wrong}: see tools/house.py'

# Paths of whoever ran the notebook; pictures are left out, since base64 can spell anything.
ABSOLUTE = re.compile(r'(?<![\w.~-])/(?:work|root|tmp|home|Users)/')

def texts(outputs):
    for o in outputs:
        parts = {'text': o.get('text', ''), 'traceback': '\n'.join(o.get('traceback', [])), **o.get('data', {})}
        for k,v in parts.items():
            if not k.startswith('image/'): yield re.sub(r'data:[\w/+-]+;base64,[\w+/=\s]+', '', v if isinstance(v, str) else ''.join(v) if isinstance(v, list) else json.dumps(v))

@each_notebook
def test_no_machine_paths_in_outputs(nb):
    wrong = [l for c in nb.code() for t in texts(c['outputs']) for l in t.splitlines() if ABSOLUTE.search(l)]
    assert not wrong, '\n'.join(wrong)

@each_notebook
def test_no_stored_errors(nb):
    wrong = [o for c in nb.code() for o in c['outputs'] if o['output_type']=='error']
    assert not wrong, f"stored error: {[o['evalue'] for o in wrong]}"

# ---- documentation of what is public

def public(nb):
    "Public functions and classes of the module, as written there"
    mod = importlib.import_module(f'{PKG}.{nb.module}')
    for name in mod.__all__:
        o = getattr(mod, name, None)
        if (inspect.isclass(o) or inspect.isroutine(o)) and getattr(o, '__module__', None)==mod.__name__: yield name, inspect.unwrap(o)

def undocumented(f):
    "Arguments of `f` without type or comment"
    from fastcore.docments import docments
    params = inspect.signature(f).parameters; d = docments(f)
    for k,p in params.items():
        if k in ('self', 'cls') or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD): continue
        if p.annotation is p.empty and type(p.default) not in (bool, int, float, str, tuple, list): yield f'{k} has no type' # a literal shows its own
        if not d.get(k): yield f'{k} has no comment'

@each_module
def test_public_symbols_are_documented(nb):
    wrong = []
    for name,o in public(nb):
        if not (o.__doc__ or '').strip() or (inspect.isclass(o) and o.__doc__.startswith(f'{name}(')): wrong.append(f'{name}: no docstring')
        f = vars(o).get('__init__') if inspect.isclass(o) else o
        if f is None or hasattr(o, '__dataclass_fields__'): continue
        wrong += [f'{name}: {w}' for w in undocumented(f)]
    assert not wrong, '\n'.join(wrong)

# ---- files

SKIPPED = {'.git', '.venv', '_proc', '_docs', '_site_src', 'build', 'dist', 'demo', 'runs', '__pycache__', '.pytest_cache', '.ipynb_checkpoints', '.hypothesis'}

@lru_cache
def tracked():
    "Files under version control; without git, all but what .gitignore names"
    try: out = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError): out = ''
    files = [ROOT/f for f in out.split('\0') if f] or [f for f in ROOT.rglob('*') if not SKIPPED & set(f.relative_to(ROOT).parts)]
    return [f for f in files if f.is_file()]

def text_files():
    for f in tracked():
        b = f.read_bytes()
        if b'\0' not in b[:8000]: yield f.relative_to(ROOT), b.decode('utf-8', 'replace')

def test_no_large_files():
    assert not [(str(f), f.stat().st_size) for f in tracked() if f.stat().st_size>MAX_MB*1e6]

def test_no_registry_hosts():
    hosts = [a+'.'+b for a,b in (('pypi','org'), ('pythonhosted','org'), ('npmjs','org'), ('npmjs','com'), ('debian','org'), ('download.pytorch','org'), ('anaconda','org'))]
    found = re.compile('|'.join(rf'\b{re.escape(h)}\b' for h in hosts))
    assert not [(str(f), m[0]) for f,s in text_files() for m in [found.search(s)] if m]

def test_no_machine_paths_in_files():
    found = re.compile(r'(?<![\w.~/-])/(?:wo''rk|ro''ot)' r'/\w')
    assert not [(str(f), l.strip()[:120]) for f,s in text_files() if f.suffix!='.ipynb' for l in s.splitlines() if found.search(l)]
    assert not [f.name for f in (ROOT/'results').glob('*.json') if '/tmp/' in f.read_text(encoding='utf-8')]          # of what a record says of its command

def test_versions_agree():
    version = CFG['version']
    assert importlib.import_module(PKG).__version__==version
    assert re.search(r'^version: (\S+)', (ROOT/'CITATION.cff').read_text(encoding='utf-8'), re.M)[1]==version
    assert re.search(r'^## \[?([\d.]+)', (ROOT/'CHANGELOG.md').read_text(encoding='utf-8'), re.M)[1]==version

def test_markers_are_the_notebook_flags(pytestconfig):
    assert {m.split(':')[0] for m in pytestconfig.getini('markers')} >= set(CFG['tst_flags'].split())

@pytest.mark.parametrize('script', CFG['console_scripts'].split())
def test_console_scripts(script):
    name, target = script.split('='); mod, func = target.split(':')
    assert name==func and callable(getattr(importlib.import_module(mod), func))

def test_tests_named_on_the_page_of_real_inputs_exist():
    "Every row of its tables names a test, and each of them is there"
    text = '\n'.join(c['source'] for nb in NOTEBOOKS if repr(nb)=='real_inputs.ipynb' for c in nb.cells)
    rows = [l for l in text.splitlines() if l.startswith('| ') and '| test |' not in l]; assert len(rows)>30
    there = {f'{p.name}::{n.name}' for p in (ROOT/'tests').glob('test_*.py') for n in ast.parse(p.read_text(encoding='utf-8')).body if isinstance(n, ast.FunctionDef)}
    for row in rows:
        named = re.findall(r'`(test_\w+\.py::\w+)`', row.rsplit(' | ', 1)[1]); assert named, f'no test: {row}'
        assert not (lost := set(named)-there), f'no such test: {lost}'

@pytest.mark.slow
def test_notebooks_beside_the_story_run():
    r = subprocess.run([sys.executable, 'tools/check.py', 'apart'], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout[-3000:]+r.stderr[-1000:]
