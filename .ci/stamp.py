"Write each notebook's Colab badge and its first code cell, for the owner, repository and branch of settings.ini."
import re

from cells import NBS, TST_FLAGS, as_text, cfg, notebooks

COLAB = 'https://colab.research.google.com'
CELL_ID = 'colab'


def badge(name):
    "The markdown line under the promise."
    page = f'{COLAB}/github/{cfg.user}/{cfg.repo}/blob/{cfg.branch}/{NBS.name}/{name}'
    return f'[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({page})'


def first_cell(nb, flags):
    "In Colab it fetches the package, or finds it when run again; then it sees to the cells with `flags`."
    at = f'/content/{cfg.repo}'
    source = f'''#| hide
import sys
if 'google.colab' in sys.modules:   # fetch the repository, install the package
    ![ -d {at} ] || git clone -q --depth 1 -b {cfg.branch} https://github.com/{cfg.user}/{cfg.repo} {at}
    %pip install -q "{at}[notebooks]"
    %cd -q {at}/{NBS.name}{nb.part and '/'}{nb.part}'''
    if flags: source += f'''
from {cfg.lib_path.name}.data.notebooks import gate_cells
gate_cells({', '.join(map(repr, flags))})   # leaves out what needs an archive or a GPU that is not here'''
    return dict(cell_type='code', execution_count=None, id=CELL_ID, metadata={}, outputs=[],
                source=source.splitlines(keepends=True))


def with_badge(text, line):
    "`text` of the title cell, with `line` as a paragraph of its own below the promise, or below the title."
    paragraphs = [o for o in re.split(r'\n\s*\n', text.strip()) if not o.startswith('[![Open in Colab]')]
    promise = next((i for i, o in enumerate(paragraphs) if re.search(r'^> ', o, re.MULTILINE)), 0)
    return '\n\n'.join([*paragraphs[:promise+1], line, *paragraphs[promise+1:]])


def stamped(nb):
    "The JSON of `nb` with badge and Colab cell in place; a notebook that does not open with a title is left alone."
    first, *rest = nb.cells
    if first.kind != 'markdown' or not first.source.startswith('# '): return nb.raw
    flags = [f for f in TST_FLAGS if f != 'slow' and any(f in o.flags for o in nb.code)]   # slow ones run anywhere
    title = {**first.raw, 'source': with_badge(first.source, badge(nb.name)).splitlines(keepends=True)}
    return {**nb.raw, 'cells': [title, first_cell(nb, flags), *(o.raw for o in rest if o.id != CELL_ID)]}


if __name__ == '__main__':
    for nb in notebooks():
        if stamped(nb) == nb.raw: continue
        nb.path.write_text(as_text(stamped(nb)), encoding='utf-8')
        print('stamped', nb.name)
