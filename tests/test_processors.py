"Other processors round differently: what is asserted of measured numbers holds with other instructions and other numbers of threads"
import os, subprocess, sys
from pathlib import Path
import pytest, torch

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
SETTINGS = dict( # torch's own kernels and oneDNN's, as older processors have them; and the order of sums over threads
    default=dict(ATEN_CPU_CAPABILITY='default', ONEDNN_MAX_CPU_ISA='SSE41', OMP_NUM_THREADS='1'),
    avx2=dict(ATEN_CPU_CAPABILITY='avx2', ONEDNN_MAX_CPU_ISA='AVX2', OMP_NUM_THREADS='1'),
    mixed=dict(ATEN_CPU_CAPABILITY='default', ONEDNN_MAX_CPU_ISA='AVX2', OMP_NUM_THREADS='2'),
    one=dict(OMP_NUM_THREADS='1'), two=dict(OMP_NUM_THREADS='2'))
# what trains or rounds within seconds: networks, maps, 8 bits, labels, walks, masks
NOTEBOOKS = ('000_paper 02_datasets 06_views 09_learner 10_vit 11_mctformer 12_train 13_baselines 16_frozen 20_affinity 20a_other_affinity 21_attention 21a_fast_maps 22_seeds 23a_par 24_crf '
             '24a_consensus 28_resnet38 29_backbones 30_affinitynet 31_random_walk 40_deeplab_net 41_deeplab 42_segment 43_predict').split()
TESTS = 'maps_parity models properties seeds baselines affinitynet deeplab random_walk segment'.split()

def here(setting):
    "The environment of a setting, if this processor can do it"
    env = {k: v for k,v in os.environ.items() if k not in SETTINGS['default']} | SETTINGS[setting] | dict(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE='1')
    want = env.get('ATEN_CPU_CAPABILITY', torch.backends.cpu.get_cpu_capability()).upper()
    code = 'import torch; print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())'
    got, threads = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True).stdout.split()
    if got != want: pytest.skip(f'this processor has no {want}')
    assert threads == env['OMP_NUM_THREADS']
    return env

@pytest.mark.parametrize('setting', SETTINGS)
@pytest.mark.parametrize('name', NOTEBOOKS)
def test_notebook(name, setting):
    r = subprocess.run([sys.executable, 'tools/nbrun.py', '--check', f'nbs/{name}.ipynb'], env=here(setting), cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-3000:]

@pytest.mark.parametrize('setting', SETTINGS)
@pytest.mark.parametrize('name', TESTS)
def test_tests(name, setting):
    cmd = [sys.executable, '-m', 'pytest', '-n', '0', '-q', '-x', '-p', 'no:cacheprovider', f'tests/test_{name}.py', '-k', 'not killed']
    r = subprocess.run(cmd, env=here(setting), cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout[-3000:]
