"Map extraction under bad luck: killed runs, broken and odd photos, other batch sizes, the wrong model"
import os, signal, subprocess, sys, time
import numpy as np, pytest, torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from mctformer_nb.core import DataError, set_seed
from mctformer_nb.datasets import get_dataset
from mctformer_nb.mctformer import MCTformer
from mctformer_nb.seeds import extract_seeds, load_seed, save_seed

NAMES = ['cat', 'dog', 'cow']

def make_model(C=3, variant='v2', seed=0):
    "Small and random, but with class tokens that differ"
    set_seed(seed)
    model = MCTformer(C, variant, VisionTransformer(img_size=64, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0)).eval()
    with torch.no_grad(): model.cls_token += torch.randn_like(model.cls_token)
    return model

def noise(size, seed=0): return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8))

def make_folder(root, photos, labels=None):
    "Folder data set of {file name: PIL image or bytes}, labels by file name"
    (root/'images').mkdir(parents=True); rows = ['image,labels']
    for j,(name,im) in enumerate(photos.items()):
        if isinstance(im, bytes): (root/'images'/name).write_bytes(im)
        else: im.save(root/'images'/name)
        rows.append(f"{name},{(labels or {}).get(name, ';'.join({NAMES[j%3], NAMES[j*j%3]}))}")
    (root/'labels.csv').write_text('\n'.join(rows)+'\n'); (root/'classes.txt').write_text('\n'.join(NAMES)+'\n')
    return get_dataset(f'folder:{root}')

SIZES = [(40, 24), (24, 40), (41, 25), (64, 64), (56, 33)]
@pytest.fixture(scope='module')
def many_root(tmp_path_factory): return tmp_path_factory.mktemp('many')/'data'

@pytest.fixture(scope='module')
def many(many_root):
    "Forty photos of five sizes"
    return make_folder(many_root, {f'p{i:02d}.png': noise(SIZES[i%5], i) for i in range(40)})

def contents(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}

def test_batch_size_does_not_matter(many, tmp_path):
    for b in (1, 8): r = extract_seeds(make_model(), many, tmp_path/str(b), batch_size=b, scales=(1, .5)); assert (r.written, r.bad) == (40, [])
    for i,id in enumerate(many.ids):
        (c1,m1), (c8,m8) = (load_seed(tmp_path/b/f'{id}.npz') for b in '18')
        assert c1.tolist() == c8.tolist() == sorted(many.labels(i)) and m1.shape == m8.shape == (len(c1), *many.image(i).size[::-1])
        assert abs(m1.astype(float)-m8.astype(float)).max() <= 1e-3
        assert (m1.min((1, 2)) == 0).all() and (m1.max((1, 2)) == 1).all()

def test_order_of_images_does_not_matter(many, tmp_path):
    extract_seeds(make_model(), many, tmp_path/'a', batch_size=1)
    extract_seeds(make_model(), many.subset(list(many.ids)[::-1]), tmp_path/'b', batch_size=1)
    assert contents(tmp_path/'a') == contents(tmp_path/'b')

SLOW_RUN = '''
import sys, time; sys.path[:0] = [sys.argv[1], sys.argv[1]+'/tests']
import test_seeds as t, mctformer_nb.stage as s, torch
torch.set_num_threads(1)
compute = s.compute_batch
def slowly(*a): time.sleep(.3); return compute(*a)
s.compute_batch = slowly
print('start', flush=True)
t.extract_seeds(t.make_model(), t.get_dataset('folder:'+sys.argv[2]), sys.argv[3], batch_size=4)
'''

def test_killed_run_resumes_to_the_same_files(many, many_root, tmp_path, root):
    torch.set_num_threads(1)
    out = tmp_path/'out'
    p = subprocess.Popen([sys.executable, '-c', SLOW_RUN, str(root), str(many_root), str(out)], stdout=subprocess.DEVNULL)
    deadline = time.time()+600
    while len(list(out.glob('*.npz'))) < 9 and p.poll() is None and time.time() < deadline: time.sleep(.02)
    assert p.poll() is None, 'it ended before it could be killed'
    p.send_signal(signal.SIGKILL); p.wait()
    half = contents(out); done = [n for n in half if n.endswith('.npz')]
    assert 9 <= len(done) < 40
    for n in done: load_seed(out/n)                                              # whatever is there is whole
    stale = out/'.tmp-killed'; stale.mkdir(); (stale/'p39.npz').write_bytes(b'half'); os.utime(stale, (1, 1))
    r = extract_seeds(make_model(), many, out, batch_size=4)
    assert (r.written, r.skipped) == (40-len(done), len(done)) and not stale.exists()
    extract_seeds(make_model(), many, tmp_path/'undisturbed', batch_size=4)
    assert contents(out) == contents(tmp_path/'undisturbed')

def test_odd_photos_pass(tmp_path):
    rgb, grey = noise((40, 24)), noise((40, 24)).convert('L')
    deep = Image.fromarray((np.asarray(grey).astype(np.uint16)*257))
    turned = rgb.copy(); exif = turned.getexif(); exif[0x0112] = 6                # shown a quarter turn to the right
    photos = {'rgb.png': rgb, 'grey.png': grey, 'cmyk.jpg': rgb.convert('CMYK'), 'alpha.png': rgb.convert('RGBA'), 'deep.png': deep, 'palette.png': rgb.convert('P'),
              'small.png': noise((3, 3)), 'line.png': noise((200, 1)), 'dot.png': noise((1, 1))}
    ds = make_folder(tmp_path/'data', photos)
    turned.save(tmp_path/'data/images/turned.jpg', exif=exif)
    with open(tmp_path/'data/labels.csv', 'a') as f: f.write('turned.jpg,cat\n')
    ds = get_dataset(f'folder:{tmp_path/"data"}')
    r = extract_seeds(make_model(), ds, tmp_path/'out')
    assert (r.written, r.bad) == (10, [])
    shapes = {id: load_seed(tmp_path/'out'/f'{id}.npz')[1].shape[1:] for id in ds.ids}
    assert shapes['small'] == (3, 3) and shapes['line'] == (1, 200) and shapes['turned'] == (40, 24) and shapes['deep'] == (24, 40)

def test_bad_photos_are_listed_and_skipped(tmp_path):
    photos = {f'p{i}.jpg': noise((40, 24), i) for i in range(10)}
    make_folder(tmp_path/'data', photos)
    cut, empty, text, gone = (tmp_path/'data/images'/f'p{i}.jpg' for i in (2, 4, 6, 8))
    cut.write_bytes(cut.read_bytes()[:-400]); empty.write_bytes(b''); text.write_text('not a photo')
    ds = get_dataset(f'folder:{tmp_path/"data"}'); gone.unlink()
    r = extract_seeds(make_model(), ds, tmp_path/'out', batch_size=4)
    assert [id for id,_ in r.bad] == ['p2', 'p4', 'p6', 'p8'] and r.written == 6
    assert all(f'{id}.jpg' in problem for id,problem in r.bad)
    again = extract_seeds(make_model(), ds, tmp_path/'out', batch_size=4)        # they are tried again, and nothing else is computed
    assert (again.written, again.skipped, len(again.bad)) == (0, 6, 4)

def test_large_photos_are_said(tmp_path, capfd):
    "A camera's photo is seen smaller, which is said once, and shares a batch with fewer others; its map has its own size"
    from mctformer_nb.seeds import plan_batches
    ds = make_folder(tmp_path/'data', {f'{n}.png': noise((120, 90)) for n in 'abcd'})
    assert extract_seeds(make_model(), ds, tmp_path/'out', longest=60, device='cpu').written == 4 and load_seed(tmp_path/'out/a.npz')[1].shape[1:] == (90, 120)
    assert capfd.readouterr().out.count('4 photos of over 60 pixels are seen smaller (--longest): a ...') == 1
    extract_seeds(make_model(), ds, tmp_path/'whole', longest=None, device='cpu'); assert 'smaller' not in capfd.readouterr().out
    assert [len(b) for b in plan_batches(ds, 8, batch_size=4, pixels=6000)[0]] == [2, 2]

def test_unlabelled_images(tmp_path):
    make_folder(tmp_path/'data', {f'p{i}.png': noise((40, 24), i) for i in range(4)}, {'p1.png': ''})
    ds = get_dataset(f'folder:{tmp_path/"data"}')
    r = extract_seeds(make_model(), ds, tmp_path/'given'); assert (r.written, r.empty) == (4, 1)
    assert load_seed(tmp_path/'given/p1.npz')[1].shape == (0, 24, 40)
    r = extract_seeds(make_model(), ds, tmp_path/'predicted', labels='predicted', label_threshold=1.); assert r.empty == 0
    assert all(len(load_seed(tmp_path/f'predicted/p{i}.npz')[0]) == 1 for i in range(4))

def test_wrong_model_or_folder(many, tmp_path):
    with pytest.raises(DataError, match='5 classes.* has 3'): extract_seeds(make_model(5), many, tmp_path/'x')
    few = many.subset(list(many.ids)[:4])
    extract_seeds(make_model(), few, tmp_path/'out')
    before = contents(tmp_path/'out')
    for change in (dict(model=make_model(seed=1)), dict(layers=2), dict(flip=False), dict(image_size=32), dict(labels='predicted')):
        with pytest.raises(DataError, match='another run'): extract_seeds(**(dict(model=make_model(), ds=many, out=tmp_path/'out') | change))
    assert contents(tmp_path/'out') == before
    r = extract_seeds(make_model(), few, tmp_path/'out', layers=2, overwrite=True)
    assert r.written == 4 and contents(tmp_path/'out') != before
    (tmp_path/'alien').mkdir(); save_seed(tmp_path/'alien'/f'{many.ids[0]}.npz', [0], np.zeros((1, 2, 2)))
    with pytest.raises(DataError, match='_seeds.json'): extract_seeds(make_model(), many, tmp_path/'alien')

def test_damaged_seed_is_written_again(many, tmp_path):
    few = many.subset(list(many.ids)[:4]); extract_seeds(make_model(), few, tmp_path)
    before = contents(tmp_path); cut = tmp_path/f'{few.ids[2]}.npz'; cut.write_bytes(cut.read_bytes()[:-10])
    assert extract_seeds(make_model(), few, tmp_path).written == 1 and contents(tmp_path) == before

def test_nan_weights_are_reported(many, tmp_path):
    model = make_model(); model.blocks[0].mlp.fc1.weight.data.fill_(float('nan'))
    r = extract_seeds(model, many.subset(list(many.ids)[:3]), tmp_path)
    assert r.written == 0 and len(r.bad) == 3 and 'NaN' in r.bad[0][1] and not list(tmp_path.glob('*.npz'))

def test_disk_errors_are_not_swallowed(many, tmp_path, monkeypatch):
    import mctformer_nb.seeds as s
    def full(*a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(s, 'save_seed', full)
    with pytest.raises(OSError, match='No space'): extract_seeds(make_model(), many, tmp_path)

def test_memory_error_splits_the_batch(many, tmp_path, monkeypatch):
    import mctformer_nb.seeds as s
    small = s.batch_maps
    def tight(model, views, *a, **kw):
        if len(views[0]) > 1 or views[0].shape[-1] > 60: raise torch.OutOfMemoryError('too much')
        return small(model, views, *a, **kw)
    monkeypatch.setattr(s, 'batch_maps', tight)
    r = extract_seeds(make_model(), many, tmp_path)
    assert len(r.bad) == 8 and r.written == 32 and 'image_size' in r.bad[0][1]         # the eight of 64 x 64

def test_v1_uses_attention(many, tmp_path):
    few = many.subset(list(many.ids)[:2])
    assert extract_seeds(make_model(variant='v1'), few, tmp_path).written == 2
    with pytest.raises(DataError, match='patch head'): extract_seeds(make_model(variant='v1'), few, tmp_path/'x', kind='fused')

def test_training_mode_is_kept(many, tmp_path):
    model = make_model().train(); extract_seeds(model, many.subset(list(many.ids)[:1]), tmp_path); assert model.training

def test_heads_of_arrays_are_parsed_one_at_a_time(tmp_path, monkeypatch):
    "Python up to 3.11.7 miscounts literals that threads parse at once (SystemError): a sound seed would be reported as damaged"
    import threading
    from concurrent.futures import ThreadPoolExecutor
    import mctformer_nb.files as files
    save_seed(tmp_path/'a.npz', [0, 2], np.ones((2, 5, 4))); busy, met = threading.Lock(), []; parse = files.read_array_header_1_0
    def slow(f):
        met.append(busy.acquire(blocking=False)); time.sleep(.002)
        try: return parse(f)
        finally: met[-1] and busy.locked() and busy.release()
    monkeypatch.setattr(files, 'read_array_header_1_0', slow)
    with ThreadPoolExecutor(4) as pool: seeds = list(pool.map(lambda _: load_seed(tmp_path/'a.npz'), range(20)))
    assert len(met)==40 and all(met) and all(c.tolist()==[0, 2] for c,_ in seeds)
