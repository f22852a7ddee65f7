"Data as people and their tools write them: read for what they are, or refused in words that say what to do"
import json, os, unicodedata
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from mctformer_nb.core import DataError, open_image, open_mask, save_mask, voc_palette
from mctformer_nb.datasets import get_dataset
from mctformer_nb.interchange import export_coco, export_maps, import_coco, import_maps, import_reference_seeds
from mctformer_nb.seeds import load_seed, save_seed

N, SIDE = 12, 48
MINI = get_dataset('mini', n=N, size=SIDE)
NAMES = {id: [MINI.classes[c] for c in MINI.labels(id)] for id in MINI.ids}
PALETTE = voc_palette()

def refused(f, *words):
    "`f` raises a `DataError` that holds all `words`, which it returns"
    with pytest.raises(DataError) as e: f()
    for w in words: assert str(w) in str(e.value), f'{w!r} not in {e.value}'
    return str(e.value)

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "A folder of photos"
    d = tmp_path_factory.mktemp('photos')
    for id in MINI.ids: MINI.image(id).save(d/f'{id}.png')
    return d

def folder(root, photos, table=None, classes=None, file='labels.csv'):
    (root/'images').symlink_to(photos)
    if table is not None: (root/file).write_bytes(table if isinstance(table, bytes) else table.encode())
    if classes: (root/'classes.txt').write_text('\n'.join(classes)+'\n')
    return f'folder:{root}'

def table(cell, head='image,labels', mark=',', name=lambda id: f'{id}.png'):
    return '\n'.join([head, *(f'{name(id)}{mark}{cell(names)}' for id,names in NAMES.items())])+'\n'

def columns(mark): return '\n'.join([mark.join(['filename', *MINI.classes]), *(mark.join([f'{id}.png', *(str(int(c in NAMES[id])) for c in MINI.classes)]) for id in NAMES)])+'\n'

def doubled(names): return json.dumps(names).replace('"', '""')

# ---- image-level labels

TABLES = dict(
    plain=table(';'.join), bom=('\ufeff'+table(';'.join)).replace('\n', '\r\n').encode(), utf16=table(';'.join, 'image\tlabels', '\t').encode('utf-16'), semicolons=table(','.join, 'image;labels', ';'),
    tabs=table(';'.join, 'image\tlabels', '\t'), commas=table(lambda n: f'"{",".join(n)}"'), commas_and_spaces=table(lambda n: f'"{", ".join(n)}"'), spaces=table(' '.join), pipes=table('|'.join),
    python=table(lambda n: f'"{n}"'), json=table(lambda n: f'"{doubled(n)}"'), columns=columns(','), columns_and_spaces=columns(', '), filename=table(';'.join, 'filename,label'), fname=table(';'.join, 'fname,tags'),
    line_a_label='image,labels\n'+''.join(f'{id}.png,{c}\n' for id,names in NAMES.items() for c in names), empty_cells=table(lambda n: ';'.join(n)+';,,,'), folder_before=table(';'.join, name=lambda id: f'images/{id}.png'),
    numbered=',image,labels\n'+''.join(f'{k},{id}.png,{";".join(names)}\n' for k,(id,names) in enumerate(NAMES.items())), boxes='filename,width,height,class,xmin\n'+''.join(f'{id}.png,48,48,{c},3\n'*2 for id,names in NAMES.items() for c in names))

@pytest.mark.parametrize('listed', [False, True])
@pytest.mark.parametrize('form', TABLES)
def test_forms_of_tables(tmp_path, photos, form, listed):
    ds = get_dataset(folder(tmp_path, photos, TABLES[form], MINI.classes if listed else None))
    assert set(ds.classes)==set(MINI.classes) and ds.classes==(MINI.classes if listed or 'columns' in form else sorted(MINI.classes))
    assert {id: {ds.classes[c] for c in ds.labels(id)} for id in ds.ids}=={id: set(n) for id,n in NAMES.items()}
    assert ds.unlabelled==0 and all(f'{c} {int(k)}' in ds.understood for c,k in zip(MINI.classes, MINI.targets().sum(0)))

REFUSED = dict(
    unquoted_commas=(table(','.join), 'line 2', 'columns', "';'"), no_header=(table(';'.join, '').lstrip('\n'), 'line 1', 'image,labels'), capitals=(table(lambda n: ';'.join(n).upper() if n==NAMES['train_00000'] else ';'.join(n)), 'capital letters'),
    odd_names=(table(lambda n: ';'.join(n)+';[x'), "'[x'", 'does not look like'), other_columns=('image,width\na.png,640\n', "'width'", '0 and 1'), numbers=(table(lambda n: '3'), 'Labels are numbers'), other_suffix=(table(';'.join, name=lambda id: f'{id}.jpg'), "Did you mean 'train_00000.png'"))

@pytest.mark.parametrize('form', REFUSED)
def test_what_is_not_plain_is_refused(tmp_path, photos, form):
    text, *words = REFUSED[form]; refused(lambda: get_dataset(folder(tmp_path, photos, text, MINI.classes if form=='numbers' else None)), 'labels.csv', *words)

@pytest.mark.parametrize('name', ['none', 'nan', 'background', '_background_', '__ignore__', 'BG', ''])
def test_no_class_is_a_negative(tmp_path, photos, name):
    rows = table(';'.join).splitlines(); rows[1] = f'{MINI.ids[0]}.png,{name}'; del rows[2]
    ds = get_dataset(folder(tmp_path, photos, '\n'.join(rows)))
    assert ds.classes==sorted(MINI.classes) and ds.negatives==1 and ds.unlabelled==2
    assert [(ds.is_labelled(i), ds.labels(i).size) for i in range(2)]==[(True, 0), (False, 0)] and not ds.targets()[:2].any()
    assert ds.subset([0]).negatives==1 and 'negatives): 1' in ds.understood and 'without a line in the table of labels: 1' in ds.understood

def test_names_with_spaces_and_commas_stay_whole(tmp_path, photos):
    kinds = ['polar bear', 'teddy bear', 'bear', 'hot dog', 'dog']
    ds = get_dataset(folder(tmp_path, photos, 'image,labels\n'+''.join(f'{id}.png,{kinds[k%5]}\n' for k,id in enumerate(MINI.ids)))); assert ds.classes==sorted(kinds)
    (tmp_path/'classes.txt').write_text('tabby, tabby cat\ndog\n'); (tmp_path/'labels.csv').write_text(f'image,labels\n{MINI.ids[0]}.png,"tabby, tabby cat"\n')
    assert get_dataset(f'folder:{tmp_path}').labels(0).tolist()==[0]

def test_class_in_every_photo_is_said(tmp_path, photos):
    ds = get_dataset(folder(tmp_path, photos, table(lambda n: 'lesion'))); assert 'every labelled image shows lesion' in ds.understood
    assert 'every labelled' not in MINI.understood

@pytest.mark.parametrize('file', ['Labels.csv', 'LABELS.CSV', '_classes.csv', 'labels.tsv'])
def test_other_names_of_the_table(tmp_path, photos, file): assert len(get_dataset(folder(tmp_path, photos, table(';'.join), file=file)).classes)==8

def test_missing_table_names_what_is_there(tmp_path, photos): refused(lambda: get_dataset(folder(tmp_path, photos, b'PK', file='labels.xlsx')), 'labels.csv', 'There is labels.xlsx')

def test_folders_are_labels(tmp_path):
    for k,id in enumerate(MINI.ids): d = tmp_path/'images'/('cat', 'dog', 'none')[k%3]; d.mkdir(parents=True, exist_ok=True); MINI.image(id).save(d/f'{id}.jpg')
    ds = get_dataset(f'folder:{tmp_path}'); assert ds.classes==['cat', 'dog'] and ds.targets().sum(0).tolist()==[4, 4] and ds.negatives==4 and 'the label is the folder' in ds.understood
    (tmp_path/'images/dog').rename(tmp_path/'images/val'); (tmp_path/'images/cat').rename(tmp_path/'images/train'); refused(lambda: get_dataset(f'folder:{tmp_path}'), 'labels.csv')

def test_cls_labels_of_other_code(tmp_path, photos):
    vectors = {id: np.array([c in NAMES[id] for c in MINI.classes], np.float32) for id in MINI.ids} | {'2007_000032': np.ones(8, np.float32)}
    spec = folder(tmp_path, photos, classes=MINI.classes); np.save(tmp_path/'cls_labels.npy', np.array(vectors, object), allow_pickle=True)
    ds = get_dataset(spec); assert (ds.targets()==MINI.targets()).all() and '12 of its 13 images' in ds.understood
    (tmp_path/'classes.txt').write_text('cat\ndog\n'); refused(lambda: get_dataset(spec), 'cls_labels.npy', '8 numbers an image')
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'ran'),)
    np.save(tmp_path/'cls_labels.npy', np.array({'a': Evil()}, object), allow_pickle=True); refused(lambda: get_dataset(spec), 'nothing in the file was run'); assert not (tmp_path/'ran').exists()

# ---- masks

def first_use(m):
    "Indices in the order in which they occur, with VOC's colours"
    used = [v for v in np.unique(m) if v][::-1]; im = Image.fromarray(sum((k+1)*(m==v) for k,v in enumerate(used)).astype(np.uint8)); im.putpalette(PALETTE[[0, *used]].tobytes()); return im

MASKS = dict(grey=lambda m: m, deep=lambda m: m.astype(np.uint16), whole=lambda m: m.astype(np.int32), floats=lambda m: m.astype(np.float32), colour=lambda m: PALETTE[m], alpha=lambda m: np.dstack([PALETTE[m], np.where(m>0, 255, 0).astype(np.uint8)]))

@pytest.mark.parametrize('ending', ['.png', '.PNG', '.tif', '_mask.png', '.png.png', '-mask.PNG'])
@pytest.mark.parametrize('form', MASKS)
def test_forms_of_masks(tmp_path, photos, form, ending):
    if form in ('floats', 'whole') and 'tif' not in ending: ending = ending.replace('png', 'tif').replace('PNG', 'TIF')
    spec = folder(tmp_path, photos, table(';'.join), MINI.classes); (tmp_path/'masks').mkdir()
    for id in MINI.ids: Image.fromarray(MASKS[form](MINI.mask(id))).save(tmp_path/f'masks/{id}{ending}')
    ds = get_dataset(spec); assert ds.has_masks and all((ds.mask(id)==MINI.mask(id)).all() for id in ds.ids)
    assert ds.check_masks()=={c: int(k) for c,k in zip(MINI.classes, MINI.targets().sum(0))}

def test_colours_of_a_label_map(tmp_path, photos):
    spec, colours = folder(tmp_path, photos, table(';'.join), MINI.classes), np.random.default_rng(0).permutation(256)[:27].reshape(9, 3).astype(np.uint8); colours[0] = 0
    for id in MINI.ids: (tmp_path/'masks').mkdir(exist_ok=True); Image.fromarray(colours[MINI.mask(id)]).save(tmp_path/f'masks/{id}.png')
    refused(lambda: get_dataset(spec).mask(0), f'{MINI.ids[0]}.png', 'colour image', 'labelmap.txt')
    lines = [f'{n}:{",".join(map(str, colours[(["background"]+MINI.classes).index(n)].tolist()))}::' for n in sorted(['background']+MINI.classes)]; (tmp_path/'labelmap.txt').write_text('# label:color_rgb:parts:actions\n'+'\n'.join(lines))
    ds = get_dataset(spec); assert all((ds.mask(id)==MINI.mask(id)).all() for id in ds.ids)

def test_palette_against_its_numbers(tmp_path):
    m = MINI.mask(0); first_use(m).save(tmp_path/'m.png'); refused(lambda: open_mask(tmp_path/'m.png'), 'm.png', 'labelmap.txt')
    assert (open_mask(tmp_path/'m.png', colours={tuple(c): v for v,c in enumerate(PALETTE.tolist())})==m).all()
    im = Image.fromarray(m); im.putpalette(np.arange(256, dtype=np.uint8).repeat(3).tobytes()); im.save(tmp_path/'g.png'); assert (open_mask(tmp_path/'g.png')==m).all()      # a palette of greys says nothing

BINARY = dict(png=lambda m: np.where(m>0, 255, 0).astype(np.uint8), rgb=lambda m: np.where(m>0, 255, 0).astype(np.uint8)[..., None].repeat(3, 2), bit=lambda m: m>0, jpg=lambda m: np.where(m>0, 255, 0).astype(np.uint8), gif=lambda m: np.where(m>0, 255, 0).astype(np.uint8))

@pytest.mark.parametrize('form', BINARY)
def test_one_class_as_255(tmp_path, photos, form):
    spec = folder(tmp_path, photos, table(lambda n: 'lesion')); (tmp_path/'masks').mkdir()
    for id in MINI.ids: Image.fromarray(BINARY[form](MINI.mask(id))).save(tmp_path/f'masks/{id}.{form if form in ("jpg", "gif") else "png"}')
    ds = get_dataset(spec); assert all((ds.mask(id)==(MINI.mask(id)>0)).all() for id in ds.ids) and ds.check_masks()=={'lesion': N}
    assert form in ('bit', 'gif') or 'value 255 is the class lesion' in ds.understood

def test_255_beside_1_stays_ignored(tmp_path, photos):
    spec = folder(tmp_path, photos, table(lambda n: 'lesion'))
    for k,id in enumerate(MINI.ids): save_mask(tmp_path/f'masks/{id}.png', np.where(MINI.mask(id)>0, 255 if k else 1, 0).astype(np.uint8))
    assert get_dataset(spec).mask(1).max()==255

def test_no_class_has_a_pixel(tmp_path, photos):
    spec = folder(tmp_path, photos, table(';'.join), MINI.classes)
    for id in MINI.ids: save_mask(tmp_path/f'masks/{id}.png', np.where(MINI.mask(id)>0, 255, 0).astype(np.uint8))
    ds = get_dataset(spec); assert ds.mask(0).max()==255; refused(ds.check_masks, 'no class has a pixel', '255')

def test_masks_in_another_order_than_the_classes(tmp_path, photos):
    spec = folder(tmp_path, photos, table(';'.join))
    for id in MINI.ids: save_mask(tmp_path/f'masks/{id}.png', MINI.mask(id))
    with pytest.warns(UserWarning, match='contradict each other'): ds = get_dataset(spec)
    refused(ds.check_masks, 'contradict', 'classes.txt'); assert 'contradict' in ds.understood and ds.labels(0).size
    for lines in (MINI.classes, ['_background_', *MINI.classes], ['__ignore__', '_background_', *MINI.classes]):
        (tmp_path/'classes.txt').write_text('\n'.join(lines)); ds = get_dataset(spec); assert ds.classes==MINI.classes and ds.check_masks()
    (tmp_path/'classes.txt').write_text('\n'.join(MINI.classes[::-1])); refused(get_dataset(spec).check_masks, 'contradict')

def test_two_classes_exchanged():
    "Most classes are right, two are not: found once five images show them"
    from dataclasses import replace
    ds = get_dataset('mini', n=60, size=SIDE); a, b = 0, 4
    wrong = replace(ds, get_labels=lambda id: [{a: b, b: a}.get(c, c) for c in ds.labels(id)], _known={}); refused(wrong.check_masks, 'contradict')
    assert ds.check_masks(20).keys()==ds.check_masks().keys()

def test_files_that_are_no_masks_are_named(tmp_path, photos):
    spec = folder(tmp_path, photos, table(';'.join), MINI.classes); (tmp_path/'masks').mkdir(); np.save(tmp_path/f'masks/{MINI.ids[0]}.npy', MINI.mask(0)); refused(lambda: get_dataset(spec), 'masks', f'{MINI.ids[0]}.npy')
    save_mask(tmp_path/f'masks/{MINI.ids[1]}.png', MINI.mask(1)); assert f'the first is {MINI.ids[0]}.npy' in get_dataset(spec).understood
    save_mask(tmp_path/f'masks/{MINI.ids[2]}_mask.png', MINI.mask(2)); save_mask(tmp_path/f'masks/{MINI.ids[2]}_gt.png', MINI.mask(2)); refused(lambda: get_dataset(spec), 'both the mask of')

# ---- photos

@pytest.mark.parametrize('name', ['a.jfif', 'a.jpe', 'a.JPEG', 'a.AVIF', 'a.jp2', 'a.webp', 'x/y/a.png'])
def test_suffixes_of_photos(tmp_path, name):
    from mctformer_nb.photos import unreadable_photo
    if unreadable_photo(Path(name.lower()).suffix): pytest.skip('this Pillow cannot')
    file = tmp_path/'images'/name; file.parent.mkdir(parents=True); MINI.image(0).save(file, **dict(format='JPEG') if name[2:4] in ('jf', 'jp') and name!='a.jp2' else {})
    (tmp_path/'labels.csv').write_text('image,labels\na.png,cat\n' if '/' in name else f'image,labels\n{name},cat\n')
    ds = get_dataset(f'folder:{tmp_path}'); assert ds.image(0).size==ds.size(0)==(SIDE, SIDE) and ds.labels(0).size==1

def test_no_photo_is_lost_silently(tmp_path):
    d = tmp_path/'images'; (d/'.ipynb_checkpoints').mkdir(parents=True); (tmp_path/'outside').mkdir()
    for f in (d/'a.png', d/'.ipynb_checkpoints/a-checkpoint.png', tmp_path/'outside/b.png'): MINI.image(0).save(f)
    (d/'b.heif').write_bytes(b'\0\0\0\x18ftypmif1'); (d/'c.dcm').write_bytes(b''); (d/'cats').symlink_to(tmp_path/'outside'); (d/'gone.png').symlink_to(tmp_path/'nowhere.png'); (d/'._a.png').write_bytes(b'x'); (d/'notes.txt').write_text('')
    (tmp_path/'classes.txt').write_text('cat\n'); refused(lambda: get_dataset(f'folder:{tmp_path}')); ds = get_dataset(f'folder:{tmp_path}', on_bad='skip')
    assert ds.ids==['a'] and {'c', 'cats', 'gone'}<={id for id,_ in ds.bad}<={'b', 'c', 'cats', 'gone'} and 'outside of the folder' in dict(ds.bad)['cats']

@pytest.mark.parametrize('disk,written', [('NFD', 'NFC'), ('NFC', 'NFD')])
def test_accents_in_two_spellings(tmp_path, disk, written):
    name = {form: unicodedata.normalize(form, 'café.png') for form in ('NFC', 'NFD')}; (tmp_path/'images').mkdir(); MINI.image(0).save(tmp_path/'images'/name[disk]); save_mask(tmp_path/'masks'/name[written], MINI.mask(0))
    (tmp_path/'labels.csv').write_text(f'image,labels\n{name[written]},cat\n', encoding='utf-8'); (tmp_path/'classes.txt').write_text('\n'.join(MINI.classes))
    ds = get_dataset(f'folder:{tmp_path}'); assert ds.is_labelled(0) and (ds.mask(0)==MINI.mask(0)).all()

GREY = np.asarray(MINI.image(0).convert('L')).astype(np.int32)
DEEP = {'16 bits': (GREY*257).astype(np.uint16), '12 bits': np.round(GREY*(4095/255)).astype(np.uint16), '8 bits in 16': GREY.astype(np.uint16), 'tomography': (GREY*8-1024).astype(np.int32), 'floats to 1': (GREY/255).astype(np.float32), 'negative floats': ((GREY-128)*8).astype(np.float32)}

@pytest.mark.parametrize('kind', DEEP)
def test_deep_photos_are_scaled_by_their_range(tmp_path, kind):
    file = tmp_path/('a.tif' if DEEP[kind].dtype!=np.uint16 else 'a.png'); Image.fromarray(DEEP[kind]).save(file); got = np.asarray(open_image(file)).astype(int)[..., 0]
    want = (GREY-GREY.min())*255/(GREY.max()-GREY.min()) if DEEP[kind].min()<0 else GREY
    assert np.abs(got-want).max()<=1

def test_constant_photo_is_warned_of(tmp_path, recwarn):
    MINI.image(0).save(tmp_path/'a.png'); open_image(tmp_path/'a.png'); assert not recwarn.list
    Image.new('I;16', (40, 30), 7).save(tmp_path/'b.png'); open_image(tmp_path/'b.png'); assert 'b.png' in str(recwarn.pop(UserWarning).message)

@pytest.mark.parametrize('note', range(2, 9))
def test_mask_drawn_without_the_rotation_note(tmp_path, note):
    raw = np.zeros((64, 96, 3), np.uint8); raw[:20, :30] = 255; m = (raw[..., 0]>0).astype(np.uint8); exif = Image.Exif(); exif[0x0112] = note; (tmp_path/'images').mkdir()
    Image.fromarray(raw).save(tmp_path/'images/a.jpg', exif=exif); (tmp_path/'labels.csv').write_text('image,labels\na.jpg,cat\n'); save_mask(tmp_path/'masks/a.png', m)
    said = refused(lambda: get_dataset(f'folder:{tmp_path}').mask(0), 'a.png', 'rotation note', 'remove the note'); assert 'resize' not in said
    upright = (np.asarray(open_image(tmp_path/'images/a.jpg'))[..., 0]>128).astype(np.uint8); save_mask(tmp_path/'masks/a.png', upright); assert (get_dataset(f'folder:{tmp_path}').mask(0)==upright).all()

# ---- PASCAL VOC and MS COCO

@pytest.mark.parametrize('suffix', ['.png', '.JPG', '.jpeg'])
def test_voc_with_other_suffixes(tmp_path, suffix):
    for d in ('Annotations', 'JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation'): (tmp_path/d).mkdir(parents=True)
    MINI.image(0).save(tmp_path/f'JPEGImages/a{suffix}'); (tmp_path/'Annotations/a.xml').write_text('<annotation><object><name>cat</name></object></annotation>'); (tmp_path/'ImageSets/Segmentation/train.txt').write_text(f'a{suffix}\n')
    Image.fromarray(PALETTE[np.full((SIDE, SIDE), 8)]).save(tmp_path/'SegmentationClass/a.png')
    ds = get_dataset(f'voc:{tmp_path}'); assert ds.image('a').size==ds.size('a')==(SIDE, SIDE) and ds.labels(0).tolist()==[7] and (ds.mask(0)==8).all()

def coco(root, split='train', annot='annotations/instances_train2014.json', photos='train2014', **change):
    js = dict(images=[dict(id=k+1, file_name=f'{id}.png', width=SIDE, height=SIDE) for k,id in enumerate(MINI.ids[:2])], categories=[dict(id=3, name='cat'), dict(id=17, name='dog')],
              annotations=[dict(id=k+1, image_id=k+1, category_id=c, area=100, iscrowd=0, segmentation=[[9, 9, 19, 9, 19, 19, 9, 19]]) for k,c in enumerate((3, 17))])
    for k,v in change.items(): js[k] = v(js[k]) if callable(v) else v
    for d in ((root/annot).parent, root/photos): d.mkdir(parents=True, exist_ok=True)
    (root/annot).write_text(json.dumps(js)); [MINI.image(id).save(root/photos/f'{id}.png') for id in MINI.ids[:2]]
    return get_dataset(f'coco:{root}', split)

def each(**kw): return lambda entries: [e | {k: v(e) if callable(v) else v for k,v in kw.items()} for e in entries]
LAYOUTS = {'2014': {}, '2017': dict(annot='annotations/instances_train2017.json', photos='train2017'), 'named': dict(split='train2017', annot='annotations/instances_train2017.json', photos='images/train2017'), 'roboflow': dict(annot='train/_annotations.coco.json', photos='train'),
           'label studio': dict(annot='result.json', photos='images'), 'cvat': dict(split='default', annot='annotations/instances_default.json', photos='images/default'), 'cvat flat': dict(split='default', annot='annotations/instances_default.json', photos='images')}
WRITTEN = dict(backslash=dict(images=each(file_name=lambda e: 'images\\'+e['file_name'])), prefix=dict(images=each(file_name=lambda e: 'train2014/'+e['file_name'])), floats=dict(images=each(width=float(SIDE), id=lambda e: float(e['id']))), texts=dict(images=each(id=lambda e: str(e['id'])), annotations=each(image_id=lambda e: str(e['image_id']))),
               no_id=dict(annotations=lambda a: [{k: v for k,v in e.items() if k!='id'} for e in a]), two_corners_beside=dict(annotations=each(segmentation=[[1, 1, 2, 2], [9, 9, 19, 9, 19, 19, 9, 19]])), group=dict(categories=lambda c: [dict(id=0, name='animals', supercategory='none'), *c]))

@pytest.mark.parametrize('case', [*LAYOUTS, *WRITTEN])
def test_coco_as_tools_write_it(tmp_path, case):
    pytest.importorskip('pycocotools'); ds = coco(tmp_path, **LAYOUTS.get(case, {}), **WRITTEN.get(case, {}))
    assert ds.classes==['cat', 'dog'] and ds.ids==MINI.ids[:2] and [ds.labels(i).tolist() for i in range(2)]==[[0], [1]] and ds.image(1).size==(SIDE, SIDE)
    assert [np.unique(ds.mask(i), return_counts=True)[1].tolist() for i in range(2)]==[[SIDE**2-100, 100]]*2 and ds.check_masks()==dict(cat=1, dog=1)

BAD_COCO = dict(all_crowds=(dict(annotations=each(iscrowd=1)), 'all 2 objects', 'iscrowd'), orphans=(dict(annotations=each(image_id=lambda e: str(e['image_id']))), 'no annotation belongs to an image', "['1']"), two_names=(dict(categories=[dict(id=3, name='cat'), dict(id=17, name='cat')]), 'two categories'), address=(dict(images=each(file_name='http://x/y.png')), 'web address'),
                panoptic=(dict(annotations=[dict(segments_info=[])]), 'panoptic'), stuff=(dict(categories=[dict(id=i, name=str(i)) for i in range(299)]), '299 categories'))
BAD_OUTLINES = {'empty': [], 'empty part': [[]], 'fewer than three corners': [[9, 9, 19, 9]], 'odd number': [[9, 9, 19, 9, 19, 19, 9]], 'there is none': None, "Python's bytes": dict(size=[SIDE, SIDE], counts="b'x'")}

@pytest.mark.parametrize('case', BAD_COCO)
def test_bad_coco(tmp_path, case): pytest.importorskip('pycocotools'); change, *words = BAD_COCO[case]; refused(lambda: coco(tmp_path, **change), 'instances_train2014.json', *words)

@pytest.mark.parametrize('why', BAD_OUTLINES)
def test_bad_outlines(tmp_path, why):
    pytest.importorskip('pycocotools'); ds = coco(tmp_path, annotations=each(segmentation=BAD_OUTLINES[why])); assert ds.labels(0).tolist()==[0]
    said = refused(lambda: ds.mask(0), 'annotation 1', f'{MINI.ids[0]}.png', why.split(' part')[0]); assert 'far outside' not in said and 'TypeError' not in said

def test_missing_split_names_the_others(tmp_path):
    pytest.importorskip('pycocotools'); coco(tmp_path, **LAYOUTS['2017']); refused(lambda: get_dataset(f'coco:{tmp_path}', 'val'), 'instances_val2014.json', 'The splits here are: train2017')

# ---- what is written can be read

@pytest.fixture
def written(tmp_path):
    "Photos of several suffixes with masks and seeds"
    (tmp_path/'d/images').mkdir(parents=True); rng = np.random.default_rng(0)
    for k,id in enumerate(MINI.ids): MINI.image(id).save(tmp_path/f'd/images/{id}.v{k}{(".jpg", ".png", ".JPEG")[k%3]}'); save_mask(tmp_path/f'd/masks/{id}.v{k}.png', MINI.mask(id))
    (tmp_path/'d/labels.csv').write_text('image,labels\n'+''.join(f'{id}.v{k},{";".join(NAMES[id])}\n' for k,id in enumerate(MINI.ids))); (tmp_path/'d/classes.txt').write_text('\n'.join(MINI.classes))
    ds = get_dataset(f'folder:{tmp_path}/d')
    for id in ds.ids: save_seed(tmp_path/f'seeds/{id}.npz', ds.labels(id), (.1+.9*rng.random((len(ds.labels(id)), SIDE, SIDE))).astype(np.float16))
    return ds

def test_coco_comes_back(tmp_path, written):
    pytest.importorskip('pycocotools'); root = tmp_path/'d'; export_coco(root/'masks', written, root/'annotations/instances_mine.json')
    (root/'mine').symlink_to(root/'images'); ds = get_dataset(f'coco:{root}', 'mine'); assert ds.ids==written.ids and ds.classes==written.classes
    assert import_coco(root/'annotations/instances_mine.json', written.classes, tmp_path/'back')==N
    for id in ds.ids: assert (ds.mask(id)==written.mask(id)).all() and (open_mask(tmp_path/f'back/{id}.png')==written.mask(id)).all() and ds.labels(id).tolist()==written.labels(id).tolist() and (np.asarray(ds.image(id))==np.asarray(written.image(id))).all()

@pytest.mark.parametrize('form', ['png', 'npy', 'reference'])
def test_maps_come_back(tmp_path, written, form):
    export_maps(tmp_path/'seeds', written, tmp_path/'out', form); assert import_maps(tmp_path/'out', written, tmp_path/'back', form)==dict(written=N, bad=[])
    if form=='reference': assert import_reference_seeds(tmp_path/'out', tmp_path/'back2')['written']==N
    for id in written.ids:
        (c, m), (c2, m2) = load_seed(tmp_path/f'seeds/{id}.npz'), load_seed(tmp_path/f'back/{id}.npz'); assert c.tolist()==c2.tolist()
        assert np.abs(m.astype(float)-m2).max()<=(.5/255+2**-10 if form=='png' else 0)                # 256 steps; float16 above one half has steps of 2**-11
