"A dataset in FiftyOne, read back by FiftyOne; skipped where it is not installed (pip install fiftyone) or its database does not start"
import numpy as np
import pytest
from mctformer_nb import cli_tools
from mctformer_nb.artifacts import save_seed
from mctformer_nb.core import save_mask
from mctformer_nb.datasets import get_dataset

pytestmark = pytest.mark.slow

@pytest.fixture
def fo(monkeypatch, tmp_path):
    monkeypatch.setenv('FIFTYONE_DATABASE_DIR', str(tmp_path/'db')); monkeypatch.setenv('FIFTYONE_DO_NOT_TRACK', 'true')
    fo = pytest.importorskip('fiftyone', reason='fiftyone is not installed: pip install fiftyone')
    try: fo.list_datasets()
    except Exception as e: pytest.skip(f'the database of FiftyOne does not start here: {type(e).__name__}: {str(e)[:200]}')
    return fo

def test_photos_maps_masks_and_scores(fo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path); mini, rows = get_dataset('mini', n=6), ['image,labels']; (tmp_path/'photos/images').mkdir(parents=True)
    for i,id in enumerate(mini.ids):
        mini.image(id).save(f'photos/images/{id}.png'); rows.append(f'{id}.png,' + ';'.join(mini.classes[c] for c in mini.labels(id)))
        m = mini.mask(id); m[:4] = 255; save_mask(f'run/masks/{id}.png', m)
        save_seed(f'run/seeds/{id}.npz', mini.labels(id), np.stack([(mini.mask(id)==c+1)*(1-.1*i) for c in mini.labels(id)]))
        if i<3: save_mask(f'photos/masks/{id}.png', mini.mask(id))
    (tmp_path/'photos/labels.csv').write_text('\n'.join(rows)); (tmp_path/'photos/classes.txt').write_text('\n'.join(mini.classes))
    assert cli_tools.mct_export(['--to', 'fiftyone', '--masks', 'run/masks', '--data', 'folder:photos', '--out', 'first_try']) == 0 and 'first_try' in capsys.readouterr().out
    d = fo.load_dataset('first_try'); assert len(d)==6 and d.default_mask_targets[255]=='ignored' and d.default_mask_targets[1]==mini.classes[0]
    doubts = d.values('doubt'); assert doubts==sorted(doubts, reverse=True) and sum(v is not None for v in d.values('miou'))==3
    for s in d:
        assert np.array_equal(s['mask'].mask[4:], mini.mask(s['photo'])[4:]) and (s['mask'].mask[:4]==255).all()
        c = mini.labels(s['photo'])[0]; top = s[f'map_{mini.classes[c]}'].map; assert top.dtype==np.uint8 and np.array_equal(top>0, mini.mask(s['photo'])==c+1)
        assert {l.label for l in s['labels'].classifications}=={mini.classes[k] for k in mini.labels(s['photo'])} and (s['truth'] is not None)==(s['miou'] is not None)
    fo.delete_dataset('first_try')
