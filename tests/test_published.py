"""The published run, point by point: what the description of its code says, written out in plain torch and numpy, against what `reference` does here.

The expected side uses nothing of the package but file formats. The network itself (keys, positions, scores) is compared in test_models.py, maps at the patch grid in test_maps_parity.py, the
segmentation network's training in test_deeplab.py. Here: seed files from photos of any size, the learning rate of every epoch, AffinityNet's training, masks by the random walk with the pairs
that the published code has, and which images are scored."""
import json, math
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from PIL import Image
from torch import nn
from mctformer_nb.affinitynet import AffinityNet, affinity_learner, affinity_loaders, affinity_options
from mctformer_nb.core import open_mask, save_mask
from mctformer_nb.datasets import Dataset
from mctformer_nb.learner import CosineSchedule, param_groups
from mctformer_nb.mctformer import load_reference
from mctformer_nb.random_walk import make_masks
from mctformer_nb.seeds import extract_seeds, load_seed, save_seed
from mctformer_nb.views import REFERENCE_VIEWS
from test_affinitynet import Squares, TwoLayers, write_labels
from test_maps_parity import CASES, P, formulas, reference_state

MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ((.485, .456, .406), (.229, .224, .225)))
SIZES = {'whole patches': (64, 80), 'odd': (83, 61), 'whole cells': (88, 72), 'small': (50, 33)}            # (W,H)

def photo(size, seed=0):
    "Smooth noise"
    rng = np.random.default_rng(seed); coarse = rng.integers(0, 256, (9, 7, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize(size, Image.BICUBIC)

def photos(sizes, classes=5, labels=(1, 3)):
    "A data set of smooth noise with the same labels for all"
    ims = {f'p{i}': photo(s, i) for i,s in enumerate(sizes)}
    return Dataset('noise', [f'c{i}' for i in range(classes)], list(ims), 'train', ims.__getitem__, lambda id: ims[id].size, lambda id: labels)

def tensor(image): return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float()/255 - MEAN)/STD        # (3,H,W)

def minmax(m): lo, hi = m.amin((1, 2), keepdim=True), m.amax((1, 2), keepdim=True); return (m-lo)/(hi-lo)    # (k,H,W)

def published_seed(sd, image, classes, kind):
    "The whole photo mirrored, then each view cut to whole patches; maps of each stretched over the whole photo, turned back, added; classes of the label, each from 0 to 1"
    x, (W, H) = tensor(image)[None], image.size; h, w = H//P*P, W//P*P
    grown = [F.interpolate(formulas(sd, v[..., :h, :w], kind, 'reference', 3, True), (H, W), mode='bilinear', align_corners=False)[0] for v in (x, x.flip(-1))]
    return minmax((grown[0] + grown[1].flip(-1))[list(classes)])                                             # (k,H,W)

@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('kind', ['v1', 'v2'])
def test_seed_files(tmp_path, kind, size):
    sd, ds = reference_state(kind), photos([SIZES[size]])
    extract_seeds(load_reference({'model': sd}), ds, tmp_path, device='cpu', rule='reference', **REFERENCE_VIEWS)
    classes, maps = load_seed(tmp_path/'p0.npz'); want = published_seed(sd, ds.image(0), (1, 3), kind).numpy()
    assert classes.tolist()==[1, 3] and maps.shape==want.shape
    assert np.abs(maps-want).max() <= 2**-11 + 1e-4                          # half a step of float16 below 1, and float32 through four layers
    rounded = tmp_path/'rounded'; extract_seeds(load_reference({'model': sd}), ds, rounded, device='cpu')
    same = size=='whole patches'; assert (np.abs(load_seed(rounded/'p0.npz')[1]-want).max() < .002)==same    # what the switch is for

def test_learning_rate_of_every_epoch():
    "timm's cosine with warm-up, asked after each epoch for the number of that epoch: one epoch late"
    from types import SimpleNamespace as NS
    top, low, start, warm, n = 5e-4*64/512, 1e-5, 1e-6, 5, 60; w = nn.Parameter(torch.zeros(1))
    opt = torch.optim.AdamW([dict(params=[w], lr_scale=1.)], lr=top); cb, got = CosineSchedule(), []
    cb.learn = NS(lr=top, n_epoch=n, opt=NS(opt=opt), epoch=0, training=True); cb.before_fit()
    for cb.learn.epoch in range(n): cb.before_train(); cb.before_batch(); got.append(opt.param_groups[0]['lr'])
    def rate(t): return start+t*(top-start)/warm if t<warm else low+(top-low)*(1+math.cos(math.pi*t/n))/2
    np.testing.assert_allclose(got, [rate(max(0, e-1)) for e in range(n)], rtol=1e-9)
    assert got[:2]==[1e-6]*2 and abs(got[2]-1.33e-5)<1e-9

def test_plus_decays_its_positions():
    "MCTformer+ names its rows differently from what its list of exceptions says, so they are decayed; those of V1 and V2 are not"
    for kind in CASES:
        m = load_reference(reference_state(kind)); rows = m.pos_embed_cls, m.pos_embed_pat
        decayed = {id(p): g['weight_decay'] for g in param_groups(m) for p in g['params']}
        assert {decayed[id(r)] for r in rows}=={.05 if kind=='plus' else 0.} and decayed[id(m.cls_token)]==0

# ---- pairs of cells: every pair of the published code, in loops

NEIGHBOURS = [(dy, dx) for dy in range(5) for dx in range(-4, 5) if dy*dy+dx*dx<25 and (dy>0 or dx>0)]

def pairs(h, w):
    "Cells and their neighbours: from [:-4, 4:-4] only"
    assert len(NEIGHBOURS)==34
    return [((y, x), (y+dy, x+dx)) for y in range(h-4) for x in range(4, w-4) for dy,dx in NEIGHBOURS]

def published_loss(f, y):
    "f (B,D,h,w), y (B,h,w): a quarter of the mean over background pairs, a quarter over pairs of one class, a half over different ones"
    kinds = [], [], []
    for b in range(len(f)):
        for i,j in pairs(*y.shape[1:]):
            u, v = int(y[b][i]), int(y[b][j])
            if 255 in (u, v): continue
            a = torch.exp(-(f[b][:, *i]-f[b][:, *j]).abs().mean())
            kinds[2 if u!=v else 0 if u==0 else 1].append(-torch.log((1-a if u!=v else a) + 1e-5))
    bg, fg, neg = (torch.stack(k).sum()/(len(k)+1e-5) if k else torch.zeros(()) for k in kinds)
    return bg/4 + fg/4 + neg/2

def test_affinitynet_is_trained_as_published(tmp_path):
    "Weight decay in the place of the momentum and in its own, rates x2 for biases and x10 for new layers, poly 0.9, frozen up to stride 2, all photos"
    ds, labels = Squares().subset(Squares.ids[:6]), write_labels(tmp_path/'labels'); kw = dict(crop=80, batch_size=3, seed=0)
    _, load, fit, net = affinity_options('reference', dict(crop=80, batch_size=3, backbone=TwoLayers(), width=4))
    def start(): torch.manual_seed(0); return AffinityNet(**net | dict(backbone=TwoLayers()))
    model = start(); dls = affinity_loaders(ds, labels, 0, 'cpu', model.input_spec, **load); assert not len(dls.valid)
    with (learn := affinity_learner(dls, model, **fit)).no_bar(), learn.no_logging(): learn.fit(2)
    own = start(); ps = dict(own.named_parameters()); new = lambda n: n.startswith('head.'); bias = lambda n: n.endswith('.bias')
    groups = [dict(params=[p for n,p in ps.items() if new(n)==a and bias(n)==b], lr=.01*(10 if a else 1)*(2 if b else 1), weight_decay=0 if b else 5e-4) for a in (False, True) for b in (False, True)]
    groups = [g for g in groups if g['params']]; rates = [g['lr'] for g in groups]; opt = torch.optim.SGD(groups, .01, momentum=5e-4)
    loader, step = affinity_loaders(ds, labels, 0, 'cpu', own.input_spec, **load).train, 0
    for _ in range(2):
        loader.sampler.epoch = 0                                # a bare Learner does not move the epoch of its loader
        for x, y in loader:
            for g,r in zip(opt.param_groups, rates): g['lr'] = r*(1-step/(2*len(loader)))**.9
            opt.zero_grad(); published_loss(own(x), y).backward(); opt.step(); step += 1
    assert step==4 and not torch.equal(ps['head.join.weight'], start().head.join.weight)
    for n,p in model.named_parameters(): torch.testing.assert_close(p, ps[n], rtol=1e-4, atol=1e-6, msg=lambda m: f'{n}: {m}')

# ---- from a checkpoint to a mask

def published_mask(f, maps, classes, background=.39, beta=8, doublings=6):
    "f (D,h,w) features of a photo, maps (k,H,W) its seed: the dense matrix of all pairs, to the power of beta, columns to 1, squared six times; averages over 8 x 8 pixels walk, and are enlarged"
    D, h, w = f.shape; a = torch.eye(h*w, dtype=torch.float64); at = lambda c: c[0]*w+c[1]
    for i,j in pairs(h, w): a[at(i), at(j)] = a[at(j), at(i)] = torch.exp(-(f[:, *i]-f[:, *j]).abs().mean()).double()
    t = a**beta; t = t/t.sum(0, keepdim=True)
    for _ in range(doublings): t = t@t
    m = F.avg_pool2d(torch.cat([torch.full_like(maps[:1], background), maps])[None], 8, ceil_mode=True)[0].double()
    m = F.interpolate((m.flatten(1)@t).view(1, -1, h, w).float(), scale_factor=8, mode='bilinear', align_corners=False)[0][:, :maps.shape[1], :maps.shape[2]]
    return torch.tensor([0, *(c+1 for c in classes)])[m.argmax(0)].numpy(), m

@pytest.mark.parametrize('kind', ['v1', 'v2'])
def test_from_checkpoint_to_mask(tmp_path, kind):
    "Published formulas all the way, without a file of the package between, against the stages one after the other"
    sd, ds = reference_state(kind), photos([(104, 88), (83, 121)]); torch.manual_seed(0)
    net = AffinityNet(TwoLayers(), width=8, border='reference').eval()
    extract_seeds(load_reference(sd), ds, tmp_path/'seeds', device='cpu', **REFERENCE_VIEWS); make_masks(tmp_path/'seeds', net, ds, tmp_path/'masks', device='cpu')
    for id in ds.ids:
        image = ds.image(id)
        with torch.no_grad(): want, scores = published_mask(net(tensor(image)[None])[0], published_seed(sd, image, (1, 3), kind), (1, 3))
        got = open_mask(tmp_path/f'masks/{id}.png'); top = scores.topk(2, 0).values; sure = (top[0]-top[1] > 1e-3).numpy()    # float16 seeds: 2^-11 either way, and the walk averages
        assert len(np.unique(want))>1 and sure.mean()>.8 and (got==want)[sure].all()
    other = AffinityNet(TwoLayers(), width=8).eval(); other.load_state_dict(net.state_dict())
    make_masks(tmp_path/'seeds', other, ds, tmp_path/'all', device='cpu')
    assert any((open_mask(tmp_path/f'all/{id}.png')!=open_mask(tmp_path/f'masks/{id}.png')).any() for id in ds.ids)           # what the border is for

# ---- which images are scored

def voc(root, train=2, aug=5):
    "A folder in the layout of VOC whose trainaug holds more than train"
    from mctformer_nb.datasets import get_dataset
    mini = get_dataset('mini', n=aug+1, size=48)
    for d in ('Annotations', 'JPEGImages', 'SegmentationClass', 'SegmentationClassAug', 'ImageSets/Segmentation'): (root/d).mkdir(parents=True)
    for id in mini.ids:
        mini.image(id).save(root/f'JPEGImages/{id}.jpg')
        (root/f'Annotations/{id}.xml').write_text('<annotation>'+''.join(f'<object><name>{mini.classes[c]}</name></object>' for c in mini.labels(id))+'</annotation>')
        for d in ('SegmentationClass', 'SegmentationClassAug'): save_mask(root/f'{d}/{id}.png', mini.mask(id))
    for name,ids in dict(train=mini.ids[:train], trainaug=mini.ids[:aug], val=mini.ids[aug:]).items(): (root/f'ImageSets/Segmentation/{name}.txt').write_text('\n'.join(ids))
    (root/'classes.txt').write_text('\n'.join(mini.classes)); return mini

def test_hints_score_train_and_train_on_trainaug(tmp_path, monkeypatch):
    "After a training on trainaug seeds of both lists are written, scored on train, and all of trainaug goes on"
    import mctformer_nb.cli as cli, mctformer_nb.train as T
    mini, data = voc(tmp_path/'voc'), f'voc:{tmp_path/"voc"}'; monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(T, 'train_classifier', lambda *a, **kw: None); monkeypatch.setattr(cli, 'report_training', lambda a: None)
    def after(command, *argv): assert command([*argv, '--data', data, '--json', 'out.json'])==0; return json.loads(Path('out.json').read_text())['next']
    assert '--split train,trainaug' in after(cli.mct_train, '--split', 'trainaug', '--variant', 'v2')
    for id in mini.ids[:5]: save_seed(tmp_path/f'seeds/{id}.npz', mini.labels(id), np.stack([mini.mask(id)==c+1 for c in mini.labels(id)]).astype(np.float16))
    assert after(cli.mct_score, '--pred', 'seeds', '--split', 'train')==f'mct_crf_labels --seeds seeds --data {data} --split trainaug'
    (tmp_path/f'seeds/{mini.ids[4]}.npz').unlink()
    assert after(cli.mct_score, '--pred', 'seeds', '--split', 'train').endswith('--split train')
