"""Everything that `make test` asks of the repository, a line per check.

`check.py --flags slow realdata` also runs the cells with those flags; `check.py --no_run` leaves the notebooks unrun.
A check is a function that yields its complaints: the place, what is wrong, and the fix.
"""
import argparse
import ast
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from shutil import copytree, ignore_patterns, rmtree
from tempfile import TemporaryDirectory

import nbformat

from cells import NBS, ROOT, TST_FLAGS, cfg, notebooks
from readme import differences
from stamp import CELL_ID, stamped

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


def run_in_child(nb, flags):
    "One notebook in a process of its own, so that its memory is given back; the child's answer and its traceback."
    command = [sys.executable, __file__, '--child', str(nb.path), '--flags', *flags]
    try: p = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired: return dict(passed=False, wall_s=TIMEOUT_S, ran=[]), 'out of time'
    try: return json.loads(p.stdout.splitlines()[-1]), p.stderr
    except (IndexError, ValueError):
        return dict(passed=False, wall_s=0, ran=[]), f'{p.stderr}\nexit code {p.returncode}'


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


def run_all(nbs, flags, report):
    "Run the notebooks one after another; returns the cells that ran and the flags that held others back."
    ran, skipped = [], []
    for nb in nbs:
        answer, errors = run_in_child(nb, flags)
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
                           capture_output=True, text=True)
        return texts(copy/NBS.name, '*.ipynb'), texts(copy/LIB, '**/*.py'), p.stderr[-300:] if p.returncode else ''


def texts(folder, pattern):
    return {str(o.relative_to(folder)): o.read_text(encoding='utf-8') for o in folder.glob(pattern)}


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
    from vit_tinyimagenet.record import Run, markdown_table, results_table
    rows = (ROOT/'README.md').read_text(encoding='utf-8').splitlines()
    for run in (Run(o.parent) for o in (ROOT/'results').glob('*/summary.json')):
        fresh = markdown_table(results_table([run])).splitlines()[-1]
        for row in rows:
            if row.startswith(f'| {run.name} |') and row != fresh:
                yield f'README.md: {row!r}, but results/{run.name} says {fresh!r}; `make execute NB=index readme`'


def badges_in_step(nbs):
    for nb in nbs:
        if stamped(nb) != nb.raw: yield f'{nb.name}: badge or Colab cell missing or out of date; run `make stamp`'


# --- the rules of the house ---

def imported(cell):
    "The package's modules that `cell` imports, in any of the ways to write it."
    for node in cell.nodes:
        if isinstance(node, ast.Import): names = [o.name for o in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == LIB: names = [f'{LIB}.{o.name}' for o in node.names]
        elif isinstance(node, ast.ImportFrom): names = ['.' * node.level + (node.module or '')]
        else: continue
        yield from (o.split('.')[1] for o in names if o.startswith(f'{LIB}.'))


def imports_point_down(nbs):
    number_of = {nb.default_exp: nb.number for nb in nbs if nb.default_exp and nb.number is not None}
    for nb, cell, module in ((nb, c, m) for nb in nbs for c in nb.code for m in imported(c)):
        if module not in number_of: yield at(nb, cell, f'imports {module}, which no notebook exports')
        elif number_of[module] >= (nb.number or ''):
            yield at(nb, cell, f'imports {module}, which is not from a lower number; move the code or renumber')


def names_known():
    "Every name is defined and every import used: what a hidden cell imports, the exported module does not have."
    command = [sys.executable, '-m', 'pyflakes', LIB, '.ci']
    p = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    yield from p.stdout.splitlines()
    if p.stderr: yield f'pyflakes fails: {p.stderr.strip()[-300:]}'


def cells_small(nbs):
    for nb, cell in ((nb, c) for nb in nbs for c in nb.code if c.id != CELL_ID):
        most = MAX_EXPORTED if cell.is_exported else MAX_HIDDEN if 'hide' in cell.directives else MAX_PLAIN
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


def notebooks_open_and_close(nbs):
    for nb in nbs:
        first, last = nb.cells[0], nb.cells[-1]
        lines = first.source.splitlines()
        if not (first.kind == 'markdown' and lines[0].startswith('# ') and any(o.startswith('> ') for o in lines)):
            yield f'{nb.name}, cell 1: open with a markdown cell of a title, `# ...`, and a promise, `> ...`'
        if nb.default_exp and not ('hide' in last.directives and 'nbdev_export()' in last.source):
            yield f'{nb.name}, cell {last.number}: close with `#| hide` and `import nbdev; nbdev.nbdev_export()`'
        if nb.number is None: yield f'{nb.name}: neither NN_name.ipynb, NNa_name.ipynb nor index.ipynb; rename it'


# --- what a user installs ---

# run outside the checkout, in a process where importing a development tool fails
USE_IT = """
import sys
sys.modules.update(dict.fromkeys(['nbdev', 'fastcore', 'execnb']))
import torch, {lib}
from pathlib import Path
from {lib}.checkpoint import load_pretrained, shipped
assert Path({lib}.__file__).is_relative_to(sys.argv[1]), {lib}.__file__
assert shipped(), 'no weights in the wheel'
for name in shipped():
    model = load_pretrained(name)
    known, side = len(model.meta['wnids']), model.cfg.img_size
    assert known == model.cfg.num_classes, name   # none of an encoder, which gives its features
    assert model(torch.zeros(1, 3, side, side)).shape == (1, known or model.cfg.embed_dim), name
"""


def wheel_complete():
    "The wheel, installed elsewhere, imports without development tools and loads its weights."
    rmtree(ROOT/'build', ignore_errors=True)   # what an older build left there would get into this one
    with TemporaryDirectory() as d:
        pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '-q']
        steps = [[*pip, 'wheel', '--no-deps', '-w', d, str(ROOT)],
                 [*pip, 'install', '--no-deps', '--no-index', '--find-links', d, '--target', f'{d}/site', LIB],
                 [sys.executable, '-c', USE_IT.format(lib=LIB), f'{d}/site']]
        for o in steps:
            p = subprocess.run(o, cwd=d, env={**os.environ, 'PYTHONPATH': f'{d}/site'}, stdin=subprocess.DEVNULL,
                               capture_output=True, text=True)
            if p.returncode: return [f'{" ".join(o[1:6])}: {p.stderr.strip()[-300:]}; see setup.py and settings.ini']
    return []


# --- guards: nothing passes by not running ---

def there_are_notebooks(nbs):
    if not nbs: yield f'{NBS.name}/: there is not one notebook'
    for o in NBS.rglob('*'):
        if o.name == '.notest': yield f'{o.relative_to(ROOT)}: keeps its folder from being tested; delete it'
        elif o.suffix == '.ipynb' and '.ipynb_checkpoints' not in o.parts and (o.parent != NBS or o.name[0] in '_.'):
            yield f'{o.relative_to(ROOT)}: nbdev_test passes it by; move it to {NBS.name}/NN_name.ipynb'


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
    report('names are known', names_known())
    report('cells are small', cells_small(nbs))
    report('outputs are fit to publish', outputs_fit_to_publish(nbs))
    report('notebooks open and close', notebooks_open_and_close(nbs))
    report('badges are in step', badges_in_step(nbs))
    report('notebooks are clean', notebooks_clean(nbs))
    report('export is in step', export_in_step())
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
    to_run = [] if args.no_run else nbs
    if not args.no_run: report('the wheel is complete', wheel_complete())
    ran, skipped = run_all(to_run, args.flags, report)
    summary(ran, skipped, len(to_run))
    print(f'flags: {" ".join(args.flags) or "none"}; {time.time()-start:.0f} s')
    print(f'{report.passed} passed, {report.failed} failed')
    return int(report.failed > 0)


if __name__ == '__main__': sys.exit(main())
