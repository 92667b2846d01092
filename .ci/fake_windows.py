"""A Windows that is only claimed: modules, functions and signals that it lacks are missing, and no file goes while it is open.

`fake_windows.py` imports the package there, packs, trains, resumes and predicts; `fake_windows.py 1_data/07_pack` runs that
notebook. What a real one does differently besides, the workflow sees.
"""
import builtins
import ctypes
import errno
import io
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

MODULES = 'fcntl grp pwd resource termios'.split()
FUNCTIONS = '''chown fork geteuid killpg lchown mkfifo pread sched_getaffinity seteuid setsid
    O_DIRECTORY O_NOFOLLOW O_NONBLOCK'''.split()
SIGNALS = 'SIGALRM SIGHUP SIGQUIT SIGUSR1 SIGUSR2'.split()

def held_files():
    "Files that this process has open or mapped."
    open_ones = [f'/proc/self/fd/{o}' for o in os.listdir('/proc/self/fd')]
    mapped = re.findall(r' (/.*)$', Path('/proc/self/maps').read_text(encoding='utf-8', errors='replace'), re.MULTILINE)
    return {os.readlink(o) for o in open_ones if os.path.islink(o)} | {*mapped}


def refuse_held(path):
    at = os.path.realpath(os.fsdecode(path))
    found = [o for o in held_files() if o == at or o.startswith(f'{at}/')]
    if found: raise PermissionError(errno.EACCES, 'The process cannot access the file because it is being used', found[0])


def refuse_name(path):
    "A name with a character, or an end, that Windows has no files with."
    if not isinstance(path, (str, os.PathLike)) or str(path).startswith(('/dev/', '/proc/')): return
    if re.search(r'[<>:"|?*\x00-\x1f]|[ .]$', os.path.basename(os.fspath(path)).replace('..', '')):
        raise OSError(errno.EINVAL, 'The filename, directory name, or volume label syntax is incorrect', str(path))


def opened(file, mode='r', buffering=-1, encoding=None, *args, **kw):
    "A text without an encoding is in the machine's own."
    refuse_name(file)
    if 'b' not in mode and encoding in (None, 'locale'): encoding = 'cp1252'
    return real_open(file, mode, buffering, encoding, *args, **kw)


def guarded(function, *checks):
    "`function`, with its first arguments looked at by one check each."
    def call(*args, **kw):
        for check, o in zip(checks, args): check(o)
        return function(*args, **kw)
    return call


def terminate(pid, number):
    "Whatever the signal, os.kill ends a process there at once."
    if pid == os.getpid(): os._exit(number)
    real_kill(pid, signal.SIGKILL)


def c_library(name, *args, **kw):
    if name is None: raise TypeError('LoadLibrary() argument 1 must be str, not None')
    return real_library(name, *args, **kw)


real_kill, real_library, real_open = os.kill, ctypes.CDLL, io.open


def claim():
    "Before the package is imported."
    sys.modules.update(dict.fromkeys(MODULES))
    for module, names in (os, FUNCTIONS), (signal, SIGNALS): [delattr(module, o) for o in names if hasattr(module, o)]
    for o in dir(mmap):
        if o.startswith('MADV_'): delattr(mmap, o)
    def any_free(path): refuse_held(path), refuse_name(path)
    os.replace, os.rename = guarded(os.replace, refuse_held, any_free), guarded(os.rename, refuse_held, any_free)
    os.unlink = os.remove = guarded(os.unlink, refuse_held)
    os.mkdir = guarded(os.mkdir, refuse_name)
    builtins.open = io.open = opened
    for o in sys.stdout, sys.stderr: o.reconfigure(encoding='cp1252')
    shutil._use_fd_functions = False   # or rmtree would not ask os.unlink
    os.kill, ctypes.CDLL = terminate, c_library
    subprocess.Popen.terminate = subprocess.Popen.kill


def tour():
    "From an import to a prediction, stopped and resumed in between."
    import vit_tinyimagenet as vt
    from vit_tinyimagenet.data.synthetic import make_photos, make_synthetic
    from vit_tinyimagenet.deploy.predict import predict_main
    with TemporaryDirectory(ignore_cleanup_errors=True) as d:
        tmp = Path(d)
        os.environ['VIT_TINYIMAGENET_HOME'] = d
        demo, small = vt.recipes.demo(), str(make_synthetic(tmp/'small.zip', per_class=20, n_valid=5))
        recipe = replace(demo, data=small, train=replace(demo.train, epochs=2))
        press = lambda row: signal.raise_signal(signal.SIGINT)
        assert not vt.train(recipe, out=tmp/'runs', log=press).finished
        assert vt.train(recipe, out=tmp/'runs').finished
        photos = make_photos(tmp/'photos é', per_class=2)
        predict_main([str(photos), '--weights', str(tmp/'runs'/'demo'/'model.safetensors'), '--out', str(tmp/'table.csv')])
        assert len((tmp/'table.csv').read_text(encoding='utf-8').splitlines()) > 2
    print('ok   a tour of the package')


def run_notebook(name):
    from nbdev.test import test_nb
    root = Path(__file__).resolve().parent.parent
    sys.path.remove(str(root/'.ci'))
    passed, wall_s = test_nb(root/'nbs'/f'{name}.ipynb', skip_flags=['slow', 'cuda', 'realdata'], basepath=root)
    print(f'{"ok  " if passed else "FAIL"} {name}, {wall_s:.0f} s')
    return passed


def main():
    claim()
    if sys.argv[1:]: sys.exit(not all([run_notebook(o) for o in sys.argv[1:]]))
    tour()


if __name__ == '__main__': main()
