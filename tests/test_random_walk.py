"The random walk on drawn cases against the dense matrix, and the masks under bad luck: killed runs, broken seeds, other settings, a full disk"
import json, os, signal, subprocess, sys, time
import numpy as np, pytest, torch
from PIL import Image
from mctformer_nb.affinitynet import AffinityNet, predict_affinity
from mctformer_nb.artifacts import save_seed
from mctformer_nb.core import DataError, open_mask, save_mask
from mctformer_nb.datasets import get_dataset
from mctformer_nb.pairs import pair_affinity, pair_offsets, pair_starts
from mctformer_nb.random_walk import make_masks, random_walk, walked_mask

torch.set_num_threads(1)
NAMES = ['cat', 'dog', 'cow']

def dense(maps, affinity, radius, beta, steps):
    "From the formula, in double precision: column-normalised affinity^beta, maps @ T^steps"
    (k,h,w), W = maps.shape, np.eye(maps[0].size)
    for p,(dy,dx) in enumerate(pair_offsets(radius)):
        for y,x in np.ndindex(h, w):
            if y+dy<h and 0<=x+dx<w: i, j = y*w+x, (y+dy)*w+x+dx; W[i,j] = W[j,i] = float(affinity[p,y,x])**beta
    return (maps.reshape(k, -1).astype(float) @ np.linalg.matrix_power(W/W.sum(0), steps)).reshape(maps.shape)

def case(seed):
    "A drawn grid, radius, power and number of steps; features, not affinities, are random: what lies outside is then 0"
    g = np.random.default_rng(seed); h, w, radius = (int(g.integers(1, n)) for n in (12, 12, 6)); radius = max(radius, 2)
    a = pair_affinity(torch.tensor(g.normal(size=(1,6,h,w))*g.uniform(0, 2)), pair_offsets(radius))[0].numpy()
    return g.random((int(g.integers(1, 5)),h,w)), a, radius, float(g.choice([0, 1, 2.5, 8, 16])), int(g.integers(0, 130))

@pytest.mark.parametrize('seed', range(40))
def test_equals_the_dense_matrix(seed):
    maps, a, radius, beta, steps = case(seed); want = dense(maps, a, radius, beta, steps)
    assert np.abs(random_walk(maps, a, beta, steps)-want).max() < 1e-11
    assert np.abs(random_walk(maps.astype(np.float32), a.astype(np.float32), beta, steps)-want).max() < 1e-5

@pytest.mark.parametrize('seed', range(100, 120))
def test_what_a_walk_keeps(seed):
    maps, a, _, beta, steps = case(seed); out = random_walk(maps, a, beta, steps); walk = lambda m: random_walk(m, a, beta, steps)
    assert np.allclose(walk(np.ones_like(maps)), 1, atol=1e-12) and np.allclose(walk(maps/maps.sum(0)).sum(0), 1, atol=1e-12)
    lo, hi = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
    assert (out >= lo-1e-12).all() and (out <= hi+1e-12).all()
    assert np.allclose(walk(maps[::-1]), out[::-1], atol=1e-13) and np.allclose(walk(2*maps+1), 2*out+1, atol=1e-11)      # rows are independent, the walk is linear
    half = random_walk(random_walk(maps, a, beta, steps//2), a, beta, steps-steps//2)
    assert np.allclose(half, out, atol=1e-12)                                                                            # two walks are one longer walk

def test_single_precision_stays_close_over_many_steps():
    g = np.random.default_rng(0); maps = g.random((3,14,15)).astype(np.float32); a = g.uniform(.5, 1, (34,14,15)).astype(np.float32)
    assert np.abs(random_walk(maps, a, 8, 1024)-dense(maps, a, 5, 8, 1024)).max() < 5e-6
    assert np.abs(random_walk(np.ones_like(maps), a, 8, 4096)-1).max() < 1e-6

def test_kinds_of_arrays():
    g = np.random.default_rng(0); m, a = g.random((2,6,7)), g.random((34,6,7))
    want = random_walk(m, a)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        out = random_walk(torch.tensor(m, dtype=dtype), torch.tensor(a)); assert out.dtype == (dtype if dtype==torch.float64 else torch.float32)
        assert np.abs(out.numpy()-want).max() < 5e-3
    assert random_walk(m.astype(np.float16), a.astype(np.float16)).dtype == np.float32
    x = torch.tensor(m, requires_grad=True); assert not random_walk(x, torch.tensor(a)).requires_grad
    before = m.copy(); random_walk(m, a, steps=3); assert np.array_equal(m, before)
    assert np.array_equal(random_walk(np.asfortranarray(m), a[:, ::1]), want)

def test_large_grid_needs_little_memory():
    "128 x 128 cells: the dense matrix alone would be 1 GB"
    code = '''
import resource, torch
from mctformer_nb.random_walk import random_walk
torch.set_num_threads(1); random_walk(torch.rand(2,9,9), torch.rand(34,9,9), steps=2)
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
random_walk(torch.rand(21,128,128), torch.rand(34,128,128), steps=4)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-base)/1024)'''
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True); assert r.returncode==0, r.stderr
    assert float(r.stdout) < 300

# ---- the stage

SIZES = [(40, 24), (24, 40), (41, 25), (64, 64), (56, 33)]

def by_brightness(im, stride=8):
    "Affinity of a photo from its grey values"
    w,h = im.size; grey = torch.tensor(np.asarray(im.convert('L'), np.float32))[None, None]/64
    return pair_affinity(torch.nn.functional.avg_pool2d(grey, stride, ceil_mode=True), pair_offsets(5))[0]

def make_data(root, n=20, unlabelled=()):
    "Folder data set of `n` photos and seeds for them -> (data set, folder of seeds)"
    (root/'images').mkdir(parents=True); rows = ['image,labels']
    for i in range(n):
        g = np.random.default_rng(i); w,h = SIZES[i%5]
        Image.fromarray(g.integers(0, 256, (h,w,3), np.uint8)).save(root/'images'/f'p{i:02d}.png')
        classes = [] if i in unlabelled else sorted({i%3, i*i%3}); rows.append(f"p{i:02d}.png,{';'.join(NAMES[c] for c in classes)}")
        save_seed(root/'seeds'/f'p{i:02d}.npz', classes, g.random((len(classes),h,w)))
    (root/'labels.csv').write_text('\n'.join(rows)+'\n'); (root/'classes.txt').write_text('\n'.join(NAMES)+'\n')
    return get_dataset(f'folder:{root}'), root/'seeds'

def contents(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}

@pytest.fixture
def data(tmp_path): return make_data(tmp_path/'data', unlabelled=(3,))

SLOW_RUN = '''
import sys, time; sys.path[:0] = [sys.argv[1], sys.argv[1]+'/tests']
from pathlib import Path
import test_random_walk as t
def by_brightness(im): time.sleep(.2); return t.by_brightness(im)
t.make_masks(Path(sys.argv[2])/'seeds', by_brightness, t.get_dataset('folder:'+sys.argv[2]), sys.argv[3])
'''

def test_killed_run_resumes_to_the_same_files(data, tmp_path, root):
    ds, seeds = data; out = tmp_path/'out'
    p = subprocess.Popen([sys.executable, '-c', SLOW_RUN, str(root), str(seeds.parent), str(out)], stdout=subprocess.DEVNULL)
    deadline = time.time()+600
    while len(list(out.glob('*.png'))) < 5 and p.poll() is None and time.time() < deadline: time.sleep(.02)
    assert p.poll() is None, 'it ended before it could be killed'
    p.send_signal(signal.SIGKILL); p.wait()
    done = [q for q in out.glob('*.png')]; assert 5 <= len(done) < 20
    for q in done: open_mask(q)                                                  # whatever is there is whole
    stale = out/'.tmp-killed'; stale.mkdir(); (stale/'p19.png').write_bytes(b'half'); os.utime(stale, (1, 1))
    r = make_masks(seeds, by_brightness, ds, out); assert (r.written, r.skipped, r.bad) == (20-len(done), len(done), []) and not stale.exists()
    make_masks(seeds, by_brightness, ds, tmp_path/'undisturbed'); assert contents(out) == contents(tmp_path/'undisturbed')

def test_masks_are_what_the_functions_say(data, tmp_path):
    ds, seeds = data; r = make_masks(seeds, by_brightness, ds, tmp_path/'out', background=.5, beta=4, steps=10, workers=1)
    assert (r.written, r.empty, r.skipped, r.bad) == (20, 1, 0, [])
    for id in ds.ids:
        with np.load(seeds/f'{id}.npz') as f: classes, maps = f['classes'], f['maps']
        im = ds.image(id); mask = open_mask(tmp_path/'out'/f'{id}.png', im.size[::-1]); assert set(np.unique(mask)) <= {0, *(classes+1)}
        assert np.array_equal(mask, walked_mask(classes, maps, by_brightness(im), .5, beta=4, steps=10))
    assert Image.open(tmp_path/'out/p00.png').mode == 'P' and open_mask(tmp_path/'out/p03.png').max() == 0

def test_finer_cells(data, tmp_path):
    ds, seeds = data; r = make_masks(seeds, lambda im: by_brightness(im, 4), ds, tmp_path/'out', stride=4); assert (r.written, r.bad) == (20, [])
    r = make_masks(seeds, by_brightness, ds, tmp_path/'x', stride=4); assert r.written == 1 and len(r.bad) == 19 and 'cells' in r.bad[0][1]     # only the one without a class

class TwoConvs(torch.nn.Module):
    "A backbone of stride 8"
    channels, strides = [6, 8], [8, 8]
    def __init__(self): super().__init__(); self.a, self.b = torch.nn.Conv2d(3, 6, 8, 8), torch.nn.Conv2d(6, 8, 1)
    def forward(self, x): a = self.a(x); return [a, self.b(a)]

def test_with_a_network(data, tmp_path):
    ds, seeds = data; torch.manual_seed(0); net = AffinityNet(TwoConvs()).train()
    r = make_masks(seeds, net, ds, tmp_path/'8', device='cpu'); assert (r.written, r.bad) == (20, []) and net.training
    with np.load(seeds/'p00.npz') as f: want = walked_mask(f['classes'], f['maps'], predict_affinity(net, ds.image('p00')))
    assert np.array_equal(open_mask(tmp_path/'8/p00.png'), want)
    r = make_masks(seeds, net, ds, tmp_path/'4', stride=4, device='cpu'); assert (r.written, r.bad) == (20, [])
    r = make_masks(seeds, net, ds, tmp_path/'5', stride=5, device='cpu'); assert (r.written, r.bad) == (20, [])         # any number of pixels
    with torch.no_grad(): next(net.parameters()).add_(1)
    with pytest.raises(DataError, match='affinity was'): make_masks(seeds, net, ds, tmp_path/'8', device='cpu')

def test_bad_seeds_and_photos_are_listed(data, tmp_path):
    ds, seeds = data
    (seeds/'p01.npz').unlink(); (seeds/'p02.npz').write_bytes(b'no seed'); save_seed(seeds/'p04.npz', [0], np.zeros((1,5,5))); save_seed(seeds/'p05.npz', [3], np.zeros((1,24,40)))
    (seeds.parent/'images/p06.png').write_bytes(b'no photo'); (seeds.parent/'images/p07.png').unlink()
    r = make_masks(seeds, by_brightness, ds, tmp_path/'out')
    assert [i for i,_ in r.bad] == [f'p{i:02d}' for i in (1, 2, 4, 5, 6, 7)] and r.written == 14
    say = dict(r.bad)
    for id,word in dict(p01='no seed of this image', p02='seed file', p04='photo 56 x 33', p05='class 3', p06='p06.png', p07='p07.png').items(): assert word in say[id], say[id]
    again = make_masks(seeds, by_brightness, ds, tmp_path/'out'); assert (again.written, again.skipped, len(again.bad)) == (0, 14, 6)

def test_bad_affinity_is_listed(data, tmp_path):
    ds, seeds = data
    r = make_masks(seeds, lambda im: by_brightness(im)*float('nan'), ds, tmp_path/'nan'); assert r.written == 1 and 'NaN' in r.bad[0][1]
    r = make_masks(seeds, lambda im: by_brightness(im)[:7], ds, tmp_path/'few'); assert r.written == 1 and '7 pairs' in r.bad[0][1]
    def broken(im): raise RuntimeError('a bug')
    with pytest.raises(RuntimeError, match='a bug'): make_masks(seeds, broken, ds, tmp_path/'bug')

def test_what_cannot_work(data, tmp_path):
    ds, seeds = data; go = lambda **kw: make_masks(**(dict(seeds_folder=seeds, net=by_brightness, ds=ds, out=tmp_path/'x') | kw))
    scores = tmp_path/'s.json'; scores.write_text(json.dumps(dict(miou=3)))
    (tmp_path/'empty').mkdir()
    for kw,word in [(dict(seeds_folder=tmp_path/'none'), 'no such folder'), (dict(seeds_folder=tmp_path/'empty'), 'has no seed'), (dict(background=1.5), 'outside'), (dict(background=scores), 'best_threshold'),
                    (dict(background=tmp_path/'none.json'), 'none.json'), (dict(alpha=-1), 'alpha'), (dict(beta=-1), 'beta'), (dict(steps=.5), 'steps'), (dict(stride=.5, strides=8), 'strides: unknown'), (dict(border='no'), 'border'), (dict(ds=ds.subset([])), 'has no seed')]:
        with pytest.raises(DataError, match=word): go(**kw)
    (seeds/'_seeds.json').write_text(json.dumps(dict(classes=['fox'])))
    with pytest.raises(DataError, match='of the classes fox'): go()
    assert not (tmp_path/'x').exists()

def test_settings_are_not_mixed(data, tmp_path):
    ds, seeds = data; out = tmp_path/'out'; assert make_masks(seeds, by_brightness, ds, out).bad == []; before = contents(out)
    for change in (dict(background=.4), dict(alpha=4), dict(beta=9), dict(steps=9), dict(stride=4), dict(border='reference'), dict(net=lambda im: by_brightness(im))):
        with pytest.raises(DataError, match='another run'): make_masks(**(dict(seeds_folder=seeds, net=by_brightness, ds=ds, out=out) | change))
    (seeds/'_seeds.json').write_text(json.dumps(dict(layers=3)))                # the seeds were written anew
    with pytest.raises(DataError, match='seeds was'): make_masks(seeds, by_brightness, ds, out)
    assert contents(out) == before
    r = make_masks(seeds, by_brightness, ds, out, alpha=4, overwrite=True); assert (r.written, r.bad) == (20, []) and contents(out) != before
    (tmp_path/'alien').mkdir(); save_mask(tmp_path/'alien/p00.png', np.zeros((2, 2), np.uint8))
    with pytest.raises(DataError, match='_masks.json'): make_masks(seeds, by_brightness, ds, tmp_path/'alien')

def test_damaged_mask_is_written_again(data, tmp_path):
    ds, seeds = data; make_masks(seeds, by_brightness, ds, tmp_path/'out'); before = contents(tmp_path/'out')
    cut = tmp_path/'out/p05.png'; cut.write_bytes(cut.read_bytes()[:-3])
    assert make_masks(seeds, by_brightness, ds, tmp_path/'out').written == 1 and contents(tmp_path/'out') == before

def test_full_disk_is_not_swallowed(data, tmp_path, monkeypatch):
    import mctformer_nb.random_walk as w
    def full(*a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(w, 'save_mask', full); ds, seeds = data
    with pytest.raises(OSError, match='No space'): make_masks(seeds, by_brightness, ds, tmp_path/'out')
    assert not list((tmp_path/'out').glob('*.png'))

def test_border_as_the_network_was_trained(data, tmp_path):
    ds, seeds = data; torch.manual_seed(0); net, same = AffinityNet(TwoConvs(), border='reference').eval(), AffinityNet(TwoConvs()).eval(); same.load_state_dict(net.state_dict())
    for name,n,kw in (('own', net, {}), ('said', same, dict(border='reference')), ('all', same, {}), ('other', net, dict(border='all'))): assert make_masks(seeds, n, ds, tmp_path/name, device='cpu', **kw).bad == []
    assert contents(tmp_path/'own')==contents(tmp_path/'said') and contents(tmp_path/'all')==contents(tmp_path/'other')
    assert json.loads((tmp_path/'own/_masks.json').read_text())['affinity'].endswith(', border reference')
    a = predict_affinity(net, ds.image('p03')); assert torch.equal(a, predict_affinity(same, ds.image('p03'))*torch.from_numpy(pair_starts(a.shape[1:], net.offsets)))

def test_refined_by_either(data, tmp_path):
    from mctformer_nb.par import PAR
    ds, seeds = data; r = make_masks(seeds, by_brightness, ds, tmp_path/'par', crf=PAR); assert (r.written, r.bad) == (20, [])
    r = make_masks(seeds, by_brightness, ds, tmp_path/'par', crf='par'); assert r.skipped == 20                          # the same by its name
    with pytest.raises(DataError, match='crf was'): make_masks(seeds, by_brightness, ds, tmp_path/'par')
