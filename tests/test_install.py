"A built wheel is complete, and works away from the repository"
import shutil, subprocess, sys, zipfile
from pathlib import Path
import pytest
from test_repo import CFG, MODULES, PKG, ROOT, tracked

pytestmark = pytest.mark.slow

def run(*args, **kw):
    r = subprocess.run([str(a) for a in args], capture_output=True, text=True, **kw)
    assert r.returncode==0, f'{r.stdout}\n{r.stderr}'
    return r.stdout

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "Wheel built from a copy of the tracked files, so that no stale build folder and no untracked file can help"
    src, out = tmp_path_factory.mktemp('src'), tmp_path_factory.mktemp('dist')
    for f in tracked():
        if '.git' in (rel := f.relative_to(ROOT)).parts: continue
        (src/rel).parent.mkdir(parents=True, exist_ok=True); shutil.copy2(f, src/rel)
    run(sys.executable, '-m', 'pip', 'wheel', '--no-deps', '-w', out, src, cwd=out)
    found = list(out.glob('*.whl')); assert len(found)==1
    return found[0]

def test_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f'{PKG}/{nb.module}.py' for nb in MODULES} | {f'{PKG}/__init__.py', f'{PKG}/_modidx.py'} <= names
    data = {f'{PKG}/data/{f.name}' for f in tracked() if f.parent==ROOT/PKG/'data'}
    assert data <= names and any(n.endswith('.safetensors') for n in data), 'the embedded weights are missing'
    assert any(n.endswith('LICENSE') for n in names)
    assert all(n.startswith((f'{PKG}/', f'{PKG}-')) for n in names), 'files outside the package'
    assert wheel.stat().st_size<=20e6 # 18 MB are the three networks that work offline

def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as z:
        info = f"{PKG}-{CFG['version']}.dist-info"; meta = z.read(f'{info}/METADATA').decode(); entry = z.read(f'{info}/entry_points.txt').decode()
    assert all(f'Provides-Extra: {e}' in meta for e in ('coco', 'crf', 'dev'))
    assert all(s.split('=')[0]+' = ' in entry.replace('=', ' = ').replace('  ', ' ') for s in CFG['console_scripts'].split())
    assert '](nbs' not in meta and '](results' not in meta, 'README links must be absolute on an index page'

def test_import_from_an_empty_target(wheel, tmp_path):
    target = tmp_path/'site'
    run(sys.executable, '-m', 'pip', 'install', '--no-deps', '--target', target, wheel)
    code = f"import sys; sys.path.insert(0, {str(target)!r}); import {PKG}.core as m; print(m.__file__)"
    got = Path(run(sys.executable, '-c', code, cwd=tmp_path).strip())
    assert target in got.parents
