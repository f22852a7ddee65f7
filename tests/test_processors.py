"Other processors round differently: what is asserted of measured numbers holds with other instructions, other numbers of threads and other seeds, and not just so"
import os, subprocess, sys
from pathlib import Path
import pytest, torch
sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'tools')); import margins

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
SETTINGS = dict( # torch's own kernels and oneDNN's, as older processors have them; and the order of sums over threads
    default=dict(ATEN_CPU_CAPABILITY='default', ONEDNN_MAX_CPU_ISA='SSE41', OMP_NUM_THREADS='1'),
    avx2=dict(ATEN_CPU_CAPABILITY='avx2', ONEDNN_MAX_CPU_ISA='AVX2', OMP_NUM_THREADS='1'),
    mixed=dict(ATEN_CPU_CAPABILITY='default', ONEDNN_MAX_CPU_ISA='AVX2', OMP_NUM_THREADS='2'),
    one=dict(OMP_NUM_THREADS='1'), two=dict(OMP_NUM_THREADS='2'), seeds=dict(OMP_NUM_THREADS='1', MCT_SEED_SHIFT='1000'))
# what trains or rounds within seconds: networks, maps, 8 bits, labels, walks, masks
NOTEBOOKS = ('000_paper 02_datasets 06_views 09_learner 10_vit 10a_fused_cnn 11_mctformer 12_train 13_baselines 16_frozen 20_affinity 20a_other_affinity 21_attention 21a_fast_maps 22_seeds 23a_par 24_crf '
             '24a_consensus 25_self_training 26_no_masks 27_regions 28_resnet38 29_backbones 30_affinitynet 31_random_walk 40_deeplab_net 41_deeplab 42_segment 43_predict').split()
TESTS = 'published maps_parity models properties seeds baselines affinitynet deeplab random_walk segment'.split()

def here(setting):
    "The environment of a setting, if this processor can do it"
    env = {k: v for k,v in os.environ.items() if k not in SETTINGS['default']} | SETTINGS[setting] | dict(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE='1')
    want = env.get('ATEN_CPU_CAPABILITY', torch.backends.cpu.get_cpu_capability()).upper()
    code = 'import torch; print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())'
    got, threads = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True).stdout.split()
    if got != want: pytest.skip(f'this processor has no {want}')
    assert threads == env['OMP_NUM_THREADS']
    return env

# where a seed only chooses one start of many; in the others it is part of what is shown (a training of four epochs, a picture)
FREE = {'06_views', '10_vit', '11_mctformer', '20_affinity', '21_attention', '21a_fast_maps', '22_seeds', '31_random_walk', '40_deeplab_net'}

@pytest.fixture(scope='module')
def out(tmp_path_factory):
    "Folder of notes; MCT_PROCESSORS names one that lasts, so that a second run goes on"
    return Path(os.environ.get('MCT_PROCESSORS') or tmp_path_factory.mktemp('processors'))

@pytest.mark.parametrize('name', NOTEBOOKS)
@pytest.mark.parametrize('setting', SETTINGS)
def test_notebook(name, setting, out):
    if setting=='seeds' and name not in FREE: pytest.skip('its seed is part of what it shows')
    others = [n for n in NOTEBOOKS if setting!='seeds' or n in FREE]
    fine, said = margins.run('nb', name, setting, here(setting), out, others); assert fine, said

@pytest.mark.parametrize('name', TESTS)
@pytest.mark.parametrize('setting', SETTINGS)
def test_tests(name, setting, out): fine, said = margins.run('test', name, setting, here(setting), out); assert fine, said

def test_no_limit_is_tight(out):
    "Every limit is at least three times as far as what is measured differs between the settings that were run"
    rows, n = margins.tight(out); margins.show(out); assert n and not rows
