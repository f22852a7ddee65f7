"""Masks of photos by the network in the package, six views each: prepared for the processor and both mirror images in a batch, against one view after the other with the network as it was loaded.

    python benchmarks/segmentation.py [--photos 3] [--side 320] [--threads 1] [--json results/bench.json]

`views` is the network and the mean over views; `both masks` is the stage of the chain that writes masks without and with the dense CRF: before, the network looked at a photo twice, once for each. `seeds` is the other large stage, what two frozen networks say of the cells of a photo and of its mirror image: before, the CNN as timm has it and 32 bits; now its norms and activations are in its convolutions, and the bits are those that the processor is fast at. Drawn photos, a ViT of random weights; classes below a probability of 0.01 are left out of the CRF, which is in the same process for both."""
import statistics
import numpy as np, timm, torch, torch.nn.functional as F
from PIL import Image
from _common import Report, by_turns, compare, parser
from mctformer_nb.crf import SEG_CRF, refined_mask
from mctformer_nb.frozen import FrozenCAM, frozen_precision
from mctformer_nb.fused_cnn import ready
from mctformer_nb.mini import draw_scene
from mctformer_nb.other_affinity import OtherAffinity
from mctformer_nb.predict import packaged_run
from mctformer_nb.runs import load_run
from mctformer_nb.segment import class_probs, present_classes, scaled_view, view_logits
from mctformer_nb.self_training import SelfTraining, photo_cells
from mctformer_nb.views import input_spec

@torch.no_grad()
def probs_plain(net, image, scales):
    "Maximum over views of the softmax, a view at a time"
    best = None
    for s in scales:
        for mirror in (False, True):
            x = scaled_view(image, s, input_spec(net)); y = view_logits(net, x.flip(-1) if mirror else x)              # (1,C+1,h,w)
            p = F.interpolate(y.flip(-1) if mirror else y, image.size[::-1], mode='bilinear', align_corners=False).softmax(1)
            best = p if best is None else torch.maximum(best, p)
    return (best/best.sum(1, keepdim=True))[0]

def finish(image, probs):
    "Masks without and with the CRF"
    labels, rows = present_classes(probs)
    return [refined_mask(np.asarray(image), labels, rows, crf) for crf in (None, SEG_CRF)]

def main(a):
    if a.quick: a.photos, a.side, a.repeats = 1, 64, 1
    report = Report('benchmark: segmentation', a, 'drawn photos'); net = load_run(packaged_run())[0].eval(); fast = ready(net); scales = (.75, 1, 1.25)
    images = [Image.fromarray(draw_scene(i, size=a.side)[0]) for i in range(a.photos)]; views = lambda f, n, im: f(n, im, scales, **({} if f is probs_plain else dict(flip=True)))
    seen = []
    g = by_turns({'plain': lambda: [views(probs_plain, net, im) for im in images], 'ours': lambda: [views(class_probs, fast, im) for im in images], 'crf': lambda: [finish(im, p) for im,p in zip(images, seen)]}, a.repeats, warm=lambda: (seen.extend(class_probs(fast, im, scales, True) for im in images), probs_plain(net, images[0], scales)))
    err = max((x-y).abs().max().item() for x,y in zip(g['plain']['result'], g['ours']['result'])); assert err<1e-4, f'probabilities differ by {err}'
    row = compare(g['plain'], g['ours']); per = {k: row[k]/a.photos for k in ('seconds plain', 'seconds')}
    report.add(f'six views of a photo of {a.side} pixels', row | per | {'largest difference': err}, {'times faster': 1.5}, bound='arithmetic')
    crf = statistics.median(g['crf']['cpu'])/a.photos; before, after = 2*per['seconds plain']+crf, per['seconds']+crf
    report.add(f'both masks of a photo of {a.side} pixels', {'times faster': before/after, 'seconds plain': before, 'seconds': after, 'seconds, CRF': crf}, {'times faster': 1.5}, bound='arithmetic')
    seeds(a, report, images); report.save()

def seeds(a, report, images):
    cnn = FrozenCAM(20, pretrained='packaged').to(memory_format=torch.channels_last); fast = cnn.ready(); torch.manual_seed(0)
    vit = timm.create_model('vit_small_patch14_dinov2', num_classes=0, dynamic_img_size=True, depth=1 if a.quick else 12).eval().requires_grad_(False); vit.input_spec = input_spec(vit)
    other, some = OtherAffinity(vit), np.array([3, 7]); look = lambda net, bits: [photo_cells(net, im, some, other, SelfTraining(precision=bits)) for im in images]
    g = by_turns(dict(plain=lambda: look(cnn, 'float32'), ours=lambda: look(fast, 'auto')), a.repeats); row = compare(g['plain'], g['ours'])
    err = max(np.abs(x['maps'].astype(np.float32)-y['maps']).max() for x,y in zip(g['plain']['result'], g['ours']['result']))
    report.add(f'seeds: cells of a photo and its mirror image, {frozen_precision()}', row | {k: row[k]/a.photos for k in ('seconds plain', 'seconds')} | {'difference of [0,1] maps': float(err)}, {'times faster': 1.5}, bound='arithmetic')

if __name__ == '__main__':
    p = parser(__doc__, 3); A = p.add_argument
    A('--photos', type=int, default=3); A('--side', type=int, default=320)
    main(p.parse_args())
