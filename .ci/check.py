"""Everything that `make test` asks of the repository, a line per check.

`check.py --flags slow realdata` also runs the cells with those flags; `check.py --no_run` leaves the notebooks unrun.
A check is a function that yields its complaints: the place, what is wrong, and the fix.
"""
import argparse
import ast
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from shutil import copytree, ignore_patterns, rmtree
from tempfile import TemporaryDirectory

import nbformat
import yaml

from cells import NBS, ROOT, TST_FLAGS, cfg, notebooks
from readme import differences
from stamp import CELL_ID, stamped
from wheel_check import USE_IT

# What may stay unrun: {'NN_name.ipynb': {'skip_exec', 'eval: false'}}, the reason in a comment
ALLOWED = {}
DIRECTIVES = set('''default_exp export exporti exports hide hide_input hide_line exec_doc filter_stream echo: eval: output:
    include: warning: label: code-fold: code-summary: fig-cap: fig-alt: tbl-cap: column: layout-ncol:'''.split())
MAX_EXPORTED, MAX_PLAIN, MAX_HIDDEN, MAX_WIDTH, MAX_KB = 25, 12, 16, 110, 500
TIMEOUT_S = 3600
LIB = cfg.lib_path.name


def at(nb, cell, what):
    "A complaint about `cell`, told by its number and its first line of code."
    head = next(iter(cell.code_lines), '').strip()[:50]
    return f'{nb.name}, cell {cell.number} ({head}): {what}'


# --- running the notebooks ---

def run_here(path, flags):
    "In the child process: nbdev's own `test_nb`; the last line printed says whether it passed and which cells ran."
    import nbdev.test
    ran = []
    class Watched(nbdev.test.CaptureShell):
        def cell(self, cell, **kwargs):
            if cell.cell_type == 'code': ran.append(cell.id)
            super().cell(cell, **kwargs)
    nbdev.test.CaptureShell = Watched
    sys.path.remove(str(Path(__file__).resolve().parent))   # notebooks see what they see under nbdev_test
    passed, wall_s = nbdev.test.test_nb(path, skip_flags=TST_FLAGS, force_flags=flags, basepath=ROOT)
    print('\n' + json.dumps(dict(passed=passed, wall_s=wall_s, ran=ran)))


# what nearly every notebook imports: once, in a process that the others are forked from where forks are safe
LINUX = sys.platform == 'linux'
FORKS = multiprocessing.get_context('forkserver' if LINUX else 'spawn')
if LINUX: FORKS.set_forkserver_preload(['matplotlib.pyplot', 'nbdev.test', 'pandas', 'torch', 'torchvision'])


def speak_into(folder, path, flags):
    "In the child process: `run_here`, with what is printed in files."
    for stream, name in (1, 'out'), (2, 'err'): os.dup2(os.open(folder/name, os.O_WRONLY | os.O_CREAT), stream)
    run_here(path, flags)


def run_in_child(nb, flags):
    "One notebook in a process of its own, so that its memory is given back; the child's answer and its traceback."
    with TemporaryDirectory() as d:
        p = FORKS.Process(target=speak_into, args=(Path(d), nb.path, flags))
        p.start()
        p.join(TIMEOUT_S)
        if p.is_alive():
            p.kill()
            return dict(passed=False, wall_s=TIMEOUT_S, ran=[]), 'out of time'
        out, err = ((Path(d)/o).read_text(encoding='utf-8', errors='replace') for o in ('out', 'err'))
        try: return json.loads(out.splitlines()[-1]), err
        except (IndexError, ValueError):
            return dict(passed=False, wall_s=0, ran=[]), f'{err}\nexit code {p.exitcode}'


def run_complaints(nb, answer, errors):
    "Why this notebook's run is not a pass."
    if not answer['passed']:
        last = [o for o in nb.code if o.id in answer['ran'][-1:]]
        error = ([o for o in errors.splitlines() if o.strip()] or ['no message'])[-1]
        yield at(nb, last[0], f'{error}; see the traceback') if last else f'{nb.name}: {error}'
    elif not answer['ran'] and nb.code and 'skip_exec' not in ALLOWED.get(nb.name, ()):
        yield f'{nb.name}: not one cell ran; look for skip_exec or a kernelspec that is not Python'


def is_asserting(cell):
    "Does the cell hold an assert, a call of some test_*, or an expected exception?"
    names = [getattr(o.func, 'id', getattr(o.func, 'attr', '')) for o in cell.nodes if isinstance(o, ast.Call)]
    expects = re.compile(r'test_\w+|ExceptionExpected|expect_fail|raises')
    return any(isinstance(o, ast.Assert) for o in cell.nodes) or any(map(expects.fullmatch, names))


def run_all(nbs, flags, report, pool):
    "Run the notebooks in `pool`; returns the cells that ran and the flags that held others back."
    ran, skipped = [], []
    for nb, (answer, errors) in zip(nbs, pool.map(run_in_child, nbs, repeat(flags))):
        cells = [o for o in nb.code if o.id in answer['ran']]
        ran += cells
        skipped += [f for o in nb.code for f in o.flags if f not in flags]
        if not answer['passed']: print('\n'.join('     ' + o for o in errors.strip().splitlines()[-25:]))
        report(f'run {nb.name}', run_complaints(nb, answer, errors), f"{len(cells)} cells, {answer['wall_s']:.1f} s")
    return ran, skipped


# --- what is generated is in step with its source ---

def in_a_copy(command):
    "The texts that nbdev's `command` makes of a copy's notebooks and of its modules, and the command's last words."
    with TemporaryDirectory() as d:
        copy = Path(d)
        copytree(NBS, copy/NBS.name, ignore=ignore_patterns('.*'))
        # of the package only __init__.py, so that a module which no notebook exports any more comes to light
        (copy/LIB).mkdir()
        for o in 'settings.ini', 'pyproject.toml', f'{LIB}/__init__.py':
            if (ROOT/o).exists(): (copy/o).write_bytes((ROOT/o).read_bytes())
        env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}   # nbdev_export does nothing under a test
        code = f'from nbdev.doclinks import *; from nbdev.clean import *; {command}()'
        p = subprocess.run([sys.executable, '-c', code], cwd=copy, env=env, stdin=subprocess.DEVNULL,
                           capture_output=True, encoding='utf-8')
        return texts(copy/NBS.name, '**/*.ipynb'), texts(copy/LIB, '**/*.py'), p.stderr[-300:] if p.returncode else ''


def texts(folder, pattern):
    return {o.relative_to(folder).as_posix(): o.read_text(encoding='utf-8') for o in folder.glob(pattern)}


def export_in_step():
    _, fresh, error = in_a_copy('nbdev_export')
    if error: yield f'nbdev_export fails: {error}'
    committed = texts(ROOT/LIB, '**/*.py')
    for o in sorted(fresh.keys() | committed.keys()) if not error else []:
        if o not in fresh: yield f'{LIB}/{o}: no notebook exports it; move its code into one, or delete it'
        elif fresh[o] != committed.get(o): yield f'{LIB}/{o}: not what the notebooks export; edit there, `make export`'


def notebooks_clean(nbs):
    cleaned, _, error = in_a_copy('nbdev_clean')
    if error: yield f'nbdev_clean fails: {error}'
    for nb in nbs:
        if cleaned.get(nb.name) != nb.path.read_text(encoding='utf-8'): yield f'{nb.name}: not clean; run `make clean`'
        try: nbformat.validate(nbformat.from_dict(nb.raw))
        except nbformat.ValidationError as e: yield f'{nb.name}: not valid: {str(e).splitlines()[0]}'


def readme_in_step():
    for o in differences(): yield f'{o}: not what nbs/index.ipynb says; run `make readme`'


def readme_tells_results():
    "Every row of README's table that bears a run's name says what that run's folder says now."
    from vit_tinyimagenet.runs.record import Run, markdown_table, results_table
    rows = (ROOT/'README.md').read_text(encoding='utf-8').splitlines()
    for run in (Run(o.parent) for o in (ROOT/'results').glob('*/summary.json')):
        fresh = markdown_table(results_table([run])).splitlines()[-1]
        for row in rows:
            if row.startswith(f'| {run.name} |') and row != fresh:
                yield f'README.md: {row!r}, but results/{run.name} says {fresh!r}; `make execute NB=index readme`'


def badges_in_step(nbs):
    for nb in nbs:
        if stamped(nb) != nb.raw: yield f'{nb.name}: badge or Colab cell missing or out of date; run `make stamp`'


def versions_in_step(version=cfg.version):
    "One version, wherever a release says its own."
    said = {f'{LIB}/__init__.py': r'__version__ = "(.*)"', 'CITATION.cff': r'(?s:.*)^version: (.*)$',
            'CHANGELOG.md': r'# Changelog\s+## (\S+) \((?:unreleased|\d{4}-\d\d-\d\d)\)$'}
    for name, pattern in said.items():
        found = re.match(pattern, (ROOT/name).read_text(encoding='utf-8'), re.MULTILINE)
        if not found: yield f'{name}: says no version; as a regular expression it is to be {pattern}'
        elif found[1] != version: yield f'{name}: {found[1]}, but {version} in settings.ini; one version in both'


# --- the rules of the house ---

def imported(cell, modules):
    "Those of the package's `modules` that `cell` imports, in any of the ways to write it; as written where it is none."
    for node in cell.nodes:
        if isinstance(node, ast.Import): names = [o.name for o in node.names]
        elif not isinstance(node, ast.ImportFrom): continue
        elif (node.module or '').removeprefix(f'{LIB}.') in modules: names = [node.module]
        else: names = [f'{node.module}.{o.name}' for o in node.names]
        yield from (o.removeprefix(f'{LIB}.') for o in names if o.startswith(f'{LIB}.'))


def imports_point_down(nbs):
    rank_of = {nb.default_exp: nb.rank for nb in nbs if nb.default_exp and nb.rank}
    code = ((nb, c) for nb in nbs for c in nb.code if c.id != CELL_ID)
    for nb, cell, module in ((nb, c, m) for nb, c in code for m in imported(c, rank_of)):
        if module not in rank_of: yield at(nb, cell, f'imports {module}, which no notebook exports')
        elif rank_of[module] >= (nb.rank or (0, 0)):
            yield at(nb, cell, f'imports {module}, which is no lower part or chapter; move the code or renumber')


def lint():
    "What ruff finds by the rules of pyproject.toml: names that nobody defines, imports that nobody uses, likely bugs."
    command = [sys.executable, '-m', 'ruff', 'check', '--quiet', '--output-format', 'concise', LIB, '.ci', 'setup.py']
    p = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, encoding='utf-8')
    yield from p.stdout.splitlines()
    if p.stderr: yield f'ruff fails: {p.stderr.strip()[-300:]}'


def hooks_in_step():
    "What pre-commit runs is of the versions that .venv has."
    known = cfg.dev_requirements.split()
    for repo in yaml.safe_load((ROOT/'.pre-commit-config.yaml').read_text(encoding='utf-8'))['repos']:
        own = f"{Path(repo['repo']).name.removesuffix('-pre-commit')}=={repo['rev'].removeprefix('v')}"
        for o in {own, *(d for hook in repo['hooks'] for d in hook.get('additional_dependencies', ()))}:
            if o not in known: yield f'.pre-commit-config.yaml: {o}, which is not in dev_requirements (settings.ini)'


def without_encoding(node):
    "Whether a call reads or writes text in an encoding that it does not say, so that the machine's decides."
    if not isinstance(node, ast.Call): return False
    given, is_method = {o.arg: o.value for o in node.keywords}, isinstance(node.func, ast.Attribute)
    if {'encoding', None} & given.keys(): return False
    name = node.func.attr if is_method else getattr(node.func, 'id', '')
    if name in ('read_text', 'write_text'): return is_method
    if name in ('run', 'Popen', 'check_output'): return 'text' in given
    if name not in ('open', 'fdopen') or ast.unparse(node.func) == 'os.open': return False
    of_path = is_method and ast.unparse(node.func.value) not in ('os', 'io')
    mode = given.get('mode') or next(iter(node.args[0 if of_path else 1:]), ast.Constant('r'))
    said = ''.join(str(o.value) for o in ast.walk(mode) if isinstance(o, ast.Constant))
    return bool(re.fullmatch('[rwaxt+]+', said))


def text_says_its_encoding(nbs):
    "Text is UTF-8 on every machine: what opens a file or another program as text says so."
    fix = "add encoding='utf-8' (to a subprocess in the place of text=True)"
    for nb, cell, node in ((nb, c, n) for nb in nbs for c in nb.code for n in c.nodes):
        if without_encoding(node): yield at(nb, cell, f'{ast.unparse(node)[:60]}: {fix}')
    for path in (*(ROOT/'.ci').rglob('*.py'), ROOT/'setup.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if without_encoding(node): yield f'{path.name}, line {node.lineno}: {fix}'


def cells_small(nbs):
    for nb, cell in ((nb, c) for nb in nbs for c in nb.code if c.id != CELL_ID):
        long = cell.is_exported or cell.imports_alone
        most = MAX_EXPORTED if long else MAX_HIDDEN if 'hide' in cell.directives else MAX_PLAIN
        n, width = len(cell.code_lines), max(map(len, cell.source.splitlines()), default=0)
        if n > most: yield at(nb, cell, f'{n} lines, at most {most}; split it')
        if width > MAX_WIDTH: yield at(nb, cell, f'a line of {width} characters, at most {MAX_WIDTH}; break it')


def printed(output):
    "All text of an output: what a stream or a traceback says, and every form of a result but the bitmaps."
    data = {k: v for k, v in output.get('data', {}).items() if k in ('image/svg+xml',) or not k.startswith('image/')}
    parts = [output.get('text', ''), output.get('traceback', ''), *data.values()]
    return '\n'.join(''.join(o) if isinstance(o, list) else str(o) for o in parts)


def outputs_fit_to_publish(nbs):
    path = re.compile(r'(?<![\w.~-])/(?:root|home|work|tmp)/[A-Za-z][\w./-]*')
    for nb in nbs:
        kb = nb.path.stat().st_size/1000
        if kb >= MAX_KB: yield f'{nb.name}: {kb:.0f} kB, at most {MAX_KB}; lower the figures\' dpi or show fewer'
        for cell in nb.cells:
            found = path.search('\n'.join([cell.source, *map(printed, cell.outputs)]))
            if found: yield at(nb, cell, f'{found[0]} is a path on one machine; make it relative or do not print it')
            if any(o['output_type'] == 'error' for o in cell.outputs):
                yield at(nb, cell, 'a saved error; catch it in the cell, run again')


def figures_have_texts(nbs):
    "What is seen is also said: an image by its alt text, for whoever has it read out."
    for nb, cell in ((nb, c) for nb in nbs for c in nb.cells):
        if cell.n_images and not cell.fig_alt:
            yield at(nb, cell, 'shows an image; add `#| fig-alt:` and, in one sentence, what it shows')
        if not cell.is_code and re.search(r'!\[\s*\]\(|<img(?![^>]*alt="[^"]+)', cell.source):
            yield at(nb, cell, 'an image without a text; write one between the square brackets, `![...](...)`')


def notebooks_open_and_close(nbs):
    for nb in nbs:
        first, last = nb.cells[0], nb.cells[-1]
        lines = first.source.splitlines()
        promises = [o for o in lines if o.startswith('> ')]   # nbdev takes one line for the module's docstring
        if not (first.kind == 'markdown' and lines[0].startswith('# ') and len(promises) == 1):
            yield f'{nb.name}, cell 1: open with a markdown cell of a title, `# ...`, and one line of promise, `> ...`'
        if nb.default_exp and not ('hide' in last.directives and 'nbdev_export()' in last.source):
            yield f'{nb.name}, cell {last.number}: close with `#| hide` and `import nbdev; nbdev.nbdev_export()`'
        if nb.rank is None: yield f'{nb.name}: neither N_part/NN_name.ipynb nor of those at the root (.ci/cells.py)'


# --- what a user installs ---

def wheel_complete():
    "The wheel, installed elsewhere, imports without development tools and loads its weights."
    rmtree(ROOT/'build', ignore_errors=True)   # what an older build left there would get into this one
    with TemporaryDirectory() as d:
        pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '-q']
        steps = [[*pip, 'wheel', '--no-deps', '-w', d, str(ROOT)],
                 [*pip, 'install', '--no-deps', '--no-index', '--find-links', d, '--target', f'{d}/site', LIB],
                 [sys.executable, '-c', USE_IT, f'{d}/site']]
        for o in steps:
            p = subprocess.run(o, cwd=d, env={**os.environ, 'PYTHONPATH': f'{d}/site'}, stdin=subprocess.DEVNULL,
                               capture_output=True, encoding='utf-8')
            if p.returncode: return [f'{" ".join(o[1:6])}: {p.stderr.strip()[-300:]}; see setup.py and settings.ini']
    return []


# --- the path on a GPU, without one ---

def cuda_path():
    "What a step asks of a CUDA device that is not there is what the table says, and all else works on it."
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '.ci/cuda_counts.py']
    p = subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, encoding='utf-8',
                       timeout=TIMEOUT_S)
    found = [o.removeprefix('FAIL ') for o in p.stdout.splitlines() if o.startswith('FAIL ')]
    yield from found
    if p.returncode and not found: yield f'cuda_counts.py fails: {p.stderr.strip()[-300:]}'


# --- Windows, without one ---

def windows_path():
    "The package packs, trains, resumes and predicts where there is nothing of POSIX."
    p = subprocess.run([sys.executable, '.ci/fake_windows.py'], cwd=ROOT, stdin=subprocess.DEVNULL,
                       capture_output=True, encoding='utf-8', timeout=TIMEOUT_S)
    if p.returncode: yield p.stderr.strip()[-300:]


# --- guards: nothing passes by not running ---

def there_are_notebooks(nbs):
    if not nbs: yield f'{NBS.name}/: there is not one notebook'
    for o in NBS.rglob('*'):
        hidden = any(p[0] in '_.' for p in o.relative_to(NBS).parts)
        if o.name == '.notest': yield f'{o.relative_to(ROOT)}: keeps its folder from being tested; delete it'
        elif o.suffix == '.ipynb' and hidden and '.ipynb_checkpoints' not in o.parts:
            yield f'{o.relative_to(ROOT)}: nbdev_test passes it by; move it to {NBS.name}/N_part/NN_name.ipynb'


def nothing_unrun(nbs):
    for nb in nbs:
        allowed = ALLOWED.get(nb.name, set())
        for cell in nb.cells:
            skips = not cell.is_code and re.search(r'^\W*skip_exec\W*:', cell.source, re.MULTILINE)
            if skips and 'skip_exec' not in allowed:
                yield at(nb, cell, 'skip_exec leaves the notebook unrun; remove it')
            if cell.directives.get('eval:', [''])[0].lower() == 'false' and 'eval: false' not in allowed:
                yield at(nb, cell, 'eval: false leaves the cell unrun; use a flag of tst_flags')
            is_closing = cell is nb.cells[-1] and len(cell.code_lines) <= 2
            if cell.is_code and 'nbdev_export(' in cell.source and not is_closing:
                yield at(nb, cell, 'nbdev_test skips a cell that says nbdev_export(; keep it for the last cell, alone')
            if cell.is_code and not cell.nodes: yield at(nb, cell, 'not Python; correct the syntax')


def directives_known(nbs):
    for nb, cell in ((nb, c) for nb in nbs for c in nb.code):
        for o in cell.directives.keys() - DIRECTIVES - {*TST_FLAGS}:
            yield at(nb, cell, f'`#| {o}` is neither a directive of nbdev nor in tst_flags (settings.ini); correct it')
        written = sum(bool(re.match(r'\s*#\s*\|', o)) for o in cell.source.splitlines())
        if written > len(cell.directives):
            yield at(nb, cell, 'a directive twice, empty, or below code; move it to the top')


def flags_are_run(flags):
    "Every flag has a Makefile target that runs it, and the flags asked for exist."
    text = (ROOT/'Makefile').read_text(encoding='utf-8')
    for k, v in re.findall(r'^(\w+) *[?:]?= *(.*?)$', text, re.MULTILINE): text = text.replace(f'$({k})', v)
    run = {o for line in re.findall(r'^\t.*--flags +([\w ]+)', text, re.MULTILINE) for o in line.split()}
    for o in TST_FLAGS:
        if o not in run: yield f'Makefile: no target runs {o} of tst_flags (settings.ini); add one, or drop the flag'
    for o in {*flags, *run} - {*TST_FLAGS}: yield f'--flags {o}: not in tst_flags (settings.ini); correct it'


# --- all together ---

class Report:
    "Prints each verdict as it falls, and counts."
    def __init__(self): self.passed = self.failed = 0
    def __call__(self, name, complaints, note=''):
        try: complaints = list(complaints)
        except Exception as e: complaints = [f'the check itself failed: {type(e).__name__}: {e}']
        for o in complaints: print(f'FAIL {name}: {o}', flush=True)
        if not complaints: print(f'ok   {name}' + (f' ({note})' if note else ''), flush=True)
        self.failed, self.passed = self.failed + bool(complaints), self.passed + (not complaints)


def check_files(nbs, flags, report):
    "All checks that read; none of them runs a notebook."
    report('there are notebooks', there_are_notebooks(nbs), f'{len(nbs)}')
    report('nothing left unrun', nothing_unrun(nbs))
    report('directives are known', directives_known(nbs))
    report('flags are run', flags_are_run(flags))
    report('imports point down', imports_point_down(nbs))
    report('ruff finds nothing', lint())
    report('hooks are in step', hooks_in_step())
    report('text says its encoding', text_says_its_encoding(nbs))
    report('cells are small', cells_small(nbs))
    report('outputs are fit to publish', outputs_fit_to_publish(nbs))
    report('figures have texts', figures_have_texts(nbs))
    report('notebooks open and close', notebooks_open_and_close(nbs))
    report('badges are in step', badges_in_step(nbs))
    report('notebooks are clean', notebooks_clean(nbs))
    report('export is in step', export_in_step())
    report('versions are in step', versions_in_step())
    report('README is in step', readme_in_step())
    report('README tells the results', readme_tells_results())


def summary(ran, skipped, n_notebooks):
    "What ran and what did not, counted."
    by_flag = ', '.join(f'{n} {flag}' for flag, n in Counter(skipped).items()) or 'none'
    print(f'\nnotebooks run: {n_notebooks}; asserting cells run: {sum(map(is_asserting, ran))} of {len(ran)}; '
          f'cells skipped by flag: {by_flag}')


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--flags', nargs='*', default=[], help=f'also run cells marked so: {" ".join(TST_FLAGS)}')
    p.add_argument('--no_run', action='store_true', help='only read the files: seconds instead of minutes')
    p.add_argument('--child', type=Path, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child: return run_here(args.child, args.flags)
    report, start = Report(), time.time()
    try: nbs = notebooks()
    except ValueError as e: nbs = report('notebooks can be read', [f'{e}; restore it from git']) or []
    check_files(nbs, args.flags, report)
    ran, skipped = [], []
    # the longest first, or all would wait for it at the end
    to_run = [] if args.no_run else sorted(nbs, key=lambda nb: nb.stem != '00_quickstart')
    if to_run:
        # OpenMP's threads that wait are not to spin: the cores belong to other notebooks too
        os.environ['OMP_WAIT_POLICY'] = 'PASSIVE'
        # one on each core; a GPU is for one at a time
        with ThreadPoolExecutor(1 if 'cuda' in args.flags else min(4, os.cpu_count())) as pool:
            counted, wheel = pool.submit(list, cuda_path()), pool.submit(wheel_complete)
            claimed = pool.submit(list, windows_path() if LINUX else [])
            ran, skipped = run_all(to_run, args.flags, report, pool)
            report('the path on CUDA is as counted', counted.result())
            report('the wheel is complete', wheel.result())
            report('a Windows that is claimed will do', claimed.result())
    summary(ran, skipped, len(to_run))
    print(f'flags: {" ".join(args.flags) or "none"}; {time.time()-start:.0f} s')
    print(f'{report.passed} passed, {report.failed} failed')
    return int(report.failed > 0)


if __name__ == '__main__': sys.exit(main())
