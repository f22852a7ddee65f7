"ONNX files of networks, computed by onnxruntime and compared with torch; skipped where the extra is not installed (pip install onnx onnxruntime)"
import json, os, re, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from mctformer_nb import cli
from mctformer_nb.datasets import get_dataset

pytestmark = pytest.mark.slow

@pytest.fixture(autouse=True)
def installed():
    for name in ('onnx', 'onnxruntime'): pytest.importorskip(name, reason=f'{name} is not installed: pip install "mctformer_nb[onnx]"')

def photos(n, size, root):
    cat = Image.open(root/'mctformer_nb/data/cat.jpg').convert('RGB')
    return np.stack([np.asarray(cat.rotate(90*i).resize((size, size))) for i in range(n)])

@pytest.mark.parametrize('size,n', [(320, 1), (224, 3), ((192, 256), 2)])
def test_the_network_in_the_package(tmp_path, root, size, n):
    "DeepLab on EfficientNet-Lite0: probabilities as torch's, and so the same mask but for ties"
    from mctformer_nb.onnx_file import onnx_difference, photo_network, write_onnx
    import onnxruntime, torch
    r = write_onnx(None, tmp_path/'animals.onnx', size); h, w = np.broadcast_to(size, 2)
    x = np.stack([np.asarray(Image.fromarray(p).resize((w, h))) for p in photos(n, 300, root)])
    d = onnx_difference(r.path, None, x); print(d); assert d['probabilities']<1e-4
    session = onnxruntime.InferenceSession(str(r.path)); found = np.concatenate([session.run(None, dict(photos=y[None]))[0] for y in x])
    assert found.shape==(n, 21, h, w) and json.loads(session.get_modelmeta().custom_metadata_map['classes'])[7]=='cat'
    with torch.no_grad(): ours = photo_network(None)[0](torch.from_numpy(x)).numpy()
    assert (found.argmax(1)==ours.argmax(1)).mean()>.9999

@pytest.mark.parametrize('variant,kind,rule', [('v2', 'fused', 'reference'), ('v2', 'patchcam', 'paper'), ('v1', 'attn', 'plus')])
def test_classifiers_with_their_maps(tmp_path, variant, kind, rule):
    from mctformer_nb.mctformer import MCTformer
    from mctformer_nb.onnx_file import onnx_difference, write_onnx
    import torch
    torch.manual_seed(0); model = MCTformer(8, variant=variant, backbone='mct_tiny_patch8_96', pretrained=True).eval(); ds = get_dataset('mini', n=3)
    run, x, how = (model, [f'c{i}' for i in range(8)]), np.stack([np.asarray(ds.image(i)) for i in range(3)]), dict(kind=kind, layers=3, rule=rule)
    for size in (96, 128):                                                        # its own, and one that needs other position rows
        y = np.stack([np.asarray(Image.fromarray(p).resize((size, size))) for p in x])
        d = onnx_difference(write_onnx(run, tmp_path/f'{size}.onnx', size, **how).path, run, y, **how); print(variant, kind, rule, size, d); assert max(d.values())<1e-4

def test_a_frozen_network(tmp_path):
    from mctformer_nb.frozen import FrozenCAM
    from mctformer_nb.onnx_file import onnx_difference, write_onnx
    from mctformer_nb.runs import packaged_weights
    import torch
    torch.manual_seed(0); net = FrozenCAM(3, pretrained=packaged_weights('tf_efficientnet_lite0')).eval(); ds = get_dataset('mini', n=2, size=224)
    x, run = np.stack([np.asarray(ds.image(i)) for i in range(2)]), (net, ['a', 'b', 'c'])
    d = onnx_difference(write_onnx(run, tmp_path/'f.onnx', 224).path, run, x); print(d); assert max(d.values())<1e-4

def test_the_page_without_torch(tmp_path, root):
    "The lines of the tutorial run where torch cannot be imported"
    nb = json.loads((root/'nbs/tutorials/onnx.ipynb').read_text(encoding='utf-8'))
    code = next(m[1] for c in nb['cells'] if (m := re.search(r'```python\n(.*?)```', ''.join(c['source']), re.S)))
    assert cli.mct_convert(['packaged', '--onnx', str(tmp_path/'animals.onnx'), '--image-size', '320']) == 0
    (tmp_path/'cat.jpg').write_bytes((root/'mctformer_nb/data/cat.jpg').read_bytes())
    block = 'import sys\nfor m in ("torch", "torchvision", "timm", "fastai", "mctformer_nb"): sys.modules[m] = None\n'
    r = subprocess.run([sys.executable, '-c', block+code], cwd=tmp_path, env=dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))), capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    mask = np.asarray(Image.open(tmp_path/'mask.png')); assert mask.shape==Image.open(tmp_path/'cat.jpg').size[::-1] and (mask==8).mean()>.1 and 'cat' in r.stdout
