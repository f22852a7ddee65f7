"Files from elsewhere: nothing in them is run, and whatever is wrong with them is one clear error"
import os, pickle, random, sys
import numpy as np
import pytest
from mctformer_nb.core import DataError, write_json
from mctformer_nb.datasets import get_dataset
from mctformer_nb.interchange import (export_maps, from_pretrained, import_coco, import_reference_seeds, mask_to_rle, push_to_hub,
                                      read_reference_seed, rle_to_mask, save_pretrained)
from mctformer_nb.seeds import save_seed

def saved(path, obj, protocol=3):
    "An .npy file of one object, as `np.save` writes it"
    a = np.empty((), object); a[()] = obj
    with open(path, 'wb') as f:
        np.lib.format.write_array_header_1_0(f, dict(descr='|O', fortran_order=False, shape=()))
        f.write(obj) if isinstance(obj, bytes) else pickle.dump(a, f, protocol)
    return path

class Calls:
    def __init__(self, f, *args): self.how = f, args
    def __reduce__(self): return self.how

def test_no_file_runs_code(tmp_path):
    left = tmp_path/'left'
    evil = [Calls(os.system, f'touch {left}'), Calls(exec, f'open({str(left)!r}, "w")'), Calls(eval, '1'), Calls(np.load, 'x'), Calls(getattr, 'x', 'upper'),
            Calls(bytearray, 10**12), Calls(np.ndarray, (10**6, 10**6))]
    for e in evil:
        for obj in (e, {0: e}, {0: np.zeros((2, 2), np.float32), 1: e}):
            for protocol in (2, 3, 4, 5):
                with pytest.raises(DataError, match='nothing in the file was run'): read_reference_seed(saved(tmp_path/'x.npy', obj, protocol))
    for code in (b'cposix\nsystem\n(S"touch %s"\ntR.' % str(left).encode(), b'\x80\x02ios\nsystem\n.', b'(S"touch x"\nios\nsystem\n.', b'\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x01x\x85R.'):
        with pytest.raises(DataError): read_reference_seed(saved(tmp_path/'x.npy', code))
    assert not left.exists()

def test_damaged_reference_seeds(tmp_path):
    "Cut off anywhere and with changed bytes: either an error, or a dictionary of arrays"
    a = np.random.default_rng(0).random((3, 4)).astype(np.float32); path = saved(tmp_path/'x.npy', {3: a, 7: a+1}); good = path.read_bytes(); rng = random.Random(0)
    assert read_reference_seed(path).keys()=={3, 7}
    for n in range(len(good)):
        path.write_bytes(good[:n])
        with pytest.raises(DataError): read_reference_seed(path)
    for _ in range(400):
        b = bytearray(good); b[rng.randrange(len(b))] = rng.randrange(256); path.write_bytes(b)
        try: found = read_reference_seed(path)
        except DataError: continue
        assert all(type(k) is int and isinstance(v, np.ndarray) and v.dtype.kind in 'fiu' and v.ndim==2 for k,v in found.items())

def test_bad_names_stay_outside(tmp_path):
    (tmp_path/'in').mkdir(); saved(tmp_path/'out.npy', {0: np.zeros((2, 2), np.float32)})
    r = import_reference_seeds(tmp_path/'in', tmp_path/'seeds', ids=['../out'])
    assert r['written']==0 and 'leaves the data folder' in r['bad'][0][1] and not (tmp_path/'out.npz').exists()

def test_rle_refuses_what_does_not_add_up():
    region = np.random.default_rng(0).random((9, 13))>.5; rle = mask_to_rle(region); rng = random.Random(0)
    for _ in range(500):
        counts = list(rle['counts']); counts[rng.randrange(len(counts))] = chr(rng.randrange(32, 127))
        try: got = rle_to_mask(dict(rle, counts=''.join(counts)))
        except DataError: continue
        assert got.shape==(9, 13) and got.dtype==bool
    for size in ([9], [0, 0], [9.0, 13], [-9, -13], None, ['9', '13'], [2**40, 2**40]):
        with pytest.raises(DataError, match='is not a region'): rle_to_mask(dict(size=size, counts=rle['counts']))
    with pytest.raises(DataError): rle_to_mask(dict(size=[9, 13], counts=[2**63, -2**63+117]))

@pytest.mark.parametrize('coco', [[], {}, 3, dict(images=[{}], annotations=[]), dict(images=[], annotations=[dict(image_id=1)])])
def test_not_a_coco_file(tmp_path, coco):
    write_json(tmp_path/'c.json', coco)
    with pytest.raises(DataError, match='not a COCO file'): import_coco(tmp_path/'c.json', ['cat'], tmp_path/'out')

def test_reference_files_are_what_numpy_reads(tmp_path):
    ds = get_dataset('mini', n=2, size=32)
    for id in ds.ids: save_seed(tmp_path/f's/{id}.npz', ds.labels(id), np.random.rand(len(ds.labels(id)), 32, 32))
    export_maps(tmp_path/'s', ds, tmp_path/'r', 'reference')
    for id in ds.ids:
        theirs = np.load(tmp_path/f'r/{id}.npy', allow_pickle=True).item()
        assert list(theirs)==ds.labels(id).tolist() and all(v.dtype==np.float32 and v.shape==(32, 32) for v in theirs.values())

def test_hub_is_asked_only_by_name(tmp_path, monkeypatch):
    from mctformer_nb.mctformer import MCTformer
    asked = []
    class Hub:
        @staticmethod
        def snapshot_download(name, revision, allow_patterns): asked.append((name, revision, tuple(allow_patterns))); return str(tmp_path/'m')
    monkeypatch.setitem(sys.modules, 'huggingface_hub', Hub)
    save_pretrained((MCTformer(2, backbone='mct_tiny_patch8_96'), ['cat', 'dog']), tmp_path/'m')
    from_pretrained(tmp_path/'m'); assert not asked
    assert from_pretrained('some/one', 'v1')[1]['classes']==['cat', 'dog']
    assert asked==[('some/one', 'v1', ('config.json', 'model.safetensors'))]
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    for ask in (lambda: from_pretrained('some/one'), lambda: push_to_hub(tmp_path/'m', 'some/one')):
        with pytest.raises(DataError, match=r'mctformer_nb\[hub\]'): ask()
