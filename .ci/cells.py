"What the scripts beside this one share: where things are, the settings, and a notebook as cells with directives."
import ast
import json
import re
import shutil
from functools import cached_property
from pathlib import Path

from execnb.nbio import nb2str
from fastcore.basics import AttrDict
from nbdev.config import get_config
from nbdev.process import extract_directives

ROOT = Path(__file__).resolve().parent.parent
cfg = get_config(path=ROOT)
NBS = ROOT/cfg.nbs_path.relative_to(ROOT)
TST_FLAGS = cfg.tst_flags.split()
# where the notebooks at the root stand between the parts; those above 8_bench are articles
AT_ROOT = {'recipes': (6.5, 1), 'studies': (6.5, 2), 'api': (8.5, 1), 'cli': (8.5, 2), 'own_images': (8.5, 3),
           'speedrun': (8.5, 4), '00_quickstart': (9.5, 1), 'index': (9.5, 2)}
EXPORTS = {'export', 'exporti', 'exports'}


class Cell:
    "A cell: its text, the directives at its head, and its code below them."
    def __init__(self, number, raw):
        self.number, self.raw, self.id = number, raw, raw.get('id')
        self.kind, self.source, self.outputs = raw['cell_type'], ''.join(raw['source']), raw.get('outputs', [])
        # nbdev's own reading, so that we see exactly the directives that nbdev_test and nbdev_export obey
        self.directives = extract_directives(AttrDict(source=self.source), remove=False) if self.is_code else {}

    @property
    def is_code(self): return self.kind == 'code'

    @property
    def is_exported(self): return bool(EXPORTS & self.directives.keys())

    @property
    def flags(self): return [f for f in TST_FLAGS if f in self.directives]

    @property
    def fig_alt(self):
        "What `#| fig-alt:` says of the cell's figure, as written."
        found = re.search(r'^\s*#\s*\|\s*fig-alt:\s*(.*?)\s*$', self.source, re.MULTILINE)
        return found[1] if found else ''

    @property
    def n_images(self): return sum(k.startswith('image/') for o in self.outputs for k in o.get('data', {}))

    @property
    def code_lines(self): return [o for o in self.source.splitlines() if o.strip() and not re.match(r'\s*#\s*\|', o)]

    @cached_property
    def nodes(self):
        "Every node of the syntax tree, none if there is no tree; `%` and `!` lines count as `pass`."
        if not self.is_code: return []
        try: return list(ast.walk(ast.parse(re.sub(r'^(\s*)[%!].*$', r'\1pass', self.source, flags=re.MULTILINE))))
        except SyntaxError: return []

    @property
    def imports_alone(self):
        "Is it nothing but imports?"
        top = ast.parse(self.source).body if self.nodes and '%' not in self.source else []
        return bool(top) and all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in top)


class Notebook:
    "A notebook file; cells are numbered from 1, as in nbdev_test's messages."
    def __init__(self, path):
        self.path, self.name = path, path.relative_to(NBS).as_posix()
        try: self.raw = json.loads(path.read_text(encoding='utf-8'))
        except ValueError as e: raise ValueError(f'{self.name}: not a notebook: {e}') from None
        self.cells = [Cell(i, o) for i, o in enumerate(self.raw['cells'], 1)]

    @property
    def code(self): return [o for o in self.cells if o.is_code]

    @property
    def stem(self): return self.name.removesuffix('.ipynb')

    @property
    def part(self): return self.name.rpartition('/')[0]

    @property
    def rank(self):
        "The place in the one-way order of imports: parts, chapters within a part."
        if self.stem in AT_ROOT: return AT_ROOT[self.stem]
        found = re.match(r'(\d)_[a-z]+/(\d\d)_\w+\.ipynb$', self.name)
        return (int(found[1]), int(found[2])) if found else None

    @property
    def default_exp(self): return next((o.directives['default_exp'][0] for o in self.code
                                        if o.directives.get('default_exp')), None)


def notebooks():
    "All of them, in the order of imports."
    visible = (o for o in NBS.rglob('*.ipynb') if not any(p[0] in '_.' for p in o.relative_to(NBS).parts))
    return sorted(map(Notebook, visible), key=lambda nb: (nb.rank or (0, 0), nb.name))


def browser_path():
    "Where Chromium or Chrome is; None where there is none."
    return next((p for n in ('chromium', 'chromium-browser', 'google-chrome', 'chrome') if (p := shutil.which(n))), None)


def as_text(raw):
    "The file's text for a notebook's JSON, formatted as nbdev_clean does it."
    return nb2str(raw)
