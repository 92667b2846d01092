"""What `gpu.py smoke` checks: a check is a function (device, work folder) that yields rows (what, ok, note).

`ok` is None for what cannot be checked on this device. A check runs in a process of its own, see `gpu.py`.
"""
import ast
import builtins
import copy
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
import types
import warnings
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image

from vit_tinyimagenet import cli, recipes
from vit_tinyimagenet.core import device as core
from vit_tinyimagenet.data import pack as data
from vit_tinyimagenet.data.augment import AugmentConfig, augment, normalize, with_statistics
from vit_tinyimagenet.data.loader import Batches
from vit_tinyimagenet.data.synthetic import make_synthetic
from vit_tinyimagenet.deploy.predict import predict
from vit_tinyimagenet.evaluation import explain, features as frozen
from vit_tinyimagenet.evaluation.predictions import evaluate
from vit_tinyimagenet.methods.dino import Dino
from vit_tinyimagenet.methods.distill import Distill
from vit_tinyimagenet.models.pretrained import load_pretrained, save_release
from vit_tinyimagenet.models.vit import VisionTransformer, VitConfig
from vit_tinyimagenet.runs import runner
from vit_tinyimagenet.runs.record import provenance, run_differences
from vit_tinyimagenet.training.diagnostics import explain_out_of_memory
from vit_tinyimagenet.training.step import train_step

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT/'vit_tinyimagenet'
PHASES = (0., .5, .9)   # of a run: coarse images, dropped patches and CutMix come and go between them
FP32, HALF = 1e-3, 3e-2   # relative differences of losses that pass


# --- what the checks share ---

def twin(work):
    "A small synthetic archive, the same for all checks."
    path = work/'twin.zip'
    if not path.exists(): make_synthetic(path, per_class=30, n_valid=10)   # put in place whole, so several may try
    return path


def open_twin(work): return data.open_data(twin(work), work)


def random_release(vit, work, name):
    "A release file of an untrained network for the twin: weights that ship with the package may not be here."
    info, path = open_twin(work).info, work/f'{name}-{os.getpid()}.safetensors'
    torch.manual_seed(1)
    model = VisionTransformer(replace(vit, num_classes=len(info.wnids), weight_init='torch'))
    torch.nn.init.normal_(model.head.weight, std=.5)   # a head of zeros would tell all images alike
    save_release(model, path, info)
    return str(path)


def on_twin(recipe, work, **train):
    "A recipe on the synthetic data, with weights of random networks where it begins with some."
    objective, model = recipe.objective, recipe.model
    if isinstance(objective, Distill): objective = replace(objective, teacher=random_release(VitConfig(depth=2), work, 'teacher'))
    given = dict(init=random_release(model, work, 'init')) if recipe.init else {}
    if objective.uses_labels: model = replace(model, num_classes=None)
    train = dict(budget_minutes=None, max_minutes=None) | train
    train = replace(recipe.train, compile='off', **train)   # compiling is a matter of checks of its own
    return replace(recipe, data=str(twin(work)), model=model, objective=objective, train=train, **given)


def shrunk(recipe):
    "The same kinds of layers, fewer of them, small batches, and no dropout: its numbers are a device's own."
    no_drop = dict(drop_rate=0., head_drop_rate=0., drop_path_rate=0.)
    model, train = recipe.model, replace(recipe.train, batch_size=16)
    # where weights begin with zeros, the first losses say nothing
    if isinstance(model, VitConfig):
        model = replace(model, depth=min(2, model.depth), weight_init='torch', **no_drop)
    return replace(recipe, model=model, train=train)


class Steps:
    "Training steps of a recipe, one after another without end."
    def __init__(self, recipe, pack, device, precision):
        recipe = replace(recipe, train=replace(recipe.train, device=device, precision=precision))
        self.recipe = recipe = runner.resolve_recipe(recipe, pack)
        self.state = runner.new_state(recipe, pack)
        self.state.model.train()
        batches, self.loss_fn = runner.loop_parts(recipe, pack, pack.train, self.state)
        self.batches = (b for e in itertools.count() for b in batches.epoch(e))

    def __call__(self, progress):
        return train_step(self.state, next(self.batches), self.loss_fn, self.recipe.optim.lr/3, progress)


def refuse_fallback():
    "Let a step that could not be compiled raise, where the package warns and goes on without."
    warnings.filterwarnings('error', message='.*could not be compiled')


def far(a, b):
    "The largest difference of two tensors, by the largest number in them."
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return ((a-b).abs().max()/a.abs().max().clamp_min(1e-12)).item()


def judged(what, difference, most):
    return what, bool(difference <= most), f'{difference:.1e}, at most {most:.0e}'


# --- steps of each recipe ---

def losses(recipe, pack, device, precision):
    "Losses of two steps in each phase, up to the first that the loss scaler left out."
    steps, out = Steps(recipe, pack, device, precision), []
    for progress in (p for p in PHASES for _ in range(2)):
        scale = steps.state.scaler.get_scale()
        out.append(steps(progress)['loss'].item())
        if steps.state.scaler.get_scale() < scale: break
    return torch.tensor(out)


def agreement(recipe, pack, device):
    "Losses on the device, in each precision, beside those of a CPU in float32."
    reference = losses(recipe, pack, 'cpu', 'fp32')
    half = HALF*(5 if isinstance(recipe.objective, Dino) else 1)   # whose low temperatures make rounding large
    for precision, most in (('fp32', FP32), ('bf16', half), ('fp16', half)):
        if device != 'cpu' and precision not in core.product_rates(torch.device(device)):
            yield precision, None, 'emulated here'
            continue
        got = losses(recipe, pack, device, precision)
        n = len(got)
        difference = ((got-reference[:n]).abs()/reference[:n].abs()).max().item()
        what, ok, note = judged(f'loss in {precision}', difference, most)
        yield what, ok and bool(got.isfinite().all()), f'{note}; {n} steps, last {got[-1]:.4f}'


def frames_of_package():
    "Where the code is that is running now, from the package's outermost line to its innermost."
    frames = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(PACKAGE)]
    return ' < '.join(f'{Path(f.filename).name}:{f.lineno} {f.line}' for f in frames[::-1][:2])


@contextmanager
def noting_waits(seen):
    "While open, each line at which the host waits for the device is noted, not only the first one."
    def note(message, *args, **kwargs):
        if 'called a synchronizing' in str(message): seen.append(frames_of_package() or 'outside the package')
    with warnings.catch_warnings():
        warnings.simplefilter('always')
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode('warn')
        try: yield
        finally: torch.cuda.set_sync_debug_mode('default')


def waits(recipe, pack, device):
    "Lines of a step, and of the reading of a batch, at which the host waits for the device."
    if device == 'cpu':
        yield 'waits', None, 'needs CUDA'
        return
    steps, seen = Steps(recipe, pack, device, 'auto'), []
    for progress in PHASES:
        for _ in range(2): steps(progress)
        torch.cuda.synchronize()
        with noting_waits(seen): steps(progress)
    for line in dict.fromkeys(seen): yield 'wait within a step', False, f'{seen.count(line)}x {line}'
    if not seen: yield 'waits', True, f'none in steps at {PHASES}'


def as_it_is(recipe, pack, device):
    "The recipe at its own size: two steps in each phase, with finite losses."
    if device == 'cpu':
        yield 'own size', None, 'too slow for a CPU'
        return
    steps = Steps(recipe, pack, device, 'auto')
    found = torch.stack([steps(p)['loss'] for p in PHASES for _ in range(2)])
    peak = torch.cuda.max_memory_allocated()/2**30
    yield 'own size', bool(found.isfinite().all()), f'last loss {found[-1].item():.3f}, peak {peak:.2f} GiB'


def steps_of(name):
    "The check of one recipe."
    def check(device, work):
        recipe, pack = on_twin(cli.RECIPES[name](), work), open_twin(work)
        small = shrunk(recipe)
        if recipe.init:   # the weights have to fit the smaller network
            small = replace(small, init=random_release(small.model, work, 'small'))
        yield from waits(small, pack, device)
        yield from agreement(small, pack, device)
        yield from as_it_is(recipe, pack, device)
    return check


# --- whole runs ---

def short_run(work, **train):
    "The demo, shortened, with everything that a checkpoint has to keep."
    recipe = on_twin(recipes.demo(), work)
    train = dict(epochs=3, batch_size=16, watch='minival', precision='fp32', checkpoint_minutes=.01) | train
    return replace(recipe, augment=replace(recipe.augment, cutmix=.5), train=replace(recipe.train, **train))


def in_half(device):
    "The precision whose products are fastest: the same in two runs, as one that each measures need not be."
    return core.pick_precision(torch.device(device))


def stop_after(epochs):
    "What to log with, so that SIGTERM stops a run at the end of its epoch `epochs`."
    return lambda row: os.kill(os.getpid(), signal.SIGTERM) if row['epoch'] == epochs else None


def silent(row): pass


def resumed(device, work):
    "A run stopped by the clock, then by SIGTERM, and resumed is the run left alone, to the bit."
    recipe = short_run(work, device=device, precision=in_half(device), deterministic=True, epochs=5)
    alone = runner.train(recipe, work/'alone', silent, work)
    epoch_s = 20*24/alone.log.images_per_s.iloc[-1]
    hurried = replace(recipe, train=replace(recipe.train, max_minutes=1.5*epoch_s/60))
    sessions = [runner.train(hurried, work/'stopped', silent, work),
                runner.train(recipe, work/'stopped', stop_after(4), work),
                run := runner.train(recipe, work/'stopped', silent, work)]
    yield 'stopped and resumed', run.finished, f"{run.summary['sessions']} of {len(sessions)} sessions needed"
    differ = run_differences(alone.folder, run.folder)
    yield 'equal to the run left alone', not differ, f'differ: {differ}' if differ else 'to the bit'


def moved(device, work):
    "A run goes from the CPU to the device and back; its losses are those of a run that stayed on the CPU."
    there = lambda where: short_run(work, device=where)
    stayed = runner.train(there('cpu'), work/'stayed', silent, work).log
    for where, log in (('cpu', stop_after(1)), (device, stop_after(2)), ('cpu', silent)):
        run = runner.train(there(where), work/'moved', log, work)
        yield f'on {where}', run.finished == (log is silent), f'{len(run.log)} epochs'
    columns = [c for c in stayed if c.endswith('loss')]
    worst = ((run.log[columns]-stayed[columns])/stayed[columns]).abs().to_numpy().max()
    yield judged('losses of its epochs', worst, 1e-2)


def compiled(mode):
    "The check of one mode of `TrainConfig.compile`: runs with evaluations and a resume between epochs."
    def check(device, work):
        refuse_fallback()
        recipe = short_run(work, device=device, precision=in_half(device), epochs=2, deterministic=True)
        eager = runner.train(recipe, work/'eager', silent, work)
        recipe = replace(recipe, train=replace(recipe.train, compile=mode))
        out, start = work/'compiled', time.perf_counter()
        first = runner.train(recipe, out, stop_after(1), work)
        yield 'first epoch', not first.finished, f'{time.perf_counter()-start:.0f} s'
        run = runner.train(recipe, out, silent, work)
        yield 'resumed', run.finished, f'{time.perf_counter()-start:.0f} s'
        if device != 'cpu' and mode == 'reduce-overhead':
            skipped = torch._dynamo.utils.counters['inductor']['cudagraph_skips']
            yield 'CUDA graphs', not skipped, f'{skipped} functions left without'
        worst = (run.log.train_loss/eager.log.train_loss-1).abs().max()
        yield judged('losses of its epochs', worst, HALF)
        alone = runner.train(recipe, work/'alone', silent, work)
        differ = run_differences(alone.folder, run.folder)
        yield 'equal to the run left alone', not differ, f'differ: {differ}' if differ else 'to the bit'
    return check


def alone_by_torchrun(device, work):
    "One process, as torchrun starts it: NCCL, or gloo on a CPU."
    os.environ.update(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', LOCAL_WORLD_SIZE='1', MASTER_ADDR='127.0.0.1',
                      MASTER_PORT=str(20000+os.getpid() % 20000))
    run = runner.train(short_run(work, device=device, epochs=1), work/'torchrun', silent, work)
    yield 'finished', run.finished, f"{run.summary['processes']} process"


# --- the rest of the package ---

def facts(device, work):
    "What this machine is."
    where = provenance(torch.device(device))
    yield 'hardware', True, where['hardware']
    yield 'versions', True, f"{where['versions']}, {os.cpu_count()} cores"
    if device == 'cpu': return
    p = torch.cuda.get_device_properties(0)
    yield 'device', True, (f'capability {p.major}.{p.minor}, {p.total_memory/2**30:.0f} GiB, '
                           f'{p.multi_processor_count} multiprocessors')
    yield 'CUDA', True, f'{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}'
    rates = core.product_rates(torch.device(device))
    yield 'products', True, ', '.join(f'{p} {r/1e3:.0f} TFLOP/s' for p, r in rates.items())
    query = 'name,driver_version,memory.free,memory.total,clocks.sm,clocks.max.sm,power.limit'
    command = ['nvidia-smi', f'--query-gpu={query}', '--format=csv,noheader']
    p = subprocess.run(command, capture_output=True, encoding='utf-8')
    yield 'nvidia-smi', True, (p.stdout or p.stderr).strip()


def same_draws(device, work):
    "Random numbers to the bit, and every augmentation to rounding, on the device as on the CPU."
    split, on = open_twin(work).train, torch.device(device)
    views = dict(plain=AugmentConfig(pad=4), part=AugmentConfig(scale=(.4, 1.), grayscale=.2),
                 three=AugmentConfig(pad=4, three_augment=True),
                 original=recipes.original_notebook().augment)
    here, there = (next(Batches(split, 64, 3, device=d).epoch()) for d in ('cpu', on))
    pairs = (here.x, there.x), (here.draws.bits('x', 4), there.draws.bits('x', 4))
    same = all(torch.equal(a, b.cpu()) for a, b in pairs)
    yield 'draws and pixels', same, 'to the bit' if same else 'differ'
    for name, cfg in views.items():
        cfg = with_statistics(cfg, [.5]*3, [.25]*3)
        a, b = (augment(batch.x, batch.draws, cfg).cpu() for batch in (here, there))
        moved = ((a-b).abs().amax((1, 2, 3)) > 1e-3).float().mean().item()
        # a rotation takes the nearest pixel, and rounding may choose its neighbour
        most, note = (.1 if cfg.degrees else 0), f'{moved:.1%} of the images differ by over 1e-3'
        yield f'augment, {name}', moved <= most, note


def same_answers(device, work):
    "Evaluation, prediction, explanations and neighbours on the device as on the CPU."
    pack, path = open_twin(work), random_release(VitConfig(depth=3), work, 'answers')
    models = [load_pretrained(path, d) for d in ('cpu', device)]
    numbers = lambda table: torch.tensor(table[['p1', 'p5', 'p_label', 'loss']].to_numpy())
    for precision, most in (('fp32', 1e-4), ('bf16', 5e-2)):
        a, b = (numbers(evaluate(m, pack, precision=p)) for m, p in zip(models, ('fp32', precision)))
        yield judged(f'evaluate in {precision}', far(a, b), most)
    image = Path(work/'image.png')
    Image.fromarray(pack.valid.images[0].permute(1, 2, 0).numpy()).save(image)
    a, b = (predict(image, m) for m in models)
    yield judged('predict', far(*(torch.tensor(t.probability.to_numpy()) for t in (a, b))), 1e-4)
    batch = next(Batches(pack.valid, 16, shuffle=False).epoch())
    x, y = normalize(batch.x, pack.info.mean, pack.info.std), batch.y
    kinds = dict(grad_cam=explain.grad_cam, attention_maps=lambda m, x, y: explain.attention_maps(m, x),
                 rollout=lambda m, x, y: explain.rollout(explain.attention_maps(m, x)),
                 patch_filters=lambda m, x, y: explain.patch_filters(m).abs(),
                 patch_curve=lambda m, x, y: explain.patch_curve(m, x, y, explain.grad_cam(m, x, y)))
    for name, f in kinds.items():
        yield judged(name, far(*(f(m, x.to(d), y.to(d)) for m, d in zip(models, ('cpu', device)))), 1e-3)
    yield from same_neighbours(pack, models, device)


def same_neighbours(pack, models, device):
    "Features and k-nearest neighbours of an encoder."
    view = lambda b: normalize(b.x, pack.info.mean, pack.info.std)
    known = []
    for m, d in zip(models, ('cpu', device)):
        encoder = copy.deepcopy(m)
        encoder.head = torch.nn.Identity()
        of = lambda s: frozen.features(encoder, Batches(s, 128, shuffle=False, device=d).epoch(), view)
        known.append((of(pack.train), of(pack.valid)))
    (a, _), (b, _) = known
    yield judged('features', far(a[0], b[0]), 1e-4)
    near = [frozen.knn_predictions(*train, *asked, len(pack.info.wnids)) for train, asked in known]
    yield judged('neighbours', far(near[0].logits.exp(), near[1].logits.exp()), 1e-2)


def tools(device, work):
    "The learning-rate finder, gradient accumulation, and the message where memory runs out."
    recipe = short_run(work, device=device)
    if device != 'cpu':
        run = runner.train(short_run(work, device='cuda:0', epochs=1), work/'named', silent, work)
        yield 'cuda:0', run.finished, run.summary['hardware']
    found = runner.find_lr(recipe, work, steps=20)
    yield 'find_lr', bool(found.loss.notna().all()), f'{len(found)} rates'
    pack = open_twin(work)
    of = lambda n: losses(replace(recipe, train=replace(recipe.train, accumulate=n)), pack, device, 'fp32')
    yield judged('accumulate', far(of(1), of(4)), 1e-3)
    try:
        with explain_out_of_memory(64): torch.empty(2**45, device=device)
        said = 'a tensor of 128 TiB was given'
    except MemoryError as e: said = str(e)
    yield 'out of memory', 'batch_size=64' in said, said


# --- the notebooks' cells marked `#| cuda` ---

def cells_of(path):
    "The code of a notebook's cells that are run, with the flags of each; IPython's own lines left out."
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        if cell['cell_type'] != 'code': continue
        source = ''.join(cell['source'])
        flags = set(re.findall(r'^#\|\s*(\w+)\s*$', source, re.MULTILINE))
        source = re.sub(r'^(\s*)[%!].*$', r'\1pass', source, flags=re.MULTILINE)
        if not flags & {'slow', 'realdata'} and 'nbdev_export(' not in source: yield source, flags


def names(source):
    "What a cell reads from others, and what it defines for others."
    read, defined, local = set(), set(), set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name): (read if isinstance(node.ctx, ast.Load) else defined).add(node.id)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): defined.add(node.name)
        if isinstance(node, (ast.FunctionDef, ast.Lambda)): local |= {a.arg for a in ast.walk(node.args)
                                                                      if isinstance(a, ast.arg)}
        if isinstance(node, (ast.FunctionDef, ast.comprehension)):   # what is bound inside is nobody else's
            local |= {o.id for o in ast.walk(node) if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Store)}
    return read-local-set(dir(builtins)), defined-local


def needed(before, source):
    "Those of the cells before that define what a cell reads, or what these read, in their order."
    known, wanted, kept = [names(s) for s in before], names(source)[0], set()
    while more := {i for i, (_, defined) in enumerate(known) if i not in kept and defined & wanted}:
        kept |= more
        wanted = wanted.union(*(known[i][0] for i in more))
    return [before[i] for i in sorted(kept)]


def import_all(sources, space):
    "Every import of some cells; what is not installed here is passed by."
    nodes = (n for s in sources for n in ast.parse(s).body)
    for node in (n for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))):
        try: exec(compile(ast.Module([node], []), 'imports', 'exec'), space)
        except ImportError as e: print(e)


def small_fastcore():
    "What the cells use of fastcore.test, where it is not installed."
    if find_spec('fastcore'): return ''
    module = types.ModuleType('fastcore.test')
    def test_eq(a, b): assert a == b, f'{a} != {b}'
    def test_close(a, b, eps=1e-5):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        assert torch.allclose(a, b, rtol=0, atol=eps), f'{a} is not near {b}'
    @contextmanager
    def ExceptionExpected(ex=Exception, regex=''):
        try: yield
        except ex as e: assert re.search(regex, str(e)), f'{e!r}: not {regex}'
        else: raise AssertionError(f'no {ex.__name__}')
    for f in (test_eq, test_close, ExceptionExpected): setattr(module, f.__name__, f)
    sys.modules.update({'fastcore': types.ModuleType('fastcore'), 'fastcore.test': module})
    return ', with a stand-in for fastcore.test'


def cuda_cells(device, work):
    "The marked cells, each after the cells that it needs, in a namespace of its own."
    stand_in = small_fastcore()
    for path in sorted((ROOT/'nbs').rglob('[!.]*.ipynb')):
        os.chdir(path.parent)
        cells = list(cells_of(path))
        for i, (source, flags) in enumerate(cells):
            if 'cuda' not in flags: continue
            first = next(line for line in source.splitlines() if not line.startswith('#|'))[:50]
            what = f'{path.stem}: {first}'
            before = [s for s, marked in cells[:i] if device != 'cpu' or 'cuda' not in marked]
            error = run_cells(before, source, source if device != 'cpu' else '')
            ok = not error if error or device != 'cpu' else None   # what it needs is rehearsed on a CPU
            yield what, ok, error or ('needs CUDA' if ok is None else f'passed{stand_in}')


def run_cells(before, source, last):
    "Run what a cell needs, then `last`; returns what went wrong, or nothing."
    space = {'__name__': '__main__'}
    import_all(before, space)
    try:
        for cell in (*needed(before, source), last): exec(compile(cell, 'cell', 'exec'), space)
    except Exception as e: return f'{e!r:.300}'
    return ''


# --- all of them, the most valuable first ---

def hang(device, work):
    "Ends never; not among the checks, but to see that it is cut."
    yield 'begun', True, ''
    time.sleep(1e6)


WHOLE = dict(facts=facts, resume=resumed, cells=cuda_cells)
LATER = dict(devices=moved, answers=same_answers, draws=same_draws, tools=tools, torchrun=alone_by_torchrun)
MODES = {f'compile {m}': compiled(m) for m in ('reduce-overhead', 'default')}   # early: they take longest
FIRST = ('laptop', 'original_notebook', 'original_readme', 'dino_gpu', 'mae_laptop', 'compact_laptop',
         'resnet_laptop')
STEPS = {f'steps {n}': steps_of(n) for n in sorted(cli.RECIPES, key=lambda n: (n not in FIRST, n))}
CHECKS = {**WHOLE, **MODES, **STEPS, **LATER}
HIDDEN = dict(hang=hang)
