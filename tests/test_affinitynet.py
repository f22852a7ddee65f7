"AffinityNet's training survives being killed, names what it cannot use, and never gives NaN"
import os, signal, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from torch import nn
from mctformer_nb.affinitynet import AffinityCrops, AffinityNet, load_affinity, predict_affinity, train_affinity
from mctformer_nb.artifacts import save_crf_label
from mctformer_nb.core import DataError

class Squares:
    "Photos of one bright square; classes in turn"
    name, split, classes, ids = 'squares', 'train', ['big', 'small'], [f's{i:02d}' for i in range(14)]
    def __len__(self): return len(self.ids)
    def subset(self, ids): new = Squares(); new.ids = list(ids); return new
    def labels(self, id): return np.array([int(id[1:]) % 2])
    def targets(self): return np.eye(2, dtype=np.float32)[[self.labels(i)[0] for i in self.ids]]
    def mask(self, id):
        i, m = int(id[1:]), np.zeros((40, 48), np.uint8); side = 16 if i % 2 else 24
        m[i % 3*8:i % 3*8+side, 8:8+side] = 1; return m
    def image(self, i):
        id = self.ids[i] if isinstance(i, int) else i; rng = np.random.default_rng(int(id[1:]))
        return Image.fromarray((rng.integers(0, 60, (40, 48, 3)) + 150*self.mask(id)[..., None]).astype(np.uint8))

class TwoLayers(nn.Module):
    channels, strides = [6, 10], [4, 8]
    def __init__(self): super().__init__(); torch.manual_seed(1); self.a, self.b = nn.Conv2d(3, 6, 4, 4), nn.Conv2d(6, 10, 2, 2)
    def forward(self, x): a = self.a(x); return [a, self.b(a)]

def write_labels(folder, ds=Squares(), ids=None):
    folder.mkdir(parents=True, exist_ok=True)
    for id in ids or ds.ids:
        p = np.stack([1-ds.mask(id), ds.mask(id)]).astype(np.float16); save_crf_label(folder/f'{id}.npz', ds.labels(id), p, p)
    return folder

def train(labels, out, ds=Squares(), **kw):
    args = dict(recipe='momentum', backbone=TwoLayers(), epochs=4, crop=40, batch_size=4, width=4, holdout=.2, device='cpu')
    return train_affinity(labels, ds, out=out, **{**args, **kw})

def die_at(name, times):
    "SIGKILL this process when it is about to put file `name` in place for the `times`-th time"
    replace, seen = os.replace, []
    def deadly(a, b):
        if Path(b).name==name: seen.append(b)
        if len(seen)==times: os.kill(os.getpid(), signal.SIGKILL)
        replace(a, b)
    os.replace = deadly

def result(out): return (out/'model.safetensors').read_bytes(), pd.read_csv(out/'history.csv').drop(columns='seconds')

@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='no SIGKILL on this system')
def test_killed_training_resumes_to_the_same_files(tmp_path, capfd):
    labels = write_labels(tmp_path/'labels'); straight = train(labels, tmp_path/'straight')
    r = subprocess.run([sys.executable, __file__, str(labels), str(tmp_path/'run')], capture_output=True, text=True, cwd=Path(__file__).parents[1],
                       env=dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads()), PYTHONPATH=os.pathsep.join(filter(None, sys.path))))
    assert r.returncode==-signal.SIGKILL, r.stderr
    assert 'epoch 2/4' in r.stdout and 'epoch 3/4' not in r.stdout
    capfd.readouterr(); run = train(labels, tmp_path/'run', workers=1)              # the number of workers does not show in the result
    said = capfd.readouterr().out; assert 'epoch 2/4' not in said and 'epoch 4/4' in said
    (w1, h1), (w2, h2) = result(straight), result(run)
    assert w1==w2; pd.testing.assert_frame_equal(h1, h2)
    assert not list(run.glob('**/.tmp-*'))

def test_it_learns_the_squares(tmp_path):
    labels, args = write_labels(tmp_path/'labels'), dict(gain=.1, jitter=0, frozen_stride=0)     # starts with features that hardly differ
    run = train(labels, tmp_path/'run', **args); still = train(labels, tmp_path/'still', **args, lr=1e-9)
    before, after = (pd.read_csv(r/'history.csv').affinity_gap.iloc[-1] for r in (still, run)); assert before < 15 and after > 40
    net, cfg = load_affinity(run, TwoLayers()); assert cfg['kind']=='affinitynet' and cfg['classes']==['big', 'small']
    A = predict_affinity(net, Squares().image(0))                                   # square in cells (0..2, 1..3)
    assert A.shape==(34, 5, 6) and A[0, 1, 1] > .7 > .3 > A[0, 1, 3]                # to the right: inside, and over the border

@pytest.mark.parametrize('crop', [24, 40, 88])
def test_photo_and_labels_are_cut_together(tmp_path, crop):
    ds = Squares(); labels = write_labels(tmp_path/'labels'); data = AffinityCrops(ds, {id: labels/f'{id}.npz' for id in ds.ids}, crop, jitter=0)
    for key in [(i, e) for i in range(14) for e in range(3)]:
        x, y = data[key]; x = nn.functional.avg_pool2d(x.mean(0)[None], 8)[0]; out = x.abs()<1e-6      # outside the photo x is 0, the squares are bright
        assert ((x>.1) <= (y>0)).all() and ((x<-1.4) <= (y==0)).all() and (y[out]==255).all() and (crop>48 or crop>40 or (y!=255).all())

def test_other_labels_are_another_run(tmp_path):
    labels = write_labels(tmp_path/'labels'); train(labels, tmp_path/'run', epochs=1)
    (labels/'_crf.json').write_text('{"alphas": [4, 24]}')
    with pytest.raises(DataError, match='labels was'): train(labels, tmp_path/'run', epochs=1)

def test_missing_labels_are_named(tmp_path, capfd):
    labels = write_labels(tmp_path/'labels', ids=Squares.ids[2:])
    train(labels, tmp_path/'run', epochs=1)
    assert 'no labels for 2 of 14 images, left out: s00, s01' in capfd.readouterr().out
    (tmp_path/'empty').mkdir()
    with pytest.raises(DataError, match='none of the 14 images'): train(tmp_path/'empty', tmp_path/'other')
    with pytest.raises(DataError, match='no such folder'): train(tmp_path/'gone', tmp_path/'other')
    assert not (tmp_path/'other').exists()

def spoil(labels, what):
    file = labels/'s03.npz'; p = np.ones((2, 40, 48), np.float16)/2
    if what=='cut off': file.write_bytes(file.read_bytes()[:50])
    elif what=='other size': save_crf_label(file, [1], p[:, :30], p[:, :30])
    elif what=='class out of range': save_crf_label(file, [7], p, p)
    else: np.savez(file, maps=p)

@pytest.mark.parametrize('what,says', [('cut off', 'not a readable label file'), ('other size', '48 x 30'), ('class out of range', 'class 7'), ('other file', 'not a label file')])
def test_bad_label_files(tmp_path, capfd, what, says):
    labels = write_labels(tmp_path/'labels'); spoil(labels, what)
    with pytest.raises(DataError, match=f's03.npz.*{says}'): train(labels, tmp_path/'run', epochs=1, holdout=0)
    train(labels, tmp_path/'skipped', epochs=1, holdout=0, on_bad='skip', batch_size=14)
    assert 'left out' in (err := capfd.readouterr().err) and says in err

@pytest.mark.parametrize('value', ['background', 'nothing certain'])
def test_labels_without_contrast_give_no_nan(tmp_path, value):
    labels, p = tmp_path/'labels', np.zeros((2, 40, 48), np.float16); labels.mkdir()
    low, high = np.stack([p[0]+1, p[1]]), np.stack([p[0], p[1]+1]) if value!='background' else np.stack([p[0]+1, p[1]])
    for id in Squares.ids: save_crf_label(labels/f'{id}.npz', [0], low, high)
    run = train(labels, tmp_path/'run', epochs=1)
    h = pd.read_csv(run/'history.csv'); assert np.isfinite(h[['train_loss', 'valid_loss']].values).all() and np.isnan(h.affinity_gap.iloc[0])
    assert all(v.isfinite().all() for v in load_affinity(run, TwoLayers())[0].state_dict().values())

def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    labels = write_labels(tmp_path/'labels'); run = train(labels, tmp_path/'run', epochs=4); want = result(run)
    write = Path.write_bytes
    def full(self, b): write(self, b[:len(b)//2]); raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Path, 'write_bytes', full)                                # of the weights, see `save_run`
    with pytest.raises(OSError): train(labels, tmp_path/'full')
    assert not (tmp_path/'full'/'model.safetensors').exists() and not list((tmp_path/'full').glob('**/.tmp-*'))
    monkeypatch.undo(); got = result(train(labels, tmp_path/'full')); assert got[0]==want[0]

@pytest.mark.parametrize('kw,says', [(dict(crop=42), 'multiple of the stride 8'), (dict(holdout=1), 'share'), (dict(crops=1), 'crops: unknown'), (dict(radius=1), 'radius 1'), (dict(recipe='best'), 'recipe'), (dict(border='none'), 'border'), (dict(border='reference'), '5 x 5 cells')])
def test_options_that_cannot_be(tmp_path, kw, says):
    with pytest.raises(DataError, match=says): train(write_labels(tmp_path/'labels'), tmp_path/'run', **kw)

@pytest.mark.parametrize('name,size', [('deit_tiny_patch16_224', (3, 40, 50)), ('test_resnet', (3, 41, 64)), ('mct_tiny_patch8_96', (3, 50, 33))])
def test_backbones_of_other_strides(name, size):
    with torch.no_grad(): f = AffinityNet(name, width=8).eval()(torch.randn(1, *size))
    assert f.shape==(1, 56, -(-size[1]//8), -(-size[2]//8)) and f.isfinite().all()

def test_reference_recipe_is_the_published_run(tmp_path):
    "Momentum in the place of the decay, real decay, nothing held out, 32 bits, conv1 and block 2 as they were, pairs of inner cells"
    run = train(write_labels(tmp_path/'labels'), tmp_path/'run', recipe='reference', epochs=1, holdout=0, crop=80)
    net, cfg = load_affinity(run, TwoLayers()); t = cfg['train']
    assert (t['momentum'], t['weight_decay'], t['holdout'], t['amp'], t['border'], t['lr'], t['power'], t['bias_mult']) == (5e-4, 5e-4, 0, 'off', 'reference', .01, .9, 2)
    assert net.border=='reference' and np.isnan(pd.read_csv(run/'history.csv').valid_loss).all()
    from mctformer_nb.affinitynet import AFFINITY_RECIPES, CropOptions, FitOptions
    r = AFFINITY_RECIPES['reference']; assert FitOptions().momentum==r['momentum'] and FitOptions().amp==r['amp'] and CropOptions().holdout==r['holdout']     # the defaults of the parts

def test_what_was_understood_is_said_first(tmp_path):
    class Told(Squares): understood = 'photos 14, classes 2: big 7, small 7'
    ds, said = Told(), []; write_labels(tmp_path/'labels', ds); train(tmp_path/'labels', tmp_path/'run', ds, epochs=1, holdout=0, log=said.append)
    first = next(i for i,l in enumerate(said) if l.startswith('epoch')); assert any(ds.understood in l for l in said[:first])

def test_frozen_layers_of_resnet38_are_the_published_ones():
    import timm, mctformer_nb.resnet38
    from mctformer_nb.affinitynet import freeze_stem
    net = timm.create_model('mct_resnet38', features_only=True, output_stride=8); freeze_stem(net, 2)
    frozen = {n for n,p in net.named_parameters() if not p.requires_grad}; first = {n for n,m in net.named_modules() if isinstance(m, nn.Conv2d) and n.split('.')[0] in ('conv1', 'b2')}
    assert {n.rsplit('.', 1)[0] for n in frozen}==first and 'conv1' in first and len(first)==8          # conv1, three blocks of two, a shortcut

def test_photos_enter_as_the_backbone_wants_them(tmp_path):
    from mctformer_nb.views import InputSpec
    class Half(TwoLayers): input_spec = InputSpec((.5,)*3, (.5,)*3)
    labels = write_labels(tmp_path/'labels'); run = train(labels, tmp_path/'run', backbone=Half(), epochs=1)
    net, cfg = load_affinity(run, Half()); assert net.input_spec.mean==(.5,)*3 and cfg['input']['mean']==[.5]*3
    seen = []; net.backbone.register_forward_pre_hook(lambda m, x: seen.append(x[0])); predict_affinity(net, Squares().image(0))
    rgb = torch.from_numpy(np.array(Squares().image(0))).permute(2, 0, 1).float()/255; assert torch.allclose(seen[0][0], 2*rgb-1, atol=1e-6)

if __name__=='__main__':
    die_at('resume.pt', 4)                                                          # the first is written before the training
    train(Path(sys.argv[1]), Path(sys.argv[2]))
