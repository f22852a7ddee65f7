"The notebooks of the paper's tables say what the records say, and the script behind them does what it says."
import importlib.util, json, re, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from fastcore.basics import AttrDict
from mctformer_nb.seeds import load_seed, save_seed
from mctformer_nb.tables import FIELDS, PAPER, load_records, summarise

ROOT = Path(__file__).parents[1]
if not (ROOT/'experiments').is_dir() or not (ROOT/'results').is_dir(): pytest.skip('needs the repository', allow_module_level=True)

@pytest.fixture(scope='module')
def reproduce():
    spec = importlib.util.spec_from_file_location('reproduce', ROOT/'experiments'/'reproduce.py'); mod = importlib.util.module_from_spec(spec); spec.loader.exec_module(mod)
    return mod

def shown(name):
    "Tables and text that a notebook stores, as lines"
    cells = json.loads((ROOT/'nbs'/'tables'/f'{name}.ipynb').read_text(encoding='utf-8'))['cells']
    outputs = [o for c in cells for o in c.get('outputs', [])]
    return '\n'.join(''.join(o.get('data', {}).get('text/markdown', o.get('text', ''))) for o in outputs)

def sources(name): return '\n'.join(''.join(c['source']) for c in json.loads((ROOT/'nbs'/'tables'/f'{name}.ipynb').read_text(encoding='utf-8'))['cells'])

@pytest.mark.parametrize('n', PAPER)
def test_every_row_of_the_paper_is_shown(n):
    text = shown(f'table{n}')
    for row,values in PAPER[n]['rows'].items():
        line = next((l for l in text.splitlines() if l.startswith('| ' + row.replace('*', '\\*') + ' |')), None)
        assert line, row
        cells = [c.strip() for c in line.split('|')]
        assert [c for c in cells if c in {f'{v:.1f}' for v in values}], f'{row}: {line}'

@pytest.mark.parametrize('n', ['1', '2', '5', '6', '7'])
def test_stored_numbers_are_those_of_the_records(n):
    text = shown(f'table{n}')
    mine = [s for s in summarise(load_records(ROOT/'results')) if s['table']==n and s['dataset']=='mini']
    assert mine and all(s['n']==3 for s in mine), [(s['row'], s['n']) for s in mine]
    for s in mine: assert f"{s['mean']:.1f}" + (f" ± {s['std']:.1f}" if s['n']>1 else '') in text, s
    assert 'the standard deviation over 3 seeds' in text
    assert 'Not measured in full' not in text

@pytest.mark.parametrize('name', [*(f'table{n}' for n in PAPER), 'figure4', 'figure5', 'figure6'])
def test_notebooks_name_a_command_and_assert(name):
    text = sources(name)
    assert 'assert ' in text and re.search(r'(python experiments/\w+\.py|mct_\w+ --)', text)
    for script in re.findall(r'python (experiments/\w+\.py)', text): assert (ROOT/script).is_file(), script

def test_records_of_the_tables_are_complete():
    for name in ('mini_maps', 'mini_tables', 'mini_segmentation'):
        for r in load_records(ROOT/'results'/f'{name}.json'):
            assert set(FIELDS) <= set(r) and r['command'].startswith('python experiments/') and r['hardware'] and r['date'], r
            if r['dataset']=='mini': assert r['seed'] in (0, 1, 2) and 0<=r['value']<=100

def test_level_keeps_the_order_and_moves_the_threshold(reproduce, tmp_path):
    rng = np.random.default_rng(0); maps = rng.random((2, 8, 8)).astype(np.float32); (tmp_path/'in').mkdir(); (tmp_path/'out').mkdir()
    save_seed(tmp_path/'in'/'a.npz', [0, 3], maps)
    s = AttrDict(part=AttrDict(ids=['a'])); reproduce.level(s, AttrDict(best_threshold=.1), tmp_path/'in', tmp_path/'out', .3)
    before, (classes, after) = load_seed(tmp_path/'in'/'a.npz')[1].astype(np.float32), load_seed(tmp_path/'out'/'a.npz')
    assert list(classes)==[0, 3] and (np.argmax(before, 0)==np.argmax(after, 0)).all()
    clear = abs(before-.1)>1e-3
    assert ((before>.1)==(after.astype(np.float32)>.3))[clear].all()

def test_table4_from_the_command_line(tmp_path):
    r = subprocess.run([sys.executable, ROOT/'experiments'/'reproduce.py', '--tables', '4', '--json', tmp_path/'t.json', '--out', tmp_path/'runs'], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    found = {(x['row'], x['metric']): x['value'] for x in load_records(tmp_path/'t.json')}
    for row,(params, macs) in PAPER['4']['rows'].items():
        assert abs(found[row, 'parameters (M)']-params)<=.0515 and abs(found[row, 'MACs (G)']-macs)<=.0515, row     # the paper rounds twice
    assert not (tmp_path/'runs').exists()

def test_table6_on_photos_wants_weights(tmp_path):
    r = subprocess.run([sys.executable, ROOT/'experiments'/'reproduce.py', '--data', 'voc:nowhere', '--tables', '6'], cwd=tmp_path, capture_output=True, text=True)
    assert r.returncode==2 and '--resnet38' in r.stderr and not list(tmp_path.iterdir())
