"""Colab's conditions: its torch, numpy and IPython, no nbdev, no archive, no GPU; Run all in every notebook.

`make colab` builds an environment in runs/colab (some minutes) and clones the repository, from here instead of from GitHub.
The first notebooks run their first cell as Colab does, and so install what the others then find.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from cells import NBS, ROOT, cfg, notebooks
from stamp import CELL_ID

PINS = ROOT/'requirements-colab.txt'
# a module of that name is how a cell knows that it is in Colab
KERNEL = '''import sys, types
sys.modules['google.colab'] = types.ModuleType('google.colab')
from ipykernel.kernelapp import launch_new_instance
launch_new_instance()'''
# nothing of ours was there before, and Colab's own stays as it is
FRESH = f'''import sys, numpy, torch, IPython, {cfg.lib_path.name}
assert 'nbdev' not in sys.modules and 'site-packages' in {cfg.lib_path.name}.__file__
pinned = dict(o.split('==') for o in {PINS.read_text(encoding='utf-8').split()!r} if '==' in o)
for o in torch, numpy, IPython: assert o.__version__.startswith(pinned[o.__name__.lower()][:-1]), o.__version__'''
DEMO = f'import {cfg.lib_path.name} as vt\nrun = vt.train(vt.recipes.demo())\nassert run.finished, run'
FIRST = '0_core/01_device 5_evaluation/01_predictions'.split()


def environment(folder):
    "A virtual environment with Colab's versions; one that is there is used again."
    python = folder/'bin'/'python'
    if not (folder/'.installed').exists():
        subprocess.run([sys.executable, '-m', 'venv', str(folder)], check=True)
        subprocess.run([str(python), '-m', 'pip', '-q', '--disable-pip-version-check', 'install', '-r', str(PINS)], check=True)
        (folder/'.installed').touch()
    return python


def clone(content):
    "What is committed here, as the repository and branch that the first cell clones."
    git = ['git', '-C', str(ROOT), 'push', '-q', str(content/'origin'), f'HEAD:refs/heads/{cfg.branch}']
    subprocess.run(['git', 'init', '-q', '--bare', str(content/'origin')], check=True)
    subprocess.run(['git', '-C', str(content/'origin'), 'config', 'receive.shallowUpdate', 'true'], check=True)
    subprocess.run(git, check=True)


def colab_environment(python, content):
    "The variables of a kernel, which is found by the name 'colab'."
    spec = content/'jupyter'/'kernels'/'colab'/'kernel.json'
    spec.parent.mkdir(parents=True)
    argv = [str(python), '-c', KERNEL, '-f', '{connection_file}']
    spec.write_text(json.dumps(dict(argv=argv, display_name='Colab', language='python')), encoding='utf-8')
    os.environ['JUPYTER_PATH'] = str(content/'jupyter')
    unset = 'PYTHONPATH', 'TINY_IMAGENET'
    return {**{k: v for k, v in os.environ.items() if k not in unset}, 'HOME': str(content/'home'),
            'VIT_TINYIMAGENET_HOME': str(content/'data'), 'PATH': f'{python.parent}:{os.environ["PATH"]}',
            'GIT_CONFIG_COUNT': '1', 'GIT_CONFIG_KEY_0': f'url.{content/"origin"}.insteadOf', 'GIT_CONFIG_VALUE_0': cfg.git_url}


def run_all(name, content, env):
    "Run all, from an empty folder in the first notebooks, in the clone in the others; what went wrong, '' for nothing."
    nb = nbformat.read(NBS/f'{name}.ipynb', as_version=4)
    folder = content if name in FIRST else (content/cfg.repo/NBS.name/name).parent
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.source = cell.source.replace('/content', str(content))
        if cell.id == CELL_ID and name not in FIRST: cell.source = cell.source.replace('google.colab', 'no.colab')
    if name == FIRST[0]: nb.cells += map(nbformat.v4.new_code_cell, (FRESH, DEMO))
    client = NotebookClient(nb, kernel_name='colab', timeout=1800, store_widget_state=False,
                            resources=dict(metadata=dict(path=str(folder))))
    try: client.execute(env=env)
    except CellExecutionError as e: return str(e)
    return ''


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--env', type=Path, default=ROOT/'runs'/'colab')
    p.add_argument('--notebooks', nargs='*', default=[o.stem for o in notebooks()])
    args = p.parse_args()
    python = environment(args.env)
    content, failed = Path(tempfile.mkdtemp()), 0
    try:
        clone(content)
        env = colab_environment(python, content)
        (content/'home').mkdir()
        subprocess.run([str(python), '-m', 'pip', '-q', 'uninstall', '-y', cfg.lib_name], check=True)
        for name in [*FIRST, *(n for n in args.notebooks if n not in FIRST)]:
            start = time.monotonic()
            problem = run_all(name, content, env)
            failed += bool(problem)
            print(f'colab: {name} {problem or "in order"}, {time.monotonic() - start:.0f} s', flush=True)
    finally: shutil.rmtree(content)
    return failed > 0


if __name__ == '__main__': sys.exit(main())
