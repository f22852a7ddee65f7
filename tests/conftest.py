"What all tests share: no network, no display, and the repository's root"
import os
from pathlib import Path
import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('MPLBACKEND', 'Agg')

@pytest.fixture(scope='session')
def root(): return Path(__file__).resolve().parents[1]
