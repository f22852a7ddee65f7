"""One training step of MCTformer-V2 (DeiT-S): this library's model against the published implementation, which keeps and stacks the attention of all layers also in training, on timm's blocks.

    python benchmarks/train_step.py [--batch-size 16] [--memory-batch 4] [--device cpu] [--threads 1] [--amp off] [--json results/bench.json]

A step is forward pass, loss of Eq. 5, backward pass and AdamW, on random images with the same weights. Activation memory is what the forward pass leaves for the backward pass: every distinct
tensor that autograd saves and the attention that the plain model returns, weights left out, counted in bytes; and the peak of the whole pass. `--amp bf16` runs both under autocast."""
from contextlib import nullcontext
import torch, torch.nn.functional as F
from timm.layers import Mlp
from _common import Report, by_turns, compare, measure, parser, ratio
from mctformer_nb.mctformer import MCTformer
from mctformer_nb.train import mct_loss

def make_model(device, **kw): torch.manual_seed(0); return MCTformer(20, 'v2', 'deit_small_patch16_224', drop_path=0., **kw).to(device).train()

def as_timm(model):
    "The same model, with timm's MLPs as they are: those of this library keep less for the backward pass"
    for b in model.blocks: b.mlp.__class__ = Mlp
    return model

def block_plain(b, t):
    B, N, D = t.shape; H = b.attn.num_heads
    q, k, v = b.attn.qkv(b.norm1(t)).reshape(B, N, 3, H, D//H).permute(2, 0, 3, 1, 4) # (B,H,N,d) each
    a = (q @ k.transpose(-2, -1) * (D//H)**-.5).softmax(-1)
    t = t + b.attn.proj((a @ v).transpose(1, 2).reshape(B, N, D))
    return t + b.mlp(b.norm2(t)), a

def forward_plain(model, x):
    "Scores of class tokens and patches (B,C), and the attention of all layers (L,B,N,N), head mean of the stack"
    t, hw = model.tokens(x); attns, C = [], model.num_classes
    for b in model.blocks: t, a = block_plain(b, t); attns.append(a)
    patch = model.head(t[:, C:].transpose(1, 2).unflatten(2, hw))                      # (B,C,h,w)
    return t[:, :C].mean(-1), patch.mean((-2, -1)), torch.stack(attns).mean(2)

def loss_of(model, x, y, plain, amp, device):
    with torch.autocast(device.split(':')[0], dtype=getattr(torch, {'bf16': 'bfloat16', 'fp16': 'float16'}[amp])) if amp!='off' else nullcontext():
        out = forward_plain(model, x) if plain else model(x)
        return mct_loss(out[:2], y), out

def step(model, opt, x, y, plain, amp, device):
    loss, out = loss_of(model, x, y, plain, amp, device); loss.backward(); opt.step(); opt.zero_grad(); return loss.item()

def activations(model, x, y, plain, amp, device):
    "Bytes that wait for the backward pass"
    seen = {}; mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    def keep(t): s = t.untyped_storage(); s.data_ptr() in mine or seen.__setitem__(s.data_ptr(), s.nbytes()); return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t): loss, out = loss_of(model, x, y, plain, amp, device)
    for o in out:
        if o is not None: keep(o)
    return sum(seen.values())

def images(B, side, device): g = torch.Generator().manual_seed(0); return torch.randn(B, 3, side, side, generator=g).to(device), (torch.rand(B, 20, generator=g)<.1).float().to(device)

def times(a, report, side, target=None):
    x, y = images(a.batch_size, side, a.device); models = dict(plain=as_timm(make_model(a.device)), ours=make_model(a.device))
    opts = {k: torch.optim.AdamW(m.parameters(), lr=1e-5) for k,m in models.items()}
    g = by_turns({k: (lambda k=k: step(models[k], opts[k], x, y, k=='plain', a.amp, a.device)) for k in models}, a.repeats, a.device)
    row = compare(g['plain'], g['ours']); row |= {'images/s plain': a.batch_size/row['seconds plain'], 'images/s': a.batch_size/row['seconds'], 'difference of the loss': abs(g['plain']['result']-g['ours']['result'])}
    if a.device.startswith('cuda') and side==224: row['TFLOP/s'] = a.batch_size*3*2*4.7e9/row['seconds']/1e12   # 4.7 G multiply-adds an image forward (Table 4), twice that backward
    report.add(f'step {side} x {side}, batch {a.batch_size}' + (f', {a.amp}' if a.amp!='off' else ''), row, target)

def compiled(a, report, side):
    "A step with `torch.compile` beside one without; it needs a C++ compiler, so it runs only when asked for (--parts compile)"
    x, y = images(a.batch_size, side, a.device); models = {k: make_model(a.device) for k in ('plain', 'ours')}; models['ours'].forward = torch.compile(models['ours'].forward)
    opts = {k: torch.optim.AdamW(m.parameters(), lr=1e-5) for k,m in models.items()}
    g = by_turns({k: (lambda k=k: step(models[k], opts[k], x, y, False, a.amp, a.device)) for k in models}, a.repeats, a.device)
    row = compare(g['plain'], g['ours']); report.add(f'torch.compile, step {side} x {side}, batch {a.batch_size}', {k: row[k] for k in ('times faster', 'seconds plain', 'seconds')})

def memory(a, report, side, target=None):
    x, y = images(a.memory_batch, side, a.device); got, peak = {}, {}
    for k,kw in dict(plain={}, ours={}, ours_checkpoint=dict(grad_checkpointing=True)).items():
        m = make_model(a.device, **kw); m = as_timm(m) if k=='plain' else m; args = (m, x, y, k=='plain', a.amp, a.device)
        got[k] = activations(*args)/2**20; loss_of(*args)[0].backward()                # gradients are there before the peak is measured
        peak[k] = measure(lambda: loss_of(*args)[0].backward(), a.device)[2]/2**20; del m, args
    report.add(f'activations {side} x {side}, batch {a.memory_batch}', {'times less memory': got['plain']/got['ours'], 'MB plain': got['plain'], 'MB': got['ours'], 'MB, checkpointing': got['ours_checkpoint'],
               'peak MB plain': peak['plain'], 'peak MB': peak['ours'], 'peak MB, checkpointing': peak['ours_checkpoint'], 'times less memory, peak': peak['plain']/peak['ours']}, target)

def share(a, report):
    "What of a step all implementations share: the same network without any attention, as a lower bound"
    x, y = images(a.batch_size, 224 if not a.quick else 64, a.device); m, bare = make_model(a.device), make_model(a.device)
    for b in bare.blocks: b.attn.forward = lambda t, attn=b.attn, **_: attn.proj(attn.qkv(t)[..., :t.shape[-1]])       # qkv and proj, no attention between
    run = lambda m: loss_of(m, x, y, False, a.amp, a.device)[0].backward()
    g = by_turns(dict(whole=lambda: run(m), bare=lambda: run(bare)), a.repeats, a.device)
    report.add('share of a step outside attention, 224 x 224', {'share': 1/ratio(g['whole'], g['bare'])})

def main(a):
    if a.quick: a.batch_size, a.memory_batch, a.repeats = 2, 1, 1
    report = Report('benchmark: training step', a, 'random images')
    if 'time' in a.parts: times(a, report, 64 if a.quick else 224, {'times faster': 1.5})
    if 'compile' in a.parts: compiled(a, report, 64 if a.quick else 224)
    if 'share' in a.parts: share(a, report)
    for s in ((64,) if a.quick else (224, 448)) if 'memory' in a.parts else (): memory(a, report, s, {'times less memory': 2} if s==448 else None)
    report.save()

if __name__ == '__main__':
    p = parser(__doc__, 3); A = p.add_argument
    A('--batch-size', type=int, default=16); A('--memory-batch', type=int, default=4); A('--amp', choices=['off', 'bf16', 'fp16'], default='off'); A('--parts', nargs='+', choices=['time', 'compile', 'share', 'memory'], default=['time', 'share', 'memory'])
    main(p.parse_args())
