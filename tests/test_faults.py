"""Every command is killed, stopped, refused space and started twice, at random points, and ends with the files of an undisturbed run.

Run as a script, this file is the harness: it imports the package once and forks a child for every attempt. A child counts what it does to files below the output folder
(opening for writing, making folders, renaming, removing) and meets its fault at one of these events, or it is killed from outside after a random time."""
import errno, json, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork') or sys.platform!='linux', reason='the harness forks and counts events as Linux has them')
HERE = Path(__file__).resolve().parent

# ---- the commands; {out} is what is written

PHOTOS, DATA = 10, '--data folder:data --device cpu'
FIT = f'{DATA} --epochs 2 --batch-size 4 --out {{out}}'
STAGES = {
    'mct_train': f'{FIT} --valid-split all --backbone mct_tiny_patch8_96 --image-size 32 --no-pretrained',
    'mct_seeds': f'{DATA} --run ref/mct_train --out {{out}} --batch-size 2 --json {{out}}/report.json',
    'mct_score': '--data folder:data --pred ref/mct_seeds --json {out}/score.json --figure {out}/sweep.png',
    'mct_crf_labels': f'{DATA} --seeds ref/mct_seeds --out {{out}} --workers 1',
    'mct_affinity': f'{FIT} --labels ref/mct_crf_labels --backbone test_resnet --crop 96',
    'mct_masks': f'{DATA} --seeds ref/mct_seeds --affinity ref/mct_affinity --out {{out}} --workers 2',
    'mct_segment_train': f'{FIT} --masks ref/mct_masks --valid-split all --backbone test_efficientnet --dilation 1 --crop 32',
    'mct_segment': f'{DATA} --split all --run ref/mct_segment_train --out {{out}} --scales 1 --overlays --workers 1',
    'mct_predict': 'data/images --run ref/mct_train --out {out} --no-crf --device cpu',
    'mct_prepare_voc': 'VOC2012 --sbd sbd --expected 0'}
TRAININGS = {'mct_train', 'mct_affinity', 'mct_segment_train'}
ONE_STEP = {'mct_score'}                                   # seconds of work, nothing to resume

def make_inputs(work):
    "A folder of drawn photos, and a small VOC with SBD"
    import numpy as np
    from PIL import Image
    from scipy.io import savemat
    from mctformer_nb.core import save_mask
    from mctformer_nb.mini import draw_scene, mini_classes
    names, rows = mini_classes(), ['image,labels']
    for d in ('data/images', 'data/masks', 'sbd/cls', 'VOC2012/JPEGImages', 'VOC2012/SegmentationClass', 'VOC2012/ImageSets/Segmentation'): (work/d).mkdir(parents=True)
    for i in range(PHOTOS):
        im, m = draw_scene(i, size=32); im = Image.fromarray(im)
        im.save(work/f'data/images/p{i}.png'); save_mask(work/f'data/masks/p{i}.png', m); im.save(work/f'VOC2012/JPEGImages/v{i}.jpg')
        rows.append(f'p{i}.png,' + ';'.join(names[v-1] for v in np.unique(m) if v))
        if i%2: savemat(work/f'sbd/cls/v{i}.mat', dict(GTcls=dict(Segmentation=m, Boundaries=0)))
        else: save_mask(work/f'VOC2012/SegmentationClass/v{i}.png', m)
    (work/'data/labels.csv').write_text('\n'.join(rows)); (work/'data/classes.txt').write_text('\n'.join(names))
    for s in ('train', 'val'): (work/f'VOC2012/ImageSets/Segmentation/{s}.txt').write_text(f'v{"02"[s=="val"]}\n')

# ---- a child with a fault

def watch(out, at, act):
    "Call `act` at the `at`-th change of files below `out`, and at every later one"
    seen, out = [0], str(out)
    def hook(event, args):
        if event=='open': there = args[2] & (os.O_WRONLY | os.O_RDWR) and args[0]
        elif event in ('os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'os.link'): there = args[0]
        else: return
        if not there or isinstance(there, int) or not os.fspath(there).startswith(out): return
        seen[0] += 1
        if seen[0]>=at: act(event, os.fspath(there))
    sys.addaudithook(hook)
    return seen

def full(event, path):
    if event in ('open', 'os.mkdir'): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
def readonly(event, path): raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
def kill(event, path): os.kill(os.getpid(), signal.SIGKILL)
def ctrl_c(event, path, done=[]):
    if not done: done.append(1); signal.raise_signal(signal.SIGINT)
def dawdle(event, path): time.sleep(.02)
ACTS = dict(kill=kill, full=full, readonly=readonly, ctrl_c=ctrl_c, dawdle=dawdle)

class Child:
    "A command in a forked process, at work in folder `out`, its words in `log`"
    def __init__(self, stage, out, fault=None, at=1, more='', limit=None):
        self.log = Path(f'log_{time.monotonic_ns()}.txt'); self.pid = os.fork()
        if not self.pid: self.work(stage, out, fault, at, more, limit)
    def work(self, stage, out, fault, at, more, limit):
        status = 99
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            fd = os.open(self.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND); os.dup2(fd, 1); os.dup2(fd, 2)
            if limit:
                import resource
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            seen = watch(Path.cwd()/out, at if fault else 10**9, ACTS.get(fault)) if not fault or fault in ACTS else [0]
            home = Path.cwd(); line = STAGES[stage].format(out=home/out)
            if stage=='mct_prepare_voc': line = line.replace('VOC2012', str(home/out))
            from mctformer_nb import cli, cli_masks
            try: status = getattr(cli if hasattr(cli, stage) else cli_masks, stage)([*line.split(), *more.split()]) or 0
            except SystemExit as e: status = e.code
            sys.stdout.flush(); sys.stderr.flush(); (home/f'{self.log}.n').write_text(str(seen[0]))
        except BaseException:
            import traceback
            traceback.print_exc()
        finally: sys.stderr.flush(); os._exit(status)
    def wait(self): self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]); return self
    @property
    def said(self): return self.log.read_text() if self.log.exists() else ''
    @property
    def events(self): return int(Path(f'{self.log}.n').read_text())

def fresh(stage, out):
    "Where `stage` starts from"
    shutil.rmtree(out, ignore_errors=True)
    if stage=='mct_prepare_voc': shutil.copytree('VOC2012', out)
    return Path(out)

# ---- what must be there

def files(out): return {p.relative_to(out).as_posix(): p for p in Path(out).rglob('*') if p.is_file()}

def same(a, b):
    "Are two result files the same? Only what says how long it took may differ"
    if a.name=='history.csv':
        import pandas as pd
        return pd.read_csv(a).drop(columns='seconds').equals(pd.read_csv(b).drop(columns='seconds'))
    if a.name=='resume.pt': return True                    # holds the seconds too; that it works is what the run after it shows
    if a.name in ('report.json', 'score.json'): return timeless(json.loads(a.read_text()))==timeless(json.loads(b.read_text()))
    return a.read_bytes()==b.read_bytes()

def timeless(js):
    "A report without what depends on when, where and in how many starts it was made"
    if isinstance(js, list): return [timeless(v) for v in js]
    if not isinstance(js, dict): return js
    kept = {k: timeless(v) for k,v in js.items() if k not in ('seconds', 'written', 'skipped', 'folder', 'command', 'out', 'json', 'figure', 'next')}
    return kept | dict(done=js['written']+js['skipped']) if 'written' in js else kept

def torn(stage, out, ref):
    "Files that a fault left behind half written: not temporary, and not those of the undisturbed run"
    want, changing = files(ref), stage in TRAININGS        # a training rewrites its files after every epoch
    here = {k: p for k,p in files(out).items() if not any(part.startswith('.tmp-') for part in Path(k).parts)}
    if not changing: return [k for k,p in here.items() if k not in ('report.json', 'score.json', 'scores.csv') and not k.startswith('SegmentationClassAug.partial') and (k not in want or not same(p, want[k]))]
    bad = []
    for k,p in here.items():
        try:
            if p.suffix=='.safetensors':
                from safetensors import safe_open
                with safe_open(p, 'pt') as f: [f.get_tensor(n) for n in f.keys()]
            elif p.suffix=='.pt':
                import torch
                torch.load(p, weights_only=True)
            elif p.suffix=='.json': json.loads(p.read_text())
            elif p.suffix=='.csv':
                import pandas as pd
                pd.read_csv(p)
        except Exception: bad.append(k)
    return bad

def lost(stage, out, ref):
    "Files that are not as in the undisturbed run, missing, or too many; temporaries that were left"
    a, b = files(out), files(ref)
    return sorted({k for k in a.keys() & b.keys() if not same(a[k], b[k])} | (a.keys() ^ b.keys()) | {str(p) for p in Path(out).rglob('.tmp-*')})

def line_ok(said): return 'Traceback' not in said and len(said.strip().splitlines())>=1

# ---- the faults

class Count(dict):
    "Attempts of every kind, and what went wrong"
    def add(self, stage, kind, ok, why=''):
        c = self.setdefault(stage, {}).setdefault(kind, dict(tried=0, survived=0)); c['tried'] += 1; c['survived'] += bool(ok)
        if not ok: self.setdefault('problems', []).append(f'{stage} {kind}: {why}')

def campaign(stage, tries, rng, count):
    ref, out = Path('ref')/stage, Path('out')
    start = time.monotonic(); c = Child(stage, fresh(stage, out)).wait(); took = time.monotonic()-start
    bad = lost(stage, out, ref); count.add(stage, 'undisturbed', c.status==0 and not bad, f'{c.status} {bad} {c.said[-300:]}')
    if bad: return
    n = c.events
    def resumed(kind, was=''):
        broken = torn(stage, out, ref)
        c = Child(stage, out).wait(); bad = lost(stage, out, ref)
        count.add(stage, kind, c.status==0 and not bad and not broken, f'torn {broken}, lost {bad}, exit {c.status}; {was[-200:]} | {c.said[-300:]}')
    for i in range(tries):
        at = rng.randint(1, n); fresh(stage, out)
        if i%3==2:                                         # at any time, by somebody else
            c = Child(stage, out); time.sleep(rng.uniform(0, took)); os.kill(c.pid, signal.SIGKILL); c.wait()
        else: c = Child(stage, out, 'kill', at).wait()
        if c.status==0: continue                           # it was faster
        if i%3==1: Child(stage, out, 'kill', rng.randint(1, n)).wait()          # and once more on the way back
        resumed('killed', c.said)
    for kind, status in (('full', 2), ('readonly', 2), ('ctrl_c', 130)):
        for i in range(max(1, tries//3)):
            at = 1 if kind=='readonly' else rng.randint(1, n); c = Child(stage, fresh(stage, out), kind, at).wait()
            if c.status==0 and kind!='readonly': continue                       # the event was the last one, or only a clean-up
            if c.status!=status or not line_ok(c.said): count.add(stage, kind, False, f'at {at} of {n}: exit {c.status}: {c.said[-400:]}'); continue
            resumed(kind, c.said)
    largest = max(p.stat().st_size for p in files(ref).values())
    for part in (.9, .3)[:max(1, tries//3)]:
        c = Child(stage, fresh(stage, out), limit=max(1, int(largest*part))).wait()
        if c.status!=2 or not line_ok(c.said): count.add(stage, 'file too large', False, f'exit {c.status}: {c.said[-400:]}'); continue
        resumed('file too large', c.said)
    if stage in ONE_STEP or stage=='mct_prepare_voc': return
    a = Child(stage, fresh(stage, out), 'dawdle'); time.sleep(took*rng.uniform(.2, .6)); b = Child(stage, out, 'dawdle'); b.wait(); a.wait(); bad = lost(stage, out, ref)
    if stage in TRAININGS: ok = sorted((a.status, b.status)) in ([0, 2], [0, 0]) and not bad and ('another process is writing' in a.said+b.said or 'finished' in a.said+b.said)
    else: ok = (a.status, b.status)==(0, 0) and not bad
    count.add(stage, 'twice', ok, f'exits {a.status} {b.status}, {bad}: {a.said[-300:]} | {b.said[-300:]}')

def main(work, stages, tries, seed):
    os.chdir(work); rng, count = random.Random(seed), Count(); make_inputs(Path('.')); Path('ref').mkdir()
    import torch, mctformer_nb.cli_masks, mctformer_nb.segment, mctformer_nb.train, mctformer_nb.affinitynet, mctformer_nb.deeplab, mctformer_nb.baselines, matplotlib.pyplot, pydensecrf.densecrf
    torch.set_num_threads(1)
    last = max(list(STAGES).index(s) for s in stages)
    for stage in list(STAGES)[:last+1]:                    # undisturbed, each reads what those before it wrote
        c = Child(stage, fresh(stage, Path('ref')/stage)).wait()
        assert c.status==0, f'{stage}: exit {c.status}\n{c.said}'
    for stage in stages: campaign(stage, tries, rng, count)
    print(json.dumps(count))

def harness(tmp_path, stages, tries, seed=0):
    env = dict(os.environ, OMP_NUM_THREADS='1', MPLBACKEND='Agg', PYTHONPATH=os.pathsep.join([str(HERE.parent), os.environ.get('PYTHONPATH', '')]))
    r = subprocess.run([sys.executable, __file__, str(tmp_path), ','.join(stages), str(tries), str(seed)], capture_output=True, text=True, env=env)
    assert r.returncode==0, r.stderr
    count = json.loads(r.stdout.splitlines()[-1]); problems = count.pop('problems', [])
    if out := os.environ.get('MCT_RECORD'): (Path(out)/f'faults_{stages[0]}.json').write_text(json.dumps(count))
    assert not problems, '\n'.join(problems)
    return count

def test_seeds_survive(tmp_path):
    got = harness(tmp_path, ['mct_seeds'], 2)['mct_seeds']
    assert {'undisturbed', 'killed', 'full', 'readonly', 'ctrl_c', 'file too large', 'twice'} >= got.keys() >= {'killed', 'readonly', 'file too large', 'twice'}

@pytest.mark.slow
@pytest.mark.parametrize('stage', STAGES)
def test_every_command_survives(tmp_path, stage):
    got = harness(tmp_path, [stage], 12, seed=1)[stage]; assert got['killed']['tried']>=6

if __name__=='__main__': main(sys.argv[1], sys.argv[2].split(','), int(sys.argv[3]), int(sys.argv[4]))
