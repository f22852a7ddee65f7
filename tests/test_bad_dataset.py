"A data set in which many images are broken, each in its own way: every command finishes, names what it left out, and does the rest"
import json, os, re
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from mctformer_nb import cli, cli_masks
from mctformer_nb.core import open_mask, save_mask
from mctformer_nb.mini import draw_scene, mini_classes
from mctformer_nb.seeds import load_seed

SIDE, NAMES = 32, mini_classes()
pytestmark = pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')

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
    status, err = run('mct_train', train+' --skip-bad', capfd, work); assert status==0; total += named(err, how, 'table', 'line', 'photo')
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
    train = f'{common} --labels labels --out affinity --backbone test_resnet --crop 32 --batch-size 16 --epochs 1 --device cpu --skip-bad'
    status, err = run('mct_affinity', train, capfd, work); assert status==0; total += named(err, how, 'table', 'line')
    status, err = run('mct_masks', f'{common} --seeds seeds --affinity affinity --out masks --background score.json --device cpu', capfd, work); assert status==1
    total += named(err, how, 'table', 'line'); assert len(list((work/'masks').glob('*.png')))==usable and all(id in err for id in ids('photo'))
    train = f'{common} --masks {{}} --out {{}} --backbone test_efficientnet --dilation 1 --crop 32 --batch-size 16 --epochs 1 --device cpu'
    assert run('mct_segment_train', train.format('truth', 'deeplab'), capfd, work)[0]==2
    status, err = run('mct_segment_train', train.format('truth', 'supervised')+' --skip-bad', capfd, work); assert status==0
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
