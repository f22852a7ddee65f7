"What the cells of 23_scores do not say: sizes and numbers of classes beyond toys, odd memory layouts, and that everything is read once"
import numpy as np, pytest
from mctformer_nb.core import DataError, save_mask
from mctformer_nb import scores
from mctformer_nb.scores import confusion, fixed_threshold, score_masks, seed_to_mask, sweep_threshold

def seed(rng, C, k, size, levels=None):
    "A random seed; with `levels` the scores are hundredths, so that many equal a threshold or each other"
    maps = rng.integers(0, levels, (k,*size))/100 if levels else rng.random((k,*size))
    mask = rng.integers(0, C+1, size).astype(np.uint8); mask[rng.random(size)<.1] = 255
    return np.sort(rng.choice(C, k, replace=False)), maps.astype(np.float16), mask

def naive(items, n, ts): return np.stack([sum(confusion(seed_to_mask(c, m, t), y, n) for c,m,y in items) for t in ts])

def miou(conf):
    with np.errstate(invalid='ignore'): return np.nanmean(100*np.diagonal(conf, axis1=1, axis2=2)/(conf.sum(1)+conf.sum(2)-np.diagonal(conf, axis1=1, axis2=2)), 1)

@pytest.mark.parametrize('C,levels', [(1, 3), (20, None), (20, 60), (80, 70), (254, 30)])
def test_sweep_is_the_naive_loop(C, levels):
    rng = np.random.default_rng(C)
    items = [seed(rng, C, min(C, i%6), (int(rng.integers(1,50)), int(rng.integers(1,50))), levels) for i in range(12)]
    ts = np.arange(60)/100
    r, confs = sweep_threshold(items, range(C), ts), naive(items, C+1, ts)
    np.testing.assert_allclose(r.miou, miou(confs), rtol=1e-12)
    np.testing.assert_array_equal(r.confusion, confs[r.miou.argmax()])

def test_memory_layout_and_type_do_not_matter():
    rng = np.random.default_rng(0)
    c, m, y = seed(rng, 20, 3, (32,48), 60)
    want = sweep_threshold([(c, m, y)], range(20))
    strided = np.asfortranarray(m), np.concatenate([m, m], 2)[:,:,:48], np.ascontiguousarray(m[:,::-1])[:,::-1]
    for v in (*strided, m.astype(np.float32), m.astype(np.float64), m.astype('>f2')):
        np.testing.assert_array_equal(sweep_threshold([(c, v, y)], range(20)).miou, want.miou)
    for t in (y.astype(np.int64), y.astype(np.uint64), np.asfortranarray(y)):
        np.testing.assert_array_equal(sweep_threshold([(c, m, t)], range(20)).miou, want.miou)
        assert score_masks([(seed_to_mask(c, m, .3).astype(t.dtype), t)], range(20)).miou == fixed_threshold([(c, m, y)], range(20), .3).miou

def test_input_is_left_alone():
    rng = np.random.default_rng(1); item = seed(rng, 20, 3, (16,16)); before = [x.copy() for x in item]
    sweep_threshold([item], range(20))
    for a,b in zip(item, before): np.testing.assert_array_equal(a, b)

class Counting:
    "A data set that counts how often each mask is asked for"
    def __init__(self, items): self.items, self.classes, self.ids, self.asked = items, [f'c{i}' for i in range(20)], [f'{i:03}' for i in range(len(items))], []
    def mask(self, i): self.asked.append(i); return self.items[i][2]

@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(2); items = [seed(rng, 20, i%4, (20,30)) for i in range(8)]
    for i,(c,m,_) in enumerate(items): np.savez(tmp_path/f'{i:03}.npz', classes=c, maps=m); save_mask(tmp_path/f'{i:03}.png', seed_to_mask(c, m, .3))
    return tmp_path, Counting(items)

def test_everything_is_read_once(files, monkeypatch):
    folder, ds = files; opened = []; read = scores.read_arrays
    monkeypatch.setattr(scores, 'read_arrays', lambda f, *a: (opened.append(f), read(f, *a))[1])
    r = sweep_threshold(folder, ds)
    assert len(opened)==len(set(opened))==8 and sorted(ds.asked)==list(range(8)) and r.n_images==8
    assert len(r.thresholds)==60

def test_files_arrays_and_masks_agree(files):
    folder, ds = files
    want = fixed_threshold(folder, ds, .3)
    np.testing.assert_array_equal(score_masks(folder, ds).confusion, want.confusion)
    np.testing.assert_array_equal(score_masks({i: seed_to_mask(c, m, .3) for i,(c,m,_) in zip(ds.ids, ds.items)}, ds).confusion, want.confusion)
    np.testing.assert_array_equal(fixed_threshold(iter(ds.items), ds, .3).confusion, want.confusion)

@pytest.mark.parametrize('break_it,text', [
    (lambda p: p.write_bytes(p.read_bytes()[:100]), 'not a readable'), (lambda p: p.write_bytes(b'x'*100), 'not a readable'), (lambda p: p.unlink(), 'missing'),
    (lambda p: np.savez(p, classes=[1], maps=np.zeros((1,5,5), np.float16)), 'mask is (20, 30)'),
    (lambda p: np.savez(p, classes=[20], maps=np.zeros((1,20,30), np.float16)), 'outside 0..19'),
    (lambda p: np.savez(p, classes=[-1], maps=np.zeros((1,20,30), np.float16)), 'outside 0..19'),
    (lambda p: np.savez(p, classes=[.5], maps=np.zeros((1,20,30), np.float16)), 'integer class'),
    (lambda p: np.savez(p, classes=['cat'], maps=np.zeros((1,20,30), np.float16)), 'integer class'),
    (lambda p: np.savez(p, classes=[1], maps=np.zeros((20,30), np.float16)), 'one (H,W) map per class'),
    (lambda p: np.savez(p, classes=[1,2], maps=np.stack([np.zeros((20,30)), np.full((20,30), np.nan)])), 'NaN'),
    (lambda p: np.savez(p, classes=[1,2], maps=np.stack([np.ones((20,30)), np.full((20,30), -np.nan)]).astype(np.float16)), 'NaN')])
def test_one_bad_seed_among_good_ones_is_named(files, break_it, text):
    folder, ds = files; break_it(folder/'005.npz')
    with pytest.raises(DataError) as e: sweep_threshold(folder, ds)
    assert '005' in str(e.value) and text in str(e.value)

@pytest.mark.parametrize('break_it,text', [(lambda p: p.write_bytes(p.read_bytes()[:60]), '.'), (lambda p: p.unlink(), 'missing'),
    (lambda p: save_mask(p, np.zeros((30,20), np.uint8)), 'shape'), (lambda p: save_mask(p, np.full((20,30), 21)), 'label 21'), (lambda p: p.write_bytes(b''), 'empty')])
def test_one_bad_mask_among_good_ones_is_named(files, break_it, text):
    folder, ds = files; break_it(folder/'005.png')
    with pytest.raises(DataError) as e: score_masks(folder, ds)
    assert '005' in str(e.value) and text in str(e.value)

# ---- never wrong without a word

PERFECT = np.repeat(np.uint8([[0, 0, 1, 2, 3, 255]]), 4, 0)                 # (4,6), three classes

class Labelled:
    "Perfect masks of classes a, b, c beside image labels that name `named`"
    classes = list('abc')
    def __init__(self, named, masks=3*[PERFECT]): self.named, self.masks, self.ids = named, masks, [str(i) for i in range(len(masks))]
    def mask(self, i): return self.masks[i]
    def labels(self, i): return np.array([self.classes.index(c) for c in self.named], np.int64)

def test_masks_without_any_class_are_an_error_not_a_hundred():
    for value in (0, 255):
        empty = np.uint8([[0, value], [value, 0]])
        with pytest.raises(DataError, match='no foreground class has a pixel'): score_masks([(0*empty, empty)], ['cat'])
        with pytest.raises(DataError, match='no foreground class has a pixel'): sweep_threshold([([], np.zeros((0,2,2)), empty)], ['cat'])
    assert score_masks([(0*PERFECT, PERFECT)], list('abc')).miou == pytest.approx(100*(8/20)/4)     # 8 of 20 pixels are background

def test_other_class_order_is_said():
    order = np.array([0, 2, 3, 1] + 252*[255], np.uint8)                    # a -> b -> c -> a
    assert score_masks({str(i): PERFECT%255 for i in range(3)}, Labelled('abc')).warnings == []
    turned = score_masks({str(i): order[PERFECT]%255 for i in range(3)}, Labelled('abc')).warnings
    assert len(turned) == 1 and 'share no class' in turned[0]
    unnamed = score_masks({str(i): PERFECT%255 for i in range(3)}, Labelled('a')).warnings
    assert len(unnamed) == 1 and '3 of 3 masks' in unnamed[0] and '(b, c)' in unnamed[0]
    assert scores.score_table(score_masks({str(i): PERFECT%255 for i in range(3)}, Labelled('a'))).splitlines()[-1].startswith('warning: 3 of 3')

def test_labels_that_cannot_be_read_do_not_stop_a_score():
    ds = Labelled('abc'); ds.labels = lambda i: (_ for _ in ()).throw(DataError('x.xml', 'is not valid', 'Copy it again'))
    assert score_masks({str(i): PERFECT%255 for i in range(3)}, ds).warnings == []

def test_absent_classes_count_zero_only_when_asked():
    rng = np.random.default_rng(5); item = seed(rng, 4, 3, (16,16)); item[2][item[2]>4] = 0
    names = [f'c{i}' for i in range(20)]
    for f in (lambda n, **k: sweep_threshold([item], names[:n], **k), lambda n, **k: fixed_threshold([item], names[:n], .3, **k),
              lambda n, **k: score_masks([(seed_to_mask(*item[:2], .3), item[2])], names[:n], **k)):
        few, out, zero = f(4), f(20), f(20, absent='zero')
        np.testing.assert_allclose(np.asarray(zero.miou)*21, np.asarray(few.miou)*5)
        np.testing.assert_allclose(out.miou, few.miou)
        assert zero.absent == 'zero' and ' -' in scores.score_table(out) and ' -' not in scores.score_table(zero)
    with pytest.raises(DataError, match="'zero'"): f(20, absent='none')
