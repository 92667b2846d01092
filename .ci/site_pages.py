"""Write the site's pages into _proc/, for Sphinx: each notebook as its reader is to see it, a page for each part, and
the repository's own texts. nbdev's directives are obeyed; what a cell exports is documented above its folded source.
"""
import ast
import inspect
import posixpath
import re
import shutil
import sys
from functools import cache
from importlib import import_module

import nbformat
from fastcore.docments import docments

from cells import NBS, ROOT, cfg, notebooks
from readme import shown
from stamp import COLAB

PROC = ROOT/'_proc'
AT_ROOT = '00_quickstart own_images speedrun recipes studies cli api'.split()
TEXTS = {'CHANGELOG.md': 'changelog.md', 'CONTRIBUTING.md': 'contributing.md'}
REPOSITORY = f'{cfg.git_url}/{{}}/{cfg.branch}/{{}}'
# fenced code, headings, links, code in a line
INLINE = re.compile(r'^ *```.*?^ *```|^#+ .*?$|!?\[(?:[^\]`]|`[^`]*`)*\]\([^)]*\)|`[^`\n]+`', re.MULTILINE | re.DOTALL)
NOTEBOOK = dict(kernelspec=dict(name='python3', display_name='python3'),
                language_info=dict(name='python', pygments_lexer='ipython3'))


def page_of(name):
    "The page of a notebook, named as nbdev names it: without the number."
    return re.sub(r'(^|/)\d+_(?=\w+\.ipynb$)', r'\1', name)


# --- links ---

def target(link, page, base):
    "Where `link`, written in a file of the repository's folder `base`, leads from `page` of the site."
    path, _, anchor = link.partition('#')
    if re.match('[a-z]+:', link) or not path: return link
    path = posixpath.normpath(posixpath.join(base, path))
    inside = path.removeprefix(f'{NBS.name}/')
    if not (ROOT/path).exists(): raise FileNotFoundError(f'{page}: {link} leads to nothing')
    if path in TEXTS: found = TEXTS[path]
    elif path.endswith('.ipynb'): found = page_of(inside)
    elif path.startswith(f'{NBS.name}/images/'): found = inside
    else: return REPOSITORY.format('tree' if (ROOT/path).is_dir() else 'blob', path)
    return posixpath.relpath(found, posixpath.dirname(page) or '.') + (anchor and f'#{anchor}')


@cache
def symbols():
    "What the notebooks export and the site documents: name -> its full name."
    found = {}
    for nb in notebooks():
        for cell in (o for o in nb.code if o.is_exported):
            found.update({o.name: f'{cfg.lib_name}.{nb.default_exp}.{o.name}' for o in defined(cell)})
    return found


def linked(text, page, base):
    "Markdown with its links led to pages, and with each exported name in backticks a link to its documentation."
    def replaced(m):
        s = m[0]
        if s.startswith('`') and s[1:-1].removesuffix('()') in symbols():
            return f'{{py:obj}}`{s[1:-1]} <{symbols()[s[1:-1].removesuffix("()")]}>`'
        link = re.fullmatch(r'(!?\[.*\]\()([^)\s]+)(\))', s, re.DOTALL)
        return link[1] + target(link[2], page, base) + link[3] if link else s
    return INLINE.sub(replaced, text)


# --- what a cell exports ---

def defined(cell):
    "The functions and classes that a cell defines for others."
    top = ast.parse(cell.source).body
    return [o for o in top if isinstance(o, (ast.FunctionDef, ast.ClassDef)) and not o.name.startswith('_')]


def described(text):
    "A comment as Markdown that says just that."
    return re.sub(r'(`[^`]*`)|([*_<[])', lambda m: m[1] or f'\\{m[2]}', ' '.join((text or '').split()))


def parameters(of):
    "What the comments beside the arguments say of them."
    for name, o in docments(of, full=True).items():
        if o['docment']: yield ':returns:' if name == 'return' else f':param {name}:', described(o['docment'])


def fields(node, of):
    "A dataclass' fields: type and default, and what the comments beside them say."
    notes = docments(of, full=True)
    for o in (o for o in node.body if isinstance(o, ast.AnnAssign)):
        name, _, kind = ast.unparse(o).partition(': ')
        text = described(notes.get(name, {}).get('docment'))
        yield f':param {name}:', f'`{kind}`' + (text and f', {text}')


def signature(node):
    "The arguments, as the source has them; those of a class are its constructor's."
    init = next((o for o in getattr(node, 'body', []) if getattr(o, 'name', '') == '__init__'), None)
    called = node if isinstance(node, ast.FunctionDef) else init
    if not called: return ''
    text = re.sub(r'^self(, |$)', '', ast.unparse(called.args))
    return f'({text})' + (f' -> {ast.unparse(called.returns)}' if called.returns else '')


def entry(node, of, kind, more, page):
    "The documentation of a function or class, as a directive of Sphinx's domain of Python."
    of_fields = hasattr(of, '__dataclass_fields__') and kind == 'class'
    notes = fields(node, of) if of_fields else parameters(of)
    said = [f'{what} ' + linked(text, page, '') for what, text in notes]
    text = linked(inspect.cleandoc(ast.get_docstring(node) or ''), page, '')
    name = getattr(of, '__qualname__', node.name)
    return '\n'.join([f'{{py:{kind}}} {name}{signature(node)}', *more, '', text, '', *said])


def fenced(body, ticks): return f'{"`"*ticks}{body}\n{"`"*ticks}'


def documented(cell, module, page):
    "Markdown that documents what `cell` exports: signature, docstring, arguments, and methods with a docstring."
    for node in defined(cell):
        of, where = getattr(import_module(module), node.name), [f':module: {module}']
        if isinstance(node, ast.FunctionDef):
            yield fenced(entry(node, of, 'function', where, page), 3)
            continue
        methods = [o for o in node.body if isinstance(o, ast.FunctionDef) and ast.get_docstring(o) and o.name[0] != '_']
        inner = [fenced(entry(o, inspect.getattr_static(of, o.name), 'method', where, page), 3) for o in methods]
        yield fenced('\n\n'.join([entry(node, of, 'class', where, page), *inner]), 4)


# --- notebooks ---

def opening(source, nb):
    "The title cell, with the badge, an image from elsewhere, as a link of ours; and one to the notebook."
    source_at = REPOSITORY.format('blob', f'{NBS.name}/{nb.name}')
    badge = rf'\[!\[Open in Colab\]\({re.escape(COLAB)}/assets/colab-badge.svg\)\]\((.*?)\)'
    return re.sub(badge, rf'{{.at-head}}\n[Open in Colab](\1) [Notebook on GitHub]({source_at})', source)


def code_cell(cell, nb, page):
    "A code cell as pages have it, after the documentation of what it exports."
    node, tags, settings = shown(cell), [], {}
    if not node or not node.source: return
    if cell.is_exported:
        for o in documented(cell, f'{cfg.lib_name}.{nb.default_exp}', page): yield nbformat.v4.new_markdown_cell(o)
    kind = 'Imports' if cell.imports_alone else 'Source' if cell.is_exported and defined(cell) else ''
    if kind:
        tags += 'hide-input', kind.lower()   # Sphinx makes them classes, for site.js
        settings.update(code_prompt_show=kind, code_prompt_hide=kind)
    if node.metadata['transient']['remove_source']: tags.append('remove-input')
    if cell.fig_alt: settings['image'] = dict(alt=cell.fig_alt)
    yield nbformat.from_dict({**node, 'metadata': dict(tags=tags, mystnb=settings)})


def heading(cell):
    "The level of the heading that a markdown cell is, when it is nothing else; 0 otherwise."
    found = re.fullmatch(r'(#+) .*', cell.source.strip()) if cell.cell_type == 'markdown' else None
    return len(found[1]) if found else 0


def without_empty_sections(cells):
    "Cells without those headings below which all is hidden."
    kept = []
    for cell in reversed(cells):
        level = heading(cell)
        if not level or kept and not re.match(rf'#{{1,{level}}} ', kept[0].source): kept.insert(0, cell)
    return kept


def notebook(nb):
    "The notebook of a page."
    page, base = page_of(nb.name), posixpath.join(NBS.name, nb.part)
    cells = []
    for cell in nb.cells:
        if cell.is_code: cells += code_cell(cell, nb, page)
        else:
            source = opening(cell.source, nb) if cell is nb.cells[0] else cell.source
            cells.append(nbformat.v4.new_markdown_cell(linked(source, page, base)))
    cells = without_empty_sections(cells)
    if nb.stem == 'index': cells.append(nbformat.v4.new_markdown_cell(contents()))
    return nbformat.v4.new_notebook(cells=cells, metadata=NOTEBOOK)


# --- pages that are no notebooks ---

def parts():
    "The folders of chapters, and what the table of index.ipynb says of each."
    text = (NBS/'index.ipynb').read_text(encoding='utf-8')
    return {o.name: re.search(rf'\*\*{o.name}\*\* (.*?) \|', text)[1] for o in sorted(NBS.glob('[0-9]_*'))}


def toctree(caption, pages):
    return '\n'.join(['```{toctree}', ':hidden:', f':caption: {caption}' if caption else '', '', *pages, '```'])


def contents():
    "The trees that the side bar is made of."
    trees = {'Start here': [page_of(f'{o}.ipynb') for o in AT_ROOT], 'Chapters': [f'{o}/index.md' for o in parts()],
             'The project': [*TEXTS.values(), f'On GitHub <{cfg.git_url}>']}
    return '\n\n'.join(toctree(k, v) for k, v in trees.items())


def part_page(part, of, nbs):
    "A page that names a part's chapters, each with its promise."
    number, _, name = part.partition('_')
    lines = [f'# {number} {name.capitalize()}', f'> {of[0].upper()}{of[1:]}.']
    for nb in nbs:
        title, promise = (re.search(rf'^{o} (.*)$', nb.cells[0].source, re.MULTILINE)[1] for o in '#>')
        page = page_of(nb.name)
        lines.append(f'- **[{title}]({posixpath.basename(page)})** ' + linked(promise, f'{part}/index.md', nb.part))
    return '\n\n'.join([*lines, toctree('', [posixpath.basename(page_of(o.name)) for o in nbs])]) + '\n'


def main():
    shutil.rmtree(PROC, ignore_errors=True)
    shutil.copytree(NBS/'images', PROC/'images')
    nbs = notebooks()
    for part, of in parts().items():
        (PROC/part).mkdir()
        mine = [o for o in nbs if o.part == part]
        (PROC/part/'index.md').write_text(part_page(part, of, mine), encoding='utf-8')
    for nb in nbs: nbformat.write(notebook(nb), PROC/page_of(nb.name))
    for source, page in TEXTS.items():
        (PROC/page).write_text(linked((ROOT/source).read_text(encoding='utf-8'), page, ''), encoding='utf-8')
    print(f'{len(nbs)} notebooks, {len(symbols())} names documented')


if __name__ == '__main__': sys.exit(main())
