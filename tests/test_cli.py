"The commands as a user types them: help, exit statuses, one-line errors, and the chain from photos to scores"
import json, os, re, shlex, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from mctformer_nb import cli, cli_masks, cli_scale, cli_tools
from mctformer_nb.mini import draw_scene, mini_classes

COMMANDS = ['mct_demo', 'mct_prepare_voc', 'mct_train', 'mct_seeds', 'mct_score', 'mct_report', 'mct_info', 'mct_convert']

def make_folder(root, n=8, size=32):
    "Drawn scenes as a folder data set with masks"
    names, rows = mini_classes(), ['image,labels']
    for d in ('images', 'masks'): (root/d).mkdir(parents=True)
    for i in range(n):
        im, mask = draw_scene(i, size=size)
        Image.fromarray(im).save(root/f'images/p{i}.jpg'); Image.fromarray(mask).save(root/f'masks/p{i}.png')
        rows.append(f'p{i}.jpg,' + ';'.join(names[c-1] for c in np.unique(mask) if 0 < c <= len(names)))
    (root/'labels.csv').write_text('\n'.join(rows)); (root/'classes.txt').write_text('\n'.join(names))

TRAIN = '--data folder:data --backbone mct_tiny_patch8_96 --no-pretrained --image-size 32 --epochs 1 --batch-size 4 --device cpu'.split()
SEEDS = '--run run --data folder:data --out seeds --device cpu'.split()

@pytest.fixture(scope='module')
def work(tmp_path_factory):
    "Folder with `data` and a model in `run`, trained for one epoch"
    d = tmp_path_factory.mktemp('cli'); make_folder(d/'data'); home = os.getcwd(); os.chdir(d)
    try: assert cli.mct_train([*TRAIN, '--out', 'run']) == 0
    finally: os.chdir(home)
    return d

@pytest.fixture
def here(work, monkeypatch): monkeypatch.chdir(work); return work

def fails(command, argv, capsys, *words, code=2):
    "Exit status `code`, with one line on stderr that names the command and has the words"
    capsys.readouterr()
    try: got = getattr(cli, command)([str(a) for a in argv])
    except SystemExit as e: got = e.code
    err = capsys.readouterr().err.strip()
    assert got == code and len(err.splitlines()) == 1 and err.startswith(f'{command}: '), err
    for w in words: assert w in err, err

@pytest.mark.parametrize('command', COMMANDS)
def test_help(command, root):
    code = f'import sys; from mctformer_nb.cli import {command} as f\ntry: f(["--help"])\nexcept SystemExit as e: print(e.code, *(m for m in ("torch", "fastai", "timm", "numpy") if m in sys.modules))'
    times = []
    for _ in range(3):                                     # the machine may be busy: the best of three counts
        start = time.perf_counter(); r = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True); times.append(time.perf_counter()-start)
        if times[-1] < 2: break
    assert min(times) < 2, f'--help takes {min(times):.1f} s'
    assert r.stdout.splitlines()[-1] == '0', 'the help imports something heavy'
    assert getattr(cli, command).__doc__ in ' '.join(r.stdout.split()) and f'examples:\n  {command}' in r.stdout and '--debug' in r.stdout

def test_chain(here, capsys):
    assert cli.mct_train([*TRAIN, '--out', 'run']) == 0                                  # finished before: says so, trains nothing
    assert 'finished' in capsys.readouterr().out
    assert cli.mct_seeds(SEEDS) == 0
    out = capsys.readouterr().out
    assert '8 seeds written' in out and 'next: mct_score --pred seeds --data folder:data --split train' in out
    assert cli.mct_seeds(SEEDS) == 0 and '0 seeds written to seeds, 8 were there' in capsys.readouterr().out
    assert cli.mct_score(['--pred', 'seeds', '--data', 'folder:data', '--json', 's.json', '--figure', 'figures/s.png', '--classes', 'cat,fish']) == 0
    out = capsys.readouterr().out; s = json.loads((here/'s.json').read_text())
    assert 'mean of background, cat, fish' in out and f'{s["best_miou"]:.1f}' in out and s['data'] == 'folder:data' and len(s['miou']) == 60
    assert Image.open(here/'figures/s.png').format == 'PNG'
    assert cli.mct_score(['--pred', 'seeds', '--data', 'folder:data', '--threshold', str(s['best_threshold']), '--json', 't.json']) == 0
    assert json.loads((here/'t.json').read_text())['miou'] == pytest.approx(s['best_miou'])
    assert cli.mct_score(['--pred', 'data/masks', '--data', 'folder:data', '--json', 'm.json']) == 0
    assert json.loads((here/'m.json').read_text())['miou'] == 100

def test_bad_photo_ends_with_status_1(here, capsys, tmp_path):
    make_folder(tmp_path/'data'); bad = tmp_path/'data/images/p5.jpg'; bad.write_bytes(bad.read_bytes()[:-300])
    argv = ['--run', 'run', '--data', f'folder:{tmp_path/"data"}', '--out', str(tmp_path/'seeds'), '--device', 'cpu', '--json', str(tmp_path/'r.json')]
    assert cli.mct_seeds(argv) == 1
    err = capsys.readouterr().err
    assert '1 bad file was left out' in err and 'p5.jpg' in err and len(list((tmp_path/'seeds').glob('*.npz'))) == 7
    assert json.loads((tmp_path/'r.json').read_text())['train']['bad'][0][0] == 'p5'
    argv = ['--pred', str(tmp_path/'seeds'), '--data', f'folder:{tmp_path/"data"}']
    fails('mct_score', argv, capsys, '1 of 8', 'p5')
    assert cli.mct_score([*argv, '--skip-missing']) == 1 and 'p5' in capsys.readouterr().err

def test_one_line_errors(here, capsys):
    seeds = lambda *a: ('mct_seeds', ['--run', 'run', '--data', 'folder:data', '--out', 'x', '--device', 'cpu', *a])
    for (command, argv), words in [
        (seeds('--layers', '0'), ["'0'", 'at least 1']), (seeds('--layers', '99'), ['1 to 6']), (seeds('--scales', '1,x'), ["'x'", 'not a number']),
        (seeds('--run', 'gone'), ['gone']), (seeds('--data', 'folder:gone'), ['gone']), (seeds('--data', 'disk:data'), ['disk']), (seeds('--split', 'nosplit'), ['nosplit']),
        (seeds('--device', 'gpu9'), ['gpu9']), (seeds('--label-threshold', '1.5'), ["'1.5'", 'at most 1']), (seeds('--batch-size', '0'), ["'0'"]), (seeds('--colour'), ['--colour', '--help']),
        (('mct_seeds', []), ['--data', '--run']), (('mct_score', ['--pred', 'gone', '--data', 'folder:data']), ['gone', 'no such folder']),
        (('mct_score', ['--pred', 'run', '--data', 'folder:data']), ['neither', 'npz']), (('mct_score', ['--pred', 'data/masks', '--data', 'folder:data', '--classes', 'unicorn']), ['unicorn']),
        (('mct_score', ['--pred', 'data/masks', '--data', 'folder:data', '--figure', 'f.png']), ['sweep']),
        (('mct_train', [*TRAIN, '--out', 'y', '--epochs', '0']), ["'0'", 'at least 1']), (('mct_train', [*TRAIN, '--out', 'y', '--image-size', '30']), ['30']),
        (('mct_train', [*TRAIN, '--out', 'y', '--pretrained', 'gone.pth']), ['gone.pth']), (('mct_train', [*TRAIN, '--out', 'y', '--backbone', 'resnet18']), ['resnet18']),
        (('mct_train', [*TRAIN, '--out', 'run', '--lr', '0.5']), ['lr was', '--fresh']), (('mct_info', ['--backbone', 'deit_smal_patch16_224']), ['Perhaps you mean deit_small_patch16_224']),
        (('mct_info', ['--image-size', '225']), ['225']), (('mct_convert', ['gone.pth', '--out', 'z']), ['gone.pth']), (('mct_convert', ['data/labels.csv', '--out', 'z']), ['labels.csv']),
        (('mct_convert', ['gone.pth', '--out', 'run']), ['--overwrite']), (('mct_prepare_voc', ['gone']), ['gone']), (('mct_demo', ['--seed', '-1']), ["'-1'"])]:
        fails(command, argv, capsys, *words)
    assert not (here/'x').exists()

def test_model_of_other_classes(here, capsys, tmp_path):
    make_folder(tmp_path/'other'); f = tmp_path/'other/classes.txt'
    f.write_text('\n'.join([*mini_classes(), 'unicorn']))
    argv = lambda: ['--run', 'run', '--data', f'folder:{tmp_path/"other"}', '--out', str(tmp_path/'x'), '--device', 'cpu']
    fails('mct_seeds', argv(), capsys, '8 classes', '9')
    f.write_text('\n'.join(mini_classes()[::-1]))                                        # same names, another order: silent nonsense if accepted
    fails('mct_seeds', argv(), capsys, 'classes differ', '0 is cat in the model, beetle in the data')
    assert not (tmp_path/'x').exists()

def test_seeds_and_masks_in_one_folder(here, capsys, tmp_path):
    assert cli.mct_seeds([*SEEDS[:4], '--out', str(tmp_path), '--device', 'cpu']) == 0
    (tmp_path/'p0.png').write_bytes((here/'data/masks/p0.png').read_bytes())
    fails('mct_score', ['--pred', tmp_path, '--data', 'folder:data'], capsys, '8 seeds and 1 masks')

def test_debug_shows_the_traceback(here):
    with pytest.raises(ValueError, match='gone'): cli.mct_seeds(['--run', 'gone', '--data', 'folder:data', '--out', 'x', '--debug'])

def test_interrupt(here, capsys, monkeypatch):
    import mctformer_nb.stage as s
    def stop(*a): raise KeyboardInterrupt
    monkeypatch.setattr(s, 'compute_batch', stop)
    assert cli.mct_seeds([*SEEDS[:4], '--out', 'stopped', '--device', 'cpu']) == 130
    assert 'Run the same command again to resume' in capsys.readouterr().err
    assert cli.mct_seeds([*SEEDS[:4], '--out', 'stopped', '--device', 'cpu', '--overwrite']) == 130
    assert 'again, without --overwrite, to resume' in capsys.readouterr().err
    monkeypatch.undo(); os.chdir(here)
    assert cli.mct_seeds([*SEEDS[:4], '--out', 'stopped', '--device', 'cpu']) == 0

def test_ctrl_c_in_a_shell(here, root):
    code = 'import signal, sys, time; from mctformer_nb import cli, stage\nsignal.signal(signal.SIGINT, signal.default_int_handler)\ndef wait(*a): print("ready", flush=True); time.sleep(60)\nstage.compute_batch = wait; sys.exit(cli.mct_seeds(sys.argv[1:]))'
    p = subprocess.Popen([sys.executable, '-c', code, *SEEDS[:4], '--out', 'stopped2', '--device', 'cpu'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         env=os.environ | dict(PYTHONPATH=os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])))
    assert p.stdout.readline() == 'ready\n'; p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=300)
    assert p.returncode == 130 and 'resume' in err and 'Traceback' not in err

def test_info_json(here):
    assert cli.mct_info(['--variant', 'v2', '--num-classes', '80', '--json', 'i.json']) == 0
    found = json.loads((here/'i.json').read_text())
    assert found['v2']['params'] > 2e7 and 'v1' not in found and found['command'] == 'mct_info' and found['status'] == 0

def test_json_to_stdout(here, capsys):
    "With `--json -`, stdout is JSON and nothing else, also for an error"
    assert cli.mct_seeds([*SEEDS[:4], '--out', 'seeds_j', '--device', 'cpu', '--json', '-']) == 0
    out, err = capsys.readouterr(); found = json.loads(out)
    assert found['train']['written'] == 8 and found['next'] == 'mct_score --pred seeds_j --data folder:data --split train --json seeds.json' and found['seconds'] >= 0
    assert 'done in' in err and f'next: {found["next"]}' in err
    assert cli.mct_seeds(['--run', 'gone', '--data', 'folder:data', '--json', '-']) == 2
    found = json.loads(capsys.readouterr().out)
    assert found['status'] == 2 and 'gone' in found['error']
    assert cli.mct_seeds(['--run', 'gone', '--data', 'folder:data', '--json', 'error.json']) == 2 and not (here/'error.json').exists()

@pytest.mark.skipif(os.name != 'posix', reason='permissions of POSIX')
@pytest.mark.parametrize('mask', [0o022, 0o002, 0o077])
def test_others_may_read_what_the_umask_lets_them(here, tmp_path, mask):
    "Every file of a run, weights too: safetensors' own writer makes them private"
    before = os.umask(mask)
    try: assert cli.mct_train([*TRAIN, '--valid-split', 'train', '--out', str(tmp_path/'run')]) == 0
    finally: os.umask(before)
    modes = {p.relative_to(tmp_path/'run').as_posix(): p.stat().st_mode & 0o777 for p in (tmp_path/'run').rglob('*') if p.is_file()}
    assert {'model.safetensors', 'best/model.safetensors', 'config.json', 'history.csv', 'resume.pt'} <= modes.keys() and set(modes.values()) == {0o666 & ~mask}, modes

@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be'])
def test_class_names_of_a_conversion_in_any_encoding(tmp_path, encoding, capsys):
    import torch
    from test_models import reference_weights
    names, mark = ['caf\u00e9', '\u732b', 'dog'], '\ufeff' if encoding[-2:] in ('le', 'be') else ''
    torch.save(dict(model=reference_weights('v2')), tmp_path/'r.pth'); (tmp_path/'names.txt').write_bytes((mark + '\r\n'.join(names) + '\r\n').encode(encoding))
    argv = [str(tmp_path/'r.pth'), '--out', str(tmp_path/'run'), '--image-size', '32', '--classes']
    assert cli.mct_convert([*argv, str(tmp_path/'names.txt')]) == 0 and json.loads((tmp_path/'run/config.json').read_text(encoding='utf-8'))['classes'] == names
    (tmp_path/'names.txt').write_bytes('caf\u00e9\ncat\ndog\n'.encode('latin-1'))
    fails('mct_convert', [*argv, tmp_path/'names.txt', '--overwrite'], capsys, 'names.txt', 'UTF-8')
    fails('mct_convert', [*argv, 'cat,dog', '--overwrite'], capsys, '2 class names for 3 classes')

@pytest.mark.parametrize('encoding', ['ascii', 'cp1252'])
def test_class_names_that_the_console_cannot_show(tmp_path, root, encoding):
    "They are shown as question marks, or escaped in JSON; files have them whole"
    make_folder(tmp_path/'data'); names = ['\u732b', 'caf\u00e9', *mini_classes()[2:]]
    for f in ('labels.csv', 'classes.txt'):
        text = (tmp_path/'data'/f).read_text(); text = re.sub(rf'\b{mini_classes()[0]}\b', names[0], re.sub(rf'\b{mini_classes()[1]}\b', names[1], text))
        (tmp_path/'data'/f).write_text(text, encoding='utf-8')
    code = 'import sys, shlex; from mctformer_nb import cli\nfor line in sys.argv[1:]:\n  name, *argv = shlex.split(line)\n  assert getattr(cli, name)(argv) == 0, line'
    lines = [f'mct_train {shlex.join(TRAIN)} --out run', 'mct_seeds --run run --data folder:data --device cpu --out seeds', 'mct_score --pred seeds --data folder:data', 'mct_score --pred data/masks --data folder:data --json -']
    env = {k: v for k,v in os.environ.items() if k not in ('PYTHONUTF8', 'LC_ALL', 'LANG')} | dict(PYTHONIOENCODING=encoding, PYTHONPATH=str(root))
    r = subprocess.run([sys.executable, '-c', code, *lines], cwd=tmp_path, env=env, capture_output=True)
    assert r.returncode == 0, r.stderr.decode(encoding, 'replace')
    out = r.stdout.decode(encoding); found = json.loads(out[out.rindex('\n{'):])
    assert {*names} <= found['per_class'].keys() and json.loads((tmp_path/'run/config.json').read_text(encoding='utf-8'))['classes'] == names
    assert ('caf?' in out) == (encoding == 'ascii') and '?' in out

def test_following_the_hints(here, capsys):
    "The chain by its own hints and default folders, from the first command on"
    argv = [*TRAIN, '--out', 'hints']
    line = 'mct_train ' + ' '.join(argv); seen = []
    while line and len(seen) < 4:
        name, *argv = shlex.split(line); seen.append(name); command = getattr(cli, name, None) or getattr(cli_masks, name)
        argv = [a for i,a in enumerate(argv) if '--json' not in argv[max(0, i-1):i+1]]           # the hint's own file
        assert command([*argv, *(['--workers', '1'] if name == 'mct_crf_labels' else []), '--json', f'{name}.out']) == 0, capsys.readouterr().err
        line = json.loads((here/f'{name}.out').read_text())['next']
    assert seen == ['mct_train', 'mct_seeds', 'mct_score', 'mct_crf_labels']
    assert line.removesuffix(' --recipe quick') == 'mct_affinity --labels hints/labels --data folder:data --split train' and len(list((here/'hints/labels').glob('*.npz'))) == 8

@pytest.mark.parametrize('gpu', [True, False])
def test_recipes(monkeypatch, gpu):
    "What is given wins over the recipe; without a word drawn data take the quick one, photographs on a computer without a GPU the frozen one"
    import argparse
    monkeypatch.setattr('torch.cuda.is_available', lambda: gpu)
    def made(data, stage='train', **kw):
        a = argparse.Namespace(data=data, **dict(dict.fromkeys(('recipe', 'backbone', 'pretrained', 'variant', 'epochs', 'lr_mult')), **kw))
        cli.fill_recipe(a, stage, dict(backbone='deit_small_patch16_224', epochs=60)); return a
    full = made('folder:x', recipe='reference')
    assert (full.backbone, full.epochs, full.lr_mult) == ('deit_small_patch16_224', 60, None)
    quick = made('folder:x', recipe='quick', epochs=3)
    assert (quick.backbone, quick.epochs, quick.image_size) == ('mct_tiny_patch8_96', 3, 96) and quick.lr_mult
    assert made('mini').recipe == 'quick' and made('mini', recipe='reference').epochs == 60
    assert made('folder:x').recipe == ('reference' if gpu else 'frozen')
    for kw in (dict(backbone='deit_tiny_patch16_224'), dict(pretrained='w.pth'), dict(variant='v2')):          # whoever names a network means the paper's training
        for data in ('mini', 'voc:x'): other = made(data, **kw); assert other.recipe == 'reference' and not other.lr_mult
    for stage in ('affinity', 'segment'):
        frozen = made('voc:x', stage, recipe='frozen', epochs=7)
        assert frozen.epochs == 7 and frozen.lr_mult and Path(frozen.pretrained).is_file() and frozen.backbone == Path(frozen.pretrained).stem
        assert not made('voc:x', stage, recipe='frozen', backbone='resnet18', pretrained='w.pth').lr_mult               # made for another network

@pytest.mark.parametrize('stage', ['affinity', 'segment'])
def test_recipe_for_a_laptop_fits_its_network(stage):
    "Factors for layers whose norms are frozen, hence without parameters"
    from mctformer_nb.affinitynet import AffinityNet
    from mctformer_nb.deeplab_net import DeepLab
    from mctformer_nb.learner import param_groups
    r = cli.FROZEN_RECIPE[stage]; net = AffinityNet(r['backbone']) if stage=='affinity' else DeepLab(3, r['backbone'], width=8, output_stride=r['output_stride'])
    groups = param_groups(net, lr_mult=r['lr_mult']); still = {n.split('.')[2] for n,p in net.named_parameters() if not p.requires_grad and n.startswith('backbone.net')}
    assert {'conv_stem', 'blocks'}<=still and sum(len(g['params']) for g in groups)==sum(p.requires_grad for p in net.parameters())

def test_reader_that_leaves(here, root):
    "`| head -1` ends the command without a message"
    code = 'import sys; from mctformer_nb import cli; sys.exit(cli.mct_info(["--variant", "v1"]))'
    p = subprocess.run(['bash', '-c', f"'{sys.executable}' -u -c '{code}' | head -c 1 >/dev/null"], capture_output=True, text=True, cwd=root)
    assert 'Traceback' not in p.stderr and 'Errno' not in p.stderr

@pytest.mark.parametrize('seeds,hint', [('runs/seeds', ''), ('seeds', '--seeds seeds '), (None, '--seeds DIR ')])
def test_hint_of_affinity_names_the_seeds(tmp_path, monkeypatch, seeds, hint):
    "Beside the affinity they are found without a word, beside the labels they are named, elsewhere the user is asked"
    import mctformer_nb.affinitynet as A, mctformer_nb.cli_masks as M
    monkeypatch.chdir(tmp_path); monkeypatch.setattr(A, 'train_affinity', lambda *a, **kw: None); monkeypatch.setattr(M, 'report_training', lambda a: None)
    if seeds: (tmp_path/seeds).mkdir(parents=True)
    assert M.mct_affinity(['--labels', 'labels', '--data', 'mini', '--out', 'runs/affinity', '--json', 'a.json'])==0
    assert json.loads((tmp_path/'a.json').read_text())['next'].startswith(f'mct_masks {hint}--affinity runs/affinity --data mini ')

ROOT = Path(__file__).parents[1]

def told():
    "(where, command line, is it whole?) of every command that README, changelog and notebooks name"
    nbs = [f for f in sorted((ROOT/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in f.parts]
    for f in (ROOT/'README.md', ROOT/'CHANGELOG.md', *nbs):
        text = f.read_text(encoding='utf-8')
        if f.suffix == '.ipynb': text = '\n'.join(''.join(c['source']) for c in json.loads(text)['cells'])
        for block in re.findall(r'^```(?:sh|bash)?\n(.*?)^```', text, re.S|re.M):
            lines = re.sub(r'\\\n\s*', ' ', block).splitlines()
            yield from ((f.name, m[1], True) for line in lines if (m := re.search(r'(?:^|&& |; |-- |--no_python )(mct_\w+ .*)', line)))
        yield from ((f.name, m, False) for m in re.findall(r'`(mct_\w+ [^`\n]+)`', text))

def test_every_command_that_is_told_is_understood(monkeypatch, capsys):
    "As its own parser reads it; of a mere mention only the options. The examples of --help too"
    parsers = {}
    def parse(p, argv, body): parsers[p.prog] = p; p.parse_args(argv); return 0
    monkeypatch.setattr('mctformer_nb.command.run_command', parse)
    def understood(line):
        name, *argv = shlex.split(line, comments=True); command = next(getattr(m, name) for m in (cli, cli_masks, cli_tools, cli_scale) if hasattr(m, name))
        try: return command(argv) == 0
        except SystemExit as e: return e.code == 0
    lines = list(told()); assert len(lines) > 40
    for name in {line.split()[0] for _,line,_ in lines}: assert understood(f'{name} --help')
    for where,line,whole in lines:
        if whole: assert understood(line), (where, line, capsys.readouterr().err)
        name, *argv = shlex.split(line, comments=True)
        assert not (unknown := {a for a in argv if a.startswith('--')} - {*parsers[name]._option_string_actions}), (where, line, unknown)
    for p in parsers.values():
        for line in p.epilog.splitlines()[1:]: assert understood(line), (line, capsys.readouterr().err)
