"""What fewer bits cost: maps of drawn scenes from one trained network at every precision, their mIoU at the best threshold and the time to make them.

    python benchmarks/precision.py --run runs/mini_maps/seed0/runs/v2 [--scenes 200] [--precision float32 bf16 int8] [--json results/bench.json]

`python experiments/mini_maps.py --seeds 0` trains that network. Maps are those of the demonstration: all layers, refined by the patch affinity, two sizes with mirror images."""
import tempfile
from _common import Report, measure, parser
from mctformer_nb.datasets import get_dataset
from mctformer_nb.demo import DEMO_SEEDS
from mctformer_nb.runs import load_run
from mctformer_nb.scores import sweep_threshold
from mctformer_nb.seeds import extract_seeds

def main(a):
    model, ds = load_run(a.run)[0], get_dataset('mini', 'train', n=a.scenes); report, first = Report('benchmark: precision', a, f'mini, {len(ds)} scenes'), None
    for p in a.precision:
        with tempfile.TemporaryDirectory() as d:
            cpu, wall, *_ = measure(lambda: extract_seeds(model, ds, f'{d}/seeds', precision=p, device='cpu', **DEMO_SEEDS))
            miou = float(sweep_threshold(f'{d}/seeds', ds).best_miou)
        first = miou if first is None else first
        report.add(p, {'mIoU': miou, f'mIoU, change from {a.precision[0]}': miou-first, 'seconds': cpu, 'seconds, elapsed': wall})
    report.save()

if __name__ == '__main__':
    p = parser(__doc__, 1); A = p.add_argument
    A('--run', required=True, help='run folder of an MCTformer-V2 trained on mini'); A('--scenes', type=int, default=200); A('--precision', nargs='+', default=['float32', 'bf16', 'int8'])
    main(p.parse_args())
