"Segmenting under bad luck: killed runs, broken photos, runs of other kinds, archives that are not complete"
import io, json, os, signal, subprocess, sys, tarfile, time
import numpy as np, pytest, torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn
import mctformer_nb.segment as S
from mctformer_nb import photo_masks, predict, voc_server
from mctformer_nb.affinitynet import AffinityNet, save_affinity
from mctformer_nb.core import DataError, open_mask, save_mask, set_seed
from mctformer_nb.crf import SEG_CRF
from mctformer_nb.datasets import get_dataset
from mctformer_nb.mctformer import MCTformer
from mctformer_nb.mini import mini_classes
from mctformer_nb.segment import class_probs, photo_dataset, predict_photos, segment, segment_dataset, view_logits, voc_archive

NAMES = mini_classes()

def make_net(seed=0, C=8):
    set_seed(seed); return nn.Sequential(nn.AvgPool2d(4, ceil_mode=True), nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, C+1, 1)).eval()

def run(seed=0): return make_net(seed), NAMES
def data(n=16): return get_dataset('mini', 'val', n=n, size=48)
def contents(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}

def photos(folder, n=5, size=(40, 30)):
    folder.mkdir(parents=True)
    for i in range(n): Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), np.uint8)).save(folder/f'p{i}.png')
    return folder

SLOW_RUN = '''
import sys, time; sys.path[:0] = [sys.argv[1], sys.argv[1]+'/tests']
import test_segment as t, mctformer_nb.segment as s
one = s.class_probs
def slowly(*a, **kw): time.sleep(.2); return one(*a, **kw)
s.class_probs = slowly
s.segment_dataset(t.run(), t.data(), sys.argv[2], scales=(.5, 1), overlays=True, workers=2)
'''

def test_killed_run_resumes_to_the_same_files(tmp_path, root):
    out = tmp_path/'out'
    p = subprocess.Popen([sys.executable, '-c', SLOW_RUN, str(root), str(out)])
    deadline = time.time()+600
    while len(list(out.glob('*.png'))) < 4 and p.poll() is None and time.time() < deadline: time.sleep(.02)
    assert p.poll() is None, 'it ended before it could be killed'
    p.send_signal(signal.SIGKILL); p.wait(); time.sleep(1.5)                       # workers notice within a second
    done = sorted(out.glob('*.png')); assert 4 <= len(done) < 16
    for f in done: open_mask(f, (48, 48))
    for d in out.rglob('.tmp-*'): os.utime(d, (1, 1))
    r = segment_dataset(run(), data(), out, scales=(.5, 1), overlays=True, workers=1)
    assert (r.written, r.skipped, r.bad) == (16-len(done), len(done), [])
    segment_dataset(run(), data(), tmp_path/'undisturbed', scales=(.5, 1), overlays=True, workers=1)
    assert contents(out) == contents(tmp_path/'undisturbed')

def test_bad_photos_are_listed_and_skipped(tmp_path):
    d = photos(tmp_path/'photos', 6); (d/'p1.png').write_bytes(b''); (d/'p3.png').write_text('no photo'); f = d/'p4.png'; f.write_bytes(f.read_bytes()[:200])
    r = segment_dataset(run(), d, tmp_path/'out', (1,), workers=1)
    assert r.written == 3 and [id for id,_ in r.bad] == ['p1', 'p3', 'p4'] and all(f'{id}.png' in problem for id,problem in r.bad)
    again = segment_dataset(run(), d, tmp_path/'out', (1,), workers=1); assert (again.written, again.skipped, len(again.bad)) == (0, 3, 3)
    p = predict_photos(run(), d, tmp_path/'p', scales=(1,), workers=1)
    assert [id for id,_ in p.bad] == ['p1', 'p3', 'p4'] and (tmp_path/'p/scores.csv').read_text().count('\n') == 4

def test_odd_photos_pass(tmp_path):
    d = photos(tmp_path/'photos', 1); rgb = Image.open(d/'p0.png')
    for name,im in dict(grey=rgb.convert('L'), alpha=rgb.convert('RGBA'), dot=rgb.resize((1, 1)), line=rgb.resize((90, 1))).items(): im.save(d/f'{name}.png')
    r = segment_dataset(run(), d, tmp_path/'out', window=32, workers=1); assert (r.written, r.bad) == (5, [])
    assert open_mask(tmp_path/'out/line.png').shape == (1, 90) and open_mask(tmp_path/'out/dot.png').shape == (1, 1)

def test_overlays_later_leave_the_masks(tmp_path):
    ds = data(3); segment_dataset(run(), ds, tmp_path, (1,), workers=1); before = contents(tmp_path)
    r = segment_dataset(run(), ds, tmp_path, (1,), overlays=True, workers=1); after = contents(tmp_path)
    assert r.written == 3 and {k: after[k] for k in before} == before and len(after) == len(before)+3

def test_number_of_processes_does_not_matter(tmp_path):
    for n in (1, 2): segment_dataset(run(), data(4), tmp_path/str(n), (.5, 1), workers=n)
    assert contents(tmp_path/'1') == contents(tmp_path/'2')

def test_nan_weights_are_reported(tmp_path):
    net, names = run(); net[1].weight.data.fill_(float('nan'))
    r = segment_dataset((net, names), data(2), tmp_path, workers=1)
    assert r.written == 0 and len(r.bad) == 2 and 'NaN' in r.bad[0][1] and not list(tmp_path.glob('*.png'))

def test_memory_error_is_one_photo_less(tmp_path, monkeypatch):
    d = photos(tmp_path/'photos', 2); photos(tmp_path/'photos/large', 1, (80, 60)); whole = S.class_probs
    def tight(net, image, **kw):
        if image.size[0] > 50: raise torch.OutOfMemoryError('too much')
        return whole(net, image, **kw)
    monkeypatch.setattr(S, 'class_probs', tight)
    r = segment_dataset(run(), d, tmp_path/'out', (1,), workers=1)
    assert r.written == 2 and r.bad[0][0] == 'large/p0' and '--window' in r.bad[0][1]

def test_disk_errors_are_not_swallowed(tmp_path, monkeypatch):
    def full(*a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(photo_masks, 'save_mask', full)
    with pytest.raises(OSError, match='No space'): segment_dataset(run(), data(2), tmp_path, (1,), workers=1)
    assert not list(tmp_path.glob('*.png'))

def test_other_runs_and_folders(tmp_path):
    save_affinity(AffinityNet('resnet10t'), tmp_path/'aff')
    with pytest.raises(DataError, match='another network .affinitynet'): segment_dataset(tmp_path/'aff', data(1), tmp_path/'x')
    with pytest.raises(DataError, match='is a run of affinitynet'): predict_photos(tmp_path/'aff', photos(tmp_path/'some', 1), tmp_path/'x')
    with pytest.raises(DataError, match='config.json'): predict_photos(tmp_path/'none', photos(tmp_path/'photos'), tmp_path/'x')
    with pytest.raises(DataError, match='has the classes'): segment_dataset((make_net(C=3), ['a', 'b', 'c']), data(1), tmp_path/'x')
    with pytest.raises(DataError, match='scales'): segment_dataset(run(), data(1), tmp_path/'x', scales=(0, 1))
    with pytest.raises(DataError, match='no photos'): (tmp_path/'empty').mkdir(); predict_photos(run(), tmp_path/'empty', tmp_path/'x')
    assert not (tmp_path/'x').exists()
    segment_dataset(run(), data(1), tmp_path/'out', (1,), workers=1)
    with pytest.raises(DataError, match='model was'): segment_dataset(run(1), data(2), tmp_path/'out', (1,), workers=1)
    assert segment_dataset(run(1), data(2), tmp_path/'out', (1,), workers=1, overwrite=True).written == 2

def test_missing_crf_is_replaced_or_stops_at_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, 'pydensecrf.densecrf', None)
    with pytest.raises(DataError, match='pip install pydensecrf2'): segment_dataset(run(), data(1), tmp_path/'x', crf=SEG_CRF)
    assert not (tmp_path/'x').exists() and segment_dataset(run(), data(1), tmp_path/'out', crf=None).written == 1
    assert segment_dataset(run(), data(2), tmp_path/'par', (1,)).written == 2 and 'PAR' in capfd.readouterr().err
    note = json.loads((tmp_path/'par/_segment.json').read_text()); assert 'dilations' in note['crf']

def test_windows_see_every_pixel_of_any_size():
    net = make_net(); x = torch.randn(1, 3, 65, 131)
    with torch.no_grad():
        for window in (32, 40, 64, 65, 131): assert view_logits(net, x, window).isfinite().all() and view_logits(net, x, window).shape == (1, 9, 65, 131)
        assert torch.equal(view_logits(net, x, 131), view_logits(net, x))

def test_training_mode_is_kept(tmp_path):
    net, names = run(); net.train(); segment_dataset((net, names), data(1), tmp_path, (1,), workers=1); segment(net, data(1).image(0), (1,)); assert net.training

@pytest.mark.parametrize('variant', ['v1', 'v2'])
def test_predict_with_a_classifier(tmp_path, variant):
    set_seed(0); model = MCTformer(8, variant, VisionTransformer(img_size=64, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0)).eval()
    with torch.no_grad(): model.cls_token += torch.randn_like(model.cls_token)
    d = photos(tmp_path/'photos', 3); files = sorted(d.iterdir())
    for t,some in ((0., True), (1., False)):                                       # every class, or none
        r = predict_photos((model, NAMES), files, tmp_path/str(t), label_threshold=t, workers=1)
        assert r.written == 3 and set(r.scores['p0']) == set(NAMES) and open_mask(tmp_path/f'{t}/p0.png', (30, 40)).any() == some
    with pytest.raises(DataError, match='label_threshold was'): predict_photos((model, NAMES), files, tmp_path/'1.0', label_threshold=.5)
    if variant == 'v1':
        with pytest.raises(DataError, match='patch head'): predict_photos((model, NAMES), files, tmp_path/'x', maps=dict(kind='fused'))

def test_same_name_of_two_photos(tmp_path):
    a, b = photos(tmp_path/'a', 1), photos(tmp_path/'b', 1, (20, 20))
    r = predict_photos(run(), [a/'p0.png', b/'p0.png'], tmp_path/'out', scales=(1,), workers=1)
    assert list(r.scores) == ['p0', 'p0_2'] and open_mask(tmp_path/'out/p0_2.png').shape == (20, 20)
    with pytest.raises(DataError, match='not of .*b/p0.png'): predict_photos(run(), b/'p0.png', tmp_path/'out', scales=(1,), workers=1)
    assert predict_photos(run(), b/'p0.png', tmp_path/'out', scales=(1,), workers=1, overwrite=True).written == 1

def test_every_photo_of_one_name_has_its_result(tmp_path):
    "Three photos, one of them already named like the second of two"
    for d,name,size in (('a', 'cat.png', (20, 30)), ('b', 'cat.png', (21, 30)), ('c', 'cat_2.png', (22, 30)), ('d', 'CAT.png', (23, 30))):
        photos(tmp_path/d, 1, size); (tmp_path/d/'p0.png').rename(tmp_path/d/name)
    files, said = sorted(tmp_path.glob('?/*.png')), []
    r = predict_photos(run(), files, tmp_path/'out', scales=(1,), workers=1, log=said.append)
    sizes = {p.stem: open_mask(p).shape[1] for p in (tmp_path/'out').glob('*.png')}
    assert r.written == 4 and sorted(sizes.values()) == [20, 21, 22, 23] and len({n.casefold() for n in sizes}) == 4
    assert set(r.renamed) == set(sizes)-{'cat'} and len(said) == 3 and all(any(str(f) in line for line in said) for f in files[1:])
    again = predict_photos(run(), files, tmp_path/'out', scales=(1,), workers=1, log=said.append); assert (again.written, again.skipped) == (0, 4)

def test_large_photos_are_said(tmp_path):
    d, said = photos(tmp_path/'photos', 2), []; photos(tmp_path/'photos/large', 1, (80, 60))
    r = predict_photos(run(), d, tmp_path/'out', longest=50, scales=(1,), workers=1, log=said.append)
    assert r.reduced == ['large/p0'] and len(said) == 1 and '50 pixels' in said[0] and 'large/p0' in said[0]
    assert open_mask(tmp_path/'out/large/p0.png').shape == (60, 80) and Image.open(tmp_path/'out/overlays/large/p0.jpg').size == (50, 38)
    r = predict_photos(run(), d, tmp_path/'whole', longest=None, scales=(1,), workers=1, log=said.append); assert r.reduced == [] and len(said) == 1

def test_network_of_the_package(tmp_path, monkeypatch):
    "Without a run: the packaged one, its weights in half precision; a clear error where there is none"
    from safetensors.torch import load_file, save_file
    from mctformer_nb.deeplab_net import DeepLab, save_segment
    monkeypatch.setattr(predict.mctformer_nb, '__file__', str(tmp_path/'pkg/__init__.py')); d = photos(tmp_path/'photos', 1)
    with pytest.raises(DataError, match='holds no network for photos.*--run'): predict_photos(None, d, tmp_path/'out')
    home = tmp_path/'pkg/data/animals'; save_segment(DeepLab(2, 'test_resnet', width=4, dilation=1), home, ['cat', 'dog'])
    save_file({k: v.half() if v.is_floating_point() else v for k,v in load_file(home/'model.safetensors').items()}, home/'model.safetensors')
    r = predict_photos(None, d, tmp_path/'out', scales=(1,), workers=1); assert r.classes == ['cat', 'dog'] and r.written == 1

def test_names_that_moved():
    import mctformer_nb.segment as segment
    assert segment.class_scores is predict.class_probabilities and segment.predict_photos is predict.predict_photos and segment.voc_archive is voc_server.voc_archive
    with pytest.raises(AttributeError, match='no attribute .nothing'): segment.nothing
    with pytest.raises(ImportError): from mctformer_nb.segment import nothing

def archive_args(tmp_path):
    ids = [f'2008_{i:06d}' for i in range(4)]
    for i,id in enumerate(ids): save_mask(tmp_path/f'masks/{id}.png', np.full((5, 6), i, np.uint8))
    return dict(masks=tmp_path/'masks', ids=ids, out=tmp_path/'a.tar.gz')

def test_archive_is_complete_or_not_there(tmp_path, monkeypatch):
    a = archive_args(tmp_path); m = a['masks']; good = (m/f'{a["ids"][1]}.png').read_bytes()
    def refused(match, **kw):
        with pytest.raises(DataError, match=match): voc_archive(**(a | kw))
        assert not list(tmp_path.glob('*.tar*')) and not list(tmp_path.glob('.tmp-*'))
    refused('2 of 6 masks are missing', ids=a['ids']+['x', 'y']); refused('no images', ids=[]); refused('more than once', ids=a['ids']+a['ids'][:1]); refused('ends in .tar.gz', out=tmp_path/'a.zip'); refused('comp4', comp='comp4')
    save_mask(m/f'{a["ids"][1]}.png', np.full((5, 6), 255, np.uint8)); refused('mask value 255')
    (m/f'{a["ids"][1]}.png').write_bytes(good[:60]); refused(a['ids'][1])
    (m/f'{a["ids"][1]}.png').write_bytes(good)
    with monkeypatch.context() as mp:
        mp.setattr(voc_server, 'server_png', lambda *a: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
        with pytest.raises(OSError): voc_archive(**a)
    assert not list(tmp_path.glob('*.tar*'))
    Image.fromarray(np.full((5, 6), 1, np.uint8)).save(m/f'{a["ids"][1]}.png')                      # grey is repaired
    assert voc_archive(**a, comp='comp5').images == 4
    with tarfile.open(a['out']) as t:
        assert t.getnames() == [f'results/VOC2012/Segmentation/comp5_test_cls/{i}.png' for i in a['ids']]
        assert all(Image.open(io.BytesIO(t.extractfile(n).read())).mode == 'P' for n in t.getnames())

def test_archive_checks_sizes(tmp_path):
    ds = data(2)
    for id in ds.ids: save_mask(tmp_path/f'{id}.png', np.zeros((48, 47), np.uint8))
    with pytest.raises(DataError, match='the mask is 47 x 48, its photo 48 x 48'): voc_archive(tmp_path, ds, tmp_path/'a.tgz')
