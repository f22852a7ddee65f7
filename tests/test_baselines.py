"Baselines go through the same training, run folders, seeds and scores as MCTformer"
import os, subprocess, sys
from functools import partial
import pytest, timm, torch
import torch.nn.functional as F
from mctformer_nb.attention import class_to_patch, localize, localize_image, minmax, patch_cam, to_input
from mctformer_nb.baselines import CNNCAM, PlainViT, TSCAM
from mctformer_nb.core import DataError, read_json, set_seed
from mctformer_nb.datasets import get_dataset
from mctformer_nb.complexity import complexity
from mctformer_nb.mctformer import build_model, load_run, save_run
from mctformer_nb.scores import sweep_threshold
from mctformer_nb.seeds import extract_seeds, load_seed
from mctformer_nb.train import train_classifier
from mctformer_nb.vit import capture_qk

TINY = dict(vit='mct_tiny_patch8_96', tscam='mct_tiny_patch8_96', cam='test_resnet')
train = partial(train_classifier, pretrained=False, epochs=2, batch_size=4, image_size=48, device='cpu', log=lambda line: None)

@pytest.fixture(scope='module')
def data(): return get_dataset('mini', n=8, size=48)

@pytest.fixture(scope='module')
def runs(data, tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')
    return {v: train(data, data, out/v, variant=v, backbone=b) for v,b in TINY.items()}

@pytest.mark.parametrize('variant', TINY)
def test_train_load_extract_score(variant, runs, data, tmp_path):
    model, cfg = load_run(runs[variant], num_classes=8)
    assert cfg['variant'] == variant == model.variant and cfg['classes'] == data.classes and 'map_cls' in cfg['metrics']
    assert (runs[variant]/'best/model.safetensors').exists()
    for kind in model.kinds:
        out = tmp_path/kind.replace('*', '_relu')
        r = extract_seeds(model, data, out, kind=kind, scales=(1, .5), batch_size=3, device='cpu')
        assert (r.written, r.bad) == (8, [])
        note = read_json(out/'_seeds.json'); assert (note['kind'], note['layers'], note['refine'], note['rule']) == (kind, None, False, None)
        assert 0 < sweep_threshold(out, data).best_miou <= 100
    assert extract_seeds(model, data, out, kind=kind, scales=(1, .5), layers=1, device='cpu').skipped == 8    # no layers, so nothing differs
    extract_seeds(model, data.subset(data.ids[:2]), tmp_path/'default', labels='predicted', device='cpu')
    assert read_json(tmp_path/'default/_seeds.json')['kind'] == model.kinds[0]
    with pytest.raises(DataError, match="kind 'fused'.*" + model.kinds[0]): extract_seeds(model, data, tmp_path/'x', kind='fused')

def test_seed_is_the_map_of_both_views(runs, data, tmp_path):
    "TS-CAM's seed, from the formulas of its parts, as MCTformer has them"
    model, _ = load_run(runs['tscam'])
    extract_seeds(model, data, tmp_path, kind='tscam*', image_size=96, device='cpu')
    classes, got = load_seed(tmp_path/f'{data.ids[0]}.npz')
    x, total = to_input(data.image(0), 8, 96), 0
    for view in (x, x.flip(-1)):
        with torch.no_grad(), capture_qk(model.blocks) as qk: f = model.forward_features(view)[1]
        attn = sum(class_to_patch(l['q'], l['k'], 1, model.blocks[i].attn.scale) for i,l in qk.items()).unflatten(2, f.shape[-2:])/len(qk)   # (1,1,h,w)
        m = attn*patch_cam(f, model.head, classes.tolist())
        total = total + (m if view is x else m.flip(-1))
    want = minmax(F.interpolate(total, (48, 48), mode='bilinear')[0]).detach().numpy()
    assert abs(got.astype(float)-want).max() < 2e-3

def test_class_agnostic_attention(runs, data):
    model, _ = load_run(runs['vit'])
    maps = localize_image(model, data.image(0), [0, 5], kind='attn')
    assert maps.shape == (2, 48, 48) and torch.equal(maps[0], maps[1])
    assert localize(model.train(), torch.randn(1, 3, 16, 40), 'attn').shape == (1, 8, 2, 5) and model.training

def test_relu_is_all_that_the_star_adds(runs):
    model, x = load_run(runs['tscam'])[0], torch.randn(2, 3, 48, 64)
    plain, star = localize(model, x, 'tscam'), localize(model, x, 'tscam*')
    assert plain.min() < 0 and torch.equal(star, plain.clamp_min(0))

@pytest.mark.parametrize('variant', TINY)
def test_every_part_learns(variant):
    set_seed(0); model = build_model(8, variant, backbone=TINY[variant])
    with torch.no_grad(): [p.add_(.02*torch.randn_like(p)) for p in model.parameters()]      # a ResNet's residual branches start at 0
    model(torch.randn(2, 3, 48, 48)).cls.square().sum().backward()
    idle = [n for n,p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert all('.bias' in n for n in idle), idle                 # a key's bias moves a whole row of scores, which the softmax does not see
    assert complexity(model, 48)['macs'] > 0

def test_pretrained_class_token_and_norm():
    vit = timm.create_model('mct_tiny_patch8_96', pretrained=True)
    for cls in (PlainViT, TSCAM):
        m = cls(3, 'mct_tiny_patch8_96', pretrained=True)
        assert torch.equal(m.cls_token, vit.cls_token) and m.cls_token.shape[1] == 1 and torch.equal(m.norm.weight, vit.norm.weight)
        assert m.head.weight.shape[0] == 3 and m.backbone == 'mct_tiny_patch8_96' and m.no_weight_decay() == {'cls_token', 'pos_embed_cls', 'pos_embed_pat'}

@pytest.mark.parametrize('name', ['test_resnet', 'test_convnext', 'test_efficientnet'])
def test_weights_of_a_cnn_from_a_file(name, tmp_path):
    set_seed(0); whole = timm.create_model(name).eval(); file = tmp_path/'w.pth'; torch.save(whole.state_dict(), file)
    m, x = CNNCAM(3, name, file, output_stride=None).eval(), torch.randn(1, 3, 64, 64)
    want = whole.forward_intermediates(x, intermediates_only=True, norm=False)[-1]
    torch.testing.assert_close(m.forward_features(x), want)
    back = CNNCAM(3, name, output_stride=8); save_run(back, tmp_path/'run')             # the stride is part of the run
    assert load_run(tmp_path/'run')[0].patch_size == 8
    with pytest.raises(DataError, match='w.pth.*(does not fit|layers of) resnet10t'): CNNCAM(3, 'resnet10t', file)

def test_errors(data, tmp_path, runs):
    with pytest.raises(DataError, match='v1, v2, vit, tscam, cam'): train(data, out=tmp_path/'a', variant='camm')
    with pytest.raises(DataError, match='such as resnet50'): train(data, out=tmp_path/'b', variant='cam', backbone='mct_tiny_patch8_96')
    with pytest.raises(DataError, match='Table 7'): train(data, out=tmp_path/'c', variant='tscam', backbone=TINY['tscam'], score='fc')
    with pytest.raises(DataError, match='8 classes, 20 wanted'): load_run(runs['cam'], num_classes=20)
    with pytest.raises(DataError, match='Resize it to'): load_run(runs['tscam'])[0](torch.zeros(1, 3, 50, 48))
    with pytest.raises(DataError, match='num_classes 0'): TSCAM(0, TINY['tscam'])
    (tmp_path/'d').mkdir()
    for f in ('config.json', 'model.safetensors'): (tmp_path/'d'/f).write_bytes((runs['vit' if f == 'config.json' else 'tscam']/f).read_bytes())
    with pytest.raises(DataError, match='head.weight is'): load_run(tmp_path/'d')

def test_load_run_needs_no_import(runs, root):
    code = "import sys; from mctformer_nb.mctformer import load_run; print(load_run(sys.argv[1])[0].kinds, 'fastai' in sys.modules)"
    r = subprocess.run([sys.executable, '-c', code, str(runs['tscam'])], cwd=root, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert r.returncode == 0, r.stderr
    assert 'tscam*' in r.stdout and 'False' in r.stdout            # and does not pay for training

def test_resnet38_as_cam(tmp_path, data):
    "The package's own CNN, by its name, as any other; with weights of a file in PSA's names"
    from mctformer_nb.resnet38 import ResNet38, psa_name
    net = ResNet38(1/16); torch.save({psa_name(k): v for k,v in net.state_dict().items() if 'num_batches' not in k}, tmp_path/'psa.pth')
    m = build_model(8, 'cam', backbone='mct_resnet38', pretrained=tmp_path/'psa.pth', width=1/16).eval(); x = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(m.forward_features(x), net.eval()(x)); assert m.patch_size == 8
    save_run(m, tmp_path/'run', classes=data.classes); torch.testing.assert_close(load_run(tmp_path/'run')[0](x).cls, m(x).cls)

def test_baselines_with_registers():
    from timm.models.vision_transformer import VisionTransformer
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, reg_tokens=4, num_classes=0).eval()
    for cls in (PlainViT, TSCAM):
        m, x = cls(3, vit).eval(), torch.randn(2, 3, 32, 32)
        with torch.no_grad(), capture_qk(vit.blocks) as qk: want = vit.forward_features(x)
        torch.testing.assert_close(m.forward_features(x)[1].flatten(2).mT, want[:, 5:])
        rows = torch.stack([(l['q'][:, :, :1]*vit.blocks[i].attn.scale @ l['k'].mT).softmax(-1)[..., 5:].mean(1) for i,l in qk.items()]).mean(0)
        torch.testing.assert_close(m.localize(x, 'attn')[:, :1].flatten(2), rows)
