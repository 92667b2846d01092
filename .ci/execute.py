"""Run notebooks in a kernel and keep what their cells print and plot.

`execute.py --flags realdata 9_results/03_laptop` also runs the cells with that flag; without it they keep the outputs they have.
"""
import argparse

import nbformat
from nbclient import NotebookClient

from cells import NBS, TST_FLAGS, Cell
from stamp import CELL_ID   # what that cell says is of one machine


class FlaggedClient(NotebookClient):
    "Leaves out cells that carry a flag which was not asked for."
    def __init__(self, nb, folder, flags):
        super().__init__(nb, kernel_name='python3', timeout=3600, store_widget_state=False,
                         resources=dict(metadata=dict(path=str(folder))))
        self.skipped = {*TST_FLAGS} - {*flags}

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if self.skipped & {*Cell(cell_index, cell).flags}: return cell
        cell = await super().async_execute_cell(cell, cell_index, **kwargs)
        if cell.cell_type == 'code': cell.outputs = [o for o in cell.outputs if is_lasting(o) and cell.id != CELL_ID]
        return cell


def is_lasting(output):
    "Progress bars and warnings are for whoever runs the notebook, not for whoever reads it."
    return output.get('name') != 'stderr' and 'application/vnd.jupyter.widget-view+json' not in output.get('data', {})


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--flags', nargs='*', default=[], help=f'also run cells marked so: {" ".join(TST_FLAGS)}')
    p.add_argument('names', nargs='+', help='notebooks, such as 2_models/02_vit')
    args = p.parse_args()
    for name in args.names:
        path = NBS/f'{name}.ipynb'
        nb = nbformat.read(path, as_version=4)
        FlaggedClient(nb, path.parent, args.flags).execute()
        nb.metadata.pop('language_info', None)
        path.write_text(nbformat.writes(nb), encoding='utf-8')
        print('executed', name, flush=True)
