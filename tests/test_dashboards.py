"Trainings in dashboards: what TensorBoard's own reader finds in the event files; skipped where tensorboard is not installed (pip install tensorboard)"
import json
import numpy as np, pandas as pd
import pytest
from mctformer_nb import cli, cli_masks
from mctformer_nb.artifacts import save_crf_label
from mctformer_nb.core import save_mask
from mctformer_nb.dashboards import CountOn, dashboard
from mctformer_nb.datasets import get_dataset

def events(run):
    "{tag: [(step, value)]} of all event files of a run, by step"
    acc = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator', reason='tensorboard is not installed: pip install tensorboard'); found = {}
    for f in sorted((run/'tensorboard').glob('events*')):
        a = acc.EventAccumulator(str(f)); a.Reload()
        for tag in a.Tags()['scalars']: found.setdefault(tag, []).extend((e.step, e.value) for e in a.Scalars(tag))
    return {k: sorted(v) for k,v in found.items()}

TINY = ['--data', 'mini', '--backbone', 'mct_tiny_patch8_96', '--pretrained', '--image-size', '96', '--batch-size', '500', '--aug', 'light', '--device', 'cpu']

@pytest.mark.slow
def test_tensorboard_has_what_the_history_has(tmp_path):
    pytest.importorskip('tensorboard', reason='tensorboard is not installed: pip install tensorboard')
    from mctformer_nb.train import train_classifier
    ds, valid = get_dataset('mini', n=24), get_dataset('mini', 'val', n=8); run = tmp_path/'run'
    how = dict(backbone='mct_tiny_patch8_96', pretrained=True, batch_size=8, image_size=96, epochs=3, aug='light', lr=1e-3, per_step=True, device='cpu')
    def stop(line):
        if line.startswith('epoch 2/'): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train_classifier(ds, valid, run, cbs=dashboard('tensorboard', run), log=stop, **how)
    train_classifier(ds, valid, run, cbs=dashboard('tensorboard', run), log=lambda line: None, **how)
    found, history = events(run), pd.read_csv(run/'history.csv')
    assert [s for s,_ in found['train_loss']] == list(range(1, 10))                  # 3 epochs of 3 batches, the stop in between
    assert np.allclose([v for _,v in found['valid_loss']], history.valid_loss, atol=1e-4) and np.allclose([v for _,v in found['map_cls']], history.map_cls, atol=1e-2)
    assert [s for s,_ in found['map_cls']] == [3, 6, 9] and max(v for _,v in found['lr_0'])<=1.001e-3

@pytest.mark.slow
def test_affinity_and_segmentation_too(tmp_path, monkeypatch):
    pytest.importorskip('tensorboard', reason='tensorboard is not installed: pip install tensorboard'); monkeypatch.chdir(tmp_path)
    from PIL import Image
    ds, rows = get_dataset('mini', n=10), ['image,labels']; (tmp_path/'photos/images').mkdir(parents=True)
    for id in ds.ids:
        ds.image(id).save(f'photos/images/{id}.png'); rows.append(f'{id}.png,' + ';'.join(ds.classes[c] for c in ds.labels(id))); save_mask(f'masks/{id}.png', ds.mask(id))
        one_hot = np.stack([ds.mask(id)==v for v in [0, *ds.labels(id)+1]]).astype(np.float16); save_crf_label(f'labels/{id}.npz', ds.labels(id), one_hot, one_hot)
    (tmp_path/'photos/labels.csv').write_text('\n'.join(rows)); (tmp_path/'photos/classes.txt').write_text('\n'.join(ds.classes))
    common = ['--data', 'folder:photos', '--recipe', 'quick', '--batch-size', '5', '--epochs', '2', '--device', 'cpu', '--log', 'tensorboard']
    assert cli_masks.mct_affinity(['--labels', 'labels', '--out', 'affinity', *common]) == 0
    assert cli_masks.mct_segment_train(['--masks', 'masks', '--out', 'deeplab', *common]) == 0
    for run in ('affinity', 'deeplab'): assert len(events(tmp_path/run)['train_loss']) >= 2, run

def test_what_is_missing_is_said(tmp_path, capsys, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'tensorboard', None); monkeypatch.setitem(sys.modules, 'fastai.callback.tensorboard', None)
    assert cli.mct_train(['--data', 'mini', '--recipe', 'quick', '--out', str(tmp_path/'run'), '--log', 'tensorboard']) == 2
    assert 'pip install tensorboard' in capsys.readouterr().err
    assert cli.mct_train(['--data', 'mini', '--recipe', 'frozen', '--out', str(tmp_path/'run'), '--log', 'tensorboard']) == 2
    assert 'trains no network' in capsys.readouterr().err
