"""Table 5 on the drawn data set: the demonstration with several seeds, every kind of map scored, records written.

    python benchmarks/mini_maps.py [--seeds 0 1 2] [--out runs/mini_maps] [--json results/mini_maps.json]

Started again, it goes on where it stopped."""
import argparse, statistics
from pathlib import Path
from mctformer_nb.demo import DEMO_MAPS, run_demo
from mctformer_nb.tables import new_record, save_records

def main(a):
    found = {}
    for seed in a.seeds:
        m = run_demo(a.out/f'seed{seed}', seed=seed, epochs=a.epochs)
        records = [new_record(5, DEMO_MAPS[r['map']][3], r[k], metric, 'mini', seed=seed, command=f'python benchmarks/mini_maps.py --seeds {" ".join(map(str, a.seeds))} --epochs {a.epochs}')
                   for r in m['rows'] for k,metric in (('miou','mIoU'), ('fp','FP'), ('fn','FN'))]
        if a.json: save_records(a.json, records)
        for r in m['rows']: found.setdefault(r['map'], []).append(r['miou'])
    print(f"\n{'map':20}{'mIoU':>8}{'std':>7}   seeds")
    for name,v in found.items(): print(f"{name:20}{statistics.fmean(v):8.2f}{statistics.stdev(v) if len(v)>1 else 0:7.2f}   {' '.join(f'{x:.1f}' for x in v)}")

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); A = p.add_argument
    A('--seeds', type=int, nargs='+', default=[0,1,2]); A('--epochs', type=int, default=10); A('--out', type=Path, default=Path('runs/mini_maps')); A('--json', type=Path, default=Path('results/mini_maps.json'))
    main(p.parse_args())
