"Several processes give what one gives, and finish what one of them left when it was killed; the same seed gives the same files"
import json, os, shlex, signal, socket, subprocess, sys, time
import numpy as np, pandas as pd, pytest
from pathlib import Path
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]

def photos(n=24):
    from mctformer_nb.datasets import get_dataset
    return get_dataset('mini', n=n, size=48)

def seeds(out, overwrite=False, slow=0.):
    import torch; torch.set_num_threads(1)
    import mctformer_nb.stage as s
    from mctformer_nb.seeds import extract_seeds
    from test_seeds import make_model
    compute = s.compute_batch
    def slowly(*a): time.sleep(slow); return compute(*a)
    if slow: s.compute_batch = slowly
    r = extract_seeds(make_model(8), photos(), out, batch_size=4, workers=1, device='cpu', overwrite=overwrite)
    print(f'written {r.written} skipped {r.skipped}', flush=True)

def classifier(out, epochs=3):
    from test_train import train
    train(Path(out), epochs=epochs, drop_path=0.)           # dropped paths are random numbers of each process

def networks(out, accumulate=1):
    "AffinityNet and DeepLab from true masks"
    from mctformer_nb.affinitynet import train_affinity
    from mctformer_nb.crf import save_crf_label
    from mctformer_nb.deeplab import train_segment
    from mctformer_nb.ranks import connected, first_alone
    ds, out = photos(8), Path(out)
    kw = dict(backbone='resnet10t', pretrained=False, device='cpu', epochs=2, crop=48, batch_size=4)
    with connected(), first_alone():
        for i,id in enumerate(ds.ids):
            if (out/f'labels/{id}.npz').exists(): continue
            m = ds.mask(i); c = np.unique(m[m>0]).astype(int)-1; p = np.stack([m==v for v in (0, *(c+1))]).astype(np.float32)
            save_crf_label(out/f'labels/{id}.npz', c, p, p)
    train_affinity(out/'labels', ds, out/'affinity', recipe='momentum', holdout=0, **kw)
    train_segment(None, ds, out/'deeplab', valid=photos(5), accumulate=int(accumulate), lr=.01, **kw)

def masks(out):
    "Every stage after the training, sharded"
    import torch; torch.set_num_threads(1)
    from mctformer_nb.affinitynet import AffinityNet
    from mctformer_nb.core import set_seed
    from mctformer_nb.crf import crf_labels
    from mctformer_nb.random_walk import make_masks
    from mctformer_nb.segment import segment_dataset
    from test_segment import run
    ds, out = photos(6), Path(out); seeds(out/'seeds'); set_seed(0)
    crf_labels(out/'seeds', ds, out/'labels', workers=1)
    make_masks(out/'seeds', AffinityNet('resnet10t').eval(), ds, out/'masks', device='cpu')
    segment_dataset(run(), ds, out/'segmentation', scales=(.5, 1), device='cpu', workers=1)

def start(what, n, *args):
    "`n` processes that run function `what` of this file, as torchrun would start them"
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = dict(os.environ, OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT/'tests')]))
    meet = lambda r: dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port)) if n>1 else {}
    return [subprocess.Popen([sys.executable, __file__, what, *map(str, args)], env=env | meet(r), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(n)]

def finish(ps):
    "What they print, when all have ended well"
    try: out = [p.communicate(timeout=400) for p in ps]
    finally: [p.kill() for p in ps]
    assert not any(p.returncode for p in ps), out
    return [o for o,_ in out]

def contents(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}
def together(*runs): return [finish(ps) for ps in runs]

def test_two_processes_write_the_files_of_one(tmp_path):
    started = start('seeds', 2, tmp_path/'two')
    seeds(tmp_path/'one'); said = finish(started)
    assert said==['written 24 skipped 0\n']*2                                         # both know the whole
    assert contents(tmp_path/'one')==contents(tmp_path/'two') and len(contents(tmp_path/'one'))==25

@pytest.mark.slow
def test_rank_killed_and_restarted(tmp_path):
    ps = start('seeds', 2, tmp_path/'two', False, .5); deadline = time.time()+600
    while len(list((tmp_path/'two').glob('*.npz'))) < 5 and time.time() < deadline: time.sleep(.05)
    ps[1].send_signal(signal.SIGKILL); ps[1].wait(); ps[0].kill(); ps[0].wait()       # torchrun ends the others when one dies
    done = len(list((tmp_path/'two').glob('*.npz'))); assert 5 <= done < 24
    alone = finish(start('seeds', 1, tmp_path/'one'))                                 # undisturbed, one process
    said = finish(start('seeds', 2, tmp_path/'two'))
    assert said==[f'written {24-done} skipped {done}\n']*2 and contents(tmp_path/'one')==contents(tmp_path/'two')

@pytest.mark.slow
def test_parts_without_a_line_between_them(tmp_path, monkeypatch):
    for r in (1, 0, 2):                                                               # a job array: one after the other, in any order
        for k,v in dict(RANK=r, WORLD_SIZE=3).items(): monkeypatch.setenv(k, str(v))
        seeds(tmp_path/'parts')
    monkeypatch.undo(); seeds(tmp_path/'one'); assert contents(tmp_path/'one')==contents(tmp_path/'parts')

@pytest.mark.slow
def test_every_later_stage_is_shared(tmp_path):
    together(start('masks', 2, tmp_path/'two'), start('masks', 1, tmp_path/'one'))
    one, two = contents(tmp_path/'one'), contents(tmp_path/'two')
    assert one==two and {k.split('/')[0] for k in one}=={'seeds', 'labels', 'masks', 'segmentation'}

def same_training(a, b, atol=2e-4):
    (wa, wb), (ha, hb) = ([load_file(f/'model.safetensors') for f in (a, b)], [pd.read_csv(f/'history.csv').drop(columns='seconds') for f in (a, b)])
    pd.testing.assert_frame_equal(ha, hb, rtol=1e-3)
    assert max(abs(wa[k]-wb[k]).max() for k in wa) < atol and any(abs(wa[k]).max() > .1 for k in wa)

@pytest.mark.slow
def test_classifier_in_two_processes(tmp_path):
    together(start('classifier', 2, tmp_path/'two'), start('classifier', 1, tmp_path/'one'))
    same_training(tmp_path/'one', tmp_path/'two')

@pytest.mark.slow
@pytest.mark.parametrize('accumulate', [1, 2])
def test_networks_in_two_processes(tmp_path, accumulate):
    together(start('networks', 2, tmp_path/'two', accumulate), start('networks', 1, tmp_path/'one', accumulate))
    for net in ('affinity', 'deeplab'): same_training(tmp_path/'one'/net, tmp_path/'two'/net)

@pytest.mark.slow
@pytest.mark.parametrize('what', ['classifier', 'networks', 'masks'])
def test_same_seed_same_files(tmp_path, what):
    together(start(what, 1, tmp_path/'a'), start(what, 1, tmp_path/'b'))
    skip = lambda files: {k: v for k,v in files.items() if not k.endswith(('history.csv', 'resume.pt', '.png')) or 'masks' in k or 'segmentation' in k}     # those hold seconds
    a, b = skip(contents(tmp_path/'a')), skip(contents(tmp_path/'b'))
    assert a==b and any(k.endswith(('.safetensors', '.npz')) for k in a)

if __name__=='__main__': globals()[sys.argv[1]](Path(sys.argv[2]), *(eval(a) for a in sys.argv[3:]))

def tutorial_commands():
    cells = json.loads((ROOT/'nbs/tutorials/many_gpus.ipynb').read_text(encoding='utf-8'))['cells'] if (ROOT/'nbs').is_dir() else []
    return [l for c in cells for l in ''.join(c['source']).splitlines() if l.startswith('torchrun ')]

@pytest.mark.parametrize('line', tutorial_commands())
def test_torchrun_takes_the_commands_of_the_tutorial(line):
    "Its parser looks for its own options behind the program too, and finds --run-path in --run"
    from torch.distributed.run import get_args_parser
    from mctformer_nb import cli, cli_masks
    a = get_args_parser().parse_args(shlex.split(line)[1:]); name = a.training_script
    assert a.no_python and hasattr(cli if hasattr(cli, name) else cli_masks, name) and a.training_script_args[0].startswith('--')

@pytest.mark.slow
def test_torchrun_with_a_command(tmp_path):
    from PIL import Image
    from mctformer_nb.mctformer import MCTformer, save_run
    ds = photos(5); (tmp_path/'my/images').mkdir(parents=True); (tmp_path/'my/classes.txt').write_text('\n'.join(ds.classes)+'\n')
    for i in range(5): ds.image(i).save(tmp_path/f'my/images/{i}.png')
    (tmp_path/'my/labels.csv').write_text('image,labels\n'+''.join(f'{i}.png,{";".join(ds.classes[c] for c in ds.labels(i))}\n' for i in range(5)))
    save_run(MCTformer(len(ds.classes), 'v2', 'mct_tiny_patch8_96'), tmp_path/'run', classes=list(ds.classes), image_size=48)
    env = dict(os.environ, OMP_NUM_THREADS='1', PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}')
    one = ['mct_seeds', '--run', 'run', '--data', 'folder:my', '--device', 'cpu', '--out']
    for args in ([*one, 'one'], ['torchrun', '--nproc-per-node', '2', '--no-python', '--', *one, 'two']):
        r = subprocess.run(args, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300); assert r.returncode==0, r.stderr
    for i in range(5): assert (tmp_path/f'one/{i}.npz').read_bytes()==(tmp_path/f'two/{i}.npz').read_bytes()
