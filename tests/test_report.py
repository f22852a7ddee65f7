"Reports of runs: any kind of run, strange names, and nothing that a browser would fetch"
from html.parser import HTMLParser
import numpy as np, pytest
from PIL import Image
from mctformer_nb.core import DataError, save_mask, write_json
from mctformer_nb.datasets import get_dataset
from mctformer_nb.report import image_scores, write_run_report

EVIL = '<script>alert(1)</script>'
CLASSES = [EVIL, '$x^{', 'a&b "c"', 'never']

class Page(HTMLParser):
    "Tags and attributes of a page"
    def __init__(self, path): super().__init__(); self.tags, self.attrs = [], []; self.feed(path.read_text(encoding='utf-8'))
    def handle_starttag(self, tag, attrs): self.tags.append(tag); self.attrs += attrs

@pytest.fixture(scope='module')
def work(tmp_path_factory):
    "A DeepLab-like run with masks, of which one is right, one is empty and one is missing, and its data set"
    d = tmp_path_factory.mktemp('report'); rng = np.random.default_rng(0); rows = ['image,labels']
    for f in ('images', 'masks'): (d/'data'/f).mkdir(parents=True)
    for i in range(3):
        name = f"p{i}'<b>"; mask = np.zeros((40, 50), np.uint8); mask[5:20, 5:25] = 1; mask[25:35, 10+i:40] = 2+i%2
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(d/'data/images'/f'{name}.png'); save_mask(d/'data/masks'/f'{name}.png', mask)
        if i < 2: save_mask(d/'run/masks'/f'{name}.png', mask if i == 0 else np.zeros_like(mask))
        rows.append(f'{name}.png,' + ';'.join(str(k-1) for k in np.unique(mask) if k))
    (d/'data/classes.txt').write_text('\n'.join('0 1 2 3'.split())); (d/'data/labels.csv').write_text('\n'.join(rows))
    write_json(d/'run/config.json', dict(kind='deeplab', backbone=EVIL, classes=CLASSES, epoch=2, metrics=dict(valid_loss=None, miou=50.), train=dict(lr=.1, note=EVIL)))
    (d/'run/history.csv').write_text('epoch,train_loss,valid_loss,miou,lr,seconds\n1,2.0,,40,0.1,1\n2,1.0,,50,0.1,1\n')
    ds = get_dataset(f'folder:{d/"data"}'); ds.classes = CLASSES
    return d, ds

def test_masks_run(work):
    d, ds = work; r = write_run_report(d/'run', ds); page = Page(r.path); text = r.path.read_text(encoding='utf-8')
    assert r.images == 2 and r.threshold is None and '1 images have no prediction' in text
    # image 0 is right, image 1 all background: class 1 has half of its pixels, class 2 all (image 0), class 3 none
    bg = (2*2000 - 2*300 - 30*10 - 29*10)/(2*2000 - 300 - 30*10)
    assert r.miou == pytest.approx(100*(bg + .5 + 1 + 0)/4)
    rows = image_scores(d/'run/masks', ds)
    assert [x['id'] for x in rows] == ["p1'<b>", "p0'<b>"] and rows[1]['miou'] == 100
    assert page.tags.count('img') == 4 and all(v for k,v in page.attrs if k == 'alt')        # curves, classes, best, worst

def test_nothing_is_fetched_or_run(work):
    d, ds = work; page = Page(write_run_report(d/'run', ds).path)
    assert not {'script', 'link', 'iframe', 'object', 'embed', 'form', 'b'} & set(page.tags)
    assert all(v.startswith('data:image/png;base64,') for k,v in page.attrs if k in ('src', 'href', 'srcset', 'action'))
    assert not [k for k,_ in page.attrs if k.startswith('on')]
    assert any(k == 'content' and v.startswith("default-src 'none'") for k,v in page.attrs)

def test_without_data_or_run(work, tmp_path):
    d, ds = work; r = write_run_report(d/'run', out=tmp_path/'r.html')
    assert r.miou is None and Page(r.path).tags.count('img') == 1
    with pytest.raises(DataError, match='no config.json'): write_run_report(tmp_path, ds)
    with pytest.raises(DataError, match='has no seeds or masks'): write_run_report(d/'run', ds, pred=tmp_path)
    assert not list((d/'run').glob('.tmp-*'))
