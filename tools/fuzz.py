#!/usr/bin/env python
"""Damaged input for every reader of files: each must return or raise `DataError`, whatever the file holds.

    python tools/fuzz.py --seconds 20                   all readers, 20 s each; a table, exit status 1 after a crash
    python tools/fuzz.py --seconds 60 --only coco seed --crashes crashes

An execution takes a good file, damages it (bytes, members of an archive, values of a JSON) and reads it. A crash is any other exception, the death of the process, more than 4 GB of memory or 20 seconds of the processor for one file."""
import argparse, io, json, mmap, os, random, resource, shutil, struct, sys, tempfile, time, zipfile
from pathlib import Path
import numpy as np
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mctformer_nb.core import DataError

# ---- damage

ODD_BYTES = [b'\0', b'\xff'*4, b'\x7f\xff\xff\xff', b'\xff\xff\xff\x7f', b'\0'*8, b'\xef\xbb\xbf', b'\r', b'\n', b',', b';', b'"', b'../', b'<', b'&x;', b']', b'}', b'1e999', b'NaN', b'-1', b'9'*20, b'\xed\xa0\x80', b'\\u0000', b'('*50]
ODD_VALUES = [None, True, -1, 0, 2**31, 2**63, 1e308, float('nan'), float('inf'), 1.5, '', '../x', '/etc/passwd', 'x'*300, 'é\0', [], {}, [[]], [[1]], [-1e9, 1e9]*3, [[-1e9, 1e9, 1e9, 1e9, 0, 0]], dict(size=[10**6, 10**6], counts=[10**12]), dict(size=[64, 96], counts='~~~~')]

def bytes_damaged(b, rng):
    "A few random changes of bytes"
    b = bytearray(b)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        i, kind = rng.randint(0, len(b)), rng.randint(0, 5)
        if kind==0 and i<len(b): b[i] ^= 1 << rng.randint(0, 7)
        elif kind==1 and i<len(b): b[i] = rng.randint(0, 255)
        elif kind==2: b[i:i] = rng.choice(ODD_BYTES)
        elif kind==3: del b[i:i+rng.choice((1, 4, 50))]
        elif kind==4: n = rng.choice((1, 8, 100)); j = rng.randint(0, len(b)); b[i:i] = b[j:j+n]
        else: o = rng.choice(ODD_BYTES); b[i:i+len(o)] = o
    return bytes(b[:rng.randint(0, len(b))] if rng.randint(0, 9)==0 else b)

def json_damaged(b, rng):
    "A JSON with some of its values exchanged, removed or added"
    try: js = json.loads(b)
    except ValueError: return bytes_damaged(b, rng)
    for _ in range(rng.choice((1, 1, 2, 5))):
        here = js
        while isinstance(here, (dict, list)) and here:
            k = rng.choice(sorted(here, key=str)) if isinstance(here, dict) else rng.randint(0, len(here)-1)
            if rng.randint(0, 2)==0 or not isinstance(here[k], (dict, list)) or not here[k]:
                if (do := rng.randint(0, 5))==0: del here[k]
                elif do==1 and isinstance(here, list): here.append(here[k])
                else: here[k] = json.loads(json.dumps(rng.choice(ODD_VALUES)))
                break
            here = here[k]
    return json.dumps(js).encode()

def zip_damaged(b, rng):
    "An archive whose checksums are right although a member is damaged"
    try:
        with zipfile.ZipFile(io.BytesIO(b)) as z: members = {n: z.read(n) for n in z.namelist()}
    except Exception: return bytes_damaged(b, rng)
    name, out = rng.choice(sorted(members)), io.BytesIO(); members[name] = bytes_damaged(members[name], rng)
    with zipfile.ZipFile(out, 'w', rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)) if not name.endswith('.pkl') else zipfile.ZIP_STORED) as z:
        for n,v in members.items(): z.writestr(n, v)
    return out.getvalue()

def damaged(b, rng):
    "`b` with a damage that fits its kind, or one of bytes"
    if rng.randint(0, 2)==0: return bytes_damaged(b, rng)
    return zip_damaged(b, rng) if b[:2]==b'PK' else json_damaged(b, rng) if b[:1] in b'{[' and b[:1] else bytes_damaged(b, rng)

# ---- readers: (good files, path below the folder, what reads it); folders are prepared once

def in_bytes(f):
    "What `f(path)` writes"
    with tempfile.TemporaryDirectory() as d: f(Path(d)/'x'); return next(p for p in Path(d).iterdir()).read_bytes()

def photo(side=16, mode='RGB'):
    from PIL import Image
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3)).astype(np.uint8)).convert(mode)

def saved(im, **kw): f = io.BytesIO(); im.save(f, **kw); return f.getvalue()

def both_ways(f):
    "Read strictly, then leaving out what is bad"
    try: f('raise')
    except DataError: pass
    f('skip')

def use(ds):
    "Everything a stage asks of a data set"
    for i in range(len(ds)):
        for ask in (ds.labels, ds.mask):
            try: ask(i)
            except DataError: pass

def target_labels(root):
    from mctformer_nb.datasets import folder_dataset
    (root/'images').mkdir(); [photo().save(root/f'images/{n}.png') for n in ('a', 'b c', 'd.e')]; (root/'classes.txt').write_text('cat\ndog\n')
    good = [b'image,labels\na.png,cat;dog\nb c.png,dog\nd.e,cat\n', b'\xef\xbb\xbflabels,image,note\r\n"cat",a.png,x\r\n', b'image,labels\n"a.png","cat;\ndog"\n']
    return good, 'labels.csv', lambda p: both_ways(lambda how: use(folder_dataset(root, 'all', on_bad=how)))

def target_tables(root):
    "labels in other forms: one column a class, lists, separators of spreadsheets; without a list of classes"
    from mctformer_nb.datasets import folder_dataset
    (root/'images').mkdir(); [photo().save(root/f'images/{n}.png') for n in ('a', 'b c', 'd.e')]
    good = [b'filename,cat,dog\na.png,1,0\nb c.png,0,1\n', b'File Name;Tags\r\na.png;cat,dog\r\n"b c.png";none\r\n', 'image\tlabels\na\tcat|dog\n'.encode('utf-16'), b'image,labels\na,"[\'cat\', \'dog\']"\nd.e,"[]"\n', b'image,class,x\na,cat,1\na,dog,2\n']
    return good, 'labels.csv', lambda p: both_ways(lambda how: use(folder_dataset(root, 'all', on_bad=how)))

def target_vectors(root):
    "cls_labels.npy of other code bases"
    from mctformer_nb.datasets import folder_dataset
    (root/'images').mkdir(); [photo().save(root/f'images/{n}.png') for n in 'ab']
    return [arrays(np.save, arr=np.array({'a': np.eye(20, dtype=np.float32)[3], 'b': np.zeros(20, np.float32)}, dtype=object), allow_pickle=True)], 'cls_labels.npy', lambda p: use(folder_dataset(root, 'all'))

def target_colours(root):
    "labelmap.txt beside masks in colours"
    from mctformer_nb.datasets import folder_dataset
    (root/'images').mkdir(); (root/'masks').mkdir(); photo().save(root/'images/a.png'); photo(mode='1').convert('RGB').save(root/'masks/a.png'); (root/'labels.csv').write_text('image,labels\na,cat\n')
    return [b'# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:255,255,255::\n'], 'labelmap.txt', lambda p: use(folder_dataset(root, 'all'))

def target_classes(root):
    from mctformer_nb.datasets import folder_dataset
    (root/'images').mkdir(); photo().save(root/'images/a.png'); (root/'labels.csv').write_text('image,labels\na,cat\n')
    return [b'cat\ndog\n', b'\xef\xbb\xbfcat\r\n\r\ndog'], 'classes.txt', lambda p: both_ways(lambda how: folder_dataset(root, on_bad=how))

def target_split(root):
    from mctformer_nb.datasets import folder_dataset
    for d in ('images', 'splits'): (root/d).mkdir()
    for n in 'abc': photo().save(root/f'images/{n}.png')
    (root/'labels.csv').write_text('image,labels\na,cat\n')
    return [b'a\nb.png\n', b'c\r\n'], 'splits/val.txt', lambda p: both_ways(lambda how: (folder_dataset(root, 'val', on_bad=how), folder_dataset(root, on_bad=how)))

def target_voc(root):
    from mctformer_nb.datasets import voc_dataset
    for d in ('Annotations', 'JPEGImages', 'ImageSets/Segmentation'): (root/d).mkdir(parents=True)
    photo().save(root/'JPEGImages/a.jpg'); (root/'ImageSets/Segmentation/train.txt').write_text('a\n')
    good = [b'<annotation><object><name>cat</name><part><name>head</name></part></object></annotation>', b'<?xml version="1.0" encoding="utf-8"?><annotation><size><width>5</width></size><object><name>dog</name></object></annotation>']
    return good, 'Annotations/a.xml', lambda p: both_ways(lambda how: use(voc_dataset(root, on_bad=how).readable()))

def target_voc_list(root):
    from mctformer_nb.datasets import voc_dataset
    (root/'ImageSets/Segmentation').mkdir(parents=True)
    return [b'2007_000001\n2007_000002\n', b'/JPEGImages/a.jpg /SegmentationClassAug/a.png\r\nb\r\n'], 'ImageSets/Segmentation/train.txt', lambda p: both_ways(lambda how: use(voc_dataset(root, on_bad=how)))

def target_coco(root):
    from mctformer_nb.datasets import coco_dataset
    for d in ('annotations', 'val2014'): (root/d).mkdir()
    ann = dict(id=2, image_id=1, category_id=4, iscrowd=0, area=100, segmentation=[[0, 0, 10, 0, 10, 10, 0, 10]])
    crowd = dict(ann, id=3, iscrowd=1, segmentation=dict(size=[64, 96], counts=[64*80, 64*16])); packed = dict(ann, id=4, segmentation=dict(size=[64, 96], counts='PPYo1'))
    js = dict(images=[dict(id=1, file_name='x.png', width=96, height=64), dict(id=5, file_name='s/y.png', width=96, height=64)], categories=[dict(id=4, name='cat'), dict(id=9, name='dog')], annotations=[ann, crowd, packed, dict(ann, id=6, image_id=5, category_id=9)])
    return [json.dumps(js).encode()], 'annotations/instances_val2014.json', lambda p: both_ways(lambda how: use(coco_dataset(root, 'val', on_bad=how)))

def arrays(f, **kw): o = io.BytesIO(); f(o, **kw); return o.getvalue()

def target_seed(root):
    from mctformer_nb.artifacts import is_complete, load_seed
    from mctformer_nb.scores import read_seed
    kw = dict(classes=np.array([0, 3]), maps=np.random.default_rng(0).random((2, 6, 7)).astype(np.float16))
    def read(p):
        is_complete(p); load_seed(p); read_seed(p)
    return [arrays(np.savez, **kw), arrays(np.savez_compressed, **kw)], 'a.npz', read

def target_label(root):
    from mctformer_nb.artifacts import is_complete, load_crf_label
    p = np.random.default_rng(0).random((3, 6, 7)).astype(np.float16); kw = dict(classes=np.array([0, 3]), low=p, high=p)
    return [arrays(np.savez, **kw), arrays(np.savez_compressed, **kw)], 'a.npz', lambda p: (is_complete(p), load_crf_label(p))

def target_photo(root):
    from mctformer_nb.core import image_size, open_image
    from mctformer_nb.images import photo_formats
    exif = photo().getexif(); exif[0x0112] = 6
    good = [saved(photo(), format=f) for f in photo_formats() if f!='HEIF'] + [saved(photo(), format='JPEG', exif=exif), saved(photo(mode='CMYK'), format='JPEG'), saved(photo(mode='P'), format='PNG'), saved(photo(mode='RGBA'), format='PNG')]
    def read(p):
        try: image_size(p)
        except DataError: pass
        open_image(p)
    return good, 'a.img', read

def target_mask(root):
    from mctformer_nb.core import open_mask
    return [saved(photo(mode=m), format='PNG') for m in ('L', 'P', '1')] + [saved(photo(mode='1').convert('RGB'), format='PNG'), saved(photo(mode='L'), format='TIFF'), saved(photo(mode='1').convert('L'), format='JPEG')], 'a.png', lambda p: open_mask(p, (16, 16))

def tiny_state():
    import torch
    from timm.models.vision_transformer import VisionTransformer
    from mctformer_nb.mctformer import MCTformer
    return MCTformer(2, 'v2', VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1, num_classes=0)).state_dict()

def target_checkpoint(root):
    import torch
    from mctformer_nb.mctformer import load_reference
    sd = tiny_state(); sd['pos_embed'] = torch.cat([sd.pop('pos_embed_cls'), sd.pop('pos_embed_pat')], 1)
    return [in_bytes(lambda p: torch.save(dict(model=sd), p)), in_bytes(lambda p: torch.save(sd, p, _use_new_zipfile_serialization=False))], 'a.pth', load_reference

def target_safetensors(root):
    from safetensors.torch import save
    from mctformer_nb.vit import read_state_dict
    return [save({k: v.contiguous() for k,v in tiny_state().items()})], 'a.safetensors', read_state_dict

def target_run(root):
    "config.json of a run folder"
    import torch
    from timm.models.vision_transformer import VisionTransformer
    from mctformer_nb.mctformer import MCTformer, load_run, save_run
    save_run(MCTformer(2, 'v2', 'vit_tiny_patch16_224', img_size=32, depth=1), root, classes=['a', 'b'], image_size=32)
    return [(root/'config.json').read_bytes()], 'config.json', lambda p: load_run(root)

def target_state(root):
    "resume.pt of a training"
    import torch
    from mctformer_nb.learner import open_run
    state = dict(epoch=1, history=[dict(epoch=1, train_loss=.5)], best=-1., settings=json.dumps(dict(a=1)), model=dict(w=torch.ones(3)), opt=dict(state={}, param_groups=[]), scaler={})
    return [in_bytes(lambda p: torch.save(state, p))], 'resume.pt', lambda p: open_run(root, dict(a=1))

def target_params(root):
    from mctformer_nb.resnet38 import read_mxnet
    def one(name, v): return name, struct.pack('<IiI', 0xF993FAC9, 0, v.ndim) + struct.pack(f'<{v.ndim}q', *v.shape) + struct.pack('<iii', 1, 0, 0) + v.astype('<f4').tobytes()
    items = [one('arg:a', np.ones((2, 3))), one('aux:b', np.ones(4))]
    good = struct.pack('<QQQ', 0x112, 0, len(items)) + b''.join(b for _,b in items) + struct.pack('<Q', len(items)) + b''.join(struct.pack('<Q', len(n)) + n.encode() for n,_ in items)
    return [good], 'a.params', read_mxnet

def target_sbd(root):
    from scipy.io import savemat
    from mctformer_nb.voc import read_sbd_mask
    def mat(**kw): o = io.BytesIO(); savemat(o, dict(GTcls=dict(Segmentation=np.arange(12, dtype=np.uint8).reshape(3, 4), Boundaries=0)), **kw); return o.getvalue()
    return [mat(), mat(do_compression=True)], 'a.mat', lambda p: read_sbd_mask(p, 20)

def target_reference(root):
    "the reference's .npy seeds: a dictionary of arrays, pickled inside an array of one object"
    import pickle
    from mctformer_nb.interchange import read_reference_seed
    maps = np.random.default_rng(0).random((2, 6, 7)).astype(np.float32); seeds = [{0: maps[0], 3: maps[1]}, {np.int64(4): maps[0].T}]
    def one(seed, protocol):
        o = io.BytesIO(); np.lib.format.write_array_header_1_0(o, dict(descr='|O', fortran_order=False, shape=())); pickle.dump(np.array(seed, dtype=object), o, protocol=protocol)
        return o.getvalue()
    return [arrays(np.save, arr=seeds[0], allow_pickle=True), one(seeds[0], 2), one(seeds[1], 3), one(seeds[0], 4)], 'a.npy', read_reference_seed

def target_json(root):
    from mctformer_nb.core import read_json
    from mctformer_nb.random_walk import background_score
    def read(p): read_json(p); background_score(p)
    return [json.dumps(dict(best_threshold=.4, miou=[1, 2, None], per_class=dict(cat=dict(iou=5.)))).encode()], 'a.json', read

TARGETS = {k[7:]: f for k,f in globals().items() if k.startswith('target_')}

# ---- a campaign

def attack(name, rng, root, runs, seconds, note):
    "Damage and read until `runs` or `seconds` are over; `note(n)` after every execution"
    root.mkdir(parents=True, exist_ok=True); good, where, read = TARGETS[name](root); path, end, n = root/where, time.monotonic()+seconds, 0
    for b in good: path.write_bytes(b); read(path)          # undamaged, all is well
    while n<runs and time.monotonic()<end:
        b = damaged(rng.choice(good), rng); path.write_bytes(b)
        try: read(path)
        except DataError as e: assert str(e).count('. ')>=1 and str(e).endswith(('.', '?')), f'no advice in {e}'
        n += 1; note(n)
    return n

def child(name, seed, root, seconds, shared):
    "`attack` in a process of its own, within limits"
    pid = os.fork()
    if pid: return pid
    try:
        os.dup2(os.open(root.parent/f'{root.name}.txt', os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2); os.dup2(2, 1)
        now = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize(); resource.setrlimit(resource.RLIMIT_AS, (now+2**32, now+2**32))
        attack(name, random.Random(seed), root, 10**9, seconds, lambda n: shared.__setitem__(slice(0, 8), struct.pack('<Q', n)))
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc(); sys.stderr.flush(); os._exit(3)

def cpu(pid):
    "Processor seconds of a process"
    return sum(map(int, Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[11:13]))/os.sysconf('SC_CLK_TCK')

def campaign(name, seconds, crashes, seed=0):
    "(executions, crashes) of one reader; a crashed process is replaced until the time is over"
    import warnings; warnings.simplefilter('ignore')
    end, total, found = time.monotonic()+seconds, 0, []
    while (left := end-time.monotonic())>.5:
        with tempfile.TemporaryDirectory() as d:
            root, shared = Path(d)/name, mmap.mmap(-1, 8); pid, was, since = child(name, seed+len(found)*1000, root, left, shared), -1, 0.
            while not (done := os.waitpid(pid, os.WNOHANG))[0]:
                n = struct.unpack('<Q', shared[:8])[0]
                if n!=was: was, since = n, cpu(pid)
                elif cpu(pid)-since>(20 if n else 60): os.kill(pid, 9)          # seconds of its own, whatever else the machine does; the first one pays for imports
                time.sleep(.05)
            total += struct.unpack('<Q', shared[:8])[0]; status = os.waitstatus_to_exitcode(done[1])
            if not status: continue
            total += 1; said = Path(f'{root}.txt').read_text(errors='replace').strip().splitlines(); why = said[-1] if status==3 and said else f'ended with {status}'
            found.append(why[:200])
            if crashes: dst = Path(crashes)/f'{name}_{len(found)}'; shutil.rmtree(dst, ignore_errors=True); shutil.copytree(root, dst); Path(f'{dst}.txt').write_text('\n'.join(said))
            if len(found)>=20: break
    return total, found

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seconds', type=float, default=20, help='for each reader'); p.add_argument('--only', nargs='+', choices=sorted(TARGETS), default=list(TARGETS))
    p.add_argument('--crashes', metavar='DIR', help='keep what crashed'); p.add_argument('--json', metavar='FILE', help='write the counts'); p.add_argument('--seed', type=int, default=0)
    a = p.parse_args(); rows = {}
    for name in a.only:
        n, found = campaign(name, a.seconds, a.crashes, a.seed); rows[name] = dict(executions=n, crashes=len(found))
        print(f'{name:12s} {n:8d} executions {len(found):4d} crashes', *dict.fromkeys(found), sep='\n    ' if found else '', flush=True)
    total = {k: sum(r[k] for r in rows.values()) for k in ('executions', 'crashes')}; print(f'{"all":12s} {total["executions"]:8d} executions {total["crashes"]:4d} crashes')
    if a.json: Path(a.json).write_text(json.dumps(dict(readers=rows, **total, seconds=a.seconds, seed=a.seed), indent=1)+'\n')
    return bool(total['crashes'])

if __name__=='__main__':
    import torch
    torch.set_num_threads(1); sys.exit(main())
