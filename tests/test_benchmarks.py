"The scripts in benchmarks/: each runs at tiny sizes, writes nothing then, and agrees with the plain version"
import json, os, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'benchmarks'))

def quick(name, tmp_path, *more):
    out = tmp_path/'bench.json'
    r = subprocess.run([sys.executable, '-W', 'ignore', str(ROOT/f'benchmarks/{name}.py'), '--quick', '--json', str(out), *more], capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode==0, r.stderr
    assert not out.exists()                       # tiny sizes are no result
    return r.stdout

def test_sweep(tmp_path): assert 'largest difference 0' in quick('sweep', tmp_path)

@pytest.mark.slow
@pytest.mark.parametrize('name', ['extraction', 'train_step', 'random_walk', 'crf', 'startup', 'profiles', 'scale', 'published', 'segmentation'])
def test_quick(name, tmp_path):
    if name=='scale': pytest.importorskip('pyarrow')
    assert {'startup': ' --help', 'profiles': 'share of the limit', 'scale': '2 workers, 40 photos', 'published': 'files to files, int8'}.get(name, 'times faster') in quick(name, tmp_path)

def test_turns_alternate_and_ratios_are_of_rounds():
    from _common import by_turns, compare, ratio
    order = []
    got = by_turns({'a': lambda: order.append('a') or 1, 'b': lambda: order.append('b') or 2}, 3, warm=lambda: None)
    assert order==['a', 'b']*3 and got['b']['result']==2 and len(got['a']['cpu'])==3
    plain, ours = (dict(cpu=c, wall=[2*x for x in c], mem=[m*2**20]*3) for c,m in (([4, 8, 2], 30), ([1, 1, 1], 2)))
    assert ratio(plain, ours)==4
    row = compare(plain, ours); assert (row['times faster'], row['times less memory'], row['seconds plain'])==(4, 15, 4)

def test_memory_of_a_call_is_seen():
    torch = pytest.importorskip('torch')
    if sys.platform!='linux': pytest.skip('needs /proc')
    from _common import measure
    mb = measure(lambda: torch.ones(40*2**18).sum().item())[2]/2**20
    assert 35<mb<60

def test_records_have_what_they_need():
    records = json.loads((ROOT/'results/bench.json').read_text(encoding='utf-8'))
    assert {r['table'] for r in records} >= {f'benchmark: {t}' for t in ('map extraction', 'training step', 'random walk', 'threshold sweep', 'dense CRF', 'start', 'profile')}
    assert all(r['threads']>=1 and r['commit'] and r['hardware'] and r['command'].startswith('python benchmarks/') for r in records)
    for script in {r['command'].split()[1] for r in records}: assert (ROOT/script).is_file()

@pytest.mark.slow
def test_the_published_code_itself(tmp_path):
    "With the clone that MCTFORMER_CLONE names; `test_quick` runs the same script against a stand-in"
    clone = os.environ.get('MCTFORMER_CLONE')
    if not clone: pytest.skip('MCTFORMER_CLONE does not name a clone of the published code')
    out = quick('published', tmp_path, '--clone', clone)
    assert 'files to files, float32' in out and 'training step 64 x 64' in out

@pytest.mark.slow
def test_the_gpu_script_runs_dry(tmp_path):
    "Every step of experiments/gpu.sh, on the CPU with a tiny network: what it needs is there, and nothing is recorded"
    r = subprocess.run(['bash', str(ROOT/'experiments/gpu.sh'), '--dry', '--out', str(tmp_path/'gpu'), '--json', str(tmp_path/'gpu.json')], capture_output=True, text=True, env=dict(os.environ, PYTHON=sys.executable))
    assert r.returncode==0, r.stdout+r.stderr
    for word in ('CPU and GPU', 'one view 64 x 64', 'step 64 x 64', 'v2: segmentation', 'done in'): assert word in r.stdout
    assert 'failed:' not in r.stdout and not (tmp_path/'gpu.json').exists()
