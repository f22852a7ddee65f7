"Models: parity with the published formulas on random weights, files that must be refused, timm backbones by name"
import math, os, pickle, subprocess, sys
import numpy as np
import pytest, timm, torch, torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from mctformer_nb.backbones import DenseBackbone
from mctformer_nb.frozen import frozen_features, frozen_network
from mctformer_nb.complexity import info_table, table4_models
from mctformer_nb.core import DataError, set_seed
from mctformer_nb.mctformer import MCTformer, load_reference, load_run, load_weights, save_run
from mctformer_nb.views import InputSpec
from mctformer_nb.vit import backbone_spec, build_vit, capture_qk, check_vit, create_backbone, load_vit, mimetic_init, resize_pos, similar_backbones

C, D, L, H, P, G = 3, 128, 2, 2, 8, 4 # classes, width, blocks, heads of 64, patch, native grid

def reference_weights(kind, seed=0):
    "Random state dict with all keys and shapes of the published classes; norms and biases far from their identity"
    g = torch.Generator().manual_seed(seed)
    r = lambda *s, std=.1, mean=0.: torch.randn(*s, generator=g)*std + mean
    sd = {'cls_token': r(1, C, D, std=1.), 'patch_embed.proj.weight': r(D, 3, P, P), 'patch_embed.proj.bias': r(D), 'norm.weight': r(D), 'norm.bias': r(D)}
    pos = r(1, C + G*G, D, std=1.)
    if kind == 'plus': sd |= {'pos_embed': r(1, 197, D, std=1.), 'pos_embed_cls': pos[:, :C], 'pos_embed_pat': pos[:, C:]} # its base class's, unused
    else: sd['pos_embed'] = pos
    for i in range(L):
        b = f'blocks.{i}.'
        for n in ('norm1', 'norm2'): sd |= {b+n+'.weight': r(D, mean=1.), b+n+'.bias': r(D)}
        for n, o, k in (('attn.qkv', 3*D, D), ('attn.proj', D, D), ('mlp.fc1', 4*D, D), ('mlp.fc2', D, 4*D)): sd |= {b+n+'.weight': r(o, k), b+n+'.bias': r(o)}
    if kind in ('v2', 'plus'): sd |= {'head.weight': r(C, D, 3, 3), 'head.bias': r(C)}
    if kind == 'v1': sd |= {'head.weight': r(C, D), 'head.bias': r(C)} # left over, must not matter
    if kind == 'fc': sd |= {'head.weight': r(C, 1, D), 'head.bias': r(C)}
    return sd

def formulas(sd, x, kind):
    "Forward pass from the description of the model alone, one image: (class scores (C,), patch scores (C,) or None)"
    h, w = x.shape[-2]//P, x.shape[-1]//P
    plus = 'pos_embed_pat' in sd
    if plus: pc, pp = sd['pos_embed_cls'][0], sd['pos_embed_pat'][0]
    else: pc, pp = sd['pos_embed'][0, :C], sd['pos_embed'][0, C:]
    more = 0 if plus else .1 # what V1 and V2 add to the grid before they divide
    if (h, w) != (G, G): pp = F.interpolate(pp.T.reshape(1, D, G, G), scale_factor=((h+more)/G, (w+more)/G), mode='bicubic')[0].reshape(D, h*w).T
    cut = [x[0, :, i*P:(i+1)*P, j*P:(j+1)*P].flatten() for i in range(h) for j in range(w)]       # patches in row order
    t = torch.stack(cut) @ sd['patch_embed.proj.weight'].flatten(1).T + sd['patch_embed.proj.bias'] + pp
    t = torch.cat([sd['cls_token'][0] + pc, t])
    for i in range(L):
        p = lambda n: (sd[f'blocks.{i}.{n}.weight'], sd[f'blocks.{i}.{n}.bias'])
        y = F.layer_norm(t, (D,), *p('norm1'), eps=1e-6) @ p('attn.qkv')[0].T + p('attn.qkv')[1]
        heads = []
        for a in range(H):
            q, k, v = (y[:, n*D + a*64 : n*D + (a+1)*64] for n in range(3))
            heads.append((q @ k.T / math.sqrt(64)).softmax(-1) @ v)
        t = t + torch.cat(heads, 1) @ p('attn.proj')[0].T + p('attn.proj')[1]
        y = F.layer_norm(t, (D,), *p('norm2'), eps=1e-6) @ p('mlp.fc1')[0].T + p('mlp.fc1')[1]
        t = t + F.gelu(y) @ p('mlp.fc2')[0].T + p('mlp.fc2')[1]
    cls = t[:C].mean(1) if kind != 'fc' else (t[:C] * sd['head.weight'][:, 0]).sum(1) + sd['head.bias']
    if kind in ('v1', 'fc'): return cls, None
    grid = F.pad(t[C:].T.reshape(D, h, w), (1, 1, 1, 1))
    fmap = sum(torch.einsum('cd,dhw->chw', sd['head.weight'][:, :, u, v], grid[:, u:u+h, v:v+w]) for u in range(3) for v in range(3))
    return cls, fmap.mean((1, 2)) + sd['head.bias']

@pytest.mark.parametrize('size', [(32, 32), (48, 48), (24, 56)])
@pytest.mark.parametrize('kind', ['v1', 'v2', 'plus', 'fc'])
def test_reference_parity(kind, size):
    sd, x = reference_weights(kind), torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    model = load_reference({'model': sd, 'epoch': 1})
    assert (model.reference, model.variant) == ({'fc': 'v1'}.get(kind, kind), 'v1' if kind in ('v1', 'fc') else 'v2')
    with torch.no_grad(): out = model(x)
    for i in range(2):
        cls, patch = formulas(sd, x[i:i+1], kind)
        torch.testing.assert_close(out.cls[i], cls, atol=1e-4, rtol=1e-4)
        if patch is None: assert out.patch is None
        else: torch.testing.assert_close(out.patch[i], patch, atol=1e-4, rtol=1e-4)

def test_plus_rows_are_its_own():
    "Every + checkpoint holds an unused `pos_embed` as well"
    sd = reference_weights('plus'); model = load_reference(sd)
    assert torch.equal(model.pos_embed_pat, sd['pos_embed_pat']) and torch.equal(model.pos_embed_cls, sd['pos_embed_cls'])
    assert model.no_weight_decay() == {'cls_token'} and load_reference(reference_weights('v2')).no_weight_decay() >= {'pos_embed_pat'}

@pytest.mark.parametrize('prefix', ['model.', 'module.model.', 'teacher.backbone.', 'net.'])
def test_prefixes_go(prefix, tmp_path):
    sd, x = reference_weights('plus'), torch.randn(1, 3, 32, 32)
    torch.save({'state_dict': {prefix+k: v for k,v in sd.items()} | {'loss.weight': torch.ones(C)}, 'best': np.float64(.7), 'epoch': 3}, tmp_path/'l.ckpt')
    assert torch.equal(load_reference(tmp_path/'l.ckpt')(x).patch, load_reference(sd)(x).patch)
    vit = tiny(); torch.save({prefix+k: v for k,v in vit.state_dict().items()}, tmp_path/'v.pth')
    assert torch.equal(load_vit(tiny(), tmp_path/'v.pth').pos_embed, vit.pos_embed)

def test_fc_head_as_the_released_code_has_it():
    sd, x = reference_weights('fc'), torch.randn(1, 3, 32, 32)
    released, table7 = load_reference(sd, score='avg'), load_reference(sd)
    assert (released.score, table7.score) == ('avg', 'fc') and released.score_head is None
    torch.testing.assert_close(released(x).cls, table7.forward_features(x)[0].mean(-1))

def test_positions_of_a_converted_run(tmp_path):
    "`.1` or not is part of a run; runs from before it was noted follow their `reference`"
    from mctformer_nb.core import read_json, write_json
    for kind,rule in dict(v1='reference', v2='reference', plus='size').items():
        model = load_reference(reference_weights(kind)); save_run(model, tmp_path/kind)
        cfg = read_json(tmp_path/kind/'config.json'); assert cfg['reference'] == kind and cfg['kind'] == 'classifier'
        write_json(tmp_path/kind/'config.json', {k: v for k,v in cfg.items() if k not in ('pos_rule', 'decay_positions', 'kind', 'input')})
        back, _ = load_run(tmp_path/kind); x = torch.randn(1, 3, 48, 24)
        assert back.pos_rule == model.pos_rule == rule and back.input_spec == InputSpec()
        with torch.no_grad(): assert torch.equal(back(x).cls, model(x).cls)

@pytest.mark.parametrize('to', [(5, 5), (3, 4), (28, 28), (4, 9)])
def test_published_resize(to):
    pos = torch.randn(1, 16, 8)
    want = F.interpolate(pos.reshape(1, 4, 4, 8).permute(0, 3, 1, 2), scale_factor=tuple((n+.1)/4 for n in to), mode='bicubic')
    assert torch.equal(resize_pos(pos, to, rule='reference'), want.flatten(2).mT) and not torch.equal(resize_pos(pos, to), want.flatten(2).mT)

def test_reference_files(tmp_path):
    sd, x = reference_weights('v2'), torch.randn(1, 3, 32, 32)
    torch.save(sd, tmp_path/'bare.pth'); torch.save({'model': {f'module.{k}': v.half() for k, v in sd.items()}}, tmp_path/'ddp.pth')
    want = load_reference(sd)(x).cls
    torch.testing.assert_close(load_reference(tmp_path/'bare.pth')(x).cls, want)
    torch.testing.assert_close(load_reference(str(tmp_path/'ddp.pth'))(x).cls, want, atol=.02, rtol=.02)
    model = load_reference(tmp_path/'bare.pth')
    save_run(model, tmp_path/'run', classes=['a', 'b', 'c'])
    back, cfg = load_run(tmp_path/'run') # a converted checkpoint is rebuilt from its configuration
    assert cfg['reference'] == back.reference == 'v2'
    torch.testing.assert_close(back(x), model(x))

@pytest.mark.parametrize('change, said', [
    (lambda sd: sd.pop('blocks.1.attn.qkv.weight'), 'missing: blocks.1.attn.qkv.weight'),
    (lambda sd: sd.update(surprise=torch.ones(2)), 'unexpected: surprise'),
    (lambda sd: sd.update({'pos_embed': sd['pos_embed'][:, :-1]}), 'not a square grid'),
    (lambda sd: sd.update({'head.weight': torch.ones(C+1, D, 3, 3)}), 'head.weight is (4, 128, 3, 3) instead of (3, 128, 3, 3)'),
    (lambda sd: sd.update({'head.weight': torch.ones(C, D, 1, 1)}), 'head.weight has shape'),
    (lambda sd: sd.pop('cls_token'), 'missing: cls_token'),
    (lambda sd: sd.update(cls_token=torch.ones(3)), 'not a checkpoint')])
def test_reference_refused(change, said, tmp_path):
    sd = reference_weights('v2'); change(sd)
    torch.save({'model': sd}, tmp_path/'ref.pth')
    with pytest.raises(DataError) as e: load_reference(tmp_path/'ref.pth')
    assert said in str(e.value) and 'ref.pth' in str(e.value)

class Malicious:
    def __init__(self, marker): self.marker = marker
    def __reduce__(self): return exec, (f"open({str(self.marker)!r}, 'w').write('run')",)

@pytest.mark.parametrize('write', [torch.save, lambda o, f: f.write_bytes(pickle.dumps(o)), lambda o, f: torch.save(o, f, _use_new_zipfile_serialization=False)])
def test_code_in_a_checkpoint_is_not_run(write, tmp_path):
    marker, file = tmp_path/'marker', tmp_path/'bad.pth'
    write({'model': reference_weights('v1'), 'args': Malicious(marker)}, file)
    for load in (load_reference, lambda f: load_vit(build_vit(tiny()), f), lambda f: load_weights(MCTformer(C, backbone=tiny()), f)):
        with pytest.raises(DataError, match='bad.pth'): load(file)
    assert not marker.exists()

def tiny(**kw): return VisionTransformer(**{**dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0), **kw})

def test_checkpoint_for_another_model(tmp_path):
    save_run(MCTformer(5, 'v2', tiny()), tmp_path); file = tmp_path/'model.safetensors'
    for model, said in ((MCTformer(4, 'v2', tiny()), 'cls_token is (1, 5, 48) instead of (1, 4, 48)'), (MCTformer(5, 'v1', tiny()), 'unexpected: head.bias'), (MCTformer(5, 'v2', tiny(depth=3)), 'missing'),
                        (MCTformer(5, 'v2', tiny(embed_dim=96)), 'shape'), (MCTformer(5, 'v2', tiny(), score='fc'), 'score_head')):
        with pytest.raises(DataError) as e: load_weights(model, file)
        assert said in str(e.value) and str(file) in str(e.value)
    with pytest.raises(DataError, match='20 wanted'): load_run(tmp_path, backbone=tiny(), num_classes=20)
    file.write_bytes(file.read_bytes()[:1000]) # a truncated file
    with pytest.raises(DataError, match='truncated'): load_run(tmp_path, backbone=tiny())

@pytest.mark.parametrize('name, kw', [('vit_tiny_patch16_224', {}), ('deit_tiny_patch16_224', {}), ('vit_small_patch14_dinov2', dict(img_size=56)), ('deit3_small_patch16_224', {}),
    ('vit_base_patch32_clip_224', {}), ('vit_small_r26_s32_224', {}), ('vit_tiny_r_s16_p8_224', {}), ('mct_tiny_patch8_96', {}), ('mct_hybrid_efficientnet_lite0', {}), ('mct_hybrid_tf_efficientnet_lite0', {}),
    ('vit_small_patch14_reg4_dinov2', dict(img_size=56)), ('vit_base_patch16_siglip_224', {})])
def test_timm_backbones(name, kw, tmp_path):
    kw = dict(depth=2) | kw if 'hybrid' not in name else kw
    model = MCTformer(4, 'v2', name, **kw).eval()
    x = torch.randn(2, 3, 2*model.patch_size, 3*model.patch_size)
    with capture_qk(model.blocks) as qk, torch.no_grad(): out, (c, p) = model(x), model.forward_features(x)
    assert p.shape == (2, model.embed_dim, 2, 3) and out.cls.shape == out.patch.shape == (2, 4) and qk[1]['q'].shape[2] == model.num_prefix + 6 and model.num_prefix == (8 if 'reg4' in name else 4)
    assert torch.isfinite(out.patch).all()
    save_run(model, tmp_path)
    back, cfg = load_run(tmp_path)
    with torch.no_grad(): torch.testing.assert_close(back(x), out)
    assert back.input_spec == model.input_spec and tuple(cfg['input']['mean']) == model.input_spec.mean

def test_photos_as_the_weights_want_them():
    "Mean and standard deviation come with the backbone, and with no weights they are ImageNet's"
    half = dict(vit_tiny_patch16_224=.5, deit_tiny_patch16_224=.485, mct_tiny_patch8_96=.485, vit_small_patch16_36x1_224=.485,
                mct_hybrid_efficientnet_lite0=.485, mct_hybrid_tf_efficientnet_lite0=.5, vit_base_patch16_siglip_224=.5, vit_small_patch14_dinov2=.485)
    with torch.device('meta'):
        for name,mean in half.items():
            depth = {} if 'hybrid' in name else dict(depth=1)
            assert build_vit(name, **depth).input_spec.mean[0] == mean == MCTformer(2, 'v1', name, **depth).input_spec.mean[0], name
    assert DenseBackbone('tf_efficientnet_lite0').input_spec.std == (.5,)*3 and DenseBackbone('mct_tiny_patch8_96').input_spec == InputSpec()
    assert MCTformer(2, 'v1', timm.create_model('vit_tiny_patch16_224', depth=1)).input_spec.mean[0] == .5 and backbone_spec(tiny()) == InputSpec()

def test_weights_by_path_want_what_the_architecture_wants(tmp_path):
    torch.save(timm.create_model('vit_tiny_patch16_224', depth=1).state_dict(), tmp_path/'w.pth')
    assert MCTformer(2, 'v1', 'vit_tiny_patch16_224', tmp_path/'w.pth', depth=1).input_spec.std == (.5,)*3

def test_published_start():
    "Head as torch starts a convolution; class tokens copies of a pretrained one, each its own from scratch; timm's way is an argument"
    set_seed(0); m = MCTformer(20, 'v2', 'deit_small_patch16_224', depth=1); n = m.head.weight.numel()
    assert abs(m.head.weight.std()*(27*384)**.5 - 1) < 5*(2*n)**-.5 and m.head.weight.abs().max() <= (9*384)**-.5 and m.head.bias.abs().min() > 0
    assert (m.cls_token.std(1) > 0).all() and (m.pos_embed_cls.std(1) > 0).all()
    t = MCTformer(20, 'v2', 'deit_small_patch16_224', depth=1, init='timm')
    assert abs(t.head.weight.std()/.02 - 1) < 5*(2*n)**-.5 and t.head.bias.eq(0).all() and (t.cls_token[:, :1] == t.cls_token).all()
    p = MCTformer(3, 'v2', 'mct_tiny_patch8_96', pretrained=True)
    assert (p.cls_token[:, :1] == p.cls_token).all() and (p.pos_embed_cls[:, :1] == p.pos_embed_cls).all()
    with pytest.raises(DataError, match="init 'zero'"): MCTformer(3, backbone=tiny(), init='zero')

@pytest.mark.parametrize('kw', [dict(qk_norm=True), dict(pre_norm=True), dict(no_embed_class=True), dict(class_token=False, global_pool='avg'), dict(init_values=.1), dict(dynamic_img_size=True),
    dict(reg_tokens=3), dict(reg_tokens=3, no_embed_class=True), dict(reg_tokens=2, class_token=False, global_pool='avg')])
def test_one_class_token_is_the_backbone(kw):
    "With one class and the backbone's own grid the tokens after the last block are those of timm"
    vit = tiny(final_norm=False, fc_norm=False, **kw).eval()
    model, x = MCTformer(1, 'v1', vit).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad(): want, (c, p) = vit.forward_features(x), model.forward_features(x)
    n = vit.num_prefix_tokens
    if vit.cls_token is not None: torch.testing.assert_close(c[:, 0], want[:, 0]); torch.testing.assert_close(p.flatten(2).transpose(1, 2), want[:, n:])
    else: assert p.shape == (2, 48, 4, 4) # an added class token changes the attention of every patch

@pytest.mark.parametrize('make, said', [
    (lambda: tiny(pos_embed='none'), 'position embedding'), (lambda: timm.create_model('vit_small_patch16_dinov3', depth=1), 'RoPE'),
    (lambda: tiny(patch_drop_rate=.5), 'drops patches'), (lambda: tiny(patch_size=(8, 4)), 'not square'), (lambda: tiny(attn_layer='diff', num_heads=2), 'DiffAttention'),
    (lambda: timm.create_model('vit_small_patch16_18x2_224', depth=1), 'ParallelThingsBlock'), (lambda: timm.create_model('swin_tiny_patch4_window7_224', depths=(1, 1, 1, 1)), 'SwinTransformer'),
    (lambda: timm.create_model('eva02_tiny_patch14_224', depth=1), 'queries and keys'), (lambda: timm.create_model('deit_tiny_distilled_patch16_224', depth=1), 'distilled')])
def test_backbones_refused(make, said):
    with pytest.raises(DataError, match=said): check_vit(make())

def test_suggestions_work():
    for name in ('deit_small_distilled_patch16_22', 'vit_small_patch14_reg4_dino', 'mct_tiny_patch8', 'vit_small_patch16_18x2_22'):
        near = similar_backbones(name)
        with pytest.raises(DataError, match='no model of this name. Perhaps you mean ' + ', '.join(near)): MCTformer(2, backbone=name)
        with torch.device('meta'): assert near and all(MCTformer(2, 'v1', n, depth=1) for n in near)
    with pytest.raises(DataError, match='See timm.list_models'): MCTformer(2, backbone='xyzzy')

OWN = 'mct_tiny_patch8_96', 'mct_hybrid_efficientnet_lite0', 'mct_hybrid_tf_efficientnet_lite0', 'mct_resnet38'

@pytest.mark.parametrize('name', OWN)
def test_own_names_work_everywhere(name, root):
    "In a fresh process, which has imported nothing that registers them"
    code = 'import sys; from mctformer_nb.mctformer import info_table; print(info_table(sys.argv[1]))'
    r = subprocess.run([sys.executable, '-c', code, name], cwd=root, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert r.returncode == 0, r.stderr
    assert ('CAM' in r.stdout and '104.3 M' in r.stdout and ' 99.8 ' in r.stdout) if name == 'mct_resnet38' else 'MCTformer-V2' in r.stdout
    assert list(table4_models(name)) == (['cam'] if name == 'mct_resnet38' else ['v1', 'v2'])
    with torch.device('meta'): assert create_backbone(name)

@pytest.mark.parametrize('name', ['deit_tiny_patch16_224', 'vit_small_patch14_reg4_dinov2', 'vit_small_patch16_dinov3', 'vit_base_patch16_siglip_224'])
def test_frozen_features_are_those_after_the_last_norm(name):
    net = frozen_network(name, pretrained=False, depth=2); p = net.patch_embed.patch_size[0]
    x = torch.randn(1, 3, 3*p-2, 4*p-1)                        # padded to whole patches
    want = net.forward_features(F.pad(x, (0, 1, 0, 2)))[:, net.num_prefix_tokens:]           # (B,M,D)
    f = frozen_features(net, x)
    assert f.shape == (1, net.embed_dim, 3, 4) and not net.training and not any(q.requires_grad for q in net.parameters())
    torch.testing.assert_close(f.flatten(2).mT, want)

def test_frozen_features_of_a_cnn():
    net = frozen_network('resnet18', pretrained=False); x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(frozen_features(net, x), net.forward_features(x))

def test_mimetic_start_keeps_shapes_and_is_repeatable():
    a, b = (mimetic_init((torch.manual_seed(3), tiny())[1]).state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a) and a['pos_embed'][0, 0].eq(0).all() and a['cls_token'].std() > 0

def test_wrong_image_size():
    with pytest.raises(DataError, match='Resize it to 32 x 40'): MCTformer(2, backbone=tiny())(torch.zeros(1, 3, 30, 41))
    with pytest.raises(DataError, match='Resize it to 8 x 8'): MCTformer(2, backbone=tiny())(torch.zeros(1, 3, 3, 8)) # smaller than a patch
