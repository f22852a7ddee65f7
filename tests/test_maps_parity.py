"""Maps from a reference checkpoint equal the published formulas, written out in plain torch with explicit attention matrices.

Nothing of the package is used on the expected side: the transformer, the class scores and the maps follow the description of the
reference code (key names, no last LayerNorm, sum or mean over layers, affinity summed over all layers, rows not renormalised)."""
import math
import pytest, torch
import torch.nn.functional as F
from mctformer_nb.attention import localize
from mctformer_nb.mctformer import load_reference

C, D, H, L, P, G = 5, 128, 2, 4, 16, 4 # classes, width, heads, layers, patch, native grid
SIZES = {'native': (64, 64), 'square': (96, 96), 'wide': (48, 112), 'tall': (80, 32)}
CASES = {'v1': dict(rule='reference', layers=3), 'v2': dict(rule='reference', layers=3), 'plus': dict(rule='plus', layers=None)}

def reference_state(kind, seed=0):
    "Random values under the key names of the reference, large enough for sharp attention"
    g = torch.Generator().manual_seed(seed); r = lambda *shape, std=.08: std*torch.randn(*shape, generator=g)
    sd = {'cls_token': r(1, C, D, std=1), 'patch_embed.proj.weight': r(D, 3, P, P, std=.04), 'patch_embed.proj.bias': r(D)}
    if kind == 'plus': sd |= {'pos_embed_cls': r(1, C, D, std=.5), 'pos_embed_pat': r(1, G*G, D, std=.5), 'pos_embed': r(1, 197, D, std=.5)} # the last one unused
    else: sd['pos_embed'] = r(1, C+G*G, D, std=.5)
    for i in range(L):
        b = f'blocks.{i}.'
        for n in ('norm1', 'norm2'): sd |= {f'{b}{n}.weight': 1+r(D, std=.2), f'{b}{n}.bias': r(D)}
        for n,o,c in (('attn.qkv', 3*D, D), ('attn.proj', D, D), ('mlp.fc1', 4*D, D), ('mlp.fc2', D, 4*D)): sd |= {f'{b}{n}.weight': r(o, c, std=.13 if 'qkv' in n else .08), f'{b}{n}.bias': r(o)}
    sd |= {'norm.weight': 5+r(D), 'norm.bias': r(D, std=3)} # present, unused: using it would show
    sd |= {'head.weight': r(C, D), 'head.bias': r(C)} if kind == 'v1' else {'head.weight': r(C, D, 3, 3), 'head.bias': r(C)}
    return sd

def forward(sd, x):
    "Output tokens (B,C+M,D), grid, and the attention probabilities (B,H,N,N) of every layer"
    B, _, Y, X = x.shape; h, w = Y//P, X//P
    plus = 'pos_embed_cls' in sd; more = 0 if plus else .1 # V1 and V2 add .1 before they divide
    cls_pos, pat_pos = (sd['pos_embed_cls'], sd['pos_embed_pat']) if plus else sd['pos_embed'].split([C, G*G], 1)
    factor = (h+more)/G, (w+more)/G
    if (h, w) != (G, G): pat_pos = F.interpolate(pat_pos.reshape(1, G, G, D).permute(0, 3, 1, 2), scale_factor=factor, mode='bicubic').flatten(2).mT
    patches = F.conv2d(x, sd['patch_embed.proj.weight'], sd['patch_embed.proj.bias'], stride=P).flatten(2).mT # (B,M,D)
    t = torch.cat([(sd['cls_token']+cls_pos).repeat(B, 1, 1), patches+pat_pos], 1); attns = []
    for i in range(L):
        lin = lambda n, z: z @ sd[f'blocks.{i}.{n}.weight'].T + sd[f'blocks.{i}.{n}.bias']
        norm = lambda n, z: F.layer_norm(z, (D,), sd[f'blocks.{i}.{n}.weight'], sd[f'blocks.{i}.{n}.bias'], 1e-6)
        q, k, v = (z.reshape(B, -1, H, D//H).transpose(1, 2) for z in lin('attn.qkv', norm('norm1', t)).split(D, -1)) # (B,H,N,d)
        a = (q @ k.mT/math.sqrt(D//H)).softmax(-1); attns.append(a)
        t = t + lin('attn.proj', (a @ v).transpose(1, 2).reshape(B, -1, D))
        t = t + lin('mlp.fc2', F.gelu(lin('mlp.fc1', norm('norm2', t))))
    return t, (h, w), attns

def minmax(m): lo, hi = m.amin((2, 3), keepdim=True), m.amax((2, 3), keepdim=True); return (m-lo)/(hi-lo)

def formulas(sd, x, kind, rule, layers, refine):
    "Maps (B,C,h,w) of the table 'Localization maps': reference V1/V2, MCTformer+, and the paper's text"
    t, (h, w), attns = forward(sd, x); A = torch.stack(attns).mean(2); K = layers or L # (L,B,N,N)
    m = A[-K:, :, :C, C:].sum(0).reshape(len(x), C, h, w)
    if rule != 'reference': m = m/K                                                # Eq. 2
    if rule == 'paper': m = minmax(m)
    if kind != 'v1':
        f = F.conv2d(t[:, C:].mT.reshape(len(x), D, h, w), sd['head.weight'], sd['head.bias'], padding=1)
        m = m*minmax(f) if rule == 'paper' else (m*f.relu()).sqrt() if rule == 'plus' else m*f.relu()
    if not refine: return m
    p2p = A[-K:, :, C:, C:].mean(0) if rule == 'paper' else A[:, :, C:, C:].sum(0) # Eq. 3, 7
    return (p2p @ m.flatten(2).mT).mT.reshape(len(x), C, h, w)

def close(got, want):
    assert got.shape == want.shape
    assert want.flatten(2).std(-1).div(want.flatten(2).mean(-1).abs()+1e-12).median() > .05, 'the expected maps are flat: they test nothing'
    assert (got-want).abs().max() <= 1e-4*want.abs().max()             # sums of up to 1,536 float32, in any order: 1536*2^-24 = 9e-5

@pytest.fixture(scope='module')
def models():
    states = {k: reference_state(k) for k in CASES}
    return {k: (sd, load_reference({'model': sd})) for k,sd in states.items()}

@pytest.mark.parametrize('refine', [True, False], ids=['refined', 'raw'])
@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('kind', CASES)
@torch.no_grad()
def test_reference_rules(models, kind, size, refine):
    sd, model = models[kind]; x = torch.randn(2, 3, *SIZES[size], generator=torch.Generator().manual_seed(1))
    got = localize(model, x, kind='attn' if kind == 'v1' else 'fused', refine=refine, **CASES[kind])
    close(got, formulas(sd, x, kind, refine=refine, **CASES[kind]))

@pytest.mark.parametrize('refine', [True, False], ids=['refined', 'raw'])
@pytest.mark.parametrize('kind', CASES)
@torch.no_grad()
def test_paper_rule(models, kind, refine):
    sd, model = models[kind]; x = torch.randn(1, 3, *SIZES['wide'], generator=torch.Generator().manual_seed(2))
    got = localize(model, x, kind='attn' if kind == 'v1' else 'fused', layers=3, refine=refine, rule='paper')
    close(got, formulas(sd, x, kind, 'paper', 3, refine))

@pytest.mark.parametrize('kind', CASES)
@torch.no_grad()
def test_scores(models, kind):
    sd, model = models[kind]; x = torch.randn(2, 3, *SIZES['tall'], generator=torch.Generator().manual_seed(3))
    t, hw, _ = forward(sd, x); out = model(x)
    torch.testing.assert_close(out.cls, t[:, :C].mean(-1), rtol=1e-4, atol=1e-5) # Eq. 4, no LayerNorm
    if kind == 'v1': assert out.patch is None; return
    f = F.conv2d(t[:, C:].mT.unflatten(2, hw), sd['head.weight'], sd['head.bias'], padding=1)
    torch.testing.assert_close(out.patch, f.mean((2, 3)), rtol=1e-4, atol=1e-5)
