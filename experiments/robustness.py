"""Faults, bad data and fuzzing at length: how often each was tried and what came of it, for results/robustness.json.

    python experiments/robustness.py --out runs/robustness              all three, about half an hour on one core
    python experiments/robustness.py --out runs/robustness --only fuzz --seconds 60
    python experiments/robustness.py --out runs/robustness --only none  the records of what is in the folder

A part that was measured before is replaced. Exit status 1 if a file was lost, an image not named or a reader crashed."""
import argparse, json, os, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]; sys.path.insert(0, str(ROOT))
from mctformer_nb.core import read_json
from mctformer_nb.tables import new_record, save_records

PARTS = ('faults', 'data', 'fuzz')
KINDS = dict(killed='SIGKILL', full='disk full', readonly='read-only', ctrl_c='Ctrl-C', twice='two at once') | {'file too large': 'file too large', 'undisturbed': 'undisturbed'}

def run(args, out): return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS='1', MCT_RECORD=str(out))).returncode

def measure(parts, out, seconds):
    if 'faults' in parts: run(['-m', 'pytest', '-m', 'slow', 'tests/test_faults.py'], out)
    if 'data' in parts: run(['-m', 'pytest', '-m', 'slow', 'tests/test_bad_input.py'], out)
    if 'fuzz' in parts: run(['tools/fuzz.py', '--seconds', seconds, '--crashes', out/'crashes', '--json', out/'fuzz.json'], out)

def records(out):
    command = 'python experiments/robustness.py --out runs/robustness'
    def rec(table, row, metric, value, dataset): return new_record(table, row, value, metric, dataset, command=command)
    for f in sorted(out.glob('faults_*.json')):
        for stage,kinds in read_json(f).items():
            for kind,c in kinds.items():
                if kind in KINDS: yield rec('faults', stage, KINDS[kind], c['tried'], '10 drawn photos')
            tried, survived = (sum(c[k] for c in kinds.values()) for k in ('tried', 'survived'))
            yield from (rec('faults', stage, m, v, '10 drawn photos') for m,v in (('tried', tried), ('survived', survived)))
    if (out/'bad_data.json').is_file():
        for k,v in read_json(out/'bad_data.json').items(): yield rec('bad data', 'made data set', k, v, '500 drawn photos')
    if (out/'fuzz.json').is_file():
        for name,r in read_json(out/'fuzz.json')['readers'].items(): yield from (rec('fuzzing', name, m, r[m], 'damaged files') for m in ('executions', 'crashes'))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, required=True, help='folder for counts and crashes'); p.add_argument('--only', nargs='+', choices=[*PARTS, 'none'], default=PARTS)
    p.add_argument('--seconds', type=float, default=20, help='of fuzzing, for each reader'); p.add_argument('--json', type=Path, default=ROOT/'results/robustness.json')
    a = p.parse_args(); a.out = a.out.resolve(); a.out.mkdir(parents=True, exist_ok=True); measure(a.only, a.out, a.seconds)
    recs = list(records(a.out)); save_records(a.json, recs)
    total = {(r['table'], r['metric']): sum(x['value'] for x in recs if (x['table'], x['metric'])==(r['table'], r['metric'])) for r in recs}
    for (t,m),v in total.items(): print(f'{t:10s} {m:16s} {v:8.0f}')
    return int(total.get(('faults', 'tried'))!=total.get(('faults', 'survived')) or total.get(('fuzzing', 'crashes'), 0)>0)

if __name__=='__main__': sys.exit(main())
