"""Colab's conditions: its torch, numpy and IPython, no nbdev; a notebook's first cell, its imports, and the demo run.

`make colab` builds an environment in runs/colab (some minutes), clones the repository into it as the first cell does in
Colab, from here instead of from GitHub, and runs notebooks cell by cell in IPython.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cells import ROOT, Notebook, cfg

PINS = '''torch==2.11.* torchvision==0.26.* numpy==2.0.* pillow==11.3.* matplotlib==3.10.* fastcore==1.13.* ipython==7.34.*
    ipykernel<7 setuptools'''.split()
# run as `ipython file`: a module of that name is how a cell knows that it is in Colab
AS_COLAB = '''import sys, types
sys.modules['google.colab'] = types.ModuleType('google.colab')
from IPython import get_ipython
shell = get_ipython()
for source in {cells!r}:
    done = shell.run_cell(source)
    if not done.success: raise SystemExit(f'colab: this cell failed:\\n{{source}}')
assert 'nbdev' not in sys.modules
'''
# nothing of ours was there before, and Colab's own stays as it is
FRESH = f'''import numpy, torch, IPython, {cfg.lib_path.name}
assert (torch.__version__[:4],numpy.__version__[:3],IPython.__version__[:4]) == ('2.11','2.0','7.34')'''
DEMO = f'from {cfg.lib_path.name}.recipes import demo, train\nrun = train(demo())\nassert run.finished, run'


def environment(folder):
    "A virtual environment with Colab's versions; one that is there is used again."
    python = folder/'bin'/'python'
    if not (folder/'.installed').exists():
        subprocess.run([sys.executable, '-m', 'venv', str(folder)], check=True)
        subprocess.run([str(python), '-m', 'pip', '-q', '--disable-pip-version-check', 'install', *PINS], check=True)
        (folder/'.installed').touch()
    return python


def run_as_colab(python, notebook, content, more=()):
    "The cells of a notebook up to its first section, in a fresh shell; then some more."
    section = next(c.number for c in notebook.cells if not c.is_code and '\n## ' in f'\n{c.source}')
    cells = [c.source.replace('/content', str(content)) for c in notebook.code if c.number < section]
    script = content/'cells.ipy'
    script.write_text(AS_COLAB.format(cells=[*cells, *more]), encoding='utf-8')
    env = {**os.environ, 'GIT_CONFIG_COUNT': '1', 'GIT_CONFIG_KEY_0': f'url.{content/"origin"}.insteadOf',
           'GIT_CONFIG_VALUE_0': cfg.git_url, 'VIT_TINYIMAGENET_HOME': str(content/'home'), 'MPLBACKEND': 'agg'}
    env.pop('PYTHONPATH', None)
    p = subprocess.run([str(python), '-m', 'IPython', str(script)], cwd=content, env=env, stdin=subprocess.DEVNULL)
    if p.returncode: sys.exit(f'colab: {notebook.name} fails in {python.parent.parent}')


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--env', type=Path, default=ROOT/'runs'/'colab')
    p.add_argument('--notebooks', nargs='*', default=['09_recipes', '10_evaluate', '11_explain'])
    args = p.parse_args()
    python = environment(args.env)
    content = Path(tempfile.mkdtemp())
    try:
        # what is committed here, as the branch that the cell clones
        git = ['git', '-C', str(ROOT), 'push', '-q', str(content/'origin'), f'HEAD:refs/heads/{cfg.branch}']
        subprocess.run(['git', 'init', '-q', '--bare', str(content/'origin')], check=True)
        subprocess.run(['git', '-C', str(content/'origin'), 'config', 'receive.shallowUpdate', 'true'], check=True)
        subprocess.run(git, check=True)
        subprocess.run([str(python), '-m', 'pip', '-q', 'uninstall', '-y', cfg.lib_name], check=True)
        for i, name in enumerate(args.notebooks):
            run_as_colab(python, Notebook(ROOT/'nbs'/f'{name}.ipynb'), content, [FRESH] if i else [FRESH, DEMO])
            print(f'colab: {name} in order', flush=True)
    finally: shutil.rmtree(content)


if __name__ == '__main__': sys.exit(main())
