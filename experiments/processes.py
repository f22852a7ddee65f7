"""Two processes against one: largest difference of the weights and losses after training, files that differ after every other stage.

    python experiments/processes.py [--json results/robustness.json]

The runs are those of `tests/test_distributed.py`: small networks, the same global batch, gloo on the CPU."""
import argparse, sys, tempfile
from pathlib import Path
ROOT = Path(__file__).resolve().parents[1]; sys.path[:0] = [str(ROOT), str(ROOT/'tests')]
import pandas as pd
from safetensors.numpy import load_file
from mctformer_nb.tables import new_record, save_records
from test_distributed import contents, finish, start

def pair(what, d):
    for n in (1, 2): finish(start(what, n, d/str(n)))
    return d/'1', d/'2'

def differences(a, b):
    "Largest difference of weights, and of training losses"
    (wa, wb), (ha, hb) = [load_file(f/'model.safetensors') for f in (a, b)], [pd.read_csv(f/'history.csv') for f in (a, b)]
    return max(float(abs(wa[k]-wb[k]).max()) for k in wa), float((ha.train_loss-hb.train_loss).abs().max())

def main(a):
    rec, save = [], lambda row, metric, v: new_record('several processes', row, v, metric, 'mini', command='python experiments/processes.py')
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        for what,nets in (('classifier', ['']), ('networks', ['affinity', 'deeplab'])):
            one, two = pair(what, d/what)
            for net in nets:
                w, l = differences(one/net, two/net); row = f'training, {net or what}'
                rec += [save(row, 'weights differ by', w), save(row, 'losses differ by', l)]
        one, two = (contents(f) for f in pair('masks', d/'masks'))
        for stage in ('seeds', 'labels', 'masks', 'segmentation'):
            mine = {k for k in one if k.startswith(stage+'/')}
            rec += [save(stage, 'files', len(mine)), save(stage, 'files that differ', sum(one[k]!=two.get(k) for k in mine))]
    for r in rec: print(f"{r['row']:22} {r['metric']:20} {r['value']:.2g}")
    save_records(a.json, rec)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--json', default='results/robustness.json'); main(p.parse_args())
