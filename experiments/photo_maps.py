"""Which map, which affinity, what it costs: localization maps of real photographs from networks that stay frozen. Each row of maps is scored on the 220 photos of `train`.

    python experiments/photo_maps.py --data voc:PATH/VOC2012 --run runs/real_photos/run [--affinity vit_small_patch14_dinov2 --affinity-weights FILE] --out runs/photo_maps --json results/photo_maps.json

RUN is the linear layer on frozen features of `experiments/real_photos.py`; self-trained seeds are measured there. mIoU is that of the best constant background on these photos and of the
constant 0.4; the seconds are CPU seconds of all threads for one photo, its network included. The rows that are there are not made again."""
import argparse, json, time
from pathlib import Path
import numpy as np, torch
from mctformer_nb.datasets import get_dataset
from mctformer_nb.other_affinity import OtherAffinity, affinity_vit
from mctformer_nb.runs import load_run
from mctformer_nb.scores import fixed_threshold, sweep_threshold
from mctformer_nb.seeds import extract_seeds
from mctformer_nb.tables import new_record, save_records

ANIMALS = ['cat', 'dog', 'cow', 'horse', 'sheep', 'person']
ROWS = {
    'CAM': None,
    'CAM, affinity of the last block': dict(layers=1),
    'CAM, affinity of the last 2 blocks': dict(layers=2),
    'CAM, affinity of all blocks': dict(layers=None),
    'CAM, last 2 blocks, doubly stochastic, squared': dict(layers=2, norm='sinkhorn', power=2)}

def both(r): return r.get('best_miou', r.get('miou')), float(np.mean([v['iou'] for k,v in r.per_class.items() if k in ('background', *ANIMALS)]))

def main(a):
    train, model, made = get_dataset(a.data, 'train'), load_run(a.run)[0], set()
    if a.json.exists(): made = {r['row'] for r in json.loads(a.json.read_text())}
    vit = affinity_vit(a.affinity, a.affinity_weights)
    for row,how in ROWS.items():
        if row in made: continue
        other, out = None if how is None else OtherAffinity(vit, **how), a.out/''.join(c if c.isalnum() else '_' for c in row)
        start = time.process_time(); extract_seeds(model, train, out, kind='cam', affinity=other, image_size=320, fit='square')
        seconds = (time.process_time()-start)/len(train)
        best, fixed = both(sweep_threshold(out, train)), both(fixed_threshold(out, train, .4))
        values = dict(zip(('mIoU', 'mIoU of background and six classes', 'mIoU at background 0.4', 'mIoU of background and six classes at background 0.4'), best+fixed))
        command = f'python experiments/photo_maps.py --affinity {a.affinity}'
        save_records(a.json, [new_record('photo maps', row, v, m, 'VOC animals, train', images=len(train), cpu_seconds=round(seconds, 3), seed=0, command=command) for m,v in values.items()])
        print(f'{row:50}', ' '.join(f'{v:.1f}' for v in values.values()), f' {seconds:.2f} s', flush=True)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); A = p.add_argument
    A('--data', required=True); A('--run', required=True); A('--affinity', default='vit_small_patch14_dinov2'); A('--affinity-weights'); A('--out', type=Path, default=Path('runs/photo_maps'))
    A('--json', type=Path, default=Path('results/photo_maps.json'))
    main(p.parse_args())
