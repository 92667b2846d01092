"""What a training step asks of a GPU, counted on one that is not there, and all else that has to work on it.

    cuda_counts.py             compare with the table that is committed, results/cuda/steps.csv
    cuda_counts.py --write     write the table
    cuda_counts.py --only laptop 'whole runs' --verbose

A row is a recipe at a place of its run (the share that is done): the kernels of a step, the waits of the host
for the device, copies to the device and to the host, calls of torch._foreach_* that fell back to a kernel for
each tensor, and the modules that waited. Batches are small, since next to nothing of it depends on their
size. Of other things, such as whole runs, nothing is counted: they only have to work. Images are noise, and
the device is that of fake_cuda.py. Another release of torch may have other kernels: under it, kernels and
fallbacks are not compared.
"""
import argparse
import contextlib
import copy
import csv
import io
import itertools
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Callable, NamedTuple
from unittest.mock import patch

import matplotlib
import torch

import fake_cuda
from fake_cuda import COUNTS, EVER, OnCuda

os.environ['CUDA_VISIBLE_DEVICES'] = ''   # a device that is there stays out of it
fake_cuda.install()   # before the package is imported
matplotlib.use('agg')

from vit_tinyimagenet.bench import steps as bench
from vit_tinyimagenet.core import device as core
from vit_tinyimagenet.recipes import RECIPES
from vit_tinyimagenet.data import pack as data, synthetic as twin
from vit_tinyimagenet.deploy import export, predict, quantize
from vit_tinyimagenet.evaluation import explain, features as frozen, predictions as evaluate
from vit_tinyimagenet.methods.distill import Distill
from vit_tinyimagenet.models import pretrained
from vit_tinyimagenet.runs import runner
from vit_tinyimagenet.runs.ablation import Study, ablate
from vit_tinyimagenet.training import clock, loop, lr_finder, metrics, optim

TABLE = Path(__file__).resolve().parent.parent/'results'/'cuda'/'steps.csv'
COLUMNS = 'recipe at capability kernels waits h2d d2h slow_foreach waits_from'.split()
COUNTED = COLUMNS[3:8]
H100, T4 = (9, 0), (7, 5)   # compute capabilities: with bfloat16, and without
WRITE = '`make cuda-counts WRITE=1`'
STEPS = 1000   # of a run that is entered somewhere
# what CUDA has no deterministic form of (torch.use_deterministic_algorithms), among what might be used here
NOT_DETERMINISTIC = set('''adaptive_avg_pool2d_backward _adaptive_avg_pool2d_backward bincount cumsum
    grid_sampler_2d_backward histc index_reduce kthvalue max_pool2d_with_indices_backward median
    nll_loss2d_forward put_ scatter_reduce reflection_pad2d_backward upsample_bicubic2d_backward
    upsample_bilinear2d_backward'''.split())


# --- steps that are counted ---

class Case(NamedTuple):
    "A recipe, where in its run a step of it is counted, and on what kind of device."
    recipe: Callable
    at: tuple = (0.,)
    batch_size: int = 4
    capability: tuple = H100
    free: int = 79 << 30   # bytes of the device


def changed(name, **parts):
    "A recipe with other fields: `train=dict(accumulate=3)`, or a field of the recipe itself."
    recipe = RECIPES[name]()
    whole = lambda k, v: replace(getattr(recipe, k), **v) if isinstance(v, dict) else v
    return replace(recipe, **{k: whole(k, v) for k, v in parts.items()})


def variants():
    "What no recipe asks for, at once."
    vit = dict(global_pool='token', pos_embed='learn', bias=True, init_values=1e-5, drop_path_rate=.1,
               drop_rate=.1)
    return changed('laptop', train=dict(accumulate=3, ema_decay_end=.99), model=vit)


def three_augment():
    jitter = dict(three_augment=True, color_jitter=(.3, .3, .3, 0.), degrees=10.)
    return changed('laptop', augment=jitter)


def taught_resnet(): return changed('resnet_laptop', objective=Distill('resnet_laptop'), train=dict(low_res_until=0.))


def layer_decay(): return changed('laptop', optim=dict(layer_decay=.8))


CASES = {
    'laptop': Case(RECIPES['laptop'], (0., .8, .9)),
    'laptop on a T4': Case(RECIPES['laptop'], (0., .8, .9), capability=T4),
    'laptop_streamed': Case(RECIPES['laptop'], free=0),   # images that do not fit, if that is looked at
    'sprint': Case(RECIPES['sprint'], (0., .6, .96)),
    'fine_tune': Case(RECIPES['fine_tune']),
    'own_images': Case(RECIPES['own_images']),
    'original_notebook': Case(RECIPES['original_notebook'], batch_size=2),
    'original_readme': Case(RECIPES['original_readme'], batch_size=2),
    'mae_laptop': Case(RECIPES['mae_laptop']),
    'dino_laptop': Case(RECIPES['dino_laptop'], (0., .9)),
    'dino_gpu': Case(RECIPES['dino_gpu'], (0., .9)),
    'compact_laptop': Case(RECIPES['compact_laptop'], (0., .5, .95)),
    'laptop_long': Case(RECIPES['laptop_long']),
    'resnet_laptop': Case(RECIPES['resnet_laptop'], (0., .8)),
    'three_augment': Case(three_augment, batch_size=16),
    'variants': Case(variants, batch_size=6),
    'taught_resnet': Case(taught_resnet),
    'layer_decay': Case(layer_decay, (.9,)),
}


def on_cuda(recipe, **train):
    "A recipe for the fake device, which compiles nothing."
    given = {'budget_minutes': None, 'device': 'cuda', 'compile': 'off', **train}
    return replace(recipe, train=replace(recipe.train, **given))


def noise(n=64, n_valid=40):
    "A pack of noise, with the names of the real classes."
    g = torch.Generator().manual_seed(0)
    pixels = lambda n: torch.randint(256, (n, 3, 64, 64), generator=g, dtype=torch.uint8)
    split = lambda n: data.Split(pixels(n), torch.arange(n)%200, [f'{i}.png' for i in range(n)])
    info = replace(pretrained.load_pretrained('laptop').info, data_sha256='0', source='noise')
    return SimpleNamespace(folder=Path('noise'), info=info, train=split(n), valid=split(n_valid))


def by_generation(precision, device, *sides):
    "The rates of products, GFLOP/s, where no clock can tell."
    half = dict(bf16=1e6, fp16=1e6) if fake_cuda.DEVICE.capability >= (8, 0) else dict(bf16=4e3, fp16=6e4)
    return {'fp32': 1e4, **half}[precision]


def become(*capability_and_free):
    "Be another GPU from now on: see `fake_cuda.install`."
    fake_cuda.install(*capability_and_free)
    core.product_rates.cache_clear()


core.matrix_rate = by_generation
TRY = clock.precision_rates
clock.precision_rates = lambda state, batches, loss_fn: core.product_rates(state.device)


class Enough(Exception):
    "What ends a run once its step is counted."


def counts_of_a_step(state, batches, loss_fn, at):
    "From the entry of the second step to that of the third, so with all that the loop does in between."
    inner, entered, found = loop.train_step, 0, None
    def counted(*args, **kwargs):
        nonlocal entered, found
        entered += 1
        if entered == 2: COUNTS.clear()
        if entered < 3: return inner(*args, **kwargs)
        found = copy.deepcopy(COUNTS)
        raise Enough
    state.total_steps, state.step, state.batch, loop.train_step = STEPS, round(at*STEPS), 0, counted
    try: loop.fit(state, batches, loss_fn)
    except Enough: return found
    finally: loop.train_step = inner
    raise RuntimeError(f'only {entered} of 3 steps were begun')


def counted(name):
    "A case's (row of the table, counts), one for each place."
    case, pack = CASES[name], noise()
    become(case.capability, case.free)
    recipe = runner.resolve_recipe(on_cuda(case.recipe(), batch_size=case.batch_size), pack)
    with OnCuda():
        state = runner.new_state(recipe, pack)
        # or the first steps in float16 are left out, and AdamW begins in the one that is counted
        if state.scaler.is_enabled(): state.scaler.load_state_dict({**state.scaler.state_dict(), 'scale': 1.})
        parts = runner.loop_parts(recipe, pack, pack.train, state)
        for at in case.at:
            counts = counts_of_a_step(state, *parts, at)
            yield row_of(name.removesuffix(' on a T4'), at, case.capability, counts), counts


def row_of(name, at, capability, counts):
    by_module = Counter()
    for line, n in counts.lines['waits'].items(): by_module[line.split(':')[0]] += n
    numbers = (str(getattr(counts, k)) for k in COUNTED)
    return dict(zip(COLUMNS, [name, f'{at:g}', '{}.{}'.format(*capability), *numbers, in_words(by_module)]))


def in_words(times, most=99):
    "'augment.py x2, data.py x1', the most frequent ones first."
    return ', '.join(f'{k} x{n}' for k, n in sorted(times.items(), key=lambda o: (-o[1], o[0]))[:most])


# --- the table ---

def key_of(row): return tuple(row[k] for k in COLUMNS[:3])


def read_table():
    "Rows by what they are of, and the torch that they were counted with; none where there is no table."
    if not TABLE.exists(): return {}, None
    with open(TABLE, newline='', encoding='utf-8') as f: rows = {key_of(r): r for r in csv.DictReader(f)}
    return rows, json.loads(TABLE.with_suffix('.json').read_text(encoding='utf-8'))['torch']


def write_table(rows, path):
    "Write the table, and beside it the torch that it was counted with."
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='', encoding='utf-8') as f:
        table = csv.DictWriter(f, COLUMNS, lineterminator='\n')
        table.writeheader()
        table.writerows(rows)
    about = dict(torch=torch.__version__, hardware='none: .ci/fake_cuda.py')
    path.with_suffix('.json').write_text(json.dumps(about, indent=1) + '\n', encoding='utf-8')


def same_torch(a, b):
    "Whether two versions are of one release; another one may have other kernels."
    return a.split('.')[:2] == b.split('.')[:2]


def complaints(row, counts, was, with_torch):
    "What differs from the table: what grew has lines, what shrank only wants the table to follow."
    name = '{} at {}, capability {}'.format(*key_of(row))
    if was is None: return [f'{name}: not in the table; run {WRITE}']
    kinds = [k for k in COUNTED if same_torch(with_torch, torch.__version__) or k in ('waits', 'h2d', 'd2h')]
    more = {k: int(row[k]) - int(was[k]) for k in kinds}
    says = {k: f'{row[k]} {k}, were {was[k]}' for k in kinds}
    out = [f'{name}: {says[k]}; from {in_words(counts.lines[k], 8)}' for k in kinds if more[k] > 0]
    less = [says[k] for k in kinds if more[k] < 0]
    only_moved = row['waits_from'] != was['waits_from'] and not any(more.values())
    if only_moved: less = [f"waits from {row['waits_from']}, were from {was['waits_from']}"]
    if less: out.append(f'{name}: {", ".join(less)}; run {WRITE}, so that the table stays true')
    return out


# --- what only has to work ---

WHOLE = {}


def whole(name):
    def keep(f):
        WHOLE[name] = f
        return f
    return keep


def fit(recipe, pack, **kwargs):
    "A recipe's loop with what it watches; the state after it."
    recipe = runner.resolve_recipe(recipe, pack)
    state = runner.new_state(recipe, pack)
    watch = runner.make_evaluator(recipe, pack.train, pack.valid, pack.info, state)
    loop.fit(state, *runner.loop_parts(recipe, pack, pack.train, state), watch, log=lambda row: None,
             num_classes=recipe.model.num_classes, **kwargs)
    return state


def tiny(name, **parts):
    "A recipe with one narrow block."
    return changed(name, model=dict(depth=1, embed_dim=48, num_heads=3), **parts)


@whole('fit: a watched split, an early end, a checkpoint')
def fits():
    pack, saved = noise(96, 20), []
    early, once = dict(epochs=4, patience=1, min_delta=1e9), dict(epochs=1)
    with OnCuda():
        for name, ending, train in (('laptop', 'early stopping', early), ('mae_laptop', 'done', once),
                                    ('dino_laptop', 'done', once)):
            often = dict(batch_size=32, watch='valid', checkpoint_minutes=1e-6, **train)
            recipe = runner.resolve_recipe(on_cuda(tiny(name), **often), pack)
            state = fit(recipe, pack, save=lambda: saved.append(1))
            assert state.ended == ending and len(saved) > 3, (name, state.ended, saved)
            assert runner.seconds_to_evaluate(recipe, pack, state) > 0


@whole('fit: a budget of minutes')
def fits_budget():
    ticks = itertools.count(0, .1)   # in the place of seconds, which would hang on the machine
    with OnCuda(), contextlib.redirect_stdout(io.StringIO()), patch('time.perf_counter', ticks.__next__):
        state = fit(on_cuda(tiny('laptop'), batch_size=8, budget_minutes=.05, watch='valid'), noise())
    assert state.ended == 'done' and state.step == state.total_steps > 0, (state.ended, state.step)


@whole('finder of learning rates')
def finds_rates():
    pack = noise()
    recipe = runner.resolve_recipe(on_cuda(tiny('laptop'), batch_size=8), pack)
    with OnCuda():
        state = runner.new_state(recipe, pack)
        parts = runner.loop_parts(recipe, pack, pack.train, state)
        assert len(lr_finder.lr_finder(state, *parts, steps=10)) > 5


def stopped(row):
    "What a user does after the first epoch: Ctrl-C."
    os.kill(os.getpid(), signal.SIGINT)


def session(recipe, home, log=lambda row: None):
    "`train` for as long as it is let; on the CPU, or on what only this process believes to be a GPU."
    fake = OnCuda() if recipe.train.device == 'cuda' else contextlib.nullcontext()
    with fake, contextlib.redirect_stdout(io.StringIO()):
        return runner.train(recipe, home, home=home, log=log)


def short_run(name, archive, **train):
    recipe = replace(tiny('demo'), name=name, data=str(archive))
    return on_cuda(recipe, **{**dict(epochs=2, batch_size=64), **train})


def with_twin(f):
    "For the time of a call, a folder with a small archive in it."
    def run():
        with TemporaryDirectory() as d:
            f(Path(d), twin.make_synthetic(Path(d)/'twin.zip', per_class=10, n_valid=2))
    return run


@whole('train: CPU, CUDA, CPU in one run')
@with_twin
def goes_between(home, archive):
    for order in (('cpu', 'cuda', 'cpu'), ('cuda', 'cpu')):
        for i, device in enumerate(order, 1):
            recipe = short_run('_'.join(order), archive, epochs=len(order), device=device)
            run = session(recipe, home, stopped) if i < len(order) else session(recipe, home)
        assert run.finished, run
        assert [s['device'] for s in run.config['sessions']] == [*order]


@whole('train: alone on CUDA, deterministic')
@with_twin
def runs_alone(home, archive):
    EVER.clear()
    run = session(short_run('alone', archive, deterministic=True), home)
    assert run.finished and (run.summary['device'], run.summary['precision']) == ('cuda', 'bf16'), run.summary
    found = EVER & NOT_DETERMINISTIC
    assert not found, f'no deterministic form on CUDA: {found}'


@whole('train: float16 on a T4, stopped and resumed')
@with_twin
def goes_on_in_fp16(home, archive):
    become(T4)
    recipe = short_run('fp16', archive)
    assert not session(recipe, home, stopped).finished
    run = session(recipe, home)
    assert run.finished and run.summary['precision'] == 'fp16', run.summary


@whole('train: steps tried in each precision')
@with_twin
def tries_precisions(home, archive):
    with patch.object(clock, 'precision_rates', TRY):
        session_of, = session(short_run('tried', archive, epochs=1), home).config['sessions']
    assert list(session_of['precisions']) == ['fp32', 'bf16', 'fp16'], session_of


@whole('train: a masked autoencoder, and the original')
@with_twin
def runs_others(home, archive):
    small = dict(depth=1, embed_dim=64, num_heads=2)
    for name, vit in (('mae_laptop', small), ('original_notebook', dict(small, num_classes=20))):
        recipe = changed(name, model=vit, data=str(archive))
        assert session(on_cuda(recipe, epochs=1, batch_size=50), home).finished, name


@whole('ablate')
@with_twin
def ablates(home, archive):
    base = replace(short_run('s', archive, epochs=1, watch='none'), tuning=True)
    study = Study('s', base, {'a': {}, 'b': {'train.ema_decay': 0.}})
    with contextlib.redirect_stdout(io.StringIO()):
        assert len(ablate(study, lambda recipe, out: session(recipe, home), home)) == 2


@whole('evaluate, predict, Grad-CAM')
def evaluates():
    pack = noise(40, 20)
    for name in ('laptop', 'resnet_laptop'):
        with OnCuda(), TemporaryDirectory() as d:
            model = pretrained.load_pretrained(name, 'cuda')
            evaluate.evaluate(model, pack, mirrored=True)
            said = evaluate.logits_of(model, pack)
            metrics.average(said, said)
            assert len(predict.predict(pack.valid.images[0].permute(1, 2, 0).numpy(), model)) == 5
            x, layer = torch.rand(2, 3, 64, 64, device='cuda'), None if name == 'laptop' else model.blocks
            for target in (None, torch.zeros(2, dtype=torch.long, device='cuda')):
                assert len(explain.grad_cam(model, x, target=target, layer=layer)) == 2
            pretrained.save_release(model, Path(d)/'model.safetensors', pack.info)


@whole('explain')
def explains():
    with OnCuda():
        model, x = pretrained.load_pretrained('laptop', 'cuda'), torch.rand(2, 3, 64, 64, device='cuda')
        maps, pixels = explain.attention_maps(model, x), (x*255).byte()
        found = dict(cam=explain.grad_cam(model, x), rollout=explain.rollout(maps))
        explain.show_maps(pixels, found)
        explain.overlay(pixels, found['cam'])
        explain.head_maps(maps)
        explain.feature_colours(model, x)
        explain.patch_filters(model)
        explain.position_similarity(model)
        explain.map_similarity(*found.values())
        explain.explanation_scores(model, x, torch.zeros(2, dtype=torch.long, device='cuda'), found)


@whole('neighbours and linear probe')
def asks_neighbours():
    pack = noise(60, 20)
    with OnCuda():
        known = dict(dino=pretrained.load_pretrained('dino_laptop'), pixels=frozen.Pixels())
        assert len(frozen.frozen_table(known, pack)) == 2


@whole('predictions of encoders, and their figures')
def encoders_predict():
    pack = noise(60, 20)
    for name in ('dino_laptop', 'mae_laptop'):
        recipe = runner.resolve_recipe(on_cuda(changed(name, model=dict(depth=1))), pack)
        with OnCuda():
            state = runner.new_state(recipe, pack)
            asked = runner.eval_loader(pack.valid, recipe, state)
            rest = pack.train, asked, pack.info, state
            assert recipe.objective.predictions(recipe, state.averaged(), *rest).summary()
            recipe.objective.figures(recipe, state.averaged(), pack.valid)


@whole('eight bits')
def quantizes():
    with OnCuda():
        model = pretrained.load_pretrained('compact_laptop', 'cuda')
        x = torch.rand(2, 3, 64, 64, device='cuda')
        ranges = quantize.input_ranges(model, x)
        for form in quantize.FORMS:
            said = quantize.to_int8(model, form, ranges if form == 'static' else None)(x)
            assert said.shape == (2, 200) and said.device.type == 'cuda', form


@whole('export')
def exports():
    with OnCuda():
        model = pretrained.load_pretrained('compact_laptop', 'cuda')
        served = export.InferenceModel(model)
        assert served(served.noise(2)).shape == (2, 200)
        if not model.cfg.patch_norm: export.timm_weights(model)


@whole('bench')
def benches():
    with OnCuda(), contextlib.redirect_stdout(io.StringIO()):
        for name in ('laptop_half', 'readme'):
            shape = replace(bench.SHAPES[name], batch_size=2, only=(bench.OURS,))
            step = bench.steps_of(shape, torch.device('cuda'), 'bf16')[bench.OURS]
            bench.take_turns(dict(step=step), 1, torch.device('cuda'))
        step.opt = optim.make_optimizer(step.model, optim.OptimConfig())
        step()


@whole('what torch.cuda says')
def device_says():
    "The harness itself: what upcoming code may ask of it, and that it refuses what a GPU refuses."
    become(T4)
    said = torch.cuda.get_device_properties('cuda'), torch.cuda.get_device_capability(torch.device('cuda:0'))
    assert (said[0].major, said[0].minor) == said[1] == T4
    free, total = torch.cuda.mem_get_info(torch.device('cuda'))
    assert 0 < free < total
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_device(0)
    refuses(AssertionError, torch.cuda.get_device_properties, 'cuda:1')
    with OnCuda(), torch.cuda.device('cuda:0'):
        refuses(RuntimeError, torch.zeros, 2, device='cuda:1')
        refuses(RuntimeError, torch.add, torch.zeros(2, device='cuda'), torch.zeros(2))
        refuses(TypeError, torch.zeros(2, device='cuda').numpy)
        copies_and_waits()
        lists_of_tensors()


def refuses(error, f, *args, **kwargs):
    try: f(*args, **kwargs)
    except error: return
    raise AssertionError(f'{f.__name__}{args} did not raise {error.__name__}')


def asked_for(f, *args, **kwargs):
    "(kernels, waits, copies to the device, copies to the host) of a call."
    COUNTS.clear()
    f(*args, **kwargs)
    return COUNTS.kernels, COUNTS.waits, COUNTS.h2d, COUNTS.d2h


def copies_and_waits():
    host, there = torch.ones(3), torch.ones(3, device='cuda')
    pinned = torch.empty(3, pin_memory=True)
    assert pinned.is_pinned() and host.pin_memory().is_pinned() and not host.is_pinned()
    assert asked_for(pinned.to, 'cuda', non_blocking=True) == (0, 0, 1, 0)
    assert asked_for(there.copy_, pinned, non_blocking=True) == (0, 0, 1, 0)
    assert asked_for(pinned.copy_, there, non_blocking=True) == (0, 0, 0, 1)
    assert asked_for(host.copy_, there, non_blocking=True) == (0, 1, 0, 1)
    assert asked_for(host.to, 'cuda') == (0, 1, 1, 0)
    assert asked_for(there.cpu) == asked_for(there[0].item) == asked_for(there.tolist) == (0, 1, 0, 1)
    assert asked_for(torch.accelerator.synchronize, 'cuda') == (0, 1, 0, 0)
    assert asked_for(there.__getitem__, there > 0)[1] == 1   # a mask
    assert asked_for(there.__getitem__, torch.tensor([0]))[2] == 1   # places that lie on the host
    assert asked_for(there.mul, torch.tensor(2.)) == (1, 0, 0, 0)


def lists_of_tensors():
    "Of `torch._foreach_*`, and of the fused step that itself looks whether a gradient was infinite."
    ts = [torch.ones(2, n, device='cuda') for n in (2, 3, 4)]
    number = torch.full((), 2., device='cuda')
    for factor in ([1., 2., 3.], number, torch.tensor(.5)):
        assert asked_for(torch._foreach_mul_, ts, factor) == (1, 0, 0, 0), factor
    assert asked_for(torch._foreach_lerp_, ts, [t + 2 for t in ts], .5) == (1, 0, 0, 0)
    assert [t.sum().item() for t in ts] == [8., 18., 32.]
    turned = [t.mT.contiguous().mT for t in ts]
    assert asked_for(torch._foreach_add_, ts, turned) == (3, 0, 0, 0) and COUNTS.slow_foreach == 1
    for grad in (1., float('inf')): steps_where_finite(torch.nn.Parameter(torch.ones(3, device='cuda')), grad)


def steps_where_finite(p, grad):
    opt = torch.optim.AdamW([p], lr=.1, fused=True)
    scaler = torch.amp.GradScaler('cuda')
    (scaler.scale(p.sum())*grad).backward()
    assert opt._step_supports_amp_scaling and asked_for(scaler.step, opt)[1] == 0   # nothing waits to know
    assert bool((p < 1).all()) == (grad == 1.), p.tolist()
    scaler.update()
    assert scaler.get_scale() == 65536.*(1. if grad == 1. else .5)


# --- all together ---

def tried(name, f):
    "Run `f`; what it returns, or [], its complaints, and how long it took."
    start, out, wrong = time.time(), [], []
    become()
    try: out = f() or []
    except Exception as e:
        traceback.print_exc()
        wrong = [f'{name}: {type(e).__name__}: {" ".join(str(e).split())[:300]}; in {last_line(e)}']
    return out, wrong, time.time() - start


def last_line(error):
    "Where in the package an error came from, else where at all."
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if f.filename.startswith(fake_cuda.PACKAGE)] or frames
    return f'{Path(inside[-1].filename).name}:{inside[-1].lineno}'


def tell(name, wrong, seconds, note=''):
    for o in wrong: print(f'FAIL {o}', flush=True)
    if not wrong: print(f'ok   {name} ({note}{seconds:.1f} s)', flush=True)


def print_lines(row, counts):
    "A row of the table, with the lines of the package behind each number."
    print('     {} at {}, capability {}'.format(*key_of(row)))
    for k in COUNTED: print(f'       {row[k]} {k}: {in_words(counts.lines[k]) or "none"}')


def count_all(names, table, with_torch, args):
    "Rows of all counted cases, and complaints."
    rows, all_wrong = [], []
    for name in names:
        found, wrong, seconds = tried(name, lambda: [*counted(name)])
        for row, counts in found:
            if args.verbose: print_lines(row, counts)
            if not args.write: wrong += complaints(row, counts, table.get(key_of(row)), with_torch)
        numbers = (f"{'/'.join(row[k] for row, _ in found)} {k}, " for k in ('kernels', 'waits'))
        tell(name, wrong, seconds, ''.join(numbers))
        rows, all_wrong = rows + [row for row, _ in found], all_wrong + wrong
    return rows, all_wrong


def stale(rows, table):
    "Rows of the table that nothing counts any more."
    for key in sorted(table.keys() - {key_of(r) for r in rows}):
        yield '{} at {}, capability {}: in the table, but not counted; run '.format(*key) + WRITE


def arguments():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--write', action='store_true', help='write the table in the place of comparing with it')
    p.add_argument('--out', type=Path, default=TABLE, help='where --write writes it')
    p.add_argument('--only', nargs='+', metavar='NAME', help=f'some of: {"; ".join([*CASES, *WHOLE])}')
    p.add_argument('--verbose', action='store_true', help='each count, with the lines of the package')
    args = p.parse_args()
    unknown = [n for n in args.only or () if n not in CASES and n not in WHOLE]
    if unknown: p.error(f'--only: {unknown}, but there are: {"; ".join([*CASES, *WHOLE])}')
    if args.only and args.write and args.out == TABLE: p.error('the table has all; give --out')
    return args


def main():
    args, start = arguments(), time.time()
    warnings.filterwarnings('ignore')   # of accuracies that noise has, and of PyTorch about itself
    torch.set_num_threads(1)
    chosen = lambda names: [n for n in names if not args.only or n in args.only]
    table, with_torch = read_table()
    rows, wrong = count_all(chosen(CASES), table, with_torch, args)
    if args.write and not wrong: write_table(rows, args.out)
    elif not args.only and not wrong:
        wrong = [*stale(rows, table)]
        tell('the table', wrong, 0)
    for name in chosen(WHOLE):
        _, failed, seconds = tried(name, WHOLE[name])
        tell(name, failed, seconds)
        wrong += failed
    print(f'{len(rows)} steps counted, {len(chosen(WHOLE))} other things tried, {len(wrong)} complaints; '
          f'torch {torch.__version__}, {time.time()-start:.0f} s')
    return int(bool(wrong))


if __name__ == '__main__': sys.exit(main())
