"""Rows of Tables 1, 2 and 5 on the drawn data set: the demonstration with several seeds, every kind of map, the pseudo masks and the segmentation scored, records written.

    python experiments/mini_maps.py [--seeds 0 1 2] [--out runs/mini_maps] [--json results/mini_maps.json]

Started again, it goes on where it stopped."""
import argparse, statistics
from pathlib import Path
from mctformer_nb.demo import DEMO_MAPS, run_demo
from mctformer_nb.tables import new_record, save_records

def main(a):
    found = {}
    for seed in a.seeds:
        m = run_demo(a.out/f'seed{seed}', seed=seed, epochs=a.epochs)
        records = [new_record(5, DEMO_MAPS[r['map']][3], r[k], metric, 'mini', seed=seed, command=f'python experiments/mini_maps.py --seeds {" ".join(map(str, a.seeds))} --epochs {a.epochs}')
                   for r in m['rows'] for k,metric in (('miou','mIoU'), ('fp','FP'), ('fn','FN'))]
        steps = [('1', 'MCTformer (Ours)', 'seed mIoU'), ('1', 'MCTformer (Ours)', 'mask mIoU'), ('2', 'MCTformer (Ours)', 'val mIoU'), ('2', 'the same network, fully supervised', 'val mIoU')]
        records += [new_record(t, row, r['miou'], metric, 'mini', seed=seed, command=records[0]['command']) for (t,row,metric),r in zip(steps, m['steps'])]
        if a.json: save_records(a.json, records)
        for r in m['steps']: found.setdefault(r['step'], []).append(r['miou'])
        for r in m['rows']: found.setdefault(r['map'], []).append(r['miou'])
    print(f"\n{'map':32}{'mIoU':>8}{'std':>7}   seeds")
    for name,v in found.items(): print(f"{name:32}{statistics.fmean(v):8.2f}{statistics.stdev(v) if len(v)>1 else 0:7.2f}   {' '.join(f'{x:.1f}' for x in v)}")

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); A = p.add_argument
    A('--seeds', type=int, nargs='+', default=[0,1,2]); A('--epochs', type=int, default=12); A('--out', type=Path, default=Path('runs/mini_maps')); A('--json', type=Path, default=Path('results/mini_maps.json'))
    main(p.parse_args())
