"""Masks that go to other tools and come back, read and written by these tools themselves. What is not installed is skipped; one by one, so that their
requirements do not meet: `pip install --target DIR datumaro` (or label-studio-sdk, or ultralytics --no-deps), then `PYTHONPATH=DIR pytest -m slow tests/test_hand_over.py`"""
import re, shutil, zipfile
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from mctformer_nb import cli_tools
from mctformer_nb.core import colorize, open_mask, read_json, save_mask, write_json
from mctformer_nb.datasets import get_dataset
from mctformer_nb.hand_over import export_masks, import_masks, label_names, outlines, pack_brush, unpack_brush
from mctformer_nb.mini import draw_scene, mini_classes

def tool(name, package=None): return pytest.importorskip(name, reason=f'{package or name} is not installed: pip install --target DIR {package or name}')

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Eight drawn photos of two sizes, one in a folder and one with a blank in its name, and pseudo masks with pixels to be ignored"
    root = tmp_path_factory.mktemp('photos'); rows = ['image,labels']; names = mini_classes()
    for i in range(8):
        image, mask = draw_scene(i, size=48 if i%2 else 64); image, mask = image[:40], mask[:40]                    # 40 high
        id = {6: 'trip/p6', 7: 'a photo'}.get(i, f'p{i}'); (root/f'images/{id}.jpg').parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root/f'images/{id}.jpg'); mask[:3] = 255; mask[20, 5:9] = 255
        save_mask(root/f'pseudo/{id}.png', mask); rows.append(f'{id}.jpg,' + ';'.join(names[c-1] for c in np.unique(mask) if 0 < c < 255))
    (root/'labels.csv').write_text('\n'.join(rows)); (root/'classes.txt').write_text('\n'.join(names))
    return root

@pytest.fixture
def ds(folder): return get_dataset(f'folder:{folder}', 'all')

@pytest.fixture
def truth(folder, ds): return {id: open_mask(folder/f'pseudo/{id}.png') for id in ds.ids}

def same(masks, want): return masks.keys()==want.keys() and all(np.array_equal(masks[k], want[k]) for k in want)

def results(folder): return {p.relative_to(folder).with_suffix('').as_posix(): open_mask(p) for p in Path(folder).rglob('*.png')}

# ---- CVAT, whose own reader is datumaro

def dm_masks(data, values, ids=None):
    "{id: mask} of a datumaro data set"
    dm = tool('datumaro'); names = [c.name for c in data.categories()[dm.AnnotationType.label]]; out = {}
    for item in data:
        marks = [a for a in item.annotations if a.type in (dm.AnnotationType.mask, dm.AnnotationType.polygon)]
        if not marks: continue
        m = out[item.id] = np.zeros(marks[0].image.shape, np.uint8)
        for a in sorted(marks, key=lambda a: a.z_order): m[a.image>0] = values[names[a.label]]
    return out

@pytest.mark.slow
def test_cvat_reads_what_is_written(folder, ds, truth, tmp_path):
    dm = tool('datumaro'); r = export_masks('cvat', folder/'pseudo', ds, tmp_path)
    zipfile.ZipFile(r.path).extractall(tmp_path/'open')
    data = dm.Dataset.import_from(str(tmp_path/'open'), 'voc_segmentation')
    assert same(dm_masks(data, {'background': 0} | label_names(ds)), truth)
    assert {i.id for i in data} == set(ds.ids)

@pytest.mark.slow
@pytest.mark.parametrize('colours', ['source', 'own'])
def test_what_cvat_writes_is_read(folder, ds, truth, tmp_path, colours):
    "CVAT exports through datumaro, with the colours of its labels"
    dm = tool('datumaro'); zipfile.ZipFile(export_masks('cvat', folder/'pseudo', ds, tmp_path).path).extractall(tmp_path/'open')
    data = dm.Dataset.import_from(str(tmp_path/'open'), 'voc_segmentation')
    own = {'background': [(0, 0, 0), [], []]} | {n: [(250-3*v%200, 50+v%100, 83), [], []] for n,v in label_names(ds).items()}
    data.export(str(tmp_path/'theirs'), 'voc_segmentation', save_media=False, apply_colormap=True, label_map='source' if colours=='source' else own)
    r = import_masks('cvat', tmp_path/'theirs', ds, tmp_path/'back')
    assert not r.bad and same(results(tmp_path/'back'), truth)

@pytest.mark.slow
def test_datumaro_and_coco(folder, ds, truth, tmp_path):
    dm = tool('datumaro'); r = export_masks('coco', folder/'pseudo', ds, tmp_path)
    (tmp_path/'d/annotations').mkdir(parents=True); shutil.copytree(folder/'images', tmp_path/'d/images/default'); (tmp_path/'d/annotations/instances_default.json').write_bytes(r.path.read_bytes())
    data = dm.Dataset.import_from(str(tmp_path/'d'), 'coco_instances')
    assert same(dm_masks(data, label_names(ds)), truth)
    for mode in ('mask', 'polygons'):                       # what CVAT writes as COCO has corners, and those are not exact
        data.export(str(tmp_path/mode), 'coco_instances', save_media=False, segmentation_mode=mode)
        file, = (tmp_path/mode/'annotations').glob('*.json')
        r = import_masks('coco', file, ds, tmp_path/f'{mode}_back'); back = results(tmp_path/f'{mode}_back'); assert not r.bad
        if mode=='mask': assert same(back, truth)
        else: assert back.keys()==truth.keys() and np.mean([(back[id]==m).mean() for id,m in truth.items()]) > .8

# ---- Label Studio

@pytest.mark.slow
def test_label_studio_brush():
    "Both packers and both readers, each with each; also values that a soft brush leaves"
    brush = tool('label_studio_sdk.converter.brush', 'label-studio-sdk'); rng = np.random.default_rng(0)
    for shape in ((1, 1), (7, 5), (40, 64), (150, 230)):
        region = rng.random(shape) < rng.random()
        assert np.array_equal(np.reshape(brush.decode_rle(pack_brush(region)), (*shape, 4))[..., 3]>0, region)
        assert np.array_equal(unpack_brush(brush.mask2rle(region.astype(np.uint8)*255), shape)>0, region)
    soft = rng.integers(0, 256, (6, 9)).astype(np.uint8)
    assert np.array_equal(unpack_brush(brush.encode_rle(np.repeat(soft.ravel(), 4)), soft.shape), soft)

@pytest.mark.slow
def test_label_studio_converter(folder, ds, truth, tmp_path):
    "Its converter turns our tasks into a grey PNG a label, exactly"
    tool('label_studio_sdk', 'label-studio-sdk'); import label_studio_sdk.converter.converter as converter; r = export_masks('labelstudio', folder/'pseudo', ds, tmp_path)
    tasks = [dict(t, id=i, annotations=[dict(t['predictions'][0], id=i, completed_by=dict(email='a@b.c'))]) for i,t in enumerate(read_json(r.path))]
    write_json(tmp_path/'done.json', tasks)
    c = converter.Converter((r.path.parent/'config.xml').read_text(), str(tmp_path))
    (tmp_path/'png').mkdir(); c.convert(str(tmp_path/'done.json'), str(tmp_path/'png'), converter.Format.BRUSH_TO_PNG, is_dir=False)
    found = {id: np.zeros_like(m) for id,m in truth.items()}
    for f in (tmp_path/'png').rglob('*.png'):
        task, label = re.match(r'task-(\d+)-.*-label-(.+)-\d+$', f.stem).groups()
        found[ds.ids[int(task)]][np.asarray(Image.open(f))>0] = label_names(ds)[label]
    assert same(found, truth)
    r = import_masks('labelstudio', tmp_path/'done.json', ds, tmp_path/'back')
    assert not r.bad and same(results(tmp_path/'back'), truth)

# ---- YOLO

@pytest.mark.slow
def test_ultralytics_reads_what_is_written(folder, ds, truth, tmp_path):
    tool('cv2', 'opencv-python-headless'); utils = tool('ultralytics.data.utils', 'ultralytics'); r = export_masks('yolo', folder/'pseudo', ds, tmp_path)
    names = list(label_names(ds).values()); found = {}
    for id in ds.ids:
        image, label = tmp_path/f'images/train/{id}.jpg', tmp_path/f'labels/train/{id}.txt'
        _, rows, shape, segments, *_, missing, _, empty, corrupt, said = utils.verify_image_label((str(image), str(label), '', False, len(names), 0, 0, False))
        assert not missing and not corrupt, said
        m = found[id] = np.zeros(shape, np.uint8)
        for (k, *_), s in zip(rows, segments): m[utils.polygon2mask(shape, [(s*shape[::-1]).ravel()])>0] = names[int(k)]
    assert same(found, truth)
    r = import_masks('yolo', tmp_path, ds, tmp_path/'back')
    assert not r.bad and same(results(tmp_path/'back'), truth)

@pytest.mark.slow
def test_outlines_are_exact_whatever_the_shape():
    cv2 = tool('cv2', 'opencv-python-headless'); rng = np.random.default_rng(1)
    for _ in range(2000):
        r = rng.random(rng.integers(1, 25, 2)) < rng.random(); m = np.zeros(r.shape, np.uint8)
        for o in outlines(r): cv2.fillPoly(m, [o.astype(np.int32)], 1)
        assert np.array_equal(m>0, r)

# ---- the commands

@pytest.mark.parametrize('form', ['cvat', 'labelstudio', 'coco'])
def test_ten_of_eight_corrected(folder, ds, truth, tmp_path, form, monkeypatch, capsys):
    "Only what was corrected comes back, into masks/ of the data set"
    shutil.copytree(folder, tmp_path/'photos'); monkeypatch.chdir(tmp_path); (tmp_path/'ids.txt').write_text('p1\np3\ntrip/p6\n')
    common = ['--data', 'folder:photos', '--split', 'all']
    assert cli_tools.mct_export(['--to', form, '--masks', 'photos/pseudo', '--ids', 'ids.txt', '--out', 'out', *common]) == 0
    assert '3 masks' in capsys.readouterr().out
    file = next(p for p in Path('out').iterdir() if p.name in ('annotations.zip', 'tasks.json', 'instances.json'))
    fixed = np.where(truth['p3']==255, 0, truth['p3'])
    if form=='labelstudio':
        tasks = [dict(t, annotations=t['predictions']) for t in read_json(file)]
        tasks[1]['annotations'][0]['result'] = [r for r in tasks[1]['annotations'][0]['result'] if r['value']['brushlabels']!=['ignored']]
        write_json(file, tasks)
    elif form=='coco': write_json(file, dict(c := read_json(file), annotations=[a for a in c['annotations'] if (a['image_id'], a['category_id'])!=(2, 255)]))
    else:
        zipfile.ZipFile(file).extractall('out/open'); Image.fromarray(colorize(fixed)).save('out/open/SegmentationClass/p3.png'); file = Path('out/open')
    argv = [str(file), '--from', form, '--pseudo', 'photos/pseudo', *common, '--json', 'r.json']
    assert cli_tools.mct_import(argv) == 0
    assert [p.name for p in Path('photos/masks').iterdir()] == ['p3.png'] and np.array_equal(open_mask('photos/masks/p3.png'), fixed)
    said = capsys.readouterr().out; assert '1 mask' in said and 'next: mct_segment_train --corrected-weight 5' in said and 'next: mct_score --corrected' in said and read_json('r.json')['written']==['p3']
    assert np.array_equal(get_dataset('folder:photos', 'all').mask('p3'), fixed)
    save_mask('photos/masks/p3.png', truth['p3'])
    assert cli_tools.mct_import(argv) == 1 and 'another mask' in capsys.readouterr().err
    assert cli_tools.mct_import([*argv, '--overwrite']) == 0 and np.array_equal(open_mask('photos/masks/p3.png'), fixed)

def test_import_says_what_is_wrong(folder, tmp_path, capsys):
    common = ['--data', f'folder:{folder}', '--split', 'all']
    for argv,words in ((['nothing.zip', '--from', 'cvat', *common], 'no such file'), ([str(folder), '--from', 'cvat', *common], 'labelmap.txt'),
                       ([str(folder), '--from', 'coco', '--data', 'mini'], '--out')):
        assert cli_tools.mct_import(argv) == 2 and words in capsys.readouterr().err
    assert cli_tools.mct_export(['--to', 'cvat', '--masks', str(folder), *common, '--out', str(tmp_path)]) == 2 and 'holds no mask' in capsys.readouterr().err
