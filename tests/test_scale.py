"Shards: the same files whoever does them, and whoever is killed; commands that never write maps"
import importlib.util, os, shutil, signal, subprocess, sys, threading, time
from functools import partial
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
there = lambda name: importlib.util.find_spec(name) is not None
needs = lambda name, extra: pytest.mark.skipif(not there(name), reason=f'{name} is not installed: pip install ".[{extra}]"')
pytestmark = needs('pyarrow', 'scale')

def slow_image(ds, pids, wait, id):
    "A photo that takes its time, from a process that leaves its number"
    (Path(pids)/str(os.getpid())).touch(); time.sleep(wait); return ds.image(id)

def make_job(out, wait=0., n=24, **kw):
    "24 drawn photos in 6 shards, a tiny network"
    import torch; torch.set_num_threads(1)
    from dataclasses import replace
    from mctformer_nb.datasets import get_dataset
    from mctformer_nb.shards import SeedJob, Shards
    from test_seeds import make_model
    out = Path(out); pids = out.parent/f'{out.name}-pids'; pids.mkdir(parents=True, exist_ok=True)
    ds = get_dataset('mini', n=n, size=48)
    if wait: ds = replace(ds, get_image=partial(slow_image, ds, pids, wait))
    return SeedJob(make_model(8), Shards(ds, size=4), out, dict(layers=2), dict(batch_size=2, device='cpu', workers=1), **dict(form='uint8', score=True) | kw)

def run(out, wait=0., turn=None, of=None):
    from mctformer_nb.shards import run_job
    r = run_job(make_job(out, wait), turn, of); print(r.shards, r.written, r.skipped, flush=True)

def start(n, out, wait=0., turns=False):
    "`n` processes that know of each other as torchrun's do; or, with `turns`, know nothing but where to begin"
    import socket
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = dict(os.environ, OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', PYTHONPATH=paths())
    meet = lambda r: dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port)) if n>1 and not turns else {}
    return [subprocess.Popen([sys.executable, __file__, str(out), str(wait), *([str(r), str(n)] if turns else [])], env=env | meet(r), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(n)]

def paths(): return os.pathsep.join([str(ROOT), str(ROOT/'tests'), *filter(None, [os.environ.get('PYTHONPATH')])])
def finish(ps):
    try: out = [p.communicate(timeout=900) for p in ps]
    finally: [p.kill() for p in ps]
    assert not any(p.returncode for p in ps), out
    return [o for o,_ in out]
def contents(folder): return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if p.is_file()}
def shards(out): return len(list(Path(out).glob('shard-*.npz')))

def wait_for(out, n, seconds=600):
    end = time.time()+seconds
    while shards(out)<n and time.time()<end: time.sleep(.05)
    assert shards(out)>=n

def kill_one(out, pids):
    "When the first shard is there: the end of one of those at work; its number"
    wait_for(out, 1); alive = [int(p.name) for p in Path(pids).iterdir() if Path('/proc', p.name).exists() and int(p.name)!=os.getpid()]
    os.kill(alive[-1], signal.SIGKILL); return alive[-1]

@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp('scale')/'one'; run(out); files = contents(out)
    assert len(files)==6+6+2                                     # maps, counts, two notes
    return files

def test_one_process_and_again(undisturbed, tmp_path):
    "Less than everything is completed to the same bytes"
    for k,v in undisturbed.items():
        if k not in ('shard-00002.npz', 'counts-00004.npz'): (tmp_path/'a').mkdir(exist_ok=True); (tmp_path/'a'/k).write_bytes(v)
    from mctformer_nb.shards import run_job
    r = run_job(make_job(tmp_path/'a')); assert (r.shards, r.written, r.skipped, r.bad)==(2, 8, 16, [])
    assert contents(tmp_path/'a')==undisturbed

@pytest.mark.slow
@pytest.mark.parametrize('n,turns', [(2, False), (3, False), (3, True)])
def test_several_processes_write_the_files_of_one(undisturbed, tmp_path, n, turns):
    said = finish(start(n, tmp_path/'out', turns=turns)); assert contents(tmp_path/'out')==undisturbed
    if not turns: assert said==['6 24 0\n']*n                    # all know the whole

@pytest.mark.slow
def test_the_shard_of_a_killed_process_is_done_by_another(undisturbed, tmp_path):
    "Nobody starts anything anew: the one that is left does the rest"
    ps = start(2, tmp_path/'out', .3, turns=True); wait_for(tmp_path/'out', 2); ps[1].send_signal(signal.SIGKILL); ps[1].wait()
    assert shards(tmp_path/'out')<6
    finish(ps[:1]); files = contents(tmp_path/'out'); assert files.keys()==undisturbed.keys() and files==undisturbed
    assert not list((tmp_path/'out').glob('.claim-*'))

@pytest.mark.slow
@needs('submitit', 'slurm')
def test_submitit_with_a_killed_task(undisturbed, tmp_path, monkeypatch):
    from mctformer_nb.engines import run_array
    monkeypatch.setenv('PYTHONPATH', paths()); monkeypatch.setenv('OMP_NUM_THREADS', '1'); job = make_job(tmp_path/'out', .3); killed = []
    t = threading.Thread(target=lambda: killed.append(kill_one(tmp_path/'out', tmp_path/'out-pids'))); t.start()
    r = run_array(job, 2, 'local', timeout_min=30); t.join(); assert killed and (r.shards, r.written, r.bad)==(6, 24, [])
    assert contents(tmp_path/'out')==undisturbed

@pytest.mark.slow
@needs('submitit', 'slurm')
def test_submitit_begins_again_when_all_tasks_are_lost(undisturbed, tmp_path, monkeypatch):
    from mctformer_nb.engines import run_array
    monkeypatch.setenv('PYTHONPATH', paths()); monkeypatch.setenv('OMP_NUM_THREADS', '1')
    t = threading.Thread(target=kill_one, args=(tmp_path/'out', tmp_path/'out-pids')); t.start()
    r = run_array(make_job(tmp_path/'out', .3), 1, 'local', timeout_min=30); t.join(); assert (r.shards, r.written)==(6, 24) and contents(tmp_path/'out')==undisturbed

@pytest.mark.slow
@needs('ray', 'ray')
def test_ray_with_a_killed_worker(undisturbed, tmp_path, monkeypatch):
    import ray
    from mctformer_nb.engines import run_ray
    monkeypatch.setenv('PYTHONPATH', paths()); monkeypatch.setenv('OMP_NUM_THREADS', '1'); monkeypatch.setenv('RAY_USAGE_STATS_ENABLED', '0'); killed = []
    t = threading.Thread(target=lambda: killed.append(kill_one(tmp_path/'out', tmp_path/'out-pids'))); t.start()
    small = {} if os.environ.get('RAY_ADDRESS') else dict(address='local', num_cpus=2, include_dashboard=False, object_store_memory=100*2**20)   # a cluster that runs here, or a new one
    try: r = run_ray(make_job(tmp_path/'out', .3), 2, **small)
    finally: ray.shutdown()
    t.join(); assert killed and (r.shards, r.written, r.bad)==(6, 24, [])
    assert contents(tmp_path/'out')==undisturbed

def test_a_manifest_that_no_longer_fits(tmp_path):
    "A photo that was exchanged after the manifest was made is on the list, the others are done"
    from PIL import Image
    from mctformer_nb.manifest import make_manifest
    from mctformer_nb.shards import Shards, SeedJob, run_job
    from test_seeds import make_folder, make_model, noise
    make_folder(tmp_path/'data', {f'p{i}.png': noise((40, 24), i) for i in range(6)}); make_manifest(f'folder:{tmp_path}/data', tmp_path/'m.parquet', workers=1)
    noise((64, 64)).save(tmp_path/'data/images/p3.png'); (tmp_path/'data/images/p4.png').unlink()
    r = run_job(SeedJob(make_model(), Shards(f'manifest:{tmp_path}/m.parquet', size=4), tmp_path/'out', options=dict(device='cpu'), form='uint8'))
    assert r.written==4 and [id for id,_ in r.bad]==['p3', 'p4'] and 'header or manifest says (40, 24)' in r.bad[0][1]

def test_masks_from_maps_in_memory(tmp_path):
    from mctformer_nb.core import open_mask
    from mctformer_nb.shards import run_job
    job = make_job(tmp_path/'out', n=5, form=None, score=False, labels=tmp_path/'masks', refiner='par'); r = run_job(job); ds = job.shards.whole
    assert r.written==5 and not list((tmp_path/'out').glob('*.npz')) and all(open_mask(tmp_path/f'masks/{id}.png', (48, 48)) is not None for id in ds.ids)
    assert run_job(job).skipped==5

def tutorial_lines():
    import json
    cells = json.loads((ROOT/'nbs/tutorials/many_gpus.ipynb').read_text(encoding='utf-8'))['cells'] if (ROOT/'nbs').is_dir() else []
    return [l for c in cells for l in ''.join(c['source']).splitlines() if l.startswith(('mct_', 'torchrun '))]

@pytest.mark.parametrize('line', tutorial_lines())
def test_commands_take_the_lines_of_the_tutorial(line, monkeypatch):
    import shlex
    from mctformer_nb import cli, cli_masks, cli_scale, command
    words = shlex.split(line.partition(' -- ')[2] or line); monkeypatch.setattr(command, 'run_command', lambda parser, argv, body: parser.parse_args(argv))
    a = next(getattr(m, words[0]) for m in (cli, cli_masks, cli_scale) if hasattr(m, words[0]))(words[1:])
    if getattr(a, 'set', None): assert cli_scale.named_options(a.set)
    if words[0]=='mct_seeds': assert cli.by_shards(a)==('manifest' in line)

if __name__=='__main__': run(Path(sys.argv[1]), float(sys.argv[2]), *map(int, sys.argv[3:]))
