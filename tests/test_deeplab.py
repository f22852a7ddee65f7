"Segmentation runs survive being killed, take photos of any size, and refuse what cannot be right"
import errno, os, signal, subprocess, sys
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from torch import nn
from mctformer_nb.core import DataError, save_mask, write_json
from mctformer_nb.datasets import get_dataset
from mctformer_nb.deeplab import DeepLab, SegmentLoss, load_segment, predict_mask, save_segment, segment_learner, segment_loaders, train_segment
from mctformer_nb.views import InputSpec

SIZES = [(40, 56), (56, 40), (33, 47)]                     # (H,W)

def make_data(root, n=14, skip=(3,)):
    "Photos of three sizes; a bright box is the one class. Masks of all but `skip`"
    rng = np.random.default_rng(0); lines = ['image,labels']
    for i in range(n):
        h, w = SIZES[i % 3]; m = np.zeros((h, w), np.uint8); y, x = rng.integers(0, 20, 2); m[y:y+14, x:x+16] = 1
        im = rng.integers(0, 90, (h, w, 3)) + 150*m[..., None]
        (root/'images').mkdir(parents=True, exist_ok=True); Image.fromarray(im.astype(np.uint8)).save(root/f'images/p{i:02d}.png')
        lines.append(f'p{i:02d}.png,box')
        if i not in skip: save_mask(root/f'masks/p{i:02d}.png', m)
    (root/'labels.csv').write_text('\n'.join(lines)); (root/'classes.txt').write_text('box')
    return root

def train(data, out, masks='ground truth', **kw):
    ds = get_dataset(f'folder:{data}', 'all'); valid = ds.subset([i for i in ds.ids if i!='p03'][:5])
    args = dict(epochs=4, backbone='test_efficientnet', width=8, dilation=2, crop=32, batch_size=2, accumulate=2, lr=.01, device='cpu')
    return train_segment(masks, ds, out, **{**args, 'valid': valid, **kw})

def die_at(name, times):
    "SIGKILL this process when it is about to put file `name` in place for the `times`-th time"
    replace, seen = os.replace, []
    def deadly(a, b):
        if Path(b).name==name: seen.append(b)
        if len(seen)==times: os.kill(os.getpid(), signal.SIGKILL)
        replace(a, b)
    os.replace = deadly

def train_and_die(data, out, name, times):
    r = subprocess.run([sys.executable, __file__, str(data), str(out), name, str(times)], capture_output=True, text=True, cwd=Path(__file__).parents[1],
                       env=dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads()), PYTHONPATH=os.pathsep.join(filter(None, sys.path))))
    assert r.returncode==-signal.SIGKILL, r.stderr
    return r.stdout

def result(out):
    "What must be equal: weights as bytes, history without seconds"
    return [(out/f/'model.safetensors').read_bytes() for f in ('', 'best')], pd.read_csv(out/'history.csv').drop(columns='seconds')

@pytest.fixture(scope='module')
def data(tmp_path_factory): return make_data(tmp_path_factory.mktemp('data'))

@pytest.fixture(scope='module')
def undisturbed(data, tmp_path_factory): return train(data, tmp_path_factory.mktemp('straight')/'run')

@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='no SIGKILL on this system')
def test_run_killed_twice(data, undisturbed, tmp_path, capfd):
    out = tmp_path/'run'                                   # 13 photos: 6 batches an epoch, 3 steps
    first = train_and_die(data, out, 'history.csv', 2)     # all of epoch 2 computed, nothing of it written
    second = train_and_die(data, out, 'resume.pt', 2)      # all files of epoch 3 but the last
    assert 'epoch 1/4' in first and 'p03' in first and 'epoch 4/4' not in first+second
    assert 'epoch 1/4' not in second and '.tmp' in ' '.join(os.listdir(out))
    train(data, out, workers=1, cache=True)                # neither shows in the result
    said = capfd.readouterr().out; assert 'epoch 2/4' not in said and 'epoch 4/4' in said
    (weights, history), (weights2, history2) = result(undisturbed), result(out)
    pd.testing.assert_frame_equal(history, history2, check_exact=True)
    assert weights==weights2 and list(history2.epoch)==[1, 2, 3, 4] and (out/'figures/loss.png').exists()
    assert not list(out.rglob('.tmp*'))

def test_learns_and_predicts_at_photo_size(data, undisturbed):
    net, cfg = load_segment(undisturbed, num_classes=1); ds = get_dataset(f'folder:{data}', 'all')
    assert cfg['kind']=='deeplab' and cfg['classes']==['box'] and set(cfg['iou'])=={'background', 'box'} and cfg['epoch']==4
    for i,(h,w) in enumerate(SIZES): assert predict_mask(net, ds.image(i)).shape==(h, w)
    history = pd.read_csv(undisturbed/'history.csv'); assert history.train_loss.iloc[-1] < history.train_loss.iloc[0]
    assert np.isclose(cfg['metrics']['miou'], np.mean(list(cfg['iou'].values())), atol=1e-3)

def test_other_masks_are_refused(data, undisturbed, tmp_path):
    with pytest.raises(DataError, match='weight_decay was 0.0, now 0.1'): train(data, undisturbed, weight_decay=.1)
    ds = get_dataset(f'folder:{data}', 'all')
    for id in ds.ids: save_mask(tmp_path/f'{id}.png', np.ones(ds.size(id)[::-1], np.uint8))
    with pytest.raises(DataError, match='data was .*13 images.*now .*14 images'): train(data, undisturbed, masks=tmp_path)

@pytest.mark.parametrize('mask, problem', [(np.zeros((9, 9), np.uint8), 'the mask is 9 x 9, its photo 56 x 40'), (np.full((40, 56), 2, np.uint8), 'holds mask value 2, but there are 1 classes')])
def test_bad_masks(data, tmp_path, capfd, mask, problem):
    ds = get_dataset(f'folder:{data}', 'all')
    for id in ds.ids: save_mask(tmp_path/f'masks/{id}.png', np.tri(*ds.size(id)[::-1], dtype=np.uint8))
    save_mask(tmp_path/'masks/p00.png', mask)
    with pytest.raises(DataError, match=f'p00.png: {problem}'): train(data, tmp_path/'a', tmp_path/'masks', epochs=1, valid=None)
    train(data, tmp_path/'b', tmp_path/'masks', epochs=1, valid=None, on_bad='skip')
    assert 'left out: ' in capfd.readouterr().err and not (tmp_path/'b/best').exists()

def test_broken_photo_and_no_masks(tmp_path):
    data = make_data(tmp_path/'data', n=6, skip=()); (tmp_path/'empty').mkdir()
    with pytest.raises(DataError, match='empty: none of the 6 images'): train(data, tmp_path/'a', tmp_path/'empty', valid=None)
    with pytest.raises(DataError, match='nowhere: there is no such folder'): train(data, tmp_path/'a', tmp_path/'nowhere', valid=None)
    photo = data/'images/p04.png'; photo.write_bytes(photo.read_bytes()[:200])
    with pytest.raises(DataError, match='p04.png: cannot be decoded'): train(data, tmp_path/'a', epochs=1, valid=None)

def test_masks_without_any_class_are_refused(data, tmp_path):
    "Loss 0.0000 and a network that finds nothing, from pseudo masks or true ones, in training or in validation"
    ds = get_dataset(f'folder:{data}', 'all')
    for value in (0, 255):
        for id in ds.ids: save_mask(tmp_path/f'{value}/{id}.png', np.full(ds.size(id)[::-1], value, np.uint8))
        with pytest.raises(DataError, match=f'{value} .all.: no class has a pixel in any of 14 masks'): train(data, tmp_path/'run', tmp_path/f'{value}', valid=None)
    blank = replace(ds, get_mask=lambda id, size: np.zeros(size, np.uint8))
    for masks,d,v in ((None, blank, None), (data/'masks', ds, blank)):
        with pytest.raises(DataError, match='no class has a pixel'): train_segment(masks, d, tmp_path/'run', v, device='cpu')
    assert not (tmp_path/'run').exists()

def test_masks_of_nothing_but_ignored_give_no_nan(data, tmp_path):
    ds = get_dataset(f'folder:{data}', 'all')
    for i,id in enumerate(ds.ids): save_mask(tmp_path/f'masks/{id}.png', np.full(ds.size(id)[::-1], 255 if i else 1, np.uint8))
    run = train(data, tmp_path/'run', tmp_path/'masks', epochs=1, valid=None)
    assert all(v.isfinite().all() for v in load_segment(run)[0].state_dict().values()) and np.isfinite(pd.read_csv(run/'history.csv').train_loss[0])

def test_masks_in_another_order_than_the_classes_are_refused(data, tmp_path):
    "True masks contradict the image labels: the network would find the wrong things; without labels nothing contradicts"
    mini = get_dataset('mini', n=24, size=48); turned = replace(mini, classes=mini.classes[::-1], get_labels=lambda id: 7-mini.labels(id), _known={})
    with pytest.raises(DataError, match='contradict each other'): train_segment(None, turned, tmp_path/'run', device='cpu')
    unlabelled = replace(turned, get_labels=lambda id: (), mentioned=set(), _known={}); said = []
    train_segment(None, unlabelled, tmp_path/'run', epochs=1, backbone='test_efficientnet', width=8, dilation=1, crop=32, device='cpu', log=said.append); assert 'masks 24 of 24: beetle in' in '\n'.join(said)

def test_failing_disk_leaves_the_old_files(tmp_path, monkeypatch):
    net = DeepLab(2, 'test_efficientnet', width=4, dilation=1); save_segment(net, tmp_path, ['a', 'b'])
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    write = Path.write_bytes
    def full(self, b): write(self, b[:len(b)//2]); raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(OSError, match='No space'): save_segment(DeepLab(2, 'test_efficientnet', width=4, dilation=1), tmp_path, ['a', 'b'])
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()}==before

def test_checkpoints_of_other_networks(tmp_path):
    cfg = save_segment(DeepLab(2, 'test_efficientnet', width=4, dilation=1), tmp_path/'a', ['a', 'b'])
    save_segment(DeepLab(2, 'test_resnet', width=4, dilation=1), tmp_path/'b', ['a', 'b'])
    (tmp_path/'a/model.safetensors').write_bytes((tmp_path/'b/model.safetensors').read_bytes())
    with pytest.raises(DataError, match='a/model.safetensors: missing: .*unexpected: .*Use a file of the same architecture'): load_segment(tmp_path/'a')
    write_json(tmp_path/'b/config.json', dict(kind='affinitynet'))
    with pytest.raises(DataError, match='is the run of another network .affinitynet'): load_segment(tmp_path/'b')
    write_json(tmp_path/'a/config.json', {k: v for k,v in cfg.items() if k!='width'})
    with pytest.raises(DataError, match='width missing'): load_segment(tmp_path/'a')
    (tmp_path/'a/model.safetensors').write_bytes(b'short'); write_json(tmp_path/'a/config.json', cfg)
    with pytest.raises(DataError, match='model.safetensors: cannot be read'): load_segment(tmp_path/'a')

def test_reference_recipe_is_the_published_loop(data, tmp_path):
    "SGD with the weight decay in the place of the momentum, conv1a frozen, rates x 10 for the head, poly 0.9, 32 bits: written out"
    ds, kw = get_dataset(f'folder:{data}', 'all'), dict(crop=32, batch_size=4, seed=3)
    def start(): torch.manual_seed(0); return DeepLab(1, 'test_resnet', width=8, dilation=2)
    model = start(); dls = segment_loaders(None, ds, **kw); learn = segment_learner(dls, model)
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    net = start(); first = next(m for m in net.backbone.modules() if isinstance(m, nn.Conv2d)).weight; kept = first.detach().clone(); first.requires_grad_(False)
    ours = [p for n,p in net.named_parameters() if not n.startswith('head.') and p.requires_grad]; head = list(net.head.parameters())
    groups = [dict(params=ours, lr=7e-4), dict(params=head, lr=7e-3)]; opt = torch.optim.SGD(groups, 7e-4, 1e-5)         # (lr, momentum)
    loader, loss, step = segment_loaders(None, ds, **kw).train, SegmentLoss(), 0; net.train()
    for epoch in range(2):
        loader.sampler.epoch = 0                            # a bare Learner does not move the epoch of its loader
        for x, y in loader:
            for g,base in zip(opt.param_groups, (7e-4, 7e-3)): g['lr'] = base*(1-step/(2*len(loader)))**.9
            opt.zero_grad(); loss(net(x), y).backward(); opt.step(); step += 1
    for (n,p),q in zip(model.named_parameters(), net.parameters()): torch.testing.assert_close(p, q, msg=lambda m: f'{n}: {m}')
    assert torch.equal(first, kept) and not torch.equal(head[0], start().head[0].weight)

class Half(nn.Module):
    "A backbone whose weights want photos in [-1, 1]"
    channels, strides, input_spec = [6], [4], InputSpec((.5,)*3, (.5,)*3)
    def __init__(self): super().__init__(); self.conv = nn.Conv2d(3, 6, 4, 4)
    def forward(self, x): self.seen = x.detach(); return [self.conv(x).relu()]

def test_mean_and_deviation_of_the_backbone(data, tmp_path):
    net = Half(); run = train(data, tmp_path/'run', backbone=net, epochs=1)
    assert -1<=net.seen.min() and net.seen.max()<=1         # ImageNet's mean would reach from -2.1 to 2.6
    model, cfg = load_segment(run, backbone=Half()); assert cfg['input']['mean']==[.5]*3 and model.input_spec==Half.input_spec and cfg['backbone']=='custom'
    predict_mask(model, Image.new('RGB', (32, 32), 'white')); assert model.backbone.seen.unique().tolist()==[1]
    with pytest.raises(DataError, match='a module of your own'): load_segment(run)

if __name__=='__main__':
    data, out, name, times = sys.argv[1:]; die_at(name, int(times)); train(data, Path(out))
