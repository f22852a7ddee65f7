"Damaged files of every kind, made up by hypothesis: every reader returns or raises `DataError` (tools/fuzz.py does this at length)"
import importlib.util, os, tempfile, warnings
from pathlib import Path
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from mctformer_nb.core import DataError

spec = importlib.util.spec_from_file_location('fuzz', Path(__file__).resolve().parents[1]/'tools/fuzz.py')
fuzz = importlib.util.module_from_spec(spec); spec.loader.exec_module(fuzz)
SLOW_ONES = {'checkpoint', 'run'}                           # they build a network

@pytest.mark.parametrize('name', fuzz.TARGETS)
def test_reader(name, tmp_path):
    root = tmp_path/name; root.mkdir(); good, where, read = fuzz.TARGETS[name](root); path = root/where
    for b in good: path.write_bytes(b); read(path)
    @settings(max_examples=3 if name in SLOW_ONES else 12, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(good), st.randoms(use_true_random=False))
    def damage(b, rng):
        path.write_bytes(fuzz.damaged(b, rng))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try: read(path)
            except DataError as e: assert str(e).endswith(('.', '?')), e
    damage()

@pytest.mark.slow
@pytest.mark.parametrize('name', fuzz.TARGETS)
def test_campaign(name):
    n, found = fuzz.campaign(name, 5, os.environ.get('MCT_CRASHES'), seed=1); assert n>=50 and not found, found
