"""A CUDA device that is not there, so that the package's path on a GPU runs and is counted without one.

`install(capability)` patches torch, before the package is imported; inside `with OnCuda():` a tensor subclass
says that it is on cuda:0 and holds a real CPU tensor. Values are real, so that whole runs work, but whatever
mixes devices raises as it would on a GPU, and `COUNTS` has every kernel, copy between host and device, and
wait of the host for the device, with the line of the package that asked for it.

`inference_mode` is `no_grad` here; attention, and the engine of backward, are small ones in Python. How many
kernels an operation has is known for the common ones only. A copy from the host waits unless it says
`non_blocking`, whether from pinned memory or not, where a GPU may still wait. What this cannot tell: speed,
memory, non-deterministic kernels, cuDNN, NCCL, torch.compile, CUDA graphs.
"""
import os
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
import torch._dynamo   # it lists the functions of torch.cuda, and would refuse to find one of ours twice
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

LIB = 'vit_tinyimagenet'
PACKAGE = str(Path(find_spec(LIB).origin).parent) + os.sep   # found, not imported: torch is patched first
CUDA = torch.device('cuda:0')
DEVICE = SimpleNamespace(there=False, capability=(9, 0), free=79 << 30, memory=80 << 30)
REAL = SimpleNamespace(backward=torch.Tensor.backward, grad=torch.autograd.grad,
                       attention=F.scaled_dot_product_attention)


# --- counting ---

class Counts:
    "What the device was asked for since the last `clear`, and by which lines."
    def __init__(self): self.clear()

    def clear(self):
        self.kernels = self.waits = self.h2d = self.d2h = self.slow_foreach = 0
        # of the package: 'file.py:line' -> times
        self.lines = {k: Counter() for k in ('kernels', 'waits', 'h2d', 'd2h', 'slow_foreach')}
        self.ops = Counter()

    def wait(self): self.note('waits')

    def launch(self, n=1): self.note('kernels', n)

    def to_device(self, waits):
        self.note('h2d')
        if waits: self.wait()

    def to_host(self, waits=True):
        self.note('d2h')
        if waits: self.wait()

    def note(self, what, n=1):
        setattr(self, what, getattr(self, what) + n)
        self.lines[what][asking_line()] += n


COUNTS, EVER = Counts(), set()   # EVER: every operation that the device was asked for, by name


def asking_line():
    "The innermost line of the package that is being run; '' where whoever counts asks by himself."
    frame = sys._getframe(1)
    while frame:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE): return f'{os.path.basename(name)}:{frame.f_lineno}'
        frame = frame.f_back
    return ''


# --- the tensor ---

def is_cuda(device):
    "Whether a device is ours; raises `RuntimeError` for one that even this machine has not got."
    if device is None or torch.device(device).type != 'cuda': return False
    if torch.device(device).index in (None, 0): return True
    raise RuntimeError(f'CUDA error: invalid device ordinal: {device}')


class Cuda(torch.Tensor):
    "A tensor that says it is on cuda:0; `held` is the CPU tensor with its values."
    @staticmethod
    def __new__(cls, held, requires_grad=False):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, storage_offset=held.storage_offset(),
            layout=held.layout, device=CUDA, requires_grad=requires_grad)
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return run(func, args, kwargs or {})

    def tolist(self):
        COUNTS.to_host()
        return self.held.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def __repr__(self):
        COUNTS.to_host()
        return f"{self.held.detach()!r} on cuda:0"

    def __format__(self, spec):
        COUNTS.to_host()
        return format(self.held.detach(), spec)

    def __deepcopy__(self, memo):
        if id(self) in memo: return memo[id(self)]
        COUNTS.launch()
        new = memo[id(self)] = Cuda(self.held.detach().clone(), self.requires_grad)
        if getattr(self, '_is_param', False): new._is_param = True
        return new

    def __reduce_ex__(self, protocol):
        "Pickled as a CPU tensor: as what is written on CUDA is read with `map_location='cpu'`."
        COUNTS.to_host()
        return self.held.detach().__reduce_ex__(protocol)


def held(x):
    "What arguments of an operation hold, lists and tuples of them too."
    if isinstance(x, Cuda): return x.held
    return type(x)(map(held, x)) if type(x) in (list, tuple) else x


def wrapped(x):
    if isinstance(x, torch.Tensor): return x if isinstance(x, Cuda) else Cuda(x)
    return type(x)(map(wrapped, x)) if type(x) in (list, tuple) else x


def tensors_of(args, inside=False):
    "Every tensor among arguments, and whether it is in a list."
    for x in args:
        if isinstance(x, torch.Tensor): yield x, inside
        elif isinstance(x, (list, tuple)): yield from tensors_of(x, True)


# --- running an operation ---

EMPTY = set('''empty empty_like empty_strided new_empty new_empty_strided _unsafe_view lift_fresh detach
    _local_scalar_dense record_stream'''.split())   # no kernel
KERNELS = dict(sort=3, argsort=3, topk=2, nonzero=3, native_group_norm=3, native_group_norm_backward=4,
               convolution_backward=3)   # where it is not one
# the host has to know what came out, or how many
WAITING = set('''_local_scalar_dense nonzero masked_select _unique2 unique_dim unique_consecutive equal
    is_nonzero bincount repeat_interleave allclose linalg_lstsq _linalg_svd _linalg_eigh'''.split())
INDEXING = {'index', '_unsafe_index', 'index_put', 'index_put_', '_index_put_impl_'}
SCALAR_TAKING = {'fill_', 'fill', 'masked_fill', 'masked_fill_', 'where'}   # a number, even one on the host
OF_LISTS = ('_foreach', '_fused_adam', '_fused_sgd', '_amp_foreach')   # beginnings of names
PRODUCTS = {'mm', 'bmm', 'addmm', 'baddbmm', 'convolution', 'convolution_backward'}
# torch's MultiTensorApply: tensors of a launch, by the number of lists; its blocks; the elements of a block
PER_LAUNCH, BLOCKS, CHUNK = (110, 64, 48, 36, 30), 320, 65536


def run(func, args, kwargs):
    "One operation of torch: count it, refuse what a GPU would refuse, compute it on what the tensors hold."
    name, given = func.overloadpacket.__name__, [*tensors_of((*args, *kwargs.values()))]
    on_host = [(t, inside) for t, inside in given if not isinstance(t, Cuda)]
    on_cuda = len(on_host) < len(given)
    to_cuda = is_cuda(kwargs['device']) if kwargs.get('device') is not None else on_cuda
    if not on_cuda and not to_cuda: return run_on_host(func, args, kwargs)
    COUNTS.ops[name] += 1
    EVER.add(name)
    if kwargs.get('device') is not None: kwargs = {**kwargs, 'device': torch.device('cpu')}
    if name == '_to_copy' and not (on_cuda and to_cuda): return copied(func, args, kwargs, to_cuda)
    if name == 'copy_': return copied_into(*args, **kwargs)
    if name == '_foreach_copy_' and on_host: return all_copied_into(*args, **kwargs)
    if name in INDEXING: count_indices(name, *args[:3])
    else: refuse_mixed(func, name, on_host)
    if name in WAITING: COUNTS.wait()
    if name == '_local_scalar_dense': COUNTS.to_host(waits=False)   # the wait is counted
    launch(func, name, args)
    return computed(func, name, as_taken(name, args), kwargs)


def run_on_host(func, args, kwargs):
    "With `pin_memory=True` an ordinary CPU tensor, since there is no driver to pin it."
    out = func(*args, **{k: v for k, v in kwargs.items() if k != 'pin_memory'})
    if kwargs.get('pin_memory'): PINNED.add(out.untyped_storage().data_ptr())
    return out


def copied(func, args, kwargs, to_cuda):
    "From the host to the device, or back."
    waits = not kwargs.get('non_blocking')
    if to_cuda: COUNTS.to_device(waits)
    else: COUNTS.to_host(waits)
    out = func(*held(args), **kwargs)
    return Cuda(out) if to_cuda else out


def copied_into(to, source, non_blocking=False):
    if isinstance(to, Cuda) and isinstance(source, Cuda): COUNTS.launch()
    elif isinstance(to, Cuda): COUNTS.to_device(not non_blocking)
    else: COUNTS.to_host(not (non_blocking and is_pinned(to)))
    held(to).copy_(held(source))
    return to


def all_copied_into(to, source, non_blocking=False):
    for pair in zip(to, source): copied_into(*pair, non_blocking)
    return to


def count_indices(name, x, indices, values=None):
    "Indices may lie on the host, from where they are fetched; a mask is first made a list of places."
    if not isinstance(x, Cuda): raise RuntimeError(f'{name}: indices should be where the tensor is, on cpu')
    for i in (i for i in indices if i is not None):
        if not isinstance(i, Cuda): COUNTS.to_device(waits=True)
        elif i.dtype in (torch.bool, torch.uint8):
            COUNTS.wait()
            COUNTS.launch(KERNELS['nonzero'])
    if 'put' in name and not isinstance(values, Cuda) and values.dim():
        raise RuntimeError(f'{name}: expected values on cuda:0, got cpu')


def refuse_mixed(func, name, on_host):
    "A single number may lie on the host, where an operation takes numbers; nothing else may."
    takes = torch.Tag.pointwise in func.tags or name in SCALAR_TAKING or name.startswith(OF_LISTS)
    bad = [tuple(t.shape) for t, inside in on_host if t.dim() or inside or not takes]
    if bad: raise RuntimeError('Expected all tensors to be on the same device, but found at least two '
                               f'devices, cuda:0 and cpu! ({func}, on the CPU: {bad})')


def launch(func, name, args):
    "Count the kernels of an operation."
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    if views or name in EMPTY: return
    if name.startswith(OF_LISTS): launch_for_lists(name, args)
    else: COUNTS.launch(KERNELS.get(name, 1))


def launch_for_lists(name, args):
    "Few launches where all have one dtype, and each fits its like in the other lists; else one a tensor."
    lists = [ts for ts in args if isinstance(ts, (list, tuple)) and ts and isinstance(ts[0], torch.Tensor)]
    dtypes = {t.dtype for ts in [*lists, [a for a in args if isinstance(a, Cuda)]] for t in ts}
    one_dtype = len(dtypes) == 1 or name == '_foreach_copy_'
    fits = all(len({(t.shape, t.stride()) for t in ts}) == 1 for ts in zip(*lists))
    if name.startswith('_foreach') and not (one_dtype and fits and all(is_dense(t) for t in lists[0])):
        COUNTS.launch(len(lists[0]))
        COUNTS.note('slow_foreach')
        return
    # a fused step has four lists, the counters of steps aside; what is not in place makes one more
    depth = 4 if name.startswith('_fused') else len(lists) + (not name.endswith('_'))
    by_tensor, blocks = -(-len(lists[0])//PER_LAUNCH[depth-1]), sum(-(-t.numel()//CHUNK) for t in lists[0])
    COUNTS.launch(max(by_tensor, -(-blocks//BLOCKS)))


def is_dense(t):
    "Whether a tensor fills its memory, its axes in whatever order."
    size = 1
    for stride, n in sorted((s, n) for s, n in zip(t.stride(), t.shape) if n > 1):
        if stride != size: return False
        size *= n
    return True


def as_taken(name, args):
    "Arguments in the layout that CUDA's kernels take, the copies counted: group norms have channels first."
    if name not in ('native_group_norm', 'native_group_norm_backward', 'convolution'): return args
    args = list(args)
    for i in range(2 if name == 'native_group_norm_backward' else 1):
        last = name == 'convolution' and args[1].is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        if name == 'convolution' and not last or args[i].is_contiguous(memory_format=layout): continue
        COUNTS.launch()
        args[i] = Cuda(args[i].held.contiguous(memory_format=layout))
    return args


def computed(func, name, args, kwargs):
    "The operation on the CPU, and what it returns as the device's."
    inner, inner_kwargs = held([*args]), {k: held(v) for k, v in kwargs.items() if k != 'pin_memory'}
    dtype = args[0].dtype if name in PRODUCTS and func._overloadname == 'default' else None
    if dtype in (torch.float16, torch.bfloat16):   # for which a CPU without such units takes seconds
        out = func(*(x.float() if isinstance(x, torch.Tensor) else x for x in inner), **inner_kwargs)
        back = [o if o is None else o.to(dtype) for o in (out if isinstance(out, tuple) else (out,))]
        return wrapped(tuple(back) if isinstance(out, tuple) else back[0])
    out = func(*inner, **inner_kwargs)
    in_place = any(r.alias_info is not None and r.alias_info.is_write for r in func._schema.returns)
    return kwargs.get('out', args[0]) if in_place else wrapped(out)


class OnCuda(TorchDispatchMode):
    "A context in which tensors can be made on the device."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # what is made of other operations comes whole in inference mode
        whole = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), 'CompositeImplicitAutograd')
        if whole and func.overloadpacket.__name__ != 'one_hot':
            with self: return func.decompose(*args, **(kwargs or {}))
        return run(func, args, kwargs or {})


# --- attention: torch asks the driver which kernel to take ---

class Attention(torch.autograd.Function):
    @staticmethod
    def plain(q, k, v, scale): return ((q@k.mT)*scale).softmax(-1)@v

    @staticmethod
    def forward(ctx, q, k, v, scale):
        COUNTS.launch()
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        with _disable_current_modes():
            out = Attention.plain(*(t.held.detach().float() for t in (q, k, v)), scale).to(q.dtype)
            return Cuda(out.transpose(1, 2).contiguous().transpose(1, 2))   # as flash attention leaves it

    @staticmethod
    def backward(ctx, grad):
        COUNTS.launch(3)
        with _disable_current_modes(), torch.enable_grad():
            inputs = [t.held.detach().float().requires_grad_() for t in ctx.saved_tensors]
            grads = REAL.grad(Attention.plain(*inputs, ctx.scale), inputs, grad.held.float())
        return (*(Cuda(g.detach().to(grad.dtype)) for g in grads), None)


def attention(query, key, value, attn_mask=None, dropout_p=0., is_causal=False, scale=None, **kwargs):
    "In the place of `F.scaled_dot_product_attention`; dropout is left out, as fused kernels have it inside."
    if not isinstance(query, Cuda):
        return REAL.attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **kwargs)
    if attn_mask is not None or is_causal: raise NotImplementedError('masked attention on the fake device')
    if torch.is_autocast_enabled('cuda'):
        query, key, value = (t.to(torch.get_autocast_dtype('cuda')) for t in (query, key, value))
    if not query.dtype == key.dtype == value.dtype: raise RuntimeError('attention: inputs of several dtypes')
    if not all(isinstance(t, Cuda) for t in (key, value)): raise RuntimeError('attention: inputs on the CPU')
    return Attention.apply(query, key, value, query.shape[-1]**-.5 if scale is None else scale)


# --- backward: torch's engine asks the driver for a stream ---

def ways_into(root):
    "Each node of the graph below `root`, and how many others hand gradients to it."
    count, stack, seen = Counter(), [root], set()
    while stack:
        node = stack.pop()
        if node in seen: continue
        seen.add(node)
        for below, _ in node.next_functions:
            if below is None: continue
            count[below] += 1
            stack.append(below)
    return count


def fitted(grad, node, place):
    "A gradient reduced to the shape and cast to the type of what it is of, as torch does it."
    of = node._input_metadata[place]
    if tuple(grad.shape) != tuple(of.shape): grad = grad.sum_to_size(tuple(of.shape))
    if grad.dtype != of.dtype: grad = grad.to(of.dtype)
    if grad.device.type == of.device.type: return grad
    raise RuntimeError(f'a gradient on {grad.device}, expected on {of.device}')


def handed_on(node, got):
    "What a node makes of the gradients that it got: (node below, which of its outputs, gradient) each."
    grads = [got.get(i) for i in range(max(1, len(node._input_metadata)))]
    ours = isinstance(node, torch.autograd.function.BackwardCFunction)   # of a Function in Python
    if all(g is None for g in grads): outs = (None,)*len(node.next_functions)
    else: outs = node.apply(*grads) if ours else node(*grads)
    outs = outs if isinstance(outs, (tuple, list)) else (outs,)
    return [(to, place, g) for (to, place), g in zip(node.next_functions, outs) if to is not None]


def keep(variable, grad):
    "As torch does it where nobody else holds a gradient: copied only where it is laid out otherwise."
    if grad is None: return
    ways = zip(grad.shape, grad.stride(), variable.stride())
    if any(n > 1 and a != b for n, a, b in ways): grad = torch.empty_like(variable).copy_(grad)
    variable.grad = grad if variable.grad is None else variable.grad + grad


@torch.no_grad()
def backward(root, inputs=()):
    "Calls each node once all of its gradients are there; returns those of `inputs`, or leaves keep theirs."
    waiting, ready, found = ways_into(root.grad_fn), [root.grad_fn], {}
    buffers = {root.grad_fn: {root.output_nr: torch.ones_like(root)}}
    while ready:
        node = ready.pop()
        got, variable = buffers.pop(node, {}), getattr(node, 'variable', None)
        for t in inputs:
            if variable is t or variable is None and t.grad_fn is node: found[id(t)] = got.get(t.output_nr)
        if variable is not None:
            if not inputs: keep(variable, got.get(0))
            continue
        for to, place, grad in handed_on(node, got):
            if grad is not None:
                there, grad = buffers.setdefault(to, {}), fitted(grad, to, place)
                there[place] = there[place] + grad if place in there else grad
            waiting[to] -= 1
            if not waiting[to]: ready.append(to)
    return tuple(found.get(id(t)) for t in inputs)


def tensor_backward(self, *args, **kwargs):
    if not isinstance(self, Cuda): return REAL.backward(self, *args, **kwargs)
    if args or kwargs: raise NotImplementedError('arguments of backward() on the fake device')
    backward(self)


def autograd_grad(outputs, inputs, *args, **kwargs):
    first = outputs[0] if isinstance(outputs, (tuple, list)) and len(outputs) == 1 else outputs
    if not isinstance(first, Cuda): return REAL.grad(outputs, inputs, *args, **kwargs)
    if args or kwargs: raise NotImplementedError('arguments of torch.autograd.grad on the fake device')
    return backward(first, inputs if isinstance(inputs, (tuple, list)) else (inputs,))


# --- what torch.cuda says ---

class Event:
    "Of a device that has done at once what it is asked for."
    def __init__(self, *args, **kwargs): pass
    def record(self, stream=None): pass
    def wait(self, stream=None): pass
    def query(self): return True
    def synchronize(self): COUNTS.wait()
    def elapsed_time(self, end): return 0.


class Stream(Event):
    "The one queue that there is; may be entered as a context."
    def wait_stream(self, stream): pass
    def wait_event(self, event): pass
    def record_event(self, event=None): return event or Event()
    def __enter__(self): return self
    def __exit__(self, *exc): pass


class Chosen:
    "In the place of `torch.cuda.device`: a context that chooses the only device there is."
    def __init__(self, device): known(device)
    def __enter__(self): return self
    def __exit__(self, *exc): pass


def known(device=None):
    "The index of a device; raises as torch does for one that is not there."
    index = device if isinstance(device, int) or device is None else torch.device(device).index
    if index not in (None, 0): raise AssertionError('Invalid device id')
    return 0


def properties(device=None):
    known(device)
    major, minor = DEVICE.capability
    return SimpleNamespace(name=name_of(), major=major, minor=minor, total_memory=DEVICE.memory,
                           multi_processor_count=132)


def capability(device=None):
    known(device)
    return DEVICE.capability


def name_of(device=None):
    known(device)
    return 'no GPU, compute capability {}.{}'.format(*DEVICE.capability)


def memory(device=None):
    known(device)
    return DEVICE.free, DEVICE.memory


def wait_for(device=None):
    "`synchronize`, also of `torch.accelerator`; the host has its own."
    if isinstance(device, int) or device is None or torch.device(device).type == 'cuda':
        known(device)
        COUNTS.wait()


def nothing(*args, **kwargs): pass


def zero(*args, **kwargs): return 0


TOLD = dict(
    is_available=lambda: DEVICE.there, is_initialized=lambda: True, _is_in_bad_fork=lambda: False,
    is_current_stream_capturing=lambda: False, device_count=lambda: 1, current_device=lambda: 0,
    get_device_properties=properties, get_device_capability=capability, get_device_name=name_of,
    device=Chosen, set_device=known, synchronize=wait_for, Event=Event, Stream=Stream,
    stream=lambda stream: stream or Stream(),
    current_stream=lambda device=None: Stream(), default_stream=lambda device=None: Stream(),
    _lazy_init=nothing, init=nothing, manual_seed=nothing, manual_seed_all=nothing, empty_cache=nothing,
    reset_peak_memory_stats=nothing, mem_get_info=memory, memory_allocated=zero, max_memory_allocated=zero,
    memory_reserved=zero, max_memory_reserved=zero)

PINNED = set()   # where the memory is that was pinned


def pinned(self, device=None):
    "`Tensor.pin_memory`: an ordinary copy on the CPU."
    if isinstance(self, Cuda): raise RuntimeError('cannot pin a tensor on cuda:0, only those on the CPU')
    out = self if is_pinned(self) else self.clone()
    PINNED.add(out.untyped_storage().data_ptr())
    return out


def is_pinned(self, device=None):
    return not isinstance(self, Cuda) and self.untyped_storage().data_ptr() in PINNED


# --- the one place where torch is changed ---

def install(capability=(9, 0), free=79 << 30):
    "Give this process a CUDA device of a capability, 7.5 for a T4, and free memory; again, for another one."
    DEVICE.capability, DEVICE.free = capability, free
    if DEVICE.there: return
    if LIB in sys.modules: raise RuntimeError(f'install() has to come before {LIB} is imported')
    DEVICE.there = True
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)   # torch.tensor(x, device='cuda') is made on the CPU and copied
    torch.__future__.set_overwrite_module_params_on_conversion(True)   # no plain Parameter holds a subclass
    # inside inference_mode there are no views of a subclass that was made outside
    torch.inference_mode = lambda mode=True: torch.no_grad() if mode else torch.enable_grad()
    for name, what in TOLD.items(): setattr(torch.cuda, name, what)
    torch.accelerator.synchronize = wait_for
    torch.Tensor.pin_memory, torch.Tensor.is_pinned = pinned, is_pinned
    torch.Tensor.backward = Cuda.backward = tensor_backward
    torch.autograd.grad = autograd_grad
    F.scaled_dot_product_attention = attention
