"How Sphinx makes the site of what site_pages.py writes; `make docs`."
from configparser import ConfigParser
from pathlib import Path

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml

parser = ConfigParser(delimiters=['='])
parser.read(Path(__file__).parents[2]/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

project, author, copyright, release = cfg['title'], cfg['author'], cfg['copyright'], cfg['version']
language = 'en'
extensions = ['myst_nb', 'sphinx_copybutton']
root_doc = 'index'
nb_execution_mode = 'off'   # pages show the outputs that are committed
nb_merge_streams = True
nb_render_markdown_format = 'myst'
myst_enable_extensions = ['attrs_block', 'dollarmath', 'fieldlist']
myst_heading_anchors = 3
add_module_names = False
smartquotes_action = 'D'   # dashes alone: quotes stay as written
toc_object_entries = False
copybutton_exclude = '.linenos, .gp, .go'
suppress_warnings = ['myst.header']   # a chapter may begin with a third level

html_theme = 'furo'
html_title = cfg['title']
html_baseurl = f"{cfg['doc_host']}{cfg['doc_baseurl']}/"
html_static_path = ['static']
html_css_files, html_js_files = ['site.css'], ['site.js']
html_copy_source = False
html_theme_options = dict(navigation_with_keys=True)
pygments_style, pygments_dark_style = 'a11y-high-contrast-light', 'a11y-high-contrast-dark'
html_math_renderer = 'mathml'   # what browsers draw by themselves

# what furo, Sphinx and pandas leave undone for readers who have pages read out
READ_OUT = {
    '<p class="caption" role="heading">': '<p class="caption" role="heading" aria-level="2">',
    '<aside class="sidebar-drawer">': '<aside class="sidebar-drawer" aria-label="All pages">',
    '<aside class="toc-drawer">': '<aside class="toc-drawer" aria-label="This page">',
    '<div id="search-results">': '<h1>Search</h1>\n<div id="search-results">',
    '<th></th>': '<td></td>',
}


def mathml(translator, node):
    translator.body.append(tex2mathml(node.astext(), as_block=node.tagname == 'math_block'))
    raise SkipNode


def made_readable(app, error):
    for path in Path(app.outdir).rglob('*.html'):
        text = path.read_text(encoding='utf-8')
        for old, new in READ_OUT.items(): text = text.replace(old, new)
        path.write_text(text, encoding='utf-8')


def setup(app):
    app.add_html_math_renderer('mathml', inline_renderers=(mathml, None), block_renderers=(mathml, None))
    app.connect('build-finished', made_readable)
