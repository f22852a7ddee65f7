"""How long imports and `--help` take, each in a fresh process.

    python benchmarks/startup.py [--json results/bench.json]

Rounds over all of them; the median of the CPU time of the process, and elapsed time beside it."""
import os, statistics, subprocess, sys, time
from configparser import ConfigParser
from _common import ROOT, Report, parser

MODULES = 'core', 'datasets', 'scores', 'tables', 'cli', 'attention', 'mctformer', 'seeds', 'train'

def run(code):
    "(CPU seconds, elapsed seconds) of a Python process"
    before, t = os.times(), time.perf_counter()
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = os.times(); return after.children_user+after.children_system-before.children_user-before.children_system, time.perf_counter()-t

def commands():
    cfg = ConfigParser(delimiters=['=']); cfg.read(ROOT/'settings.ini', encoding='utf-8')
    return {n: t.split(':')[0] for n,t in (l.split('=') for l in cfg['DEFAULT']['console_scripts'].split())}

def main(a):
    modules, helps = MODULES, commands()
    if a.quick: modules, helps, a.repeats = ['scores'], dict(list(helps.items())[:1]), 1
    jobs = {f'import mctformer_nb.{m}': (f'import mctformer_nb.{m}', 2 if m=='scores' else None) for m in modules}
    jobs |= {f'{n} --help': (f'import sys; sys.argv = ["{n}", "--help"]; from {m} import {n}; {n}()', 2) for n,m in helps.items()}
    report = Report('benchmark: start', a, 'fresh processes'); run('pass')
    times = {k: [] for k in jobs}
    for _ in range(a.repeats):
        for k,(code,_) in jobs.items(): times[k].append(run(code))
    for k,v in times.items():
        cpu, wall = (statistics.median(x) for x in zip(*v))
        report.add(k, {'seconds': cpu, 'seconds, elapsed': wall} | ({'2 s over the time taken': 2/cpu} if jobs[k][1] else {}), {'2 s over the time taken': 1} if jobs[k][1] else None)
    report.save()

if __name__ == '__main__': main(parser(__doc__, 3).parse_args())
