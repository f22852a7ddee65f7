"Trainings in dashboards: what the own readers of TensorBoard and Weights & Biases find in their files; skipped where they are not installed (pip install tensorboard wandb)"
import json, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd
import pytest
from mctformer_nb import cli, cli_masks
from mctformer_nb.artifacts import save_crf_label
from mctformer_nb.core import DataError, save_mask
from mctformer_nb.dashboards import dashboard
from mctformer_nb.datasets import get_dataset

@pytest.fixture(params=['tensorboard', 'wandb'])
def to(request, monkeypatch):
    "Name of a dashboard that is installed"
    pytest.importorskip(request.param, reason=f'{request.param} is not installed: pip install {request.param}')
    for k,v in dict(WANDB_MODE='offline', WANDB_SILENT='true').items(): monkeypatch.setenv(k, v)
    return request.param

def logged(run, to):
    "{name: [(step, value)]} of a run, all of its files together, by step"
    found = {}
    if to=='tensorboard':
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        for f in sorted((run/'tensorboard').glob('events*')):
            a = EventAccumulator(str(f)); a.Reload()
            for tag in a.Tags()['scalars']: found.setdefault(tag, []).extend((e.step, e.value) for e in a.Scalars(tag))
    for f in sorted((run/'wandb').glob('offline-run-*/*.wandb')):
        out = subprocess.run([sys.executable, '-m', 'wandb', 'leet', 'inspect', '--json', str(f)], capture_output=True, text=True, check=True).stdout
        for row in (r['history']['item'] for r in map(json.loads, out.splitlines()) if r['type']=='history'):
            for k,v in row.items():
                if k[0]!='_': found.setdefault(k, []).append((row['_step'], float(v)))
    return {k: sorted(v) for k,v in found.items()}

@pytest.mark.slow
def test_a_dashboard_has_what_the_history_has(tmp_path, to):
    "Also of a training that was stopped and goes on"
    from mctformer_nb.train import train_classifier
    ds, valid = get_dataset('mini', n=24), get_dataset('mini', 'val', n=8); run = tmp_path/'run'
    how = dict(backbone='mct_tiny_patch8_96', pretrained=True, batch_size=8, image_size=96, epochs=3, aug='light', lr=1e-3, per_step=True, device='cpu')
    def stop(line):
        if line.startswith('epoch 2/'): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train_classifier(ds, valid, run, cbs=dashboard(to, run), log=stop, **how)
    train_classifier(ds, valid, run, cbs=dashboard(to, run), log=lambda line: None, **how)
    found, history = logged(run, to), pd.read_csv(run/'history.csv')
    assert [s for s,_ in found['train_loss']] == list(range(1, 10))                  # 3 epochs of 3 batches, the stop in between
    assert np.allclose([v for _,v in found['valid_loss']], history.valid_loss, atol=1e-4) and np.allclose([v for _,v in found['map_cls']], history.map_cls, atol=1e-2)
    assert [s for s,_ in found['map_cls']] == [3, 6, 9] and max(v for _,v in found['lr_0'])<=1.001e-3
    assert {k.rstrip('0123456789') for k in found} == {'train_loss', 'valid_loss', 'map_cls', 'map_patch', 'lr_'}

@pytest.mark.slow
def test_affinity_and_segmentation_too(tmp_path, monkeypatch, to):
    "Two trainings of one process, a run each"
    monkeypatch.chdir(tmp_path); ds, rows = get_dataset('mini', n=10), ['image,labels']; Path('photos/images').mkdir(parents=True)
    for id in ds.ids:
        ds.image(id).save(f'photos/images/{id}.png'); rows.append(f'{id}.png,' + ';'.join(ds.classes[c] for c in ds.labels(id))); save_mask(f'masks/{id}.png', ds.mask(id))
        one_hot = np.stack([ds.mask(id)==v for v in [0, *ds.labels(id)+1]]).astype(np.float16); save_crf_label(f'labels/{id}.npz', ds.labels(id), one_hot, one_hot)
    Path('photos/labels.csv').write_text('\n'.join(rows)); Path('photos/classes.txt').write_text('\n'.join(ds.classes))
    common = ['--data', 'folder:photos', '--recipe', 'quick', '--batch-size', '5', '--epochs', '2', '--device', 'cpu', '--log', to]
    assert cli_masks.mct_affinity(['--labels', 'labels', '--out', 'affinity', *common]) == 0
    assert cli_masks.mct_segment_train(['--masks', 'masks', '--out', 'deeplab', *common]) == 0
    for run in ('affinity', 'deeplab'): assert [s for s,_ in logged(tmp_path/run, to)['train_loss']] == [1, 2, 3, 4], run

@pytest.mark.slow
def test_without_a_login(tmp_path, monkeypatch):
    pytest.importorskip('wandb', reason='wandb is not installed: pip install wandb').teardown()             # it remembers how it was started
    monkeypatch.setenv('WANDB_MODE', 'online'); monkeypatch.setenv('HOME', str(tmp_path)); monkeypatch.delenv('WANDB_API_KEY', raising=False)
    with pytest.raises(DataError, match='wandb login, or WANDB_MODE=offline'): dashboard('wandb', tmp_path/'run')[0].before_fit()

@pytest.mark.parametrize('to', ['tensorboard', 'wandb'])
def test_what_is_missing_is_said(tmp_path, capsys, monkeypatch, to):
    for name in (to, f'torch.utils.{to}'): monkeypatch.setitem(sys.modules, name, None)
    assert cli.mct_train(['--data', 'mini', '--recipe', 'quick', '--out', str(tmp_path/'run'), '--log', to]) == 2
    assert 'mctformer_nb[log]' in capsys.readouterr().err
    assert cli.mct_train(['--data', 'mini', '--recipe', 'frozen', '--out', str(tmp_path/'run'), '--log', to]) == 2
    assert 'trains no network' in capsys.readouterr().err
