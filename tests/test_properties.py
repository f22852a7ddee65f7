"Scores, sweep, random walk, affinity, resizing and file formats against versions that are slow and plain, on inputs that hypothesis makes up"
import json, math
import numpy as np, pytest, torch
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from mctformer_nb.affinity import refine_by, token_attention
from mctformer_nb.affinitynet import pair_affinity, pair_kinds, pair_loss, pair_offsets
from mctformer_nb.attention import minmax, to_input
from mctformer_nb.core import open_mask, read_arrays, read_json, save_mask, write_json
from mctformer_nb.crf import add_background, load_crf_label, save_crf_label
from mctformer_nb.deeplab import crop_view
from mctformer_nb.fast_maps import affinity_apply
from mctformer_nb.other_affinity import class_boxes, sinkhorn
from mctformer_nb.random_walk import random_walk
from mctformer_nb.scores import confusion, iou_fp_fn, seed_to_mask, sweep_threshold
from mctformer_nb.seeds import load_seed, save_seed
from mctformer_nb.segment import window_slices
from mctformer_nb.vit import resize_pos

quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], derandomize=True)
sides = st.integers(1, 7)
def arrays(shape, low=0., high=1., width=32): return hnp.arrays(np.float32, shape, elements=st.floats(low, high, width=width, allow_subnormal=False))
def labels(shape, n): return hnp.arrays(np.uint8, shape, elements=st.sampled_from([*range(n), 255]))

# ---- scores

@st.composite
def pairs(draw):
    n, shape = draw(st.integers(1, 5)), (draw(sides), draw(sides))
    return n, draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, n-1))), draw(labels(shape, n))

@quick
@given(pairs())
def test_scores_are_counts_of_pixels(x):
    n, p, t = x; c = confusion(p, t, n); r = iou_fp_fn(c)
    for i in range(n):
        assert [c[i, j] for j in range(n)]==[sum(t.flat[k]==i and p.flat[k]==j for k in range(t.size)) for j in range(n)]
        P, T = {k for k in range(t.size) if p.flat[k]==i and t.flat[k]!=255}, {k for k in range(t.size) if t.flat[k]==i}
        if P|T: assert math.isclose(r['iou'][i], 100*len(P&T)/len(P|T)) and math.isclose(r['iou'][i]+r['fp_class'][i]+r['fn_class'][i], 100)
        else: assert np.isnan(r['iou'][i])
    there = r['iou'][~np.isnan(r['iou'])]
    assert np.isnan(r['miou']) if not len(there) else math.isclose(r['miou'], there.mean())

@st.composite
def seeds(draw):
    "Scores are often hundredths, so that they equal thresholds and each other"
    C, shape, dtype = draw(st.integers(1, 4)), (draw(sides), draw(sides)), draw(st.sampled_from([np.float16, np.float32, np.float64]))
    items = []
    for _ in range(draw(st.integers(1, 3))):
        classes = draw(st.lists(st.integers(0, C-1), unique=True, max_size=C)); grid = draw(hnp.arrays(np.int64, (len(classes), *shape), elements=st.integers(0, 100)))
        items.append((np.array(classes, np.int64), (grid/100).astype(dtype), draw(labels(shape, C+1))))
    return C, items

@quick
@given(seeds(), st.lists(st.integers(0, 100), min_size=1, max_size=6, unique=True))
def test_sweep_is_every_threshold_alone(x, at):
    (C, items), ts = x, np.sort(at)/100
    want = [iou_fp_fn(sum(confusion(seed_to_mask(c, m, t), y, C+1) for c,m,y in items)) for t in ts]
    assume(any(((y>0) & (y<255)).any() for _,_,y in items))              # without any foreground there is nothing to score: an error
    r = sweep_threshold(items, [str(i) for i in range(C)], ts)
    np.testing.assert_allclose(r.miou, [w['miou'] for w in want]); np.testing.assert_allclose(r.fp, [w['fp'] for w in want])
    assert math.isclose(r.best_miou, np.nanmax([w['miou'] for w in want])) and r.best_threshold in ts

# ---- affinity and walk

@quick
@given(st.data(), st.integers(1, 2), st.integers(1, 3), st.integers(0, 2), st.integers(1, 9), st.integers(1, 2))
def test_affinity_without_its_matrix(data, B, H, C, M, c):
    q, k = (torch.from_numpy(data.draw(arrays((B, H, C+M, 4), -2, 2))) for _ in 'qk'); maps = torch.from_numpy(data.draw(arrays((B, c, M))))
    A = (q.double()@k.double().transpose(-1, -2)*.5).softmax(-1).mean(1)[:, C:, C:]                  # (B,N,N) -> patches with patches (B,M,M)
    want = torch.einsum('bij,bcj->bci', A, maps.double())
    np.testing.assert_allclose(affinity_apply(q, k, maps, C, .5).numpy(), want.numpy(), atol=1e-5)
    plain = refine_by(token_attention(q, k, .5)[:, C:, C:], maps[..., None], (M, 1))                  # Eq. 3 as it stands
    np.testing.assert_allclose(plain[..., 0].numpy(), want.numpy(), atol=1e-5)

@quick
@given(st.data(), st.integers(1, 6), st.integers(0, 8))
def test_sinkhorn_row_by_row(data, M, rounds):
    A = data.draw(arrays((M, M), 1/64, 1)); want = A.astype(float)
    for _ in range(rounds):
        for j in range(M): want[:, j] /= want[:, j].sum()
        for i in range(M): want[i] /= want[i].sum()
    got = sinkhorn(torch.from_numpy(A)[None], rounds)[0].numpy()
    np.testing.assert_allclose(got, (want+want.T)/2, atol=1e-5)
    if rounds: assert math.isclose(got.sum(), M, rel_tol=1e-4)              # rows sum to 1, and stay so on average when made symmetric
    rows = torch.from_numpy(A/A.sum(1, keepdims=True))[None]               # each patch collects one unit: a constant map stays
    np.testing.assert_allclose(refine_by(rows, torch.full((1, 1, M, 1), .3)).numpy(), .3, atol=1e-5)

@quick
@given(arrays((1, 1, 5, 6)), st.sampled_from([.2, .4, .7]))
def test_boxes_hold_what_they_are_drawn_around(m, t):
    m[m<.1] = 0; b = class_boxes(torch.from_numpy(m), t)[0, 0].numpy(); m = m[0, 0]; on = (m>=t*m.max()) & (m>0)
    assert set(np.unique(b))<={0., 1.} and (b[on]==1).all() and (b.any()==on.any())
    todo, want = set(map(tuple, np.argwhere(on))), np.zeros_like(b)
    while todo:                                            # flood from cell to cell, corners count
        part, front = set(), [todo.pop()]
        while front:
            y, x = front.pop(); part.add((y, x)); near = {(y+i, x+j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & todo
            todo -= near; front += near
        ys, xs = zip(*part); want[min(ys):max(ys)+1, min(xs):max(xs)+1] = 1
    np.testing.assert_array_equal(b, want)

@st.composite
def cells(draw, channels=3):
    h, w, r = draw(sides), draw(sides), draw(st.sampled_from([1.5, 2, 3, 4]))
    return draw(arrays((1, channels, h, w), -3, 3)), draw(labels((1, h, w), 3)), pair_offsets(r), r

@quick
@given(cells())
def test_affinity_of_every_pair(x):
    f, y, offsets, r = x; h, w = f.shape[-2:]
    A, K = pair_affinity(torch.from_numpy(f), offsets)[0].numpy(), pair_kinds(torch.from_numpy(y), offsets)[0].numpy()
    cost = {1: [], 2: [], 3: []}
    for p,(dy,dx) in enumerate(offsets.tolist()):
        assert 0<dy*dy+dx*dx<r*r and (-dy, -dx) not in map(tuple, offsets.tolist())
        for i in range(h):
            for j in range(w):
                a, b = i+dy, j+dx
                if not (0<=a<h and 0<=b<w): assert A[p, i, j]==0 and K[p, i, j]==0; continue
                want = math.exp(-np.abs(f[0, :, i, j]-f[0, :, a, b]).mean()); assert math.isclose(A[p, i, j], want, rel_tol=1e-4, abs_tol=1e-6)
                u, v = y[0, i, j], y[0, a, b]; kind = 0 if 255 in (u, v) else 3 if u!=v else 1 if u==0 else 2; assert K[p, i, j]==kind
                if kind: cost[kind].append(-math.log(want+1e-5) if kind<3 else -math.log(1+1e-5-want))
    mean = lambda v: sum(v)/max(1, len(v))
    loss = pair_loss(torch.from_numpy(A)[None], torch.from_numpy(K)[None]).item()
    assert math.isclose(loss, mean(cost[1])/4+mean(cost[2])/4+mean(cost[3])/2, rel_tol=1e-2, abs_tol=2e-2)      # float32 near log(1e-5)

@quick
@given(st.data(), sides, sides, st.sampled_from([2, 3]), st.integers(0, 5), st.sampled_from([1, 2, 8]))
def test_walk_is_the_power_of_a_matrix(data, h, w, r, steps, beta):
    offsets = pair_offsets(r); A, M = data.draw(arrays((len(offsets), h, w))), data.draw(arrays((2, h, w)))
    T = np.eye(h*w)
    for p,(dy,dx) in enumerate(offsets.tolist()):
        for i in range(h):
            for j in range(w):
                if 0<=i+dy<h and 0<=j+dx<w: a, b = i*w+j, (i+dy)*w+j+dx; T[a, b] = T[b, a] = float(A[p, i, j])**beta
    T /= T.sum(0)                                          # columns sum to 1
    got = random_walk(M, A, beta, steps); want = M.reshape(2, -1).astype(float) @ np.linalg.matrix_power(T, steps)
    np.testing.assert_allclose(got.reshape(2, -1), want, atol=2e-5)
    assert got.min()>=M.min()-1e-5 and got.max()<=M.max()+1e-5          # averages of neighbours

# ---- resizing and cutting

@quick
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 4, 8]), st.one_of(st.none(), st.integers(1, 60)))
def test_views_are_whole_patches(w, h, patch, side):
    x = to_input(Image.new('RGB', (w, h)), patch, side); f = 1 if side is None else side/min(w, h)
    assert x.shape==(1, 3, *(max(patch, round(n*f/patch)*patch) for n in (h, w)))

@quick
@given(arrays((2, 4, 5), -9, 9))
def test_minmax_of_every_map(m):
    got = minmax(torch.from_numpy(m)).numpy()
    for g,x in zip(got, m):
        span = float(x.max())-float(x.min())
        if span>1e-3: np.testing.assert_allclose(g, (x-x.min())/span, atol=1e-4)
        assert g.min()>=0 and g.max()<=1+1e-6

@quick
@given(st.integers(1, 300), st.integers(32, 200))
def test_windows_cover_every_pixel(n, window):
    seen = np.zeros(n, int)
    for s in window_slices(n, window): assert 0<=s.start<s.stop<=n and s.stop-s.start<=window and s.start%8==0; seen[s] += 1
    assert seen.min()>=1

@quick
@given(st.integers(1, 20), st.integers(1, 20), st.just(8), st.integers(-10, 19), st.integers(-10, 19), st.booleans(), st.data())
def test_crop_is_a_window_of_photo_and_mask(w, h, crop, left, top, mirror, data):
    assume(left<w and top<h and left+crop>0 and top+crop>0)
    m = data.draw(hnp.arrays(np.uint8, (h, w), elements=st.integers(0, 3))); im = np.repeat((m*60)[..., None], 3, 2)
    x, y = crop_view(Image.fromarray(im), m, crop, 1., left, top, mirror)
    if mirror: x, y = x.flip(-1), y.flip(-1)
    mean, std = np.array([.485, .456, .406]), np.array([.229, .224, .225])
    for i in range(crop):
        for j in range(crop):
            a, b = i+top, j+left
            if 0<=a<h and 0<=b<w: assert y[i, j]==m[a, b] and np.allclose(x[:, i, j].numpy(), (im[a, b]/255-mean)/std, atol=.01)
            else: assert y[i, j]==255 and (x[:, i, j]==0).all()

@quick
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
def test_positions_keep_a_constant(gh, gw, h, w):
    pos = torch.arange(3.).expand(1, gh*gw, 3); got = resize_pos(pos, (h, w), (gh, gw))
    assert got.shape==(1, h*w, 3) and torch.allclose(got, torch.arange(3.).expand(1, h*w, 3), atol=1e-5)

# ---- files

@quick
@given(st.data(), st.integers(0, 3), sides, sides)
def test_seeds_and_labels_come_back(tmp_path, data, k, h, w):
    classes = data.draw(st.lists(st.integers(0, 253), min_size=k, max_size=k, unique=True)); maps = data.draw(arrays((k, h, w))).astype(np.float16)
    save_seed(tmp_path/'s.npz', classes, maps); c, m = load_seed(tmp_path/'s.npz'); assert c.tolist()==classes and c.dtype==np.int64 and m.dtype==np.float16; np.testing.assert_array_equal(m, maps)
    low, high = (add_background(maps, a) for a in (1, 12)); assert low.shape==(k+1, h, w) and (high[0]<=low[0]+1e-6).all()
    save_crf_label(tmp_path/'l.npz', classes, low, high); c, a, b = load_crf_label(tmp_path/'l.npz'); assert c.tolist()==classes
    np.testing.assert_array_equal(a, low.astype(np.float16)); np.testing.assert_array_equal(b, high.astype(np.float16))

@quick
@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)))
def test_masks_come_back(tmp_path, m):
    save_mask(tmp_path/'m.png', m); np.testing.assert_array_equal(open_mask(tmp_path/'m.png', m.shape), m); assert Image.open(tmp_path/'m.png').mode=='P'

words = st.text('aZ0é猫\n"\\\x00 /', max_size=4)
@quick
@given(st.recursive(st.none() | st.booleans() | st.integers(-2**53, 2**53) | st.floats(allow_nan=False, allow_infinity=False) | words, lambda c: st.lists(c, max_size=3) | st.dictionaries(words, c, max_size=3), max_leaves=8))
def test_json_comes_back(tmp_path, obj):
    write_json(tmp_path/'x.json', obj)
    assert json.loads(json.dumps(read_json(tmp_path/'x.json')))==obj

@quick
@given(st.dictionaries(st.from_regex(r'[a-z]{1,4}', fullmatch=True), hnp.arrays(st.sampled_from([np.int64, np.float16, np.uint8]), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4), elements=st.integers(0, 9)), min_size=1, max_size=3), st.booleans())
def test_arrays_are_read_as_numpy_reads_them(tmp_path, arrays, packed):
    (np.savez_compressed if packed else np.savez)(tmp_path/'a.npz', **arrays)
    for a,b in zip(read_arrays(tmp_path/'a.npz', tuple(arrays)), arrays.values()): assert a.dtype==b.dtype and a.shape==b.shape; np.testing.assert_array_equal(a, b)
