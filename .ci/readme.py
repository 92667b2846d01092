"Write README.md and its figures from nbs/index.ipynb: nbdev_readme's job, done by nbconvert, as Quarto is not on PyPI."
import posixpath
import re
import shutil

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

from cells import NBS, ROOT, Notebook
from stamp import CELL_ID

INDEX, README, FIGURES = NBS/'index.ipynb', ROOT/'README.md', ROOT/'index_files'
PREFERENCE = 'text/markdown image/svg+xml image/png image/jpeg text/html text/latex text/plain'.split()


def has(cell, *directives):
    "Does `cell` carry one of these? `echo: false` stands for the directive with that value."
    written = {' '.join([k, *v]).lower() for k, v in cell.directives.items()}
    return bool(written & set(directives))


def from_root(text):
    "Relative links of a page in nbs/, as a page in the repository's root has to write them."
    def moved(m):
        if re.match(r'[a-z]+:|[/#]', m[2]): return m[0]
        return m[1] + posixpath.normpath(posixpath.join(NBS.name, m[2]))
    return re.sub(r'(\]\(|(?:src|href)=")([^)"\s]+)', moved, text)


def shown(cell):
    "What of `cell` a reader of the README sees, as nbformat has it; None for nothing."
    node = nbformat.from_dict({**cell.raw, 'source': cell.source})
    if not cell.is_code: return {**node, 'source': from_root(cell.source)}
    if cell.id == CELL_ID or has(cell, 'hide', 'include: false'): return None
    node.source = re.sub(r'^\s*#\s*\|.*\n?', '', cell.source, flags=re.MULTILINE).strip()
    # stderr holds progress bars and warnings, which differ from run to run
    node.outputs = [] if has(cell, 'output: false') else [o for o in cell.outputs if o.get('name') != 'stderr']
    node.metadata = {'transient': {'remove_source': has(cell, 'hide_input', 'echo: false')}}
    return node


def render():
    "README.md's text, and its figures as a dict from file name to bytes."
    cells = [o for o in map(shown, Notebook(INDEX).cells) if o]
    nb = dict(cells=cells, nbformat=4, nbformat_minor=5, metadata={'language_info': {'name': 'python'}})
    exporter = MarkdownExporter(config=Config({'NbConvertBase': {'display_data_priority': PREFERENCE}}))
    text, resources = exporter.from_notebook_node(
        nbformat.reads(nbformat.writes(nbformat.from_dict(nb)), as_version=4),
        resources=dict(unique_key='index', output_files_dir=FIGURES.name))
    texts = (c.fig_alt for c in filter(shown, Notebook(INDEX).cells) for _ in range(c.n_images))
    text = re.sub(rf'!\[\w+\](?=\({FIGURES.name}/)', lambda m: f'![{next(texts)}]', text)
    text = re.sub(r'<style.*?</style>\s*', '', text, flags=re.DOTALL)   # GitHub would print pandas' style sheet
    text = re.sub(r'\n{3,}', '\n\n', re.sub(r'[ \t]+$', '', text, flags=re.MULTILINE)).strip() + '\n'
    return text, {k.split('/')[-1]: v for k, v in resources['outputs'].items()}


def differences():
    "What keeps README.md and its figures from being what index.ipynb says."
    if not INDEX.exists(): return [f'{INDEX.name} is missing, so README.md']
    text, figures = render()
    committed = {o.name: o.read_bytes() for o in FIGURES.glob('*')}
    bad = [k for k in sorted({*figures, *committed}) if figures.get(k) != committed.get(k)]
    is_same = README.exists() and README.read_text(encoding='utf-8') == text
    return [*([] if is_same else ['README.md']), *(f'{FIGURES.name}/{o}' for o in bad)]


if __name__ == '__main__':
    text, figures = render()
    README.write_text(text, encoding='utf-8')
    shutil.rmtree(FIGURES, ignore_errors=True)   # a figure that index.ipynb no longer has goes too
    if figures: FIGURES.mkdir()
    for name, data in figures.items(): (FIGURES/name).write_bytes(data)
    print(f'README.md, {len(figures)} figures')
