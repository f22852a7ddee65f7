"""Train the segmentation network that comes with the package: DeepLab on EfficientNet-Lite0, on pseudo masks made from image-level labels.

    python experiments/train_packaged.py --data voc:PATH/VOC2012 --masks MASKS --out runs/packaged [--epochs 20]     # about four minutes an epoch on one core
    python experiments/train_packaged.py --pack --out runs/packaged --into runs/first                                # half precision, with its configuration
    python experiments/train_packaged.py --data voc:PATH/VOC2012 --masks MASKS --start runs/first --lr 1e-4 --epochs 4 --stop 2 --out runs/further
    python experiments/train_packaged.py --pack --out runs/further --into mctformer_nb/data/animals

MASKS are those of `experiments/real_photos.py --stop masks` (folder `masks`). The first stages and BatchNorm stay as they are, 16 bits, crops of 256 pixels at scales 0.8 to 1.25.
With --start a trained network goes on: scales 0.65 to 1.5, photos with rare classes more often (by their labels), and what is kept is the running mean of the weights.
--float32 for processors without 16-bit arithmetic. Each epoch writes a checkpoint, and the same command goes on from it."""
import argparse, random, time
from contextlib import nullcontext
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F
from PIL import Image
from mctformer_nb.core import VOC_CLASSES, atomic_path, open_mask, write_json
from mctformer_nb.datasets import get_dataset
from mctformer_nb.deeplab_net import DeepLab
from mctformer_nb.runs import load_run, packaged_weights, save_run

SHAPE = dict(width=256, dilation=6, output_stride=16)
FROZEN = 'conv_stem', 'bn1', 'blocks.0', 'blocks.1', 'blocks.2'

def view(image, mask, crop, rng, scales):
    "A random crop at a random scale, with changed brightness and contrast, perhaps mirrored"
    s = rng.uniform(*scales); W, H = (max(1, round(v*s)) for v in image.size)
    photo, m = np.asarray(image.resize((W, H), Image.BILINEAR), np.float32)/127.5-1, np.asarray(Image.fromarray(mask).resize((W, H), Image.NEAREST))
    photo = photo*rng.uniform(.8, 1.2)+rng.uniform(-.2, .2)
    x, y = np.zeros((crop, crop, 3), np.float32), np.full((crop, crop), 255, np.uint8)
    t, l = (rng.randint(0, n-crop) if n>crop else 0 for n in (H, W)); dt, dl = (rng.randint(0, crop-n) if n<crop else 0 for n in (H, W))
    h, w = min(H, crop), min(W, crop)
    x[dt:dt+h, dl:dl+w], y[dt:dt+h, dl:dl+w] = photo[t:t+h, l:l+w], m[t:t+h, l:l+w]
    if rng.random()<.5: x, y = x[:, ::-1], y[:, ::-1]
    return torch.from_numpy(x.transpose(2, 0, 1).copy()), torch.from_numpy(y.copy())

def groups(net, lr, head=5, decay=.01):
    named = [(n, p) for n,p in net.named_parameters() if p.requires_grad]
    return [dict(params=[p for n,p in named if n.startswith('head')==h and (p.ndim>1)==d], lr=lr*(head if h else 1), weight_decay=decay*d) for h in (False, True) for d in (False, True)]

def rare_first(ds, ids, least=.1):
    "How probable a photo is to be drawn: those with a class of fewer than `least` of the photos more often (the repeat factors of LVIS)"
    Y = np.array([np.isin(np.arange(len(ds.classes)), ds.labels(id)) for id in ids]); share = Y.mean(0)
    factor = np.where(share>0, np.sqrt(np.maximum(1, least/np.maximum(share, 1e-9))), 0)
    w = (Y*factor).max(1).clip(1)
    return w/w.sum()

def train(a):
    ds, file = get_dataset(a.data, 'trainaug'), a.out/'checkpoint.pt'; a.out.mkdir(parents=True, exist_ok=True)
    ids = [id for id in ds.ids if (a.masks/f'{id}.png').exists()]; data = [(ds.image(id).copy(), open_mask(a.masks/f'{id}.png')) for id in ids]
    weights, scales = (rare_first(ds, ids), (.65, 1.5)) if a.start else (None, (.8, 1.25))
    torch.manual_seed(0); net = DeepLab(20, 'tf_efficientnet_lite0', packaged_weights('tf_efficientnet_lite0'), **SHAPE).to(memory_format=torch.channels_last)
    if a.start: net.load_state_dict({k: v.float() for k,v in load_run(a.start)[0].state_dict().items()})
    for n,p in net.backbone.net.named_parameters():
        if n.startswith(tuple(f'{f}.' for f in FROZEN)): p.requires_grad_(False)
    mean = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(.998))
    opt = torch.optim.AdamW(groups(net, a.lr)); rates, steps, done = [g['lr'] for g in opt.param_groups], len(data)//a.batch_size, 0
    if file.exists(): c = torch.load(file, weights_only=True); net.load_state_dict(c['net']); opt.load_state_dict(c['opt']); mean.load_state_dict(c['mean']); done = c['epoch']
    for epoch in range(done, a.stop or a.epochs):
        rng, start, total = random.Random(epoch), time.time(), 0.; order = list(range(len(data))); rng.shuffle(order); net.train()
        if a.start: order = np.random.RandomState(epoch).choice(len(data), len(data), p=weights).tolist()
        for b in range(steps):
            x, y = map(torch.stack, zip(*(view(*data[i], a.crop, rng, scales) for i in order[b*a.batch_size:(b+1)*a.batch_size])))
            t = epoch*steps+b
            for g,r in zip(opt.param_groups, rates): g['lr'] = r*min(1, (t+1)/steps)*(1-t/(a.epochs*steps))**.9
            with nullcontext() if a.float32 else torch.autocast('cpu', torch.bfloat16): logits = net(x.contiguous(memory_format=torch.channels_last))
            y = y[:, 2::4, 2::4].long()
            loss = F.cross_entropy(F.interpolate(logits.float(), y.shape[-2:], mode='bilinear', align_corners=False), y, ignore_index=255)
            opt.zero_grad(); loss.backward(); opt.step(); mean.update_parameters(net); total += loss.item()
        with atomic_path(file) as p: torch.save(dict(net=net.state_dict(), opt=opt.state_dict(), mean=mean.state_dict(), epoch=epoch+1, further=bool(a.start)), p)
        print(f'epoch {epoch+1} loss {total/steps:.4f} {time.time()-start:.0f} s', flush=True)

def pack(a):
    "Run folder in half precision"
    c = torch.load(a.out/'checkpoint.pt', weights_only=True)
    net = DeepLab(20, 'tf_efficientnet_lite0', **SHAPE)
    net.load_state_dict({k.removeprefix('module.'): v for k,v in c['mean'].items() if k.startswith('module.')} if c['further'] else c['net'])
    train = dict(data='VOC 2012, 1,483 photos, image-level labels', masks='experiments/real_photos.py', epochs=c['epoch'], crop=a.crop, batch_size=a.batch_size, lr=a.lr)
    if c['further']: train |= dict(start='20 epochs of the same script', recipe='scales 0.65 to 1.5, rare classes more often, running mean of the weights')
    save_run(net.half(), a.into, classes=list(VOC_CLASSES), image_size=None, train=train)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); A = p.add_argument
    A('--data'); A('--masks', type=Path); A('--out', type=Path, required=True); A('--epochs', type=int, default=20); A('--crop', type=int, default=256); A('--batch-size', type=int, default=8); A('--lr', type=float, default=2e-4)
    A('--start', type=Path, help='run folder of a trained network that goes on'); A('--stop', type=int, help='end after this epoch of the schedule'); A('--float32', action='store_true')
    A('--pack', action='store_true'); A('--into', type=Path, default=Path('mctformer_nb/data/animals'))
    a = p.parse_args(); pack(a) if a.pack else train(a)
