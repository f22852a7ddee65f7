"The scripts in benchmarks/: each runs at tiny sizes, writes nothing then, and agrees with the plain version"
import json, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'benchmarks'))

def quick(name, tmp_path):
    out = tmp_path/'bench.json'
    r = subprocess.run([sys.executable, '-W', 'ignore', str(ROOT/f'benchmarks/{name}.py'), '--quick', '--json', str(out)], capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode==0, r.stderr
    assert not out.exists()                       # tiny sizes are no result
    return r.stdout

def test_sweep(tmp_path): assert 'largest difference 0' in quick('sweep', tmp_path)

@pytest.mark.slow
@pytest.mark.parametrize('name', ['extraction', 'train_step', 'random_walk', 'crf', 'startup', 'profiles', 'scale'])
def test_quick(name, tmp_path):
    if name=='scale': pytest.importorskip('pyarrow')
    assert {'startup': 'mct_train --help', 'profiles': 'share of the limit', 'scale': '2 workers, 40 photos'}.get(name, 'times faster') in quick(name, tmp_path)

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
