"""What `gpu.py speed` measures: training steps in several shapes and modes of `torch.compile`, and others'.

A case has a function that gets ready and returns two more: one that measures, and one that looks at the
launches of a step, or None. torch is imported within the functions, so that `gpu.py` knows the cases at once.
"""
import itertools
import os
import time
from dataclasses import replace
from statistics import median
from types import SimpleNamespace

MODES = 'off', 'reduce-overhead', 'default'
WAITS = 'cudaStreamSynchronize', 'cudaDeviceSynchronize', 'cudaEventSynchronize'
LAUNCHES = ('cudaLaunchKernel', 'cudaLaunchKernelExC', 'cuLaunchKernel', 'cuLaunchKernelEx',
            'cudaLaunchCooperativeKernel', 'cudaGraphLaunch', 'cudaMemcpyAsync', 'cudaMemsetAsync')


# --- what is trained ---

def original_notebook():
    from vit_tinyimagenet.recipes import original_notebook
    return original_notebook(), 128, 256


def original_readme():
    "In the precision of the machine; the recipe has the original's, fp16."
    from vit_tinyimagenet.recipes import original_readme
    base = original_readme()
    return replace(base, train=replace(base.train, precision='auto')), 256, 64


def laptop(patch_drop=(), **vit):
    from vit_tinyimagenet.recipes import laptop
    base = laptop()
    recipe = replace(base, model=replace(base.model, **vit), train=replace(base.train, patch_drop=patch_drop))
    return recipe, 512, recipe.model.num_patches


def laptop_half():
    recipe, batch_size, tokens = laptop(((0., .5),))
    return recipe, batch_size, tokens//2


def patch4(): return laptop(patch_size=4)


SHAPES = {'original notebook 128 fp16': original_notebook, 'patch 4, 192x9, 512': patch4,
          'README 256': original_readme, 'laptop 512': laptop, 'laptop 512 half': laptop_half}


def shape_of(make, device):
    "A recipe, its batch size, and the tokens that go through its blocks; two blocks and few images on a CPU."
    small = device == 'cpu'
    recipe, batch_size, tokens = make()
    if small: recipe, batch_size = replace(recipe, model=replace(recipe.model, depth=2)), 8
    train = replace(recipe.train, batch_size=batch_size, device=device)
    return replace(recipe, train=train), batch_size, tokens


# --- time ---

def waiter(device):
    "What waits for the device."
    import torch
    return torch.cuda.synchronize if device == 'cuda' else lambda: None


def rounds(step, wait, seconds=.7, n=5):
    "Seconds of a step in each of some rounds of several steps, with one wait a round."
    def several(k):
        wait()
        start = time.perf_counter()
        for _ in range(k): step()
        wait()
        return (time.perf_counter()-start)/k
    several(2)
    k = max(1, round(seconds/n/several(3)))
    return [several(k) for _ in range(n)]


def peak(device):
    import torch
    from vit_tinyimagenet.runs.record import peak_gib
    return round(peak_gib(torch.device(device)), 2)


def measured(step, wait, images, device):
    "Median rate, and the spread of the rounds."
    times = rounds(step, wait)
    mid = median(times)
    ms = dict(step_ms=mid, step_ms_low=min(times), step_ms_high=max(times))
    return dict(images_per_s=round(images/mid, 1), **{k: round(v*1e3, 3) for k, v in ms.items()},
                peak_gib=peak(device))


def warmed(step, wait):
    "Seconds of the first steps, in which compiling and capturing are done, others doing the same beside."
    start, spent = time.perf_counter(), sum(os.times()[:4])
    for _ in range(4):
        step()
        wait()
    cpu_s = sum(os.times()[:4])-spent   # of its own, so that the others and being stopped do not count
    return dict(compile_s=round(time.perf_counter()-start, 1), compile_cpu_s=round(cpu_s, 1))


def launches(step, wait, device, steps=3):
    "Kernels, launches, waits and copies of a step, and how long the device was busy, by torch's profiler."
    import torch
    from torch.profiler import ProfilerActivity, profile
    if device == 'cpu': activities = [ProfilerActivity.CPU]
    else: activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as seen:
        for _ in range(steps): step()
        wait()
    rows = seen.key_averages()
    if device == 'cpu': return dict(calls={})
    # what a user, an optimiser or the compiler has marked is listed beside the kernels inside
    on_device = [r for r in rows if r.device_type == torch.autograd.DeviceType.CUDA and not r.is_user_annotation]
    count = lambda rows, *keys: round(sum(r.count for r in rows if r.key.startswith(keys))/steps, 2)
    calls = {r.key: round(r.count/steps, 2) for r in rows if r.key in (*WAITS, *LAUNCHES)}
    moved = count(on_device, 'Memcpy', 'Memset')
    return dict(kernels=round(sum(r.count for r in on_device)/steps-moved, 2),
                launches=round(sum(calls.get(k, 0) for k in LAUNCHES), 2),
                waits=round(sum(calls.get(k, 0) for k in WAITS)-2/steps, 2),   # ours, and the profiler's
                copies_to_host=count(on_device, 'Memcpy DtoH'),
                copies_to_device=count(on_device, 'Memcpy HtoD'),
                busy_ms=round(sum(r.self_device_time_total for r in on_device)/steps/1e3, 3), calls=calls)


# --- the cases ---

def rates(device, report):
    "Matrix products and copies, several a wait."
    import torch
    side, size = (8192, 2**30) if device == 'cuda' else (512, 2**22)
    wait = waiter(device)
    def measure():
        out = {}
        for name, dtype in (('bf16', torch.bfloat16), ('fp16', torch.float16), ('fp32', torch.float32)):
            n = side if name != 'fp32' else side//2
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            s = median(rounds(lambda: a@b, wait, .4 if device == 'cuda' else .05))
            out[f'matrix_tflop_per_s_{name}'] = round(2*n**3/s/1e12, 3)
        x, y = torch.randn(size//4, device=device), torch.empty(size//4, device=device)
        s = median(rounds(lambda: y.copy_(x), wait, .3))
        out['copy_gb_per_s_read_and_written'] = round(2*size/s/1e9, 1)
        return out
    return measure, None


def noise(n, size=64):
    "Images of noise, the same ones in turn, as a pack's split and what is known of it."
    import torch
    from vit_tinyimagenet.data.pack import DatasetInfo, Split
    images = torch.randint(0, 256, (min(n, 1024), 3, size, size), dtype=torch.uint8)
    split = Split(images, torch.arange(n) % 200, ['']*n, torch.arange(n) % len(images))
    classes = [str(i) for i in range(200)]
    info = DatasetInfo(classes, classes, [.48, .45, .4], [.28, .27, .28], size)
    return SimpleNamespace(folder='noise', train=split, valid=split, info=info)


def ours(device, report, make, mode):
    "Whole training steps as `train` makes them: read, augment, forward, backward, optimiser, average."
    import gpu_checks
    from vit_tinyimagenet.training.cost import step_gflop
    recipe, batch_size, tokens = shape_of(make, device)
    gpu_checks.refuse_fallback()
    recipe = replace(recipe, train=replace(recipe.train, compile=mode))
    pack = noise(64*batch_size)   # an epoch's own waits are few among its steps
    steps = gpu_checks.Steps(recipe, pack, device, recipe.train.precision)
    step, wait, precision = lambda: steps(.5), waiter(device), steps.state.precision
    report(stage='warmed', mode=mode, precision=precision, batch_size=batch_size, tokens=tokens,
           gflop_per_image=round(step_gflop(recipe.model, tokens), 4), **warmed(step, wait))
    def look():
        steps.state.recent.clear()   # or a look at the losses, once in twenty steps, may fall into these three
        return launches(step, wait, device)
    return lambda: measured(step, wait, batch_size, device), look


def peer(device, report, name, mode):
    "A step of another's model on one batch: forward, backward, AdamW; ours beside it in the same way."
    import torch
    from vit_tinyimagenet.bench import steps as bench
    from vit_tinyimagenet.core.device import pick_precision
    shape = bench.SHAPES['readme']
    batch_size, precision = (256 if device == 'cuda' else 4), pick_precision(torch.device(device))
    if device == 'cpu': shape = replace(shape, vit=replace(shape.vit, depth=2))
    if name not in bench.installed(): raise ImportError(f'{name} is not installed')
    shape = replace(shape, batch_size=batch_size, only=(name,))
    step, wait = bench.steps_of(shape, torch.device(device), precision, mode)[name], waiter(device)
    report(stage='warmed', mode=mode, precision=precision, batch_size=batch_size,
           tokens=64, gflop_per_image=round(bench.step_gflop(shape.vit, 64), 4), **warmed(step, wait))
    return lambda: measured(step, wait, batch_size, device), lambda: launches(step, wait, device)


PEERS = 'ours', 'timm', 'nn.TransformerEncoder', 'torchvision', 'Hugging Face'


def cases():
    "Name -> function, its arguments, and the seconds under which it is not begun; the most valuable first."
    out = {'rates': (rates, (), 12)}
    of = lambda mode: {f'{name}, {mode}': (ours, (make, mode), 15 if mode == 'off' else 25)
                       for name, make in SHAPES.items()}
    eager, graphs, default = map(of, MODES)
    peers = {f'peer {n}, {mode}': (peer, (n, mode), 15 if mode == 'eager' else 25)
             for mode in ('eager', 'compiled') for n in PEERS}
    firsts = itertools.chain(*zip(eager.items(), graphs.items()))   # compiling takes longest: begun early
    return out | dict(firsts) | {k: v for k, v in peers.items() if k.endswith('eager')} | default | peers


CASES = cases()


def prepare(name, device, report):
    "Get one case ready."
    function, arguments, _ = CASES[name]
    return function(device, report, *arguments)
