"""Recipes beyond the paper on the drawn data set: seeds of V2, of MCTformer+ part by part and of adaptive attention fusion, each with the oracle's background, with one chosen without masks, and with its method's constant.

    python experiments/beyond.py [--seeds 0 1 2] [--rows v2 plus_mean ...] [--edges plus_cct] [--out runs/beyond] [--json results/beyond.json]

One row for each method and seed. Rows that are in the JSON file are not measured again (--again does); trainings and seeds go on where they stopped.
A row of your own is one more line of ROWS: the options of the training, those of the seeds, and the method's own background score."""
import argparse, statistics
from pathlib import Path
import torch
import mctformer_nb.plus
from mctformer_nb.crf import SEG_CRF
from mctformer_nb.crf_masks import make_crf_masks
from mctformer_nb.datasets import get_dataset
from mctformer_nb.demo import DEMO_RECIPE, DEMO_SEEDS
from mctformer_nb.head_fusion import HeadFused, train_heads
from mctformer_nb.no_masks import METHOD_BACKGROUND, background_costs, choose_background, cost_table
from mctformer_nb.runs import load_run
from mctformer_nb.scores import score_masks
from mctformer_nb.seeds import extract_seeds
from mctformer_nb.tables import load_records, new_record, save_records
from mctformer_nb.train import train_classifier

V2, PLUS = dict(DEMO_SEEDS, rule='reference'), dict(DEMO_SEEDS, rule='plus', scales=(1, .75, 1.25))
FINE = dict(image_size=192, repeat=2)                                         # twice the cells along each side, as 448 pixels for DeiT
ROWS = dict( # name -> title, run, options of the training, options of the seeds, background of the method
    v2=('V2, fused + affinity', 'v2', dict(variant='v2'), V2, 'reference'),
    v2_plus_maps=("V2, the maps of MCTformer+", 'v2', dict(variant='v2'), PLUS, 'plus'),
    plus_mean=('MCTformer+, mean pooling', 'mean', dict(variant='plus', decay=1., contrast=0.), PLUS, 'plus'),
    plus_gwrp=('MCTformer+, rank pooling', 'gwrp', dict(variant='plus', contrast=0.), PLUS, 'plus'),
    plus_cct=('MCTformer+, rank pooling + contrast', 'cct', dict(variant='plus'), PLUS, 'plus'),
    gwrp_v2_maps=('rank pooling, the maps of V2', 'gwrp', dict(variant='plus', contrast=0.), V2, 'reference'),
    cct_v2_maps=('rank pooling + contrast, the maps of V2', 'cct', dict(variant='plus'), V2, 'reference'),
    plus_fine=('MCTformer+ at twice the size', 'fine', dict(variant='plus', **FINE), dict(PLUS, image_size=192), 'plus'),
    heads=('V2, adaptive attention fusion', 'v2', dict(variant='v2'), dict(scales=(1, 1.5), batch_size=32), 'heads'),
    plus_heads=('MCTformer+, adaptive attention fusion', 'cct', dict(variant='plus'), dict(scales=(1, 1.5), batch_size=32), 'heads'))
METRICS = dict( # of a choice of `background_costs`
    oracle='mIoU', evidence='mIoU, background chosen without masks', method="mIoU, the method's background")

def measure(name, seed, a):
    "Train, extract, score: a list of records"
    title, run, training, maps, method = ROWS[name]
    ds, val = (get_dataset('mini', split, n=k, size=96) for split,k in (('train', a.images), ('val', max(8, a.images//6))))
    scored, folder, recipe = ds.subset(ds.ids[:a.scored]), a.out/f'seed{seed}', dict(DEMO_RECIPE, epochs=a.epochs, seed=seed)
    model = load_run(train_classifier(ds, val, folder/run, **recipe | training))[0]
    if method=='heads': extract_seeds(HeadFused(model, train_heads(model, ds, folder/run, 96, seed=seed)), scored, folder/f'maps_{name}', **maps)
    else: extract_seeds(model, scored, folder/f'maps_{name}', **maps)
    found = choose_background(model, scored, folder/f'maps_{name}', size=maps.get('image_size'))
    rows = background_costs(folder/f'maps_{name}', scored, dict(evidence=found.background, method=METHOD_BACKGROUND[method]))
    print(f'{title}, seed {seed}', cost_table(rows), sep='\n', flush=True)
    records = []
    for r in rows:
        add = lambda value, metric: records.append(new_record('beyond', title, value, metric, 'mini', seed=seed, epochs=a.epochs, command=f'python experiments/beyond.py --seeds {seed} --rows {name}'))
        add(r['miou'], METRICS[r['choice']]); add(r['threshold'], METRICS[r['choice']].replace('mIoU', 'threshold'))
        if r['choice']!='oracle': add(r['cost'], METRICS[r['choice']].replace('mIoU', 'cost'))
    return records

def edges(name, seed, a):
    "The maps of a row as masks: without a refinement, by pixel-adaptive refinement (PAR), by the dense CRF, all at the background that was chosen without masks"
    title, run, folder = ROWS[name][0], ROWS[name][1], a.out/f'seed{seed}'
    ds = get_dataset('mini', 'train', n=a.images, size=96); scored, records = ds.subset(ds.ids[:a.scored]), []
    background = next(r['value'] for r in load_records(a.json) if (r['row'], r['seed'], r['metric'])==(title, seed, METRICS['evidence'].replace('mIoU', 'threshold')))
    for kind,crf in {'none': None, 'PAR': 'par', 'dense CRF': SEG_CRF}.items():
        out = folder/f'masks_{name}_{kind.replace(" ", "_")}'; make_crf_masks(folder/f'maps_{name}', scored, out, background=background, crf=crf, workers=1)
        v = float(score_masks(out, scored).miou); print(f'{title}, seed {seed}, {kind}: {v:.1f}', flush=True)
        records.append(new_record('beyond edges', f'{title}: {kind}', v, 'mask mIoU', 'mini', seed=seed, background=background, command=f'python experiments/beyond.py --edges {name}'))
    return records

def main(a):
    torch.set_num_threads(a.threads)
    have = {(r['row'], r['seed']) for r in load_records(a.json)} if a.json.is_file() and not a.again else set()
    for seed in a.seeds:
        for name in a.rows:
            if (ROWS[name][0], seed) not in have: save_records(a.json, measure(name, seed, a))
    for name in a.edges:
        for seed in a.seeds: save_records(a.json, edges(name, seed, a))
    records = load_records(a.json)
    print(f"\n{'':42}{'mIoU':>8}{'std':>6}{'chosen':>8}{'method':>8}   seeds")
    for title,*_ in ROWS.values():
        v = {k: [r['value'] for r in records if (r['row'], r['metric'])==(title, m)] for k,m in METRICS.items()}
        if v['oracle']: print(f"{title:42}{statistics.fmean(v['oracle']):8.2f}{statistics.stdev(v['oracle']) if len(v['oracle'])>1 else 0:6.2f}{statistics.fmean(v['evidence']):8.2f}{statistics.fmean(v['method']):8.2f}   {' '.join(f'{x:.1f}' for x in v['oracle'])}")

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); A = p.add_argument
    A('--seeds', type=int, nargs='+', default=[0, 1, 2]); A('--rows', nargs='*', choices=list(ROWS), default=list(ROWS), help='to measure'); A('--edges', nargs='+', choices=list(ROWS), default=[]); A('--epochs', type=int, default=12); A('--threads', type=int, default=1)
    A('--out', type=Path, default=Path('runs/beyond')); A('--json', type=Path, default=Path('results/beyond.json')); A('--again', action='store_true')
    A('--images', type=int, default=600, help='scenes to train on'); A('--scored', type=int, default=200, help='of them, scored')
    main(p.parse_args())
