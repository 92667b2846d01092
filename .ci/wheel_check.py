"""What a user gets: the wheel, installed from an index into an empty environment, used in an empty folder.

`wheel_check.py dist` serves that folder's wheel beside PyPI; `--lowest` takes the lowest version of everything that
settings.ini names, as uv resolves them.
"""
import argparse
import functools
import os
import subprocess
import sys
import threading
import venv
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shutil import copy
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
# run outside the checkout, in a process where importing a development tool fails
USE_IT = """
import sys
sys.modules.update(dict.fromkeys(['nbdev', 'fastcore', 'execnb']))
import torch, vit_tinyimagenet as vt
from pathlib import Path
from vit_tinyimagenet.models.pretrained import list_pretrained
assert Path(vt.__file__).is_relative_to(sys.argv[1]), vt.__file__
assert list_pretrained(), 'no weights in the wheel'
for name in list_pretrained():
    model = vt.load_pretrained(name)
    known, side = len(model.info.wnids), model.cfg.img_size
    assert known == model.cfg.num_classes, name   # none of an encoder, which gives its features
    assert model(torch.zeros(1, 3, side, side)).shape == (1, known or model.cfg.embed_dim), name
"""
COMMANDS = """
from importlib.metadata import distribution
print(*(o.name for o in distribution('vit_tinyimagenet').entry_points if o.group == 'console_scripts'))
"""
DRAW = "from PIL import Image; Image.radial_gradient('L').convert('RGB').resize((90, 70)).save('photo.png')"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


class Index:
    "A simple index (PEP 503) of one wheel, on a free port of this machine."
    def __init__(self, wheel, folder):
        at = folder/'simple'/'vit-tinyimagenet'
        at.mkdir(parents=True)
        copy(wheel, at)
        (at/'index.html').write_text(f'<a href="{wheel.name}">{wheel.name}</a>', encoding='utf-8')
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=folder))
        self.url = f'http://127.0.0.1:{self.server.server_port}/simple/'

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self.url

    def __exit__(self, *exc): self.server.shutdown()


def run(*command, cwd):
    "What a command prints; ends the check in words where it fails."
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    p = subprocess.run([str(o) for o in command], cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True,
                       encoding='utf-8', errors='replace')
    if p.returncode: sys.exit(f'{" ".join(map(str, command))[:200]}: code {p.returncode}\n{p.stdout}{p.stderr}'[-3000:])
    return p.stdout


def lowest_versions(folder):
    "A file that constrains what `requirements` of settings.ini names to the oldest that it allows."
    uv = sys.executable, '-m', 'uv', 'pip', 'compile', '-q', '--python', sys.executable, '--resolution', 'lowest-direct'
    run(*uv, 'setup.py', '-o', folder/'lowest.txt', cwd=ROOT)
    return folder/'lowest.txt'


def install(wheel, folder, lowest):
    "The folder of an environment's programs, with the wheel and what it needs."
    venv.create(folder/'env', with_pip=True)
    programs = folder/'env'/('Scripts' if os.name == 'nt' else 'bin')
    held = ['-c', lowest_versions(folder)] if lowest else []
    own = wheel.name.split('-')[1]
    with Index(wheel, folder/'index') as url:
        # by itself first: pip does not say which it takes of an index and PyPI that both have this version
        pip = programs/'python', '-m', 'pip', '--disable-pip-version-check', '-q', 'install', f'vit_tinyimagenet=={own}'
        run(*pip, '--no-deps', '--index-url', url, cwd=folder)
        run(*pip, '--extra-index-url', url, *held, cwd=folder)
    return programs


def use(programs, folder):
    "Import, weights, all commands, a prediction and a short training; says what each has come to."
    python = programs/'python'
    run(python, '-c', USE_IT, programs.parent, cwd=folder)
    print('ok   imports, and loads every shipped network')
    commands = run(python, '-c', COMMANDS, cwd=folder).split()
    for o in commands: assert run(programs/o, '--help', cwd=folder).startswith('usage: '), o
    print(f'ok   --help of {", ".join(commands)}')
    run(python, '-c', DRAW, cwd=folder)
    said = run(programs/'vit_predict', 'photo.png', cwd=folder).splitlines()
    assert said[0] == 'photo.png' and len(said) == 6, said
    print('ok   vit_predict photo.png')
    run(programs/'vit_train', 'demo', '--train.epochs', '2', '--out', 'runs', cwd=folder)
    assert (folder/'runs'/'demo'/'model.safetensors').exists()
    run(programs/'vit_predict', 'photo.png', '--weights', 'runs/demo/model.safetensors', cwd=folder)
    print('ok   vit_train demo, and vit_predict with what it has learned', flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('dist', type=Path, help='a folder with one wheel')
    p.add_argument('--lowest', action='store_true', help='with the lowest versions of what it needs')
    args = p.parse_args()
    wheels = list(args.dist.glob('*.whl'))
    if len(wheels) != 1: sys.exit(f'{args.dist}: {len(wheels)} wheels, not one; run `python -m build`')
    with TemporaryDirectory() as d:
        programs = install(wheels[0].resolve(), Path(d), args.lowest)
        use(programs, Path(d))
        held = run(programs/'python', '-m', 'pip', 'freeze', cwd=d).split()
    print(f'{wheels[0].name} works, Python {sys.version.split()[0]}: {" ".join(o for o in held if "@" not in o)}')


if __name__ == '__main__': main()
