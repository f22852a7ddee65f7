"Training runs survive being killed, and refuse what they cannot continue"
import os, signal, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from mctformer_nb.core import DataError
from mctformer_nb.datasets import get_dataset
from mctformer_nb.mctformer import load_run
from mctformer_nb.train import Photos, average_precision, make_loaders, make_transform, train_classifier

class Stripes:
    "Photos of stripes; the class is their direction"
    name, split, classes, ids, bad = 'stripes', 'train', ['across', 'down'], [str(i) for i in range(20)], None
    def __len__(self): return len(self.ids)
    def labels(self, i): return np.array([i % 2])
    def targets(self): return np.eye(2, dtype=np.float32)[np.arange(len(self)) % 2]
    def image(self, i):
        if i==self.bad: raise DataError(f'photos/{i}.jpg', 'is truncated', 'Copy it again')
        a = np.random.default_rng(i).integers(0, 60, (24, 24, 3)) + 150*(np.arange(24)//4 % 2)[:, None, None]
        return Image.fromarray((a if i % 2 else a.transpose(1, 0, 2)).astype(np.uint8))

def backbone():
    torch.manual_seed(5)
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0)

def train(out, ds=Stripes(), **kw):
    args = dict(pretrained=False, epochs=4, batch_size=4, image_size=16, lr=3e-3, valid_aug='squash', device='cpu')
    return train_classifier(ds, ds, out=out, backbone=backbone(), **{**args, **kw})

def die_at(name, times):
    "SIGKILL this process when it is about to put file `name` in place for the `times`-th time"
    replace, seen = os.replace, []
    def deadly(a, b):
        if Path(b).name==name: seen.append(b)
        if len(seen)==times: os.kill(os.getpid(), signal.SIGKILL)
        replace(a, b)
    os.replace = deadly

def train_and_die(out, name, times):
    r = subprocess.run([sys.executable, __file__, str(out), name, str(times)], capture_output=True, text=True, cwd=Path(__file__).parents[1],
                       env=dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads()), PYTHONPATH=os.pathsep.join(filter(None, sys.path))))
    assert r.returncode==-signal.SIGKILL, r.stderr
    return r.stdout

def result(out):
    "What must be equal: weights as bytes, history without seconds"
    return [(out/f/'model.safetensors').read_bytes() for f in ('', 'best')], pd.read_csv(out/'history.csv').drop(columns='seconds')

@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory): return train(tmp_path_factory.mktemp('straight')/'run')

@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='no SIGKILL on this system')
def test_run_killed_twice(undisturbed, tmp_path, capfd):
    out = tmp_path/'run'
    first = train_and_die(out, 'model.safetensors', 3)     # writing epoch 2: the best so far is a second file of this name
    second = train_and_die(out, 'resume.pt', 2)            # all files of a later epoch but the last
    assert 'epoch 1/4' in first and 'epoch 4/4' not in first+second
    assert 'epoch 1/4' not in second and '.tmp' in ' '.join(os.listdir(out))   # what the kill left
    train(out, workers=1)                                  # the number of workers does not show in the result either
    said = capfd.readouterr().out; assert 'epoch 1/4' not in said and 'epoch 4/4' in said
    (weights, history), (weights2, history2) = result(undisturbed), result(out)
    pd.testing.assert_frame_equal(history, history2, check_exact=True)
    assert weights==weights2 and list(history2.epoch)==[1, 2, 3, 4] and (out/'figures/loss.png').exists()
    assert not list(out.rglob('.tmp*'))

def test_finished_run_and_other_settings(undisturbed, capfd):
    before = result(undisturbed)[0]
    train(undisturbed); assert 'finished after 4 epochs' in capfd.readouterr().out
    with pytest.raises(DataError, match='epochs was 4, now 5.*--fresh'): train(undisturbed, epochs=5)
    class More(Stripes): ids = Stripes.ids + ['20']
    with pytest.raises(DataError, match='20 images.*21 images'): train(undisturbed, More())
    assert result(undisturbed)[0]==before

def test_run_folder_names_its_classes(undisturbed):
    model, cfg = load_run(undisturbed, backbone=backbone(), num_classes=2)
    assert cfg['classes']==['across', 'down'] and cfg['image_size']==16 and cfg['epoch']==4
    assert model.cls_token.shape==(1, 2, 24) and model.head.weight.shape==(2, 24, 3, 3)
    with pytest.raises(DataError, match='2 classes'): load_run(undisturbed, backbone=backbone(), num_classes=20)
    assert (undisturbed/'resume.pt').stat().st_size < 10_000   # the weights are not kept twice

def test_unreadable_photo(tmp_path, capfd):
    class Bad(Stripes): bad = 7
    with pytest.raises(DataError, match='photos/7.jpg: is truncated'): train(tmp_path/'a', Bad(), epochs=2)
    train(tmp_path/'b', Bad(), epochs=2, on_bad='skip'); assert 'left out: photos/7.jpg' in capfd.readouterr().err

def make_folder(root, labels, n=6):
    "Photos 0 to n-1 with the given lines of the table"
    (root/'images').mkdir(parents=True)
    for i in range(n): Stripes().image(i).save(root/f'images/{i}.png')
    (root/'labels.csv').write_text('image,labels\n' + ''.join(f'{i}.png,{names}\n' for i,names in labels.items()))
    return get_dataset(f'folder:{root}')

def test_an_empty_label_is_a_negative(tmp_path):
    "A photo with a line and no label is trained on and validated with; a photo without a line is neither"
    ds = make_folder(tmp_path/'data', {0: 'across', 1: 'down', 2: '', 4: 'across;down'}); photos = Photos(ds, make_transform('squash', 16))
    assert [ds.ids[i] for i in photos.at]==['0', '1', '2', '4'] and photos.y.tolist()==[[1, 0], [0, 1], [0, 0], [1, 1]] and photos.unlabelled==2
    dls = make_loaders(ds, ds, image_size=16, batch_size=4, aug='squash', valid_aug='squash')
    assert sorted(map(tuple, next(iter(dls.train))[1].tolist()))==sorted(map(tuple, photos.y.tolist())) and sum(len(y) for _,y in dls.valid)==4

def test_one_class_can_be_wrong(tmp_path):
    "With negatives, mAP of a single class tells something: a model that prefers them is not at 100"
    ds = make_folder(tmp_path/'data', {0: 'cat', 1: '', 2: 'cat', 3: ''}, n=4)
    y = torch.cat([y for _,y in make_loaders(ds, ds, image_size=16, batch_size=4, valid_aug='squash').valid]).numpy()
    assert y.ravel().tolist()==[1, 0, 1, 0]
    assert average_precision(y, y)[0]==1 and average_precision(1-y, y)[0]<=.5           # of 4 photos 2 show it: all of them equal would be .5

def test_training_says_what_it_understood(tmp_path, capfd):
    ds = make_folder(tmp_path/'data', {0: 'across', 1: 'down', 2: '', 4: 'across'})
    said = []; train(tmp_path/'run', ds, epochs=1, log=said.append); first = said[0]
    assert ds.understood in first and 'across 2, down 1' in first and 'negatives): 1' in first and '2 without label' in first
    prior = -np.log(.5) - .25*np.log(.25) - .75*np.log(.75)                         # V2's two losses: the entropies of 2 in 4 and of 1 in 4
    assert f'label frequencies {prior:.4f}' in first

def test_a_run_is_the_start_of_the_next(tmp_path, monkeypatch, capfd):
    "From the shell: variant, backbone and size are those of the run; at a rate of 0 its weights are left; other classes keep what has their name"
    from mctformer_nb.cli import mct_train
    ds = make_folder(tmp_path/'data', {0: 'across', 1: 'down', 2: '', 4: 'across'}); monkeypatch.chdir(tmp_path); how = '--batch-size 2 --epochs 1 --device cpu'.split()
    first = train_classifier(ds, out='first', backbone='mct_tiny_patch8_96', pretrained=True, epochs=1, batch_size=2, image_size=24, variant='v1', lr=.01, device='cpu')
    assert mct_train(['--data', 'folder:data', '--pretrained', 'first', '--lr', '0', '--out', 'more', *how])==0, capfd.readouterr().err
    (a, ca), (b, cb) = load_run(first), load_run('more'); assert (cb['variant'], cb['backbone'], cb['image_size'])==('v1', 'mct_tiny_patch8_96', 24)
    assert all(torch.equal(v, b.state_dict()[k]) for k,v in a.state_dict().items() if 'running' not in k and 'num_batches' not in k)
    make_folder(tmp_path/'new', {0: 'down', 1: 'spots', 2: ''}); assert mct_train(['--data', 'folder:new', '--pretrained', 'first', '--lr', '0', '--out', 'other', *how])==0
    token = load_run('other')[0].cls_token; assert torch.equal(token[:, 0], a.cls_token[:, 1]); torch.testing.assert_close(token[:, 1], a.cls_token.mean(1))
    for said,argv in (('missing: head.bias', ['--variant', 'v2']), ('instead of', ['--backbone', 'deit_tiny_patch16_224'])):
        assert mct_train(['--data', 'folder:data', '--pretrained', 'first', '--out', 'not', *argv, *how])==2 and said in capfd.readouterr().err
    train_frozen = __import__('mctformer_nb.frozen').frozen.train_frozen; train_frozen(ds, out='frozen', backbone='resnet10t', pretrained=False, image_size=32, strength=1., device='cpu')
    assert mct_train(['--data', 'folder:data', '--pretrained', 'frozen', *how])==2 and 'no run that can be trained further' in capfd.readouterr().err

def test_what_trains_no_network_is_told_the_same(tmp_path):
    "A photo without a line teaches nothing, one with an empty label is a negative, and both are said before the start"
    from mctformer_nb.frozen import train_frozen
    ds = make_folder(tmp_path/'data', {0: 'across', 1: 'down', 2: '', 4: 'across', 5: ''}); said = []
    def head(ds, out): return load_run(train_frozen(ds, out=tmp_path/out, backbone='resnet10t', pretrained=False, image_size=32, strength=1., device='cpu', log=said.append))[0].head
    torch.manual_seed(0); all_six = head(ds, 'six'); torch.manual_seed(0); known = head(ds.subset(['0', '1', '2', '4', '5']), 'five')
    assert ds.understood in said[0] and 'negatives): 2' in said[0] and 'without a line in the table of labels: 1' in said[0]
    torch.testing.assert_close(all_six.weight, known.weight); torch.testing.assert_close(all_six.bias, known.bias)
    with pytest.raises(DataError, match='none of the 1 images has a label'): train_frozen(ds.subset(['3']), out=tmp_path/'none')

if __name__=='__main__':
    out, name, times = sys.argv[1:]; die_at(name, int(times)); train(out)
