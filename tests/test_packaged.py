"The network that comes with the package, on the photograph that comes with it"
import json
from pathlib import Path
import numpy as np, pytest
import mctformer_nb
from mctformer_nb import cli_masks
from mctformer_nb.core import open_mask
from mctformer_nb.predict import packaged_run

DATA = Path(mctformer_nb.__file__).parent/'data'

def test_predict_without_a_run(tmp_path):
    "A cat that fills much of the photo: found, in the middle, and most of it"
    assert cli_masks.mct_predict([str(DATA/'cat.jpg'), '--out', str(tmp_path), '--scales', '1', '--workers', '1', '--json', str(tmp_path/'r.json')]) == 0
    names = json.loads((packaged_run()/'config.json').read_text())['classes']
    scores = json.loads((tmp_path/'r.json').read_text())['scores']['cat']
    assert max(scores, key=scores.get) == 'cat' and scores['cat'] > .5
    mask = open_mask(tmp_path/'cat.png'); cat = mask == names.index('cat')+1
    assert mask.shape == (300, 451) and .25 < cat.mean() < .9                  # it fills about two thirds
    assert cat[120:220, 150:300].mean() > .8                                   # face and chest
    assert (tmp_path/'overlays/cat.jpg').is_file()

def test_the_wheel_stays_small():
    assert sum(f.stat().st_size for f in DATA.rglob('*') if f.is_file()) < 25e6
    assert (packaged_run()/'model.safetensors').stat().st_size < 10e6
    for f in DATA.iterdir(): assert f.name == 'README.md' or f.name in (DATA/'README.md').read_text(encoding='utf-8'), f'{f.name} has no licence line'
