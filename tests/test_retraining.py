"The second segmentation network and the clipped loss where cells of notebooks do not reach: old runs, resumed runs, odd masks"
import importlib.util, math
from pathlib import Path
import numpy as np, pytest, torch
from mctformer_nb.clipped_loss import ClippedLoss, loss_limits, pixel_losses
from mctformer_nb.core import DataError, write_json
from mctformer_nb.datasets import get_dataset
from mctformer_nb.deeplab import segment_options, train_segment
from mctformer_nb.mask_decoder import Segmenter
from mctformer_nb.runs import load_run
from mctformer_nb.deeplab_net import save_segment

TINY = dict(decoder='mask', loss='clipped', clip_start=3., backbone='mct_tiny_patch8_96', taps=(0,), crop=32, batch_size=2, optimizer='adamw', device='cpu')

def test_runs_from_before_go_on():
    "A default training notes what it noted before there was a choice of decoder and loss, so that its folder is still its own"
    before = set('batch_size crop scales flip image_size on_bad optimizer accumulate loss_at lr momentum weight_decay head_mult lr_mult power frozen amp backbone pretrained width dilation'.split())
    assert set(segment_options({})[3]) == set(segment_options(dict(decoder='fov', loss='plain'))[3]) == before
    assert set(segment_options({k: v for k,v in TINY.items() if k!='device'})[3]) - before == set('decoder loss clip_window clip_start clip_ignored clip_alone depth dropout taps'.split())

def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path):
    ds = get_dataset('mini', n=6, size=48)
    def stop(line):
        if line.startswith('epoch 1'): raise KeyboardInterrupt
    whole = train_segment(None, ds, tmp_path/'a', epochs=2, accumulate=2, log=lambda l: None, **TINY)
    with pytest.raises(KeyboardInterrupt): train_segment(None, ds, tmp_path/'b', epochs=2, accumulate=2, log=stop, **TINY)
    again = train_segment(None, ds, tmp_path/'b', epochs=2, accumulate=2, log=lambda l: None, **TINY)
    a, b = (load_run(r)[0].state_dict() for r in (whole, again))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

@pytest.mark.parametrize('options', [dict(), dict(clip_ignored=False), dict(clip_alone=True), dict(clip_alone=True, clip_ignored=False)])
def test_masks_of_nothing_but_ignored(options):
    z, y = torch.randn(2, 3, 4, 4, requires_grad=True), torch.full((2, 9, 9), 255)
    loss = ClippedLoss(3, math.inf, **options)(z, y); loss.backward()
    assert loss == 0 and z.grad.abs().sum() == 0
    y[0] = 1; loss = ClippedLoss(3, math.inf, **options)(z, y); loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all() and z.grad[0].abs().sum() > 0

def test_half_precision_and_windows_larger_than_the_crop():
    z, y = torch.randn(2, 3, 4, 4).half(), torch.randint(0, 3, (2, 8, 8))
    losses = pixel_losses(z, y)
    assert losses.dtype == torch.float32 and torch.allclose(loss_limits(losses, 100), losses.mean().expand(8, 8))
    z = z.float().requires_grad_(); f = ClippedLoss(100, math.inf); f(z, y)
    assert 0 < f.clipped.float().mean() < 1 and f.counted == 128

def test_changed_configurations_are_refused(tmp_path):
    net = Segmenter(2, 'mct_tiny_patch8_96', taps=(0,), depth=1); cfg = save_segment(net, tmp_path, ['a', 'b'])
    for wrong in (dict(depth='two'), dict(depth=10**9), dict(dropout='none'), dict(depth=2), dict(backbone_args=dict(taps=[0], pretrained_cfg='x.pth'))):
        write_json(tmp_path/'config.json', cfg | wrong)
        with pytest.raises(DataError, match='config.json|model.safetensors'): load_run(tmp_path)

@pytest.mark.slow
def test_clipped_is_ahead_where_labels_are_wrong(root, tmp_path):
    "Three seeds of planted mistakes, as long as the table trains: there the leads are 4.7, 2.3 and 0.5"
    spec = importlib.util.spec_from_file_location('retraining', root/'experiments/retraining.py'); r = importlib.util.module_from_spec(spec); spec.loader.exec_module(r)
    from types import SimpleNamespace as NS
    ds, val, a = get_dataset('mini', n=128, size=96), get_dataset('mini', 'val', n=64, size=96), NS(steps=480, clip_start=.6)
    frozen, ahead = r.Frozen(ds, val), []
    for seed in range(3):
        r.planted_masks(ds, tmp_path/str(seed), seed); masks = [r.open_mask(tmp_path/str(seed)/f'{id}.png') for id in ds.ids]
        plain, clipped = (frozen.fit(*r.NETWORKS[n], masks, seed, a)[-1] for n in ('DeepLab', 'DeepLab, clipped loss'))
        ahead.append(clipped-plain)
    assert np.mean(ahead) > 1, ahead
