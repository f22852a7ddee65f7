"CRF labels under bad luck: killed runs, seeds that do not fit, disks that are full; and the formula's parameters"
import os, signal, subprocess, sys, time
import numpy as np, pytest
pytest.importorskip('pydensecrf.densecrf')
import mctformer_nb.crf as C
from mctformer_nb.core import DataError
from mctformer_nb.crf import crf_labels, dense_crf, load_crf_label
from mctformer_nb.datasets import get_dataset

def make_seeds(folder, ds, seed=0):
    "Ground truth with noise on it"
    folder.mkdir(parents=True, exist_ok=True); rng = np.random.default_rng(seed)
    for id in ds.ids:
        m, c = ds.mask(id), ds.labels(id)
        maps = np.stack([(.2+.6*(m==k+1)+.2*rng.random(m.shape)) for k in c])
        np.savez_compressed(folder/f'{id}.npz', classes=c, maps=maps.astype(np.float16))
    return folder

def data(n=16): return get_dataset('mini', n=n, size=48)
def contents(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}

SLOW_RUN = '''
import sys, time; sys.path[:0] = [sys.argv[1], sys.argv[1]+'/tests']
import test_crf as t, mctformer_nb.crf as c
one = c.write_label
def slowly(*a): time.sleep(.3); return one(*a)
c.write_label = slowly
c.crf_labels(sys.argv[2], t.data(), sys.argv[3], workers=2)
'''

def children(pid):
    "Processes that come from `pid` (Linux)"
    found, more = set(), {pid}
    parents = {}
    for p in os.listdir('/proc'):
        if p.isdigit():
            try: parents[int(p)] = int(open(f'/proc/{p}/stat').read().rsplit(')', 1)[1].split()[1])
            except OSError: pass
    while more: more = {p for p,q in parents.items() if q in more} - found; found |= more
    return found

def alive(pid):
    try: return open(f'/proc/{pid}/stat').read().rsplit(')', 1)[1].split()[0] != 'Z'
    except OSError: return False

def test_killed_run_resumes_to_the_same_files(tmp_path, root):
    ds, out = data(), tmp_path/'out'; make_seeds(tmp_path/'seeds', ds)
    p = subprocess.Popen([sys.executable, '-c', SLOW_RUN, str(root), str(tmp_path/'seeds'), str(out)])
    deadline = time.time()+600
    while len(list(out.glob('*.npz'))) < 4 and p.poll() is None and time.time() < deadline: time.sleep(.02)
    assert p.poll() is None, 'it ended before it could be killed'
    workers = children(p.pid) if os.path.isdir('/proc') else set()
    p.send_signal(signal.SIGKILL); p.wait()
    while any(map(alive, workers)) and time.time() < deadline: time.sleep(.1)     # workers do not outlive their parent
    assert not any(map(alive, workers))
    done = sorted(out.glob('*.npz')); assert 4 <= len(done) < 16
    for f in done: load_crf_label(f)                                              # whatever is there is whole
    stale = out/'.tmp-killed'; stale.mkdir(); (stale/'x.npz').write_bytes(b'half'); os.utime(stale, (1, 1))
    r = crf_labels(tmp_path/'seeds', ds, out, workers=1)
    assert (r.written, r.skipped, r.bad) == (16-len(done), len(done), []) and not stale.exists()
    crf_labels(tmp_path/'seeds', ds, tmp_path/'undisturbed', workers=1)
    assert contents(out) == contents(tmp_path/'undisturbed')

def test_what_does_not_fit_is_listed(tmp_path):
    ds = data(7); seeds = make_seeds(tmp_path/'seeds', ds); f = [seeds/f'{id}.npz' for id in ds.ids]
    m = np.full((1, 48, 48), .5, np.float16)
    f[0].unlink(); f[1].write_bytes(f[1].read_bytes()[:50])
    np.savez(f[2], classes=np.array([0]), maps=m[:, 1:]); np.savez(f[3], classes=np.array([8]), maps=m)
    np.savez(f[4], classes=np.array([0]), maps=m*np.float16('nan')); np.savez(f[5], classes=np.array([0, 1]), maps=m)
    r = crf_labels(seeds, ds, tmp_path/'out', workers=1)
    assert r.written == 1 and [id for id,_ in r.bad] == list(ds.ids[:6])
    for (id,problem),part in zip(r.bad, ('no seed of this image', 'readable', 'the photo 48 x 48', 'class 8 is not one of the 8', 'not numbers', '1 maps for 2 classes')):
        assert part in problem and f'{id}.npz' in problem
    make_seeds(seeds, ds)                                                         # mended: only these are done
    r = crf_labels(seeds, ds, tmp_path/'out', workers=1); assert (r.written, r.skipped, r.bad) == (6, 1, [])

def test_unreadable_photo_is_listed(tmp_path):
    from PIL import Image
    ds, photos = data(3), tmp_path/'data'; (photos/'images').mkdir(parents=True); seeds = make_seeds(tmp_path/'seeds', ds)
    for id in ds.ids: Image.fromarray(np.asarray(ds.image(id))).save(photos/f'images/{id}.png')
    (photos/'classes.txt').write_text('\n'.join(ds.classes)); (photos/f'images/{ds.ids[1]}.png').write_bytes(b'')
    r = crf_labels(seeds, get_dataset(f'folder:{photos}'), tmp_path/'out', workers=1)
    assert r.written == 2 and [id for id,_ in r.bad] == [ds.ids[1]] and '0 bytes' in r.bad[0][1]

def test_damaged_label_is_written_again(tmp_path):
    ds = data(3); seeds = make_seeds(tmp_path/'seeds', ds); crf_labels(seeds, ds, tmp_path/'out', workers=1)
    before = contents(tmp_path/'out'); cut = tmp_path/f'out/{ds.ids[1]}.npz'; cut.write_bytes(cut.read_bytes()[:-10])
    assert crf_labels(seeds, ds, tmp_path/'out', workers=1).written == 1 and contents(tmp_path/'out') == before

def test_labels_of_other_seeds_are_refused(tmp_path):
    ds = data(2); seeds = make_seeds(tmp_path/'seeds', ds); note = seeds/'_seeds.json'
    note.write_text('{"layers": 3}'); crf_labels(seeds, ds, tmp_path/'out', workers=1)
    note.write_text('{"layers": 12}')
    with pytest.raises(DataError, match='holds labels of another run.*seeds was'): crf_labels(seeds, ds, tmp_path/'out', workers=1)
    assert crf_labels(seeds, ds, tmp_path/'out', workers=1, overwrite=True).written == 2
    note.write_text('{"classes": ["cat", "dog"]}')
    with pytest.raises(DataError, match='of the classes cat, dog'): crf_labels(seeds, ds, tmp_path/'x', workers=1)

def test_missing_package_is_told_and_par_goes_on(tmp_path, monkeypatch, capfd):
    ds = data(2); seeds = make_seeds(tmp_path/'seeds', ds)
    monkeypatch.setitem(sys.modules, 'pydensecrf.densecrf', None)
    with pytest.raises(DataError, match='pip install pydensecrf2'): crf_labels(seeds, ds, tmp_path/'out', refiner='crf')
    assert not (tmp_path/'out').exists()
    assert crf_labels(seeds, ds, tmp_path/'out', workers=1).written == 2
    said = [l for l in capfd.readouterr().err.splitlines() if 'PAR' in l]; assert len(said) == 1 and 'pydensecrf is not installed' in said[0]
    monkeypatch.undo(); crf_labels(seeds, ds, tmp_path/'par', workers=1, refiner='par'); assert contents(tmp_path/'par') == contents(tmp_path/'out')
    with pytest.raises(DataError, match='holds labels of another run'): crf_labels(seeds, ds, tmp_path/'out', workers=1)      # never two kinds in one folder

@pytest.mark.parametrize('refiner', ['crf', 'par'])
def test_any_number_of_processes_writes_the_same(tmp_path, refiner):
    ds = data(5); seeds = make_seeds(tmp_path/'seeds', ds)
    for n in (1, 2): crf_labels(seeds, ds, tmp_path/str(n), workers=n, refiner=refiner)
    assert contents(tmp_path/'1') == contents(tmp_path/'2')

def _full(path, *a, **kw): raise OSError(28, 'No space left on device')

@pytest.mark.parametrize('workers', [1, 2])
def test_disk_errors_are_not_swallowed(tmp_path, monkeypatch, workers):
    ds = data(3); seeds = make_seeds(tmp_path/'seeds', ds)
    monkeypatch.setattr(C, 'write_label', _no_space)
    with pytest.raises(OSError, match='No space'): crf_labels(seeds, ds, tmp_path/'out', workers=workers)
    assert not list((tmp_path/'out').glob('*.npz'))

def _no_space(*a):
    C.np.savez_compressed = _full                                                 # the disk fills up in the middle of a file
    try: return _write_label(*a)
    finally: C.np.savez_compressed = _savez
_write_label, _savez = C.write_label, np.savez_compressed

def _die(*a): os._exit(3)

def test_lost_worker_is_explained(tmp_path, monkeypatch):
    ds = data(4); seeds = make_seeds(tmp_path/'seeds', ds); monkeypatch.setattr(C, 'write_label', _die)
    with pytest.raises(DataError, match='fewer workers'): crf_labels(seeds, ds, tmp_path/'out', workers=2)

def test_exchanging_classes_exchanges_rows():
    rng = np.random.default_rng(0); image, p = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8), rng.random((4, 20, 30))
    assert abs(dense_crf(image, p)[[2, 0, 3, 1]]-dense_crf(image, p[[2, 0, 3, 1]])).max() < 1e-3
    assert abs(dense_crf(image, p)-dense_crf(image, p/2)).max() < 1e-4            # a factor per pixel does not matter

def test_readonly_and_odd_layouts():
    from PIL import Image
    im = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)); p = np.random.default_rng(1).random((2, 9, 14))
    want = dense_crf(np.array(im), p)
    assert (dense_crf(im, p) == want).all() and (dense_crf(np.asarray(im), np.asfortranarray(p)) == want).all()
    assert (dense_crf(np.asarray(im)[:, ::-1], p[..., ::-1])[..., ::-1].argmax(0) == want.argmax(0)).mean() > .95

def test_par_moves_a_boundary_to_the_edge_and_keeps_the_rest():
    from mctformer_nb.par import par
    for w,cut,off in ((40, 20, 26), (64, 32, 20), (30, 11, 15)):
        image = np.full((24, w, 3), 60, np.uint8); image[:, cut:] = (180, 90, 220); p = np.zeros((2, 24, w), np.float32); p[0, :, :off] = 1; p[1] = 1-p[0]
        found = par(image, p); assert ((found[0] > found[1]) == (np.arange(w) < cut)).all()
        assert abs(found.sum(0)-1).max() < 1e-5 and found.min() >= 0 and found.max() <= 1+1e-5
    rng = np.random.default_rng(0); image, p = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8), rng.random((3, 20, 30))
    assert abs(par(image, .3*p+.2*p[[1, 0, 2]])-(.3*par(image, p)+.2*par(image, p)[[1, 0, 2]])).max() < 1e-6             # linear, every row for itself
    assert abs(par(image[:, ::-1], p[..., ::-1])[..., ::-1]-par(image, p)).max() < 1e-5                                # no side is better

def test_consensus_of_thresholds():
    from mctformer_nb.consensus import consensus
    rng = np.random.default_rng(0); image, maps = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8), rng.random((2, 24, 32))
    for how in (None, dict(iterations=3, dilations=(1, 2))):
        assert 255 not in consensus(maps, image, .5, .5, how)
        wide, narrow = consensus(maps, image, .2, .8, how), consensus(maps, image, .4, .6, how)
        assert ((wide==narrow) | (wide==255)).all() and (wide==255).sum() > (narrow==255).sum()      # the further apart, the more is open, and nothing changes sides
    exact = consensus(maps, image, .3, .6, None, classes=[3, 7], shrink=1); best, top = maps.argmax(0), maps.max(0)
    assert (exact == np.where(top > .6, np.array([4, 8])[best], np.where(top < .3, 0, 255))).all()
