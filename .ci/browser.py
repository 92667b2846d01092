"""What a user does, in a real browser: the page of vit_demo, a training run stopped halfway, Run all in every notebook.

`make browser`; needs Chromium. `--shots DIR` says where screenshots go. Run all is tried with nothing set: no archive, no
network, nothing downloaded before; then, where TINY_IMAGENET is set, with the archive in some notebooks that show it.
"""
import argparse
import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import nbformat
from PIL import Image
from playwright.sync_api import sync_playwright

from cells import ROOT, browser_path, notebooks
from vit_tinyimagenet.data.pack import open_data
from vit_tinyimagenet.data.synthetic import make_synthetic
from vit_tinyimagenet.deploy.predict import predict

WITH_ARCHIVE = '5_evaluation/01_predictions 5_evaluation/02_explain 9_results/06_leaderboard'.split()
PATIENCE_S = 900   # for whatever is waited for: a machine may be slow, or busy with something else
TRY = ["import vit_tinyimagenet as vt", "run = vt.train(vt.recipes.demo(), 'runs')",
       "print('finished', run.finished, len(run.log))"]


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def server(command, url, log, cwd, env):
    "A process that serves a page, up to the end of the context."
    with open(log, 'w', encoding='utf-8') as f:
        p = subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT)
        try:
            wait(lambda: answers(url) or p.poll() is not None, f'{url} does not answer; see {log}')
            if p.poll() is not None:
                said = log.read_text(encoding='utf-8', errors='replace')
                sys.exit(f'browser: {command[:3]} ended: {said[-1500:]}')
            yield
        finally:
            p.terminate()
            p.wait(PATIENCE_S)


def answers(url):
    try: return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError: return False


def wait(is_so, complaint, seconds=PATIENCE_S):
    "Wait until something is so; its value."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := is_so(): return value
        time.sleep(.2)
    sys.exit(f'browser: {complaint() if callable(complaint) else complaint}')


def try_page(context, archive, work, shots, env):
    "Upload an image to the page of vit_demo, read what it says, take another from the gallery."
    port = free_port()
    url, vit_demo = f'http://127.0.0.1:{port}', Path(sys.executable).parent/'vit_demo'
    command = [str(vit_demo), '--port', str(port), '--data', archive]
    valid = open_data(archive).valid
    Image.fromarray(valid.images[0].permute(1, 2, 0).numpy()).save(work/'photo.png')
    (work/'note.png').write_text('not an image', encoding='utf-8')
    with server(command, url, work/'demo.log', work, env):
        page = context.new_page()
        page.set_viewport_size(dict(width=1100, height=1150))
        page.goto(url)
        drop, best = page.locator('input[type=file]').first, page.locator('[data-testid="label-output-value"]')
        drop.set_input_files(str(work/'photo.png'))
        best.wait_for()
        said = [o.strip() for o in page.locator('.confidence-set .text').all_inner_texts() if o.strip()]
        first, right = best.inner_text(), predict(work/'photo.png').name.tolist()
        if said != right: sys.exit(f'browser: the page names {said}, and `predict` {right}')
        wait(lambda: page.locator('.image-frame img, .image-container img').count() >= 3, 'the page shows no maps')
        page.wait_for_timeout(1000)   # for the last picture to be drawn
        page.screenshot(path=str(shots/'demo_page.png'))
        page.locator('.thumbnail-item').nth(5).click()
        wait(lambda: best.inner_text() not in ('', first), 'the gallery changes nothing')
        page.locator('button[aria-label="Clear"]').first.click()
        drop.set_input_files(str(work/'note.png'))
        page.get_by_text('in no format that Pillow knows').first.wait_for()
        page.close()
    print(f'demo page: {len(said)} classes, {first!r} first; a file that is no image is refused', flush=True)


class Lab:
    "JupyterLab in the browser, by its own commands."
    def __init__(self, page): self.page = page

    def command(self, name, **args):
        self.page.evaluate('([n,a]) => { window.jupyterapp.commands.execute(n,a) }', [name, args])

    def open(self, path):
        "Open a notebook and bring it to the front, once nothing else can take its place there."
        self.page.evaluate("""p => { const app = window.jupyterapp; window.notebook = null;
            app.restored.then(() => app.commands.execute('docmanager:open', {path: p, factory: 'Notebook'}))
                .then(w => { app.shell.activateById(w.id); window.notebook = w; }); }""", path)
        ready = """() => { const w = window.notebook, shown = window.jupyterapp.shell.currentWidget;
            return w && w === shown && w.context.isReady && w.sessionContext.isReady && w.sessionContext.session?.kernel
                ? 'ready' : `in front: ${shown?.title.label}; dialog: ${document.querySelector('.jp-Dialog')?.innerText}`; }"""
        state = ''
        def is_ready():
            nonlocal state
            return (state := self.page.evaluate(ready)) == 'ready'
        wait(is_ready, lambda: f'{path} does not open: {state}')

    def cells(self):
        return self.page.evaluate('() => window.jupyterapp.shell.currentWidget.content.model.toJSON().cells')

    def close(self):
        self.page.evaluate("""async () => { const w = window.jupyterapp.shell.currentWidget;
            await w.context.save(); await w.sessionContext.shutdown(); w.dispose(); }""")

    def errors(self):
        said = [o for c in self.cells() for o in c.get('outputs', []) if o['output_type'] == 'error']
        return [f"{o['ename']}: {o['evalue']}" for o in said]

    def run(self, index):
        "Run one cell, without waiting for its end."
        self.page.evaluate('''i => { const n = window.jupyterapp.shell.currentWidget.content;
            n.deselectAll(); n.activeCellIndex = i;
            window.jupyterapp.commands.execute('notebook:run-cell'); }''', index)


def try_notebooks(lab, names, shots):
    "Run all cells of some notebooks in a real kernel; what is left out is said in one line."
    for name in names:
        start = time.monotonic()
        lab.open(f'{name}.ipynb')
        lab.command('notebook:clear-all-cell-outputs')
        lab.command('notebook:run-all-cells')
        code = lambda: [c for c in lab.cells() if c['cell_type'] == 'code' and c['source']]
        done = lambda: lab.errors() or all(c['execution_count'] for c in code())
        wait(done, f'{name}.ipynb does not come to its end', 1800)
        if said := lab.errors(): sys.exit(f'browser: {name}.ipynb: {said[0]}')
        first, *later = [''.join(o.get('text', '') for o in c['outputs']) for c in code()]
        left_out, lines = sum(map(is_left_out, later)), first.count('are left out: ')
        if lines != (left_out > 0): sys.exit(f'browser: {name}.ipynb: {left_out} cells left out, told in {lines} lines')
        print(f'{name}: {len(code())} cells, {left_out} left out, no error, {time.monotonic() - start:.0f} s', flush=True)
        lab.page.screenshot(path=str(shots/f"lab_{name.replace('/', '_')}.png"))
        lab.close()


def is_left_out(text): return text == 'left out\n'


def try_training(lab, folder, shots):
    "Train in a notebook, see the bar and the curve move, press stop in the middle, look at the run, go on."
    kernel = dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'))
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(o) for o in TRY], metadata=kernel)
    nbformat.write(nb, folder/'try.ipynb')
    lab.open('try.ipynb')
    lab.run(0)
    lab.run(1)
    bar, curve = (lab.page.locator(f'.jp-OutputArea {o}').first for o in ('.widget-hbox', 'img'))
    bar.wait_for()
    curve.wait_for()
    texts, pictures = set(), set()
    def moved():
        texts.add(bar.inner_text())
        pictures.add(curve.get_attribute('src'))
        return len(texts) > 2 and len(pictures) > 2
    wait(moved, 'bar and curve do not move')
    lab.page.screenshot(path=str(shots/'lab_training.png'))
    lab.page.locator('[data-command="notebook:interrupt-kernel"], button[title^="Interrupt"]').first.click()
    wait(lambda: lab.cells()[1]['execution_count'], 'training does not stop')
    lab.run(2)
    printed = lambda: ''.join(o.get('text', '') for o in lab.cells()[2]['outputs'])
    said = wait(printed, 'the notebook is of no use after the stop')
    if not said.startswith('finished False') or lab.errors(): sys.exit(f'browser: stopped: {said} {lab.errors()}')
    if not (folder/'runs'/'demo'/'checkpoint.pt').exists(): sys.exit('browser: no checkpoint after the stop')
    print(f'training: bar and curve move; stopped ({said.strip()}), checkpoint saved, kernel of use', flush=True)
    lab.close()


def nothing_set(env, work):
    "The variables of somebody who has just installed the package, on a machine without a network."
    nowhere = dict.fromkeys(['http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'], 'http://127.0.0.1:9')
    local = dict(no_proxy='127.0.0.1,localhost', HOME=str(work/'user'), VIT_TINYIMAGENET_HOME=str(work/'nothing'))
    (work/'user').mkdir()
    return {**{k: v for k, v in env.items() if k != 'TINY_IMAGENET'}, **nowhere, **local}


@contextlib.contextmanager
def laboratory(context, folder, work, env):
    "JupyterLab on a folder of notebooks, open in the browser."
    port, token = free_port(), secrets.token_hex()
    state = Path(tempfile.mkdtemp(dir=work))   # of its own: a layout kept from before would come back over what is opened
    env = {**env, **{f'JUPYTER{k}': str(state/k) for k in ('LAB_SETTINGS_DIR', 'LAB_WORKSPACES_DIR', '_CONFIG_DIR')}}
    quiet = state/'LAB_SETTINGS_DIR'/'@jupyterlab'/'apputils-extension'/'notification.jupyterlab-settings'
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}', encoding='utf-8')
    url = f'http://127.0.0.1:{port}/lab?token={token}'
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--port', str(port),
               '--expose-app-in-browser', f'--IdentityProvider.token={token}']
    with server(command, url, work/'lab.log', folder, env):
        page = context.new_page()
        page.set_viewport_size(dict(width=1300, height=1000))
        page.goto(url)
        page.wait_for_function('() => window.jupyterapp && window.jupyterapp.started')
        yield Lab(page)
        page.close()


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--shots', type=Path, default=ROOT/'runs'/'browser')
    p.add_argument('--notebooks', nargs='*', default=[o.stem for o in notebooks()])
    args = p.parse_args()
    if not (path := browser_path()): sys.exit('browser: no Chromium here; install it')
    args.shots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as d, sync_playwright() as play:
        work, folder = Path(d), Path(d)/'repository'/'nbs'
        shutil.copytree(ROOT, work/'repository', ignore=shutil.ignore_patterns('.git', '.venv', 'runs', 'build'))
        archive = os.environ.get('TINY_IMAGENET') or str(make_synthetic(work/'twin.zip'))
        browser = play.chromium.launch(executable_path=path, args=['--no-sandbox'])
        context = browser.new_context()
        context.set_default_timeout(PATIENCE_S*1000)
        env = {**os.environ, 'PYTHONPATH': str(work/'repository'), 'VIT_TINYIMAGENET_HOME': str(work/'home')}
        try_page(context, archive, work, args.shots, env)
        with laboratory(context, folder, work, nothing_set(env, work)) as lab:
            try_training(lab, folder, args.shots)
            try_notebooks(lab, args.notebooks, args.shots)
        if 'TINY_IMAGENET' in os.environ:
            with laboratory(context, folder, work, env) as lab:
                try_notebooks(lab, [n for n in WITH_ARCHIVE if n in args.notebooks], args.shots)
        browser.close()


if __name__ == '__main__': sys.exit(main())
