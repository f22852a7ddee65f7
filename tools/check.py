"""The notebook half of `make test`: are notebooks clean, package and README in sync with them, and does every unflagged cell run?

    python tools/check.py [--jobs 2] [clean export readme run]   # the parts to check; these by default
    python tools/check.py apart                                  # run the notebooks beside the paper's story: tutorials, other tools, very many photos

Nothing in the tree is written, and no git is needed."""
import argparse, filecmp, os, re, shutil, subprocess, sys, tempfile, time
from functools import partial
from pathlib import Path
from execnb.nbio import nb2str, read_nb
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
sys.path.insert(0, str(Path(__file__).parent))
import nbrun

cfg = get_config(); root = cfg.config_path

def notebooks():
    "All notebooks, in reading order, relative to the repository"
    return [Path(os.path.relpath(f, root)) for f in sorted(nbglob(as_path=True))]

def check_clean():
    "Notebooks that `nbdev_clean` would change"
    bad = []
    for f in notebooks():
        nb = read_nb(root/f); clean_nb(nb, clean_ids=cfg.clean_ids)
        if nb2str(nb)!=(root/f).read_text(encoding='utf-8'): bad.append(f'{f} is not clean: run `make export`')
    return bad

def export_to(tmp):
    "Export all notebooks into an empty package inside folder `tmp`, which gets a copy of what the export reads"
    lib = Path(cfg.lib_path).name
    shutil.copy2(root/'settings.ini', tmp)
    shutil.copytree(root/'nbs', tmp/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints', '*.png', '*.html'))
    (tmp/lib).mkdir(); shutil.copy2(root/lib/'__init__.py', tmp/lib)
    cmd = [sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()']
    subprocess.run(cmd, cwd=tmp, check=True, env={k:v for k,v in os.environ.items() if k!='IN_TEST'})
    return tmp/lib

def check_export():
    "Modules that differ from what their notebooks export"
    with tempfile.TemporaryDirectory() as tmp:
        got, lib = export_to(Path(tmp)), Path(cfg.lib_path)
        names = {f.relative_to(d) for d in (got,lib) for f in d.rglob('*.py') if '__pycache__' not in f.parts}
        same = lambda n: (got/n).exists() and (lib/n).exists() and filecmp.cmp(got/n, lib/n, shallow=False)
        return [f'{lib.name}/{n} is not what the notebooks export: run `make export`' for n in sorted(names) if not same(n)]

def check_readme():
    "README.md and its figures against `nbs/index.ipynb`"
    r = subprocess.run([sys.executable, root/'tools'/'readme.py', '--check'], cwd=root, capture_output=True, text=True)
    return [(r.stderr or r.stdout).strip()] if r.returncode else []

APART = re.compile(r'nbs/(47|53|7\d|8\d)_|nbs/tutorials/') # beside the story; what they export has tests of its own

def check_run(jobs=2, timeout=600, apart=False):
    "Notebooks whose unflagged cells fail; `jobs` run at a time"
    os.chdir(root); flags, chosen = set(cfg.tst_flags.split()), [f for f in notebooks() if bool(APART.match(f.as_posix()))==apart]
    chosen.sort(key=lambda f: f.stem!='52_demo')            # it takes longest: begun last, the other jobs would wait for it
    return [f'{f} failed' for f in nbrun.run_all(chosen, flags, timeout, check_only=True, jobs=jobs)]

PARTS = dict(clean=check_clean, export=check_export, readme=check_readme, run=check_run, apart=partial(check_run, apart=True))

def main(parts, jobs):
    "Run `parts`, say what is wrong, return the number of problems"
    bad = []
    for p in parts:
        start = time.time(); found = PARTS[p](**(dict(jobs=jobs) if p in ('run', 'apart') else {})); bad += found
        print(f"check {p}: {'ok' if not found else f'{len(found)} wrong'} ({time.time()-start:.0f} s)", flush=True)
    for b in bad: print(f'error: {b}', file=sys.stderr)
    return len(bad)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('parts', nargs='*', default=[p for p in PARTS if p!='apart'], help=' '.join(PARTS))
    p.add_argument('--jobs', type=int, default=2, help='notebooks at a time')
    a = p.parse_args()
    if unknown := set(a.parts)-PARTS.keys(): p.error(f'no such part: {", ".join(unknown)}')
    sys.exit(min(main(a.parts, a.jobs), 1))
