"""The figures of the house: how the exported code reads, counted.

    python tools/house.py            # the table, the modules, the rule of the science share
    python tools/house.py --json     # the same as JSON
    python tools/house.py --show seeds   # a stage module, each counted line marked science (S), engineering (e) or picture (p)

Counted are the cells that notebooks in `nbs/` export (`#| export`, `exporti`, `exports`), without blank lines and directives; nothing is imported or run.

cells               median lines of exported cells that are not imports alone, and how many have more than 15 and 25 (classes aside)
private per public  top-level functions, classes and assigned names with `_` in front, for each one without, of all modules together
private imports     names with `_` in front that a module imports from another one, or reads as an attribute of it
parameters          of public functions and of public methods of public classes, without self, *args and **options
raise               `raise` statements for 100 exported lines
asserts             `assert`, `test_eq`, `test_close`, `test_fail` ... in cells that are not exported, for each exported cell
examples            public functions and classes whose name stands in a cell of the same notebook that does not export, imports aside
science             of the lines in the stage modules (those of `STAGES` that exist): see `RULE`"""
import argparse, ast, io, json, re, sys, tokenize
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
NBS, PKG = ROOT/'nbs', 'mctformer_nb'
EXPORT = re.compile(r'^#\|\s*(export|exporti|exports)\s*$', re.M)
STAGES = 'seeds crf random_walk segment affinitynet deeplab train'.split()

RULE = """Lines of statements count; signatures, docstrings, comments, imports and decorators do not. A simple statement, or the head of a compound one, is engineering
if it raises, or if it names one of WORDS, or something that a room of ROOMS exports (as a name, an attribute or a keyword). A `with`, `for` or `if` whose head names none of them is engineering if all of its body is, `try` always.
A function of whose lines two thirds or more are engineering counts as engineering whole. Functions that draw (`show_*`, `plot_*`, or a figure made inside) are left out.
All else is science."""
WORDS = dict(
    files='Path open exists is_file is_dir mkdir unlink rename rmtree rglob glob stat st_mtime st_size with_name resolve suffix stem read_bytes write_bytes atomic_path zipfile ZipFile tarfile '
          'GzipFile TarInfo BytesIO savez_compressed read_json write_json read_arrays save_file load_file read_state_dict save_mask open_mask save_run load_run save_seed load_seed json '
          'hashlib sha1 sha256 hexdigest encode decode getvalue path paths file files folder out_folder',
    locks='folder_lock claim claim_folder sweep_temporaries shutil first_alone connected joined my_part rank world local_device may_overwrite overwrite fresh ExitStack enter_context',
    settings='settings note options how hows config cfg state_dict batch_size elsewhere no_result set_here defaults signature inspect known fingerprint data_fingerprint plain to_json differ orphan package version',
    progress='progress print log time seconds report reports skipped written todo bad missing done',
    workers='pool submit result ThreadPoolExecutor ProcessPoolExecutor run_pool workers queue popleft deque cores jobs signal os',
    checks='need check fail DataError Exception OSError OutOfMemoryError isinstance isfinite warnings')
ROOMS = 'ranks artifacts training_files stage photo_masks runs'.split()                   # modules below the stages that are engineering throughout, as far as they exist
ENGINEERING = {w for words in WORDS.values() for w in words.split()}

# ---- reading

def notebooks():
    "[(module, exported sources, other code sources)] in reading order"
    for f in sorted(NBS.glob('*.ipynb')):
        code = [''.join(c['source']) for c in json.loads(f.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']
        module = next((m[1] for c in code for m in [re.search(r'^#\|\s*default_exp\s+(\S+)', c, re.M)] if m), None)
        if module: yield module, [c for c in code if EXPORT.search(c)], [c for c in code if not EXPORT.search(c)]

def code_lines(src): return [l for l in src.splitlines() if l.strip() and not l.startswith('#|')]

def parse(src):
    "Syntax tree of a cell, magics left out; empty for another language's"
    return ast.parse('' if src.lstrip().startswith('%%') else re.sub(r'^(\s*)[!%].*$', r'\1pass', src, flags=re.M))

FUNCTION = ast.FunctionDef, ast.AsyncFunctionDef
IMPORT = ast.Import, ast.ImportFrom
DEFINITION = *FUNCTION, ast.ClassDef

def bound(node):
    "Names that a top-level statement defines"
    if isinstance(node, DEFINITION): return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]

def names_in(tree):
    "Every name, attribute and keyword below `tree`"
    for n in ast.walk(tree):
        if isinstance(n, ast.Name): yield n.id
        elif isinstance(n, ast.Attribute): yield n.attr
        elif isinstance(n, ast.keyword) and n.arg: yield n.arg

# ---- figures

def semicolons(src):
    "Lines with a `;` outside strings and comments"
    return len({t.start[0] for t in tokenize.generate_tokens(io.StringIO(src).readline) if t.type==tokenize.OP and t.string==';'})

def private_imports(tree, module):
    "Names with `_` in front of other modules of the package, imported or read as an attribute"
    modules = {}
    for n in ast.walk(tree):
        if not isinstance(n, ast.ImportFrom) or not (n.level or (n.module or '').split('.')[0]==PKG): continue
        for a in n.names:
            if a.name.startswith('_') and not a.name.startswith('__'): yield f'{module} < {(n.module or "").split(".")[-1]}.{a.name}'
            elif (n.module or '') in ('', PKG): modules[a.asname or a.name] = a.name
    for n in ast.walk(tree):
        own = isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in modules
        if own and n.attr.startswith('_') and not n.attr.startswith('__'): yield f'{module} < {modules[n.value.id]}.{n.attr}'

def parameters(f):
    "Number of parameters, without self, *args and **options"
    names = [a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)]
    return len([n for n in names if n not in ('self', 'cls')])

def public_functions(tree):
    "(name, function) of public functions and of public methods of public classes"
    for n in tree.body:
        if isinstance(n, FUNCTION) and not n.name.startswith('_'): yield n.name, n
        if isinstance(n, ast.ClassDef) and not n.name.startswith('_'):
            methods = [m for m in n.body if isinstance(m, FUNCTION) and (m.name=='__init__' or not m.name.startswith('_'))]
            yield from ((f'{n.name}.{m.name}', m) for m in methods)

def is_assert(n):
    if isinstance(n, ast.Assert): return True
    return isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id.startswith('test_')

# ---- science or engineering

BLOCKS = ast.If, ast.For, ast.While, ast.With, ast.Try

def head_lines(node):
    "Lines of a compound statement before its body; of a simple one, all"
    body = getattr(node, 'body', None) if isinstance(node, BLOCKS) else None
    last = max(node.lineno, body[0].lineno-1) if body else node.end_lineno
    return set(range(node.lineno, last+1))

def head_names(node):
    "Names in the head of a compound statement; of a simple one, all"
    if not isinstance(node, BLOCKS): return set(names_in(node))
    parts = [getattr(node, 'test', None), getattr(node, 'iter', None), getattr(node, 'target', None), *getattr(node, 'items', [])]
    return {n for p in parts if p is not None for n in names_in(p)}

def children(node):
    "Statements inside a compound statement"
    inner = [s for field in ('body', 'orelse', 'finalbody') for s in getattr(node, field, [])]
    return inner + [s for h in getattr(node, 'handlers', []) for s in h.body]

def is_machinery(names): return any(n.lstrip('_') in ENGINEERING for n in names)

def sort_lines(node, marks):
    "Mark the lines of a statement 'S' or 'e'; returns whether all of it is engineering"
    if isinstance(node, IMPORT) or isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant): return True
    if isinstance(node, DEFINITION): return sort_definition(node, marks)
    inner = [sort_lines(s, marks) for s in children(node)] if isinstance(node, BLOCKS) else []
    raises = isinstance(node, (ast.Raise, ast.Try))
    engine = raises or is_machinery(head_names(node)) or bool(inner) and all(inner)
    for l in head_lines(node): marks.setdefault(l, 'e' if engine else 'S')
    for h in getattr(node, 'handlers', []): marks[h.lineno] = 'e'
    return engine and all(inner)

def sort_definition(node, marks):
    "Mark the body of a function or class by the rule of two thirds"
    own = {}
    draws = node.name.lstrip('_').startswith(('show', 'plot')) or bool({'new_figure', 'subplots', 'imshow'} & set(names_in(node)))
    for s in node.body: sort_lines(s, own)
    if isinstance(node, FUNCTION) and own:
        share = sum(v=='e' for v in own.values())/len(own)
        if draws: own = dict.fromkeys(own, 'p')
        elif share>=2/3: own = dict.fromkeys(own, 'e')
    marks.update(own)
    return all(v!='S' for v in own.values())

def science(cells):
    "{(cell, line): 'S' | 'e' | 'p'} of the exported cells of a module"
    found = {}
    for i,src in enumerate(cells):
        marks, lines = {}, src.splitlines()
        for s in ast.parse(src).body: sort_lines(s, marks)
        found |= {(i, l): v for l,v in marks.items() if lines[l-1].strip() and not lines[l-1].strip().startswith('#')}
    return found

# ---- all together

def measure():
    "All figures as one dict"
    all_nbs = list(notebooks()); cells = {m: e for m,e,_ in all_nbs}
    trees = {m: ast.parse('\n'.join(e)) for m,e in cells.items()}
    lines = {m: [l for src in e for l in code_lines(src)] for m,e in cells.items()}
    n = sum(map(len, lines.values())); long = [len(l) for ls in lines.values() for l in ls if len(l)>120]
    sized = [(m, src, len(code_lines(src))) for m,e in cells.items() for src in e if not all(isinstance(s, IMPORT) for s in ast.parse(src).body)]
    plain = [k for _,src,k in sized if not any(isinstance(s, ast.ClassDef) for s in ast.parse(src).body)]
    names = {m: list(dict.fromkeys(k for s in t.body for k in bound(s) if not k.startswith('__'))) for m,t in trees.items()}
    private = sum(k.startswith('_') for ks in names.values() for k in ks); public = sum(map(len, names.values()))-private
    params = sorted(((parameters(f), f'{m}.{k}') for m,t in trees.items() for k,f in public_functions(t)), reverse=True)
    raises = sum(isinstance(x, ast.Raise) for t in trees.values() for x in ast.walk(t))
    others = {m: [parse(src) for src in o] for m,_,o in all_nbs}
    asserts = sum(is_assert(x) for ts in others.values() for t in ts for x in ast.walk(t))
    used = {m: set(re.findall(r'\w+', ' '.join(ast.unparse(s) for t in ts for s in t.body if not isinstance(s, IMPORT)))) for m,ts in others.items()}
    symbols = [(m, s.name) for m,t in trees.items() for s in t.body if isinstance(s, DEFINITION) and not s.name.startswith('_')]
    unused = [f'{m}.{k}' for m,k in symbols if k not in used[m]]
    ENGINEERING.update(k for m,k in symbols if m in ROOMS)
    marks = {m: list(science(cells[m]).values()) for m in STAGES if m in cells}
    count = lambda v, ms=tuple(marks): sum(marks[m].count(v) for m in ms)
    share = lambda *ms: round(100*count('S', ms)/max(1, count('S', ms)+count('e', ms)), 1)
    return dict(
        exported_lines=n, modules={m: len(ls) for m,ls in lines.items()},
        exported_cells=len(sized), cell_median=median(k for *_,k in sized), cells_over_15=sum(k>15 for k in plain), cells_over_25=sum(k>25 for k in plain),
        long_lines=len(long), long_share=round(100*len(long)/n, 2), longest=max(long, default=0),
        semicolons=sum(semicolons(src) for e in cells.values() for src in e),
        private_per_public=round(private/public, 2), private=private, public=public,
        private_imports=sorted(k for m,t in trees.items() for k in private_imports(t, m)),
        most_parameters=params[0][0], over_8_parameters=[f'{k} {v}' for v,k in params if v>8],
        raise_per_100=round(100*raises/n, 2), raises=raises, asserts_per_cell=round(asserts/len(sized), 2), asserts=asserts,
        examples=round(100*(1-len(unused)/len(symbols)), 1), without_example=unused, science=share(*marks),
        stages={m: dict(share=share(m), science=count('S', [m]), engineering=count('e', [m]), pictures=count('p', [m])) for m in marks})

def table(r):
    "The figures as text"
    row = lambda what, value, rest='': f'{what:34}{value!s:>8}   {rest}'.rstrip()
    per = {m: sum(k.startswith(f'{m} <') for k in r['private_imports']) for m in r['modules']}
    yield row('exported lines', r['exported_lines'], ' '.join(f'{m} {k}' for m,k in r['modules'].items()))
    yield row('exported cells, median lines', r['cell_median'], f"{r['exported_cells']} cells; {r['cells_over_15']} over 15, {r['cells_over_25']} over 25, classes aside")
    yield row('lines over 120', r['long_lines'], f"{r['long_share']} %, longest {r['longest']}")
    yield row('lines with ;', r['semicolons'], f"{100*r['semicolons']/r['exported_lines']:.1f} %")
    yield row('private per public name', r['private_per_public'], f"{r['private']} : {r['public']}")
    yield row('private names imported', len(r['private_imports']), ', '.join(f'{m} {k}' for m,k in per.items() if k))
    yield row('most parameters', r['most_parameters'], f"{len(r['over_8_parameters'])} with more than 8: {', '.join(r['over_8_parameters'])}")
    yield row('raise per 100 lines', r['raise_per_100'], f"{r['raises']}")
    yield row('asserts per exported cell', r['asserts_per_cell'], f"{r['asserts']}")
    yield row('public symbols in an example, %', r['examples'], f"without: {', '.join(r['without_example'])}" if r['without_example'] else '')
    yield row('science in the stage modules, %', r['science'], ', '.join(f"{m} {s['share']:.0f}" for m,s in r['stages'].items()))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--json', action='store_true', help='everything as JSON')
    p.add_argument('--show', metavar='MODULE', help='how the lines of a stage module were counted')
    a = p.parse_args()
    if a.show:
        measure() # learns what the rooms export
        cells = next((e for m,e,_ in notebooks() if m==a.show), None) or sys.exit(f'no notebook exports {a.show}')
        marks = science(cells)
        for i,src in enumerate(cells): print(*(f"{marks.get((i, j), ' ')} {l}" for j,l in enumerate(src.splitlines(), 1)), '', sep='\n')
    elif a.json: print(json.dumps(measure() | dict(rule=RULE, words=WORDS, rooms=ROOMS), indent=1))
    else: print(*table(measure()), '', 'Science:', RULE, *(f'  {k}: {v}' for k,v in WORDS.items()), f'  ROOMS: {" ".join(ROOMS)}', sep='\n')

if __name__=='__main__': main()
