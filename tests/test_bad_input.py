"Bad input: every error names the file and a way out, odd photos are read for what they are, and every command goes on where it can"
import json, os, re, signal, struct, subprocess, sys, zlib
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from scipy.io import savemat
from mctformer_nb.core import DataError, atomic_path, image_size, open_image, open_mask, read_json, save_mask
from mctformer_nb import cli, cli_masks
from mctformer_nb.datasets import get_dataset, prepare_voc
from mctformer_nb.mini import draw_scene, mini_classes
from mctformer_nb.seeds import load_seed

pytestmark = pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning', 'ignore:.*almost constant')
ROOT = Path(__file__).resolve().parents[1]
RNG = np.random.default_rng(0)
PHOTO = Image.fromarray(np.kron(RNG.integers(0, 256, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8))     # 64 x 48

def refused(f, *words):
    "`f` raises a `DataError` that holds all `words` and ends with a fix, which it returns"
    with pytest.raises(DataError) as e: f()
    msg = str(e.value)
    for w in words: assert str(w) in msg, f'{w!r} not in {msg!r}'
    assert msg.endswith('.') and msg.count('. ')>=1, f'no fix in {msg!r}'
    return msg

@pytest.fixture
def folder(tmp_path):
    "Three photos, two classes, a mask and a split"
    for d in ('images', 'masks', 'splits'): (tmp_path/d).mkdir()
    for n in 'abc': PHOTO.save(tmp_path/f'images/{n}.png')
    (tmp_path/'labels.csv').write_text('image,labels\na.png,cat\nb.png,cat;dog\nc.png,dog\n')
    (tmp_path/'classes.txt').write_text('cat\ndog\n'); (tmp_path/'splits/val.txt').write_text('c\n')
    save_mask(tmp_path/'masks/a.png', np.ones((48, 64), np.uint8))
    return tmp_path

@pytest.fixture
def voc(tmp_path):
    "A devkit of two training images and one of val"
    root = tmp_path/'VOC2012'
    for d in ('Annotations', 'JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation'): (root/d).mkdir(parents=True)
    for n in 'abv':
        PHOTO.save(root/f'JPEGImages/{n}.jpg'); save_mask(root/f'SegmentationClass/{n}.png', np.full((48, 64), 8, np.uint8))
        (root/f'Annotations/{n}.xml').write_text('<annotation><object><name>cat</name></object></annotation>')
    (root/'ImageSets/Segmentation/train.txt').write_text('a\nb\n'); (root/'ImageSets/Segmentation/val.txt').write_text('v\n')
    return root

def get(root, split='train', kind='folder'): return get_dataset(f'{kind}:{root}', split)

# ---- photos

def png(w, h, raw, depth=8, color=2):
    def chunk(tag, data): return struct.pack('>I', len(data)) + tag + data + struct.pack('>I', zlib.crc32(tag+data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, depth, color, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(raw)) + chunk(b'IEND', b'')

BROKEN = dict(empty=b'', html=b'<html>', zero=png(0, 0, b''), zero_high=png(5, 0, b''), nodata=png(5, 5, b''), zero_ppm=b'P6 0 0 255\n', bomb=png(60_000, 60_000, b''),
              postscript=b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n', random=bytes(RNG.integers(0, 256, 500, np.uint8)), gif=b'GIF89a\0\0\0\0\0\0\0')

@pytest.mark.parametrize('kind', BROKEN)
@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_broken_photo(folder, kind):
    (folder/'images/b.png').write_bytes(BROKEN[kind])
    ds = get(folder); refused(lambda: ds.image('b'), folder/'images/b.png')
    assert ds.image('a').size==(64, 48) and ds.targets().shape==(2, 2)         # everything else stays usable

@pytest.mark.parametrize('suffix', ['jpg', 'png', 'tif', 'webp', 'bmp'])
def test_truncated_anywhere(tmp_path, suffix):
    PHOTO.save(tmp_path/f'x.{suffix}'); whole = (tmp_path/f'x.{suffix}').read_bytes(); bad = tmp_path/f'bad.{suffix}'; failed = 0
    for n in range(0, len(whole)-1, max(1, len(whole)//40)):
        bad.write_bytes(whole[:n])
        try: assert open_image(bad).size==PHOTO.size
        except DataError as e: failed += 1; assert str(bad) in str(e)
    assert failed>=20

def test_missing_and_folder(tmp_path):
    refused(lambda: open_image(tmp_path/'no.jpg'), 'no.jpg', 'no such file'); refused(lambda: open_image(tmp_path), tmp_path, 'folder')
    refused(lambda: image_size(tmp_path/'no.jpg'), 'no.jpg')

MODES = dict(L='png', CMYK='jpg', RGBA='png', LA='png', P='png', I16='png', F='tif')
@pytest.mark.parametrize('mode', MODES)
def test_photo_modes(folder, mode):
    grey = np.asarray(PHOTO.convert('L'))
    im = Image.fromarray(grey.astype(np.uint16)*257) if mode=='I16' else PHOTO.convert(mode)
    (folder/'images/b.png').unlink(); im.save(folder/f'images/b.{MODES[mode]}'); (folder/'labels.csv').write_text('image,labels\na,cat\nb,dog\n')
    got = get(folder).image('b'); assert (got.mode, got.size)==('RGB', PHOTO.size)
    want = PHOTO if mode in ('CMYK', 'RGBA') else Image.fromarray(grey).convert('RGB') if mode!='P' else im.convert('RGB')
    assert np.abs(np.asarray(got, int)-np.asarray(want, int)).mean() <= (12 if mode=='CMYK' else .6)

def test_transparent_colour_and_alpha(tmp_path):
    a = np.zeros((2, 2, 4), np.uint8); a[0] = (10, 20, 30, 255); Image.fromarray(a).save(tmp_path/'a.png')
    assert np.asarray(open_image(tmp_path/'a.png')).tolist()==[[[10, 20, 30]]*2, [[255]*3]*2]
    Image.new('RGB', (2, 1), (9, 9, 9)).save(tmp_path/'t.png', transparency=(9, 9, 9))
    assert np.asarray(open_image(tmp_path/'t.png')).min()==255

@pytest.mark.parametrize('turn', range(1, 9))
def test_camera_rotation(tmp_path, turn):
    exif = Image.Exif(); exif[0x0112] = turn; PHOTO.save(tmp_path/'x.jpg', exif=exif)
    assert open_image(tmp_path/'x.jpg').size==image_size(tmp_path/'x.jpg')==((48, 64) if turn>4 else (64, 48))

def test_tiny_and_long_photos(tmp_path):
    for size in ((1, 1), (1, 500), (3, 2)): Image.new('RGB', size).save(tmp_path/'t.png'); assert open_image(tmp_path/'t.png').size==size

# ---- masks

def test_mask_of_another_size(folder):
    save_mask(folder/'masks/a.png', np.ones((64, 48), np.uint8)); refused(lambda: get(folder).mask('a'), folder/'masks/a.png', '48 x 64', '64 x 48')

def test_mask_with_unknown_class(folder):
    save_mask(folder/'masks/a.png', np.full((48, 64), 3, np.uint8)); refused(lambda: get(folder).mask('a'), folder/'masks/a.png', '3', '2 classes')
    save_mask(folder/'masks/a.png', np.full((48, 64), 255, np.uint8)); assert get(folder).mask('a').min()==255

@pytest.mark.parametrize('content', ['colour', b'', b'\x89PNG\r\n\x1a\n'])
def test_unreadable_mask(folder, content):
    if content=='colour': PHOTO.save(folder/'masks/a.png')
    else: (folder/'masks/a.png').write_bytes(content)
    refused(lambda: get(folder).mask('a'), folder/'masks/a.png')

def test_masks_without_photos_can_be_scored(folder):
    ds = get(folder); (folder/'images/a.png').unlink(); assert ds.mask('a').shape==(48, 64) and ds.mask('b') is None

def test_save_mask_refuses(tmp_path):
    for m in (np.zeros((2, 2)), np.full((2, 2), 300), np.full((2, 2), -1), np.zeros((2, 2, 3), np.uint8), np.zeros((0, 2), np.uint8)): refused(lambda: save_mask(tmp_path/'m.png', m), 'm.png')
    assert not list(tmp_path.iterdir())

# ---- a folder of photos

CSV = {'unknown label': ('a.png,cat\nb.png,cow', 'line 3', 'cow', 'classes.txt'), 'near miss': ('a.png,cats', 'line 2', "'cat'?"), 'no such photo': ('a.png,cat\nzz.png,dog', 'line 3', 'zz.png'),
       'twice': ('a.png,cat;dog\n\na,dog', 'line 4', 'line 2'), 'climbs out': ('../images/a.png,cat', 'line 2', '..'), 'absolute': ('/etc/passwd,cat', 'line 2'),
       'backslash': ('..\\a.png,cat', 'line 2'), 'commas': ('a.png,cat,dog', 'line 2', ';'), 'no rows': ('', 'no image'), 'empty name': (',cat', 'line 2'), 'wrong suffix': ('a.jpg,cat', 'line 2', 'a.jpg')}
@pytest.mark.parametrize('case', CSV)
def test_bad_table(folder, case):
    rows,*words = CSV[case]; (folder/'labels.csv').write_text(f'image,labels\n{rows}\n'); refused(lambda: get(folder), 'labels.csv', *words)

@pytest.mark.parametrize('content', [b'', b'\n', b'a.png,cat\n', b'image;width\na.png;7\n', b'image,labels\na.png,\xff\xfe\n', b'\x00\x01,\n'])
def test_not_a_table(folder, content):
    (folder/'labels.csv').write_bytes(content); refused(lambda: get(folder), 'labels.csv')

def test_image_without_label(folder):
    (folder/'labels.csv').write_text('image,labels\na.png,cat\nb.png,\n')     # b: empty; c: no line
    ds = get(folder, 'all'); assert ds.ids==['a', 'b', 'c'] and ds.unlabelled==2 and ds.labels('b').size==ds.labels('c').size==0 and ds.labels('b').dtype==np.int64
    (folder/'classes.txt').unlink(); (folder/'labels.csv').write_text('image,labels\na.png,\n'); refused(lambda: get(folder), 'labels.csv', 'no image has a label')

def test_no_table_at_all(folder):
    (folder/'labels.csv').unlink(); assert get(folder, 'all').unlabelled==3                       # names are known: photos to predict on
    (folder/'classes.txt').unlink(); refused(lambda: get(folder), folder/'labels.csv')

@pytest.mark.parametrize('text', ['', '\n \n', 'cat\ncat\n', 'cat\nBackground\ndog\n', '_background_\n', '\n'.join(map(str, range(300)))])
def test_bad_classes(folder, text):
    (folder/'classes.txt').write_text(text); refused(lambda: get(folder), 'classes.txt')

@pytest.mark.parametrize('text,word', [('', 'no images'), ('zz\n', 'line 1'), ('a\n\na.png\n', 'line 3'), ('../a\n', 'line 1')])
def test_bad_split_list(folder, text, word):
    (folder/'splits/val.txt').write_text(text); refused(lambda: get(folder, 'val'), 'val', word)

def test_split_names(folder):
    assert (get(folder).ids, get(folder, 'val').ids, get(folder, 'all').ids)==(['a', 'b'], ['c'], ['a', 'b', 'c'])
    refused(lambda: get(folder, 'test'), 'test.txt', 'all, train, val'); refused(lambda: get(folder, '../x'), 'x.txt')

def test_same_name_twice(folder): PHOTO.save(folder/'images/a.jpg'); refused(lambda: get(folder), 'a.png', 'a.jpg')

def test_missing_folders(folder, tmp_path):
    refused(lambda: get(tmp_path/'gone'), tmp_path/'gone')
    for p in (folder/'images').iterdir(): p.unlink()
    refused(lambda: get(folder), folder/'images', 'no photos'); (folder/'images').rmdir(); refused(lambda: get(folder), folder/'images', 'no such folder')

def test_result_files_stay_in_their_folder(folder):
    ds = get(folder); refused(lambda: ds.image('../images/a'), 'folder'); refused(lambda: ds.mask('/etc/passwd'), 'folder'); refused(lambda: ds.subset(['a', 'c']), "'c'")

@pytest.mark.parametrize('spec', ['', 'voc', 'voc:', 'photos', 'imagenet:/data', 'mini2'])
def test_unknown_spec(spec): refused(lambda: get_dataset(spec))

def test_mini_refuses(): refused(lambda: get_dataset('mini', 'trainaug'), 'mini', 'trainaug'); refused(lambda: get_dataset('mini', n=0), 'mini', 'no images')

# ---- PASCAL VOC

ANNOTATIONS = dict(missing=None, empty='', cut='<annotation><object>', unknown='<annotation><object><name>cow</name></object><object><name>dragon</name></object></annotation>',
                   entity='<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation><object><name>&e;</name></object></annotation>', nameless='<annotation><object/></annotation>')
@pytest.mark.parametrize('case', ANNOTATIONS)
def test_bad_annotation(voc, case):
    file = voc/'Annotations/b.xml'; file.unlink()
    if ANNOTATIONS[case] is not None: file.write_text(ANNOTATIONS[case])
    ds = get(voc, kind='voc'); assert ds.labels('a').tolist()==[7]; refused(lambda: ds.labels('b'), file); refused(lambda: ds.targets(), file)

def test_annotation_in_another_encoding(voc):
    bomb = '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a [<!ENTITY e "x">]><annotation><object><name>cat</name></object></annotation>'
    for enc in ('utf-16', 'utf-16-le', 'utf-7'): (voc/'Annotations/a.xml').write_bytes(bomb.encode(enc)); refused(lambda: get(voc, kind='voc').labels('a'), 'a.xml')

def test_voc_splits(voc):
    refused(lambda: get(voc, 'trainaug', 'voc'), 'SegmentationClassAug', 'mct_prepare_voc'); refused(lambda: get(voc, 'test', 'voc'), 'test.txt', 'train')
    (voc/'ImageSets/Segmentation/train.txt').write_text('\n'); refused(lambda: get(voc, kind='voc'), voc, 'no images')
    (voc/'ImageSets/Segmentation/train.txt').write_text('a\n../../x\n'); refused(lambda: get(voc, kind='voc'), 'train.txt, line 2')
    (voc/'ImageSets/Segmentation/train.txt').write_text('/JPEGImages/a.jpg /SegmentationClassAug/a.png\r\nb\r\n'); assert get(voc, kind='voc').ids==['a', 'b']

def test_voc_folders(voc, tmp_path):
    refused(lambda: get(tmp_path/'gone', kind='voc'), 'gone'); refused(lambda: get(voc/'JPEGImages', kind='voc'), 'not a VOC devkit')
    (voc/'JPEGImages/a.jpg').unlink(); ds = get(voc, kind='voc'); refused(lambda: ds.image(0), 'a.jpg'); assert ds.image(1).size==(64, 48)

def test_own_class_list(voc):
    (voc/'classes.txt').write_text('dog\ncat\n'); ds = get(voc, kind='voc'); assert ds.classes==['dog', 'cat'] and ds.labels(0).tolist()==[1]
    refused(lambda: ds.mask(0), 'a.png', '8')

# ---- VOC + SBD

def sbd(root, **masks):
    (root/'cls').mkdir(parents=True, exist_ok=True)
    for id,m in masks.items(): savemat(root/f'cls/{id}.mat', dict(GTcls=dict(Segmentation=m, Boundaries=0)))

def test_prepare_needs_sbd(voc, tmp_path):
    refused(lambda: prepare_voc(voc), '--download'); refused(lambda: prepare_voc(voc, sbd=tmp_path/'gone'), 'gone'); refused(lambda: prepare_voc(tmp_path/'gone'), 'gone')

@pytest.mark.parametrize('bad', [b'', b'MATLAB 5.0', 'size', 'values', 'fields'])
def test_bad_sbd_file(voc, tmp_path, bad):
    PHOTO.save(voc/'JPEGImages/s.jpg'); good = np.full((48, 64), 3, np.uint8); sbd(tmp_path/'sbd', s=good[:9] if bad=='size' else good+40 if bad=='values' else good); file = tmp_path/'sbd/cls/s.mat'
    if bad=='fields': savemat(file, dict(other=1))
    if isinstance(bad, bytes): file.write_bytes(bad)
    refused(lambda: prepare_voc(voc, expected=3), file); assert not (voc/'SegmentationClassAug').exists()
    sbd(tmp_path/'sbd', s=good); assert prepare_voc(voc, expected=3)['images']==3 and get(voc, 'trainaug', 'voc').ids==['a', 'b', 's']
    assert (open_mask(voc/'SegmentationClassAug/s.png')==3).all()

def test_prepare_checks_the_count(voc, tmp_path):
    sbd(tmp_path/'sbd'); refused(lambda: prepare_voc(voc), '2 images', '10582'); assert not (voc/'ImageSets/Segmentation/trainaug.txt').exists()
    assert prepare_voc(voc, expected=None)['images']==2

# ---- COCO

def coco(root, **change):
    js = dict(images=[dict(id=1, file_name='x.png', width=64, height=48)], categories=[dict(id=4, name='cat')],
              annotations=[dict(id=2, image_id=1, category_id=4, iscrowd=0, area=100, segmentation=[[0, 0, 10, 0, 10, 10, 0, 10]])]) | change
    for d in ('annotations', 'val2014'): (root/d).mkdir(exist_ok=True, parents=True)
    PHOTO.save(root/'val2014/x.png'); (root/'annotations/instances_val2014.json').write_text(json.dumps(js)); return root

def test_coco(tmp_path):
    pytest.importorskip('pycocotools')
    ds = get(coco(tmp_path), 'val', 'coco'); assert ds.classes==['cat'] and ds.labels('x').tolist()==[0] and (ds.mask(0)[:10, :10]==1).all() and ds.mask(0).sum()==100
    name = 'instances_val2014.json'; ann = dict(id=2, image_id=1, category_id=4, area=1)
    for change in (dict(images=[dict(id=1, file_name='../../x.png', width=64, height=48)]), dict(categories=[]), dict(annotations=[dict(ann, category_id=9)]), dict(images=[{}]), dict(annotations=None), dict(images=3)):
        refused(lambda: get(coco(tmp_path, **change), 'val', 'coco'), name)
    for seg in ([[1]], dict(size=[9, 9], counts=[81]), dict(size=[48, 64], counts='~~'), dict(size=[48, 64], counts=[10**6]), 'x', None):
        refused(lambda: get(coco(tmp_path, annotations=[dict(ann, segmentation=seg)]), 'val', 'coco').mask(0), name, 'annotation 2')
    refused(lambda: get(coco(tmp_path, images=[dict(id=1, file_name='x.png', width=60, height=48)]), 'val', 'coco').mask(0), 'x.png')
    (tmp_path/'annotations'/name).write_text('{'); refused(lambda: get(tmp_path, 'val', 'coco'), name); refused(lambda: get(tmp_path, 'train', 'coco'), 'instances_train2014.json')
    coco(tmp_path); (tmp_path/'val2014/x.png').unlink(); (tmp_path/'val2014').rmdir(); refused(lambda: get(tmp_path, 'val', 'coco'), 'val2014')

# ---- files that are whole or absent

def test_killed_while_writing(tmp_path):
    "SIGKILL in the middle of a write: the old file is untouched, and the next write succeeds"
    (tmp_path/'f.txt').write_text('old')
    code = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from mctformer_nb.core import atomic_path\nwith atomic_path({str(tmp_path/'f.txt')!r}) as p:\n p.write_text('ne'); print('in', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline().strip()=='in'; os.kill(child.pid, signal.SIGKILL); child.wait(); child.stdout.close()
    assert (tmp_path/'f.txt').read_text()=='old' and [p.name for p in tmp_path.glob('*.txt')]==['f.txt']
    with atomic_path(tmp_path/'f.txt') as p: p.write_text('new')
    assert (tmp_path/'f.txt').read_text()=='new'

def test_bad_json(tmp_path):
    for c in (b'', b'{', b'\xff', b'['*100_000): (tmp_path/'x.json').write_bytes(c); refused(lambda: read_json(tmp_path/'x.json'), 'x.json')

# ---- a data set in which many images are broken, each in its own way: every command finishes, names what it left out, and does the rest

SIDE, NAMES = 32, mini_classes()

class Made:
    "The data set while it is made: files of one image, and its line of the table"
    def __init__(self, root, k, id):
        self.root, self.id, self.photo, self.mask, self.other = root, id, root/f'images/{id}.jpg', root/f'masks/{id}.png', []
        im, m = draw_scene(k, size=SIDE); self.im, self.m = Image.fromarray(im), m
        self.row = f'{id}.jpg,' + ';'.join(NAMES[v-1] for v in np.unique(m) if v)
    def save(self, as_=None, **kw):
        if as_: self.photo = self.photo.with_suffix(as_); self.row = self.row.replace('.jpg', as_, 1)
        self.im.save(self.photo, **kw)
    def write(self): self.im.save(self.photo); save_mask(self.mask, self.m)

def _cut(x): x.photo.write_bytes(x.photo.read_bytes()[:-250])
def _png_called_jpg(x): x.im.save(x.photo, format='PNG')
def _text(x): x.photo.write_text('<html>not found</html>')
def _empty(x): x.photo.write_bytes(b'')
def _turned(x):
    exif = Image.Exif(); exif[0x0112] = 6; x.im.save(x.photo, exif=exif); save_mask(x.mask, np.rot90(x.m, -1))
def _cmyk(x): x.im = x.im.convert('CMYK'); x.save()
def _again(x, suffix, im): x.photo.unlink(); x.im = im; x.save(suffix)
def _deep(x): _again(x, '.png', Image.fromarray(np.asarray(x.im.convert('L')).astype(np.uint16)*257))
def _animated(x): x.photo.unlink(); x.save('.gif', save_all=True, append_images=[x.im.rotate(90), x.im.rotate(180)])
def _alpha(x): _again(x, '.png', x.im.convert('RGBA'))
def _huge(x): _again(x, '.png', Image.new('1', (12_000, 9_000)))
def _tiny(x): x.im = x.im.crop((0, 0, 3, 3)); x.save(); save_mask(x.mask, x.m[:3, :3])
def _other_size(x): save_mask(x.mask, np.zeros((SIDE, SIDE-5), np.uint8))
def _no_palette(x): Image.fromarray(x.m).save(x.mask)
def _mask_value(x): save_mask(x.mask, np.full((SIDE, SIDE), 77, np.uint8))
def _no_mask(x): x.mask.unlink()
def _colour_mask(x): x.im.save(x.mask)
def _label(x): x.row += ';unicorn'
def _line_twice(x): x.other.append(f'{x.id}.jpg,{NAMES[0]}')
def _columns(x): x.row = f'{x.id}.jpg,{NAMES[0]},{NAMES[1]}'
def _no_photo(x): x.photo.unlink()
def _climbs(x): x.other.append(f'../{x.id}.jpg,{NAMES[0]}')
def _link(x): outside = x.root.parent/f'{x.id}.jpg'; x.photo.rename(outside); x.photo.symlink_to(outside)
def _same_name(x): x.im.save(x.photo.with_suffix('.png'))
def _no_line(x): x.row = None
def _rename(x, name):
    new = x.photo.with_name(name+'.jpg'); x.photo.rename(new); x.mask.rename(x.mask.with_name(name+'.png')); x.row = x.row.replace(x.id, name, 1); x.photo, x.id = new, name
def _spaces(x): _rename(x, f'my {x.id} (1)')
def _letters(x): _rename(x, f'кот-{x.id}-猫-é')
def _control(x): _rename(x, f'{x.id}\x07bell')

# way -> what to do, where it shows ('' nowhere: it is used for what it is), and words of the reason
WAYS = dict(
    truncated=(_cut, 'photo', 'truncated or damaged'), wrong_suffix=(_png_called_jpg, '', ''), text=(_text, 'photo', 'not an image'), zero_bytes=(_empty, 'photo', '0 bytes'), exif=(_turned, '', ''),
    cmyk=(_cmyk, '', ''), sixteen_bit=(_deep, '', ''), animated=(_animated, '', ''), alpha=(_alpha, '', ''), huge=(_huge, 'photo', '12000 x 9000 is more than'), three_pixels=(_tiny, '', ''),
    mask_size=(_other_size, 'mask', 'the mask is 27 x 32'), no_palette=(_no_palette, '', ''), mask_value=(_mask_value, 'mask', 'mask value 77'), no_mask=(_no_mask, 'mask', 'mask'),
    colour_mask=(_colour_mask, 'mask', 'colour image'), unknown_label=(_label, 'table', "'unicorn'"), line_twice=(_line_twice, 'table', 'is already in line'), columns=(_columns, 'table', '3 columns'),
    no_photo=(_no_photo, 'table', 'there is no photo'), climbs_out=(_climbs, 'line', 'leaves the data folder'), link=(_link, 'table', 'link to a place outside'), same_name=(_same_name, 'table', 'same name'),
    no_line=(_no_line, '', ''), spaces=(_spaces, '', ''), letters=(_letters, '', ''), control=(_control, 'table', 'control characters'))

def make_data(root, n, broken):
    "n images, `broken` of them in the ways of `WAYS` in turn -> {id: way}"
    for d in ('images', 'masks'): (root/d).mkdir(parents=True)
    ways, at, rows, how = list(WAYS), set(np.linspace(0, n-1, broken).round().astype(int).tolist()), ['image,labels'], {}
    for k in range(n):
        x = Made(root, k, f'p{k:03d}'); x.write()
        if k in at: way = ways[len(how) % len(ways)]; WAYS[way][0](x); how[x.id] = way
        rows += [r for r in (x.row, *x.other) if r]
    (root/'labels.csv').write_text('\n'.join(rows)+'\n', encoding='utf-8'); (root/'classes.txt').write_text('\n'.join(NAMES))
    return how

def run(command, line, capfd, cwd):
    "Exit status and what was written to stderr"
    home = os.getcwd(); os.chdir(cwd); capfd.readouterr()
    try: status = getattr(cli if hasattr(cli, command) else cli_masks, command)(line.split())
    finally: os.chdir(home)
    return status, capfd.readouterr().err

def named(err, how, *where):
    "Every image that is broken in one of these places is named, once or more, with its reason; returns their number"
    wanted = {id: w for id,w in how.items() if WAYS[w][1] in where}
    for id,way in wanted.items():
        lines = [l for l in err.splitlines() if re.search(rf'\b{id.split(chr(7))[0]}\b', l)]
        assert any(WAYS[way][2] in l for l in lines), f'{id} ({way}): {lines or "not named"}'
    return len(wanted)

def check_all(data, n, how, capfd):
    "Every command on `data`; returns how often an image was to be named"
    ids = lambda *where: {id for id,w in how.items() if WAYS[w][1] in where}
    work, common = data.parent, f'--data folder:{data.name}'
    usable = n-len(ids('table', 'photo')); total = 0
    # training: stops at the first problem, or leaves out what cannot be used
    train = f'{common} --backbone mct_tiny_patch8_96 --image-size 32 --batch-size 16 --no-pretrained --epochs 1 --device cpu --out run'
    assert run('mct_train', train, capfd, work)[0]==2 and not (work/'run').exists()
    status, err = run('mct_train', train+' --skip-bad', capfd, work); assert status==0, err; total += named(err, how, 'table', 'line', 'photo')
    # stages image by image: everything else is done, status 1
    status, err = run('mct_seeds', f'{common} --run run --out seeds --device cpu --json seeds.json', capfd, work)
    assert status==1; total += named(err, how, 'table', 'line', 'photo')
    good = {p.relative_to(work/'seeds').with_suffix('').as_posix() for p in (work/'seeds').rglob('*.npz')}
    assert len(good)==usable and not good & ids('table', 'photo') and ids('mask', '') <= good
    assert set(ids('table', 'photo')) <= {id for id,_ in json.loads((work/'seeds.json').read_text())['train']['bad']} | {id for id in ids('table') if how[id]=='no_photo'}
    status, err = run('mct_score', f'{common} --pred seeds --json score.json', capfd, work); assert status==2                      # files are missing
    status, err = run('mct_score', f'{common} --pred seeds --json score.json --skip-missing', capfd, work); assert status==1
    total += named(err, how, 'table', 'line', 'mask'); assert json.loads((work/'score.json').read_text())['n_images']==usable-len(ids('mask'))
    status, err = run('mct_crf_labels', f'{common} --seeds seeds --out labels --workers 1', capfd, work); assert status==1
    total += named(err, how, 'table', 'line'); assert len(list((work/'labels').glob('*.npz')))==usable and all(id in err for id in ids('photo'))
    train = f'{common} --labels labels --out affinity --backbone test_resnet --crop 80 --batch-size 16 --epochs 1 --device cpu --skip-bad'
    status, err = run('mct_affinity', train, capfd, work); assert status==0, err; total += named(err, how, 'table', 'line')
    status, err = run('mct_masks', f'{common} --seeds seeds --affinity affinity --out masks --background score.json --device cpu', capfd, work); assert status==1
    total += named(err, how, 'table', 'line'); assert len(list((work/'masks').glob('*.png')))==usable and all(id in err for id in ids('photo'))
    train = f'{common} --masks {{}} --out {{}} --backbone test_efficientnet --dilation 1 --crop 32 --batch-size 16 --epochs 1 --device cpu'
    assert run('mct_segment_train', train.format('truth', 'deeplab'), capfd, work)[0]==2
    status, err = run('mct_segment_train', train.format('truth', 'supervised')+' --skip-bad', capfd, work); assert status==0, err
    total += named(err, {k: w for k,w in how.items() if w!='no_mask'}, 'table', 'line', 'photo', 'mask')
    assert run('mct_segment_train', train.format('masks', 'deeplab')+' --skip-bad', capfd, work)[0]==0
    status, err = run('mct_segment', f'{common} --split all --run deeplab --out pred --scales 1 --workers 1 --device cpu', capfd, work); assert status==1
    total += named(err, how, 'table', 'line', 'photo'); assert len(list((work/'pred').glob('*.png')))==usable
    status, err = run('mct_predict', f'{data.name}/images --run run --out found --no-crf --device cpu', capfd, work); assert status==1
    total += named(err, {k: w for k,w in how.items() if w in ('link', 'same_name', 'control')}, 'table') + named(err, how, 'photo')
    return total

def test_every_command_goes_on(tmp_path, capfd):
    how = make_data(tmp_path/'data', 45, len(WAYS)); assert set(how.values())==set(WAYS)
    assert check_all(tmp_path/'data', 45, how, capfd) > 90
    for id,way in how.items():                                                       # odd photos are read for what they are
        if WAYS[way][1]=='' and way!='no_line':
            classes, maps = load_seed(tmp_path/f'seeds/{id}.npz'); assert len(classes) and maps.shape[1:]==open_mask(tmp_path/f'data/masks/{id}.png').shape
    assert load_seed(tmp_path/f'seeds/{next(id for id,w in how.items() if w=="no_line")}.npz')[1].shape==(0, SIDE, SIDE)

@pytest.mark.slow
def test_five_hundred_images(tmp_path, capfd):
    "A tenth of 500 images is broken, in all the ways at least once"
    how = make_data(tmp_path/'data', 500, 50); assert set(how.values())==set(WAYS) and len(how)==50
    named = check_all(tmp_path/'data', 500, how, capfd)
    with capfd.disabled(): print(json.dumps(dict(images=500, broken=len(how), ways=len(WAYS), commands=10, named=named)))
    if out := os.environ.get('MCT_RECORD'): (Path(out)/'bad_data.json').write_text(json.dumps(dict(images=500, broken=len(how), ways=len(WAYS), named=named)))

def test_what_fuzzing_found(tmp_path):
    "A name longer than the system allows, blanks of another kind around a number, settings of another type"
    import json
    from mctformer_nb.images import load_image
    from mctformer_nb.photos import read_labelmap, with_any_suffix
    from mctformer_nb.runs import load_run
    long = tmp_path/f'{"x"*5000}.jpg'; assert with_any_suffix(long)==long
    with pytest.raises(DataError, match='no such file'): load_image(long)
    (tmp_path/'labelmap.txt').write_text('cat:\x1f55,0, 7::\n'); assert read_labelmap(tmp_path/'labelmap.txt')=={'cat': (55, 0, 7)}
    (tmp_path/'config.json').write_text(json.dumps(dict(kind=['classifier'])))
    with pytest.raises(DataError, match='another network'): load_run(tmp_path)
