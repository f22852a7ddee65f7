"""Runs every benchmark of a stage, one after the other, and writes results/bench.json. About 20 minutes on a slow core; about 10 GB of memory.

    python benchmarks/all.py [--device cpu] [--threads 1] [--quick]"""
import argparse, os, subprocess, sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPTS = dict(startup=False, sweep=False, random_walk=True, crf=False, train_step=True, extraction=True, segmentation=False, profiles=False)   # script: does it run on a GPU?

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); A = p.add_argument
    A('--device', default='cpu'); A('--threads', default='1'); A('--json', default='results/bench.json'); A('--quick', action='store_true', help='tiny sizes, nothing is written'); a = p.parse_args()
    env = dict(os.environ, OMP_NUM_THREADS=a.threads, PYTHONWARNINGS='ignore')
    bad = []
    for name,gpu in SCRIPTS.items():
        options = ['--device', a.device] if gpu and a.device!='cpu' else []
        if subprocess.run([sys.executable, str(HERE/f'{name}.py'), *options, '--threads', a.threads, '--json', a.json, *(['--quick'] if a.quick else [])], env=env).returncode: bad.append(name)
    if bad: sys.exit(f'failed: {", ".join(bad)}')

if __name__ == '__main__': main()
