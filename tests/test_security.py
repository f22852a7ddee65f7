"Files from elsewhere run no code, name no file outside of their folder, and do not eat the memory"
import io, json, os, pickle, struct, subprocess, sys, zipfile, zlib
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from mctformer_nb import cli
from mctformer_nb.core import DataError, open_image, open_mask, read_arrays
from mctformer_nb.crf import load_crf_label
from mctformer_nb.datasets import get_dataset
from mctformer_nb.voc import read_sbd_mask
from mctformer_nb.mctformer import MCTformer, load_reference, load_run, save_run
from mctformer_nb.scores import read_seed
from mctformer_nb.seeds import load_seed
from mctformer_nb.vit import read_state_dict

class Evil:
    "Unpickled, it leaves a mark"
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return os.mkdir, (str(self.mark),)

@pytest.fixture
def mark(tmp_path):
    mark = tmp_path/'code_ran'; yield mark
    assert not mark.exists(), 'code in a file was run'

def test_the_mark_works(tmp_path): pickle.loads(pickle.dumps(Evil(tmp_path/'m'))); assert (tmp_path/'m').exists()

# ---- no code

@pytest.mark.parametrize('save', [lambda o,p: torch.save(o, p), lambda o,p: torch.save(o, p, _use_new_zipfile_serialization=False), lambda o,p: p.write_bytes(pickle.dumps(o))])
@pytest.mark.parametrize('where', ['bare', 'value', 'beside'])
def test_checkpoints(tmp_path, mark, save, where):
    evil = Evil(mark); obj = evil if where=='bare' else dict(w=evil) if where=='value' else dict(model=dict(w=torch.ones(2)), args=evil)
    save(obj, tmp_path/'x.pth')
    for read in (read_state_dict, load_reference):
        with pytest.raises(DataError, match='x.pth'): read(tmp_path/'x.pth')
    assert cli.mct_convert([str(tmp_path/'x.pth'), '--out', str(tmp_path/'run')])==2 and not (tmp_path/'run').exists()

def test_pickle_named_safetensors(tmp_path, mark):
    torch.save(Evil(mark), tmp_path/'x.safetensors')
    with pytest.raises(DataError): read_state_dict(tmp_path/'x.safetensors')

@pytest.mark.parametrize('read,names', [(load_seed, ('classes', 'maps')), (read_seed, ('classes', 'maps')), (load_crf_label, ('classes', 'low', 'high'))])
def test_archives_of_arrays(tmp_path, mark, read, names):
    evil = np.empty(1, object); evil[0] = Evil(mark)
    np.savez(tmp_path/'x.npz', **{n: evil for n in names})
    with pytest.raises(DataError, match='Python objects'): read(tmp_path/'x.npz')
    np.save(tmp_path/'x.npy', evil, allow_pickle=True); (tmp_path/'x.npz').write_bytes((tmp_path/'x.npy').read_bytes())
    with pytest.raises(DataError): read(tmp_path/'x.npz')
    (tmp_path/'x.npz').write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(DataError): read(tmp_path/'x.npz')

def test_seeds_of_the_reference(tmp_path, mark):
    interchange = pytest.importorskip('mctformer_nb.interchange')
    for i,obj in enumerate((Evil(mark), {0: Evil(mark)}, {Evil: 1})):
        np.save(tmp_path/f'{i}.npy', np.array(obj, object), allow_pickle=True)
        with pytest.raises(DataError): interchange.read_reference_seed(tmp_path/f'{i}.npy')
    (tmp_path/'3.npy').write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(DataError): interchange.read_reference_seed(tmp_path/'3.npy')

def test_state_of_a_training(tmp_path, mark):
    from mctformer_nb.learner import open_run
    torch.save(dict(settings=Evil(mark)), tmp_path/'resume.pt')
    with pytest.raises(DataError, match='resume.pt'): open_run(tmp_path, {})

def test_run_folder_names_no_other_file(tmp_path, mark):
    "timm would load what checkpoint_path names"
    save_run(MCTformer(2, 'v2', 'vit_tiny_patch16_224', img_size=32, depth=1), tmp_path/'run', classes=['a', 'b'], image_size=32); torch.save(Evil(mark), tmp_path/'evil.pth')
    file = tmp_path/'run/config.json'; cfg = json.loads(file.read_text()); load_run(tmp_path/'run')
    for key in ('checkpoint_path', 'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay'):
        file.write_text(json.dumps(dict(cfg, backbone_args=cfg['backbone_args'] | {key: str(tmp_path/'evil.pth')})))
        with pytest.raises(DataError, match=key): load_run(tmp_path/'run')
    for change in (dict(num_classes=10**9), dict(num_classes='2'), dict(backbone=['x']), dict(backbone_args=dict(embed_dim=10**9)), dict(backbone_args=3), dict(classes=None)):
        file.write_text(json.dumps(cfg | change))
        with pytest.raises(DataError, match='config.json'): load_run(tmp_path/'run')
    file.write_text('[]')
    with pytest.raises(DataError, match='config.json'): load_run(tmp_path/'run')

def test_no_reader_unpickles(root):
    "`torch.load` only with weights_only, `np.load` never with pickles, no pickle.load"
    import re
    for f in (root/'mctformer_nb').glob('*.py'):
        text = f.read_text(encoding='utf-8')
        for call in re.findall(r'torch\.load\([^\n]*', text): assert 'weights_only=True' in call, f'{f.name}: {call}'
        assert not re.search(r'\bpickle\.loads?\(|\bUnpickler\(|\beval\(|\bexec\(|yaml\.load\(|os\.system|shell=True', re.sub(r'"[^"\n]*"', '', text).replace('.eval()', '')), f.name
        for call in re.findall(r'np\.load\([^\n]*', text): assert 'allow_pickle=True' not in call, f'{f.name}: {call}'

# ---- XML

LAUGHS = '<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "ha">' + ''.join(f'<!ENTITY {chr(98+i)} "{f"&{chr(97+i)};"*10}">' for i in range(9)) + ']><annotation><object><name>&j;</name></object></annotation>'
FILE = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]><annotation><object><name>&x;</name></object></annotation>'
DTD = '<!DOCTYPE a SYSTEM "http://127.0.0.1:9/a.dtd"><annotation/>'

@pytest.mark.parametrize('xml', [LAUGHS, FILE, DTD, '<annotation>'*20_000, '<annotation' + ' a="1"'*10 + '>'], ids=['billion_laughs', 'local_file', 'network', 'deep', 'attributes'])
def test_annotations(tmp_path, xml):
    for d in ('Annotations', 'JPEGImages', 'ImageSets/Segmentation'): (tmp_path/d).mkdir(parents=True)
    (tmp_path/'Annotations/a.xml').write_text(xml); (tmp_path/'ImageSets/Segmentation/train.txt').write_text('a\n')
    ds = get_dataset(f'voc:{tmp_path}')
    with pytest.raises(DataError, match='a.xml'): ds.labels('a')

# ---- names

OUT = ['../x', '/tmp/x', 'a/../../x', '..\\x', 'a\0b', '..', '']

def photos(root, names=('a',)):
    (root/'images').mkdir(parents=True); (root/'classes.txt').write_text('cat\n')
    for n in names: Image.new('RGB', (16, 16)).save(root/f'images/{n}.png')
    return root

@pytest.mark.parametrize('name', [n for n in OUT if '\0' not in n])
def test_names_in_tables_and_lists(tmp_path, name):
    root = photos(tmp_path/'d'); Image.new('RGB', (9, 9)).save(tmp_path/'x.png')
    (root/'labels.csv').write_text(f'image,labels\n"{name}",cat\n')
    with pytest.raises(DataError, match='line 2'): get_dataset(f'folder:{root}')
    assert get_dataset(f'folder:{root}', on_bad='skip').ids==['a']
    if not name: return
    (root/'labels.csv').write_text('image,labels\na,cat\n'); (root/'splits').mkdir(); (root/'splits/val.txt').write_text(f'{name}\n')
    with pytest.raises(DataError, match='line 1'): get_dataset(f'folder:{root}', 'val')
    (tmp_path/'v/ImageSets/Segmentation').mkdir(parents=True); (tmp_path/'v/ImageSets/Segmentation/train.txt').write_text(f'{name}\n')
    if not name.startswith('/'):                           # lists of other tools begin paths so; it is taken off
        with pytest.raises(DataError, match='line 1'): get_dataset(f'voc:{tmp_path/"v"}')

@pytest.mark.parametrize('name', [n+'.jpg' for n in OUT if n])
def test_names_in_coco(tmp_path, name):
    pytest.importorskip('pycocotools')
    for d in ('annotations', 'val2014'): (tmp_path/d).mkdir()
    js = dict(images=[dict(id=1, file_name=name, width=4, height=4)], categories=[dict(id=1, name='cat')], annotations=[]); (tmp_path/'annotations/instances_val2014.json').write_text(json.dumps(js))
    if name=='...jpg': return
    with pytest.raises(DataError, match='instances_val2014.json'): get_dataset(f'coco:{tmp_path}', 'val')

@pytest.mark.parametrize('field', ['id', 'width', 'height'])
def test_true_is_no_number_in_coco(tmp_path, field):
    pytest.importorskip('pycocotools')
    for d in ('annotations', 'val2014'): (tmp_path/d).mkdir()
    js = dict(images=[{**dict(id=1, file_name='a.jpg', width=4, height=4), field: True}], categories=[dict(id=1, name='cat')], annotations=[]); (tmp_path/'annotations/instances_val2014.json').write_text(json.dumps(js))
    with pytest.raises(DataError, match=f'entry 0 of images has no usable {field}'): get_dataset(f'coco:{tmp_path}', 'val')

@pytest.mark.parametrize('image_id', ['', '.', 7])
def test_unknown_category_of_an_unknown_image_in_coco(tmp_path, image_id):
    pytest.importorskip('pycocotools')
    for d in ('annotations', 'val2014'): (tmp_path/d).mkdir()
    js = dict(images=[], categories=[dict(id=1, name='cat')], annotations=[dict(id=3, image_id=image_id, category_id=8, segmentation=[])]); (tmp_path/'annotations/instances_val2014.json').write_text(json.dumps(js))
    with pytest.raises(DataError, match='annotation 3 has the unknown category 8'): get_dataset(f'coco:{tmp_path}', 'val')

def test_links_out_of_the_folder(tmp_path):
    root = photos(tmp_path/'d', 'ab'); Image.new('RGB', (9, 9)).save(tmp_path/'private.png'); (root/'images/link.png').symlink_to(tmp_path/'private.png')
    with pytest.raises(DataError, match='link to a place outside'): get_dataset(f'folder:{root}', 'all')
    ds = get_dataset(f'folder:{root}', 'all', on_bad='skip'); assert ds.ids==['a', 'b'] and ds.bad[0][0]=='link'
    (root/'images/link.png').unlink(); (root/'images/inside.png').symlink_to(root/'images/a.png'); assert len(get_dataset(f'folder:{root}', 'all'))==3
    (tmp_path/'whole').mkdir(); (tmp_path/'whole/images').symlink_to(root/'images'); (tmp_path/'whole/classes.txt').write_text('cat\n'); assert len(get_dataset(f'folder:{tmp_path/"whole"}', 'all'))==3

# ---- bombs

def limited(code, gigabytes=4):
    "Run `code` in a process that may not have more memory"
    head = f'import resource, sys; sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r}); resource.setrlimit(resource.RLIMIT_AS, ({gigabytes}<<30, {gigabytes}<<30))\n'
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', head+code], capture_output=True, text=True, timeout=120, env=dict(os.environ, OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1'))

def png(w, h):
    def chunk(tag, data): return struct.pack('>I', len(data)) + tag + data + struct.pack('>I', zlib.crc32(tag+data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 1, 0, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(bytes(10**6))) + chunk(b'IEND', b'')

@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_images(tmp_path):
    for w,h in ((60_000, 60_000), (12_000, 9_000), (2**31-1, 2**31-1)):
        (tmp_path/'b.png').write_bytes(png(w, h))
        for read in (open_image, open_mask):
            with pytest.raises(DataError, match='b.png'): read(tmp_path/'b.png')

def test_archives(tmp_path):
    def npy(shape): f = io.BytesIO(); np.lib.format.write_array_header_1_0(f, dict(descr='<f2', fortran_order=False, shape=shape)); return f.getvalue()
    with zipfile.ZipFile(tmp_path/'lie.npz', 'w') as z: z.writestr('classes.npy', npy((10**12,)) + b'\0'*8); z.writestr('maps.npy', npy((10**6, 10**6, 10**6)))
    with zipfile.ZipFile(tmp_path/'bomb.npz', 'w', zipfile.ZIP_DEFLATED) as z:
        with z.open('maps.npy', 'w', force_zip64=True) as f: f.write(npy((2**31,))); [f.write(bytes(2**20)) for _ in range(8)]
        z.writestr('classes.npy', npy((0,)))
    for name in ('lie', 'bomb'):
        with pytest.raises(DataError, match='bytes for an array of'): read_arrays(tmp_path/f'{name}.npz', ('maps',))
    with pytest.raises(DataError, match='more than'): read_arrays(tmp_path/'bomb.npz', ('maps',), limit=2**20)

def test_outlines(tmp_path):
    "Corners and run lengths far outside of the photo, which compiled code would follow"
    pytest.importorskip('pycocotools')
    for d in ('annotations', 'val2014'): (tmp_path/d).mkdir()
    Image.new('RGB', (16, 8)).save(tmp_path/'val2014/x.png')
    for seg in ([[0, 0, 1e9, 0, 1e9, 1e9]], [[0, 0, float('nan'), 1, 2, 2]], dict(size=[10**6, 10**6], counts=[10**12]), dict(size=[8, 16], counts=[-5, 133]), dict(size=[8, 16], counts='zzzzzzzzzz')):
        ann = dict(id=1, image_id=1, category_id=1, segmentation=seg); js = dict(images=[dict(id=1, file_name='x.png', width=16, height=8)], categories=[dict(id=1, name='cat')], annotations=[ann])
        (tmp_path/'annotations/instances_val2014.json').write_text(json.dumps(js))
        with pytest.raises(DataError, match='annotation 1'): get_dataset(f'coco:{tmp_path}', 'val').mask(0)

def test_matlab_file_that_ends_scipy(tmp_path):
    from scipy.io import savemat
    savemat(tmp_path/'a.mat', dict(GTcls=dict(Segmentation=np.ones((3, 4), np.uint8)))); good = (tmp_path/'a.mat').read_bytes(); assert (read_sbd_mask(tmp_path/'a.mat', 20)==1).all()
    for i in range(128, len(good), 3):
        (tmp_path/'a.mat').write_bytes(good[:i] + b'\xb4' + good[i+1:])
        try: assert read_sbd_mask(tmp_path/'a.mat', 20).size
        except DataError: pass

@pytest.mark.slow
def test_memory_is_bounded(tmp_path):
    (tmp_path/'b.png').write_bytes(png(9_000, 9_000))      # allowed: 81 million pixels
    r = limited(f'from mctformer_nb.core import open_image, DataError\ntry: open_image({str(tmp_path/"b.png")!r})\nexcept DataError as e: print("refused")'); assert r.returncode==0, r.stderr
    with zipfile.ZipFile(tmp_path/'bomb.npz', 'w', zipfile.ZIP_DEFLATED) as z:
        with z.open('maps.npy', 'w', force_zip64=True) as f:
            np.lib.format.write_array_header_1_0(f, dict(descr='<f2', fortran_order=False, shape=(5*2**29,))); [f.write(bytes(2**24)) for _ in range(320)]
    r = limited(f'from mctformer_nb.core import read_arrays, DataError\ntry: read_arrays({str(tmp_path/"bomb.npz")!r}, ("maps",))\nexcept DataError as e: print(e)'); assert r.returncode==0 and 'more than' in r.stdout, r.stderr

# ---- pages

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(1)>'

def test_demo_page_escapes_names(tmp_path):
    from mctformer_nb.demo import write_report
    name = HOSTILE.replace('/', '')                        # a file name has none
    (tmp_path/'figures').mkdir(); Image.new('RGB', (2, 2)).save(tmp_path/'figures'/f'{name}.png')
    page = write_report(tmp_path, [dict(map=HOSTILE, miou=1., fp=1., fn=1., threshold=.5, paper=None)], [dict(step=HOSTILE, miou=1., where=HOSTILE, paper=2.)], {HOSTILE: HOSTILE}, {f'{name}.png': HOSTILE}).read_text(encoding='utf-8')
    assert '<script>' not in page and '<img src=x' not in page and page.count('&lt;script&gt;')>=6

def test_run_report_escapes_names(tmp_path):
    report = pytest.importorskip('mctformer_nb.report')
    run = tmp_path/'run'; save_run(MCTformer(2, 'v2', 'vit_tiny_patch16_224', img_size=32, depth=1), run, classes=[HOSTILE, 'b'], image_size=32, train=dict(data=HOSTILE))
    (run/'history.csv').write_text('epoch,train_loss,valid_loss,map_cls,map_patch,lr,seconds\n1,1.0,,,,0.001,1\n')
    report.write_run_report(run); page = (run/'report.html').read_text(encoding='utf-8')
    assert '<script>alert' not in page and 'onerror=alert(1)>' not in page and '&lt;script&gt;' in page

def test_pick_page_escapes_names(tmp_path):
    from mctformer_nb.pick import Doubt, write_picks
    ds = get_dataset('mini', n=1, size=32); ds.classes = [HOSTILE]*8; Image.fromarray(ds.mask(0)).save(tmp_path/f'{ds.ids[0]}.png')
    page = write_picks([Doubt(ds.ids[0], [0], 1., 0., 0., (HOSTILE,))], ds, tmp_path, tmp_path/'out').read_text(encoding='utf-8')
    assert '<script>' not in page and '<img src=x' not in page and page.count('&lt;script&gt;')==2
